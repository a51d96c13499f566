//! What a census of the guest's page tables says.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::units::Address;

/// Mappings that a reply lists of each half.
pub const LISTED: usize = 1024;
/// Mappings that an event lists of each half.
pub const LISTED_IN_EVENT: usize = 32;

/// Who maps a memory device: the page tables of all processes and of the kernel, walked while the vCPUs stood still.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Census {
    /// The device.
    pub device: String,
    /// Guest-physical address of its first byte.
    pub gpa: Address,
    /// Its size in bytes.
    pub size: u64,
    /// Whether it has departed. Processes are then named by what they have mapped at the address: looking at the page
    /// itself crashes Linux 7.2 (`pagemap_pmd_range()`, fs/proc/task_mmu.c).
    pub departed: bool,
    /// Address spaces that were found and walked.
    pub address_spaces: u64,
    /// Pages of guest memory that were looked at for them.
    pub scanned_pages: u64,
    /// Page tables that were read.
    pub tables: u64,
    /// How long it took, in microseconds, with all vCPUs standing still.
    pub microseconds: u64,
    /// Whether everything was looked into. False if a guest's tables have no end, or are of a kind that is not known.
    pub complete: bool,
    /// What processes map.
    pub user: CensusHalf,
    /// What the kernel maps: its direct map of the device, and page descriptors that lie on it.
    pub kernel: CensusHalf,
    /// What a census cannot see.
    pub unseen: String,
}

/// What half of the address spaces maps.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CensusHalf {
    /// Entries of page tables that map some of the device.
    pub entries: u64,
    /// Bytes that they map, of each entry.
    pub bytes: u64,
    /// Runs of pages.
    pub mappings: Vec<CensusMapping>,
    /// Runs that are not listed.
    pub more: u64,
}

/// A run of pages that an address space maps.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CensusMapping {
    /// The top page table, which tells processes apart.
    pub cr3: Address,
    /// Virtual address of the first byte.
    pub va: Address,
    /// Offset of that byte in the device.
    pub offset: Address,
    /// Number of bytes.
    pub bytes: u64,
    /// Bytes of each page.
    pub page_size: u64,
    /// Whether it can be written to.
    pub writable: bool,
    /// The processes that have it, where the agent could name them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub processes: Vec<CensusProcess>,
}

/// A process of the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CensusProcess {
    /// Its number.
    pub pid: u32,
    /// Its name (`/proc/PID/comm`).
    pub name: String,
}

impl Census {
    /// What [`Census::unseen`] says.
    pub const UNSEEN: &'static str = "Pages that are pinned without being mapped (get_user_pages, io_uring, vfio) and \
        requests of devices that are under way are in no page table: the latter are stopped by their generation, the \
        former show when they touch the device";

    /// Leaves the first `most` mappings of each half.
    pub fn shorten(&mut self, most: usize) {
        for half in [&mut self.user, &mut self.kernel] {
            half.more += half.mappings.len().saturating_sub(most) as u64;
            half.mappings.truncate(most);
        }
    }
}
