use super::super::testing::{Driver, EVENT_IDX, Echo, INDIRECT, NEEDS_RESET, STATUS, VERSION_1};
use super::*;

#[test]
fn features_are_offered_in_halves() {
    let mut driver = Driver::new(Echo::default());
    let mut offered = 0;
    for half in 0..2u32 {
        driver.put(0, &half.to_le_bytes());
        offered |= u64::from(u32::from_le_bytes(driver.get(4))) << (32 * half);
    }
    assert_eq!(offered, VERSION_1 | INDIRECT | EVENT_IDX | 1 << 5);
    driver.put(0, &2u32.to_le_bytes());
    assert_eq!(driver.get::<4>(4), [0; 4]);
}

#[test]
fn features_ok_stands_only_for_acceptable_features() {
    for (features, accepted) in [
        (VERSION_1, true),
        (VERSION_1 | INDIRECT | EVENT_IDX | 1 << 5, true),
        (0, false),
        (1 << 5, false),
        (VERSION_1 | 1 << 6, false),
        (VERSION_1 | 1 << 40, false),
    ] {
        let mut driver = Driver::new(Echo::default());
        assert_eq!(driver.negotiate(features), accepted, "{features:#x}");
        driver.put(STATUS, &[0xf]);
        assert_eq!(driver.status() & DRIVER_OK != 0, accepted);
        assert_eq!(driver.function.device().active.is_some(), accepted);
    }
}

#[test]
fn features_are_fixed_after_features_ok() {
    let mut driver = Driver::new(Echo::default());
    assert!(driver.negotiate(VERSION_1 | 1 << 5));
    driver.put(0x08, &[0; 4]);
    driver.put(0x0c, &[0; 4]);
    driver.put(STATUS, &[0xf]);
    assert_eq!(driver.function.device().active, Some(VERSION_1 | 1 << 5));
}

#[test]
fn features_beyond_the_second_word_are_refused() {
    let mut driver = Driver::new(Echo::default());
    for (half, bits) in [(1u32, 1u32), (2, 1)] {
        driver.put(0x08, &half.to_le_bytes());
        driver.put(0x0c, &bits.to_le_bytes());
    }
    driver.put(STATUS, &[0xb]);
    assert_eq!(driver.status(), 3);
}

#[test]
fn status_bits_are_only_added_and_zero_resets() {
    let mut driver = Driver::new(Echo::default());
    driver.start(VERSION_1);
    driver.put(STATUS, &[1]);
    assert_eq!(driver.status(), 0xf);
    driver.put(STATUS, &[0]);
    assert_eq!(driver.status(), 0);
    assert_eq!(driver.function.device().active, None);
    assert_eq!(driver.get::<2>(0x1c), [0, 0], "queues are disabled");
    driver.start(VERSION_1);
}

#[test]
fn a_queue_that_cannot_work_breaks_the_device() {
    let cases: [(u64, &[u8]); 4] = [
        (0x24, &[0xff; 4]),                  // descriptors far outside memory
        (0x20, &0x10_0008u32.to_le_bytes()), // misaligned descriptors
        (0x28, &0x3f_fffeu32.to_le_bytes()), // available ring over the end
        (0x30, &[0, 0, 0x80, 0]),            // used ring outside
    ];
    for (offset, data) in cases {
        let mut driver = Driver::new(Echo::default());
        assert!(driver.negotiate(VERSION_1));
        driver.setup(1);
        driver.put(0x16, &[0, 0]);
        driver.put(0x20, &0x10_0000u32.to_le_bytes());
        driver.put(0x28, &0x10_1000u32.to_le_bytes());
        driver.put(0x30, &0x10_2000u32.to_le_bytes());
        driver.put(offset, data);
        driver.put(0x1c, &[1, 0]);
        assert_eq!(driver.get::<2>(0x1c), [0, 0]);
        assert_eq!(driver.status() & NEEDS_RESET, NEEDS_RESET, "{offset:#x}");
        driver.put(STATUS, &[0]);
        driver.start(VERSION_1);
    }
}

#[test]
fn queue_registers_keep_to_the_rules() {
    let mut driver = Driver::new(Echo::default());
    driver.put(0x16, &[0, 0]);
    driver.put(0x1c, &[1, 0]);
    assert_eq!(driver.get::<2>(0x1c), [0, 0], "not before FEATURES_OK");
    for bad in [0u16, 3, 32, 0x8000] {
        driver.put(0x18, &bad.to_le_bytes());
        assert_eq!(driver.get::<2>(0x18), [16, 0]);
    }
    driver.put(0x1a, &[9, 0]);
    assert_eq!(driver.get::<2>(0x1a), [0xff, 0xff], "no such vector");
    driver.put(0x10, &[3, 0]);
    assert_eq!(driver.get::<2>(0x10), [0xff, 0xff], "no such vector");
    assert!(driver.negotiate(VERSION_1));
    driver.setup(0);
    driver.put(0x18, &[4, 0]);
    driver.put(0x20, &[0; 4]);
    assert_eq!(driver.get::<2>(0x18), [8, 0], "an enabled queue is fixed");
    assert_eq!(u32::from_le_bytes(driver.get(0x20)), 0x10_0000);
    driver.put(0x16, &[2, 0]);
    assert_eq!(driver.get::<2>(0x18), [0, 0], "no such queue");
    driver.put(0x1c, &[1, 0]);
    assert_eq!(driver.get::<2>(0x12), [2, 0]);
}

#[test]
fn any_width_is_read() {
    let mut driver = Driver::new(Echo::default());
    driver.put(0x16, &[1, 0]);
    assert_eq!(driver.get::<8>(0x12), [2, 0, 0, 0, 1, 0, 16, 0]);
    assert_eq!(driver.get::<3>(0x3e), [0; 3]);
    assert_eq!(driver.get::<8>(0xffc), [0; 8]);
}
