//! A set of byte ranges, kept merged.

use std::collections::BTreeMap;
use std::ops::Range;

/// A set of `u64`, stored as disjoint, non-adjacent half-open ranges.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RangeSet {
    ranges: BTreeMap<u64, u64>,
}

impl RangeSet {
    /// Adds `range`; an empty one changes nothing.
    pub fn insert(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let (mut start, mut end) = (range.start, range.end);
        while let Some((&s, &e)) = self.ranges.range(..=end).next_back() {
            if e < start {
                break;
            }
            self.ranges.remove(&s);
            start = start.min(s);
            end = end.max(e);
        }
        self.ranges.insert(start, end);
    }

    /// Takes `range` out.
    pub fn remove(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        while let Some((&s, &e)) = self.ranges.range(..range.end).next_back() {
            if e <= range.start {
                break;
            }
            self.ranges.remove(&s);
            if e > range.end {
                self.ranges.insert(range.end, e);
            }
            if s < range.start {
                self.ranges.insert(s, range.start);
                break;
            }
        }
    }

    /// The parts of the set within `range`, in order.
    pub fn within(&self, range: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
        let first = self.ranges.range(..=range.start).next_back().map_or(range.start, |(&s, _)| s);
        let (low, high) = (range.start, range.end);
        self.ranges
            .range(first..high.max(first))
            .map(move |(&s, &e)| s.max(low)..e.min(high))
            .filter(|r| !r.is_empty())
    }

    /// Whether any part of `range` is in the set.
    pub fn intersects(&self, range: Range<u64>) -> bool {
        self.within(range).next().is_some()
    }

    /// Number of separate ranges.
    pub fn count(&self) -> usize {
        self.ranges.len()
    }

    /// All ranges, in order.
    pub fn iter(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.ranges.iter().map(|(&s, &e)| s..e)
    }

    /// Sum of the lengths.
    pub fn total(&self) -> u64 {
        self.iter().map(|r| r.end - r.start).sum()
    }

    /// Whether nothing is in the set.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn behaves_like_a_set_of_numbers(
            steps in prop::collection::vec((any::<bool>(), 0u64..64, 0u64..20), 1..60),
            probe in (0u64..64, 0u64..20),
        ) {
            let mut set = RangeSet::default();
            let mut model = BTreeSet::new();
            for (add, start, len) in steps {
                for n in start..start + len {
                    if add { model.insert(n); } else { model.remove(&n); }
                }
                if add { set.insert(start..start + len) } else { set.remove(start..start + len) }
                prop_assert_eq!(set.iter().flatten().collect::<Vec<_>>(), model.iter().copied().collect::<Vec<_>>());
                let ranges: Vec<_> = set.iter().collect();
                prop_assert!(ranges.windows(2).all(|w| w[0].end < w[1].start), "merged and ordered");
                prop_assert_eq!(set.total(), model.len() as u64);
            }
            let range = probe.0..probe.0 + probe.1;
            let expected: Vec<_> = model.range(range.clone()).copied().collect();
            prop_assert_eq!(set.within(range.clone()).flatten().collect::<Vec<_>>(), expected.clone());
            prop_assert_eq!(set.intersects(range), !expected.is_empty());
        }
    }
}
