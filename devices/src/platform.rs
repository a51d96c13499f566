//! The platform page: how firmware tells the guest, and how the guest tells the platform.
//!
//! One page of registers ([`aconite_acpi::platform`] has their layout, beside the AML that touches them) carries
//! the firmware events that the generic event device turns into `Notify`, the sleep and reset registers of
//! hardware-reduced ACPI, and pvpanic. Nothing here acts: what the guest asks for is returned as an [`Effect`].

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;

use aconite_acpi::platform::{
    EVENT, FirmwareEvent, PVPANIC, PVPANIC_CRASH_LOADED, PVPANIC_PANICKED, RESET, RESET_VALUE, SLEEP_CONTROL,
    SLEEP_ENABLE, sleep_is_power_off,
};

use crate::bus::{BusDevice, Effect, Effects};
use crate::irq::IrqLine;

/// Firmware events that the guest has not read yet, oldest first.
///
/// An event that is already waiting is not queued again: one `Notify` makes the OS look, however many reasons
/// there are. Events are (target, code) pairs of which there are finitely many, so the queue is bounded by
/// construction and never has to drop one.
#[derive(Debug, Default)]
struct EventQueue {
    order: VecDeque<FirmwareEvent>,
    waiting: HashSet<FirmwareEvent>,
}

impl EventQueue {
    fn push(&mut self, event: FirmwareEvent) -> bool {
        let new = self.waiting.insert(event);
        if new {
            self.order.push_back(event);
        }
        new
    }

    fn pop(&mut self) -> Option<FirmwareEvent> {
        let event = self.order.pop_front()?;
        self.waiting.remove(&event);
        Some(event)
    }
}

/// The registers of the platform page.
///
/// An access at any offset and of any width is defined: bytes that belong to no register read as zero and are
/// dropped when written, and a wider write reaches each register that it covers. An event is taken off the queue
/// only by a read that covers the whole of the event register; a narrower one reads zero and takes nothing.
pub struct Platform {
    events: EventQueue,
    merged: u64,
    sleep_type: u8,
    line: Arc<dyn IrqLine>,
}

impl Platform {
    /// A platform that raises `line`, the interrupt of the generic event device, for each event pushed.
    pub fn new(line: Arc<dyn IrqLine>) -> Self {
        Self { events: EventQueue::default(), merged: 0, sleep_type: 0, line }
    }

    /// Asks the guest to perform `event`. False if the same event was still waiting and this one became part of
    /// it; the interrupt is raised either way.
    pub fn push(&mut self, event: FirmwareEvent) -> bool {
        let new = self.events.push(event);
        if !new {
            self.merged += 1;
            tracing::debug!(
                target = ?event.target, code = event.code, merged = self.merged,
                "Firmware event merged with one that the guest has not read yet"
            );
        }
        self.line.trigger();
        new
    }

    /// Number of events that the guest has not read yet.
    pub fn pending(&self) -> usize {
        self.events.order.len()
    }

    /// Number of events that became part of one still waiting, since the machine was made.
    pub fn merged(&self) -> u64 {
        self.merged
    }

    /// Raises the interrupt again if events are waiting.
    ///
    /// The line is edge-triggered, and an edge that arrives while the guest has it masked is lost (KVM
    /// `arch/x86/kvm/ioapic.c` `ioapic_write_indirect` re-delivers level interrupts only). Events pushed before
    /// the guest's event driver has started would wait for the next one; a caller that sees [`Platform::pending`]
    /// stay above 0 calls this.
    pub fn retrigger(&self) {
        if self.pending() > 0 {
            self.line.trigger();
        }
    }

    fn write_byte(&mut self, offset: u64, value: u8, effects: &mut Effects) {
        match offset {
            SLEEP_CONTROL => {
                self.sleep_type = value & !SLEEP_ENABLE;
                if sleep_is_power_off(value) {
                    effects.push(Effect::PowerOff);
                } else if value & SLEEP_ENABLE != 0 {
                    tracing::debug!(value, "Guest asked for a sleep state that this machine does not have");
                }
            }
            RESET if value == RESET_VALUE => effects.push(Effect::Reset),
            PVPANIC => {
                if value & PVPANIC_PANICKED != 0 {
                    effects.push(Effect::Panicked);
                }
                if value & PVPANIC_CRASH_LOADED != 0 {
                    effects.push(Effect::CrashLoaded);
                }
            }
            _ => {}
        }
    }
}

impl BusDevice for Platform {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let event = if offset == EVENT && data.len() >= 4 {
            self.events.pop().map_or(0, FirmwareEvent::encode)
        } else {
            0
        };
        for (at, byte) in (offset..).zip(data) {
            *byte = match at {
                0..4 => event.to_le_bytes()[at as usize],
                SLEEP_CONTROL => self.sleep_type,
                PVPANIC => PVPANIC_PANICKED | PVPANIC_CRASH_LOADED,
                _ => 0,
            };
        }
    }

    fn write(&mut self, offset: u64, data: &[u8], effects: &mut Effects) {
        for (at, &value) in (offset..).zip(data) {
            self.write_byte(at, value, effects);
        }
    }
}

#[cfg(test)]
pub(crate) mod testing {
    //! An interrupt line that counts its edges.

    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// Counts edges.
    #[derive(Default)]
    pub(crate) struct Edges(AtomicUsize);

    impl Edges {
        pub(crate) fn count(&self) -> usize {
            self.0.load(Ordering::Relaxed)
        }
    }

    impl IrqLine for Edges {
        fn trigger(&self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }

        fn set(&self, _asserted: bool) {}
    }
}

#[cfg(test)]
mod tests {
    use aconite_acpi::layout::{MAX_UNITS, PLATFORM_SIZE};
    use aconite_acpi::platform::{EventTarget, SLEEP_STATUS, notify};
    use proptest::prelude::*;

    use super::testing::Edges;
    use super::*;

    fn platform() -> (Platform, Arc<Edges>) {
        let line = Arc::new(Edges::default());
        (Platform::new(line.clone()), line)
    }

    fn read_u32(platform: &mut Platform, offset: u64) -> u32 {
        let mut data = [0xEE; 4];
        platform.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(platform: &mut Platform, offset: u64, data: &[u8]) -> Vec<Effect> {
        let mut effects = Effects::new();
        platform.write(offset, data, &mut effects);
        effects.into_iter().collect()
    }

    fn event(unit: u32, code: u8) -> FirmwareEvent {
        FirmwareEvent { target: EventTarget::Root(unit), code }
    }

    #[test]
    fn events_are_read_in_order_and_then_zero() {
        let (mut platform, line) = platform();
        let container = FirmwareEvent { target: EventTarget::Container(1), code: notify::DEVICE_CHECK };
        assert!(platform.push(event(2, 0x81)));
        assert!(platform.push(container));
        assert_eq!(line.count(), 2);
        assert_eq!(read_u32(&mut platform, EVENT), 0x4681);
        assert_eq!(read_u32(&mut platform, EVENT), 0x2301);
        assert_eq!(read_u32(&mut platform, EVENT), 0);
        assert_eq!(platform.pending(), 0);
    }

    #[test]
    fn an_event_that_waits_is_not_queued_again() {
        let (mut platform, line) = platform();
        assert!(platform.push(event(0, 0x81)));
        assert!(!platform.push(event(0, 0x81)));
        assert!(platform.push(event(0, 0x80)));
        assert_eq!((platform.pending(), platform.merged(), line.count()), (2, 1, 3));
        assert_eq!(read_u32(&mut platform, EVENT), event(0, 0x81).encode());
        assert!(platform.push(event(0, 0x81)));
        assert_eq!(read_u32(&mut platform, EVENT), event(0, 0x80).encode());
        assert_eq!(read_u32(&mut platform, EVENT), event(0, 0x81).encode());
    }

    #[test]
    fn no_storm_makes_the_queue_longer_than_the_events_there_are() {
        let (mut platform, _) = platform();
        for _ in 0..3 {
            for index in 0..=3 * MAX_UNITS {
                for code in [0, 1, 3, 0x80, 0x81] {
                    let target = EventTarget::from_index(index).unwrap();
                    platform.push(FirmwareEvent { target, code });
                }
            }
        }
        let distinct = ((3 * MAX_UNITS + 1) * 5) as usize;
        assert_eq!(platform.pending(), distinct);
        assert_eq!(platform.merged(), 2 * distinct as u64);
    }

    #[test]
    fn only_a_read_of_the_whole_register_takes_an_event() {
        let (mut platform, _) = platform();
        platform.push(event(0, 0x81));
        for (offset, length) in [(0, 1), (0, 2), (0, 3), (1, 4), (2, 2), (3, 1)] {
            let mut data = vec![0xEE; length];
            platform.read(offset, &mut data);
            assert_eq!(data, vec![0; length]);
        }
        let mut data = [0xEE; 8];
        platform.read(EVENT, &mut data);
        assert_eq!(data, [0x81, 2, 0, 0, 0, 0, 0, 0]);
        assert_eq!(platform.pending(), 0);
    }

    #[test]
    fn a_lost_edge_can_be_sent_again() {
        let (mut platform, line) = platform();
        platform.retrigger();
        assert_eq!(line.count(), 0);
        platform.push(event(0, 0x81));
        platform.retrigger();
        assert_eq!(line.count(), 2);
    }

    #[test]
    fn s5_powers_off_and_other_states_do_not() {
        let (mut platform, _) = platform();
        assert_eq!(write(&mut platform, SLEEP_CONTROL, &[5 << 2]), []);
        assert_eq!(read_u32(&mut platform, SLEEP_CONTROL), 5 << 2);
        assert_eq!(write(&mut platform, SLEEP_CONTROL, &[0x20 | (3 << 2)]), []);
        assert_eq!(write(&mut platform, SLEEP_CONTROL, &[0x20 | (5 << 2)]), [Effect::PowerOff]);
        assert_eq!(read_u32(&mut platform, SLEEP_CONTROL), 5 << 2, "SLP_EN reads as zero");
        assert_eq!(write(&mut platform, SLEEP_STATUS, &[0x80]), []);
        assert_eq!(read_u32(&mut platform, SLEEP_STATUS), 0);
    }

    #[test]
    fn only_the_reset_value_resets() {
        let (mut platform, _) = platform();
        assert_eq!(write(&mut platform, RESET, &[0]), []);
        assert_eq!(write(&mut platform, RESET, &[3]), []);
        assert_eq!(write(&mut platform, RESET, &[1, 0, 0, 0]), [Effect::Reset]);
    }

    #[test]
    fn pvpanic_tells_its_events_and_reports_them() {
        let (mut platform, _) = platform();
        assert_eq!(read_u32(&mut platform, PVPANIC), 3);
        assert_eq!(write(&mut platform, PVPANIC, &[1]), [Effect::Panicked]);
        assert_eq!(write(&mut platform, PVPANIC, &[2]), [Effect::CrashLoaded]);
        assert_eq!(write(&mut platform, PVPANIC, &[0xFF]), [Effect::Panicked, Effect::CrashLoaded]);
        assert_eq!(write(&mut platform, PVPANIC, &[0xFC]), []);
    }

    #[test]
    fn a_wide_write_reaches_every_register_it_covers() {
        let (mut platform, _) = platform();
        assert_eq!(write(&mut platform, 0x14, &[0, 0, 0, 0, 1, 0, 0, 0]), [Effect::Reset]);
        assert_eq!(write(&mut platform, 0x0F, &[0xFF, 0x34]), [Effect::PowerOff]);
    }

    proptest! {
        #[test]
        fn any_access_is_defined(
            accesses in prop::collection::vec(
                (0..PLATFORM_SIZE, prop::collection::vec(any::<u8>(), 1..=8), any::<bool>()), 0..64),
            pushed in prop::collection::vec((0..3 * MAX_UNITS, any::<u8>()), 0..64),
        ) {
            let (mut platform, _) = platform();
            for (index, code) in pushed {
                platform.push(FirmwareEvent { target: EventTarget::from_index(index).unwrap(), code });
            }
            for (offset, mut data, is_write) in accesses {
                let before = platform.pending();
                if is_write {
                    write(&mut platform, offset, &data);
                    prop_assert_eq!(platform.pending(), before);
                } else {
                    platform.read(offset, &mut data);
                    prop_assert!(platform.pending() == before
                        || (offset == EVENT && data.len() >= 4 && platform.pending() + 1 == before));
                }
            }
        }
    }
}
