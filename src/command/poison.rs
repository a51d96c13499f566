//! The arithmetic of poison ranges: bounds, widening to the granularity, merging.

use super::{Error, ErrorCode};
use crate::units::{ByteRange, Size};

/// Widens `ranges` to multiples of `granularity` (a power of two, in bytes), sorts and merges them.
///
/// # Errors
/// An empty list or range, or one that leaves the device of `size` bytes; nothing is to be poisoned then.
pub fn round_ranges(
    device: &str,
    ranges: &[ByteRange],
    size: u64,
    granularity: u64,
) -> Result<Vec<ByteRange>, Error> {
    if ranges.is_empty() {
        return Err(Error::new(
            ErrorCode::BadParameter,
            format!("No range of device {device} is named"),
            "name at least one, such as 0x200040+64",
        ));
    }
    let mut rounded: Vec<ByteRange> = Vec::with_capacity(ranges.len());
    for range in ranges {
        if range.length == 0 {
            return Err(Error::new(
                ErrorCode::BadParameter,
                format!("Range {range} of device {device} is empty"),
                "give a length of at least 1",
            ));
        }
        let Some(end) = range.end().filter(|end| *end <= size) else {
            return Err(Error::new(
                ErrorCode::OutsideDevice,
                format!("Range {range} leaves device {device}, which has {size:#x} bytes ({})", Size(size)),
                format!("stay below offset {size:#x}"),
            ));
        };
        let start = range.offset.0 & !(granularity - 1);
        // The end is inside the device; only a device that is no multiple of the granularity is cut.
        let end = end.checked_next_multiple_of(granularity).map_or(size, |end| end.min(size));
        rounded.push(ByteRange::new(start, end - start));
    }
    rounded.sort_unstable();
    let mut merged: Vec<ByteRange> = Vec::with_capacity(rounded.len());
    for range in rounded {
        let end = range.offset.0 + range.length;
        match merged.last_mut() {
            Some(last) if range.offset.0 <= last.offset.0 + last.length => {
                last.length = last.length.max(end - last.offset.0);
            }
            _ => merged.push(range),
        }
    }
    Ok(merged)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn widened_and_merged() {
        let ranges =
            [ByteRange::new(0x200040, 64), ByteRange::new(0x1000, 0x1001), ByteRange::new(0x3000, 1)];
        assert_eq!(
            round_ranges("p0", &ranges, 1 << 30, 4096).unwrap(),
            [ByteRange::new(0x1000, 0x3000), ByteRange::new(0x200000, 4096)]
        );
    }

    #[test]
    fn outside_is_refused_with_both_numbers() {
        let error = round_ranges("p0", &[ByteRange::new(0x3fff_ffff, 2)], 1 << 30, 64).unwrap_err();
        assert_eq!(error.code, ErrorCode::OutsideDevice);
        assert_eq!(
            error.to_string(),
            "Range 0x3fffffff+2 leaves device p0, which has 0x40000000 bytes (1G); stay below offset 0x40000000"
        );
        assert!(round_ranges("p0", &[], 1 << 30, 64).is_err());
        assert!(round_ranges("p0", &[ByteRange::new(0, 0)], 1 << 30, 64).is_err());
        assert!(round_ranges("p0", &[ByteRange::new(u64::MAX, 2)], 1 << 30, 64).is_err());
    }

    proptest! {
        #[test]
        fn every_requested_byte_is_armed_and_nothing_beyond_a_grain(
            raw in prop::collection::vec((0u64..1 << 20, 1u64..5000), 1..20),
            shift in 6u32..13,
        ) {
            let (size, grain) = (1 << 21, 1 << shift);
            let ranges: Vec<ByteRange> = raw.iter().map(|(o, l)| ByteRange::new(*o, *l)).collect();
            let armed = round_ranges("p0", &ranges, size, grain).unwrap();
            for pair in armed.windows(2) {
                prop_assert!(pair[0].end().unwrap() < pair[1].offset.0);
            }
            for range in &ranges {
                prop_assert!(armed.iter().any(|a| a.offset <= range.offset && a.end() >= range.end()));
            }
            for range in &armed {
                prop_assert_eq!(range.offset.0 % grain, 0);
                for line in (range.offset.0..range.end().unwrap()).step_by(grain as usize) {
                    prop_assert!(ranges.iter().any(|r| r.overlaps(&ByteRange::new(line, grain))));
                }
            }
        }
    }
}
