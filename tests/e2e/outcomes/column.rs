//! The columns: machines that differ in what a memory error depends on.

use std::fmt;

/// How a machine tells of errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flavour {
    /// AMD with scalable MCA: a bank of the memory controller, known by its IPID.
    Smca,
    /// AMD before that: the bank of the northbridge.
    Legacy,
    /// Intel, each error told to the processor that met it.
    IntelLmce,
    /// Intel, each error told to all processors.
    IntelBroadcast,
}

impl Flavour {
    /// The options of the monitor that make it.
    pub fn options(self) -> &'static [&'static str] {
        match self {
            Self::Smca => &["--cpu", "mca=smca"],
            Self::Legacy => &["--cpu", "mca=legacy"],
            Self::IntelLmce => &["--cpu", "vendor=intel"],
            Self::IntelBroadcast => &["--cpu", "vendor=intel,lmce=off"],
        }
    }
}

impl fmt::Display for Flavour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Smca => "amd-smca",
            Self::Legacy => "amd-legacy",
            Self::IntelLmce => "intel-lmce",
            Self::IntelBroadcast => "intel-broadcast",
        })
    }
}

/// A column: a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Column {
    /// Its kernel, as the material names it.
    pub kernel: &'static str,
    /// Its machine checks.
    pub flavour: Flavour,
    /// Its processors.
    pub vcpus: u32,
}

impl fmt::Display for Column {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kernel, flavour, vcpus } = self;
        write!(f, "{kernel}-{flavour}-{vcpus}")
    }
}
