//! SRAT (ACPI 6.5, 5.2.16): which proximity domain processors and memory are in.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::{AddressRange, Description, Table};

/// Fixed part behind the header, table 5.58.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Fixed {
    reserved0: U32,
    reserved1: U64,
}

/// Processor local APIC affinity, table 5.59.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct ProcessorAffinity {
    kind: u8,
    length: u8,
    proximity_low: u8,
    apic_id: u8,
    flags: U32,
    sapic_eid: u8,
    proximity_high: [u8; 3],
    clock_domain: U32,
}

/// Memory affinity, table 5.60.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct MemoryAffinity {
    kind: u8,
    length: u8,
    proximity: U32,
    reserved0: U16,
    base: U64,
    size: U64,
    reserved1: U32,
    flags: U32,
    reserved2: U64,
}

const _: () = assert!(size_of::<Fixed>() == 12);
const _: () = assert!(size_of::<ProcessorAffinity>() == 16);
const _: () = assert!(size_of::<MemoryAffinity>() == 40);

const ENABLED: u32 = 1 << 0;
const HOT_PLUGGABLE: u32 = 1 << 1;
const NON_VOLATILE: u32 = 1 << 2;

fn memory(range: AddressRange, proximity: u32, flags: u32) -> MemoryAffinity {
    MemoryAffinity {
        kind: 1,
        length: size_of::<MemoryAffinity>() as u8,
        proximity: U32::new(proximity),
        reserved0: U16::ZERO,
        base: U64::new(range.base),
        size: U64::new(range.size),
        reserved1: U32::ZERO,
        flags: U32::new(flags),
        reserved2: U64::ZERO,
    }
}

/// SRAT of a machine.
///
/// Every unit slot is described whether something is in it or not: Linux reads SRAT once, and looks the target
/// node of persistent memory that arrives later up in what it kept of it (`numa_reserved_meminfo`). The whole
/// window is hot-pluggable, since a unit can be smaller than its slot and can be replaced.
pub(crate) fn srat(description: &Description) -> Table {
    let mut body = Fixed { reserved0: U32::new(1), reserved1: U64::ZERO }.as_bytes().to_vec();
    for processor in &description.processors {
        let [low, high @ ..] = processor.proximity.to_le_bytes();
        let entry = ProcessorAffinity {
            kind: 0,
            length: size_of::<ProcessorAffinity>() as u8,
            proximity_low: low,
            apic_id: processor.apic_id,
            flags: U32::new(ENABLED),
            sapic_eid: 0,
            proximity_high: high,
            clock_domain: U32::ZERO,
        };
        body.extend_from_slice(entry.as_bytes());
    }
    for ram in &description.memory {
        body.extend_from_slice(memory(ram.range, ram.proximity, ENABLED).as_bytes());
    }
    let units = description.windows().map(|window| (window.range, window.proximity));
    let arrivals = description.arrivals.iter().map(|arrival| (arrival.range, arrival.proximity));
    for (range, proximity) in units.chain(arrivals) {
        let flags = ENABLED | HOT_PLUGGABLE | NON_VOLATILE;
        body.extend_from_slice(memory(range, proximity, flags).as_bytes());
    }
    Table::new(*b"SRAT", 3, &body)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checksum;
    use crate::sample::sample;

    #[test]
    fn lists_processors_ram_and_slots() {
        let table = srat(&sample());
        let bytes = table.bytes();
        assert_eq!(bytes.len(), 48 + 2 * 16 + 2 * 40 + 3 * 40);
        assert_eq!(checksum(bytes), 0);
        assert_eq!(bytes[8], 3);
        assert_eq!(bytes[36..40], [1, 0, 0, 0]);
        assert_eq!(bytes[64..80], [0, 16, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        let ram = &bytes[80..120];
        assert_eq!(ram[..2], [1, 40]);
        assert_eq!(ram[8..16], 0u64.to_le_bytes());
        assert_eq!(ram[16..24], 0xC000_0000u64.to_le_bytes());
        assert_eq!(ram[28], 1);
        let slot = &bytes[200..240];
        assert_eq!(slot[2..6], 2u32.to_le_bytes());
        assert_eq!(slot[8..16], 0x2_A000_0000u64.to_le_bytes());
        assert_eq!(slot[28], 7);
    }

    #[test]
    fn large_proximity_of_a_processor_is_split() {
        let mut description = sample();
        description.processors[0].proximity = 0x0403_0201;
        let bytes = srat(&description).bytes().to_vec();
        assert_eq!((bytes[50], &bytes[57..60]), (1, &[2u8, 3, 4][..]));
    }

    #[test]
    fn memory_that_may_arrive_is_hot_pluggable() {
        let range = AddressRange { base: 0x10_0000_0000, size: 0x4000_0000 };
        let arrivals = vec![crate::MemoryRange { range, proximity: 9 }];
        let table = srat(&Description { arrivals, ..sample() });
        let entry = &table.bytes()[table.bytes().len() - 40..];
        assert_eq!(entry[..2], [1, 40]);
        assert_eq!(entry[2..6], 9u32.to_le_bytes());
        assert_eq!(entry[8..16], range.base.to_le_bytes());
        assert_eq!(entry[28], 7);
    }
}
