use std::sync::{Arc, Mutex};

use proptest::prelude::*;

use super::super::testing::{BUFFERS, Driver, EVENT_IDX, VERSION_1};
use super::*;
use crate::bus::Effects;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Seen {
    flushed: u64,
    held: u64,
    broken: bool,
}

struct Memory(Arc<Mutex<Seen>>);

impl Medium for Memory {
    fn flush(&mut self) -> bool {
        let mut seen = self.0.lock().unwrap();
        seen.flushed += u64::from(!seen.broken);
        !seen.broken
    }

    fn held(&mut self) {
        self.0.lock().unwrap().held += 1;
    }
}

fn device() -> (Driver<Pmem>, Arc<Mutex<Seen>>) {
    let seen = Arc::<Mutex<Seen>>::default();
    let mut driver = Driver::new(Pmem::new(0x1_4000_0000, 0x4000_0000, Box::new(Memory(seen.clone()))));
    driver.start(VERSION_1);
    (driver, seen)
}

const ANSWER: u64 = BUFFERS + 0x100;

/// Offers a request of type `kind`, with an answer that nobody has written.
fn offer(driver: &mut Driver<Pmem>, kind: u32) {
    driver.dma.write(BUFFERS, &kind.to_le_bytes()).unwrap();
    driver.dma.write(ANSWER, &[0xee; 4]).unwrap();
    driver.offer(0, &[(BUFFERS, 4, false), (ANSWER, 4, true)]);
}

fn answer(driver: &Driver<Pmem>) -> u32 {
    u32::from_le_bytes(driver.bytes(ANSWER, 4).try_into().unwrap())
}

#[test]
fn the_configuration_says_where_the_memory_is() {
    let (mut driver, _) = device();
    assert_eq!(driver.config_read::<4>(0), [0xf4, 0x1a, 0x5b, 0x10]);
    assert_eq!(u64::from_le_bytes(driver.get(0x2000)), 0x1_4000_0000);
    assert_eq!(u64::from_le_bytes(driver.get(0x2008)), 0x4000_0000);
    assert_eq!(u64::from_le_bytes(driver.get(0x2010)), 0);
}

#[test]
fn a_flush_is_carried_out_before_it_is_answered() {
    let (mut driver, seen) = device();
    offer(&mut driver, REQUEST_FLUSH);
    driver.kick(0);
    assert_eq!((seen.lock().unwrap().flushed, answer(&driver)), (1, DONE));
    assert_eq!(driver.used(0), [(0, 4)]);
    assert_eq!(driver.interrupts(), [1]);
    offer(&mut driver, 7);
    driver.kick(0);
    assert_eq!((seen.lock().unwrap().flushed, answer(&driver)), (1, FAILED), "another request is none");
}

#[test]
fn a_driver_that_notifies_only_when_it_is_asked_to_is_asked_after_each_flush() {
    let (mut driver, _) = device();
    driver.put(super::super::testing::STATUS, &[0]);
    driver.start(VERSION_1 | EVENT_IDX);
    for round in 1..4u16 {
        offer(&mut driver, REQUEST_FLUSH);
        driver.kick(0);
        // The available event of the used ring, behind its eight entries.
        let asked: u16 = driver.view().read_obj(Driver::<Pmem>::ring(0) + 0x2000 + 4 + 8 * 8).unwrap();
        assert_eq!(asked, round);
    }
}

#[test]
fn a_flush_that_fails_says_so() {
    let (mut driver, seen) = device();
    seen.lock().unwrap().broken = true;
    offer(&mut driver, REQUEST_FLUSH);
    driver.kick(0);
    assert_eq!(answer(&driver), FAILED);
    seen.lock().unwrap().broken = false;
    driver.function.device_mut().set_flushes(Flushes::Failed);
    offer(&mut driver, REQUEST_FLUSH);
    driver.kick(0);
    assert_eq!((answer(&driver), seen.lock().unwrap().flushed), (FAILED, 0));
    assert_eq!((driver.function.device().answered(), driver.function.device().failed()), (0, 2));
}

#[test]
fn a_flush_that_is_held_is_answered_when_it_is_released() {
    let (mut driver, seen) = device();
    driver.function.device_mut().set_flushes(Flushes::Held);
    for _ in 0..2 {
        offer(&mut driver, REQUEST_FLUSH);
        driver.kick(0);
    }
    assert!(driver.used(0).is_empty() && driver.interrupts().is_empty());
    assert_eq!(*seen.lock().unwrap(), Seen { held: 2, ..Seen::default() });
    assert!(driver.function.device().waiting());
    driver.function.device_mut().set_flushes(Flushes::Answered);
    let mut effects = Effects::new();
    driver.function.service(&mut effects);
    driver.run(effects);
    assert_eq!(driver.used(0).len(), 2);
    assert_eq!((seen.lock().unwrap().flushed, answer(&driver)), (2, DONE));
    assert!(!driver.function.device().waiting());
}

#[test]
fn a_reset_forgets_what_was_held() {
    let (mut driver, seen) = device();
    driver.function.device_mut().set_flushes(Flushes::Held);
    offer(&mut driver, REQUEST_FLUSH);
    driver.kick(0);
    driver.put(super::super::testing::STATUS, &[0]);
    assert!(!driver.function.device().waiting());
    driver.function.device_mut().set_flushes(Flushes::Answered);
    let mut effects = Effects::new();
    driver.function.service(&mut effects);
    driver.run(effects);
    assert_eq!((driver.used(0), seen.lock().unwrap().flushed), (vec![], 0));
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
        let (mut driver, seen) = device();
        let mut expected = 0;
        for mut buffers in chains {
            buffers.sort_by_key(|buffer| buffer.1);
            let place = |outside: bool| if outside { 1 << 40 } else { BUFFERS + 0x800 };
            let buffers: Vec<_> =
                buffers.into_iter().map(|(length, write, outside)| (place(outside), length, write)).collect();
            driver.offer(0, &buffers);
            driver.kick(0);
            expected += 1;
            let used = driver.used(0);
            prop_assert_eq!(used.len(), 1);
            let room: u32 = buffers.iter().filter(|buffer| buffer.2).map(|buffer| buffer.1).sum();
            prop_assert!(used[0].1 == 0 || used[0].1 == 4 && room >= 4, "{:?} of {:?}", used, buffers);
        }
        prop_assert!(seen.lock().unwrap().flushed <= expected);
        prop_assert_eq!(driver.status() & super::super::testing::NEEDS_RESET, 0);
    }
}
