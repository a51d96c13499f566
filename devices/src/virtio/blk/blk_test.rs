//! Tests of the disk as a driver sees it: what is in memory, on the disk and in the status byte.

use std::io;
use std::ops::Range;
use std::sync::Mutex;

use proptest::prelude::*;

use super::*;
use crate::clock::testing::Hand;
use crate::dma::testing::{Lines, dma};
use crate::virtio::testing::{BUFFERS, Driver, Later, MEMORY, VERSION_1};

const SECTORS: u64 = 64;
const FEATURES: u64 = VERSION_1 | F_FLUSH | F_MQ;
/// What the tests take for persistent memory.
const PMEM: Range<u64> = BUFFERS + 0x8_0000..BUFFERS + 0xa_0000;

const HEADER: u64 = BUFFERS;
const STATUS: u64 = BUFFERS + 0x100;
const DATA: u64 = BUFFERS + 0x1000;

/// Storage in memory, with a count of flushes.
struct Store(Mutex<(Vec<u8>, usize)>);

impl Store {
    fn range(&self, offset: u64, length: usize) -> Range<usize> {
        let offset = offset as usize;
        offset..offset + length
    }
}

impl Storage for Store {
    fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        data.copy_from_slice(&self.0.lock().unwrap().0[self.range(offset, data.len())]);
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.lock().unwrap().0[self.range(offset, data.len())].copy_from_slice(data);
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.0.lock().unwrap().1 += 1;
        Ok(())
    }

    fn zero(&self, offset: u64, length: u64, _unmap: bool) -> io::Result<()> {
        self.0.lock().unwrap().0[self.range(offset, length as usize)].fill(0);
        Ok(())
    }

    fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        self.0.lock().unwrap().0[self.range(offset, length as usize)].fill(0xdd);
        Ok(())
    }
}

#[derive(Default)]
struct Notes(Mutex<Vec<(u64, What)>>);

impl Witness for Notes {
    fn persistent(&self, gpa: u64, len: u64) -> bool {
        gpa < PMEM.end && PMEM.start < gpa + len
    }

    fn tell(&self, notice: &Notice<'_>) {
        self.0.lock().unwrap().push((notice.number, notice.what));
    }
}

struct Bench {
    driver: Driver<Blk>,
    later: Later<Job>,
    store: Store,
    notes: Arc<Notes>,
    hand: Hand,
}

impl Bench {
    fn with(readonly: bool, features: u64) -> Self {
        let (dma, poison): (Dma, Arc<Lines>) = dma(&[(0, MEMORY)]);
        let (later, notes, hand) = (Later::default(), Arc::new(Notes::default()), Hand::default());
        let disk = Blk::new(Parts {
            name: "d0".to_owned(),
            sectors: SECTORS,
            readonly,
            queues: 2,
            dma: dma.clone(),
            backend: Box::new(later.clone()),
            witness: notes.clone(),
            clock: hand.clock(),
        });
        let mut driver = Driver::in_memory(disk, dma, poison);
        driver.start(features);
        let store = (0..SECTORS * SECTOR).map(|at| (at / SECTOR) as u8 ^ at as u8).collect();
        Self { driver, later, store: Store(Mutex::new((store, 0))), notes, hand }
    }

    fn new() -> Self {
        Self::with(false, FEATURES)
    }

    fn header(&self, slot: u64, kind: u32, sector: u64) -> u64 {
        let (view, at) = (self.driver.view(), HEADER + 0x10 * slot);
        view.write_obj(at, kind).unwrap();
        view.write_obj(at + 4, 0u32).unwrap();
        view.write_obj(at + 8, sector).unwrap();
        view.write_obj(STATUS + slot, 0xffu8).unwrap();
        at
    }

    /// Puts a request into queue 0, with its header and status in `slot`; returns the head of its chain.
    fn ask(&mut self, slot: u64, kind: u32, sector: u64, data: &[(u64, u32, bool)]) -> u16 {
        let header = self.header(slot, kind, sector);
        let mut chain = vec![(header, 16, false)];
        chain.extend_from_slice(data);
        chain.push((STATUS + slot, 1, true));
        let head = self.driver.offer(0, &chain);
        self.driver.kick(0);
        head
    }

    fn read(&mut self, slot: u64, sector: u64, to: u64, length: u32) -> u16 {
        self.ask(slot, 0, sector, &[(to, length, true)])
    }

    fn write(&mut self, slot: u64, sector: u64, from: u64, length: u32) -> u16 {
        self.ask(slot, 1, sector, &[(from, length, false)])
    }

    fn status(&self, slot: u64) -> u8 {
        self.driver.bytes(STATUS + slot, 1)[0]
    }

    /// Performs the jobs that there are, and those that follow; `pick` says which one is next.
    fn perform(&mut self, mut pick: impl FnMut(usize) -> usize) {
        loop {
            let job = {
                let jobs = &mut self.later.0.lock().unwrap().0;
                if jobs.is_empty() {
                    return;
                }
                let index = pick(jobs.len());
                jobs.remove(index)
            };
            let done = job.perform(&self.store, &mut Vec::new());
            let mut effects = Effects::new();
            self.driver.function.finish(done, &mut effects);
            self.driver.run(effects);
        }
    }

    fn work(&mut self) {
        self.perform(|_| 0);
    }

    fn release(&mut self, numbers: &[u64], how: Release) -> Result<(), ReleaseError> {
        let mut effects = Effects::new();
        let result = self.driver.function.release(numbers, how, &mut effects);
        self.driver.run(effects);
        self.work();
        result
    }

    fn tick(&mut self, seconds: u64) {
        self.hand.advance(Duration::from_secs(seconds));
        let mut effects = Effects::new();
        self.driver.function.tick(&mut effects);
        self.driver.run(effects);
        self.work();
    }

    fn arm(&mut self, action: Action) -> u64 {
        self.arm_for(Pattern::default(), action)
    }

    fn arm_for(&mut self, pattern: Pattern, action: Action) -> u64 {
        let fault = Fault { pattern, skip: 0, count: None, action };
        self.driver.function.device_mut().arm(fault).unwrap()
    }

    fn sectors(&self, first: u64, count: u64) -> Vec<u8> {
        let bytes = &self.store.0.lock().unwrap().0;
        bytes[(first * SECTOR) as usize..((first + count) * SECTOR) as usize].to_vec()
    }

    fn heads(&mut self) -> Vec<u32> {
        self.driver.used(0).into_iter().map(|(head, _)| head).collect()
    }

    fn held(&self) -> Vec<u64> {
        self.driver.function.device().held().iter().map(|held| held.number).collect()
    }
}

/// Data of a request: address, length, whether the device writes it.
type Buffers<'a> = &'a [(u64, u32, bool)];

const HOLD: Action = Action::Hold(Transfer::Release);

#[test]
fn the_configuration_says_what_the_disk_is() {
    let mut bench = Bench::new();
    assert_eq!(bench.driver.get::<8>(0x2000), SECTORS.to_le_bytes());
    assert_eq!(bench.driver.get::<4>(0x2014), 512u32.to_le_bytes());
    assert_eq!(bench.driver.get::<2>(0x2022), [2, 0]);
    let [device, ..] = bench.driver.config_read::<4>(2);
    assert_eq!(device, 0x42, "the modern id of a block device");
}

#[test]
fn what_is_written_is_read_over_any_cut_of_the_buffers() {
    let mut bench = Bench::new();
    let data: Vec<u8> = (0..2048u32).map(|n| ((n * 7) >> 3) as u8).collect();
    bench.driver.dma.write(DATA, &data).unwrap();
    let head =
        bench.ask(0, 1, 3, &[(DATA, 100, false), (DATA + 100, 1436, false), (DATA + 1536, 512, false)]);
    assert_eq!(bench.driver.used(0), [], "nothing is done yet");
    bench.work();
    assert_eq!(bench.driver.used(0), [(head.into(), 1)]);
    assert_eq!((bench.status(0), bench.sectors(3, 4)), (0, data.clone()));

    bench.ask(1, 0, 3, &[(DATA + 0x4000, 1, true), (DATA + 0x4001, 2046, true), (DATA + 0x4fff, 1, true)]);
    bench.work();
    assert_eq!(bench.status(1), 0);
    let mut read = bench.driver.bytes(DATA + 0x4000, 2047);
    read.extend(bench.driver.bytes(DATA + 0x4fff, 1));
    assert_eq!(read, data);
    assert_eq!(bench.driver.interrupts(), [1, 1]);
}

#[test]
fn header_data_and_status_may_share_buffers() {
    let mut bench = Bench::new();
    let header = bench.header(0, 0, 5);
    // The header in two parts, and data and status in one buffer.
    bench.driver.offer(0, &[(header, 3, false), (header + 3, 13, false), (DATA, 513, true)]);
    bench.driver.kick(0);
    bench.work();
    assert_eq!(bench.driver.bytes(DATA, 512), bench.sectors(5, 1));
    assert_eq!(bench.driver.bytes(DATA + 512, 1), [0]);
}

#[test]
fn flush_name_zeros_and_discard() {
    let mut bench = Bench::new();
    bench.ask(0, 4, 0, &[]);
    bench.work();
    assert_eq!((bench.status(0), bench.store.0.lock().unwrap().1), (0, 1));
    bench.ask(1, 8, 0, &[(DATA, 20, true)]);
    bench.work();
    assert_eq!(bench.driver.bytes(DATA, 20), *b"d0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    let range = |first: u64, count: u32, flags: u32| {
        [&first.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat()
    };
    bench.driver.dma.write(DATA, &[range(2, 1, 1), range(9, 2, 0)].concat()).unwrap();
    bench.ask(2, 13, 0, &[(DATA, 32, false)]);
    bench.work();
    assert_eq!((bench.status(2), bench.sectors(2, 1), bench.sectors(9, 2)), (0, vec![0; 512], vec![0; 1024]));
    bench.driver.dma.write(DATA, &range(20, 1, 0)).unwrap();
    bench.ask(3, 11, 0, &[(DATA, 16, false)]);
    bench.work();
    assert_eq!((bench.status(3), bench.sectors(20, 1)), (0, vec![0xdd; 512]));
    bench.driver.dma.write(DATA, &range(20, 1, 1)).unwrap();
    bench.ask(4, 11, 0, &[(DATA, 16, false)]);
    bench.work();
    assert_eq!(bench.status(4), 2, "unmap means nothing for a discard");
}

#[test]
fn a_driver_without_flush_writes_through() {
    let mut bench = Bench::with(false, VERSION_1);
    bench.write(0, 1, DATA, 512);
    bench.work();
    assert_eq!((bench.status(0), bench.store.0.lock().unwrap().1), (0, 1));
}

#[test]
fn what_is_wrong_has_a_status_and_changes_nothing() {
    let mut bench = Bench::with(true, FEATURES);
    let before = bench.sectors(0, SECTORS);
    let wrong: [(u32, u64, Buffers<'_>, u8); 11] = [
        (0, SECTORS, &[(DATA, 512, true)], 1),
        (0, u64::MAX, &[(DATA, 512, true)], 1),
        (0, SECTORS - 1, &[(DATA, 1024, true)], 1),
        (0, 0, &[(DATA, 511, true)], 1),
        (0, 0, &[(DATA, 512, false)], 1),
        (1, 0, &[(DATA, 512, false)], 1),
        (1, 0, &[(DATA, 512, true)], 1),
        (8, 0, &[(DATA, 19, true)], 1),
        (13, 0, &[(DATA, 16, false)], 1),
        (0, 0, &[(MEMORY as u64 - 256, 512, true)], 1),
        (77, 0, &[], 2),
    ];
    for (slot, (kind, sector, data, status)) in wrong.into_iter().enumerate() {
        bench.ask(slot as u64, kind, sector, data);
        bench.work();
        assert_eq!(bench.status(slot as u64), status, "{kind} {sector} {data:?}");
    }
    assert_eq!(bench.sectors(0, SECTORS), before);
    assert_eq!(bench.heads().len(), 11);
}

#[test]
fn without_room_for_a_status_a_chain_goes_back_empty() {
    let mut bench = Bench::new();
    let header = bench.header(0, 0, 0);
    let head = bench.driver.offer(0, &[(header, 16, false)]);
    bench.driver.kick(0);
    assert_eq!(bench.driver.used(0), [(head.into(), 0)]);
}

#[test]
fn a_poisoned_buffer_fails_the_request() {
    let mut bench = Bench::new();
    bench.driver.poison.0.lock().unwrap().push(DATA + 0x240);
    let before = bench.sectors(0, SECTORS);
    bench.read(0, 0, DATA, 2048);
    bench.write(1, 0, DATA, 2048);
    bench.work();
    assert_eq!((bench.status(0), bench.status(1)), (1, 1));
    assert_eq!(bench.sectors(0, SECTORS), before);
    let met = bench.driver.poison.1.lock().unwrap().clone();
    assert_eq!(
        met.iter().map(|(_, _, line, write)| (*line, *write)).collect::<Vec<_>>(),
        [(DATA + 0x240, true), (DATA + 0x240, false)]
    );
}

#[test]
fn a_held_request_moves_nothing_until_it_is_released() {
    let mut bench = Bench::new();
    let fault = bench.arm(HOLD);
    let before = bench.sectors(4, 1);
    bench.driver.dma.write(DATA, &[0x55; 512]).unwrap();
    bench.write(0, 4, DATA, 512);
    bench.read(1, 7, DATA + 0x1000, 512);
    bench.work();
    assert_eq!((bench.heads(), bench.held()), (vec![], vec![1, 2]));
    assert_eq!((bench.sectors(4, 1), bench.status(0)), (before, 0xff));
    // What the driver writes meanwhile is what lands.
    bench.driver.dma.write(DATA, &[0x66; 512]).unwrap();
    bench.tick(3);
    assert_eq!(bench.held(), [1, 2]);
    bench.release(&[1], Release::Complete).unwrap();
    assert_eq!((bench.sectors(4, 1), bench.status(0), bench.held()), (vec![0x66; 512], 0, vec![2]));
    bench.release(&[2], Release::Complete).unwrap();
    assert_eq!(bench.driver.bytes(DATA + 0x1000, 512), bench.sectors(7, 1));
    assert_eq!(bench.release(&[2], Release::Complete), Err(ReleaseError::NotHeld(2)));
    let (after, how) = (Duration::from_secs(3), Release::Complete);
    assert_eq!(
        *bench.notes.0.lock().unwrap(),
        [
            (1, What::Held(Transfer::Release)),
            (2, What::Held(Transfer::Release)),
            (1, What::Released { how, after }),
            (1, What::Completed(Status::Ok)),
            (2, What::Released { how, after }),
            (2, What::Completed(Status::Ok)),
        ]
    );
    assert_eq!(bench.driver.function.device_mut().disarm(|armed| armed.taken == 2), [fault]);
}

#[test]
fn a_transfer_at_submission_lands_at_once() {
    let mut bench = Bench::new();
    bench.arm(Action::Hold(Transfer::Submission));
    bench.read(0, 7, DATA, 512);
    bench.work();
    assert_eq!(bench.driver.bytes(DATA, 512), bench.sectors(7, 1));
    assert_eq!((bench.heads(), bench.status(0), bench.held()), (vec![], 0xff, vec![1]));
    let tear = Release::Tear { bytes: 1, status: Status::IoError };
    assert_eq!(bench.release(&[1], tear), Err(ReleaseError::Transferred(1)));
    bench.release(&[1], Release::Fail(Status::Unsupported)).unwrap();
    assert_eq!((bench.status(0), bench.heads().len()), (2, 1));
}

#[test]
fn requests_fail_and_are_torn() {
    let mut bench = Bench::new();
    let before = bench.sectors(0, SECTORS);
    let on = |sector: u64| Pattern { sectors: Some(sector..sector + 1), ..Pattern::default() };
    bench.arm_for(on(1), Action::Fail(Status::IoError));
    bench.arm_for(on(2), Action::Tear { bytes: 100, status: Status::Ok });
    bench.driver.dma.write(DATA, &[0x77; 1024]).unwrap();
    bench.write(0, 1, DATA, 512);
    assert_eq!((bench.status(0), bench.heads().len()), (1, 1), "at once");
    bench.write(1, 2, DATA, 512);
    bench.work();
    assert_eq!(bench.status(1), 0);
    assert_eq!(bench.sectors(1, 1), before[512..1024]);
    assert_eq!(bench.sectors(2, 1)[..100], [0x77; 100]);
    assert_eq!(bench.sectors(2, 1)[100..], before[1124..1536]);
}

#[test]
fn patterns_count_what_they_are_about() {
    let mut bench = Bench::new();
    let pattern = Pattern { operation: Some(Operation::Read), persistent: true, ..Pattern::default() };
    let fault = Fault { pattern, skip: 1, count: Some(1), action: HOLD };
    bench.driver.function.device_mut().arm(fault).unwrap();
    let memory = [(0, DATA), (0, PMEM.start), (1, PMEM.start), (0, PMEM.end - 512), (0, PMEM.start)];
    for (slot, (kind, at)) in memory.into_iter().enumerate() {
        bench.ask(slot as u64, kind, slot as u64, &[(at, 512, kind == 0)]);
        bench.work();
        bench.heads();
    }
    assert_eq!(bench.held(), [4], "the second read into persistent memory, and no other");
    assert_eq!(bench.driver.function.device().faults(), []);
    let mut memory = bench.driver.function.device().held()[0].request.memory();
    assert_eq!(memory.pop().map(|segment| segment.address), Some(PMEM.end - 512));
}

#[test]
fn a_delay_ends_by_itself() {
    let mut bench = Bench::new();
    bench.arm(Action::Delay(Duration::from_secs(5), Transfer::Release));
    bench.read(0, 7, DATA, 512);
    bench.work();
    assert_eq!(bench.later.0.lock().unwrap().1, Some(Duration::from_secs(5)));
    bench.tick(4);
    assert_eq!(bench.status(0), 0xff);
    assert_eq!(bench.driver.function.device().held()[0].left, Some(Duration::from_secs(1)));
    bench.tick(1);
    assert_eq!((bench.status(0), bench.held()), (0, vec![]));
}

#[test]
fn reordered_requests_end_in_the_order_that_was_asked_for() {
    let mut bench = Bench::new();
    bench.arm(Action::Reorder { window: 2, order: Order::Reverse, patience: Duration::from_secs(9) });
    let first = bench.write(0, 1, DATA, 512);
    assert_eq!(bench.held(), [1]);
    let second = bench.write(1, 1, DATA + 512, 512);
    bench.perform(|jobs| jobs - 1);
    assert_eq!(bench.heads(), [u32::from(second), u32::from(first)]);
    assert_eq!(bench.sectors(1, 1), bench.driver.bytes(DATA, 512), "the first one was last");
    let third = bench.write(2, 1, DATA, 512);
    bench.tick(9);
    assert_eq!(bench.heads(), [u32::from(third)], "nobody else came");
}

#[test]
fn a_reset_forgets_what_is_held_and_nothing_of_it_moves() {
    let mut bench = Bench::new();
    let before = bench.sectors(0, SECTORS);
    bench.write(0, 4, DATA, 512);
    bench.arm(HOLD);
    bench.write(1, 5, DATA, 512);
    bench.read(2, 6, DATA + 0x1000, 512);
    bench.driver.put(0x14, &[0]);
    assert_eq!((bench.held(), bench.driver.function.device().in_flight()), (vec![], 0));
    // A worker had the first one in its hands.
    bench.work();
    assert_eq!(bench.sectors(0, SECTORS), before);
    assert_eq!(bench.release(&[2], Release::Complete), Err(ReleaseError::NotHeld(2)));
    let dropped =
        bench.notes.0.lock().unwrap().iter().filter(|(_, w)| matches!(w, What::Dropped { .. })).count();
    assert_eq!(dropped, 2);
}

#[test]
fn a_disk_that_departs_tells_of_each_request_and_moves_nothing_more() {
    let mut bench = Bench::new();
    let before = bench.sectors(0, SECTORS);
    bench.write(0, 4, DATA, 512);
    bench.arm(HOLD);
    bench.read(1, 5, DATA + 0x1000, 512);
    let memory = bench.driver.bytes(DATA, 0x2000);
    bench.hand.advance(Duration::from_secs(3));
    bench.driver.function.depart();
    let gone = What::Dropped { end: End::Departed, after: Duration::from_secs(3) };
    let told = bench
        .notes
        .0
        .lock()
        .unwrap()
        .iter()
        .filter(|(_, what)| *what == gone)
        .map(|(n, _)| *n)
        .collect::<Vec<_>>();
    assert_eq!(told, [1, 2], "the one that met no fault, too");
    assert_eq!(bench.driver.function.device().in_flight(), 0);
    // A worker had the first one in its hands.
    bench.work();
    assert_eq!(bench.sectors(0, SECTORS), before);
    assert_eq!(bench.driver.bytes(DATA, 0x2000), memory);
    assert_eq!((bench.status(0), bench.status(1)), (0xff, 0xff));
}

#[test]
fn a_queue_holds_no_more_than_it_has_entries() {
    let mut bench = Bench::new();
    bench.arm(HOLD);
    let header = bench.header(0, 4, 0);
    let head = bench.driver.offer(0, &[(header, 16, false), (STATUS, 1, true)]);
    // A driver that offers one chain over and over.
    const ENTRIES: usize = 8;
    for _ in 0..ENTRIES + 3 {
        bench.driver.make_available(0, head);
        bench.driver.kick(0);
    }
    assert_eq!(bench.held().len(), ENTRIES);
    let numbers = bench.held();
    bench.driver.function.device_mut().disarm(|_| true);
    bench.release(&numbers, Release::Complete).unwrap();
    assert_eq!(bench.driver.function.device().in_flight(), 0, "the others followed");
    assert_eq!(bench.store.0.lock().unwrap().1, ENTRIES + 4);
}

/// A model of holding: which requests are held, and in which order all have ended.
#[derive(Default)]
struct Model {
    held: Vec<u64>,
    ended: Vec<u64>,
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever is held and released in whatever order, requests end in the order of their releases, each once.
    #[test]
    fn releases_end_in_their_order(steps in prop::collection::vec((0u8..4, any::<u16>()), 1..60)) {
        let mut bench = Bench::new();
        bench.arm(HOLD);
        let (mut model, mut slots, mut free) = (Model::default(), Vec::new(), vec![0u64, 1]);
        let mut number = 0;
        for (step, pick) in steps {
            match step {
                0 | 1 => {
                    // Two requests of two descriptors have room in the driver's ring of eight at any time.
                    let Some(slot) = free.pop() else { continue };
                    number += 1;
                    bench.ask(slot, 4, 0, &[]);
                    slots.push((number, slot));
                    model.held.push(number);
                }
                2 => {
                    let mut all = model.held.clone();
                    Order::Random(pick.into()).arrange(&mut all);
                    bench.release(&all, Release::Complete).unwrap();
                    model.ended.extend(&all);
                    model.held.clear();
                }
                _ => {
                    if model.held.is_empty() { continue }
                    let index = usize::from(pick) % model.held.len();
                    let one = model.held.remove(index);
                    bench.release(&[one], Release::Fail(Status::IoError)).unwrap();
                    model.ended.push(one);
                }
            }
            for _ in bench.heads() {}
            slots.retain(|(number, slot)| {
                let ended = model.ended.contains(number);
                if ended { free.push(*slot); }
                !ended
            });
            prop_assert_eq!(bench.held(), model.held.clone());
        }
        let told: Vec<_> = bench.notes.0.lock().unwrap().iter()
            .filter(|(_, what)| matches!(what, What::Completed(_)))
            .map(|(number, _)| *number)
            .collect();
        prop_assert_eq!(told, model.ended);
    }

    /// Any bytes in any chain end in a status or in a device that needs a reset, and never outside the disk.
    #[test]
    fn any_chain_is_answered(
        chains in prop::collection::vec(
            prop::collection::vec((any::<u64>(), 0u32..0x3000, any::<bool>(), 0u8..4), 1..5),
            1..20,
        ),
        headers in prop::collection::vec((0u32..16, prop_oneof![0u64..80, any::<u64>()]), 20),
        faulty in any::<bool>(),
    ) {
        let mut bench = Bench::new();
        if faulty {
            bench.arm(Action::Reorder { window: 3, order: Order::Random(7), patience: Duration::from_secs(1) });
        }
        for (chain, (kind, sector)) in chains.into_iter().zip(headers) {
            let header = bench.header(0, kind, sector);
            let buffers: Vec<_> = chain
                .into_iter()
                .map(|(address, length, write, place)| match place {
                    0 => (header, 16, false),
                    1 => (STATUS, 1, true),
                    2 => (DATA + address % 0x1000, length, write),
                    _ => (address, length, write),
                })
                .collect();
            bench.driver.offer(0, &buffers);
            bench.driver.kick(0);
            bench.work();
            bench.tick(1);
            if bench.driver.status() & 64 != 0 {
                bench.driver.put(0x14, &[0]);
                bench = Bench::new();
            } else {
                prop_assert_eq!(bench.driver.function.device().in_flight(), 0);
            }
        }
    }

    /// Every order keeps every member.
    #[test]
    fn an_order_is_a_permutation(count in 0usize..200, seed in any::<u64>()) {
        let mut list: Vec<_> = (0..count).collect();
        Order::Random(seed).arrange(&mut list);
        list.sort_unstable();
        prop_assert!(list.into_iter().eq(0..count));
    }
}
