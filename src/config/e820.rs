//! Types of memory devices in the E820 map.

use crate::boot::{E820_PMEM, E820_PRAM, E820_SOFT_RESERVED};

/// What the E820 map says that a memory device is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum E820Type {
    /// Persistent memory (ACPI 6.5, table 15.4). Linux reserves it and looks for an NFIT that says more.
    Persistent,
    /// Persistent memory as firmware told of it before: Linux makes a region and a block device of it by itself.
    #[default]
    Legacy,
    /// Memory for special purposes: Linux gives it to its dax_hmem driver.
    SoftReserved,
}

impl E820Type {
    const ALL: [Self; 3] = [Self::Persistent, Self::Legacy, Self::SoftReserved];

    /// The word for it in options and the API.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Persistent => "7",
            Self::Legacy => "12",
            Self::SoftReserved => "soft",
        }
    }

    /// What has this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }

    /// Its number in the map.
    pub const fn number(self) -> u32 {
        match self {
            Self::Persistent => E820_PMEM,
            Self::Legacy => E820_PRAM,
            Self::SoftReserved => E820_SOFT_RESERVED,
        }
    }
}
