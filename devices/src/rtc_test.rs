use proptest::prelude::*;

use super::*;
use crate::clock::testing::Hand;

/// 2026-11-20 21:43:12 UTC, a Friday.
const NOW: u64 = 1_795_210_992;

fn get(rtc: &mut Rtc, index: u8) -> u8 {
    let mut data = [0];
    put_index(rtc, index);
    rtc.read(1, &mut data);
    data[0]
}

fn put_index(rtc: &mut Rtc, index: u8) {
    rtc.write(0, &[index], &mut Effects::new());
}

fn put(rtc: &mut Rtc, index: u8, value: u8) {
    put_index(rtc, index);
    rtc.write(1, &[value], &mut Effects::new());
}

fn time(rtc: &mut Rtc) -> [u8; 8] {
    [SECONDS, MINUTES, HOURS, DAY_OF_WEEK, DAY_OF_MONTH, MONTH, YEAR, CENTURY].map(|index| get(rtc, index))
}

fn rtc() -> (Rtc, Hand) {
    let hand = Hand::at(NOW);
    (Rtc::new(hand.clock()), hand)
}

/// What Linux does to set the time: `mc146818_set_time` in drivers/rtc/rtc-mc146818-lib.c.
fn linux_sets(rtc: &mut Rtc, bcd: [u8; 7]) {
    let control = get(rtc, REGISTER_B);
    put(rtc, REGISTER_B, control | B_SET);
    let select = get(rtc, REGISTER_A);
    put(rtc, REGISTER_A, select | 0x70);
    for (index, value) in [YEAR, MONTH, DAY_OF_MONTH, HOURS, MINUTES, SECONDS, CENTURY].into_iter().zip(bcd) {
        put(rtc, index, value);
    }
    put(rtc, REGISTER_B, control);
    put(rtc, REGISTER_A, select);
}

#[test]
fn time_reads_in_bcd_and_24_hours() {
    let (mut rtc, _) = rtc();
    assert_eq!(time(&mut rtc), [0x12, 0x43, 0x21, 6, 0x20, 0x11, 0x26, 0x20]);
}

#[test]
fn registers_are_as_linux_wants_them_at_probe() {
    let (mut rtc, hand) = rtc();
    assert_eq!(get(&mut rtc, REGISTER_A) & A_UPDATE_IN_PROGRESS, 0);
    assert_eq!(get(&mut rtc, REGISTER_B) & (B_24_HOURS | B_BINARY), B_24_HOURS);
    assert_eq!(get(&mut rtc, REGISTER_D), D_VALID);
    // cmos_do_probe sets the periodic rate and disables the interrupts, reading register C.
    put(&mut rtc, REGISTER_A, 0x26);
    put(&mut rtc, REGISTER_B, 0x02);
    assert_eq!(get(&mut rtc, REGISTER_C), 0);
    hand.advance(Duration::from_secs(1));
    assert_eq!(get(&mut rtc, REGISTER_A), 0x26);
    put(&mut rtc, REGISTER_A, 0xA6);
    assert_eq!(get(&mut rtc, REGISTER_A), 0x26, "the guest cannot set UIP");
}

#[test]
fn time_follows_the_clock_and_stands_still_with_it() {
    let (mut rtc, hand) = rtc();
    hand.advance(Duration::from_millis(999));
    assert_eq!(get(&mut rtc, SECONDS), 0x12);
    hand.advance(Duration::from_millis(1));
    assert_eq!(get(&mut rtc, SECONDS), 0x13);
    hand.set(Duration::from_secs(951_782_399));
    assert_eq!(time(&mut rtc), [0x59, 0x59, 0x23, 2, 0x28, 0x02, 0x00, 0x20]);
    hand.advance(Duration::from_secs(1));
    assert_eq!(time(&mut rtc), [0, 0, 0, 3, 0x29, 0x02, 0x00, 0x20], "2000 was a leap year");
}

#[test]
fn linux_sets_the_time() {
    let (mut rtc, hand) = rtc();
    linux_sets(&mut rtc, [0x99, 0x12, 0x31, 0x23, 0x59, 0x58, 0x19]);
    assert_eq!(time(&mut rtc), [0x58, 0x59, 0x23, 6, 0x31, 0x12, 0x99, 0x19]);
    // The first second ends half a second after the divider is released.
    hand.advance(Duration::from_millis(500));
    assert_eq!(get(&mut rtc, SECONDS), 0x59);
    hand.advance(Duration::from_secs(1));
    assert_eq!(time(&mut rtc), [0, 0, 0, 7, 1, 1, 0, 0x20]);
}

#[test]
fn time_stands_while_it_is_set() {
    let (mut rtc, hand) = rtc();
    put(&mut rtc, REGISTER_B, B_24_HOURS | B_SET);
    hand.advance(Duration::from_secs(100));
    assert_eq!(get(&mut rtc, SECONDS), 0x12);
    put(&mut rtc, MINUTES, 0x07);
    put(&mut rtc, REGISTER_B, B_24_HOURS);
    assert_eq!((get(&mut rtc, MINUTES), get(&mut rtc, SECONDS)), (0x07, 0x12));
    put(&mut rtc, HOURS, 0x01);
    assert_eq!(get(&mut rtc, HOURS), 0x01, "a running clock can be set too");
}

#[test]
fn binary_and_12_hours_are_understood() {
    let (mut rtc, hand) = rtc();
    put(&mut rtc, REGISTER_B, B_24_HOURS | B_BINARY);
    assert_eq!(time(&mut rtc), [12, 43, 21, 6, 20, 11, 26, 20]);
    put(&mut rtc, REGISTER_B, 0);
    assert_eq!(get(&mut rtc, HOURS), HOURS_PM | 0x09);
    hand.set(Duration::from_secs(86_400));
    assert_eq!(get(&mut rtc, HOURS), 0x12, "midnight");
    put(&mut rtc, HOURS, HOURS_PM | 0x12);
    put(&mut rtc, REGISTER_B, B_24_HOURS);
    assert_eq!(get(&mut rtc, HOURS), 0x12, "noon");
}

#[test]
fn the_update_flag_can_be_polled() {
    let (mut rtc, hand) = rtc();
    hand.advance(Duration::from_secs(1));
    assert_eq!(get(&mut rtc, REGISTER_C), C_UPDATE_ENDED);
    assert_eq!(get(&mut rtc, REGISTER_C), 0);
    put(&mut rtc, REGISTER_B, B_24_HOURS | B_UPDATE_INTERRUPT);
    hand.advance(Duration::from_secs(1));
    assert_eq!(get(&mut rtc, REGISTER_C), C_UPDATE_ENDED | C_INTERRUPT);
}

#[test]
fn nvram_and_alarm_keep_their_bytes() {
    let (mut rtc, _) = rtc();
    for index in [1, 3, 5, 0x0E, 0x0F, 0x31, 0x33, 0x7F] {
        put(&mut rtc, index, index ^ 0x5A);
    }
    for index in [1, 3, 5, 0x0E, 0x0F, 0x31, 0x33, 0x7F] {
        assert_eq!(get(&mut rtc, index), index ^ 0x5A);
        assert_eq!(get(&mut rtc, index | 0x80), index ^ 0x5A, "bit 7 is the NMI mask");
    }
}

#[test]
fn a_word_reaches_index_and_data() {
    let (mut rtc, _) = rtc();
    let mut data = [0; 2];
    rtc.write(0, &[0x40, 0x77], &mut Effects::new());
    rtc.read(0, &mut data);
    assert_eq!(data, [0xFF, 0x77]);
}

proptest! {
    #[test]
    fn any_access_at_any_time_is_defined(
        accesses in prop::collection::vec((0u64..3, prop::collection::vec(any::<u8>(), 1..=8), any::<bool>(), any::<u64>()), 0..64),
    ) {
        let hand = Hand::default();
        let mut rtc = Rtc::new(hand.clock());
        for (offset, mut data, is_write, now) in accesses {
            hand.set(Duration::from_nanos(now) * (now as u32 % 1000));
            if is_write {
                rtc.write(offset, &data, &mut Effects::new());
            } else {
                rtc.read(offset, &mut data);
            }
        }
        hand.set(Duration::MAX);
        time(&mut rtc);
    }
}
