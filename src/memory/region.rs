//! One contiguous piece of guest memory: a file, its two maps, its poison.

mod guarding;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use thiserror::Error;
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

pub use self::guarding::GuardState;
use super::durable::{Durable, Loss, Survivors, WriteLog};
use super::guard::{GrowError, Guards, TooScattered};
use super::host_fault::Watch;
use super::poison::round_out;
use super::{
    GuestMap, MapError, PAGE_SIZE, PoisonKeeper, PoisonMap, PoisonPolicy, RangeSet, StaleAnswer, backing,
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
#[path = "region_test.rs"]
mod tests;
