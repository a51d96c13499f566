//! What commands are answered with.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    Census, CperAccepted, DiskReply, Error, FirmwareState, FlushState, MceQueued, PowerLoss, RemoveMode,
};
use crate::config::{Channel, Via};
use crate::host::usage::Usage;
use crate::memory::{GuardMethod, PoisonPolicy, StaleAnswer};
use crate::units::{Address, ByteRange};

/// The answer to a command that was carried out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// There is nothing to say.
    Done,
    /// About the machine.
    Machine(MachineInfo),
    /// All memory devices.
    MemoryList(Vec<MemoryDevice>),
    /// One memory device.
    Memory(MemoryDevice),
    /// Poison was added.
    PoisonAdded(PoisonAdded),
    /// Poison was added, to one or several devices.
    PoisonPlaced(PoisonPlaced),
    /// The poison that there is.
    PoisonList(PoisonState),
    /// What poison of a device does to processors.
    PoisonPolicy(PoisonPolicy),
    /// Poison was cleared.
    PoisonCleared(PoisonCleared),
    /// A machine check waits for its vCPU.
    MceQueued(MceQueued),
    /// An error record was taken.
    Cper(CperAccepted),
    /// About disks.
    Disk(DiskReply),
    /// About the flushes of a device.
    Flush(FlushState),
    /// Something was begun that goes on in events.
    Operation(Operation),
    /// Who maps a device.
    Census(Box<Census>),
    /// What touching a departed device does.
    Stale(StaleState),
    /// The faults of a device's firmware.
    Firmware(FirmwareState),
    /// What a loss of power did.
    PowerLoss(PowerLoss),
}

/// What a machine does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum MachineState {
    /// It is being built.
    Starting,
    /// Its vCPUs run.
    Running,
    /// Its vCPUs stand still on request.
    Paused,
    /// The guest has ended.
    Stopped,
}

impl DeviceState {
    /// The word for it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Present => "present",
            Self::Leaving => "leaving",
            Self::Departed => "departed",
        }
    }
}

impl MachineState {
    /// The word for it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        }
    }
}

/// About a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct MachineInfo {
    /// What it does.
    pub state: MachineState,
    /// Version of the monitor.
    pub version: String,
    /// Process id of the monitor.
    pub pid: u32,
    /// The kernel file.
    pub kernel: String,
    /// The version that the kernel file carries, if it carries one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel_version: Option<String>,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Bytes of RAM.
    pub memory: u64,
    /// Bytes of RAM that are poisoned.
    pub memory_poisoned: u64,
    /// Where KVM comes from: `kvm` or `nested`.
    pub host: String,
    /// Whether the agent in the guest answers.
    pub agent: bool,
    /// Slots that are free for further devices.
    pub free_slots: u32,
    /// PCI Express ports whose slots take a card now.
    pub free_ports: u32,
    /// Host bridges that can come with a card now.
    pub free_bridges: u32,
    /// What the monitor holds of its host.
    pub monitor: Usage,
    /// Nanoseconds since the monitor started.
    pub uptime_ns: u64,
}

/// What kind of memory a device is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum MemoryKind {
    /// Persistent memory.
    Pmem,
}

/// Where a device stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum DeviceState {
    /// The guest can reach it.
    Present,
    /// It is on its way out.
    Leaving,
    /// It is gone; touches of its addresses, if it had any, are reported.
    Departed,
}

/// A memory device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct MemoryDevice {
    /// Its id.
    pub id: String,
    /// What kind of memory it is.
    pub kind: MemoryKind,
    /// Where it stands.
    pub state: DeviceState,
    /// Guest-physical address of its first byte.
    pub gpa: Address,
    /// Its size in bytes.
    pub size: u64,
    /// How the guest is told of it.
    pub via: Via,
    /// How it can be removed.
    pub channel: Channel,
    /// Why it cannot be removed, where `channel` is `none`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub no_channel_because: Option<String>,
    /// Its proximity domain.
    pub node: u32,
    /// Whether the guest can only read it.
    pub readonly: bool,
    /// The file that holds its bytes; missing for memory that lives until the machine quits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// Bytes that are poisoned.
    pub poisoned: u64,
    /// Touches of it after its departure, or while it was locked.
    pub stale_accesses: u64,
    /// Whether nobody gets at its data before a passphrase is given.
    pub locked: bool,
    /// The NVDIMM bus that it shares with other devices.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bus: Option<String>,
    /// What the NFIT says its range is; missing for devices that no NFIT describes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub range: Option<String>,
    /// The DIMMs that it lies on, in the order of its interleave set.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub dimms: Vec<MemoryDimm>,
}

/// A DIMM that a memory device lies on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct MemoryDimm {
    /// Its NFIT device handle, by which guests know it (`handle` in the guest's sysfs).
    pub handle: Address,
    /// Its serial number in hexadecimal, as the guest shows it.
    pub serial: String,
    /// The name that it was given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Whether it has a passphrase.
    pub secured: bool,
    /// Whether it waits for its passphrase.
    pub locked: bool,
}

/// Poison was added.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PoisonAdded {
    /// The device.
    pub device: String,
    /// What is poisoned by it: the requested ranges, widened to the granularity, sorted and merged.
    pub armed: Vec<ByteRange>,
    /// Bytes of the smallest unit that can be poisoned.
    pub granularity: u64,
    /// Whether `armed` is more than what was requested.
    pub rounded: bool,
    /// What is guarded for it, and for all other poison of the device.
    pub guard: PoisonGuard,
}

/// Poison was added by address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PoisonPlaced {
    /// What was poisoned of each device, and of RAM.
    pub placed: Vec<PoisonAdded>,
}

/// How the accesses to poison are met: pages that hold some are out of the guest's reach, and each access to one is
/// looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PoisonGuard {
    /// By what means.
    pub method: GuardMethod,
    /// Pages of 4096 bytes that are out of reach.
    pub guarded_pages: u64,
    /// Those of them in which nothing is poisoned: the host has too few maps to leave them out. They are as they were,
    /// but slow.
    pub clean_guarded_pages: u64,
}

/// The poison of a device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PoisonState {
    /// The device.
    pub device: String,
    /// What is poisoned, sorted and merged, from the offset on that the request names, and no more than it allows.
    pub ranges: Vec<ByteRange>,
    /// Where the next request goes on; missing when there is no more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<Address>,
    /// Bytes of the smallest unit that can be poisoned.
    pub granularity: u64,
    /// Poisoned bytes in all.
    pub bytes: u64,
    /// What is guarded for it.
    pub guard: PoisonGuard,
}

/// Poison was cleared.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PoisonCleared {
    /// The device.
    pub device: String,
    /// What was poisoned before and is good now.
    pub cleared: Vec<ByteRange>,
    /// Bytes of the smallest unit that can be cleared.
    pub granularity: u64,
    /// What the guest still believes.
    pub note: String,
}

impl PoisonCleared {
    /// What [`PoisonCleared::note`] says: clearing by the API is a change of media that no guest can see.
    pub const GUEST_KEEPS_ITS_LIST: &'static str = "The media is good, but the guest's own list of bad blocks stays \
         as it is until the guest writes to them or scrubs; a page that it has marked as poisoned stays so";
}

/// What touching a memory device does once it has departed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct StaleState {
    /// The device.
    pub device: String,
    /// What a processor gets.
    pub answer: StaleAnswer,
    /// Accesses up to now.
    pub accesses: u64,
}

/// A change of what touching a departed device does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct StaleChange {
    /// What a processor gets.
    pub answer: StaleAnswer,
}

/// Something that takes time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Operation {
    /// Its number: events carry it, and its state is asked for by it.
    pub operation: u64,
    /// What is being done: `remove` or `insert`.
    pub kind: String,
    /// The device.
    pub device: String,
    /// Where it stands.
    pub state: OperationState,
    /// How a removal was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<RemoveMode>,
    /// The channel that is used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub channel: Option<Channel>,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<Error>,
}

impl Operation {
    /// Something of this kind that is still to get its number, and goes on.
    pub fn new(kind: &str, device: &str, channel: Channel) -> Self {
        Self {
            operation: 0,
            kind: kind.to_owned(),
            device: device.to_owned(),
            state: OperationState::Running,
            mode: None,
            channel: Some(channel),
            error: None,
        }
    }
}

/// Where an operation stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OperationState {
    /// It goes on; the event `operation_finished` will end it.
    Running,
    /// It is done.
    Done,
    /// It failed.
    Failed,
}
