use std::sync::Mutex;

use proptest::prelude::*;

use super::super::testing::{BUFFERS, Driver, Echo, NEEDS_RESET, STATUS, VERSION_1};
use super::*;
use crate::bus::Effect;

#[test]
fn drivers_find_the_blocks_through_capabilities() {
    let mut driver = Driver::new(Echo::default());
    assert_eq!(driver.config_read::<4>(0), [0xf4, 0x1a, 0x6a, 0x10]);
    for (kind, offset, length) in [
        (CFG_COMMON, 0u32, 0x40u32),
        (CFG_ISR, 0x1000, 1),
        (CFG_DEVICE, 0x2000, 0x1000),
        (CFG_NOTIFY, 0x5000, 8),
    ] {
        let at = driver.capability(CAP_VENDOR, Some(kind));
        assert_eq!(driver.config_read::<1>(at + 4), [0]);
        assert_eq!(u32::from_le_bytes(driver.config_read(at + 8)), offset);
        assert_eq!(u32::from_le_bytes(driver.config_read(at + 12)), length);
    }
    let notify = driver.capability(CAP_VENDOR, Some(CFG_NOTIFY));
    assert_eq!(driver.config_read::<1>(notify + 2), [20]);
    assert_eq!(u32::from_le_bytes(driver.config_read(notify + 16)), NOTIFY_MULTIPLIER);
    let msix = driver.capability(0x11, None);
    assert_eq!(driver.config_read::<8>(msix + 4), [0, 0x30, 0, 0, 0, 0x40, 0, 0]);
}

#[test]
fn configuration_is_reached_at_its_page() {
    let mut driver = Driver::new(Echo::default());
    driver.put(0x2001, &[5, 6]);
    assert_eq!(driver.get::<4>(0x2000), [0, 5, 6, 0]);
}

#[test]
fn configuration_changes_are_told_and_counted() {
    let mut driver = Driver::new(Echo::default());
    driver.function.config_changed();
    assert!(driver.interrupts().is_empty());
    driver.start(VERSION_1);
    driver.function.config_changed();
    assert_eq!(driver.interrupts(), [0]);
    assert_eq!(driver.get::<1>(0x15), [2]);
    assert_eq!(driver.get::<1>(0x1000), [2], "configuration bit of the ISR");
    assert_eq!(driver.get::<1>(0x1000), [0], "reading clears it");
}

#[test]
fn queues_filled_before_the_driver_is_ready_are_looked_into() {
    let mut driver = Driver::new(Echo::default());
    assert!(driver.negotiate(VERSION_1));
    driver.setup(0);
    driver.offer(0, &[(BUFFERS, 1, false)]);
    assert_eq!(driver.kick(0), 0, "nothing is consumed before DRIVER_OK");
    driver.put(STATUS, &[0xf]);
    assert_eq!(driver.used(0).len(), 1);
}

#[test]
fn without_bus_mastering_nothing_moves() {
    let mut driver = Driver::new(Echo::default());
    driver.start(VERSION_1);
    driver.config(4, &[2]);
    driver.offer(0, &[(BUFFERS, 1, false)]);
    driver.kick(0);
    assert_eq!(driver.used(0), []);
    assert!(driver.interrupts().is_empty());
    let mut effects = Effects::new();
    driver.function.config_write(4, &[6], &mut effects);
    driver.run(effects);
    assert_eq!(driver.used(0).len(), 1);
}

#[test]
fn each_queue_has_its_notification_address() {
    let mut driver = Driver::new(Echo::default());
    driver.config(0x10, &0xd000_0000u32.to_le_bytes());
    assert_eq!(driver.function.notify_address(1), Some(0xd000_5004));
    assert_eq!(driver.function.notify_address(2), None);
    driver.config(4, &[0]);
    assert_eq!(driver.function.notify_address(1), None);
    driver.config(4, &[6]);
    driver.start(VERSION_1);
    let mut effects = Effects::new();
    driver.function.bar_write(0, 0x5004, &[0, 0], &mut effects);
    driver.function.bar_write(0, 0x5002, &[0, 0], &mut effects);
    driver.function.bar_write(0, 0x5008, &[2, 0], &mut effects);
    assert_eq!(effects.as_slice(), [Effect::QueueNotify { device: DeviceId(7), queue: 1 }]);
}

/// Where doorbells hang, each time that they are hung.
#[derive(Clone, Default)]
struct Hung(Arc<Mutex<Vec<Vec<u64>>>>);

impl Doorbells for Hung {
    fn hang(&mut self, addresses: &[u64]) {
        self.0.lock().unwrap().push(addresses.to_vec());
    }
}

impl Hung {
    /// Since the last call.
    fn take(&self) -> Vec<Vec<u64>> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

/// What is said of doorbells that hang nowhere.
const NOWHERE: [u64; 0] = [];

/// A device that runs, with doorbells.
fn with_doorbells() -> (Driver<Echo>, Hung) {
    let (mut driver, hung) = (Driver::new(Echo::default()), Hung::default());
    driver.config(0x10, &0xd000_0000u32.to_le_bytes());
    driver.function.set_doorbells(Some(Box::new(hung.clone())));
    assert!(hung.take().is_empty());
    driver.start(VERSION_1);
    assert_eq!(hung.take(), [[0xd000_5000, 0xd000_5004]], "all at once, and only when the device runs");
    (driver, hung)
}

#[test]
fn doorbells_follow_the_addresses_at_which_queues_are_notified() {
    let (mut driver, hung) = with_doorbells();
    driver.config(4, &[4]);
    assert_eq!(hung.take(), [NOWHERE], "memory is not decoded");
    driver.config(0x10, &0xd100_0000u32.to_le_bytes());
    assert!(hung.take().is_empty());
    driver.config(4, &[6]);
    assert_eq!(hung.take(), [[0xd100_5000, 0xd100_5004]]);
    driver.config(0x10, &0xd200_0000u32.to_le_bytes());
    assert_eq!(hung.take(), [[0xd200_5000, 0xd200_5004]]);
    driver.config(4, &[2]);
    driver.put(0x10, &[0, 0]);
    assert!(hung.take().is_empty(), "nothing has moved");
}

#[test]
fn a_device_that_does_not_run_has_no_doorbells() {
    let (mut driver, hung) = with_doorbells();
    driver.put(STATUS, &[0]);
    assert_eq!(hung.take(), [NOWHERE], "the driver has reset it");
    driver.start(VERSION_1);
    assert_eq!(hung.take(), [[0xd000_5000, 0xd000_5004]]);
    driver.view().write_obj(Driver::<Echo>::ring(0) + 0x1002, 100u16).unwrap();
    driver.kick(0);
    assert_ne!(driver.status() & NEEDS_RESET, 0);
    assert_eq!(hung.take(), [NOWHERE], "the driver has broken it");
    driver.put(STATUS, &[0]);
    driver.view().write_obj(Driver::<Echo>::ring(0) + 0x1002, 0u16).unwrap();
    driver.start(VERSION_1);
    hung.take();
    driver.function.reset();
    assert_eq!(hung.take(), [NOWHERE], "its bus was reset");
}

#[test]
fn doorbells_that_come_late_hang_at_once_and_go_when_they_are_taken() {
    let (mut driver, first) = with_doorbells();
    let second = Hung::default();
    driver.function.set_doorbells(Some(Box::new(second.clone())));
    assert_eq!(second.take(), [[0xd000_5000, 0xd000_5004]]);
    assert_eq!(Arc::strong_count(&first.0), 1, "the others are gone");
    driver.function.set_doorbells(None);
    assert_eq!(Arc::strong_count(&second.0), 1);
    driver.offer(0, &[(BUFFERS, 1, false)]);
    assert_eq!(driver.kick(0), 1, "the function hears for itself");
}

#[test]
fn the_window_in_configuration_space_reaches_the_registers() {
    let mut driver = Driver::new(Echo::default());
    let at = driver.capability(CAP_VENDOR, Some(CFG_PCI));
    driver.config(at + 8, &0x16u32.to_le_bytes());
    driver.config(at + 12, &2u32.to_le_bytes());
    driver.config(at + 16, &[1, 0]);
    assert_eq!(driver.get::<2>(0x16), [1, 0]);
    driver.config(at + 8, &0x12u32.to_le_bytes());
    assert_eq!(driver.config_read::<2>(at + 16), [2, 0]);
    for (offset, length) in [(0x8000u32, 1u32), (0x7ffe, 4), (1, 2), (0, 3), (u32::MAX, 4), (0, 0)] {
        driver.config(at + 8, &offset.to_le_bytes());
        driver.config(at + 12, &length.to_le_bytes());
        driver.config(at + 16, &[0; 4]);
        driver.config_read::<4>(at + 16);
    }
    assert_eq!(driver.get::<2>(0x16), [1, 0]);
}

#[test]
fn an_endpoint_behind_a_port_has_the_express_capability() {
    let driver = Driver::new(Echo::default());
    let wiring = Wiring {
        id: DeviceId(8),
        dma: driver.dma.clone(),
        msi: Arc::new(driver.sink.clone()),
        express: Some(PortType::Endpoint),
    };
    let mut function = VirtioPci::new(Echo::default(), wiring).unwrap();
    let mut at = [0];
    function.config_read(0x34, &mut at);
    let mut seen = Vec::new();
    while at[0] != 0 {
        let mut header = [0; 2];
        function.config_read(at[0].into(), &mut header);
        seen.push(header[0]);
        at[0] = header[1];
    }
    assert_eq!(seen, [9, 9, 9, 9, 9, 0x11, 0x10]);
}

#[test]
fn impossible_devices_are_refused() {
    struct Sizes(Vec<u16>);
    impl VirtioDevice for Sizes {
        fn device_type(&self) -> u16 {
            1
        }
        fn class(&self) -> u32 {
            0
        }
        fn features(&self) -> u64 {
            0
        }
        fn queue_sizes(&self) -> &[u16] {
            &self.0
        }
        fn read_config(&self, _offset: u64, _data: &mut [u8]) {}
        fn write_config(&mut self, _offset: u64, _data: &[u8]) {}
        fn activate(&mut self, _features: u64) {}
        fn reset(&mut self) {}
        fn process_queue(&mut self, _index: u16, _queues: &mut Queues<'_>) -> Result<(), QueueError> {
            Ok(())
        }
        fn host_ready(&mut self, _queues: &mut Queues<'_>) -> Result<(), QueueError> {
            Ok(())
        }
    }
    let driver = Driver::new(Echo::default());
    let build = |sizes: Vec<u16>| {
        let wiring = Wiring {
            id: DeviceId(8),
            dma: driver.dma.clone(),
            msi: Arc::new(driver.sink.clone()),
            express: None,
        };
        VirtioPci::new(Sizes(sizes), wiring).err().map(|error| error.to_string())
    };
    assert_eq!(build(vec![16; MAX_QUEUES]), None);
    assert!(build(vec![16; MAX_QUEUES + 1]).unwrap().contains("256 queues"));
    assert!(build(vec![16, 24]).unwrap().contains("Queue 1"));
}

proptest! {
    /// Any access to configuration space and BAR, at any width and alignment, is answered; the identity stays.
    #[test]
    fn any_access_is_answered(
        start in any::<bool>(),
        accesses in prop::collection::vec(
            (
                any::<bool>(),
                any::<bool>(),
                prop_oneof![0u64..0x40, 0u64..0x8000, 0x5000u64..0x5010],
                prop::collection::vec(any::<u8>(), 1..=8),
            ),
            0..200,
        ),
    ) {
        let mut driver = Driver::new(Echo::default());
        if start {
            driver.start(VERSION_1);
        }
        for (write, bar, offset, mut data) in accesses {
            let mut effects = Effects::new();
            match (write, bar) {
                (true, true) => driver.function.bar_write(0, offset, &data, &mut effects),
                (false, true) => driver.function.bar_read(0, offset, &mut data),
                (true, false) => driver.function.config_write((offset % 0x1000) as u16, &data, &mut effects),
                (false, false) => driver.function.config_read((offset % 0x1000) as u16, &mut data),
            }
            driver.run(effects);
        }
        prop_assert_eq!(driver.config_read::<4>(0), [0xf4, 0x1a, 0x6a, 0x10]);
        prop_assert_eq!(driver.config_read::<4>(8), [1, 0, 0, 0xff]);
        driver.put(STATUS, &[0]);
        prop_assert_eq!(driver.status(), 0);
    }
}
