//! Tests of the guards against a naive model, and of both means on this host.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::AsRawFd;

use proptest::prelude::*;

use super::*;
use crate::memory::PAGE_SIZE;

const PAGES: u64 = 96;

fn map(pages: u64) -> GuestMap {
    let file = crate::memory::backing::anonymous(c"guards", pages * PAGE_SIZE).unwrap();
    GuestMap::new(&file, 0, pages * PAGE_SIZE, 0, true).unwrap()
}

fn bytes(pages: Range<u64>) -> Range<u64> {
    pages.start * PAGE_SIZE..pages.end * PAGE_SIZE
}

/// Whether the kernel can read each page of the map: what KVM meets.
fn open_pages(map: &GuestMap, sink: &File) -> BTreeSet<u64> {
    (0..map.len() / PAGE_SIZE)
        .filter(|page| {
            let address = map.host_address() + page * PAGE_SIZE;
            // SAFETY: write(2) reports EFAULT for memory it cannot read; nothing is dereferenced here.
            let count = unsafe { libc::pwrite(sink.as_raw_fd(), address as *const libc::c_void, 1, 0) };
            count == 1
        })
        .collect()
}

fn numbers(pages: &RangeSet) -> BTreeSet<u64> {
    pages.iter().flat_map(|r| r.start / PAGE_SIZE..r.end / PAGE_SIZE).collect()
}

/// What the guards should be, found by filling one smallest gap after the other.
fn naive_cover(poisoned: &BTreeSet<u64>, limit: usize) -> BTreeSet<u64> {
    let mut cover = poisoned.clone();
    loop {
        let all: Vec<u64> = cover.iter().copied().collect();
        let gaps: Vec<(u64, u64)> =
            all.windows(2).filter(|w| w[1] > w[0] + 1).map(|w| (w[1] - w[0], w[0] + 1)).collect();
        if gaps.len() < limit {
            return cover;
        }
        let (size, start) = *gaps.iter().min().unwrap();
        cover.extend(start..start + size - 1);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn guards_cover_poison_keep_the_limit_and_go_with_it(
        limit in 1usize..6,
        markers in any::<bool>(),
        steps in prop::collection::vec((any::<bool>(), prop::collection::vec((0..PAGES, 1u64..6), 1..4)), 1..14),
    ) {
        let map = map(PAGES);
        let sink = tempfile::tempfile().unwrap();
        let mut guards = Guards { marks: markers, ..Guards::default() };
        let mut poisoned = RangeSet::default();
        for (add, runs) in steps {
            let runs: Vec<_> = runs.iter().map(|(s, n)| bytes(*s..(s + n).min(PAGES))).collect();
            let mut changed = RangeSet::default();
            for run in runs {
                if add { changed.extend(poisoned.missing(run)); } else { changed.extend(poisoned.within(run)); }
            }
            let changed: Vec<_> = changed.iter().collect();
            for run in &changed {
                if add { poisoned.insert(run.clone()) } else { poisoned.remove(run.clone()) }
            }
            if add {
                guards.grow(&map, &poisoned, &changed, limit).map_err(|e| TestCaseError::fail(format!("{e:?}")))?;
            } else {
                let before = numbers(guards.pages());
                let opened: RangeSet = guards.shrink(&map, &poisoned, &changed, limit).into_iter().collect();
                let after = numbers(guards.pages());
                prop_assert_eq!(numbers(&opened), before.difference(&after).copied().collect::<BTreeSet<_>>());
            }
            let guarded = numbers(guards.pages());
            let bad = numbers(&poisoned);
            prop_assert!(guarded.is_superset(&bad));
            prop_assert!(guards.runs() <= limit, "{} runs", guards.runs());
            match guards.method() {
                GuardMethod::Merged => prop_assert_eq!(&guarded, &naive_cover(&bad, limit)),
                GuardMethod::Protection | GuardMethod::Markers => prop_assert_eq!(&guarded, &bad),
            }
            prop_assert!(markers || guards.method() != GuardMethod::Markers);
            let open = open_pages(&map, &sink);
            prop_assert_eq!(open, (0..PAGES).filter(|page| !guarded.contains(page)).collect::<BTreeSet<_>>());
        }
        let all: Vec<_> = poisoned.iter().collect();
        guards.shrink(&map, &RangeSet::default(), &all, limit);
        prop_assert!(guards.pages().is_empty());
        prop_assert_eq!(guards.method(), GuardMethod::Protection);
        prop_assert_eq!(open_pages(&map, &sink).len() as u64, PAGES);
    }
}

#[test]
fn the_smallest_gaps_are_filled_and_large_ones_never() {
    let far = 8 * MOST_GAP;
    let wanted: RangeSet = [0..1, 10..11, 13..14, far..far + 1].into_iter().collect();
    assert_eq!(cover(&wanted, 4, MOST_GAP).unwrap(), wanted);
    let merged = cover(&wanted, 3, MOST_GAP).unwrap();
    assert_eq!(merged.iter().collect::<Vec<_>>(), vec![0..1, 10..14, far..far + 1]);
    assert_eq!(cover(&wanted, 2, MOST_GAP).unwrap().iter().collect::<Vec<_>>(), vec![0..14, far..far + 1]);
    assert_eq!(cover(&wanted, 1, MOST_GAP).unwrap_err(), TooScattered { wanted: 2, limit: 1 });
}

#[test]
fn a_refused_growth_changes_nothing() {
    let large = 4 * MOST_GAP / PAGE_SIZE;
    let map = map(large);
    let mut guards = Guards { marks: false, ..Guards::default() };
    let first: RangeSet = [bytes(0..1)].into_iter().collect();
    guards.grow(&map, &first, &[bytes(0..1)], 1).unwrap();
    let both: RangeSet = [bytes(0..1), bytes(large - 1..large)].into_iter().collect();
    let error = guards.grow(&map, &both, &[bytes(large - 1..large)], 1).unwrap_err();
    assert!(matches!(error, GrowError::TooScattered(TooScattered { wanted: 2, limit: 1 })), "{error:?}");
    assert_eq!(guards.pages(), &first);
    let sink = tempfile::tempfile().unwrap();
    assert_eq!(open_pages(&map, &sink).len() as u64, large - 1);
}
