//! NFIT (ACPI 6.5, 5.2.25): persistent memory ranges and the DIMMs behind them.
//!
//! The same sub-tables are made twice: into the static table for the units that are there at boot, and by the
//! device model for what `_FIT` of one unit's root device returns. Linux evaluates `_FIT` only if a static NFIT
//! exists, and then uses the static table's content for that root no further (`acpi_nfit_add`,
//! drivers/acpi/nfit/core.c). So the static table is there on every machine with slots, empty if they are.

mod builder;
mod lie;
mod unit;

pub use self::builder::FitBuilder;
pub use self::lie::Lie;
pub use self::unit::{NvdimmUnit, Share, UnitDimm, UnitRange};
use crate::{AddressRange, Table};

/// What a range of addresses is, by GUID (table 5.135).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RangeType {
    /// Volatile memory, 7305944f-fdda-44e3-b16c-3f22d252e5d0.
    Volatile,
    /// Byte-addressable persistent memory, 66f0d379-b4f3-4074-ac43-0d3318b78cdb.
    Persistent,
    /// A disk in volatile memory, 77ab535a-45fc-624b-5560-f7b281d1f96e.
    VolatileDisk,
    /// A CD image in volatile memory, 3d5abd30-4175-87ce-6d64-d2ade523c4bb.
    VolatileCd,
    /// A disk in persistent memory, 5cea02c9-4d07-69d3-269f-4496fbe096f9.
    PersistentDisk,
    /// A CD image in persistent memory, 08018188-42cd-bb48-100f-5387d53ded3d.
    PersistentCd,
}

impl RangeType {
    /// The GUID in the mixed byte order of ToUUID.
    pub const fn guid(self) -> [u8; 16] {
        match self {
            Self::Volatile => *b"\x4f\x94\x05\x73\xda\xfd\xe3\x44\xb1\x6c\x3f\x22\xd2\x52\xe5\xd0",
            Self::Persistent => *b"\x79\xd3\xf0\x66\xf3\xb4\x74\x40\xac\x43\x0d\x33\x18\xb7\x8c\xdb",
            Self::VolatileDisk => *b"\x5a\x53\xab\x77\xfc\x45\x4b\x62\x55\x60\xf7\xb2\x81\xd1\xf9\x6e",
            Self::VolatileCd => *b"\x30\xbd\x5a\x3d\x75\x41\xce\x87\x6d\x64\xd2\xad\xe5\x23\xc4\xbb",
            Self::PersistentDisk => *b"\xc9\x02\xea\x5c\x07\x4d\xd3\x69\x26\x9f\x44\x96\xfb\xe0\x96\xf9",
            Self::PersistentCd => *b"\x88\x81\x01\x08\xcd\x42\x48\xbb\x10\x0f\x53\x87\xd5\x3d\xed\x3d",
        }
    }

    /// Whether what is in the range outlives power.
    pub const fn is_volatile(self) -> bool {
        matches!(self, Self::Volatile | Self::VolatileDisk | Self::VolatileCd)
    }
}

/// A range of system physical addresses (table 5.134).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpaRange {
    /// Number of the range, above 0 and unique in one FIT.
    pub index: u16,
    /// Proximity domain; always declared valid.
    pub proximity: u32,
    /// What the range is.
    pub kind: RangeType,
    /// The addresses.
    pub range: AddressRange,
}

/// Share of a DIMM in a range (table 5.136); Linux's `acpi_nfit_memory_map`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionMap {
    /// NFIT device handle of the DIMM, [`device_handle`](crate::platform::device_handle).
    pub handle: u32,
    /// SMBIOS type 17 handle; informative.
    pub physical_id: u16,
    /// Number of the region on its DIMM.
    pub region_id: u16,
    /// [`SpaRange::index`], or 0 if the region is not mapped.
    pub range_index: u16,
    /// [`ControlRegion::index`].
    pub control_index: u16,
    /// Bytes that the DIMM contributes.
    pub size: u64,
    /// Offset of the DIMM's first byte from the start of the range.
    pub offset: u64,
    /// Address on the DIMM of the region's first byte.
    pub dimm_address: u64,
    /// [`Interleave::index`], or 0 if the DIMM is not interleaved.
    pub interleave_index: u16,
    /// DIMMs in the interleave set; 1 is none.
    pub ways: u16,
    /// What is wrong with the DIMM.
    pub flags: DimmFlags,
}

/// How the lines of a DIMM follow each other in an interleave set (table 5.138), where line 0, 1, … of the DIMM are
/// every `ways`-th line of the range, from [`RegionMap::offset`] on.
///
/// That is a pattern of one line, which begins again after as many lines as the set has DIMMs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interleave {
    /// Number of the structure, above 0 and unique in one FIT.
    pub index: u16,
    /// Bytes of a line.
    pub line: u32,
}

/// Identity of a DIMM (table 5.139), without block windows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ControlRegion {
    /// Number of the control region, above 0 and unique in one FIT.
    pub index: u16,
    /// Serial number. Software displays its bytes in the order in which they are stored; it must differ from
    /// DIMM to DIMM, and stay the same for as long as labels are to stay valid.
    pub serial: u32,
}

/// State flags of a DIMM at boot (table 5.136, NVDIMM state flags). Linux reports each of them in
/// `nmemX/nfit/flags`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DimmFlags(u16);

impl DimmFlags {
    /// The last save failed.
    pub const SAVE_FAILED: Self = Self(1 << 0);
    /// The last restore failed.
    pub const RESTORE_FAILED: Self = Self(1 << 1);
    /// The platform could not flush all data at the last power loss.
    pub const FLUSH_FAILED: Self = Self(1 << 2);
    /// The DIMM cannot save its data; Linux makes the region read-only.
    pub const NOT_ARMED: Self = Self(1 << 3);
    /// The DIMM has seen SMART events before boot.
    pub const HEALTH_OBSERVED: Self = Self(1 << 4);
    /// Health events are notified.
    pub const HEALTH_NOTIFY: Self = Self(1 << 5);
    /// Firmware did not map the DIMM.
    pub const MAP_FAILED: Self = Self(1 << 6);

    /// No flag.
    pub const fn empty() -> Self {
        Self(0)
    }

    /// Both sets of flags.
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether all flags of the other set are in this one.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// The flags as the table holds them.
    pub const fn bits(self) -> u16 {
        self.0
    }
}

/// How far a store must get to survive a loss of power (table 5.142).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Persistence {
    /// Nothing is said. Linux shows an empty persistence domain.
    Unspecified,
    /// Stores that have reached the memory controller survive; the guest flushes its caches.
    MemoryController,
    /// Stores survive once they are visible; Linux flushes no caches.
    CpuCache,
}

/// Static NFIT with the given units.
pub(crate) fn nfit<'a>(units: impl Iterator<Item = &'a NvdimmUnit>, persistence: Persistence) -> Table {
    let mut units = units.peekable();
    let mut builder = FitBuilder::new();
    let empty = units.peek().is_none();
    let mut honest = true;
    for unit in units {
        honest &= unit.lie != Some(Lie::Checksum);
        builder = builder.unit(unit);
    }
    if !empty {
        builder = builder.capabilities(persistence);
    }
    // 4 reserved bytes, then the sub-tables.
    let table = Table::new(*b"NFIT", 1, &[&[0; 4], builder.finish().as_slice()].concat());
    if honest { table } else { table.with_wrong_checksum() }
}

#[cfg(test)]
#[path = "nfit_test.rs"]
mod tests;
