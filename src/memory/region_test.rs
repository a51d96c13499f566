use super::super::LARGE;
use super::guarding::whole_blocks;
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
        region.state().guards.free_blocks(&[0..4 * LARGE].into_iter().collect()).iter().collect::<Vec<_>>()
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
    assert_eq!(region.read_u64(0x2000), Some(0), "the file is there again, and what went elsewhere is not");
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
