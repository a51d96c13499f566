//! The poison of a region, and the pages that trap for it.

use std::ops::Range;
use std::sync::{Arc, PoisonError, RwLockReadGuard};

use super::super::guard::GuardMethod;
use super::super::poison::round_out;
use super::super::{LARGE, MapError, PAGE_SIZE, PoisonKeeper, PoisonPolicy, RangeSet, StaleAnswer};
use super::{GuardError, Region, State};

/// What of a region is guarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuardState {
    /// By what means.
    pub method: GuardMethod,
    /// Runs of pages that cost the host maps.
    pub runs: usize,
    /// Pages of [`PAGE_SIZE`] bytes that trap.
    pub pages: u64,
    /// Those of them in which nothing is poisoned.
    pub clean_pages: u64,
}

impl Region {
    /// Writes every change of poison down with `keeper` from now on.
    pub fn keep_with(&self, keeper: Arc<dyn PoisonKeeper>) {
        self.state().keeper = Some(keeper);
    }

    /// Poisons every line that `ranges` (offsets) touch, and guards their pages; all or nothing. Returns the lines that
    /// were not poisoned before.
    ///
    /// The guards may cost the host at most `limit` separate runs of pages. The caller holds the baton, or no vCPU
    /// has run yet.
    pub fn poison(&self, ranges: &[Range<u64>], limit: usize) -> Result<Vec<Range<u64>>, GuardError> {
        ranges.iter().try_for_each(|range| self.check(range))?;
        let _no_transfer = self.transfers.write().unwrap_or_else(PoisonError::into_inner);
        let mut state = self.present()?;
        let state = &mut *state;
        state.limit = limit;
        let change = state.poison.add(ranges.iter().cloned());
        if change.lines.is_empty() {
            return Ok(change.lines);
        }
        let grown = match state.keep(&self.name) {
            Ok(()) => {
                let grown = state.guards.grow(&state.map, state.poison.pages(), &change.pages, limit);
                grown.map_err(GuardError::from)
            }
            Err(error) => Err(error),
        };
        if let Err(error) = grown {
            state.poison.clear(change.lines);
            if let Err(error) = state.keep(&self.name) {
                tracing::error!(%error, "poison that was refused may come back with the next machine");
            }
            return Err(error);
        }
        Ok(change.lines)
    }

    /// Cleans every line that lies wholly in one of `ranges` (offsets), opens pages that need not be guarded any more,
    /// and returns the bytes that were poisoned.
    pub fn clean(&self, ranges: &[Range<u64>]) -> Result<Vec<Range<u64>>, GuardError> {
        ranges.iter().try_for_each(|range| self.check(range))?;
        let mut state = self.present()?;
        let state = &mut *state;
        let change = state.poison.clear(ranges.iter().cloned());
        if change.lines.is_empty() {
            return Ok(change.lines);
        }
        if let Err(error) = state.keep(&self.name) {
            state.poison.add(change.lines);
            return Err(error);
        }
        let opened = state.guards.shrink(&state.map, state.poison.pages(), &change.pages, state.limit);
        // Huge pages are never mapped by smaller ones.
        if self.unit == PAGE_SIZE {
            self.map_large_again(state, &opened);
        }
        Ok(change.lines)
    }

    /// Maps the large blocks anew in which no page is guarded since `opened` are not.
    fn map_large_again(&self, state: &State, opened: &[Range<u64>]) {
        for free in state.guards.free_blocks(&whole_blocks(opened, self.gpa, self.len)).iter() {
            if let Err(error) = state.map.renew(free) {
                tracing::warn!(%error, device = self.name, "memory stays mapped by small pages");
            }
        }
    }

    /// What its poison does to processors.
    pub fn policy(&self) -> PoisonPolicy {
        self.state().policy
    }

    /// Changes what its poison does.
    pub fn set_policy(&self, policy: PoisonPolicy) {
        self.state().policy = policy;
    }

    /// What a processor gets that touches it once it has departed.
    pub fn stale_answer(&self) -> StaleAnswer {
        self.state().stale
    }

    /// Changes what a processor gets that touches it once it has departed.
    pub fn set_stale_answer(&self, answer: StaleAnswer) {
        self.state().stale = answer;
    }

    /// Lets nothing of the region become poisoned, or depart, while what is returned lives. Whoever wants to waits, so
    /// it must not live for longer than it takes to move some bytes.
    pub fn hold_poison(&self) -> RwLockReadGuard<'_, ()> {
        self.transfers.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is guarded, and how.
    pub fn guard_state(&self) -> GuardState {
        let state = self.state();
        let guarded = state.guards.pages().total() / PAGE_SIZE;
        GuardState {
            method: state.guards.method(),
            runs: state.guards.runs(),
            pages: guarded,
            clean_pages: guarded.saturating_sub(state.poison.page_count()),
        }
    }

    /// The poisoned bytes within `range` (offsets), merged and in order, at most `most` runs.
    pub fn poisoned(&self, range: Range<u64>, most: usize) -> Vec<Range<u64>> {
        self.state().poison.within(range).take(most).collect()
    }

    /// Offset of the first poisoned line that `range` (offsets) touches.
    pub fn first_poison(&self, range: Range<u64>) -> Option<u64> {
        self.state().poison.first_in(range)
    }

    /// Number of poisoned lines.
    pub fn poisoned_lines(&self) -> u64 {
        self.state().poison.len()
    }

    /// Whether the page at offset `page` traps.
    pub fn guards(&self, page: u64) -> bool {
        let state = self.state();
        state.absent() || state.guards.pages().intersects(page..page + PAGE_SIZE)
    }

    /// Lets the guest reach the guarded page at offset `page`: its data, or ones where nothing answers.
    ///
    /// The caller holds the baton: no vCPU runs but the one that is about to step.
    pub fn open_page(&self, page: u64) -> Result<(), MapError> {
        let state = self.state();
        if state.absent() {
            state.map.fill_with_ones(page)
        } else {
            state.guards.open(&state.map, round_out(page..page + 1, self.unit))
        }
    }

    /// Undoes [`Self::open_page`], unless the page was cleaned meanwhile.
    pub fn shut_page(&self, page: u64) -> Result<(), MapError> {
        let state = self.state();
        if state.absent() {
            state.map.forget(page)
        } else if state.guards.pages().intersects(page..page + PAGE_SIZE) {
            state.guards.shut(&state.map, round_out(page..page + 1, self.unit))
        } else {
            Ok(())
        }
    }

    /// Puts the page at offset `page` out of the guest's reach for a moment, poisoned or not.
    ///
    /// The caller holds the baton, and undoes it by [`Self::restore_page`].
    pub fn hide_page(&self, page: u64) -> Result<(), MapError> {
        self.state().map.shut(round_out(page..page + 1, self.unit))
    }

    /// Undoes [`Self::hide_page`].
    pub fn restore_page(&self, page: u64) -> Result<(), MapError> {
        let state = self.state();
        let pages = round_out(page..page + 1, self.unit);
        if state.absent() || state.guards.protects(&pages) { Ok(()) } else { state.map.open(pages) }
    }
}

/// The blocks of [`LARGE`] bytes of guest-physical memory that `pages` (offsets in a region at `gpa` with `len` bytes)
/// touch and that lie wholly in the region, by offset.
pub(super) fn whole_blocks(pages: &[Range<u64>], gpa: u64, len: u64) -> RangeSet {
    let first = gpa.next_multiple_of(LARGE) - gpa;
    let end = ((gpa + len) / LARGE * LARGE).saturating_sub(gpa);
    pages
        .iter()
        .map(|pages| round_out(gpa + pages.start..gpa + pages.end, LARGE))
        .map(|blocks| blocks.start.saturating_sub(gpa).max(first)..(blocks.end - gpa).min(end))
        .filter(|blocks| blocks.start < blocks.end)
        .collect()
}
