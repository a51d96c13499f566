//! Iterations of a repeated copy or fill, and plain moves, done by the monitor.

use std::sync::atomic::Ordering;

use vm_memory::{Bytes, VolatileMemory};

use crate::memory::AddressSpace;
use crate::x86::bulk::Bulk;
use crate::x86::moves::{Direction, Move};

/// Bytes moved at a time.
const CHUNK: usize = 4096;

/// Does what `bulk` says with the bytes of memory. What is read from departed memory is ones, and what is written
/// to it goes nowhere. Returns false, with nothing done, where the destination cannot be written this way.
///
/// The caller holds the baton.
pub fn carry_out(space: &AddressSpace, bulk: &Bulk) -> bool {
    let length = bulk.length() as usize;
    if length > CHUNK {
        return false;
    }
    let Some(destination) = space.find(bulk.destination).filter(|region| region.writable()) else {
        return false;
    };
    let element = usize::from(bulk.element);
    let mut bytes = [0; CHUNK];
    let bytes = &mut bytes[..length];
    match bulk.source {
        // Each element read may be one that was just written: the processor's own order matters.
        Some(_) if bulk.overlaps => return false,
        Some(source) => {
            let Some(region) = space.find(source) else { return false };
            if region.absent() {
                bytes.fill(0xff);
            } else {
                let Ok(from) = region.alias().get_slice((source - region.gpa()) as usize, length) else {
                    return false;
                };
                from.copy_to(bytes);
            }
        }
        None => {
            let fill = bulk.fill.to_le_bytes();
            bytes.chunks_mut(element).for_each(|chunk| chunk.copy_from_slice(&fill[..chunk.len()]));
        }
    }
    if !destination.absent() {
        let offset = (bulk.destination - destination.gpa()) as usize;
        let Ok(to) = destination.alias().get_slice(offset, length) else { return false };
        to.copy_from(bytes);
        destination.wrote(offset as u64, length as u64);
    }
    true
}

/// Does a plain move: what a load finds, or 0 after a store. `None`, with nothing done, where memory cannot be reached
/// this way.
pub fn move_one(space: &AddressSpace, what: &Move) -> Option<u64> {
    let region = space.find(what.gpa)?;
    let at = region.alias().get_slice((what.gpa - region.gpa()) as usize, what.size as usize).ok()?;
    let moved = match (what.direction, what.size) {
        (Direction::Load { .. }, 1) => at.load::<u8>(0, Ordering::Relaxed).ok().map(u64::from),
        (Direction::Load { .. }, 2) => at.load::<u16>(0, Ordering::Relaxed).ok().map(u64::from),
        (Direction::Load { .. }, 4) => at.load::<u32>(0, Ordering::Relaxed).ok().map(u64::from),
        (Direction::Load { .. }, _) => at.load::<u64>(0, Ordering::Relaxed).ok(),
        (Direction::Store(_), _) if !region.writable() => None,
        (Direction::Store(value), 1) => at.store(value as u8, 0, Ordering::Release).ok().map(|()| 0),
        (Direction::Store(value), 2) => at.store(value as u16, 0, Ordering::Release).ok().map(|()| 0),
        (Direction::Store(value), 4) => at.store(value as u32, 0, Ordering::Release).ok().map(|()| 0),
        (Direction::Store(value), _) => at.store(value, 0, Ordering::Release).ok().map(|()| 0),
    };
    if matches!(what.direction, Direction::Store(_)) {
        region.wrote(what.gpa - region.gpa(), what.size.into());
    }
    moved
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use iced_x86::Register;

    use super::*;
    use crate::memory::{Backing, Region, RegionKind};

    const BASE: u64 = 0x10_0000;

    fn space() -> (AddressSpace, Arc<Region>) {
        let space = AddressSpace::default();
        let file = tempfile::tempfile().unwrap();
        file.set_len(0x4000).unwrap();
        let backing = Backing { file, offset: 0, writable: true };
        let region = Arc::new(Region::new("p0", RegionKind::Pmem, BASE, 0x4000, backing).unwrap());
        space.insert(region.clone()).unwrap();
        (space, region)
    }

    fn bulk(source: Option<u64>, destination: u64, iterations: u64, element: u8) -> Bulk {
        Bulk {
            iterations,
            element,
            backwards: false,
            source,
            destination,
            fill: 0x1122_3344_5566_7788,
            overlaps: false,
        }
    }

    #[test]
    fn bytes_are_filled_and_copied_behind_a_guard() {
        let (space, region) = space();
        region.poison(&[0x2000..0x2001], 10).unwrap();
        assert!(carry_out(&space, &bulk(None, BASE + 0x2100, 4, 4)));
        assert_eq!(region.read_u64(0x2100), Some(0x5566_7788_5566_7788));
        assert!(carry_out(&space, &bulk(Some(BASE + 0x2100), BASE + 0x10, 16, 1)));
        assert_eq!(region.read_u64(0x18), Some(0x5566_7788_5566_7788));
        assert_eq!(region.read_u64(0x20), Some(0));
    }

    #[test]
    fn a_move_reads_and_writes_as_many_bytes_as_it_names() {
        let (space, region) = space();
        region.poison(&[0x2000..0x2001], 10).unwrap();
        let to = |size, value| Move::new(BASE + 0x2108, size, Direction::Store(value));
        let from = |size| {
            let direction = Direction::Load { to: Register::RAX, signed: false };
            move_one(&space, &Move::new(BASE + 0x2108, size, direction))
        };
        assert_eq!(move_one(&space, &to(8, 0x1122_3344_5566_7788)), Some(0));
        assert_eq!(move_one(&space, &to(1, 0xaa99)), Some(0));
        assert_eq!(region.read_u64(0x2108), Some(0x1122_3344_5566_7799));
        assert_eq!([1, 2, 4, 8].map(from), [0x99, 0x7799, 0x5566_7799, 0x1122_3344_5566_7799].map(Some));
        assert_eq!(move_one(&space, &Move::new(BASE - 8, 8, Direction::Store(0))), None);
    }

    #[test]
    fn departed_memory_reads_as_ones_and_swallows_writes() {
        let (space, region) = space();
        region.depart().unwrap();
        assert!(carry_out(&space, &bulk(Some(BASE), BASE + 0x1000, 8, 8)));
        assert!(!carry_out(&space, &bulk(Some(BASE - 0x1000), BASE, 8, 8)));
        assert_eq!(region.read_u64(0x1000), Some(u64::MAX));
    }

    #[test]
    fn what_overlaps_is_left_to_the_processor() {
        let (space, _region) = space();
        assert!(!carry_out(&space, &Bulk { overlaps: true, ..bulk(Some(BASE), BASE + 1, 8, 1) }));
    }
}
