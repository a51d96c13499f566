//! The DIMMs behind a range of addresses: an address is a place on one of them, and the other way round.
//!
//! Lines of the range go round the DIMMs: line n is on DIMM n modulo their number, behind the line that it had in the
//! round before. That is what [`aconite_acpi::Interleave`] describes.

use std::ops::Range;

/// The share of a DIMM in a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// The DIMM's number in its unit.
    pub dimm: u32,
    /// Address on the DIMM of the share's first byte ("DPA").
    pub dimm_address: u64,
}

/// How a range of addresses is spread over DIMMs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interleave {
    /// Bytes of a line.
    pub line: u64,
    /// The DIMMs, in the order in which lines go round them.
    pub shares: Vec<Share>,
}

/// A place on a DIMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The DIMM's number in its unit.
    pub dimm: u32,
    /// The address on the DIMM.
    pub address: u64,
    /// Bytes from here on that follow each other in the range as they do on the DIMM, if the range is long enough.
    pub length: u64,
}

impl Interleave {
    /// All of a range is on DIMM 0, from its address 0 on.
    pub fn none() -> Self {
        Self { line: 4096, shares: vec![Share { dimm: 0, dimm_address: 0 }] }
    }

    /// Where the byte at `offset` of the range is; `None` if nothing is known of its DIMMs.
    pub fn place(&self, offset: u64) -> Option<Place> {
        let ways = self.shares.len() as u64;
        if ways == 1 {
            let Share { dimm, dimm_address } = self.shares[0];
            return Some(Place {
                dimm,
                address: dimm_address.saturating_add(offset),
                length: u64::MAX - offset,
            });
        }
        let (line, within) = (offset / self.line, offset % self.line);
        let share = self.shares.get(line.checked_rem(ways)? as usize)?;
        let inside = line / ways * self.line + within;
        Some(Place {
            dimm: share.dimm,
            address: share.dimm_address.saturating_add(inside),
            length: self.line - within,
        })
    }

    /// The parts of a range of `size` bytes that are on `dimm`, as offsets in the range.
    pub fn parts(&self, dimm: u32, size: u64) -> impl Iterator<Item = Range<u64>> + '_ {
        let (ways, step) = (self.shares.len() as u64, if self.shares.len() == 1 { size } else { self.line });
        let positions = (0..).zip(&self.shares).filter(move |(_, share)| share.dimm == dimm);
        positions.flat_map(move |(position, _)| {
            let lines = (position * step..size).step_by((ways * step).max(1) as usize);
            lines.map(move |start| start..size.min(start + step))
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn over(line: u64, shares: &[(u32, u64)]) -> Interleave {
        let shares = shares.iter().map(|&(dimm, dimm_address)| Share { dimm, dimm_address }).collect();
        Interleave { line, shares }
    }

    #[test]
    fn one_dimm_is_linear() {
        let whole = over(256, &[(3, 0x1000)]);
        let place = whole.place(0x1234).unwrap();
        assert_eq!((place.dimm, place.address), (3, 0x2234));
        assert_eq!(whole.parts(3, 0x8000).collect::<Vec<_>>(), [0..0x8000]);
        assert_eq!(whole.parts(0, 0x8000).count(), 0);
    }

    #[test]
    fn lines_go_round_the_dimms() {
        let set = over(256, &[(2, 0), (0, 0x10_0000), (1, 0)]);
        let at = |offset| set.place(offset).map(|p| (p.dimm, p.address, p.length)).unwrap();
        assert_eq!(at(0), (2, 0, 256));
        assert_eq!(at(0x1FF), (0, 0x10_00FF, 1));
        assert_eq!(at(0x200), (1, 0, 256));
        assert_eq!(at(0x300), (2, 0x100, 256));
        assert_eq!(set.parts(1, 0x600).collect::<Vec<_>>(), [0x200..0x300, 0x500..0x600]);
    }

    #[test]
    fn nothing_is_known_without_shares() {
        assert_eq!(over(256, &[]).place(0), None);
        assert_eq!(over(256, &[]).parts(0, 4096).count(), 0);
    }

    proptest! {
        /// Every byte of the range is on exactly one DIMM, and no two share a place there.
        #[test]
        fn the_mapping_is_one_to_one(ways in 1u32..17, line_bits in 6u32..13, rounds in 1u64..4) {
            let line = 1u64 << line_bits;
            let shares: Vec<_> = (0..ways).map(|dimm| (dimm, u64::from(dimm) << 20)).collect();
            let set = over(line, &shares);
            let size = line * u64::from(ways) * rounds;
            let mut seen = std::collections::BTreeMap::new();
            for offset in (0..size).step_by(64) {
                let place = set.place(offset).unwrap();
                prop_assert!(place.address - (u64::from(place.dimm) << 20) < line * rounds);
                prop_assert_eq!(seen.insert((place.dimm, place.address), offset), None);
            }
            for dimm in 0..ways {
                let parts: Vec<_> = set.parts(dimm, size).collect();
                prop_assert_eq!(parts.iter().map(|part| part.end - part.start).sum::<u64>(), line * rounds);
                let mut address = u64::from(dimm) << 20;
                for part in parts {
                    prop_assert_eq!(seen.get(&(dimm, address)), Some(&part.start));
                    address += part.end - part.start;
                }
            }
        }
    }
}
