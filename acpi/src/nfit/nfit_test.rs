use proptest::prelude::*;

use super::*;
use crate::checksum;
use crate::sample::{slot_base, unit};

fn u16_at(bytes: &[u8], offset: usize) -> u16 {
    u16::from_le_bytes([bytes[offset], bytes[offset + 1]])
}

/// Types and lengths of the sub-tables, by the rules of Linux's `add_table`.
fn walk(mut bytes: &[u8]) -> Vec<(u16, u16)> {
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let (kind, length) = (u16_at(bytes, 0), u16_at(bytes, 2));
        let wanted = match kind {
            0 => 56,
            1 => 48,
            2 => 16 + 4 * u16_at(bytes, 8),
            4 => 32,
            6 => 16 + 8 * u16_at(bytes, 8),
            7 => 16,
            other => panic!("sub-table of type {other}"),
        };
        assert_eq!(length, wanted, "length of type {kind}");
        found.push((kind, length));
        bytes = &bytes[usize::from(length)..];
    }
    found
}

#[test]
fn fit_of_a_unit_byte_by_byte() {
    let fit = unit(2).fit(Persistence::MemoryController);
    assert_eq!(walk(&fit), [(0, 56), (1, 48), (4, 32), (6, 24), (7, 16)]);

    let spa = &fit[..56];
    assert_eq!(spa[4..8], [1, 2, 2, 0]);
    assert_eq!(spa[12..16], 3u32.to_le_bytes());
    assert_eq!(spa[16..24], [0x79, 0xD3, 0xF0, 0x66, 0xF3, 0xB4, 0x74, 0x40]);
    assert_eq!(spa[24..32], [0xAC, 0x43, 0x0D, 0x33, 0x18, 0xB7, 0x8C, 0xDB]);
    assert_eq!(spa[32..40], 0x3_0000_0000u64.to_le_bytes());
    assert_eq!(spa[40..48], 0x4000_0000u64.to_le_bytes());
    assert_eq!(spa[48..56], 0x8008u64.to_le_bytes());

    let map = &fit[56..104];
    assert_eq!(map[4..8], 0x0201u32.to_le_bytes());
    assert_eq!(map[8..16], [1, 2, 0, 0, 1, 2, 1, 2]);
    assert_eq!(map[16..24], 0x4000_0000u64.to_le_bytes());
    assert_eq!(map[24..40], [0; 16]);
    assert_eq!(map[40..46], [0, 0, 1, 0, 0, 0]);

    let control = &fit[104..136];
    assert_eq!(control[4..6], [1, 2]);
    assert_eq!(control[6..8], [0xAC, 0x17]);
    assert_eq!(control[24..28], [0x12, 0x34, 0x56, 0x02]);
    assert_eq!(control[28..32], [0x01, 0x03, 0, 0]);

    let flush = &fit[136..160];
    assert_eq!(flush[4..8], 0x0201u32.to_le_bytes());
    assert_eq!(flush[8..10], [1, 0]);
    assert_eq!(flush[16..24], 0xFE90_2000u64.to_le_bytes());

    assert_eq!(fit[160..176], [7, 0, 16, 0, 1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn state_flags_reach_the_region_map() {
    let mut unit = unit(0);
    unit.dimms[0].flags = DimmFlags::NOT_ARMED.union(DimmFlags::FLUSH_FAILED);
    assert_eq!(unit.fit(Persistence::Unspecified)[56 + 44..56 + 46], [0b1100, 0]);
}

#[test]
fn static_table_without_units_is_a_bare_header() {
    let table = nfit([].into_iter(), Persistence::CpuCache);
    assert_eq!(table.bytes().len(), 40);
    assert_eq!(checksum(table.bytes()), 0);
}

#[test]
fn a_wrong_checksum_is_that_of_the_static_table() {
    let table =
        nfit([&NvdimmUnit { lie: Some(Lie::Checksum), ..unit(0) }].into_iter(), Persistence::CpuCache);
    assert_ne!(checksum(table.bytes()), 0);
}

/// ToUUID of each type's GUID as the specification writes it.
#[test]
fn guids_are_in_the_byte_order_of_touuid() {
    for (kind, text) in [
        (RangeType::Volatile, "7305944f-fdda-44e3-b16c-3f22d252e5d0"),
        (RangeType::Persistent, "66f0d379-b4f3-4074-ac43-0d3318b78cdb"),
        (RangeType::VolatileDisk, "77ab535a-45fc-624b-5560-f7b281d1f96e"),
        (RangeType::VolatileCd, "3d5abd30-4175-87ce-6d64-d2ade523c4bb"),
        (RangeType::PersistentDisk, "5cea02c9-4d07-69d3-269f-4496fbe096f9"),
        (RangeType::PersistentCd, "08018188-42cd-bb48-100f-5387d53ded3d"),
    ] {
        let digits: String = text.chars().filter(|c| *c != '-').collect();
        let byte = |at: usize| u8::from_str_radix(&digits[2 * at..2 * at + 2], 16).unwrap();
        let order = [3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15];
        assert_eq!(kind.guid(), order.map(byte), "{text}");
    }
}

#[test]
fn static_table_has_one_capabilities_sub_table() {
    let units = [unit(0), unit(1)];
    let table = nfit(units.iter(), Persistence::CpuCache);
    let kinds: Vec<u16> = walk(&table.bytes()[40..]).into_iter().map(|(kind, _)| kind).collect();
    assert_eq!(kinds, [0, 1, 4, 6, 0, 1, 4, 6, 7]);
    assert_eq!(checksum(table.bytes()), 0);
}

/// A unit with a range over two DIMMs, one over all three of them in lines of another size, a volatile range, and a
/// DIMM that is not mapped.
fn several() -> NvdimmUnit {
    let base = slot_base(1);
    let range = |place: u64, kind, line, shares: &[(u32, u64)]| UnitRange {
        range: AddressRange { base: base + place * 0x600_0000, size: 0x600_0000 },
        proximity: 7 + place as u32,
        kind,
        line,
        shares: shares.iter().map(|&(dimm, dimm_address)| Share { dimm, dimm_address }).collect(),
    };
    let dimm = |number: u32, capacity| UnitDimm {
        serial: 0xA0 + number,
        flags: if number == 3 { DimmFlags::MAP_FAILED } else { DimmFlags::empty() },
        capacity,
        flush_hint: number != 3,
    };
    NvdimmUnit {
        unit: 1,
        ranges: vec![
            range(0, RangeType::Persistent, 256, &[(1, 0), (0, 0)]),
            range(1, RangeType::Persistent, 4096, &[(0, 0x300_0000), (1, 0x300_0000), (2, 0)]),
            range(2, RangeType::Volatile, 4096, &[]),
        ],
        dimms: vec![dimm(0, 0x500_0000), dimm(1, 0x500_0000), dimm(2, 0x200_0000), dimm(3, 0x100_0000)],
        lie: None,
    }
}

#[test]
fn fit_of_several_dimms_and_ranges_byte_by_byte() {
    let fit = several().fit(Persistence::Unspecified);
    let kinds: Vec<u16> = walk(&fit).into_iter().map(|(kind, _)| kind).collect();
    assert_eq!(kinds, [0, 0, 0, 1, 1, 1, 1, 1, 1, 2, 2, 4, 4, 4, 4, 6, 6, 6]);

    let volatile = &fit[112..168];
    assert_eq!(volatile[4..6], [3, 1]);
    assert_eq!(volatile[16..20], [0x4F, 0x94, 0x05, 0x73]);
    assert_eq!(volatile[48..56], 0x8u64.to_le_bytes(), "not persistent");

    // Handle, region number, range, control region; size, offset, address on the DIMM; interleave, ways, flags.
    let maps: Vec<_> = fit[168..]
        .chunks(48)
        .take(6)
        .map(|map| {
            let number = |at: usize| u64::from_le_bytes(map[at..at + 8].try_into().unwrap());
            let short = |at| u16_at(map, at);
            (
                [short(4), short(10), short(12), short(14)],
                [number(16), number(24), number(32)],
                [short(40), short(42), short(44)],
            )
        })
        .collect();
    assert_eq!(
        maps,
        [
            ([0x101, 0, 0x101, 0x101], [0x300_0000, 256, 0], [0x101, 2, 0]),
            ([0x101, 1, 0x102, 0x101], [0x200_0000, 0, 0x300_0000], [0x102, 3, 0]),
            ([0x102, 0, 0x101, 0x102], [0x300_0000, 0, 0], [0x101, 2, 0]),
            ([0x102, 1, 0x102, 0x102], [0x200_0000, 4096, 0x300_0000], [0x102, 3, 0]),
            ([0x103, 0, 0x102, 0x103], [0x200_0000, 8192, 0], [0x102, 3, 0]),
            ([0x104, 0, 0, 0x104], [0x100_0000, 0, 0], [0, 1, 0x40]),
        ]
    );

    let interleave = &fit[168 + 6 * 48..][..40];
    assert_eq!(interleave[..20], [2, 0, 20, 0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    assert_eq!(interleave[20..], [2, 0, 20, 0, 2, 1, 0, 0, 1, 0, 0, 0, 0, 16, 0, 0, 0, 0, 0, 0]);

    let hints = &fit[168 + 6 * 48 + 40 + 4 * 32..];
    let hints: Vec<_> = hints
        .chunks(24)
        .map(|hint| (u16_at(hint, 4), u64::from_le_bytes(hint[16..].try_into().unwrap())))
        .collect();
    assert_eq!(hints, [(0x101, 0xFE90_1000), (0x102, 0xFE90_1040), (0x103, 0xFE90_1080)]);
}

proptest! {
    #[test]
    fn lengths_add_up(
        numbers in proptest::collection::vec(0u32..64, 0..64),
        serial: u32,
        size in 1u64..1 << 40,
        flush_hint: bool,
        which in 0usize..3,
    ) {
        let persistence =
            [Persistence::Unspecified, Persistence::MemoryController, Persistence::CpuCache][which];
        let mut builder = FitBuilder::new();
        for &number in &numbers {
            let mut unit = unit(number);
            unit.ranges[0].range = AddressRange { base: u64::from(number) << 40, size };
            unit.dimms[0] = UnitDimm { serial, flush_hint, ..unit.dimms[0] };
            builder = builder.unit(&unit);
        }
        let fit = builder.capabilities(persistence).finish();
        let each = 56 + 48 + 32 + if flush_hint { 24 } else { 0 };
        let last = if which == 0 { 0 } else { 16 };
        prop_assert_eq!(fit.len(), numbers.len() * each + last);
        let per_unit = if flush_hint { 4 } else { 3 };
        prop_assert_eq!(walk(&fit).len(), numbers.len() * per_unit + usize::from(which != 0));
    }
}
