//! Which pages of a map trap, and by what means.
//!
//! A *protected* page (mprotect) costs the monitor's address space up to two maps for each run of pages, of which the
//! host allows so many (vm.max_map_count), and nothing else. A *marked* page (MADV_GUARD_INSTALL, of files since Linux
//! 6.15) costs no map, but the page table that holds the mark: up to 4 KiB for each 2 MiB that has one. So pages are
//! protected while there are maps enough, marked beyond where the host can, and where it cannot, runs merge across the
//! smallest gaps between them: the clean pages there trap too, and are let through.

use std::ops::Range;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::poison::round_out;
use super::{GuestMap, LARGE, MapError, RangeSet};

/// The largest gap that is guarded for want of maps: with larger ones, most of what traps would be clean.
pub const MOST_GAP: u64 = 2 << 20;

/// By what means pages trap.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum GuardMethod {
    /// Protection: exactly the pages that hold poison.
    Protection,
    /// Protection, and clean pages in between, for want of maps.
    Merged,
    /// Marks in page tables: exactly the pages that hold poison.
    Markers,
}

/// Poison that is too scattered for this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooScattered {
    /// Runs of pages that would have to be guarded, after merging all that may be.
    pub wanted: usize,
    /// Runs that can be.
    pub limit: usize,
}

/// The guards of one map.
#[derive(Debug)]
pub struct Guards {
    pages: RangeSet,
    method: GuardMethod,
    /// Whether this host may be able to mark pages: until it refuses.
    marks: bool,
}

impl Default for Guards {
    fn default() -> Self {
        Self { pages: RangeSet::default(), method: GuardMethod::Protection, marks: true }
    }
}

impl Guards {
    /// The pages that trap.
    pub fn pages(&self) -> &RangeSet {
        &self.pages
    }

    /// By what means they do.
    pub fn method(&self) -> GuardMethod {
        self.method
    }

    /// Whether any of `pages` is out of reach by protection.
    pub fn protects(&self, pages: &Range<u64>) -> bool {
        self.method != GuardMethod::Markers && self.pages.intersects(pages.clone())
    }

    /// Runs of pages that cost maps.
    pub fn runs(&self) -> usize {
        if self.method == GuardMethod::Markers { 0 } else { self.pages.count() }
    }

    /// The parts of `blocks`, whole large blocks, that consist of blocks without a page that traps.
    pub fn free_blocks(&self, blocks: &RangeSet) -> RangeSet {
        let mut free = blocks.clone();
        for run in blocks.iter() {
            for pages in self.pages.within(run.clone()) {
                let from_run = pages.start - run.start..pages.end - run.start;
                let busy = round_out(from_run, LARGE);
                free.remove(run.start + busy.start..run.start + busy.end);
            }
        }
        free
    }

    /// Makes `pages` of `map` trap, by the means that all guards of it have.
    pub fn shut(&self, map: &GuestMap, pages: Range<u64>) -> Result<(), MapError> {
        match self.method {
            GuardMethod::Markers => map.mark(pages),
            GuardMethod::Protection | GuardMethod::Merged => map.shut(pages),
        }
    }

    /// Undoes [`Self::shut`].
    pub fn open(&self, map: &GuestMap, pages: Range<u64>) -> Result<(), MapError> {
        match self.method {
            GuardMethod::Markers => map.unmark(pages),
            GuardMethod::Protection | GuardMethod::Merged => map.open(pages),
        }
    }

    /// Guards all of `poisoned`, to which `fresh` have just come, with at most `limit` runs that cost maps.
    ///
    /// # Errors
    /// Too scattered, or the host refuses: nothing was changed.
    pub fn grow(
        &mut self,
        map: &GuestMap,
        poisoned: &RangeSet,
        fresh: &[Range<u64>],
        limit: usize,
    ) -> Result<(), GrowError> {
        let exact = match self.method {
            GuardMethod::Markers => true,
            GuardMethod::Protection => poisoned.count() <= limit,
            GuardMethod::Merged => false,
        };
        if exact {
            return Ok(self.shut_all(map, fresh)?);
        }
        if self.method == GuardMethod::Protection && self.marks && self.mark_instead(map, poisoned)? {
            return Ok(());
        }
        // Guards come before others go: at no time is poison open, and at no time are there more runs than before or
        // after, since each of one side meets one of the other.
        let target = cover(poisoned, limit, MOST_GAP)?;
        let fresh: Vec<_> = target.difference(&self.pages).collect();
        self.shut_all(map, &fresh)?;
        let gone: Vec<_> = self.pages.difference(&target).collect();
        for pages in gone {
            self.open_for_good(map, &pages);
        }
        self.settle(poisoned);
        Ok(())
    }

    /// Guards no more than `poisoned`, from which `gone` have just gone, unless `limit` asks for it: what is cleared in
    /// the middle of a run makes two of it. What the host does not open stays guarded. Returns the pages that trap no
    /// more.
    pub fn shrink(
        &mut self,
        map: &GuestMap,
        poisoned: &RangeSet,
        gone: &[Range<u64>],
        limit: usize,
    ) -> Vec<Range<u64>> {
        let exact = match self.method {
            GuardMethod::Markers => true,
            GuardMethod::Protection => poisoned.count() <= limit,
            GuardMethod::Merged => false,
        };
        let gone = if exact {
            gone.to_vec()
        } else {
            // Gaps of any size may be filled here, so that this cannot fail.
            let target = cover(poisoned, limit.max(1), u64::MAX).unwrap_or_else(|_| self.pages.clone());
            let fresh: Vec<_> = target.difference(&self.pages).collect();
            if let Err(error) = self.shut_all(map, &fresh) {
                tracing::warn!(%error, "clean pages stay guarded");
                return Vec::new();
            }
            self.pages.difference(&target).collect()
        };
        let opened = gone.into_iter().filter(|pages| self.open_for_good(map, pages)).collect();
        self.settle(poisoned);
        opened
    }

    fn open_for_good(&mut self, map: &GuestMap, pages: &Range<u64>) -> bool {
        match self.open(map, pages.clone()) {
            Ok(()) => self.pages.remove(pages.clone()),
            Err(error) => {
                tracing::warn!(%error, "clean pages stay guarded");
                return false;
            }
        }
        true
    }

    /// Names the method anew after a change: there is no merging where nothing clean is guarded, and no mark on nothing.
    fn settle(&mut self, poisoned: &RangeSet) {
        self.method = match self.method {
            GuardMethod::Markers if !self.pages.is_empty() => GuardMethod::Markers,
            _ if self.pages == *poisoned => GuardMethod::Protection,
            _ => GuardMethod::Merged,
        };
    }

    fn shut_all(&mut self, map: &GuestMap, fresh: &[Range<u64>]) -> Result<(), MapError> {
        for (index, pages) in fresh.iter().enumerate() {
            if let Err(error) = self.shut(map, pages.clone()) {
                for undone in &fresh[..=index] {
                    if let Err(error) = self.open(map, undone.clone()) {
                        tracing::warn!(%error, "clean pages stay guarded");
                    }
                }
                return Err(error);
            }
        }
        self.pages.extend(fresh.iter().cloned());
        Ok(())
    }

    /// Marks all of `poisoned` and takes the protection away, if this map can be marked.
    fn mark_instead(&mut self, map: &GuestMap, poisoned: &RangeSet) -> Result<bool, MapError> {
        for (index, pages) in poisoned.iter().enumerate() {
            if let Err(error) = map.mark(pages.clone()) {
                poisoned.iter().take(index).try_for_each(|marked| map.unmark(marked))?;
                // A kernel, or a kind of file, without marks: the first one shows it.
                self.marks = index > 0;
                return if self.marks { Err(error) } else { Ok(false) };
            }
        }
        for pages in self.pages.iter() {
            if let Err(error) = map.open(pages) {
                tracing::warn!(%error, "marked pages stay protected too");
            }
        }
        self.pages = poisoned.clone();
        self.method = GuardMethod::Markers;
        Ok(true)
    }
}

/// Why guards could not grow.
#[derive(Debug)]
pub enum GrowError {
    /// Too scattered for the limit.
    TooScattered(TooScattered),
    /// The host refused.
    Map(MapError),
}

impl From<TooScattered> for GrowError {
    fn from(error: TooScattered) -> Self {
        Self::TooScattered(error)
    }
}

impl From<MapError> for GrowError {
    fn from(error: MapError) -> Self {
        Self::Map(error)
    }
}

/// The smallest set that holds `wanted` and has at most `limit` ranges: the smallest gaps are filled, of equal ones the
/// first, and none larger than `most_gap` bytes.
fn cover(wanted: &RangeSet, limit: usize, most_gap: u64) -> Result<RangeSet, TooScattered> {
    let excess = wanted.count().saturating_sub(limit);
    if excess == 0 {
        return Ok(wanted.clone());
    }
    let mut gaps: Vec<(u64, u64)> = wanted
        .iter()
        .zip(wanted.iter().skip(1))
        .map(|(before, after)| (after.start - before.end, before.end))
        .filter(|(size, _)| *size <= most_gap)
        .collect();
    if excess > gaps.len() {
        return Err(TooScattered { wanted: wanted.count() - gaps.len(), limit });
    }
    gaps.select_nth_unstable(excess - 1);
    let mut cover = wanted.clone();
    cover.extend(gaps[..excess].iter().map(|(size, start)| *start..start + size));
    Ok(cover)
}

#[cfg(test)]
#[path = "guard_test.rs"]
mod tests;
