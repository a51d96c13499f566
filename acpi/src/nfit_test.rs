use proptest::prelude::*;

use super::*;
use crate::checksum;
use crate::sample::unit;

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
    assert_eq!(spa[4..8], [3, 0, 2, 0]);
    assert_eq!(spa[12..16], 3u32.to_le_bytes());
    assert_eq!(spa[16..24], [0x79, 0xD3, 0xF0, 0x66, 0xF3, 0xB4, 0x74, 0x40]);
    assert_eq!(spa[24..32], [0xAC, 0x43, 0x0D, 0x33, 0x18, 0xB7, 0x8C, 0xDB]);
    assert_eq!(spa[32..40], 0x3_0000_0000u64.to_le_bytes());
    assert_eq!(spa[40..48], 0x4000_0000u64.to_le_bytes());
    assert_eq!(spa[48..56], 0x8008u64.to_le_bytes());

    let map = &fit[56..104];
    assert_eq!(map[4..8], 0x0201u32.to_le_bytes());
    assert_eq!(map[12..16], [3, 0, 3, 0]);
    assert_eq!(map[16..24], 0x4000_0000u64.to_le_bytes());
    assert_eq!(map[24..40], [0; 16]);
    assert_eq!(map[40..46], [0, 0, 1, 0, 0, 0]);

    let control = &fit[104..136];
    assert_eq!(control[4..6], [3, 0]);
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
    unit.flags = DimmFlags::NOT_ARMED.union(DimmFlags::FLUSH_FAILED);
    assert_eq!(unit.fit(Persistence::Unspecified)[56 + 44..56 + 46], [0b1100, 0]);
}

#[test]
fn static_table_without_units_is_a_bare_header() {
    let table = nfit([].into_iter(), Persistence::CpuCache);
    assert_eq!(table.bytes().len(), 40);
    assert_eq!(checksum(table.bytes()), 0);
}

#[test]
fn static_table_has_one_capabilities_sub_table() {
    let units = [unit(0), unit(1)];
    let table = nfit(units.iter(), Persistence::CpuCache);
    let kinds: Vec<u16> = walk(&table.bytes()[40..]).into_iter().map(|(kind, _)| kind).collect();
    assert_eq!(kinds, [0, 1, 4, 6, 0, 1, 4, 6, 7]);
    assert_eq!(checksum(table.bytes()), 0);
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
            let range = AddressRange { base: u64::from(number) << 40, size };
            builder = builder.unit(&PmemUnit { range, serial, flush_hint, ..unit(number) });
        }
        let fit = builder.capabilities(persistence).finish();
        let each = 56 + 48 + 32 + if flush_hint { 24 } else { 0 };
        let last = if which == 0 { 0 } else { 16 };
        prop_assert_eq!(fit.len(), numbers.len() * each + last);
        let per_unit = if flush_hint { 4 } else { 3 };
        prop_assert_eq!(walk(&fit).len(), numbers.len() * per_unit + usize::from(which != 0));
    }
}
