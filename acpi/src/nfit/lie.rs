//! Sub-tables that contradict the specification, each other or the machine: what broken firmware has been seen to
//! return, or could.
//!
//! A lie is told by `_FIT` of one unit. The static table is not parsed where there is a `_FIT`, and stays honest, but for
//! [`Lie::Checksum`].

use super::builder::{TYPE_CONTROL_REGION, TYPE_FLUSH_HINT, TYPE_REGION_MAP, TYPE_SPA_RANGE};

/// Hints of [`Lie::HintCount`]: 512 bytes. Linux 6.12 panics now and then when they are 65535: what it copies from behind
/// the sub-table is then 512 KiB (`add_flush` in drivers/acpi/nfit/core.c), and may go on behind the end of RAM.
const HINTS_CLAIMED: u16 = 64;

/// Something wrong in an NFIT.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Lie {
    /// The static table's checksum is wrong.
    Checksum,
    /// A range is 48 bytes long.
    RangeLength,
    /// A region map is 40 bytes long.
    MapLength,
    /// A control region is 24 bytes long.
    ControlLength,
    /// Flush hints are 64, more than their sub-table holds.
    HintCount,
    /// A sub-table of length 0 comes first.
    ZeroLength,
    /// A sub-table of a type that nobody knows comes first.
    UnknownType,
    /// The last sub-table goes on behind the end.
    CutShort,
    /// There is no control region.
    NoControl,
    /// There is no region map.
    NoMap,
    /// There is no range.
    NoRange,
    /// A second range covers half of the first one.
    Overlap,
    /// Two ranges have the same number.
    SameIndex,
    /// The range has the number 0.
    IndexZero,
    /// Nobody knows what the range is.
    UnknownGuid,
    /// The region map's handle is that of no device.
    UnknownHandle,
    /// The share of the DIMM begins within a page.
    Unaligned,
    /// The range is in RAM.
    OverRam,
    /// The range is behind what the processor can address.
    BeyondAddresses,
}

impl Lie {
    /// All of them.
    pub const ALL: [Self; 19] = [
        Self::Checksum,
        Self::RangeLength,
        Self::MapLength,
        Self::ControlLength,
        Self::HintCount,
        Self::ZeroLength,
        Self::UnknownType,
        Self::CutShort,
        Self::NoControl,
        Self::NoMap,
        Self::NoRange,
        Self::Overlap,
        Self::SameIndex,
        Self::IndexZero,
        Self::UnknownGuid,
        Self::UnknownHandle,
        Self::Unaligned,
        Self::OverRam,
        Self::BeyondAddresses,
    ];

    /// The word for it in options.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Checksum => "checksum",
            Self::RangeLength => "range-length",
            Self::MapLength => "map-length",
            Self::ControlLength => "control-length",
            Self::HintCount => "hint-count",
            Self::ZeroLength => "zero-length",
            Self::UnknownType => "unknown-type",
            Self::CutShort => "cut-short",
            Self::NoControl => "no-control",
            Self::NoMap => "no-map",
            Self::NoRange => "no-range",
            Self::Overlap => "overlap",
            Self::SameIndex => "same-index",
            Self::IndexZero => "index-zero",
            Self::UnknownGuid => "unknown-guid",
            Self::UnknownHandle => "unknown-handle",
            Self::Unaligned => "unaligned",
            Self::OverRam => "over-ram",
            Self::BeyondAddresses => "beyond-addresses",
        }
    }

    /// The lie with this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|lie| lie.name() == name)
    }

    /// Tells the lie in honest sub-tables.
    pub(super) fn tell(self, fit: Vec<u8>) -> Vec<u8> {
        let mut tables = split(&fit);
        match self {
            Self::Checksum => {}
            Self::RangeLength => shorten(&mut tables, TYPE_SPA_RANGE, 48),
            Self::MapLength => shorten(&mut tables, TYPE_REGION_MAP, 40),
            Self::ControlLength => shorten(&mut tables, TYPE_CONTROL_REGION, 24),
            Self::HintCount => put(&mut tables, TYPE_FLUSH_HINT, 8, &HINTS_CLAIMED.to_le_bytes()),
            Self::ZeroLength => tables.insert(0, vec![0; 8]),
            Self::UnknownType => tables.insert(0, [vec![0x7F, 0, 16, 0], vec![0; 12]].concat()),
            Self::CutShort => tables.push(vec![0, 0, 56, 0, 0xEE, 0, 0, 0]),
            Self::NoControl => tables.retain(|table| kind(table) != TYPE_CONTROL_REGION),
            Self::NoMap => tables.retain(|table| kind(table) != TYPE_REGION_MAP),
            Self::NoRange => tables.retain(|table| kind(table) != TYPE_SPA_RANGE),
            Self::Overlap => second_half(&mut tables, Some(0xEE)),
            Self::SameIndex => second_half(&mut tables, None),
            Self::IndexZero => put(&mut tables, TYPE_SPA_RANGE, 4, &[0, 0]),
            Self::UnknownGuid => put(&mut tables, TYPE_SPA_RANGE, 16, &[0xEE; 16]),
            Self::UnknownHandle => put(&mut tables, TYPE_REGION_MAP, 4, &[0xEE]),
            Self::Unaligned => put(&mut tables, TYPE_REGION_MAP, 32, &0x100u64.to_le_bytes()),
            Self::OverRam => put(&mut tables, TYPE_SPA_RANGE, 32, &0x1000_0000u64.to_le_bytes()),
            Self::BeyondAddresses => put(&mut tables, TYPE_SPA_RANGE, 32, &(1u64 << 56).to_le_bytes()),
        }
        tables.concat()
    }
}

/// Honest sub-tables one by one.
fn split(mut fit: &[u8]) -> Vec<Vec<u8>> {
    let mut tables = Vec::new();
    while let [_, _, low, high, ..] = *fit {
        let length = usize::from(u16::from_le_bytes([low, high])).clamp(4, fit.len());
        let (table, rest) = fit.split_at(length);
        tables.push(table.to_vec());
        fit = rest;
    }
    tables
}

fn kind(table: &[u8]) -> u16 {
    u16::from_le_bytes([table[0], table[1]])
}

/// Cuts the first sub-table of a kind to a length, which it also claims.
fn shorten(tables: &mut [Vec<u8>], of: u16, length: u16) {
    if let Some(table) = tables.iter_mut().find(|table| kind(table) == of) {
        table.truncate(length.into());
        table[2..4].copy_from_slice(&length.to_le_bytes());
    }
}

/// Writes bytes into the first sub-table of a kind.
fn put(tables: &mut [Vec<u8>], of: u16, offset: usize, bytes: &[u8]) {
    if let Some(table) = tables.iter_mut().find(|table| kind(table) == of) {
        table[offset..offset + bytes.len()].copy_from_slice(bytes);
    }
}

/// Adds the second half of the first range as a range of its own, with another low byte of its number if there is one.
fn second_half(tables: &mut Vec<Vec<u8>>, index: Option<u8>) {
    let Some(at) = tables.iter().position(|table| kind(table) == TYPE_SPA_RANGE) else { return };
    let mut half = tables[at].clone();
    let number = |at: usize, table: &[u8]| {
        u64::from_le_bytes(std::array::from_fn(|byte| table.get(at + byte).copied().unwrap_or(0)))
    };
    let (base, size) = (number(32, &half), number(40, &half) / 2);
    half[32..40].copy_from_slice(&(base + size).to_le_bytes());
    half[40..48].copy_from_slice(&size.to_le_bytes());
    if let Some(index) = index {
        half[4] = index;
    }
    tables.insert(at + 1, half);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Persistence;
    use crate::sample::unit;

    fn told(lie: Lie) -> (Vec<u8>, Vec<u8>) {
        let honest = unit(2).fit(Persistence::MemoryController);
        (honest.clone(), lie.tell(honest))
    }

    #[test]
    fn names_are_read_back() {
        for lie in Lie::ALL {
            assert_eq!(Lie::from_name(lie.name()), Some(lie));
        }
        assert_eq!(Lie::from_name("truth"), None);
    }

    #[test]
    fn every_lie_changes_what_it_says_and_nothing_else() {
        for (lie, difference) in [
            (Lie::RangeLength, -8isize),
            (Lie::MapLength, -8),
            (Lie::ControlLength, -8),
            (Lie::ZeroLength, 8),
            (Lie::UnknownType, 16),
            (Lie::CutShort, 8),
            (Lie::NoControl, -32),
            (Lie::NoMap, -48),
            (Lie::NoRange, -56),
            (Lie::Overlap, 56),
            (Lie::SameIndex, 56),
        ] {
            let (honest, lied) = told(lie);
            assert_eq!(lied.len() as isize - honest.len() as isize, difference, "{}", lie.name());
        }
        // Where the bytes that differ are.
        for (lie, range) in [
            (Lie::HintCount, 136 + 8..136 + 10),
            (Lie::IndexZero, 4..6),
            (Lie::UnknownGuid, 16..32),
            (Lie::UnknownHandle, 56 + 4..56 + 5),
            (Lie::Unaligned, 56 + 32..56 + 40),
            (Lie::OverRam, 32..40),
            (Lie::BeyondAddresses, 32..40),
        ] {
            let (honest, lied) = told(lie);
            let differ: Vec<_> = (0..honest.len()).filter(|&at| honest[at] != lied[at]).collect();
            assert!(!differ.is_empty() && differ.iter().all(|at| range.contains(at)), "{}", lie.name());
        }
        let (honest, lied) = told(Lie::Checksum);
        assert_eq!(honest, lied);
    }

    #[test]
    fn a_range_that_overlaps_is_the_second_half() {
        for (lie, index) in [(Lie::Overlap, 0xEE), (Lie::SameIndex, 1)] {
            let (_, lied) = told(lie);
            let half = &lied[56..112];
            assert_eq!((half[4], half[5]), (index, 2));
            assert_eq!(half[32..40], 0x3_2000_0000u64.to_le_bytes());
            assert_eq!(half[40..48], 0x2000_0000u64.to_le_bytes());
        }
    }
}
