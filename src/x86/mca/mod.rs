//! The machine-check architecture of the guest, owned by the monitor.
//!
//! KVM's own (KVM_X86_SETUP_MCE) drops the recovery bits on AMD hosts and has no scalable banks, so the MSRs of
//! [`McaConfig::msr_ranges`] are filtered to the monitor, [`McaState`] answers for them, and the monitor injects
//! vector 18 itself when [`Raised::consequence`] says so. The errors are in [`MachineError`], the rules of the
//! registers in Intel SDM volume 3, chapter 17 ("Machine-check architecture") and AMD APM volume 2, chapter 9.

mod bank;
mod error;
mod state;

use serde::{Deserialize, Serialize};

use super::cpuid::Vendor;

pub use bank::status;
pub use error::{BankRecord, ErrorClass, MachineError, Reach};
pub use state::{Consequence, GeneralProtection, Logged, McaState, Raised, ShutdownCause};

/// IA32_MCG_CAP: what there is.
pub const MCG_CAP: u32 = 0x179;
/// IA32_MCG_STATUS: what has happened.
pub const MCG_STATUS: u32 = 0x17a;
/// IA32_MCG_CTL: which banks report.
pub const MCG_CTL: u32 = 0x17b;
/// IA32_MCG_EXT_CTL: enables local machine checks.
pub const MCG_EXT_CTL: u32 = 0x4d0;
/// IA32_FEATURE_CONTROL: firmware's permission for local machine checks.
pub const FEATURE_CONTROL: u32 = 0x3a;
/// IA32_MC0_CTL2: thresholds of corrected errors; one MSR a bank.
pub const MC0_CTL2: u32 = 0x280;
/// IA32_MC0_CTL: four MSRs a bank.
pub const MC0_CTL: u32 = 0x400;
/// MC4_MISC1 on AMD: further threshold registers, which are not implemented and read as zero.
pub const MC4_MISC1: u32 = 0xc000_0408;
/// MCA_INTR_CFG on AMD: vectors for deferred and threshold interrupts.
pub const MCA_INTERRUPT_CONFIG: u32 = 0xc000_0410;
/// The first of sixteen MSRs for each bank of AMD's scalable MCA.
pub const SMCA_MC0_CTL: u32 = 0xc000_2000;
/// HWCR on AMD: bit 18 lets software write error status.
pub const HWCR: u32 = 0xc001_0015;

/// MCG_STATUS: the interrupted program can be resumed.
pub const MCG_RIPV: u64 = 1 << 0;
/// MCG_STATUS: the instruction pointer belongs to the error.
pub const MCG_EIPV: u64 = 1 << 1;
/// MCG_STATUS: a machine check is being handled.
pub const MCG_MCIP: u64 = 1 << 2;
/// MCG_STATUS: the machine check went to this processor alone.
pub const MCG_LMCES: u64 = 1 << 3;

/// How the banks are laid out, and what they can say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Flavour {
    /// AMD's scalable MCA: banks identify their unit, and memory errors come from a UMC.
    Smca,
    /// AMD before that: memory errors come from bank 4, the northbridge.
    #[serde(rename = "legacy")]
    AmdLegacy,
    /// Intel: errors say what software must do.
    Intel,
}

impl Flavour {
    /// The vendor whose processors have it.
    pub fn vendor(self) -> Vendor {
        match self {
            Self::Smca | Self::AmdLegacy => Vendor::Amd,
            Self::Intel => Vendor::Intel,
        }
    }
}

/// What the guest's machine-check architecture is able to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct McaConfig {
    /// The layout of the banks.
    pub flavour: Flavour,
    /// Errors can be recovered from: MCG_CAP.SER_P on Intel, SUCCOR and OVERFLOW_RECOV on AMD. Linux panics or loops
    /// without it.
    pub recovery: bool,
    /// Intel: an error in one processor goes to that one alone (MCG_CAP.LMCE_P), once the guest enables it.
    pub lmce: bool,
    /// Intel: corrected errors raise an interrupt (MCG_CAP.CMCI_P). Only where the virtual APIC carries it.
    pub cmci: bool,
}

/// A run of MSRs for the KVM MSR filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsrRange {
    /// First index.
    pub base: u32,
    /// Number of MSRs.
    pub count: u32,
}

impl McaConfig {
    /// The default for a vendor: scalable MCA on AMD, local machine checks on Intel, recovery on both.
    pub fn for_vendor(vendor: Vendor) -> Self {
        match vendor {
            Vendor::Amd => Self { flavour: Flavour::Smca, recovery: true, lmce: false, cmci: false },
            Vendor::Intel => Self { flavour: Flavour::Intel, recovery: true, lmce: true, cmci: false },
        }
    }

    /// Number of banks: a load-store unit and a UMC; or ten, of which memory errors use bank 4, or banks 1 and 7.
    pub fn banks(&self) -> u8 {
        match self.flavour {
            Flavour::Smca => 2,
            Flavour::AmdLegacy | Flavour::Intel => 10,
        }
    }

    /// The value of MCG_CAP.
    pub fn mcg_cap(&self) -> u64 {
        const CTL_P: u64 = 1 << 8;
        const CMCI_P: u64 = 1 << 10;
        const SER_P: u64 = 1 << 24;
        const LMCE_P: u64 = 1 << 27;
        let mut cap = u64::from(self.banks()) | CTL_P;
        if self.flavour == Flavour::Intel {
            for (present, bit) in [(self.cmci, CMCI_P), (self.recovery, SER_P), (self.lmce, LMCE_P)] {
                if present {
                    cap |= bit;
                }
            }
        }
        cap
    }

    /// The MSRs that the monitor answers for: all of them must be denied to KVM in both directions.
    ///
    /// The registers of the other vendor are among them, so that KVM's own never shine through.
    pub fn msr_ranges(&self) -> &'static [MsrRange] {
        const COMMON: [MsrRange; 5] = [
            MsrRange { base: MCG_CAP, count: 3 },
            MsrRange { base: FEATURE_CONTROL, count: 1 },
            MsrRange { base: MCG_EXT_CTL, count: 1 },
            MsrRange { base: MC0_CTL2, count: 32 },
            MsrRange { base: MC0_CTL, count: 128 },
        ];
        const AMD: [MsrRange; 8] = [
            COMMON[0],
            COMMON[1],
            COMMON[2],
            COMMON[3],
            COMMON[4],
            MsrRange { base: MC4_MISC1, count: 16 },
            MsrRange { base: SMCA_MC0_CTL, count: 0x200 },
            MsrRange { base: HWCR, count: 1 },
        ];
        match self.flavour {
            Flavour::Intel => &COMMON,
            Flavour::Smca | Flavour::AmdLegacy => &AMD,
        }
    }

    /// Whether the monitor answers for this MSR.
    pub fn owns(&self, index: u32) -> bool {
        self.msr_ranges().iter().any(|range| index.wrapping_sub(range.base) < range.count)
    }
}

#[cfg(test)]
#[path = "mca_test.rs"]
mod tests;
