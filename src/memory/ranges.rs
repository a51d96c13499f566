//! A set of byte ranges, kept merged.

use std::collections::BTreeMap;
use std::ops::Range;

/// A set of `u64`, stored as disjoint, non-adjacent half-open ranges.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RangeSet {
    ranges: BTreeMap<u64, u64>,
    total: u64,
}

/// A change of at least one in so many of the ranges of a set makes the set anew, in one go.
const FEW: usize = 16;

/// `ranges` in order, merged.
fn merged(ranges: impl IntoIterator<Item = Range<u64>>) -> Vec<Range<u64>> {
    let mut all: Vec<_> = ranges.into_iter().filter(|range| !range.is_empty()).collect();
    // A stable sort finds the runs that are in order already.
    all.sort_by_key(|range| range.start);
    all.dedup_by(|next, last| {
        let joined = next.start <= last.end;
        if joined {
            last.end = last.end.max(next.end);
        }
        joined
    });
    all
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
            self.total -= e - s;
            start = start.min(s);
            end = end.max(e);
        }
        self.ranges.insert(start, end);
        self.total += end - start;
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
            self.total -= e.min(range.end) - s.max(range.start);
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
        self.total
    }

    /// The parts of `range` that are not in the set, in order.
    pub fn missing(&self, range: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
        let end = range.end;
        let mut at = range.start;
        let ends = std::iter::once(end..end);
        self.within(range).chain(ends).filter_map(move |next| {
            let gap = at..next.start;
            at = next.end;
            (!gap.is_empty()).then_some(gap)
        })
    }

    /// What is in this set and not in `other`, in order.
    pub fn difference<'a>(&'a self, other: &'a Self) -> impl Iterator<Item = Range<u64>> + 'a {
        self.iter().flat_map(|range| other.missing(range))
    }

    /// Takes all of `ranges` out.
    pub fn remove_all(&mut self, ranges: &[Range<u64>]) {
        if ranges.len() < self.count() / FEW {
            ranges.iter().for_each(|range| self.remove(range.clone()));
        } else {
            let gone: Self = ranges.iter().cloned().collect();
            *self = self.difference(&gone).collect();
        }
    }

    /// Whether the set holds all of `range`.
    pub fn covers(&self, range: Range<u64>) -> bool {
        self.missing(range).next().is_none()
    }

    /// Whether nothing is in the set.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }
}

impl Extend<Range<u64>> for RangeSet {
    fn extend<I: IntoIterator<Item = Range<u64>>>(&mut self, ranges: I) {
        let fresh = merged(ranges);
        if fresh.len() < self.count() / FEW {
            fresh.into_iter().for_each(|range| self.insert(range));
        } else {
            let all = merged(self.iter().chain(fresh));
            self.total = all.iter().map(|range| range.end - range.start).sum();
            self.ranges = all.into_iter().map(|range| (range.start, range.end)).collect();
        }
    }
}

impl FromIterator<Range<u64>> for RangeSet {
    fn from_iter<I: IntoIterator<Item = Range<u64>>>(ranges: I) -> Self {
        let mut set = Self::default();
        set.extend(ranges);
        set
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
            prop_assert_eq!(set.intersects(range.clone()), !expected.is_empty());
            prop_assert_eq!(set.covers(range.clone()), expected.len() as u64 == probe.1);
            let missing: Vec<_> = range.clone().filter(|n| !model.contains(n)).collect();
            prop_assert_eq!(set.missing(range).flatten().collect::<Vec<_>>(), missing);
        }

        #[test]
        fn many_at_a_time_are_as_one_after_the_other(
            steps in prop::collection::vec((any::<bool>(), prop::collection::vec((0u64..600, 0u64..9), 0..40)), 1..8),
        ) {
            let mut set = RangeSet::default();
            let mut one = RangeSet::default();
            for (add, ranges) in steps {
                let ranges: Vec<_> = ranges.iter().map(|(start, len)| *start..start + len).collect();
                if add {
                    set.extend(ranges.iter().cloned());
                    ranges.into_iter().for_each(|range| one.insert(range));
                } else {
                    set.remove_all(&ranges);
                    ranges.into_iter().for_each(|range| one.remove(range));
                }
                prop_assert_eq!(&set, &one);
            }
        }

        #[test]
        fn a_difference_is_what_only_the_first_set_has(
            first in prop::collection::vec((0u64..64, 0u64..9), 0..20),
            second in prop::collection::vec((0u64..64, 0u64..9), 0..20),
        ) {
            let set = |ranges: &[(u64, u64)]| ranges.iter().map(|(s, l)| *s..s + l).collect::<RangeSet>();
            let numbers = |set: &RangeSet| set.iter().flatten().collect::<BTreeSet<_>>();
            let (first, second) = (set(&first), set(&second));
            let expected: Vec<_> = numbers(&first).difference(&numbers(&second)).copied().collect();
            prop_assert_eq!(first.difference(&second).flatten().collect::<Vec<_>>(), expected);
        }
    }
}
