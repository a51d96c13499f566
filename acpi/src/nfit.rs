//! NFIT (ACPI 6.5, 5.2.25): persistent memory ranges and the DIMMs behind them.
//!
//! The same sub-tables are made twice: into the static table for the units that are there at boot, and by the
//! device model for what `_FIT` of one unit's root device returns. Linux evaluates `_FIT` only if a static NFIT
//! exists, and then uses the static table's content for that root no further (`acpi_nfit_add`,
//! drivers/acpi/nfit/core.c). So the static table is there on every machine with slots, empty if they are.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::layout::{FLUSH_BASE, flush_base};
use crate::platform::device_handle;
use crate::{AddressRange, Table};

/// What a range of addresses is, by GUID (table 5.135).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RangeType {
    /// Volatile memory, 7305944f-fdda-44e3-b16c-3f22d252e5d0.
    Volatile,
    /// Byte-addressable persistent memory, 66f0d379-b4f3-4074-ac43-0d3318b78cdb.
    Persistent,
}

impl RangeType {
    /// The GUID in the mixed byte order of ToUUID.
    pub const fn guid(self) -> [u8; 16] {
        match self {
            Self::Volatile => *b"\x4f\x94\x05\x73\xda\xfd\xe3\x44\xb1\x6c\x3f\x22\xd2\x52\xe5\xd0",
            Self::Persistent => *b"\x79\xd3\xf0\x66\xf3\xb4\x74\x40\xac\x43\x0d\x33\x18\xb7\x8c\xdb",
        }
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
    /// NFIT device handle of the DIMM, [`device_handle`].
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
    /// DIMMs in the interleave set; 1 is none.
    pub ways: u16,
    /// What is wrong with the DIMM.
    pub flags: DimmFlags,
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

/// The persistent memory of one unit: one range, one DIMM that provides all of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PmemUnit {
    /// Number of the unit; determines handle, indexes and flush hint.
    pub unit: u32,
    /// The addresses. Linux wants multiples of its page size and makes the best use of multiples of 1 GiB.
    pub range: AddressRange,
    /// Proximity domain, which SRAT must know.
    pub proximity: u32,
    /// Serial number of the DIMM, see [`ControlRegion::serial`].
    pub serial: u32,
    /// State of the DIMM.
    pub flags: DimmFlags,
    /// Whether the DIMM has a flush hint address, [`flush_base`].
    pub flush_hint: bool,
}

impl PmemUnit {
    /// Index of the unit's range and of its control region, unique among units.
    pub const fn index(&self) -> u16 {
        // Units are below MAX_UNITS.
        self.unit as u16 + 1
    }

    /// What `_FIT` of the unit's root device returns: NFIT sub-tables without the table's header.
    pub fn fit(&self, persistence: Persistence) -> Vec<u8> {
        FitBuilder::new().unit(self).capabilities(persistence).finish()
    }
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct SpaRangeBytes {
    kind: U16,
    length: U16,
    index: U16,
    flags: U16,
    reserved: U32,
    proximity: U32,
    guid: [u8; 16],
    base: U64,
    size: U64,
    attributes: U64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RegionMapBytes {
    kind: U16,
    length: U16,
    handle: U32,
    physical_id: U16,
    region_id: U16,
    range_index: U16,
    control_index: U16,
    size: U64,
    offset: U64,
    dimm_address: U64,
    interleave_index: U16,
    ways: U16,
    flags: U16,
    reserved: U16,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct ControlRegionBytes {
    kind: U16,
    length: U16,
    index: U16,
    vendor: [u8; 2],
    device: [u8; 2],
    revision: [u8; 2],
    subsystem_vendor: [u8; 2],
    subsystem_device: [u8; 2],
    subsystem_revision: [u8; 2],
    valid_fields: u8,
    manufacturing_location: u8,
    manufacturing_date: [u8; 2],
    reserved: U16,
    serial: [u8; 4],
    interface_code: U16,
    windows: U16,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct FlushHintBytes {
    kind: U16,
    length: U16,
    handle: U32,
    count: U16,
    reserved: [u8; 6],
    address: U64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct CapabilitiesBytes {
    kind: U16,
    length: U16,
    highest_valid: u8,
    reserved0: [u8; 3],
    capabilities: U32,
    reserved1: U32,
}

// Linux refuses a whole FIT over one wrong length (add_table, drivers/acpi/nfit/core.c).
const _: () = assert!(size_of::<SpaRangeBytes>() == 56);
const _: () = assert!(size_of::<RegionMapBytes>() == 48);
const _: () = assert!(size_of::<ControlRegionBytes>() == 32);
const _: () = assert!(size_of::<FlushHintBytes>() == 24);
const _: () = assert!(size_of::<CapabilitiesBytes>() == 16);
const _: () = assert!(FLUSH_BASE.is_multiple_of(8));

const TYPE_SPA_RANGE: u16 = 0;
const TYPE_REGION_MAP: u16 = 1;
const TYPE_CONTROL_REGION: u16 = 4;
const TYPE_FLUSH_HINT: u16 = 6;
const TYPE_CAPABILITIES: u16 = 7;

/// SPA range flags: the proximity domain is valid.
const PROXIMITY_VALID: u16 = 1 << 1;
/// EFI_MEMORY_WB and EFI_MEMORY_NV.
const ATTRIBUTES: u64 = 0x8 | 0x8000;
/// Vendor of the DIMM and its controller, as stored. JEDEC has given it to nobody.
const VENDOR: [u8; 2] = [0xAC, 0x17];
const DEVICE: [u8; 2] = [0x00, 0x01];
const REVISION: [u8; 2] = [0x00, 0x01];
/// Byte-addressable, no energy source (JEDEC Annex L, format interface code).
const INTERFACE_BYTE_ADDRESSABLE: u16 = 0x0301;

/// Puts NFIT sub-tables together.
#[derive(Clone, Debug, Default)]
pub struct FitBuilder {
    bytes: Vec<u8>,
}

impl FitBuilder {
    /// No sub-tables yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a range.
    pub fn spa_range(mut self, spa: &SpaRange) -> Self {
        let entry = SpaRangeBytes {
            kind: U16::new(TYPE_SPA_RANGE),
            length: length_of::<SpaRangeBytes>(),
            index: U16::new(spa.index),
            flags: U16::new(PROXIMITY_VALID),
            reserved: U32::ZERO,
            proximity: U32::new(spa.proximity),
            guid: spa.kind.guid(),
            base: U64::new(spa.range.base),
            size: U64::new(spa.range.size),
            attributes: U64::new(ATTRIBUTES),
        };
        self.bytes.extend_from_slice(entry.as_bytes());
        self
    }

    /// Adds the share of a DIMM in a range.
    pub fn region_map(mut self, map: &RegionMap) -> Self {
        let entry = RegionMapBytes {
            kind: U16::new(TYPE_REGION_MAP),
            length: length_of::<RegionMapBytes>(),
            handle: U32::new(map.handle),
            physical_id: U16::new(map.physical_id),
            region_id: U16::new(map.region_id),
            range_index: U16::new(map.range_index),
            control_index: U16::new(map.control_index),
            size: U64::new(map.size),
            offset: U64::new(map.offset),
            dimm_address: U64::new(map.dimm_address),
            interleave_index: U16::ZERO,
            ways: U16::new(map.ways),
            flags: U16::new(map.flags.bits()),
            reserved: U16::ZERO,
        };
        self.bytes.extend_from_slice(entry.as_bytes());
        self
    }

    /// Adds the identity of a DIMM.
    pub fn control_region(mut self, control: &ControlRegion) -> Self {
        let entry = ControlRegionBytes {
            kind: U16::new(TYPE_CONTROL_REGION),
            length: length_of::<ControlRegionBytes>(),
            index: U16::new(control.index),
            vendor: VENDOR,
            device: DEVICE,
            revision: REVISION,
            subsystem_vendor: VENDOR,
            subsystem_device: DEVICE,
            subsystem_revision: REVISION,
            valid_fields: 0,
            manufacturing_location: 0,
            manufacturing_date: [0; 2],
            reserved: U16::ZERO,
            serial: control.serial.to_be_bytes(),
            interface_code: U16::new(INTERFACE_BYTE_ADDRESSABLE),
            windows: U16::ZERO,
        };
        self.bytes.extend_from_slice(entry.as_bytes());
        self
    }

    /// Adds the one flush hint address of a DIMM. A write of any value to it makes earlier stores durable.
    pub fn flush_hint(mut self, handle: u32, address: u64) -> Self {
        let entry = FlushHintBytes {
            kind: U16::new(TYPE_FLUSH_HINT),
            length: length_of::<FlushHintBytes>(),
            handle: U32::new(handle),
            count: U16::new(1),
            reserved: [0; 6],
            address: U64::new(address),
        };
        self.bytes.extend_from_slice(entry.as_bytes());
        self
    }

    /// Adds what the platform promises about persistence. Once in a FIT, and not at all if nothing is said.
    pub fn capabilities(mut self, persistence: Persistence) -> Self {
        // Bit 0: CPU caches are flushed on power loss; bit 1: memory controllers are. The first implies the
        // second.
        let capabilities = match persistence {
            Persistence::Unspecified => return self,
            Persistence::MemoryController => 0b10,
            Persistence::CpuCache => 0b11,
        };
        let entry = CapabilitiesBytes {
            kind: U16::new(TYPE_CAPABILITIES),
            length: length_of::<CapabilitiesBytes>(),
            highest_valid: 1,
            reserved0: [0; 3],
            capabilities: U32::new(capabilities),
            reserved1: U32::ZERO,
        };
        self.bytes.extend_from_slice(entry.as_bytes());
        self
    }

    /// Adds all sub-tables of one unit.
    pub fn unit(self, unit: &PmemUnit) -> Self {
        let index = unit.index();
        let handle = device_handle(unit.unit);
        let builder = self
            .spa_range(&SpaRange {
                index,
                proximity: unit.proximity,
                kind: RangeType::Persistent,
                range: unit.range,
            })
            .region_map(&RegionMap {
                handle,
                physical_id: index,
                region_id: 0,
                range_index: index,
                control_index: index,
                size: unit.range.size,
                offset: 0,
                dimm_address: 0,
                ways: 1,
                flags: unit.flags,
            })
            .control_region(&ControlRegion { index, serial: unit.serial });
        if unit.flush_hint { builder.flush_hint(handle, flush_base(unit.unit)) } else { builder }
    }

    /// The sub-tables.
    pub fn finish(self) -> Vec<u8> {
        self.bytes
    }
}

const fn length_of<T>() -> U16 {
    U16::new(size_of::<T>() as u16)
}

/// Static NFIT with the given units.
pub(crate) fn nfit<'a>(units: impl Iterator<Item = &'a PmemUnit>, persistence: Persistence) -> Table {
    let mut units = units.peekable();
    let mut builder = FitBuilder::new();
    let empty = units.peek().is_none();
    for unit in units {
        builder = builder.unit(unit);
    }
    if !empty {
        builder = builder.capabilities(persistence);
    }
    // 4 reserved bytes, then the sub-tables.
    Table::new(*b"NFIT", 1, &[&[0; 4], builder.finish().as_slice()].concat())
}

#[cfg(test)]
#[path = "nfit_test.rs"]
mod tests;
