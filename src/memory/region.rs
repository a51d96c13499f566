//! One contiguous piece of guest memory: a file, its two maps, its poison.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};

use thiserror::Error;
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

use super::durable::{Durable, Loss, Survivors, WriteLog};
use super::guard::{GrowError, GuardMethod, Guards, TooScattered};
use super::host_fault::Watch;
use super::poison::round_out;
use super::{
    GuestMap, LARGE, MapError, PAGE_SIZE, PoisonKeeper, PoisonMap, PoisonPolicy, RangeSet, StaleAnswer,
    backing,
};

/// What a region is to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RegionKind {
    /// System RAM.
    Ram,
    /// Persistent memory behind an NFIT range.
    Pmem,
}

/// The part of a file that a region shows.
#[derive(Debug)]
pub struct Backing {
    /// The file; the only copy of the data.
    pub file: File,
    /// First byte, a multiple of [`PAGE_SIZE`].
    pub offset: u64,
    /// Whether the guest may write.
    pub writable: bool,
}

/// Why a guard could not be changed.
#[derive(Debug, Error)]
pub enum GuardError {
    /// The range does not lie in the region.
    #[error("Range {start:#x} to {end:#x} reaches beyond {name}, which has {len:#x} bytes")]
    OutOfRange {
        /// The region.
        name: String,
        /// First byte, as an offset.
        start: u64,
        /// End, as an offset.
        end: u64,
        /// Length of the region.
        len: u64,
    },
    /// Too many separate pages would be guarded.
    #[error("{wanted} separate runs of guarded pages are more than this host allows ({limit})")]
    TooScattered {
        /// Runs that would be guarded, after merging those that lie close to each other.
        wanted: usize,
        /// Runs that may be.
        limit: usize,
    },
    /// The change could not be written down.
    #[error("The poison of {name} could not be written down")]
    Keep {
        /// The region.
        name: String,
        /// The system's answer.
        source: io::Error,
    },
    /// The device is locked.
    #[error("{name} is locked; nothing of it can be poisoned or cleaned until its passphrase is given")]
    Locked {
        /// The region.
        name: String,
    },
    /// The device has departed.
    #[error("{name} has departed; nothing of it can be poisoned or cleaned")]
    Departed {
        /// The region.
        name: String,
    },
    /// The host refused.
    #[error(transparent)]
    Map(#[from] MapError),
}

impl From<GrowError> for GuardError {
    fn from(error: GrowError) -> Self {
        match error {
            GrowError::TooScattered(TooScattered { wanted, limit }) => Self::TooScattered { wanted, limit },
            GrowError::Map(error) => Self::Map(error),
        }
    }
}

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

#[derive(Debug)]
struct State {
    map: GuestMap,
    poison: PoisonMap,
    guards: Guards,
    /// Runs of pages that guards may cost, as of the last request.
    limit: usize,
    keeper: Option<Arc<dyn PoisonKeeper>>,
    policy: PoisonPolicy,
    stale: StaleAnswer,
    presence: Presence,
}

/// Whether the memory answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Presence {
    There,
    /// Until it is unlocked.
    Locked,
    /// For good.
    Departed,
}

impl State {
    fn absent(&self) -> bool {
        self.presence != Presence::There
    }

    fn keep(&self, name: &str) -> Result<(), GuardError> {
        let Some(keeper) = &self.keeper else { return Ok(()) };
        keeper.keep(&self.poison).map_err(|source| GuardError::Keep { name: name.to_owned(), source })
    }
}

/// A contiguous piece of guest memory.
#[derive(Debug)]
pub struct Region {
    /// Dropped before the maps.
    _watches: [Watch; 2],
    name: String,
    kind: RegionKind,
    gpa: u64,
    writable: bool,
    len: u64,
    /// Bytes of the smallest page of the backing, which is guarded whole.
    unit: u64,
    host_address: u64,
    alias: Arc<MmapRegion>,
    /// What is durable, if that is not all of it.
    durable: Option<Durable>,
    /// Read by transfers of devices, written by whoever poisons, or takes the memory away.
    transfers: RwLock<()>,
    state: Mutex<State>,
}

impl Region {
    /// Maps `len` bytes of `backing` for the guest at `gpa`.
    pub fn new(name: &str, kind: RegionKind, gpa: u64, len: u64, backing: Backing) -> Result<Self, MapError> {
        let unit = backing::smallest_page(&backing.file).map_err(|source| MapError::Map {
            len,
            offset: backing.offset,
            source,
        })?;
        let map = GuestMap::new(&backing.file, backing.offset, len, gpa, backing.writable)?;
        let prot = if backing.writable { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
        let alias = MmapRegion::build(
            Some(FileOffset::new(backing.file, backing.offset)),
            len as usize,
            prot,
            libc::MAP_SHARED | libc::MAP_NORESERVE,
        )
        .map_err(|e| MapError::Map {
            len,
            offset: backing.offset,
            source: match e {
                vm_memory::mmap::MmapRegionError::Mmap(e) => e,
                other => std::io::Error::other(other.to_string()),
            },
        })?;
        let host = map.host_address();
        let own = alias.as_ptr() as u64;
        Ok(Self {
            _watches: [Watch::new(host..host + len, false), Watch::new(own..own + len, true)],
            name: name.to_owned(),
            kind,
            gpa,
            writable: backing.writable,
            len,
            unit,
            host_address: host,
            alias: Arc::new(alias),
            durable: None,
            transfers: RwLock::new(()),
            state: Mutex::new(State {
                map,
                poison: PoisonMap::new(unit),
                guards: Guards::default(),
                limit: usize::MAX,
                keeper: None,
                policy: PoisonPolicy::default(),
                stale: StaleAnswer::default(),
                presence: Presence::There,
            }),
        })
    }

    /// The same region over the working copy of `durable`, which [`Backing::file`] is.
    pub fn with_durable(self, durable: Durable) -> Self {
        Self { durable: Some(durable), ..self }
    }

    /// Whether KVM is to log the pages that the guest writes; they are then asked for with [`Self::ask_for_writes`].
    pub fn logs_writes(&self) -> bool {
        self.durable.is_some()
    }

    /// Asks `log` for the pages that the guest has written.
    pub fn ask_for_writes(&self, log: Arc<dyn WriteLog>) {
        if let Some(durable) = &self.durable {
            durable.ask(log);
        }
    }

    /// Takes note that the monitor, or a device, has written `len` bytes at `offset` by the alias map.
    pub fn wrote(&self, offset: u64, len: u64) {
        if let Some(durable) = &self.durable {
            durable.wrote(offset, len);
        }
    }

    /// Lets the power go: what is lost, where only what is flushed is durable. No vCPU runs.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn cut(&self, survivors: Survivors) -> io::Result<Option<Loss>> {
        self.durable.as_ref().filter(|_| !self.departed()).map(|durable| durable.cut(survivors)).transpose()
    }

    /// Name in messages: the device's id, or `ram`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What the region is to the guest.
    pub fn kind(&self) -> RegionKind {
        self.kind
    }

    /// First guest-physical address.
    pub fn gpa(&self) -> u64 {
        self.gpa
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether the region has no bytes; it never has none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether the guest may write.
    pub fn writable(&self) -> bool {
        self.writable
    }

    /// The offset by which requests and events name `gpa`, an address of the region or its end: from the start
    /// of a device, and the address itself in RAM.
    pub fn named_offset(&self, gpa: u64) -> u64 {
        match self.kind {
            RegionKind::Ram => gpa,
            RegionKind::Pmem => gpa - self.gpa,
        }
    }

    /// Guest-physical range.
    pub fn range(&self) -> Range<u64> {
        self.gpa..self.gpa + self.len
    }

    /// Host address of the guest map, for the memslot.
    pub fn host_address(&self) -> u64 {
        self.host_address
    }

    /// The map that never traps, for the monitor and its devices.
    pub fn alias(&self) -> &Arc<MmapRegion> {
        &self.alias
    }

    /// The eight bytes at `offset`, whether poisoned or not: ones where nothing answers, none past the end.
    pub fn read_u64(&self, offset: u64) -> Option<u64> {
        if self.absent() {
            return offset.checked_add(8).filter(|end| *end <= self.len).map(|_| u64::MAX);
        }
        let slice = self.alias.get_slice(usize::try_from(offset).ok()?, 8).ok()?;
        let mut bytes = [0; 8];
        slice.copy_to(&mut bytes);
        Some(u64::from_le_bytes(bytes))
    }

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

    /// The offset of a host address, of either map.
    pub fn offset_of(&self, host: u64) -> Option<u64> {
        [self.host_address, self.alias.as_ptr() as u64]
            .into_iter()
            .filter_map(|base| host.checked_sub(base))
            .find(|offset| *offset < self.len)
    }

    /// Takes note that the host's memory under `pages` (offsets, page aligned) went bad: their content is lost and is
    /// poison, and good memory comes in their place. A file that lives in memory gets new pages, others are read again.
    ///
    /// The guards may cost as much as at the last request. The caller holds the baton.
    pub fn lose(&self, pages: Range<u64>) -> Result<(), GuardError> {
        self.check(&pages)?;
        let limit = self.present()?.limit;
        self.poison(std::slice::from_ref(&pages), limit)?;
        Ok(self.renew(pages)?)
    }

    fn renew(&self, pages: Range<u64>) -> Result<(), MapError> {
        let state = self.state();
        let Some(backing) = self.alias.file_offset().filter(|_| !state.absent()) else { return Ok(()) };
        if self.writable {
            forget(backing.file(), backing.start() + pages.start, pages.end - pages.start);
        }
        state.map.renew(pages.clone())?;
        for run in state.guards.pages().within(pages.clone()) {
            state.guards.shut(&state.map, run)?;
        }
        let len = pages.end - pages.start;
        let offset = backing.start() + pages.start;
        // SAFETY: the pages lie in the alias map, as those of the guest's map do, which has checked them; its bytes
        // are only accessed as volatile memory.
        let mapped = unsafe {
            libc::mmap(
                self.alias.as_ptr().add(pages.start as usize).cast(),
                len as usize,
                self.alias.prot(),
                libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_NORESERVE,
                backing.file().as_raw_fd(),
                offset as libc::off_t,
            )
        };
        if mapped == libc::MAP_FAILED {
            return Err(MapError::Map { len, offset, source: io::Error::last_os_error() });
        }
        Ok(())
    }

    /// The pages (offsets) that hold something; the others are zeroes. Whole pages, in order.
    pub fn data(&self) -> Vec<Range<u64>> {
        let Some(backing) = self.alias.file_offset() else { return vec![0..self.len] };
        let data = backing::data(backing.file(), backing.start(), self.len);
        data.into_iter().map(|range| round_out(range, PAGE_SIZE)).collect::<RangeSet>().iter().collect()
    }

    /// Bytes of the file below the region's end that are not there any more.
    pub fn missing(&self) -> u64 {
        let Some(backing) = self.alias.file_offset() else { return 0 };
        let there = backing.file().metadata().map_or(u64::MAX, |metadata| metadata.len());
        (backing.start() + self.len).saturating_sub(there).min(self.len)
    }

    /// The file, as the system names it.
    pub fn file_name(&self) -> String {
        let Some(backing) = self.alias.file_offset() else { return "no file".to_owned() };
        let link = format!("/proc/self/fd/{}", backing.file().as_raw_fd());
        std::fs::read_link(link).map_or_else(|_| "a file".to_owned(), |path| path.display().to_string())
    }

    /// Makes durable what the guest has changed, and waits for it. What has departed loses what was not flushed.
    pub fn flush(&self) -> io::Result<()> {
        match (&self.durable, self.alias.file_offset()) {
            (Some(_), _) if self.departed() => Ok(()),
            (Some(durable), _) => durable.flush(),
            (None, Some(file)) if self.writable => file.file().sync_data(),
            (None, _) => Ok(()),
        }
    }

    /// Takes the memory away: from now on every access traps, and finds ones. Transfers that have begun end first.
    pub fn depart(&self) -> Result<(), MapError> {
        let _no_transfer = self.transfers.write().unwrap_or_else(PoisonError::into_inner);
        let mut state = self.state();
        if state.presence != Presence::Departed {
            state.map.vanish()?;
            state.guards = Guards::default();
            state.presence = Presence::Departed;
        }
        Ok(())
    }

    /// Locks the memory, or unlocks it: while it is locked every access traps and finds ones, and poison stays what it
    /// is. Transfers that have begun end first. Whether that changed something.
    ///
    /// The caller holds the baton, or no vCPU has run yet.
    pub fn set_locked(&self, locked: bool) -> Result<bool, MapError> {
        let _no_transfer = self.transfers.write().unwrap_or_else(PoisonError::into_inner);
        let mut state = self.state();
        let state = &mut *state;
        match (state.presence, locked) {
            (Presence::There, true) => {
                state.map.cover()?;
                state.presence = Presence::Locked;
                Ok(true)
            }
            (Presence::Locked, false) => {
                state.map.uncover()?;
                for run in state.guards.pages().iter() {
                    state.guards.shut(&state.map, run)?;
                }
                state.presence = Presence::There;
                Ok(true)
            }
            _ => Ok(false),
        }
    }

    /// Whether the memory is locked.
    pub fn locked(&self) -> bool {
        self.state().presence == Presence::Locked
    }

    /// Whether nothing answers at its addresses: it is locked, or was taken away.
    pub fn absent(&self) -> bool {
        self.state().absent()
    }

    /// Whether the memory was taken away.
    pub fn departed(&self) -> bool {
        self.state().presence == Presence::Departed
    }

    /// The state, if the memory is there.
    fn present(&self) -> Result<MutexGuard<'_, State>, GuardError> {
        let state = self.state();
        let name = || self.name.clone();
        match state.presence {
            Presence::There => Ok(state),
            Presence::Locked => Err(GuardError::Locked { name: name() }),
            Presence::Departed => Err(GuardError::Departed { name: name() }),
        }
    }

    fn check(&self, range: &Range<u64>) -> Result<(), GuardError> {
        if range.start >= range.end || range.end > self.len {
            return Err(GuardError::OutOfRange {
                name: self.name.clone(),
                start: range.start,
                end: range.end,
                len: self.len,
            });
        }
        Ok(())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The blocks of [`LARGE`] bytes of guest-physical memory that `pages` (offsets in a region at `gpa` with `len` bytes)
/// touch and that lie wholly in the region, by offset.
fn whole_blocks(pages: &[Range<u64>], gpa: u64, len: u64) -> RangeSet {
    let first = gpa.next_multiple_of(LARGE) - gpa;
    let end = ((gpa + len) / LARGE * LARGE).saturating_sub(gpa);
    pages
        .iter()
        .map(|pages| round_out(gpa + pages.start..gpa + pages.end, LARGE))
        .map(|blocks| blocks.start.saturating_sub(gpa).max(first)..(blocks.end - gpa).min(end))
        .filter(|blocks| blocks.start < blocks.end)
        .collect()
}

/// Drops a part of a file that lives in memory: the next access finds new pages. Other files keep what they have on
/// their medium.
fn forget(file: &File, offset: u64, len: u64) {
    // SAFETY: an all-zero `statfs` is valid, the descriptor is open and the structure outlives the call.
    let kind = unsafe {
        let mut statfs: libc::statfs = std::mem::zeroed();
        (libc::fstatfs(file.as_raw_fd(), &raw mut statfs) == 0).then_some(statfs.f_type)
    };
    if !matches!(kind, Some(libc::TMPFS_MAGIC | libc::HUGETLBFS_MAGIC)) {
        return;
    }
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: takes numbers and an open descriptor only.
    if unsafe { libc::fallocate(file.as_raw_fd(), mode, offset as libc::off_t, len as libc::off_t) } != 0 {
        tracing::warn!(error = %io::Error::last_os_error(), "a bad page of a file in memory stays");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(len: u64) -> Region {
        let file = tempfile::tempfile().unwrap();
        file.set_len(len).unwrap();
        Region::new("p0", RegionKind::Pmem, 0x1_0000_0000, len, Backing { file, offset: 0, writable: true })
            .unwrap()
    }

    #[test]
    fn pages_are_guarded_while_a_line_in_them_is_poisoned() {
        let region = region(1 << 20);
        let fresh = region.poison(&[0x1240..0x1241, 0x1fc0..0x2040], 100).unwrap();
        assert_eq!(fresh, vec![0x1240..0x1280, 0x1fc0..0x2040]);
        assert_eq!(region.poison(&[0x1240..0x12c0], 100).unwrap(), vec![0x1280..0x12c0], "what is new");
        assert!(region.guards(0x1000) && region.guards(0x2000) && !region.guards(0x3000));
        assert_eq!(region.clean(&[0x1240..0x12c0]).unwrap(), vec![0x1240..0x12c0]);
        assert!(region.guards(0x1000), "line 0x1fc0 is still bad");
        assert_eq!(region.clean(&[0x1000..0x2000]).unwrap(), vec![0x1fc0..0x2000]);
        assert!(!region.guards(0x1000) && region.guards(0x2000));
        assert_eq!(region.poisoned(0..1 << 20, 10), vec![0x2000..0x2040]);
    }

    #[test]
    fn a_request_is_carried_out_whole_or_not_at_all() {
        let region = region(16 << 20);
        region.poison(&[0..1], 10).unwrap();
        for wrong in [(16 << 20)..(16 << 20) + 1, 5..5] {
            let error = region.poison(&[0x4000..0x4001, wrong], 10).unwrap_err();
            assert!(matches!(error, GuardError::OutOfRange { .. }), "{error}");
        }
        assert!(!region.guards(0x4000));
        assert_eq!(region.poisoned(0..16 << 20, 10), vec![0..64]);
    }

    #[derive(Debug, Default)]
    struct Notes(Mutex<Vec<Vec<Range<u64>>>>, std::sync::atomic::AtomicBool);

    impl PoisonKeeper for Notes {
        fn keep(&self, poison: &PoisonMap) -> io::Result<()> {
            if self.1.load(std::sync::atomic::Ordering::Relaxed) {
                return Err(io::Error::from_raw_os_error(libc::ENOSPC));
            }
            self.0.lock().unwrap().push(poison.iter().collect());
            Ok(())
        }
    }

    #[test]
    fn what_cannot_be_written_down_is_not_done() {
        let region = region(1 << 20);
        let notes = Arc::new(Notes::default());
        region.keep_with(notes.clone());
        region.poison(&[0x40..0x80], 10).unwrap();
        region.poison(&[0x40..0x80], 10).unwrap();
        region.poison(&[0x8040..0x8041], 10).unwrap();
        region.clean(&[0..0x1000]).unwrap();
        let kept = vec![vec![0x40..0x80], vec![0x40..0x80, 0x8040..0x8080], vec![0x8040..0x8080]];
        assert_eq!(*notes.0.lock().unwrap(), kept, "each change once");
        notes.1.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(matches!(region.poison(&[0..64], 10), Err(GuardError::Keep { .. })));
        assert!(matches!(region.clean(&[0x8000..0x9000]), Err(GuardError::Keep { .. })));
        assert!(region.guards(0x8000) && !region.guards(0));
        assert_eq!(region.poisoned(0..1 << 20, 10), vec![0x8040..0x8080]);
    }

    #[test]
    fn blocks_are_those_of_guest_physical_memory() {
        let gpa = 3 * LARGE - 0x1000;
        let blocks =
            |pages: Range<u64>| whole_blocks(&[pages], gpa, 2 * LARGE + 0x3000).iter().collect::<Vec<_>>();
        assert_eq!(blocks(0..0x1000), vec![], "the first page is of a block that begins before the region");
        assert_eq!(blocks(0x1000..0x2000), vec![0x1000..0x1000 + LARGE]);
        assert_eq!(blocks(0..2 * LARGE + 0x3000), vec![0x1000..0x1000 + 2 * LARGE]);
        let region = region(4 * LARGE);
        region.poison(&[0..1, LARGE..LARGE + 1, 2 * LARGE + 5..2 * LARGE + 6], 10).unwrap();
        let free = |region: &Region| {
            region
                .state()
                .guards
                .free_blocks(&[0..4 * LARGE].into_iter().collect())
                .iter()
                .collect::<Vec<_>>()
        };
        assert_eq!(free(&region), vec![3 * LARGE..4 * LARGE]);
        region.clean(&[LARGE..2 * LARGE]).unwrap();
        assert_eq!(free(&region), vec![LARGE..2 * LARGE, 3 * LARGE..4 * LARGE]);
    }

    #[test]
    fn what_the_host_lost_ends_no_access_and_is_noted() {
        let region = region(1 << 20);
        let file = region.alias().file_offset().unwrap().file().try_clone().unwrap();
        region.alias().get_slice(0x2000, 8).unwrap().copy_from(&[7u8; 8]);
        file.set_len(0x2000).unwrap();
        let before = super::super::host_fault::generation();
        assert_eq!(region.read_u64(0x1000), Some(0));
        assert_eq!(super::super::host_fault::generation(), before);
        assert_eq!(region.read_u64(0x2ff8), Some(0), "a page of zeros in the place of the missing one");
        assert!(super::super::host_fault::generation() > before);
        let (faults, _) = super::super::host_fault::take();
        let noted = faults.iter().find(|n| region.offset_of(n.fault.address) == Some(0x2000)).unwrap();
        assert_eq!(noted.fault.cause, super::super::host_fault::HostCause::BeyondEnd);
        assert_eq!(region.missing(), (1 << 20) - 0x2000);

        file.set_len(1 << 20).unwrap();
        region.alias().get_slice(0x2000, 8).unwrap().copy_from(&[9u8; 8]);
        region.lose(0x2000..0x3000).unwrap();
        assert_eq!(region.poisoned(0..1 << 20, 9), vec![0x2000..0x3000]);
        assert!(region.guards(0x2000));
        assert_eq!(
            region.read_u64(0x2000),
            Some(0),
            "the file is there again, and what went elsewhere is not"
        );
        region.alias().get_slice(0x2000, 8).unwrap().copy_from(&[5u8; 8]);
        let mut seen = [0; 8];
        std::os::unix::fs::FileExt::read_at(&file, &mut seen, 0x2000).unwrap();
        assert_eq!(seen, [5; 8]);
    }

    #[test]
    fn locked_memory_keeps_its_poison_and_answers_with_ones() {
        let region = region(1 << 20);
        region.alias().get_slice(0x2000, 8).unwrap().copy_from(&[7u8; 8]);
        region.poison(&[0x3000..0x3040], 10).unwrap();
        assert!(region.set_locked(true).unwrap() && !region.set_locked(true).unwrap());
        assert!(region.guards(0x2000) && region.locked() && region.absent() && !region.departed());
        assert_eq!(region.read_u64(0x2000), Some(u64::MAX));
        assert!(matches!(region.poison(&[0..1], 10), Err(GuardError::Locked { .. })));
        assert!(matches!(region.clean(&[0x3000..0x3040]), Err(GuardError::Locked { .. })));
        region.open_page(0x2000).unwrap();
        region.shut_page(0x2000).unwrap();
        assert!(region.set_locked(false).unwrap());
        assert_eq!(region.read_u64(0x2000), Some(0x0707_0707_0707_0707));
        assert!(!region.guards(0x2000) && region.guards(0x3000));
        assert_eq!(region.poisoned(0..1 << 20, 9), vec![0x3000..0x3040]);
        region.depart().unwrap();
        assert!(!region.set_locked(true).unwrap() && !region.locked());
    }

    #[test]
    fn ranges_beyond_the_region_and_departed_regions_are_refused() {
        let region = region(1 << 20);
        for range in [(1 << 20)..(1 << 20) + 1, 0..(1 << 20) + 1, 5..5] {
            assert!(matches!(region.poison(&[range], 10), Err(GuardError::OutOfRange { .. })));
        }
        region.depart().unwrap();
        assert!(region.guards(0));
        assert_eq!(region.read_u64(0), Some(u64::MAX));
        assert_eq!(region.read_u64((1 << 20) - 7), None);
        assert!(matches!(region.poison(&[0..1], 10), Err(GuardError::Departed { .. })));
    }
}
