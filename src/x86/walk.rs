//! The guest's page tables, walked in the monitor.
//!
//! `KVM_TRANSLATE` does not serve: it fails for user pages under SMAP, and says neither which table entries were
//! read (a poisoned line under a page table is consumed by the walk) nor what the page permits. The rules are those
//! of the Intel SDM volume 3, chapter 5 "Paging" (sections 5.3 to 5.6), which the AMD APM volume 2, chapter 5 shares.

use kvm_bindings::kvm_sregs;
use thiserror::Error;

/// CR0.PE: protected mode.
pub const CR0_PE: u64 = 1 << 0;
/// CR0.WP: supervisor writes obey the writable bit.
pub const CR0_WP: u64 = 1 << 16;
/// CR0.PG: paging.
pub const CR0_PG: u64 = 1 << 31;
/// CR4.PSE: 4 MiB pages in 32-bit paging.
pub const CR4_PSE: u64 = 1 << 4;
/// CR4.PAE: 8-byte table entries.
pub const CR4_PAE: u64 = 1 << 5;
/// CR4.MCE: machine checks are delivered as exceptions.
pub const CR4_MCE: u64 = 1 << 6;
/// CR4.LA57: five levels.
pub const CR4_LA57: u64 = 1 << 12;
/// CR4.SMEP: the supervisor fetches no instructions from user pages.
pub const CR4_SMEP: u64 = 1 << 20;
/// CR4.SMAP: the supervisor reads and writes user pages only with EFLAGS.AC set.
pub const CR4_SMAP: u64 = 1 << 21;
/// CR4.PKE: protection keys for user pages.
pub const CR4_PKE: u64 = 1 << 22;
/// EFER.LMA: long mode is active.
pub const EFER_LMA: u64 = 1 << 10;
/// EFER.NXE: bit 63 of an entry forbids fetches.
pub const EFER_NXE: u64 = 1 << 11;

const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
/// Bits 51:12 of an entry or of CR3.
const FRAME: u64 = 0x000f_ffff_ffff_f000;

/// Reads guest-physical memory for the walk and for instruction bytes.
///
/// Absent memory is a value, not an error: a guest may point its page tables anywhere.
pub trait PhysRead {
    /// The little-endian 64-bit word at `gpa`, which is a multiple of eight; `None` where there is no memory.
    fn read_u64(&self, gpa: u64) -> Option<u64>;

    /// Fills `buffer` from `gpa`, and returns how many bytes could be read before memory ended.
    fn read_bytes(&self, gpa: u64, buffer: &mut [u8]) -> usize {
        let mut done = 0;
        while done < buffer.len() {
            let Some(at) = gpa.checked_add(done as u64) else { break };
            let Some(word) = self.read_u64(at & !7) else { break };
            let bytes = word.to_le_bytes();
            let skip = (at & 7) as usize;
            let take = (bytes.len() - skip).min(buffer.len() - done);
            buffer[done..done + take].copy_from_slice(&bytes[skip..skip + take]);
            done += take;
        }
        done
    }
}

impl<F: Fn(u64) -> Option<u64>> PhysRead for F {
    fn read_u64(&self, gpa: u64) -> Option<u64> {
        self(gpa)
    }
}

/// The registers that decide how a linear address is translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Paging {
    /// Control register 0.
    pub cr0: u64,
    /// Control register 3: where the top table is.
    pub cr3: u64,
    /// Control register 4.
    pub cr4: u64,
    /// The EFER register.
    pub efer: u64,
    /// Physical address bits of the guest's processor (CPUID 0x80000008 EAX bits 7:0); more count as reserved.
    pub physical_bits: u8,
}

/// How the tables are laid out (SDM volume 3, 5.1.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// CR0.PG is clear: a linear address is a physical one.
    Off,
    /// Two levels of 4-byte entries.
    Bits32,
    /// Three levels of 8-byte entries.
    Pae,
    /// Four levels.
    Level4,
    /// Five levels.
    Level5,
}

impl Paging {
    /// Takes the registers out of what KVM_GET_SREGS gave.
    pub fn new(sregs: &kvm_sregs, physical_bits: u8) -> Self {
        Self { cr0: sregs.cr0, cr3: sregs.cr3, cr4: sregs.cr4, efer: sregs.efer, physical_bits }
    }

    /// The layout of the tables.
    pub fn mode(&self) -> Mode {
        if self.cr0 & CR0_PG == 0 {
            Mode::Off
        } else if self.efer & EFER_LMA != 0 {
            if self.cr4 & CR4_LA57 != 0 { Mode::Level5 } else { Mode::Level4 }
        } else if self.cr4 & CR4_PAE != 0 {
            Mode::Pae
        } else {
            Mode::Bits32
        }
    }

    /// Whether `linear` is canonical. Outside long mode every 32-bit address is.
    pub fn canonical(&self, linear: u64) -> bool {
        let bits = match self.mode() {
            Mode::Level5 => 57,
            Mode::Level4 => 48,
            Mode::Off | Mode::Bits32 | Mode::Pae => return linear >> 32 == 0,
        };
        let shift = 64 - bits;
        ((linear << shift) as i64 >> shift) as u64 == linear
    }

    /// Walks the tables for `linear`.
    ///
    /// The walk reads the tables as they are in memory; a processor may still hold an older translation in its TLB.
    pub fn walk(&self, memory: &impl PhysRead, linear: u64) -> Walk {
        let mut walk = Walk { entries: Vec::with_capacity(5), result: Err(NotTranslated::NonCanonical) };
        if self.canonical(linear) {
            walk.result = match self.mode() {
                Mode::Off => Ok(Translation {
                    gpa: linear,
                    page_size: 4096,
                    writable: true,
                    user: true,
                    executable: true,
                    accessed: true,
                    dirty: true,
                    protection_key: None,
                }),
                Mode::Bits32 => self.walk_32(memory, linear, &mut walk.entries),
                Mode::Pae => self.walk_64(memory, linear, 3, &mut walk.entries),
                Mode::Level4 => self.walk_64(memory, linear, 4, &mut walk.entries),
                Mode::Level5 => self.walk_64(memory, linear, 5, &mut walk.entries),
            };
        }
        walk
    }

    fn walk_64(
        &self,
        memory: &impl PhysRead,
        linear: u64,
        levels: u8,
        entries: &mut Vec<TableEntry>,
    ) -> Result<Translation, NotTranslated> {
        let pae = levels == 3;
        let physical = physical_mask(self.physical_bits);
        let no_execute = self.efer & EFER_NXE != 0;
        let mut reserved = 0x000f_ffff_ffff_ffff & !physical;
        if !no_execute {
            reserved |= NO_EXECUTE;
        }
        if pae {
            // SDM volume 3, 5.4.2: bits 62:52 are reserved too.
            reserved |= 0x7ff0_0000_0000_0000;
        }
        let (mut writable, mut user, mut executable, mut accessed) = (true, true, true, true);
        // The top table of PAE paging is 32-byte aligned and has four entries.
        let mut table = if pae { self.cr3 & 0xffff_ffe0 } else { self.cr3 & FRAME & physical };
        let mut level = levels;
        loop {
            let shift = 12 + 9 * u32::from(level - 1);
            let index = if pae && level == 3 { (linear >> 30) & 3 } else { (linear >> shift) & 511 };
            let at = table + index * 8;
            let entry = memory.read_u64(at).ok_or(NotTranslated::NoMemory { entry: at })?;
            entries.push(TableEntry { gpa: at, size: 8 });
            if entry & PRESENT == 0 {
                return Err(NotTranslated::NotPresent { level });
            }
            let directory_pointer = pae && level == 3;
            let large = entry & LARGE != 0 && !directory_pointer;
            let leaf = level == 1 || (large && level <= if pae { 2 } else { 3 });
            let mut forbidden = reserved;
            if directory_pointer {
                // SDM volume 3, table 5-8: no rights here, and bits 2:1, 8:5 and 63 are reserved.
                forbidden |= NO_EXECUTE | 0x1e6;
            } else if large && !leaf {
                // The page-size bit of levels 4 and 5.
                forbidden |= LARGE;
            } else if leaf && level > 1 {
                // Between the PAT bit (12) and the frame of a large page.
                forbidden |= ((1 << shift) - 1) & !0x1fff;
            }
            if entry & forbidden != 0 {
                return Err(NotTranslated::ReservedBit { level, entry });
            }
            if !directory_pointer {
                writable &= entry & WRITABLE != 0;
                user &= entry & USER != 0;
                executable &= !no_execute || entry & NO_EXECUTE == 0;
                accessed &= entry & ACCESSED != 0;
            }
            if leaf {
                let offset = (1u64 << shift) - 1;
                return Ok(Translation {
                    gpa: (entry & FRAME & physical & !offset) | (linear & offset),
                    page_size: offset + 1,
                    writable,
                    user,
                    executable,
                    accessed,
                    dirty: entry & DIRTY != 0,
                    protection_key: (!pae).then_some(((entry >> 59) & 15) as u8),
                });
            }
            table = entry & FRAME & physical;
            level -= 1;
        }
    }

    /// SDM volume 3, 5.3: two levels of 4-byte entries, 4 MiB pages with up to 40 address bits (PSE-36).
    fn walk_32(
        &self,
        memory: &impl PhysRead,
        linear: u64,
        entries: &mut Vec<TableEntry>,
    ) -> Result<Translation, NotTranslated> {
        let mut read = |at: u64| {
            let word = memory.read_u64(at & !7).ok_or(NotTranslated::NoMemory { entry: at })?;
            entries.push(TableEntry { gpa: at, size: 4 });
            Ok(if at & 4 == 0 { word & 0xffff_ffff } else { word >> 32 })
        };
        let directory = read((self.cr3 & 0xffff_f000) + ((linear >> 22) & 1023) * 4)?;
        if directory & PRESENT == 0 {
            return Err(NotTranslated::NotPresent { level: 2 });
        }
        let (entry, page_size, gpa, rights);
        if directory & LARGE != 0 && self.cr4 & CR4_PSE != 0 {
            let high = (directory >> 13) & 0xff;
            if directory & (1 << 21) != 0 || (high << 32) & !physical_mask(self.physical_bits) != 0 {
                return Err(NotTranslated::ReservedBit { level: 2, entry: directory });
            }
            entry = directory;
            page_size = 1 << 22;
            gpa = (high << 32) | (directory & 0xffc0_0000) | (linear & 0x3f_ffff);
            rights = directory;
        } else {
            entry = read((directory & 0xffff_f000) + ((linear >> 12) & 1023) * 4)?;
            if entry & PRESENT == 0 {
                return Err(NotTranslated::NotPresent { level: 1 });
            }
            page_size = 1 << 12;
            gpa = (entry & 0xffff_f000) | (linear & 0xfff);
            rights = directory & entry;
        }
        Ok(Translation {
            gpa,
            page_size,
            writable: rights & WRITABLE != 0,
            user: rights & USER != 0,
            executable: true,
            accessed: rights & ACCESSED != 0,
            dirty: entry & DIRTY != 0,
            protection_key: None,
        })
    }
}

/// Bits that a physical address may have.
fn physical_mask(bits: u8) -> u64 {
    (1u64 << bits.clamp(32, 52)) - 1
}

/// A table entry that the walk read: it counts as accessed memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableEntry {
    /// Guest-physical address of the entry.
    pub gpa: u64,
    /// Bytes: 8, or 4 in 32-bit paging.
    pub size: u32,
}

/// What a walk read, and where it ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Walk {
    /// The entries read, from the top table down; the last one may be the entry that ended the walk.
    pub entries: Vec<TableEntry>,
    /// The translation, or why there is none.
    pub result: Result<Translation, NotTranslated>,
}

/// Where a linear address leads, and what may be done there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// Guest-physical address of the byte.
    pub gpa: u64,
    /// Bytes in the page: 4 KiB, 2 MiB, 4 MiB or 1 GiB.
    pub page_size: u64,
    /// Every level permits writing.
    pub writable: bool,
    /// Every level permits user mode.
    pub user: bool,
    /// No level forbids fetching.
    pub executable: bool,
    /// The accessed bits of all entries: clear means that the processor still has to write one of them.
    pub accessed: bool,
    /// The leaf's dirty bit: clear means that a store still has to write the entry.
    pub dirty: bool,
    /// The leaf's protection key, in the modes that have one.
    pub protection_key: Option<u8>,
}

/// Why a linear address leads nowhere. The guest would see #GP for the first, #PF for the next two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum NotTranslated {
    /// The upper bits do not repeat the sign bit.
    #[error("The address is not canonical")]
    NonCanonical,
    /// An entry is not present.
    #[error("The level {level} page-table entry is not present")]
    NotPresent {
        /// 1 for the page table, up to 5.
        level: u8,
    },
    /// An entry sets a reserved bit.
    #[error("The level {level} page-table entry {entry:#x} has a reserved bit set")]
    ReservedBit {
        /// 1 for the page table, up to 5.
        level: u8,
        /// The entry.
        entry: u64,
    },
    /// The tables lead to an address without memory.
    #[error("The page-table entry at guest-physical {entry:#x} is not in memory")]
    NoMemory {
        /// Guest-physical address of the entry.
        entry: u64,
    },
}

/// Who makes an access, and how: what the permissions are held against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Intent {
    /// The access writes.
    pub write: bool,
    /// The access is an instruction fetch.
    pub fetch: bool,
    /// The access is made in user mode (CPL 3, and not an implicit access to a descriptor table).
    pub user: bool,
    /// The access is exempt from SMAP: EFLAGS.AC is set and the access is explicit.
    pub smap_exempt: bool,
    /// The PKRU register; `None` lets every protection key pass.
    pub pkru: Option<u32>,
}

impl Translation {
    /// Whether the page permits this access (SDM volume 3, 5.6 and 5.6.2).
    pub fn permits(&self, paging: &Paging, intent: Intent) -> bool {
        if paging.cr0 & CR0_PG == 0 {
            return true;
        }
        if intent.fetch {
            return self.executable
                && if intent.user { self.user } else { !(self.user && paging.cr4 & CR4_SMEP != 0) };
        }
        let write_protect = paging.cr0 & CR0_WP != 0;
        if intent.user {
            if !self.user {
                return false;
            }
        } else if self.user && paging.cr4 & CR4_SMAP != 0 && !intent.smap_exempt {
            return false;
        }
        if intent.write && !self.writable && (intent.user || write_protect) {
            return false;
        }
        match (self.protection_key, intent.pkru) {
            (Some(key), Some(pkru)) if self.user && paging.cr4 & CR4_PKE != 0 => {
                let denied = pkru >> (2 * u32::from(key));
                denied & 1 == 0 && !(denied & 2 != 0 && intent.write && (intent.user || write_protect))
            }
            _ => true,
        }
    }
}

#[cfg(test)]
#[path = "walk_test.rs"]
mod tests;
