use std::sync::{Arc, Mutex};

use proptest::prelude::*;

use super::super::testing::{BUFFERS, Driver, NEEDS_RESET, STATUS, VERSION_1};
use super::*;
use crate::bus::{Bus, DeviceId, Effect, lock};
use crate::pci::{BarWindows, DevFn, ECAM_BUS_SIZE, Ecam, PciBus, PciRoot, PciWindow, assign_bars};

const NAMES: [&str; 2] = ["org.aconite.agent", "org.aconite.log"];

fn control(id: u32, event: u16, value: u16) -> [u8; 8] {
    let mut message = [0; 8];
    message[..4].copy_from_slice(&id.to_le_bytes());
    message[4..6].copy_from_slice(&event.to_le_bytes());
    message[6..].copy_from_slice(&value.to_le_bytes());
    message
}

/// A driver that has the console's ports and plays the guest's side of the handshake.
struct Guest {
    driver: Driver<Console>,
    next_buffer: u64,
}

impl Guest {
    fn new() -> Self {
        let mut driver = Driver::new(Console::new(NAMES));
        driver.start(VERSION_1);
        Self { driver, next_buffer: BUFFERS }
    }

    /// Handshake done and both ports open.
    fn open() -> Self {
        let mut guest = Self::new();
        guest.send_control(u32::MAX, EVENT_DEVICE_READY, 1);
        for port in 0..NAMES.len() as u32 {
            guest.send_control(port, EVENT_PORT_READY, 1);
        }
        guest.receive_control();
        for port in 0..NAMES.len() as u32 {
            guest.send_control(port, EVENT_PORT_OPEN, 1);
        }
        guest.driver.interrupts();
        guest
    }

    fn buffer(&mut self, length: u64) -> u64 {
        let at = self.next_buffer;
        self.next_buffer = if at + 2 * length > 0x40_0000 { BUFFERS } else { at + length };
        at
    }

    fn send(&mut self, queue: u16, bytes: &[u8]) {
        let at = self.buffer(bytes.len() as u64);
        self.driver.dma.write(at, bytes).unwrap();
        self.driver.offer(queue, &[(at, bytes.len() as u32, false)]);
        self.driver.kick(queue);
    }

    fn send_control(&mut self, id: u32, event: u16, value: u16) {
        self.send(CONTROL_TX, &control(id, event, value));
    }

    /// Offers a buffer and returns what came into it, if anything.
    fn receive(&mut self, queue: u16, length: u32) -> Option<Vec<u8>> {
        let at = self.buffer(length.into());
        self.driver.offer(queue, &[(at, length, true)]);
        self.driver.kick(queue);
        let used = self.driver.used(queue);
        used.last().map(|&(_, written)| self.driver.bytes(at, written as usize))
    }

    fn receive_control(&mut self) -> Vec<Vec<u8>> {
        let mut messages = Vec::new();
        while !self.driver.function.device().control.is_empty() {
            messages.extend(self.receive(CONTROL_RX, 64));
        }
        messages
    }

    fn read(&mut self, port: usize, length: usize) -> Vec<u8> {
        let mut buffer = vec![0; length];
        let mut effects = Effects::new();
        let taken = self.driver.function.port_read(port, &mut buffer, &mut effects);
        self.driver.run(effects);
        buffer.truncate(taken);
        buffer
    }

    fn write(&mut self, port: usize, bytes: &[u8]) -> usize {
        let mut effects = Effects::new();
        let accepted = self.driver.function.port_write(port, bytes, &mut effects);
        self.driver.run(effects);
        accepted
    }
}

#[test]
fn the_configuration_has_the_number_of_ports() {
    let mut guest = Guest::new();
    assert_eq!(guest.driver.get::<4>(0x2004), [2, 0, 0, 0]);
    assert_eq!(guest.driver.get::<2>(0x12), [6, 0], "queues");
    assert_eq!(guest.driver.get::<8>(0x2008), [0; 8]);
}

#[test]
fn the_handshake_announces_the_ports_by_name() {
    let mut guest = Guest::new();
    guest.send_control(u32::MAX, EVENT_DEVICE_READY, 1);
    assert_eq!(guest.receive_control(), [control(0, EVENT_PORT_ADD, 1), control(1, EVENT_PORT_ADD, 1)]);
    guest.send_control(1, EVENT_PORT_READY, 1);
    let name = [&control(1, EVENT_PORT_NAME, 1)[..], NAMES[1].as_bytes()].concat();
    assert_eq!(guest.receive_control(), [name, control(1, EVENT_PORT_OPEN, 1).to_vec()]);
    assert!(!guest.driver.function.device().port_open(1));
    guest.send_control(1, EVENT_PORT_OPEN, 1);
    assert!(guest.driver.function.device().port_open(1));
    assert!(!guest.driver.function.device().port_open(0));
}

#[test]
fn bytes_go_both_ways_on_their_port() {
    let mut guest = Guest::open();
    guest.send(tx_queue(0), b"from the guest");
    guest.send(tx_queue(1), b"other");
    assert_eq!(guest.driver.function.device().readable(0), 14);
    assert_eq!(guest.read(0, 8), b"from the");
    assert_eq!(guest.read(0, 100), b" guest");
    assert_eq!(guest.read(1, 100), b"other");
    assert_eq!(guest.write(0, b"from the host"), 13);
    assert_eq!(guest.receive(rx_queue(0), 4), Some(b"from".to_vec()));
    assert_eq!(guest.receive(rx_queue(0), 64), Some(b" the host".to_vec()));
    assert_eq!(guest.receive(rx_queue(0), 64), None);
    guest.driver.interrupts();
    assert_eq!(guest.write(0, b"!"), 1);
    assert_eq!(guest.driver.used(rx_queue(0)).len(), 1, "the waiting buffer is filled at once");
    assert_eq!(guest.driver.interrupts(), [u32::from(rx_queue(0)) + 1]);
}

#[test]
fn a_host_that_does_not_read_stops_the_guest() {
    let mut guest = Guest::open();
    let queue = tx_queue(0);
    guest.driver.used(queue);
    let chunk = 48 * 1024u32;
    for index in 0..3u8 {
        let at = BUFFERS + u64::from(index) * 0x1_0000;
        guest.driver.dma.write(at, &vec![index + 1; chunk as usize]).unwrap();
        guest.driver.offer(queue, &[(at, chunk, false)]);
    }
    guest.driver.kick(queue);
    assert_eq!(guest.driver.used(queue).len(), 1, "the second waits in part, the third whole");
    assert_eq!(guest.driver.function.device().readable(0), RING_SIZE);
    guest.driver.kick(queue);
    assert_eq!(guest.driver.function.device().readable(0), RING_SIZE);
    let mut all = Vec::new();
    loop {
        let part = guest.read(0, 10_000);
        if part.is_empty() {
            break;
        }
        all.extend(part);
    }
    let expected: Vec<u8> = (1..=3u8).flat_map(|byte| vec![byte; chunk as usize]).collect();
    assert!(all == expected, "{} bytes", all.len());
    assert_eq!(guest.driver.used(queue).len(), 2);
}

#[test]
fn a_guest_that_does_not_read_stops_the_host() {
    let mut guest = Guest::open();
    assert_eq!(guest.write(0, &vec![7; RING_SIZE + 5]), RING_SIZE);
    assert_eq!(guest.write(0, b"x"), 0);
    assert_eq!(guest.driver.function.device().writable(0), 0);
    assert_eq!(guest.receive(rx_queue(0), 0x1000).unwrap().len(), 0x1000);
    assert_eq!(guest.driver.function.device().writable(0), 0x1000);
}

#[test]
fn a_closed_port_takes_nothing_and_forgets() {
    let mut guest = Guest::new();
    assert_eq!(guest.write(0, b"nobody"), 0);
    let mut guest = Guest::open();
    guest.write(0, b"old");
    guest.send(tx_queue(0), b"last words");
    guest.send_control(0, EVENT_PORT_OPEN, 0);
    assert_eq!(guest.write(0, b"nobody"), 0);
    assert_eq!(guest.read(0, 100), b"last words");
    guest.send_control(0, EVENT_PORT_OPEN, 1);
    assert_eq!(guest.receive(rx_queue(0), 10), None);
    assert_eq!(guest.write(0, b"new"), 3);
    assert_eq!(guest.driver.used(rx_queue(0)).len(), 1);
}

#[test]
fn the_guest_is_told_when_the_host_leaves() {
    let mut guest = Guest::open();
    let mut effects = Effects::new();
    for open in [false, true, false, false] {
        guest.driver.function.set_host_open(0, open, &mut effects);
    }
    guest.driver.run(effects);
    assert_eq!(guest.receive_control(), [control(0, EVENT_PORT_OPEN, 0)], "only the last state");
}

#[test]
fn a_flood_of_control_messages_waits() {
    let mut guest = Guest::new();
    for _ in 0..500 {
        let at = BUFFERS;
        guest.driver.dma.write(at, &control(0, EVENT_PORT_READY, 1)).unwrap();
        // Never more than the queue holds: a real driver waits for the completion too.
        if guest.driver.used(CONTROL_TX).len() + 1 > 8 {
            break;
        }
        guest.driver.offer(CONTROL_TX, &[(at, 8, false)]);
        guest.driver.kick(CONTROL_TX);
        assert!(guest.driver.function.device().control.len() <= CONTROL_BACKLOG + NAMES.len());
        if guest.driver.function.device().control.len() >= CONTROL_BACKLOG {
            break;
        }
    }
    assert!(guest.driver.function.device().control.len() >= CONTROL_BACKLOG);
    assert!(!guest.receive_control().is_empty());
    assert_eq!(guest.driver.status(), 0xf);
}

#[test]
fn short_and_unreachable_control_messages_are_dropped() {
    let mut guest = Guest::new();
    guest.send(CONTROL_TX, &[1, 2, 3]);
    guest.driver.offer(CONTROL_TX, &[(1 << 40, 8, false)]);
    guest.driver.kick(CONTROL_TX);
    guest.send_control(77, EVENT_PORT_OPEN, 1);
    guest.send_control(0, 99, 99);
    assert_eq!(guest.driver.used(CONTROL_TX).len(), 4);
    guest.send_control(u32::MAX, EVENT_DEVICE_READY, 1);
    assert_eq!(guest.receive(CONTROL_RX, 4), Some(vec![]), "too small: the message is lost");
    assert_eq!(guest.receive(CONTROL_RX, 8), Some(control(1, EVENT_PORT_ADD, 1).to_vec()));
    assert_eq!(guest.driver.status(), 0xf);
}

#[test]
fn poisoned_buffers_lose_no_bytes_of_the_host() {
    let mut guest = Guest::open();
    guest.write(0, b"kept");
    guest.driver.poison.0.lock().unwrap().push(0x3f_0000);
    guest.driver.offer(rx_queue(0), &[(0x3f_0000, 16, true)]);
    guest.driver.kick(rx_queue(0));
    assert_eq!(guest.driver.used(rx_queue(0)).last().map(|used| used.1), Some(0));
    assert_eq!(guest.receive(rx_queue(0), 16), Some(b"kept".to_vec()));
}

#[test]
fn a_reset_starts_over() {
    let mut guest = Guest::open();
    guest.write(0, b"lost");
    guest.driver.put(STATUS, &[0]);
    assert!(!guest.driver.function.device().port_open(0));
    assert_eq!(guest.driver.function.device().control.len(), 0);
    assert_eq!(guest.write(0, b"nobody"), 0);
}

/// The whole way from the machine's memory bus: configuration window, BAR placed by firmware, notification.
#[test]
fn a_console_is_reached_through_the_bus() {
    let (ecam, low, high) = (0xc000_0000u64, 0xd000_0000u64..0xfe80_0000, 0x80_0000_0000u64..0x90_0000_0000);
    let function = Arc::new(Mutex::new(Guest::new().driver.function));
    let root = PciRoot::new();
    root.insert(PciBus::Root(0), DevFn::new(1, 0), DeviceId(7), function.clone()).unwrap();
    assign_bars(&root, BarWindows { low, high: high.clone() }).unwrap();
    let mut bus = Bus::new();
    bus.insert("ecam", ecam, 256 * ECAM_BUS_SIZE, Arc::new(Mutex::new(Ecam::new(root.clone())))).unwrap();
    let window = PciWindow::new(root, high.start);
    bus.insert("pci64", high.start, high.end - high.start, Arc::new(Mutex::new(window))).unwrap();
    let mut effects = Effects::new();
    let mut id = [0; 4];
    bus.read(ecam + 0x8000, &mut id);
    assert_eq!(id, [0xf4, 0x1a, 0x43, 0x10]);
    bus.write(ecam + 0x8004, &[6, 0], &mut effects);
    drop(effects.drain());
    let mut queues = [0; 2];
    bus.read(high.start + 0x12, &mut queues);
    assert_eq!(queues, [6, 0]);
    assert_eq!(lock(&function).notify_address(3), Some(high.start + 0x500c));
    bus.write(high.start + 0x500c, &[3, 0], &mut effects);
    assert_eq!(effects.as_slice(), [Effect::QueueNotify { device: DeviceId(7), queue: 3 }]);
}

proptest! {
    /// Random control messages, buffers and host calls: bounded memory, and a state that is running or broken.
    #[test]
    fn any_traffic_is_answered(
        steps in prop::collection::vec(
            (0u8..5, 0u16..7, any::<u32>(), 0u16..9, prop_oneof![0u64..0x40_0000, any::<u64>()]),
            0..100,
        ),
    ) {
        let mut guest = Guest::open();
        for (kind, queue, length, event, address) in steps {
            let queue = queue % 6;
            match kind {
                0 => guest.send_control(length % 3, event, length as u16 % 2),
                1 => {
                    guest.driver.offer(queue, &[(address, length, queue % 2 == 0)]);
                    guest.driver.kick(queue);
                }
                2 => {
                    guest.write(usize::from(queue), &vec![1; length as usize % 0x2_0000]);
                }
                3 => {
                    guest.read(usize::from(queue), length as usize % 0x2_0000);
                }
                _ => {
                    guest.driver.kick(queue);
                }
            }
            let device = guest.driver.function.device();
            prop_assert!(device.control.len() <= CONTROL_BACKLOG + 2 * NAMES.len());
            for port in &device.ports {
                prop_assert!(port.to_guest.len() <= RING_SIZE && port.from_guest.len() <= RING_SIZE);
            }
        }
        let status = guest.driver.status();
        prop_assert!(status & !NEEDS_RESET == 0xf, "{:#x}", status);
    }
}
