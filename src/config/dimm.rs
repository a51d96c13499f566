//! The DIMM of a persistent memory device: its functions, its labels, its state.

use std::fmt;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use aconite_acpi::DimmFlags;
use aconite_devices::nvdimm::{ARS_RECORDS_MAX, CLEAR_UNIT};

use super::error::ConfigError;
use crate::units::{Size, TimeSpan};

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

/// How the firmware of a device finds errors and clears them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ars {
    /// Time that an address range scrub of all of it takes.
    pub time: Duration,
    /// Most errors that the status of a scrub lists.
    pub records: usize,
    /// Alignment and smallest length of "clear uncorrectable error", in bytes.
    pub clear_unit: u32,
}

impl Default for Ars {
    fn default() -> Self {
        Self { time: Duration::ZERO, records: ARS_RECORDS_MAX, clear_unit: CLEAR_UNIT }
    }
}

/// The unit in which errors can be cleared: a line at least, and at most what a device is a multiple of.
const CLEAR_UNITS: RangeInclusive<u64> = 64..=2 << 20;

impl Ars {
    /// What the keys `ars`, `ars_records` and `clear_unit` say; `name` is what a key is called in errors.
    ///
    /// # Errors
    /// Names the key, its value and what would be right.
    pub fn from_keys(
        name: impl Fn(&str) -> String,
        time: Option<TimeSpan>,
        records: Option<usize>,
        clear_unit: Option<Size>,
    ) -> Result<Self, ConfigError> {
        let mut ars = Self::default();
        if let Some(time) = time {
            ars.time = time.0;
        }
        if let Some(records) = records {
            if !(1..=ARS_RECORDS_MAX).contains(&records) {
                return Err(ConfigError::invalid(
                    name("ars_records"),
                    records.to_string(),
                    "a status holds no such number of records",
                    format_args!("give 1 to {ARS_RECORDS_MAX}"),
                ));
            }
            ars.records = records;
        }
        if let Some(unit) = clear_unit {
            let bytes = unit.bytes();
            if !CLEAR_UNITS.contains(&bytes) || !bytes.is_power_of_two() {
                return Err(ConfigError::invalid(
                    name("clear_unit"),
                    unit.to_string(),
                    "errors cannot be cleared in such units",
                    "give a power of two from 64 to 2M",
                ));
            }
            ars.clear_unit = bytes as u32;
        }
        Ok(ars)
    }

    /// What holds for two devices on one bus, which has one status of scrubs and one unit of clearing.
    pub fn on_one_bus(self, other: Self) -> Self {
        Self {
            time: self.time.saturating_add(other.time),
            records: self.records.min(other.records),
            clear_unit: self.clear_unit.max(other.clear_unit),
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
