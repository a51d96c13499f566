//! Guest memory as a census of page tables reads it: all that is there, page by page, past every guard.

use std::ops::Range;
use std::sync::Arc;

use vm_memory::VolatileMemory;

use super::{AddressSpace, PAGE_SIZE, Region};
use crate::x86::census::{Table, TableMemory};

/// A snapshot of the regions that have not departed. Page tables lie in RAM, and in memory devices that the guest uses
/// as RAM.
#[derive(Debug)]
pub struct GuestTables(Vec<Arc<Region>>);

impl GuestTables {
    /// The memory of `space` as it is now.
    pub fn new(space: &AddressSpace) -> Self {
        Self(space.regions().into_iter().filter(|region| !region.absent()).collect())
    }

    fn region(&self, gpa: u64) -> Option<&Arc<Region>> {
        self.0.iter().find(|region| region.range().contains(&gpa))
    }
}

impl TableMemory for GuestTables {
    fn table(&self, gpa: u64, table: &mut Table) -> bool {
        let Some(region) = self.region(gpa) else { return false };
        let Ok(slice) = region.alias().get_slice((gpa - region.gpa()) as usize, PAGE_SIZE as usize) else {
            return false;
        };
        slice.copy_to(table);
        true
    }

    fn occupied(&self) -> Vec<Range<u64>> {
        let pages = |region: &Arc<Region>| {
            let gpa = region.gpa();
            region.data().into_iter().map(move |data| gpa + data.start..gpa + data.end)
        };
        self.0.iter().flat_map(pages).collect()
    }

    fn scan(
        &self,
        range: &Range<u64>,
        keys: [usize; 2],
        values: [u64; 2],
        mask: u64,
        found: &mut dyn FnMut(u64),
    ) {
        let Some(region) = self.region(range.start) else { return };
        let (start, end) = (range.start - region.gpa(), range.end.min(region.range().end) - region.gpa());
        for page in (start..end).step_by(PAGE_SIZE as usize) {
            let is = |n: usize| {
                let word = region.alias().get_ref::<u64>(page as usize + 8 * keys[n]);
                word.is_ok_and(|word| word.load() & mask == values[n])
            };
            if is(0) && is(1) {
                found(region.gpa() + page);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Backing, RegionKind};

    #[test]
    fn only_pages_that_hold_something_are_scanned() {
        let file = super::super::backing::anonymous(c"test", 1 << 20).unwrap();
        let backing = Backing { file, offset: 0, writable: true };
        let region = Arc::new(Region::new("ram", RegionKind::Ram, 1 << 32, 1 << 20, backing).unwrap());
        let space = AddressSpace::default();
        space.insert(region.clone()).unwrap();
        for page in [3u64, 200] {
            region.alias().get_ref::<u64>((page * 4096 + 16) as usize).unwrap().store(page | 0xf000_0000);
        }
        let tables = GuestTables::new(&space);
        let occupied = tables.occupied();
        let pages = occupied.iter().map(|range| (range.end - range.start) / 4096).sum::<u64>();
        assert!(pages < 256, "{occupied:x?}");
        let mut found = Vec::new();
        for range in &occupied {
            tables.scan(range, [2, 2], [200, 200], 0xfff, &mut |page| found.push(page));
        }
        assert_eq!(found, [(1 << 32) + 200 * 4096]);
        let mut table = [0; 512];
        assert!(tables.table(found[0], &mut table));
        assert_eq!(table[2], 0xf000_00c8);
        assert!(!tables.table(1 << 20, &mut table), "there is no memory");
        space.depart(&region).unwrap();
        assert!(!GuestTables::new(&space).table(found[0], &mut table), "it has gone");
    }
}
