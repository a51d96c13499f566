//! One contiguous piece of guest memory: a file, its two maps, its poison.

use std::fs::File;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use thiserror::Error;
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

use super::{GuestMap, MapError, PAGE_SIZE, PoisonMap, RangeSet};

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
    #[error(
        "{wanted} separate guarded places are more than this host allows ({limit}); raise vm.max_map_count or poison adjacent pages"
    )]
    TooScattered {
        /// Places that would be guarded.
        wanted: usize,
        /// Places that may be.
        limit: usize,
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

#[derive(Debug)]
struct State {
    map: GuestMap,
    poison: PoisonMap,
    guarded: RangeSet,
    departed: bool,
}

/// A contiguous piece of guest memory.
#[derive(Debug)]
pub struct Region {
    name: String,
    kind: RegionKind,
    gpa: u64,
    writable: bool,
    len: u64,
    host_address: u64,
    alias: Arc<MmapRegion>,
    state: Mutex<State>,
}

impl Region {
    /// Maps `len` bytes of `backing` for the guest at `gpa`.
    pub fn new(name: &str, kind: RegionKind, gpa: u64, len: u64, backing: Backing) -> Result<Self, MapError> {
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
        Ok(Self {
            name: name.to_owned(),
            kind,
            gpa,
            writable: backing.writable,
            len,
            host_address: map.host_address(),
            alias: Arc::new(alias),
            state: Mutex::new(State {
                map,
                poison: PoisonMap::default(),
                guarded: RangeSet::default(),
                departed: false,
            }),
        })
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

    /// The eight bytes at `offset`, whether poisoned or not: ones once departed, none past the end.
    pub fn read_u64(&self, offset: u64) -> Option<u64> {
        if self.departed() {
            return offset.checked_add(8).filter(|end| *end <= self.len).map(|_| u64::MAX);
        }
        let slice = self.alias.get_slice(usize::try_from(offset).ok()?, 8).ok()?;
        let mut bytes = [0; 8];
        slice.copy_to(&mut bytes);
        Some(u64::from_le_bytes(bytes))
    }

    /// Poisons every line that `range` (offsets) touches, and guards its pages. Returns the lines.
    ///
    /// At most `limit` separate runs of pages may be guarded; beyond that nothing is changed.
    pub fn poison(&self, range: Range<u64>, limit: usize) -> Result<Range<u64>, GuardError> {
        self.check(&range)?;
        let mut state = self.state();
        if state.departed {
            return Err(GuardError::Departed { name: self.name.clone() });
        }
        let mut poison = state.poison.clone();
        let lines = poison.add(range);
        let guarded = poison.pages();
        if guarded.count() > limit {
            return Err(GuardError::TooScattered { wanted: guarded.count(), limit });
        }
        let pages = super::poison::round_out(lines.clone(), PAGE_SIZE);
        state.map.shut(pages)?;
        state.poison = poison;
        state.guarded = guarded;
        Ok(lines)
    }

    /// Cleans every line that lies wholly in `range` (offsets), opens pages that hold no poison any
    /// more, and returns the number of bytes that were poisoned.
    pub fn clean(&self, range: Range<u64>) -> Result<u64, GuardError> {
        self.check(&range)?;
        let mut state = self.state();
        if state.departed {
            return Err(GuardError::Departed { name: self.name.clone() });
        }
        let cleared = state.poison.clear(range.clone());
        if cleared > 0 {
            let still = state.poison.pages();
            let before: Vec<_> = state.guarded.within(super::poison::round_out(range, PAGE_SIZE)).collect();
            for run in before {
                let mut free = RangeSet::default();
                free.insert(run.clone());
                for kept in still.within(run) {
                    free.remove(kept);
                }
                for pages in free.iter() {
                    state.map.open(pages)?;
                }
            }
            state.guarded = still;
        }
        Ok(cleared)
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
        state.departed || state.guarded.intersects(page..page + PAGE_SIZE)
    }

    /// Lets the guest reach the guarded page at offset `page`: its data, or ones once departed.
    ///
    /// The caller holds the baton: no vCPU runs but the one that is about to step.
    pub fn open_page(&self, page: u64) -> Result<(), MapError> {
        let state = self.state();
        if state.departed { state.map.fill_with_ones(page) } else { state.map.open(page..page + PAGE_SIZE) }
    }

    /// Undoes [`Self::open_page`], unless the page was cleaned meanwhile.
    pub fn shut_page(&self, page: u64) -> Result<(), MapError> {
        let state = self.state();
        if state.departed {
            state.map.forget(page)
        } else if state.guarded.intersects(page..page + PAGE_SIZE) {
            state.map.shut(page..page + PAGE_SIZE)
        } else {
            Ok(())
        }
    }

    /// Puts the page at offset `page` out of the guest's reach for a moment, poisoned or not.
    ///
    /// The caller holds the baton, and undoes it by [`Self::restore_page`].
    pub fn hide_page(&self, page: u64) -> Result<(), MapError> {
        self.state().map.shut(page..page + PAGE_SIZE)
    }

    /// Undoes [`Self::hide_page`].
    pub fn restore_page(&self, page: u64) -> Result<(), MapError> {
        let state = self.state();
        if state.departed || state.guarded.intersects(page..page + PAGE_SIZE) {
            return Ok(());
        }
        state.map.open(page..page + PAGE_SIZE)
    }

    /// Writes what the guest has changed back to the file, and waits for it.
    pub fn flush(&self) -> std::io::Result<()> {
        match self.alias.file_offset() {
            Some(file) if self.writable => file.file().sync_data(),
            _ => Ok(()),
        }
    }

    /// Takes the memory away: from now on every access traps, and finds ones.
    pub fn depart(&self) -> Result<(), MapError> {
        let mut state = self.state();
        if !state.departed {
            state.map.vanish()?;
            state.departed = true;
        }
        Ok(())
    }

    /// Whether the memory was taken away.
    pub fn departed(&self) -> bool {
        self.state().departed
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
        assert_eq!(region.poison(0x1240..0x1241, 100).unwrap(), 0x1240..0x1280);
        region.poison(0x1fc0..0x2040, 100).unwrap();
        assert!(region.guards(0x1000) && region.guards(0x2000) && !region.guards(0x3000));
        assert_eq!(region.clean(0x1240..0x1280).unwrap(), 64);
        assert!(region.guards(0x1000), "line 0x1fc0 is still bad");
        assert_eq!(region.clean(0x1000..0x2000).unwrap(), 64);
        assert!(!region.guards(0x1000) && region.guards(0x2000));
        assert_eq!(region.poisoned(0..1 << 20, 10), vec![0x2000..0x2040]);
    }

    #[test]
    fn too_scattered_poison_is_refused_whole() {
        let region = region(1 << 20);
        region.poison(0..1, 2).unwrap();
        region.poison(0x4000..0x4001, 2).unwrap();
        let error = region.poison(0x8000..0x8001, 2).unwrap_err();
        assert_eq!(
            error.to_string(),
            "3 separate guarded places are more than this host allows (2); raise vm.max_map_count or poison adjacent pages"
        );
        assert!(!region.guards(0x8000));
        assert_eq!(region.first_poison(0x8000..0x9000), None);
    }

    #[test]
    fn ranges_beyond_the_region_and_departed_regions_are_refused() {
        let region = region(1 << 20);
        for range in [(1 << 20)..(1 << 20) + 1, 0..(1 << 20) + 1, 5..5] {
            assert!(matches!(region.poison(range, 10), Err(GuardError::OutOfRange { .. })));
        }
        region.depart().unwrap();
        assert!(region.guards(0));
        assert_eq!(region.read_u64(0), Some(u64::MAX));
        assert_eq!(region.read_u64((1 << 20) - 7), None);
        assert!(matches!(region.poison(0..1, 10), Err(GuardError::Departed { .. })));
    }
}
