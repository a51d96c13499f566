//! What the guest sees of its processors: vendor, machine checks, string instructions, clocks.
//!
//! Which machine-check architecture that makes is worked out in [`Cpu::mca`], and nowhere else: some of it depends on
//! the host's vendor, so that a mistake may only be found on the host that is to run the machine.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{ConfigError, KeyValues};
use crate::x86::cpuid::Vendor;
use crate::x86::mca::{Flavour, McaConfig};

/// What the guest sees of its processors and clocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Cpu {
    /// Whose processor it is.
    pub vendor: CpuVendor,
    /// How machine checks are reported. Default: `smca` for AMD, `intel` for Intel. It decides the vendor where
    /// `vendor` leaves that to the host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mca: Option<MachineChecks>,
    /// Whether software can recover from errors (MCG_CAP.SER_P; SUCCOR and OVERFLOW_RECOV). Without it Linux panics or
    /// loops at the first error.
    pub recovery: bool,
    /// Intel: whether an error in one processor is signalled to that one alone. Default: on where errors can be
    /// recovered from; off broadcasts machine checks to all processors.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lmce: Option<bool>,
    /// Whether string instructions are fast. Without it Linux copies from persistent memory in a way that cannot
    /// recover from poison.
    pub erms: bool,
    /// Whether CPUID says that there is a hypervisor. Without the bit, Linux uses no kvmclock.
    pub hypervisor: bool,
    /// Whether kvmclock is offered. It has no effect while `hypervisor` is off.
    pub kvmclock: bool,
    /// Whether there is an ACPI PM timer, by which Linux calibrates its TSC when it has no kvmclock.
    pub pm_timer: bool,
}

/// Whose processor the guest sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum CpuVendor {
    /// The host's, or the one to which the chosen machine checks belong.
    #[default]
    Host,
    /// GenuineIntel.
    Intel,
    /// AuthenticAMD.
    Amd,
}

/// How machine checks are reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum MachineChecks {
    /// AMD's scalable MCA: Zen and later.
    Smca,
    /// AMD before that.
    Legacy,
    /// Intel.
    Intel,
}

impl MachineChecks {
    const fn flavour(self) -> Flavour {
        match self {
            Self::Smca => Flavour::Smca,
            Self::Legacy => Flavour::AmdLegacy,
            Self::Intel => Flavour::Intel,
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Smca => "smca",
            Self::Legacy => "legacy",
            Self::Intel => "intel",
        }
    }
}

impl Default for Cpu {
    fn default() -> Self {
        Self {
            vendor: CpuVendor::Host,
            mca: None,
            recovery: true,
            lmce: None,
            erms: true,
            hypervisor: true,
            kvmclock: true,
            pm_timer: true,
        }
    }
}

impl Cpu {
    const KEYS: [&str; 8] =
        ["vendor", "mca", "recovery", "lmce", "erms", "hypervisor", "kvmclock", "pm_timer"];

    /// Puts the value of `--cpu key=value,…` over these settings.
    ///
    /// # Errors
    /// Names the key, its value and what would be right.
    pub fn apply(&mut self, option: &str, text: &str) -> Result<(), ConfigError> {
        let mut list = KeyValues::parse(option, text)?;
        let wrong = |key: &str, value: &str, words: &str| {
            ConfigError::invalid(
                option,
                format_args!("{key}={value}"),
                "there is no such choice",
                format_args!("give {key}={words}"),
            )
        };
        if let Some(word) = list.take_text("vendor") {
            self.vendor = match word.as_str() {
                "host" => CpuVendor::Host,
                "intel" => CpuVendor::Intel,
                "amd" => CpuVendor::Amd,
                _ => return Err(wrong("vendor", &word, "host, vendor=intel or vendor=amd")),
            };
        }
        if let Some(word) = list.take_text("mca") {
            self.mca = Some(match word.as_str() {
                "smca" => MachineChecks::Smca,
                "legacy" => MachineChecks::Legacy,
                "intel" => MachineChecks::Intel,
                _ => return Err(wrong("mca", &word, "smca, mca=legacy or mca=intel")),
            });
        }
        self.lmce = list.take_switch("lmce")?.or(self.lmce);
        for (key, switch) in [
            ("recovery", &mut self.recovery),
            ("erms", &mut self.erms),
            ("hypervisor", &mut self.hypervisor),
            ("kvmclock", &mut self.kvmclock),
            ("pm_timer", &mut self.pm_timer),
        ] {
            *switch = list.take_switch(key)?.unwrap_or(*switch);
        }
        list.finish(&Self::KEYS)
    }

    /// The vendor that the guest sees on any host, if the description says it.
    fn fixed_vendor(&self) -> Option<Vendor> {
        match self.vendor {
            CpuVendor::Intel => Some(Vendor::Intel),
            CpuVendor::Amd => Some(Vendor::Amd),
            CpuVendor::Host => self.mca.map(|mca| mca.flavour().vendor()),
        }
    }

    /// The vendor that the guest sees on a host with processors of `host`.
    pub fn guest_vendor(&self, host: Vendor) -> Vendor {
        self.fixed_vendor().unwrap_or(host)
    }

    /// The machine-check architecture that the guest sees on a host with processors of `host`.
    ///
    /// # Errors
    /// The settings contradict each other.
    pub fn mca(&self, host: Vendor) -> Result<McaConfig, ConfigError> {
        let vendor = self.guest_vendor(host);
        let (own, other) = match vendor {
            Vendor::Intel => ("intel", "amd"),
            Vendor::Amd => ("amd", "intel"),
        };
        let default = McaConfig::for_vendor(vendor);
        let flavour = match self.mca {
            None => default.flavour,
            Some(mca) if mca.flavour().vendor() == vendor => mca.flavour(),
            Some(mca) => {
                return Err(ConfigError::invalid(
                    "--cpu",
                    format_args!("vendor={own},mca={}", mca.name()),
                    "the other vendor's processors report machine checks so",
                    format_args!("leave one of them out, or give vendor={other}"),
                ));
            }
        };
        let lmce = match (flavour, self.lmce) {
            (Flavour::Intel, None) => self.recovery,
            (Flavour::Intel, Some(true)) if !self.recovery => {
                return Err(ConfigError::invalid(
                    "--cpu",
                    "recovery=off,lmce=on",
                    "Linux uses local machine checks only with recovery (lmce_supported)",
                    "leave lmce out, or give recovery=on",
                ));
            }
            (Flavour::Intel, Some(lmce)) => lmce,
            (_, None) => false,
            (_, Some(lmce)) => {
                return Err(ConfigError::invalid(
                    "--cpu",
                    format_args!("lmce={}", if lmce { "on" } else { "off" }),
                    "machine checks of AMD processors are always local",
                    "leave it out, or give vendor=intel",
                ));
            }
        };
        Ok(McaConfig { flavour, recovery: self.recovery, lmce, ..default })
    }

    /// Refuses what contradicts itself on any host.
    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        match self.fixed_vendor() {
            Some(vendor) => self.mca(vendor).map(drop),
            None => self.mca(Vendor::Intel).map(drop),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpu(text: &str) -> Cpu {
        let mut cpu = Cpu::default();
        cpu.apply("--cpu", text).unwrap();
        cpu
    }

    fn words(text: &str) -> String {
        let mut cpu = Cpu::default();
        cpu.apply("--cpu", text).and_then(|()| cpu.validate()).unwrap_err().to_string()
    }

    #[test]
    fn the_host_decides_what_is_left_to_it() {
        let cpu = cpu("erms=off");
        assert!(!cpu.erms);
        assert_eq!(cpu.guest_vendor(Vendor::Amd), Vendor::Amd);
        assert_eq!(cpu.mca(Vendor::Amd), Ok(McaConfig::for_vendor(Vendor::Amd)));
        assert_eq!(cpu.mca(Vendor::Intel), Ok(McaConfig::for_vendor(Vendor::Intel)));
    }

    #[test]
    fn what_is_said_holds_on_any_host() {
        for host in [Vendor::Amd, Vendor::Intel] {
            let mca = |text: &str| cpu(text).mca(host).unwrap();
            let intel = McaConfig::for_vendor(Vendor::Intel);
            assert_eq!(mca("vendor=intel"), intel);
            assert_eq!(mca("mca=intel,lmce=off"), McaConfig { lmce: false, ..intel });
            assert_eq!(
                mca("vendor=intel,recovery=off"),
                McaConfig { lmce: false, recovery: false, ..intel },
                "no local machine checks without recovery"
            );
            assert_eq!(mca("mca=legacy").flavour, Flavour::AmdLegacy);
            assert!(!mca("vendor=amd,recovery=off").recovery);
            assert_eq!(cpu("mca=smca").guest_vendor(host), Vendor::Amd);
        }
    }

    #[test]
    fn contradictions_are_refused() {
        assert_eq!(
            words("vendor=amd,mca=intel"),
            "Wrong --cpu vendor=amd,mca=intel: the other vendor's processors report machine checks so; leave one of them out, or give vendor=intel"
        );
        assert_eq!(
            words("mca=smca,lmce=off"),
            "Wrong --cpu lmce=off: machine checks of AMD processors are always local; leave it out, or give vendor=intel"
        );
        assert_eq!(
            words("recovery=off,lmce=on"),
            "Wrong --cpu recovery=off,lmce=on: Linux uses local machine checks only with recovery (lmce_supported); leave lmce out, or give recovery=on"
        );
        assert_eq!(
            words("vendor=via"),
            "Wrong --cpu vendor=via: there is no such choice; give vendor=host, vendor=intel or vendor=amd"
        );
        assert!(cpu("lmce=off").mca(Vendor::Amd).is_err(), "found on the host");
        assert!(cpu("lmce=off").validate().is_ok());
    }
}
