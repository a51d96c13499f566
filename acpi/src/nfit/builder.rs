//! The bytes of NFIT sub-tables.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{ControlRegion, Interleave, Persistence, RangeType, RegionMap, SpaRange};
use crate::layout::FLUSH_BASE;

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
struct InterleaveBytes {
    kind: U16,
    length: U16,
    index: U16,
    reserved: U16,
    lines: U32,
    line: U32,
    /// Of the one line, in lines.
    offset: U32,
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
const _: () = assert!(size_of::<InterleaveBytes>() == 20);
const _: () = assert!(size_of::<ControlRegionBytes>() == 32);
const _: () = assert!(size_of::<FlushHintBytes>() == 24);
const _: () = assert!(size_of::<CapabilitiesBytes>() == 16);
const _: () = assert!(FLUSH_BASE.is_multiple_of(8));

pub(super) const TYPE_SPA_RANGE: u16 = 0;
pub(super) const TYPE_REGION_MAP: u16 = 1;
const TYPE_INTERLEAVE: u16 = 2;
pub(super) const TYPE_CONTROL_REGION: u16 = 4;
pub(super) const TYPE_FLUSH_HINT: u16 = 6;
const TYPE_CAPABILITIES: u16 = 7;

/// SPA range flags: the proximity domain is valid.
const PROXIMITY_VALID: u16 = 1 << 1;
/// EFI_MEMORY_WB.
const WRITE_BACK: u64 = 0x8;
/// EFI_MEMORY_NV.
const NON_VOLATILE: u64 = 0x8000;
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
            attributes: U64::new(match spa.kind {
                RangeType::Volatile | RangeType::VolatileDisk | RangeType::VolatileCd => WRITE_BACK,
                RangeType::Persistent | RangeType::PersistentDisk | RangeType::PersistentCd => {
                    WRITE_BACK | NON_VOLATILE
                }
            }),
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
            interleave_index: U16::new(map.interleave_index),
            ways: U16::new(map.ways),
            flags: U16::new(map.flags.bits()),
            reserved: U16::ZERO,
        };
        self.bytes.extend_from_slice(entry.as_bytes());
        self
    }

    /// Adds how the lines of a DIMM follow each other.
    pub fn interleave(mut self, interleave: &Interleave) -> Self {
        let entry = InterleaveBytes {
            kind: U16::new(TYPE_INTERLEAVE),
            length: length_of::<InterleaveBytes>(),
            index: U16::new(interleave.index),
            reserved: U16::ZERO,
            lines: U32::new(1),
            line: U32::new(interleave.line),
            offset: U32::ZERO,
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

    /// The sub-tables.
    pub fn finish(self) -> Vec<u8> {
        self.bytes
    }
}

const fn length_of<T>() -> U16 {
    U16::new(size_of::<T>() as u16)
}
