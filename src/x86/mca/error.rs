//! The errors that can be raised, and what each of them writes.
//!
//! The values are those that stock Linux recovers from. On AMD the bank must be that of a memory controller:
//! amd_mce_is_memory_error() (arch/x86/kernel/cpu/mce/amd.c) decides whether the nfit driver records a bad block.

use serde::{Deserialize, Serialize};

use super::bank::status::{
    ADDRV, AR, CECC, CORRECTED_ONE, DEFERRED, EN, MISCV, OVER, PCC, POISON, S, TCC, UC, VAL,
};
use super::{Flavour, MCG_EIPV, MCG_LMCES, MCG_RIPV, McaConfig};

/// What kind of error it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorClass {
    /// Poison was loaded, or read by a page walk: software must recover before it resumes (SRAR).
    Load,
    /// Poison was fetched as an instruction (SRAR).
    Fetch,
    /// Poison was found, but not consumed, and is signalled by a machine check (SRAO). AMD defers such errors.
    ActionOptional,
    /// Poison was found and is only logged (UCNA). AMD defers such errors.
    NoAction,
    /// Poison was found by hardware and waits for a consumer. On Intel this is UCNA.
    Deferred,
    /// The error was corrected.
    Corrected,
}

/// An error to raise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MachineError {
    /// What kind.
    pub class: ErrorClass,
    /// Guest-physical address; the bits below the granularity are not reported.
    pub address: u64,
    /// Least significant bit of the address that is valid: 6 for a line, 12 for a page.
    pub granularity: u8,
    /// The processor's context is corrupt: the guest cannot recover.
    pub context_corrupt: bool,
    /// Another error was lost.
    pub overflow: bool,
}

impl MachineError {
    /// An error in one line of 64 bytes.
    pub fn line(class: ErrorClass, address: u64) -> Self {
        Self { class, address, granularity: 6, context_corrupt: false, overflow: false }
    }

    /// An error of which no more is known than the page of 4 KiB.
    pub fn page(class: ErrorClass, address: u64) -> Self {
        Self { granularity: 12, ..Self::line(class, address) }
    }
}

/// Which processors get a machine check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reach {
    /// As the guest's machine-check architecture has it: always local on AMD, and on Intel if MCG_STATUS is to say so
    /// (LMCES), as it does when the guest has enabled local machine checks; otherwise broadcast.
    Architecture,
    /// The one that has the error alone. On Intel without local machine checks no hardware does this, and Linux
    /// waits in vain for the others.
    Local,
    /// All of them, as on Intel without local machine checks.
    Broadcast,
}

/// An error in the form of registers: what an expert may also write himself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BankRecord {
    /// Bank number.
    pub bank: u8,
    /// MCi_STATUS.
    pub status: u64,
    /// MCi_ADDR.
    pub address: u64,
    /// MCi_MISC.
    pub misc: u64,
    /// MCG_STATUS without MCIP, if a machine check is raised; `None` if the error is only logged.
    pub mcg_status: Option<u64>,
}

/// MCi_MISC: the address is a physical one.
const MISC_PHYSICAL: u64 = 2 << 6;
/// Error codes of Intel (SDM volume 3, 17.9): data load, instruction fetch, memory scrubbing, memory read.
const CODE_LOAD: u64 = 0x134;
const CODE_FETCH: u64 = 0x150;
const CODE_SCRUB: u64 = 0xc0;
const CODE_MEMORY_READ: u64 = 0x90;
/// Error code of AMD: memory, read, level generic (APM volume 2, 9.3.2.5). Extended code 0 is a UMC's DRAM ECC
/// error, 8 the northbridge's.
const CODE_AMD_MEMORY: u64 = 0x11b;
const CODE_AMD_NORTHBRIDGE: u64 = 8 << 16;
/// Banks: a core's own and a memory controller's on Intel; the northbridge; a UMC.
const BANK_INTEL_CORE: u8 = 1;
const BANK_INTEL_MEMORY: u8 = 7;
const BANK_NORTHBRIDGE: u8 = 4;
const BANK_UMC: u8 = 1;

impl MachineError {
    /// The registers that this error writes. `local` says that on Intel it goes to one processor alone.
    pub fn record(&self, config: &McaConfig, local: bool) -> BankRecord {
        let granularity = u32::from(self.granularity.min(51));
        let mut record = match config.flavour {
            Flavour::Intel => self.intel(config.recovery, local),
            Flavour::Smca => self.amd(BANK_UMC, CODE_AMD_MEMORY, TCC),
            Flavour::AmdLegacy => self.amd(BANK_NORTHBRIDGE, CODE_AMD_MEMORY | CODE_AMD_NORTHBRIDGE, 0),
        };
        record.address = self.address & (u64::MAX << granularity);
        record.misc = MISC_PHYSICAL | u64::from(granularity);
        if self.overflow {
            record.status |= OVER;
        }
        record
    }

    fn intel(&self, recovery: bool, local: bool) -> BankRecord {
        let common = VAL | EN | MISCV | ADDRV;
        let (bank, mut status, mut mcg_status) = match self.class {
            ErrorClass::Load => {
                (BANK_INTEL_CORE, common | UC | S | AR | CODE_LOAD, Some(MCG_RIPV | MCG_EIPV))
            }
            ErrorClass::Fetch => {
                (BANK_INTEL_CORE, common | UC | S | AR | CODE_FETCH, Some(MCG_RIPV | MCG_EIPV))
            }
            ErrorClass::ActionOptional => (BANK_INTEL_MEMORY, common | UC | S | CODE_SCRUB, Some(MCG_RIPV)),
            ErrorClass::NoAction | ErrorClass::Deferred => {
                (BANK_INTEL_MEMORY, common | UC | CODE_SCRUB, None)
            }
            ErrorClass::Corrected => {
                (BANK_INTEL_MEMORY, VAL | MISCV | ADDRV | CORRECTED_ONE | CODE_MEMORY_READ, None)
            }
        };
        if self.context_corrupt {
            status = (status | UC | EN | PCC) & !(S | AR);
            mcg_status = Some(MCG_EIPV);
        }
        // Without MCG_CAP.SER_P these bits mean nothing.
        if !recovery {
            status &= !(S | AR);
        }
        if local {
            mcg_status = mcg_status.map(|bits| bits | MCG_LMCES);
        }
        BankRecord { bank, status, address: 0, misc: 0, mcg_status }
    }

    fn amd(&self, bank: u8, code: u64, task_corrupt: u64) -> BankRecord {
        let common = VAL | EN | MISCV | ADDRV | code;
        let (mut status, mut mcg_status) = match self.class {
            ErrorClass::Load | ErrorClass::Fetch => (common | UC | POISON, Some(MCG_RIPV | MCG_EIPV)),
            ErrorClass::ActionOptional | ErrorClass::NoAction | ErrorClass::Deferred => {
                (common | DEFERRED | POISON, None)
            }
            ErrorClass::Corrected => (common | CECC, None),
        };
        if self.context_corrupt {
            status = (status | UC | PCC | task_corrupt) & !(DEFERRED | CECC);
            mcg_status = Some(MCG_EIPV);
        }
        BankRecord { bank, status, address: 0, misc: 0, mcg_status }
    }
}
