//! Which 64-byte lines of a region are poisoned.

use std::ops::Range;

use super::{PAGE_SIZE, RangeSet};

/// Bytes in a cache line, the unit in which memory is poisoned.
pub const LINE_SIZE: u64 = 64;

/// The poisoned lines of one region, by offset from its start, and the pages that hold one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoisonMap {
    lines: RangeSet,
    /// Units of `unit` bytes that hold a poisoned line.
    pages: RangeSet,
    unit: u64,
}

/// What a change of a [`PoisonMap`] came to, in order of offset.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PoisonChange {
    /// Lines that are poisoned and were not, or the other way round.
    pub lines: Vec<Range<u64>>,
    /// Pages that hold poison and held none, or the other way round.
    pub pages: Vec<Range<u64>>,
}

impl Default for PoisonMap {
    fn default() -> Self {
        Self::new(PAGE_SIZE)
    }
}

/// Rounds `range` outward to whole units of `unit` bytes.
pub fn round_out(range: Range<u64>, unit: u64) -> Range<u64> {
    let end = range.end.saturating_add(unit - 1);
    range.start - range.start % unit..end - end % unit
}

/// The whole lines within `range`; an empty range if there is none.
pub fn round_in(range: Range<u64>) -> Range<u64> {
    let start = range.start.next_multiple_of(LINE_SIZE);
    start..(range.end - range.end % LINE_SIZE).max(start)
}

impl PoisonMap {
    /// No poison, in a region whose pages can be guarded in units of `unit` bytes.
    pub fn new(unit: u64) -> Self {
        Self { lines: RangeSet::default(), pages: RangeSet::default(), unit }
    }

    /// Poisons every line that `ranges` touch.
    pub fn add(&mut self, ranges: impl IntoIterator<Item = Range<u64>>) -> PoisonChange {
        let lines: RangeSet = ranges.into_iter().map(|range| round_out(range, LINE_SIZE)).collect();
        let pages = self.pages_of(lines.iter());
        let change = PoisonChange {
            lines: lines.difference(&self.lines).collect(),
            pages: pages.difference(&self.pages).collect(),
        };
        self.lines.extend(lines.iter());
        self.pages.extend(pages.iter());
        change
    }

    /// Cleans every line that lies wholly in one of `ranges`.
    ///
    /// A line of which only a part is named stays as it is: its other bytes are still lost.
    pub fn clear(&mut self, ranges: impl IntoIterator<Item = Range<u64>>) -> PoisonChange {
        let asked: RangeSet = ranges.into_iter().map(round_in).collect();
        let lines: Vec<_> = asked.iter().flat_map(|range| self.lines.within(range)).collect();
        self.lines.remove_all(&lines);
        let touched = self.pages_of(lines.iter().cloned());
        let still = self.pages_of(touched.iter().flat_map(|pages| self.lines.within(pages)));
        let pages: Vec<_> = touched.difference(&still).collect();
        self.pages.remove_all(&pages);
        PoisonChange { lines, pages }
    }

    fn pages_of(&self, lines: impl Iterator<Item = Range<u64>>) -> RangeSet {
        lines.map(|lines| round_out(lines, self.unit)).collect()
    }

    /// The poisoned bytes within `range`, merged and in order.
    pub fn within(&self, range: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
        self.lines.within(range)
    }

    /// All poisoned bytes, merged and in order.
    pub fn iter(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.lines.iter()
    }

    /// Offset of the first poisoned line that `range` touches.
    pub fn first_in(&self, range: Range<u64>) -> Option<u64> {
        self.lines.within(range).next().map(|r| r.start - r.start % LINE_SIZE)
    }

    /// The pages that hold a poisoned line.
    pub fn pages(&self) -> &RangeSet {
        &self.pages
    }

    /// Number of pages of [`PAGE_SIZE`] bytes that hold a poisoned line.
    pub fn page_count(&self) -> u64 {
        let mut end = 0;
        let mut count = 0;
        for range in self.lines.iter() {
            let pages = round_out(range, PAGE_SIZE);
            count += pages.end.saturating_sub(pages.start.max(end)) / PAGE_SIZE;
            end = pages.end;
        }
        count
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
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[test]
    fn a_touched_line_is_poisoned_whole() {
        let mut map = PoisonMap::default();
        let change = map.add([0x1241..0x1242]);
        assert_eq!(change, PoisonChange { lines: vec![0x1240..0x1280], pages: vec![0x1000..0x2000] });
        assert_eq!(map.add([0x1240..0x1280]), PoisonChange::default(), "it was poisoned already");
        assert_eq!(map.first_in(0x1000..0x2000), Some(0x1240));
        assert_eq!(map.first_in(0x1270..0x1271), Some(0x1240));
        assert_eq!(map.first_in(0x1280..0x2000), None);
        assert_eq!(map.pages().iter().collect::<Vec<_>>(), vec![0x1000..0x2000]);
        assert_eq!((map.len(), map.page_count()), (1, 1));
    }

    #[test]
    fn a_line_is_cleared_only_whole() {
        let mut map = PoisonMap::default();
        map.add([0..256]);
        let change = map.clear([65..191]);
        assert_eq!(change.lines, vec![], "no line lies wholly in 65..191 but 128..191 is short of one");
        assert_eq!(map.clear([64..192]), PoisonChange { lines: vec![64..192], pages: vec![] });
        assert_eq!(map.within(0..256).collect::<Vec<_>>(), vec![0..64, 192..256]);
        assert!(map.pages().intersects(0..1) && !map.pages().intersects(PAGE_SIZE..PAGE_SIZE + 1));
    }

    proptest! {
        #[test]
        fn pages_are_those_of_the_lines_and_changes_say_what_changed(
            steps in prop::collection::vec((any::<bool>(), prop::collection::vec((0u64..80, 0u64..40), 1..4)), 1..40),
            large in any::<bool>(),
        ) {
            // Four lines to a page keep the numbers small.
            const UNIT: u64 = 4 * LINE_SIZE;
            let unit = if large { 2 * UNIT } else { UNIT };
            let mut map = PoisonMap::new(unit);
            let mut model = BTreeSet::new();
            let pages_of = |lines: &BTreeSet<u64>| {
                lines.iter().map(|line| line * LINE_SIZE / unit).collect::<BTreeSet<_>>()
            };
            let flat = |ranges: &[Range<u64>], unit: u64| {
                let all: Vec<_> = ranges.iter().flat_map(|r| (r.start / unit)..(r.end / unit)).collect();
                let set: BTreeSet<_> = all.iter().copied().collect();
                assert_eq!(set.len(), all.len(), "nothing is said twice");
                set
            };
            for (add, lines) in steps {
                let before = model.clone();
                let ranges: Vec<_> = lines.iter().map(|(l, n)| l * LINE_SIZE..(l + n) * LINE_SIZE).collect();
                for (line, count) in lines {
                    for line in line..line + count {
                        if add { model.insert(line); } else { model.remove(&line); }
                    }
                }
                let change = if add { map.add(ranges) } else { map.clear(ranges) };
                let (more, less) = if add { (&model, &before) } else { (&before, &model) };
                prop_assert_eq!(flat(&change.lines, LINE_SIZE), more.difference(less).copied().collect());
                prop_assert_eq!(
                    flat(&change.pages, unit),
                    pages_of(more).difference(&pages_of(less)).copied().collect()
                );
                let pages: Vec<_> = map.pages().iter().collect();
                prop_assert_eq!(flat(&pages, unit), pages_of(&model));
                prop_assert_eq!(map.len(), model.len() as u64);
                let small = model.iter().map(|line| line * LINE_SIZE / PAGE_SIZE).collect::<BTreeSet<_>>();
                prop_assert_eq!(map.page_count(), small.len() as u64);
            }
        }
    }
}
