//! The DIMM of a persistent memory device: its functions, its labels, its state.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use aconite_acpi::DimmFlags;

/// Which functions the firmware offers for the DIMM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Family {
    /// Intel's DSM family: labels, health, security, firmware.
    #[default]
    Intel,
    /// Microsoft's DSM family, labels by ACPI's methods `_LSI`, `_LSR` and `_LSW`.
    Microsoft,
    /// None: Linux has no use for labels or health of the DIMM.
    None,
}

impl Family {
    /// The word for it in options.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Intel => "intel",
            Self::Microsoft => "msft",
            Self::None => "none",
        }
    }

    /// The family with this name.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Intel, Self::Microsoft, Self::None].into_iter().find(|family| family.name() == name)
    }
}

/// What is in the label area when the machine starts.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Labels {
    /// What the last run left there; zeros at first, so that the region is one namespace until the guest makes labels.
    #[default]
    Kept,
    /// As [`Self::Kept`], with an empty index where there is none.
    Init,
    /// There is no label area.
    None,
    /// The bytes of a file, as `ndctl read-labels` writes it, at each start.
    File(PathBuf),
}

/// The DIMMs behind a device: one alone, or an interleave set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Dimms {
    /// As many of its own.
    Own(u32),
    /// DIMMs of the bus by their names, which other devices of the bus can name too.
    Named(Vec<String>),
}

impl Default for Dimms {
    fn default() -> Self {
        Self::Own(1)
    }
}

impl Dimms {
    /// How many.
    pub fn count(&self) -> u32 {
        match self {
            Self::Own(count) => *count,
            Self::Named(names) => names.len() as u32,
        }
    }
}

impl FromStr for Dimms {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text.parse() {
            Ok(count) => Self::Own(count),
            Err(_) => Self::Named(text.split('+').map(str::to_owned).collect()),
        })
    }
}

impl fmt::Display for Dimms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Own(count) => count.fmt(f),
            Self::Named(names) => f.write_str(&names.join("+")),
        }
    }
}

/// State of the DIMM that firmware reports in the NFIT.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StateFlags(pub DimmFlags);

/// The words for the flags, as Linux shows them in `nmemX/nfit/flags`.
const FLAGS: [(&str, DimmFlags); 7] = [
    ("save_fail", DimmFlags::SAVE_FAILED),
    ("restore_fail", DimmFlags::RESTORE_FAILED),
    ("flush_fail", DimmFlags::FLUSH_FAILED),
    ("not_armed", DimmFlags::NOT_ARMED),
    ("smart_event", DimmFlags::HEALTH_OBSERVED),
    ("smart_notify", DimmFlags::HEALTH_NOTIFY),
    ("map_fail", DimmFlags::MAP_FAILED),
];

impl FromStr for StateFlags {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.split('+').try_fold(Self::default(), |all, word| {
            match FLAGS.iter().find(|(name, _)| *name == word) {
                Some((_, flag)) => Ok(Self(all.0.union(*flag))),
                None => Err(format!("{word:?} is no state of a DIMM")),
            }
        })
    }
}

impl fmt::Display for StateFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> =
            FLAGS.iter().filter(|(_, flag)| self.0.contains(*flag)).map(|(name, _)| *name).collect();
        f.write_str(&names.join("+"))
    }
}

/// The words that `flags=` takes.
pub fn flag_names() -> String {
    FLAGS.map(|(name, _)| name).join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_read_back_and_mistakes_are_named() {
        for text in
            ["not_armed", "save_fail+restore_fail+flush_fail+not_armed+smart_event+smart_notify+map_fail"]
        {
            assert_eq!(text.parse::<StateFlags>().unwrap().to_string(), text);
        }
        assert_eq!("map_fail+save_fail".parse::<StateFlags>().unwrap().0.bits(), 0x41);
        for text in ["", "not_armed+", "armed"] {
            assert!(text.parse::<StateFlags>().unwrap_err().contains("is no state of a DIMM"));
        }
        assert!(flag_names().starts_with("save_fail, "));
    }

    #[test]
    fn families_have_names() {
        for family in [Family::Intel, Family::Microsoft, Family::None] {
            assert_eq!(Family::from_name(family.name()), Some(family));
        }
        assert_eq!(Family::from_name("hpe"), None);
    }
}
