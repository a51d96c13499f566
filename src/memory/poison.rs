//! Which 64-byte lines of a region are poisoned.

use std::ops::Range;

use super::{PAGE_SIZE, RangeSet};

/// Bytes in a cache line, the unit in which memory is poisoned.
pub const LINE_SIZE: u64 = 64;

/// The poisoned lines of one region, by offset from its start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PoisonMap {
    lines: RangeSet,
}

/// Rounds `range` outward to whole units of `unit` bytes.
pub fn round_out(range: Range<u64>, unit: u64) -> Range<u64> {
    let end = range.end.saturating_add(unit - 1);
    range.start - range.start % unit..end - end % unit
}

impl PoisonMap {
    /// Poisons every line that `range` touches, and returns those lines as a byte range.
    pub fn add(&mut self, range: Range<u64>) -> Range<u64> {
        let lines = round_out(range, LINE_SIZE);
        self.lines.insert(lines.clone());
        lines
    }

    /// Cleans every line that lies wholly in `range`, and returns how many bytes were poisoned there.
    ///
    /// A line of which only a part is named stays as it is: its other bytes are still lost.
    pub fn clear(&mut self, range: Range<u64>) -> u64 {
        let start = range.start.next_multiple_of(LINE_SIZE);
        let end = range.end - range.end % LINE_SIZE;
        if start >= end {
            return 0;
        }
        let cleared = self.lines.within(start..end).map(|r| r.end - r.start).sum();
        self.lines.remove(start..end);
        cleared
    }

    /// The poisoned bytes within `range`, merged and in order.
    pub fn within(&self, range: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
        self.lines.within(range)
    }

    /// Offset of the first poisoned line that `range` touches.
    pub fn first_in(&self, range: Range<u64>) -> Option<u64> {
        self.lines.within(range).next().map(|r| r.start - r.start % LINE_SIZE)
    }

    /// Whether the page that starts at `page` holds a poisoned line.
    pub fn in_page(&self, page: u64) -> bool {
        self.lines.intersects(page..page + PAGE_SIZE)
    }

    /// The pages that hold a poisoned line, as merged page-aligned ranges.
    pub fn pages(&self) -> RangeSet {
        let mut pages = RangeSet::default();
        for range in self.lines.iter() {
            pages.insert(round_out(range, PAGE_SIZE));
        }
        pages
    }

    /// Number of poisoned lines.
    pub fn len(&self) -> u64 {
        self.lines.total() / LINE_SIZE
    }

    /// Whether no line is poisoned.
    pub fn is_empty(&self) -> bool {
        self.lines.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_touched_line_is_poisoned_whole() {
        let mut map = PoisonMap::default();
        assert_eq!(map.add(0x1241..0x1242), 0x1240..0x1280);
        assert_eq!(map.first_in(0x1000..0x2000), Some(0x1240));
        assert_eq!(map.first_in(0x1270..0x1271), Some(0x1240));
        assert_eq!(map.first_in(0x1280..0x2000), None);
        assert_eq!(map.pages().iter().collect::<Vec<_>>(), vec![0x1000..0x2000]);
        assert_eq!(map.len(), 1);
    }

    #[test]
    fn a_line_is_cleared_only_whole() {
        let mut map = PoisonMap::default();
        map.add(0..256);
        assert_eq!(map.clear(65..191), 0, "no line lies wholly in 65..191 but 128..191 is short of one");
        assert_eq!(map.clear(64..192), 128);
        assert_eq!(map.within(0..256).collect::<Vec<_>>(), vec![0..64, 192..256]);
        assert!(map.in_page(0));
        assert!(!map.in_page(PAGE_SIZE));
    }
}
