use std::sync::{Arc, Mutex};

use proptest::prelude::*;

use super::super::testing::{BUFFERS, Driver, EVENT_IDX, Later, STATUS, VERSION_1};
use super::*;
use crate::bus::Effects;
use crate::clock::testing::Hand;

#[derive(Default)]
struct Notes(Mutex<Vec<(u64, u64, What)>>);

impl Witness for Notes {
    fn tell(&self, number: u64, fault: u64, what: What) {
        self.0.lock().unwrap().push((number, fault, what));
    }
}

struct Bench {
    driver: Driver<Pmem>,
    later: Later<Job>,
    notes: Arc<Notes>,
    hand: Hand,
    /// Flushes that were carried out.
    flushed: u64,
}

const ANSWER: u64 = BUFFERS + 0x100;
const HOLD: Fault = Fault { pattern: (), skip: 0, count: None, action: Action::Hold };
const SECOND: Duration = Duration::from_secs(1);

impl Bench {
    fn new() -> Self {
        let (later, notes, hand) = (Later::default(), Arc::new(Notes::default()), Hand::default());
        let mut driver = Driver::new(Pmem::new(Parts {
            start: 0x1_4000_0000,
            size: 0x4000_0000,
            backend: Box::new(later.clone()),
            witness: notes.clone(),
            clock: hand.clock(),
        }));
        driver.start(VERSION_1);
        Self { driver, later, notes, hand, flushed: 0 }
    }

    /// Offers a request of type `kind`, with an answer that nobody has written.
    fn offer(&mut self, kind: u32) {
        self.driver.dma.write(BUFFERS, &kind.to_le_bytes()).unwrap();
        self.driver.dma.write(ANSWER, &[0xee; 4]).unwrap();
        self.driver.offer(0, &[(BUFFERS, 4, false), (ANSWER, 4, true)]);
        self.driver.kick(0);
    }

    fn answer(&self) -> u32 {
        u32::from_le_bytes(self.driver.bytes(ANSWER, 4).try_into().unwrap())
    }

    /// Carries out what there is to be carried out.
    fn work(&mut self, durable: bool) {
        let jobs = std::mem::take(&mut self.later.0.lock().unwrap().0);
        for job in jobs {
            self.flushed += 1;
            let mut effects = Effects::new();
            self.driver.function.finish(job.done(durable), &mut effects);
            self.driver.run(effects);
        }
    }

    fn arm(&mut self, fault: Fault) {
        self.driver.function.device_mut().arm(fault).unwrap();
    }

    fn held(&self) -> Vec<u64> {
        self.driver.function.device().held().iter().map(|held| held.number).collect()
    }

    fn release(&mut self, numbers: &[u64], fail: bool) -> Result<(), u64> {
        self.driver.function.device_mut().release(numbers, fail)?;
        let mut effects = Effects::new();
        self.driver.function.service(&mut effects);
        self.driver.run(effects);
        Ok(())
    }

    fn told(&self) -> Vec<(u64, u64, What)> {
        std::mem::take(&mut *self.notes.0.lock().unwrap())
    }
}

#[test]
fn the_configuration_says_where_the_memory_is() {
    let mut driver = Bench::new().driver;
    assert_eq!(driver.config_read::<4>(0), [0xf4, 0x1a, 0x5b, 0x10]);
    assert_eq!(u64::from_le_bytes(driver.get(0x2000)), 0x1_4000_0000);
    assert_eq!(u64::from_le_bytes(driver.get(0x2008)), 0x4000_0000);
    assert_eq!(u64::from_le_bytes(driver.get(0x2010)), 0);
}

#[test]
fn a_flush_is_carried_out_before_it_is_answered() {
    let mut bench = Bench::new();
    bench.offer(REQUEST_FLUSH);
    assert_eq!((bench.answer(), bench.driver.used(0)), (0xeeee_eeee, vec![]));
    bench.work(true);
    assert_eq!((bench.flushed, bench.answer()), (1, DONE));
    assert_eq!(bench.driver.used(0), [(0, 4)]);
    assert_eq!(bench.driver.interrupts(), [1]);
    bench.offer(REQUEST_FLUSH);
    bench.work(false);
    assert_eq!(bench.answer(), FAILED, "the host could not");
    bench.offer(7);
    bench.work(true);
    assert_eq!((bench.flushed, bench.answer()), (2, FAILED), "another request is none");
    assert_eq!(bench.told(), [], "none of them has met a fault");
}

#[test]
fn a_driver_that_notifies_only_when_it_is_asked_to_is_asked_after_each_flush() {
    let mut bench = Bench::new();
    bench.driver.put(STATUS, &[0]);
    bench.driver.start(VERSION_1 | EVENT_IDX);
    for round in 1..4u16 {
        bench.offer(REQUEST_FLUSH);
        bench.work(true);
        // The available event of the used ring, behind its eight entries.
        let asked: u16 = bench.driver.view().read_obj(Driver::<Pmem>::ring(0) + 0x2000 + 4 + 8 * 8).unwrap();
        assert_eq!(asked, round);
    }
}

#[test]
fn a_flush_is_held_until_it_is_released_and_carried_out_then() {
    let mut bench = Bench::new();
    bench.arm(Fault { skip: 1, count: Some(2), ..HOLD });
    for _ in 0..4 {
        bench.offer(REQUEST_FLUSH);
    }
    assert_eq!((bench.held(), bench.driver.function.device().in_flight()), (vec![2, 3], 4));
    assert!(bench.driver.function.device().faults().is_empty(), "it has had its number");
    bench.work(true);
    assert_eq!((bench.flushed, bench.driver.used(0).len()), (2, 2));
    bench.hand.advance(SECOND);
    assert_eq!(bench.release(&[3, 4], false), Err(4));
    bench.release(&[3], false).unwrap();
    assert_eq!(bench.driver.used(0).len(), 0, "it is still to be carried out");
    bench.work(true);
    assert_eq!((bench.driver.used(0).len(), bench.answer()), (1, DONE));
    bench.release(&[2], true).unwrap();
    assert_eq!((bench.flushed, bench.answer()), (3, FAILED), "nothing is made durable for it");
    assert_eq!(
        bench.told(),
        [
            (2, 1, What::Held),
            (3, 1, What::Held),
            (3, 1, What::Released { fail: false, after: SECOND }),
            (3, 1, What::Answered(true)),
            (2, 1, What::Released { fail: true, after: SECOND }),
            (2, 1, What::Answered(false)),
        ]
    );
}

#[test]
fn a_flush_is_delayed_or_fails() {
    let mut bench = Bench::new();
    bench.arm(Fault { count: Some(1), action: Action::Delay(2 * SECOND), ..HOLD });
    bench.arm(Fault { count: Some(1), action: Action::Fail, ..HOLD });
    bench.offer(REQUEST_FLUSH);
    assert_eq!(bench.later.0.lock().unwrap().1, Some(2 * SECOND));
    bench.offer(REQUEST_FLUSH);
    assert_eq!((bench.driver.used(0).len(), bench.answer()), (1, FAILED));
    for (wait, held) in [(SECOND, 1), (SECOND, 0)] {
        bench.hand.advance(wait);
        bench.driver.function.tick(&mut Effects::new());
        assert_eq!(bench.held().len(), held);
    }
    bench.work(true);
    assert_eq!((bench.driver.used(0).len(), bench.answer(), bench.flushed), (1, DONE, 1));
}

#[test]
fn a_reset_and_a_departure_forget_what_the_driver_waits_for() {
    let mut bench = Bench::new();
    bench.offer(REQUEST_FLUSH);
    bench.arm(HOLD);
    bench.offer(REQUEST_FLUSH);
    bench.driver.put(STATUS, &[0]);
    assert_eq!(bench.driver.function.device().in_flight(), 0);
    bench.work(true);
    assert_eq!((bench.driver.used(0), bench.release(&[2], false)), (vec![], Err(2)));
    let after = Duration::ZERO;
    assert_eq!(bench.told(), [(2, 1, What::Held), (2, 1, What::Reset { after })]);

    let mut bench = Bench::new();
    bench.offer(REQUEST_FLUSH);
    bench.arm(HOLD);
    bench.offer(REQUEST_FLUSH);
    bench.driver.function.depart();
    bench.work(true);
    assert_eq!(bench.answer(), 0xeeee_eeee);
    let gone = What::Departed { after };
    assert_eq!(bench.told(), [(2, 1, What::Held), (1, 0, gone), (2, 1, gone)]);
}

#[test]
fn a_driver_that_offers_one_chain_over_and_over_makes_no_list_grow() {
    let mut bench = Bench::new();
    bench.arm(HOLD);
    bench.offer(REQUEST_FLUSH);
    const ENTRIES: usize = 8;
    for _ in 0..ENTRIES + 3 {
        bench.driver.make_available(0, 0);
        bench.driver.kick(0);
    }
    assert_eq!(bench.held().len(), ENTRIES);
    bench.driver.function.device_mut().disarm(|_| true);
    let held = bench.held();
    bench.release(&held, true).unwrap();
    bench.work(true);
    assert_eq!(bench.driver.function.device().in_flight(), 0, "the others followed");
    assert_eq!(bench.flushed, 4);
}

proptest! {
    /// Whatever buffers a driver gives, each chain comes back once, and only words it may write are written.
    #[test]
    fn any_chain_is_answered(
        chains in prop::collection::vec(
            prop::collection::vec((0u32..12, any::<bool>(), any::<bool>()), 1..4),
            1..3,
        ),
    ) {
        let mut bench = Bench::new();
        let mut expected = 0;
        for mut buffers in chains {
            buffers.sort_by_key(|buffer| buffer.1);
            let place = |outside: bool| if outside { 1 << 40 } else { BUFFERS + 0x800 };
            let buffers: Vec<_> =
                buffers.into_iter().map(|(length, write, outside)| (place(outside), length, write)).collect();
            bench.driver.offer(0, &buffers);
            bench.driver.kick(0);
            bench.work(true);
            expected += 1;
            let used = bench.driver.used(0);
            prop_assert_eq!(used.len(), 1);
            let room: u32 = buffers.iter().filter(|buffer| buffer.2).map(|buffer| buffer.1).sum();
            prop_assert!(used[0].1 == 0 || used[0].1 == 4 && room >= 4, "{:?} of {:?}", used, buffers);
        }
        prop_assert!(bench.flushed <= expected);
        prop_assert_eq!(bench.driver.status() & super::super::testing::NEEDS_RESET, 0);
    }
}
