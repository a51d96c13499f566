//! The machine-check registers of one vCPU.

use thiserror::Error;

use super::super::walk::CR4_MCE;
use super::bank::status::{CORRECTED_ONE, EN, OVER, S, UC, VAL};
use super::bank::{Bank, CONFIG_WRITABLE};
use super::{
    BankRecord, FEATURE_CONTROL, Flavour, HWCR, MC0_CTL, MC0_CTL2, MC4_MISC1, MCA_INTERRUPT_CONFIG, MCG_CAP,
    MCG_CTL, MCG_EIPV, MCG_EXT_CTL, MCG_LMCES, MCG_MCIP, MCG_RIPV, MCG_STATUS, MachineError, McaConfig,
    Reach, SMCA_MC0_CTL,
};

/// The access raises #GP(0) in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("Access to machine-check register {msr:#x} raises a general-protection exception in the guest")]
pub struct GeneralProtection {
    /// The MSR.
    pub msr: u32,
}

/// What becomes of an error that has been logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Consequence {
    /// Inject vector 18.
    MachineCheck,
    /// The processor shuts down: hardware would reset the machine.
    Shutdown(ShutdownCause),
    /// Nothing more: the guest finds it when it polls.
    Logged,
    /// The guest asked for an interrupt at this number of corrected errors: raise the CMCI vector of the local APIC.
    CorrectedInterrupt,
}

/// Why a machine check shuts the processor down (SDM volume 3, 6.15, vector 18; APM volume 2, 8.2.19).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ShutdownCause {
    /// The previous one is still being handled.
    #[error("A machine check came while MCG_STATUS.MCIP was set")]
    InProgress,
    /// The guest does not take machine checks.
    #[error("A machine check came while CR4.MCE was clear")]
    NotEnabled,
}

/// An error that has been logged, as the registers now stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Raised {
    /// What the injector must do.
    pub consequence: Consequence,
    /// Every other vCPU must take [`McaState::raise_bystander`], halted ones too.
    pub broadcast: bool,
    /// Bank number.
    pub bank: u8,
    /// MCi_STATUS, with what an earlier error left there.
    pub status: u64,
    /// MCi_ADDR.
    pub address: u64,
    /// MCi_MISC.
    pub misc: u64,
    /// MCG_STATUS.
    pub mcg_status: u64,
}

/// What a bank holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Logged {
    /// Bank number.
    pub bank: u8,
    /// MCi_STATUS, with VAL set.
    pub status: u64,
    /// MCi_ADDR.
    pub address: u64,
    /// MCi_MISC.
    pub misc: u64,
    /// MCA_CONFIG; 0 but on scalable MCA.
    pub config: u64,
    /// MCA_IPID; 0 but on scalable MCA.
    pub ipid: u64,
    /// MCA_SYND; 0 but on scalable MCA.
    pub synd: u64,
}

/// HWCR bit 18: software may write error status.
const MC_STATUS_WRITE_ENABLE: u64 = 1 << 18;
/// HWCR bit 24: the time-stamp counter runs at the P0 frequency. Linux complains of the firmware when it is clear.
const TSC_FREQUENCY_SELECT: u64 = 1 << 24;
/// HWCR bits that software sets and that have no meaning here; KVM ignores the same ones.
const HWCR_IGNORED: u64 = 1 << 3 | 1 << 6 | 1 << 8;
/// IA32_FEATURE_CONTROL: locked by firmware; local machine checks permitted.
const FEATURE_CONTROL_LOCKED: u64 = 1 << 0;
const FEATURE_CONTROL_LMCE: u64 = 1 << 20;
/// IA32_MCG_EXT_CTL: local machine checks enabled.
const LMCE_ENABLED: u64 = 1 << 0;
/// IA32_MCi_CTL2: interrupt enabled, threshold.
const CTL2_ENABLED: u64 = 1 << 30;
const CTL2_THRESHOLD: u64 = 0x7fff;

/// The registers of one vCPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct McaState {
    config: McaConfig,
    mcg_status: u64,
    mcg_ctl: u64,
    mcg_ext_ctl: u64,
    hwcr: u64,
    banks: Vec<Bank>,
    shut_down: Option<ShutdownCause>,
}

/// A register of a bank.
#[derive(Clone, Copy)]
enum BankRegister {
    Ctl,
    Status,
    Addr,
    Misc,
    Ctl2,
    Config,
    Ipid,
    Synd,
    DeferredStatus,
    DeferredAddr,
    /// MISC1 to MISC4: no further counters.
    MoreMisc,
    MoreSynd(usize),
}

/// Where an MSR leads.
#[derive(Clone, Copy)]
enum Register {
    Cap,
    Status,
    Ctl,
    ExtCtl,
    FeatureControl,
    Hwcr,
    /// Reads as zero, and writes are dropped.
    Zero,
    Bank(usize, BankRegister),
}

impl McaState {
    /// The registers as firmware leaves them: everything enabled, nothing logged.
    pub fn new(config: McaConfig) -> Self {
        let banks = (0..usize::from(config.banks())).map(|index| Bank::new(&config, index)).collect();
        Self {
            config,
            mcg_status: 0,
            mcg_ctl: u64::MAX,
            mcg_ext_ctl: 0,
            hwcr: TSC_FREQUENCY_SELECT,
            banks,
            shut_down: None,
        }
    }

    /// What the architecture is able to do.
    pub fn config(&self) -> &McaConfig {
        &self.config
    }

    /// The errors that software has not cleared.
    pub fn logged(&self) -> impl Iterator<Item = Logged> {
        let valid = (0..).zip(&self.banks).filter(|(_, bank)| bank.status & VAL != 0);
        valid.map(|(index, bank)| Logged {
            bank: index,
            status: bank.status,
            address: bank.addr,
            misc: bank.misc,
            config: bank.config,
            ipid: bank.ipid,
            synd: bank.synd,
        })
    }

    /// A warm reset: what the banks have logged is kept for the next boot, as hardware does.
    pub fn reset(&mut self) {
        let mut fresh = Self::new(self.config);
        std::mem::swap(&mut fresh.banks, &mut self.banks);
        for (index, bank) in fresh.banks.iter_mut().enumerate() {
            bank.reset(&self.config, index);
        }
        *self = fresh;
    }

    /// Whether an error in this vCPU stays with it: always on AMD; on Intel when the guest has enabled it.
    pub fn local(&self) -> bool {
        self.config.flavour != Flavour::Intel || (self.config.lmce && self.mcg_ext_ctl & LMCE_ENABLED != 0)
    }

    fn locate(&self, msr: u32) -> Option<Register> {
        use BankRegister::*;
        let intel = self.config.flavour == Flavour::Intel;
        let bank = |index: u32, register| {
            let index = index as usize;
            (index < self.banks.len()).then_some(Register::Bank(index, register))
        };
        match msr {
            MCG_CAP => Some(Register::Cap),
            MCG_STATUS => Some(Register::Status),
            MCG_CTL => Some(Register::Ctl),
            MCG_EXT_CTL if intel && self.config.lmce => Some(Register::ExtCtl),
            FEATURE_CONTROL if intel => Some(Register::FeatureControl),
            HWCR if !intel => Some(Register::Hwcr),
            MC4_MISC1..MCA_INTERRUPT_CONFIG if !intel => Some(Register::Zero),
            // MCA_INTR_CFG is left out: KVM's local APIC has no extended vectors for it to name, and Linux takes the
            // exception as "polled" without a word (deferred_error_interrupt_enable, rdmsr_safe).
            _ if (MC0_CTL2..MC0_CTL2 + 32).contains(&msr) && intel && self.config.cmci => {
                bank(msr - MC0_CTL2, Ctl2)
            }
            _ if (MC0_CTL..MC0_CTL + 128).contains(&msr) => {
                let register = [Ctl, Status, Addr, Misc][(msr & 3) as usize];
                bank((msr - MC0_CTL) / 4, register)
            }
            _ if (SMCA_MC0_CTL..SMCA_MC0_CTL + 0x200).contains(&msr)
                && self.config.flavour == Flavour::Smca =>
            {
                let register = match msr & 15 {
                    0 => Ctl,
                    1 => Status,
                    2 => Addr,
                    3 => Misc,
                    4 => Config,
                    5 => Ipid,
                    6 => Synd,
                    8 => DeferredStatus,
                    9 => DeferredAddr,
                    10..=13 => MoreMisc,
                    14 => MoreSynd(0),
                    15 => MoreSynd(1),
                    _ => return None,
                };
                bank((msr - SMCA_MC0_CTL) / 16, register)
            }
            _ => None,
        }
    }

    /// RDMSR in the guest.
    ///
    /// # Errors
    ///
    /// The register does not exist.
    pub fn rdmsr(&self, msr: u32) -> Result<u64, GeneralProtection> {
        Ok(match self.locate(msr).ok_or(GeneralProtection { msr })? {
            Register::Cap => self.config.mcg_cap(),
            Register::Status => self.mcg_status,
            Register::Ctl => self.mcg_ctl,
            Register::ExtCtl => self.mcg_ext_ctl,
            Register::FeatureControl => {
                FEATURE_CONTROL_LOCKED | if self.config.lmce { FEATURE_CONTROL_LMCE } else { 0 }
            }
            Register::Hwcr => self.hwcr,
            Register::Zero => 0,
            Register::Bank(index, register) => {
                let bank = &self.banks[index];
                match register {
                    BankRegister::Ctl => bank.ctl,
                    BankRegister::Status => bank.status,
                    BankRegister::Addr => bank.addr,
                    BankRegister::Misc => bank.misc,
                    BankRegister::Ctl2 => bank.ctl2,
                    BankRegister::Config => bank.config,
                    BankRegister::Ipid => bank.ipid,
                    BankRegister::Synd => bank.synd,
                    BankRegister::DeferredStatus => bank.deferred_status,
                    BankRegister::DeferredAddr => bank.deferred_addr,
                    BankRegister::MoreMisc => 0,
                    BankRegister::MoreSynd(which) => bank.more_synd[which],
                }
            }
        })
    }

    /// WRMSR in the guest.
    ///
    /// # Errors
    ///
    /// The register does not exist, is read-only, or does not take this value.
    pub fn wrmsr(&mut self, msr: u32, value: u64) -> Result<(), GeneralProtection> {
        let refused = Err(GeneralProtection { msr });
        let Some(register) = self.locate(msr) else { return refused };
        let intel = self.config.flavour == Flavour::Intel;
        match register {
            Register::Cap | Register::FeatureControl => return refused,
            Register::Status => {
                let known = MCG_RIPV | MCG_EIPV | MCG_MCIP | if self.config.lmce { MCG_LMCES } else { 0 };
                if value & !known != 0 {
                    return refused;
                }
                self.mcg_status = value;
            }
            // SDM volume 3, 17.3.1.3: all ones or all zeros; anything else is undefined, and KVM refuses it.
            Register::Ctl if intel && value != 0 && value != u64::MAX => return refused,
            Register::Ctl => self.mcg_ctl = value,
            Register::ExtCtl if value & !LMCE_ENABLED != 0 => return refused,
            Register::ExtCtl => self.mcg_ext_ctl = value,
            Register::Hwcr => {
                let value = value & !HWCR_IGNORED;
                if value & !(MC_STATUS_WRITE_ENABLE | TSC_FREQUENCY_SELECT) != 0 {
                    return refused;
                }
                self.hwcr = value;
            }
            Register::Zero => {}
            Register::Bank(index, register) => {
                let status_writable = !intel && self.hwcr & MC_STATUS_WRITE_ENABLE != 0;
                let bank = &mut self.banks[index];
                match register {
                    BankRegister::Ctl => bank.ctl = value,
                    BankRegister::Status | BankRegister::DeferredStatus if value != 0 && !status_writable => {
                        return refused;
                    }
                    BankRegister::Status => bank.status = value,
                    BankRegister::DeferredStatus => bank.deferred_status = value,
                    // SDM volume 3, 17.3.2.3 and 17.3.2.4: software may only clear them.
                    BankRegister::Addr | BankRegister::Misc if intel && value != 0 => return refused,
                    BankRegister::Addr => bank.addr = value,
                    BankRegister::Misc => bank.misc = value,
                    BankRegister::Ctl2 if value & !(CTL2_ENABLED | CTL2_THRESHOLD) != 0 => return refused,
                    BankRegister::Ctl2 => bank.ctl2 = value,
                    BankRegister::Config => bank.write_config(value & CONFIG_WRITABLE),
                    BankRegister::Ipid | BankRegister::MoreMisc => {}
                    BankRegister::Synd => bank.synd = value,
                    BankRegister::DeferredAddr => bank.deferred_addr = value,
                    BankRegister::MoreSynd(which) => bank.more_synd[which] = value,
                }
            }
        }
        Ok(())
    }

    /// The registers that `error` writes in this vCPU when it goes as far as `reach` says.
    pub fn record(&self, error: &MachineError, reach: Reach) -> BankRecord {
        error.record(&self.config, self.local() && reach != Reach::Broadcast)
    }

    /// Takes another vCPU's error, which is broadcast: a machine check whose program counter has nothing to do with
    /// the error (SDM volume 3, 17.6.4.1). No bank is shared between processors here, so nothing is logged.
    pub fn raise_bystander(&mut self, cr4: u64) -> Raised {
        let consequence = self.interrupt(MCG_RIPV, cr4);
        self.raised(consequence, false, 0)
    }

    /// Whether the guest is still handling a machine check: MCG_STATUS.MCIP.
    pub fn in_progress(&self) -> bool {
        self.mcg_status & MCG_MCIP != 0
    }

    /// What a machine check does to this vCPU; if it can be taken, MCG_STATUS says so.
    fn interrupt(&mut self, mcg_status: u64, cr4: u64) -> Consequence {
        self.shut_down = if self.in_progress() {
            Some(ShutdownCause::InProgress)
        } else if cr4 & CR4_MCE == 0 {
            Some(ShutdownCause::NotEnabled)
        } else {
            None
        };
        match self.shut_down {
            Some(cause) => Consequence::Shutdown(cause),
            None => {
                self.mcg_status = mcg_status | MCG_MCIP;
                Consequence::MachineCheck
            }
        }
    }

    /// Why a machine check has shut this vCPU down, if one has.
    pub fn shut_down(&self) -> Option<ShutdownCause> {
        self.shut_down
    }

    /// Whether the guest wants to hear of errors in a bank.
    fn reports(&self, index: usize) -> bool {
        let reporting = match self.config.flavour {
            Flavour::Intel => self.mcg_ctl != 0,
            Flavour::Smca | Flavour::AmdLegacy => self.mcg_ctl >> index & 1 != 0,
        };
        reporting && self.banks.get(index).is_some_and(|bank| bank.ctl != 0)
    }

    /// Whether `error` would be signalled by a machine check, or shut the vCPU down, rather than only be logged.
    pub fn signals(&self, error: &MachineError) -> bool {
        let record = self.record(error, Reach::Architecture);
        record.mcg_status.is_some() && self.reports(record.bank.into())
    }

    fn raised(&self, consequence: Consequence, broadcast: bool, index: usize) -> Raised {
        let bank = &self.banks[index];
        Raised {
            consequence,
            broadcast,
            bank: index as u8,
            status: bank.status,
            address: bank.addr,
            misc: bank.misc,
            mcg_status: self.mcg_status,
        }
    }

    /// Logs an error that happened in this vCPU, whose CR4 is given; a bank that does not exist counts as the last
    /// one.
    ///
    /// The log comes first: the next boot finds what a shutdown leaves in the bank.
    pub fn raise_record(&mut self, record: BankRecord, reach: Reach, cr4: u64) -> Raised {
        let index = usize::from(record.bank).min(self.banks.len().saturating_sub(1));
        let enabled = self.reports(index);
        let bank = &mut self.banks[index];
        let status = if enabled { record.status } else { record.status & !(EN | S) };
        let before = bank.status;
        bank.log(self.config.flavour, status, record.address, record.misc);
        let mut consequence = Consequence::Logged;
        if self.config.flavour == Flavour::Intel && status & UC == 0 {
            consequence = count_corrected(bank, before, self.config.cmci);
        } else if self.config.cmci && record.mcg_status.is_none() && bank.ctl2 & CTL2_ENABLED != 0 {
            // UCNA is signalled like a corrected error (SDM volume 3, 17.6.3).
            consequence = Consequence::CorrectedInterrupt;
        }
        if let Some(bits) = record.mcg_status.filter(|_| enabled) {
            consequence = self.interrupt(bits, cr4);
        }
        let broadcast = consequence == Consequence::MachineCheck
            && match reach {
                Reach::Architecture => {
                    self.config.flavour == Flavour::Intel && self.mcg_status & MCG_LMCES == 0
                }
                Reach::Local => false,
                Reach::Broadcast => true,
            };
        self.raised(consequence, broadcast, index)
    }
}

/// Adds to the count of corrected errors (SDM volume 3, 17.3.2.2.1) and holds it against the threshold.
///
/// `before` is the bank's status before the error was logged. Where errors are counted and signalled, one corrected
/// error over another is no overflow.
fn count_corrected(bank: &mut Bank, before: u64, signalled: bool) -> Consequence {
    const COUNT: u64 = 0x7fff << 38;
    if before & (VAL | UC) == VAL {
        let count = (before & COUNT).saturating_add(CORRECTED_ONE).min(COUNT);
        let over = if signalled { bank.status & before & OVER } else { bank.status & OVER };
        bank.status = bank.status & !(COUNT | OVER) | count | over;
    }
    let threshold = (bank.ctl2 & CTL2_THRESHOLD).max(1);
    if bank.ctl2 & CTL2_ENABLED != 0 && (bank.status & COUNT) >> 38 >= threshold {
        Consequence::CorrectedInterrupt
    } else {
        Consequence::Logged
    }
}
