use std::sync::{Arc, Mutex, OnceLock, mpsc};

use aconite_devices::irq::{IrqLine, MsiSink};
use aconite_devices::pci::{HotplugBridgesState, PciRoot, SlotKind};
use aconite_devices::platform::Platform;
use vmm_sys_util::eventfd::EventFd;

use super::super::cpu::Mailbox;
use super::super::pcie::Pcie;
use super::*;
use crate::command::{ErrorCode, OperationState, RemovalStep};

struct Nobody;

impl IrqLine for Nobody {
    fn trigger(&self) {}
    fn set(&self, _asserted: bool) {}
}

impl MsiSink for Nobody {
    fn signal(&self, _address: u64, _data: u32) {}
}

fn ways() -> Ways {
    let msi: Arc<dyn MsiSink> = Arc::new(Nobody);
    let bridges = HotplugBridgesState::new(1);
    let pcie = Pcie::new(PciRoot::new(), 0, SlotKind::Button, 0, bridges, &msi).unwrap();
    Ways {
        platform: Arc::new(Mutex::new(Platform::new(Arc::new(Nobody)))),
        pcie: Arc::new(Mutex::new(pcie)),
        agent: Arc::new(OnceLock::new()),
        mailbox: Mailbox::new(mpsc::channel().0, Arc::new(EventFd::new(0).unwrap())),
    }
}

/// One thing, which goes by the key 7.
struct Things {
    state: DeviceState,
    left_by: Option<Channel>,
    /// The host lets nothing be taken away.
    stuck: bool,
    removals: BTreeMap<u8, Removal>,
    operations: Operations,
    events: EventBus,
}

const KEY: u8 = 7;

impl Things {
    fn new() -> Self {
        Self {
            state: DeviceState::Present,
            left_by: None,
            stuck: false,
            removals: BTreeMap::new(),
            operations: Operations::default(),
            events: EventBus::new(),
        }
    }

    fn remove(&mut self, mode: RemoveMode) -> Result<u64, Error> {
        let farewell = Farewell { mode, via: None, patience: None };
        self.begin(&ways(), &KEY, "t0", Channel::Bridge, farewell).map(|operation| operation.operation)
    }

    fn ended(&self, operation: u64) -> (OperationState, Option<ErrorCode>) {
        let operation = self.operations.get(operation).unwrap();
        (operation.state, operation.error.map(|error| error.code))
    }

    /// The steps that were told of since `seen` events, with the number of their operation.
    fn steps(&self, seen: u64) -> Vec<(u64, RemovalStep)> {
        let mut reader = self.events.subscribe(seen);
        let mut steps = Vec::new();
        while let crate::command::Next::Record(record) = reader.next(Duration::ZERO) {
            if let Event::Removal { operation, step, .. } = record.event {
                steps.push((operation, step));
            }
        }
        steps
    }
}

impl Departing for Things {
    type Key = u8;

    fn removals(&mut self) -> &mut BTreeMap<u8, Removal> {
        &mut self.removals
    }

    fn operations(&self) -> &Operations {
        &self.operations
    }

    fn events(&self) -> &EventBus {
        &self.events
    }

    fn members(&self, key: &u8) -> Vec<String> {
        assert_eq!(*key, KEY);
        if self.state == DeviceState::Departed { Vec::new() } else { vec!["t0".to_owned()] }
    }

    fn take(&mut self, _key: &u8) -> Result<(), Error> {
        if self.stuck {
            Err(Error::new(ErrorCode::HostLimit, "no maps are left", "raise it"))
        } else {
            Ok(())
        }
    }

    fn tell(&self, _ways: &Ways, _key: &u8, _removal: &Removal) {}

    fn note(&mut self, members: &[String], state: DeviceState, by: Option<Channel>) {
        assert_eq!(members, ["t0"]);
        (self.state, self.left_by) = (state, by);
    }
}

#[test]
fn what_the_host_cannot_take_away_is_present_again() {
    let mut things = Things::new();
    let first = things.remove(RemoveMode::Eject).unwrap();
    assert_eq!(things.state, DeviceState::Leaving);
    things.stuck = true;
    things.hear(&ways(), &KEY, Happening::LetGo("_EJ0".to_owned()));
    assert_eq!(things.ended(first), (OperationState::Failed, Some(ErrorCode::HostLimit)));
    assert_eq!((things.state, things.removals.len()), (DeviceState::Present, 0));
    assert_eq!(things.remove(RemoveMode::Surprise).unwrap_err().code, ErrorCode::HostLimit);
    assert_eq!((things.state, things.removals.len()), (DeviceState::Present, 0), "nothing has begun");

    things.stuck = false;
    let before = things.events.last();
    let second = things.remove(RemoveMode::Eject).unwrap();
    things.hear(&ways(), &KEY, Happening::Ejected("power off".to_owned()));
    things.hear(&ways(), &KEY, Happening::LetGo("dark".to_owned()));
    assert_eq!(things.ended(second), (OperationState::Done, None));
    assert_eq!((things.state, things.left_by), (DeviceState::Departed, Some(Channel::Bridge)));
    let steps: Vec<_> = things.steps(before).into_iter().map(|(_, step)| step).collect();
    let expected =
        [RemovalStep::Requested, RemovalStep::Notified, RemovalStep::Ejected, RemovalStep::Departed];
    assert_eq!(steps, expected);
}

#[test]
fn what_nobody_has_asked_for_goes_the_same_way() {
    let mut things = Things::new();
    things.stuck = true;
    things.begin_unasked(&ways(), &KEY, Channel::Bridge, "_EJ0".to_owned());
    assert_eq!((things.state, things.removals.len()), (DeviceState::Present, 0));
    things.stuck = false;
    let before = things.events.last();
    things.begin_unasked(&ways(), &KEY, Channel::Bridge, "_EJ0".to_owned());
    assert_eq!((things.state, things.removals.len()), (DeviceState::Leaving, 1));
    things.hear(&ways(), &KEY, Happening::LetGo("_EJ0".to_owned()));
    assert_eq!((things.state, things.left_by, things.removals.len()), (DeviceState::Departed, None, 0));
    assert_eq!(things.steps(before), [(0, RemovalStep::Ejected), (0, RemovalStep::Departed)]);
    things.begin_unasked(&ways(), &KEY, Channel::Bridge, "again".to_owned());
    assert_eq!(things.removals.len(), 0, "it has departed");
}

#[test]
fn a_surprise_overtakes_and_an_overdue_removal_ends() {
    let mut things = Things::new();
    let asked = things.remove(RemoveMode::Eject).unwrap();
    assert!(things.overtakes(&KEY, RemoveMode::Surprise) && !things.overtakes(&KEY, RemoveMode::Eject));
    let pulled = things.remove(RemoveMode::Surprise).unwrap();
    assert_eq!(things.ended(asked), (OperationState::Failed, Some(ErrorCode::WrongDeviceState)));
    assert!(!things.overtakes(&KEY, RemoveMode::Surprise), "it is gone");
    things.hear_of(&ways(), asked, Happening::LetGo("late".to_owned()));
    assert_eq!(
        things.state,
        DeviceState::Leaving,
        "what is heard of another operation is not about this one"
    );
    assert!(things.next_deadline().is_some());
    things.removals.get_mut(&KEY).unwrap().deadline = Instant::now();
    things.overdue(&ways());
    assert_eq!(things.ended(pulled), (OperationState::Failed, Some(ErrorCode::GuestTimedOut)));
    assert_eq!((things.state, things.next_deadline()), (DeviceState::Departed, None));
}
