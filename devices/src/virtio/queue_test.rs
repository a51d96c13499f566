use proptest::prelude::*;

use super::super::testing::{
    BUFFERS, Driver, EVENT_IDX, Echo, INDIRECT, IS_INDIRECT, MEMORY, NEEDS_RESET, NEXT, STATUS, VERSION_1,
    WRITE,
};

fn started() -> Driver<Echo> {
    let mut driver = Driver::new(Echo::default());
    driver.start(VERSION_1 | INDIRECT);
    driver.interrupts();
    driver
}

/// The device must be broken, say so, and work again after a reset.
fn expect_needs_reset(mut driver: Driver<Echo>) {
    driver.kick(0);
    assert_eq!(driver.status() & NEEDS_RESET, NEEDS_RESET);
    assert_eq!(driver.interrupts(), [0], "the configuration vector");
    driver.kick(0);
    assert!(driver.interrupts().is_empty());
    driver.put(STATUS, &[0]);
    assert_eq!(driver.status(), 0);
}

#[test]
fn data_goes_through_and_an_interrupt_follows() {
    let mut driver = started();
    driver.dma.write(BUFFERS, b"hello, device").unwrap();
    let out = [(BUFFERS, 5, false), (BUFFERS + 5, 8, false)];
    let back = [(BUFFERS + 0x1000, 3, true), (BUFFERS + 0x2000, 20, true)];
    let head = driver.offer(0, &[out, back].concat());
    driver.kick(0);
    assert_eq!(driver.used(0), [(head.into(), 13)]);
    assert_eq!(driver.bytes(BUFFERS + 0x1000, 3), b"hel");
    assert_eq!(driver.bytes(BUFFERS + 0x2000, 10), b"lo, device");
    assert_eq!(driver.interrupts(), [1]);
}

#[test]
fn indirect_tables_are_followed() {
    let mut driver = started();
    driver.dma.write(BUFFERS, b"abcd").unwrap();
    let table = BUFFERS + 0x8000;
    driver.descriptor(table, 0, BUFFERS, 4, NEXT, 1);
    driver.descriptor(table, 1, BUFFERS + 0x1000, 4, WRITE, 0);
    driver.descriptor(Driver::<Echo>::ring(0), 3, table, 32, IS_INDIRECT, 0);
    driver.make_available(0, 3);
    driver.kick(0);
    assert_eq!(driver.used(0), [(3, 4)]);
    assert_eq!(driver.bytes(BUFFERS + 0x1000, 4), b"abcd");
}

#[test]
fn many_chains_take_several_rounds() {
    let mut driver = started();
    for _ in 0..8 {
        driver.offer(0, &[(BUFFERS, 1, false)]);
    }
    assert!(driver.kick(0) > 1);
    assert_eq!(driver.used(0).len(), 8);
}

#[test]
fn unreachable_buffers_complete_empty() {
    for address in [MEMORY as u64, MEMORY as u64 - 2, u64::MAX - 1, 1 << 52] {
        let mut driver = started();
        let head = driver.offer(0, &[(address, 4, false), (BUFFERS, 4, true)]);
        driver.kick(0);
        assert_eq!(driver.used(0), [(head.into(), 0)]);
        let head = driver.offer(0, &[(BUFFERS, 4, false), (address, 4, true)]);
        driver.kick(0);
        assert_eq!(driver.used(0), [(head.into(), 0)]);
        assert_eq!(driver.status(), 0xf);
    }
}

#[test]
fn poisoned_buffers_complete_empty_and_poisoned_rings_break_the_device() {
    let mut driver = started();
    driver.poison.0.lock().unwrap().push(BUFFERS);
    let head = driver.offer(0, &[(BUFFERS, 4, false), (BUFFERS + 0x1000, 4, true)]);
    driver.kick(0);
    assert_eq!(driver.used(0), [(head.into(), 0)]);
    driver.interrupts();
    driver.poison.0.lock().unwrap().push(Driver::<Echo>::ring(0) + 0x1000);
    driver.kick(0);
    assert_eq!(driver.status() & NEEDS_RESET, NEEDS_RESET);
    driver.poison.0.lock().unwrap().clear();
    expect_needs_reset_already(driver);
}

fn expect_needs_reset_already(mut driver: Driver<Echo>) {
    assert_eq!(driver.interrupts(), [0]);
    driver.put(STATUS, &[0]);
    driver.start(VERSION_1);
    assert_eq!(driver.status(), 0xf);
}

#[test]
fn zero_length_buffers_are_fine() {
    let mut driver = started();
    let head = driver.offer(0, &[(0, 0, false), (u64::MAX, 0, true)]);
    driver.kick(0);
    assert_eq!(driver.used(0), [(head.into(), 0)]);
    assert_eq!(driver.status(), 0xf);
}

#[test]
fn a_looping_chain_breaks_the_device() {
    let driver = started();
    driver.descriptor(Driver::<Echo>::ring(0), 0, BUFFERS, 4, NEXT, 1);
    driver.descriptor(Driver::<Echo>::ring(0), 1, BUFFERS, 4, NEXT, 0);
    driver.make_available(0, 0);
    expect_needs_reset(driver);
}

#[test]
fn indexes_outside_the_table_break_the_device() {
    let driver = started();
    driver.make_available(0, 8);
    expect_needs_reset(driver);
    let driver = started();
    driver.descriptor(Driver::<Echo>::ring(0), 0, BUFFERS, 4, NEXT, 0xffff);
    driver.make_available(0, 0);
    expect_needs_reset(driver);
}

#[test]
fn a_readable_buffer_behind_a_writable_one_breaks_the_device() {
    let mut driver = started();
    driver.offer(0, &[(BUFFERS, 4, true), (BUFFERS, 4, false)]);
    expect_needs_reset(driver);
}

#[test]
fn an_available_index_too_far_ahead_breaks_the_device() {
    let driver = started();
    driver.view().write_obj(Driver::<Echo>::ring(0) + 0x1002, 9u16).unwrap();
    expect_needs_reset(driver);
}

#[test]
fn wrong_indirect_tables_break_the_device() {
    let ring = Driver::<Echo>::ring(0);
    let table = BUFFERS + 0x8000;
    for (address, length) in
        [(table, 0), (table, 8), (table, 17), (table, 16 * 0x1_0000), (MEMORY as u64, 16)]
    {
        let driver = started();
        driver.descriptor(ring, 0, address, length, IS_INDIRECT, 0);
        driver.make_available(0, 0);
        expect_needs_reset(driver);
    }
    let driver = started();
    driver.descriptor(table, 0, table, 16, IS_INDIRECT, 0);
    driver.descriptor(ring, 0, table, 16, IS_INDIRECT, 0);
    driver.make_available(0, 0);
    expect_needs_reset(driver);
    // A table whose one descriptor names itself.
    let driver = started();
    driver.descriptor(table, 0, BUFFERS, 1, NEXT, 0);
    driver.descriptor(ring, 0, table, 16 * 0xffff, IS_INDIRECT, 0);
    driver.make_available(0, 0);
    expect_needs_reset(driver);
}

#[test]
fn event_index_holds_interrupts_back() {
    let mut driver = Driver::new(Echo::default());
    driver.start(VERSION_1 | EVENT_IDX);
    driver.interrupts();
    // used_event = 1: an interrupt is wanted when the second chain is done.
    driver.view().write_obj(Driver::<Echo>::ring(0) + 0x1000 + 4 + 16, 1u16).unwrap();
    driver.offer(0, &[(BUFFERS, 1, false)]);
    driver.kick(0);
    assert!(driver.interrupts().is_empty());
    driver.offer(0, &[(BUFFERS, 1, false)]);
    driver.kick(0);
    assert_eq!(driver.interrupts(), [1]);
    // The device asks to be notified of the third chain: avail_event = 2.
    let avail_event: u16 = driver.view().read_obj(Driver::<Echo>::ring(0) + 0x2000 + 4 + 64).unwrap();
    assert_eq!(avail_event, 2);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Whatever lies in the rings: the device ends, and is either running or needs a reset.
    #[test]
    fn garbage_rings_end_in_a_defined_state(
        descriptors in prop::collection::vec(
            (
                prop_oneof![0u64..MEMORY as u64, any::<u64>()],
                prop_oneof![0u32..0x1000, any::<u32>()],
                0u16..8,
                prop_oneof![0u16..9, any::<u16>()],
            ),
            24,
        ),
        heads in prop::collection::vec(prop_oneof![0u16..9, any::<u16>()], 8),
        index in prop_oneof![0u16..10, any::<u16>()],
        poison in prop::option::of(0u64..MEMORY as u64 / 64),
    ) {
        let mut driver = started();
        let ring = Driver::<Echo>::ring(0);
        for (at, &(address, length, flags, next)) in descriptors.iter().enumerate() {
            // Eight in the table, the rest where an indirect table may be.
            let table = if at < 8 { ring } else { BUFFERS };
            let address = if flags & IS_INDIRECT != 0 && address % 2 == 0 { BUFFERS } else { address };
            let length = if flags & IS_INDIRECT != 0 && length % 2 == 0 { length / 16 % 20 * 16 } else { length };
            driver.descriptor(table, at as u16 % 16, address, length, flags, next);
        }
        for (at, &head) in heads.iter().enumerate() {
            driver.view().write_obj(ring + 0x1004 + 2 * at as u64, head).unwrap();
        }
        driver.view().write_obj(ring + 0x1002, index).unwrap();
        driver.poison.0.lock().unwrap().extend(poison.map(|line| line * 64));
        driver.kick(0);
        driver.kick(1);
        driver.poison.0.lock().unwrap().clear();
        let status = driver.status();
        prop_assert!(status == 0xf || status == 0xf | NEEDS_RESET, "{:#x}", status);
        driver.put(STATUS, &[0]);
        prop_assert_eq!(driver.status(), 0);
    }
}
