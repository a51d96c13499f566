//! The guest-physical address space: which region lies where.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use thiserror::Error;
use vm_memory::{GuestAddress, GuestMemoryAtomic, GuestMemoryMmap, GuestRegionMmap};

use super::{MapError, Region};

/// The memory that devices see: every region that has not departed.
pub type DmaMemory = GuestMemoryAtomic<GuestMemoryMmap>;

/// Why a region cannot be placed.
#[derive(Debug, Error)]
pub enum SpaceError {
    /// Two regions would share addresses.
    #[error("{name} at {start:#x} to {end:#x} overlaps {other} at {other_start:#x} to {other_end:#x}")]
    Overlap {
        /// The new region.
        name: String,
        /// Its first address.
        start: u64,
        /// Its end.
        end: u64,
        /// The region in the way.
        other: String,
        /// Its first address.
        other_start: u64,
        /// Its end.
        other_end: u64,
    },
}

/// All regions of a machine. Readers are vCPU threads and devices; the machine changes it while it
/// holds the baton.
///
/// Every arrival and departure begins a new generation, before it takes effect. A request of a device that was
/// submitted in one generation and completes in another can so be told from a new one: see [`Self::gone`].
#[derive(Debug, Default)]
pub struct AddressSpace {
    regions: RwLock<Vec<Placed>>,
    generation: AtomicU64,
    dma: DmaMemoryCell,
}

#[derive(Debug)]
struct Placed {
    region: Arc<Region>,
    /// The generation that its arrival began.
    since: u64,
}

#[derive(Debug)]
struct DmaMemoryCell(DmaMemory);

impl Default for DmaMemoryCell {
    fn default() -> Self {
        Self(GuestMemoryAtomic::new(GuestMemoryMmap::new()))
    }
}

impl AddressSpace {
    /// Places a region.
    pub fn insert(&self, region: Arc<Region>) -> Result<(), SpaceError> {
        let mut regions = self.regions.write().unwrap_or_else(PoisonError::into_inner);
        let range = region.range();
        if let Some(other) = regions.iter().map(|placed| &placed.region).find(|r| overlap(&r.range(), &range))
        {
            return Err(SpaceError::Overlap {
                name: region.name().to_owned(),
                start: range.start,
                end: range.end,
                other: other.name().to_owned(),
                other_start: other.range().start,
                other_end: other.range().end,
            });
        }
        let since = self.next_generation();
        regions.push(Placed { region, since });
        regions.sort_by_key(|placed| placed.region.gpa());
        self.publish(&regions);
        Ok(())
    }

    /// Takes the region at `gpa` out.
    pub fn remove(&self, gpa: u64) -> Option<Arc<Region>> {
        let mut regions = self.regions.write().unwrap_or_else(PoisonError::into_inner);
        let at = regions.iter().position(|placed| placed.region.gpa() == gpa)?;
        self.next_generation();
        let region = regions.remove(at).region;
        self.publish(&regions);
        Some(region)
    }

    /// Takes the memory of `region` away from vCPUs and devices. Its addresses stay taken, and guarded; transfers of
    /// devices that have begun end first.
    ///
    /// # Errors
    /// The host refuses to guard it; it is still there.
    pub fn depart(&self, region: &Region) -> Result<(), MapError> {
        // A transfer that begins from here on asks whether its memory is gone.
        self.next_generation();
        region.depart()?;
        self.publish(&self.placed());
        Ok(())
    }

    /// Locks or unlocks the memory of `region`; see [`Region::set_locked`]. Its addresses stay taken.
    ///
    /// # Errors
    /// The host refuses to change the map; nothing has changed.
    pub fn set_locked(&self, region: &Region, locked: bool) -> Result<(), MapError> {
        self.next_generation();
        if region.set_locked(locked)? {
            self.publish(&self.placed());
        }
        Ok(())
    }

    /// The present generation: 0 is that of an empty space.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::SeqCst)
    }

    /// The region that a request of `generation` cannot reach by `gpa..gpa + len`: it has departed or is locked, or has
    /// come since.
    pub fn gone(&self, gpa: u64, len: u64, generation: u64) -> Option<Arc<Region>> {
        let wanted = gpa..gpa.saturating_add(len);
        let regions = self.placed();
        let mut touched = regions.iter().filter(|placed| overlap(&placed.region.range(), &wanted));
        touched
            .find(|placed| placed.since > generation || placed.region.absent())
            .map(|placed| placed.region.clone())
    }

    fn next_generation(&self) -> u64 {
        self.generation.fetch_add(1, Ordering::SeqCst) + 1
    }

    fn placed(&self) -> RwLockReadGuard<'_, Vec<Placed>> {
        self.regions.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The region that holds `gpa`, departed or not.
    pub fn find(&self, gpa: u64) -> Option<Arc<Region>> {
        self.placed().iter().map(|placed| &placed.region).find(|r| r.range().contains(&gpa)).cloned()
    }

    /// All regions in order of address.
    pub fn regions(&self) -> Vec<Arc<Region>> {
        self.placed().iter().map(|placed| placed.region.clone()).collect()
    }

    /// The eight bytes at guest-physical `gpa`, or none where there is no memory.
    pub fn read_u64(&self, gpa: u64) -> Option<u64> {
        let region = self.find(gpa)?;
        region.read_u64(gpa - region.gpa())
    }

    /// The memory that devices see; the handle follows every change.
    pub fn dma(&self) -> DmaMemory {
        self.dma.0.clone()
    }

    /// Runs `transfer` while nothing in `gpa..gpa + len` becomes poisoned; see [`Region::hold_poison`].
    pub fn while_poison_holds(&self, gpa: u64, len: u64, transfer: &mut dyn FnMut()) {
        let wanted = gpa..gpa.saturating_add(len);
        let regions: Vec<_> = {
            let regions = self.placed();
            let all = regions.iter().map(|placed| &placed.region);
            all.filter(|r| overlap(&r.range(), &wanted)).cloned().collect()
        };
        // In order of address, and whoever poisons takes one alone: nobody waits in a circle.
        let _held: Vec<_> = regions.iter().map(|region| region.hold_poison()).collect();
        transfer();
        for region in &regions {
            let start = gpa.max(region.gpa());
            region.wrote(start - region.gpa(), wanted.end.min(region.range().end) - start);
        }
    }

    /// Guest-physical address of the first poisoned line in `gpa..gpa + len`.
    pub fn first_poison(&self, gpa: u64, len: u64) -> Option<u64> {
        let end = gpa.saturating_add(len);
        let regions = self.placed();
        let all = regions.iter().map(|placed| &placed.region);
        all.filter(|r| overlap(&r.range(), &(gpa..end))).find_map(|r| {
            let start = gpa.max(r.gpa()) - r.gpa();
            let stop = end.min(r.range().end) - r.gpa();
            r.first_poison(start..stop).map(|offset| r.gpa() + offset)
        })
    }

    fn publish(&self, regions: &[Placed]) {
        let present = regions
            .iter()
            .map(|placed| &placed.region)
            .filter(|r| !r.absent())
            .filter_map(|r| GuestRegionMmap::with_arc(r.alias().clone(), GuestAddress(r.gpa())))
            .map(Arc::new)
            .collect();
        match GuestMemoryMmap::from_arc_regions(present) {
            Ok(memory) => {
                self.dma.0.lock().unwrap_or_else(PoisonError::into_inner).replace(memory);
            }
            Err(error) => tracing::error!(%error, "devices keep an outdated view of memory"),
        }
    }
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Backing, RegionKind};
    use vm_memory::{Bytes, GuestAddressSpace, GuestMemoryBackend};

    fn region(name: &str, gpa: u64, len: u64) -> Arc<Region> {
        let file = tempfile::tempfile().unwrap();
        file.set_len(len).unwrap();
        Arc::new(
            Region::new(name, RegionKind::Pmem, gpa, len, Backing { file, offset: 0, writable: true })
                .unwrap(),
        )
    }

    #[test]
    fn overlapping_regions_are_refused_by_name() {
        let space = AddressSpace::default();
        space.insert(region("a", 0x10000, 0x4000)).unwrap();
        let error = space.insert(region("b", 0x13000, 0x1000)).unwrap_err();
        assert_eq!(error.to_string(), "b at 0x13000 to 0x14000 overlaps a at 0x10000 to 0x14000");
        space.insert(region("c", 0x14000, 0x1000)).unwrap();
        assert_eq!(space.find(0x14fff).unwrap().name(), "c");
        assert!(space.find(0x15000).is_none());
    }

    #[test]
    fn devices_lose_a_departed_region_and_keep_the_others() {
        let space = AddressSpace::default();
        let a = region("a", 0x10000, 0x4000);
        space.insert(a.clone()).unwrap();
        space.insert(region("b", 0x20000, 0x4000)).unwrap();
        let dma = space.dma();
        dma.memory().write_obj(0x1122_3344_5566_7788u64, GuestAddress(0x10008)).unwrap();
        assert_eq!(space.read_u64(0x10008), Some(0x1122_3344_5566_7788));
        space.depart(&a).unwrap();
        assert!(dma.memory().write_obj(1u64, GuestAddress(0x10008)).is_err());
        assert_eq!(dma.memory().num_regions(), 1);
        assert_eq!(space.read_u64(0x10008), Some(u64::MAX), "as a bus answers for nobody");
    }

    #[test]
    fn a_request_reaches_only_what_was_there_when_it_was_made() {
        let space = AddressSpace::default();
        let a = region("a", 0x10000, 0x4000);
        space.insert(a.clone()).unwrap();
        space.insert(region("b", 0x14000, 0x4000)).unwrap();
        let gone = |gpa, generation| space.gone(gpa, 8, generation).map(|region| region.name().to_owned());
        let first = space.generation();
        assert_eq!((gone(0x10000, first), gone(0x14000, first)), (None, None));
        space.depart(&a).unwrap();
        assert_eq!(gone(0x10000, first).as_deref(), Some("a"));
        let second = space.generation();
        assert!(second > first);
        assert_eq!(gone(0x10000, second).as_deref(), Some("a"), "departed memory is there for nobody");
        space.remove(0x10000);
        space.insert(region("c", 0x10000, 0x4000)).unwrap();
        for old in [first, second] {
            assert_eq!(gone(0x13ffc, old).as_deref(), Some("c"), "it is another memory than was meant");
            assert_eq!(gone(0x14000, old), None, "the neighbour is still the same");
        }
        assert_eq!(gone(0x10000, space.generation()), None);
        assert_eq!(gone(0x18000, first), None, "what was never there is another error");
    }

    #[test]
    fn who_departs_waits_for_transfers_that_have_begun() {
        use std::sync::atomic::AtomicBool;
        let space = AddressSpace::default();
        let a = region("a", 0x10000, 0x4000);
        space.insert(a.clone()).unwrap();
        let (space, departed) = (&space, &AtomicBool::new(false));
        std::thread::scope(|scope| {
            space.while_poison_holds(0x10000, 8, &mut || {
                let before = space.generation();
                scope.spawn(|| {
                    space.depart(&a).unwrap();
                    departed.store(true, Ordering::SeqCst);
                });
                while space.generation() == before {
                    std::thread::yield_now();
                }
                assert!(!departed.load(Ordering::SeqCst));
                assert!(space.gone(0x10000, 8, before).is_none());
            });
        });
        assert!(departed.load(Ordering::SeqCst));
    }

    #[test]
    fn who_poisons_waits_for_transfers_that_have_begun() {
        use std::sync::atomic::AtomicBool;
        let space = AddressSpace::default();
        let a = region("a", 0x10000, 0x4000);
        space.insert(a.clone()).unwrap();
        let poisoned = AtomicBool::new(false);
        std::thread::scope(|scope| {
            space.while_poison_holds(0x10000, 8, &mut || {
                scope.spawn(|| {
                    a.poison(&[0..1], 10).unwrap();
                    poisoned.store(true, Ordering::SeqCst);
                });
                std::thread::sleep(std::time::Duration::from_millis(20));
                assert!(!poisoned.load(Ordering::SeqCst));
                assert_eq!(space.first_poison(0x10000, 8), None);
            });
        });
        assert_eq!(space.first_poison(0x10000, 8), Some(0x10000));
    }

    #[test]
    fn poison_is_found_across_regions() {
        let space = AddressSpace::default();
        space.insert(region("a", 0x10000, 0x4000)).unwrap();
        let b = region("b", 0x14000, 0x4000);
        space.insert(b.clone()).unwrap();
        b.poison(&[0x40..0x41], 10).unwrap();
        assert_eq!(space.first_poison(0x13ff0, 0x100), Some(0x14040));
        assert_eq!(space.first_poison(0x13ff0, 0x40), None);
        assert_eq!(space.first_poison(u64::MAX - 4, 100), None);
    }
}
