//! One bank, and what happens when an error finds another one in it.

use super::{Flavour, McaConfig};

/// Bits of MCi_STATUS (SDM volume 3, 17.3.2.2; APM volume 2, 9.3.2.5).
pub mod status {
    /// The bank holds an error.
    pub const VAL: u64 = 1 << 63;
    /// Another error came while the bank held one.
    pub const OVER: u64 = 1 << 62;
    /// The error was not corrected.
    pub const UC: u64 = 1 << 61;
    /// Reporting of the error was enabled.
    pub const EN: u64 = 1 << 60;
    /// MCi_MISC is valid.
    pub const MISCV: u64 = 1 << 59;
    /// MCi_ADDR is valid.
    pub const ADDRV: u64 = 1 << 58;
    /// The processor's context is corrupt: nothing can be resumed.
    pub const PCC: u64 = 1 << 57;
    /// Intel: the error was signalled by a machine check.
    pub const S: u64 = 1 << 56;
    /// Intel: software must act before it resumes.
    pub const AR: u64 = 1 << 55;
    /// AMD's scalable MCA: the task's context is corrupt.
    pub const TCC: u64 = 1 << 55;
    /// AMD: corrected by ECC.
    pub const CECC: u64 = 1 << 46;
    /// AMD: uncorrected, but nobody has consumed it yet.
    pub const DEFERRED: u64 = 1 << 44;
    /// AMD: poisoned data was consumed.
    pub const POISON: u64 = 1 << 43;
    /// Intel: one corrected error in the count of bits 52:38.
    pub const CORRECTED_ONE: u64 = 1 << 38;
}

use status::{AR, DEFERRED, OVER, PCC, S, UC, VAL};

/// The registers of one bank.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Bank {
    pub ctl: u64,
    pub status: u64,
    pub addr: u64,
    pub misc: u64,
    /// Intel: corrected-error threshold.
    pub ctl2: u64,
    /// Scalable MCA from here on.
    pub config: u64,
    pub ipid: u64,
    pub synd: u64,
    pub deferred_status: u64,
    pub deferred_addr: u64,
    /// SYND1 and SYND2.
    pub more_synd: [u64; 2],
}

/// MCA_CONFIG: the extended registers exist (McaX), deferred errors can be logged apart.
const CONFIG_FIXED: u64 = 1 << 0 | 1 << 2;
/// MCA_CONFIG: the extended registers are in use, deferred errors are logged in MCA_STATUS as well.
pub(super) const CONFIG_WRITABLE: u64 = 1 << 32 | CONFIG_LOG_DEFERRED;
const CONFIG_LOG_DEFERRED: u64 = 1 << 34;
/// MCA_IPID: hardware id in bits 43:32, type in bits 63:48 (load-store unit; unified memory controller).
const IPID_LOAD_STORE: u64 = 0xb0 << 32;
const IPID_MEMORY: u64 = 0x96 << 32;

impl Bank {
    /// A bank as firmware leaves it: everything enabled, nothing logged.
    pub(super) fn new(config: &McaConfig, index: usize) -> Self {
        let mut bank = Self { ctl: u64::MAX, ..Self::default() };
        if config.flavour == Flavour::Smca {
            bank.config = CONFIG_FIXED | CONFIG_WRITABLE;
            bank.ipid = if index == 0 { IPID_LOAD_STORE } else { IPID_MEMORY };
        }
        bank
    }

    /// What a warm reset does: enables and configuration start anew, the log stays
    /// (SDM volume 3, 10.1.1 and table 10-1; APM volume 2, table 14-2).
    pub(super) fn reset(&mut self, config: &McaConfig, index: usize) {
        let logged = std::mem::replace(self, Self::new(config, index));
        *self = Self { ctl: self.ctl, ctl2: self.ctl2, config: self.config, ipid: self.ipid, ..logged };
    }

    pub(super) fn write_config(&mut self, value: u64) {
        self.config = CONFIG_FIXED | (value & CONFIG_WRITABLE);
    }

    /// Logs an error as the vendor's rules of overwriting say. `status` carries all its bits.
    pub(super) fn log(&mut self, flavour: Flavour, status: u64, addr: u64, misc: u64) {
        if flavour == Flavour::Smca && status & DEFERRED != 0 {
            let over = if self.deferred_status & VAL != 0 { OVER } else { 0 };
            if over == 0 {
                (self.deferred_status, self.deferred_addr) = (status, addr);
            }
            self.deferred_status |= over;
            if self.config & CONFIG_LOG_DEFERRED == 0 {
                return;
            }
        }
        if self.status & VAL == 0 {
            (self.status, self.addr, self.misc) = (status, addr, misc);
        } else if severity(status) > severity(self.status) {
            (self.status, self.addr, self.misc) = (status | OVER, addr, misc);
        } else {
            // Of two errors of one severity the first stays. Intel adds what the second asks of software
            // (SDM volume 3, table 17-9).
            self.status |= OVER;
            if flavour == Flavour::Intel && self.status & PCC == 0 {
                self.status |= status & (S | AR);
            }
        }
    }
}

/// Which error displaces which: context corrupt, uncorrected, deferred, corrected.
fn severity(status: u64) -> u8 {
    if status & UC != 0 {
        if status & PCC != 0 { 3 } else { 2 }
    } else if status & DEFERRED != 0 {
        1
    } else {
        0
    }
}
