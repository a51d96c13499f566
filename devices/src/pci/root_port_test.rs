use proptest::prelude::*;

use super::*;
use crate::irq::testing::RecordingSink;

const ID: DeviceId = DeviceId(9);
const HPIE: u16 = ENABLE_INTERRUPT;
/// Slot Control as pciehp leaves it for a slot with a button: `pcie_enable_notification`.
const PCIEHP_BUTTON: u16 = EVENT_BUTTON | EVENT_COMMAND | HPIE | ENABLE_LINK;

struct Rig {
    port: RootPort,
    sink: RecordingSink,
    msi: u16,
}

impl Rig {
    fn new(kind: SlotKind) -> Self {
        let sink = RecordingSink::default();
        let port = RootPort::new(ID, kind, 3, Arc::new(sink.clone())).unwrap();
        let msi = (port.config.u16(0x34) & 0xff) as usize;
        // The express capability comes first, MSI after it.
        let msi = port.config.u16(msi) >> 8;
        let mut rig = Self { port, sink, msi };
        rig.write(4, &[6, 0]);
        rig.write(rig.msi + 4, &0xfee0_1000u32.to_le_bytes());
        rig.write(rig.msi + 0xc, &[0x41, 0]);
        rig.write(rig.msi + 2, &[1, 0]);
        rig
    }

    fn write(&mut self, offset: u16, data: &[u8]) -> Vec<Effect> {
        let mut effects = Effects::new();
        self.port.config_write(offset, data, &mut effects);
        effects.into_iter().collect()
    }

    fn express(&mut self, register: usize, value: u16) -> Vec<SlotChange> {
        let offset = (self.port.express + register) as u16;
        let effects = self.write(offset, &value.to_le_bytes()).into_iter();
        effects
            .map(|effect| match effect {
                Effect::Slot { port: ID, change } => change,
                other => panic!("{other:?}"),
            })
            .collect()
    }

    fn read(&self, register: usize) -> u16 {
        self.port.config.u16(self.port.express + register)
    }

    fn messages(&self) -> usize {
        let messages = self.sink.take();
        assert!(messages.iter().all(|message| *message == (0xfee0_1000, 0x41)), "{messages:x?}");
        messages.len()
    }

    /// What pciehp's interrupt handler does: it clears what it has seen.
    fn acknowledge(&mut self) -> u16 {
        let events = self.read(SLOT_STATUS) & EVENTS;
        self.express(SLOT_STATUS, events);
        events
    }
}

#[test]
fn the_header_is_that_of_a_hot_plug_port() {
    let rig = Rig::new(SlotKind::Button);
    assert_eq!(rig.port.config.u32(0), 0x000c_1b36);
    assert_eq!(rig.port.config.u32(8) >> 8, 0x06_0400);
    assert_eq!(rig.port.config.u16(0xe), 1);
    assert_eq!(rig.read(2), 0x0142);
    assert_eq!(rig.port.config.u32(rig.port.express + SLOT_CAPABILITIES), 3 << 19 | 0x7b);
    let plain = Rig::new(SlotKind::Plain);
    assert_eq!(plain.port.config.u32(plain.port.express + SLOT_CAPABILITIES), 3 << 19 | 1 << 18 | 0x60);
}

#[test]
fn windows_are_shut_until_the_guest_opens_them() {
    let mut rig = Rig::new(SlotKind::Plain);
    rig.port.occupy_at_start();
    rig.write(0x18, &[0, 1, 2]);
    assert_eq!(rig.port.decode().bridge.unwrap().windows, []);
    // 0xd0000000 to 0xd01fffff, and 0x8000000000 to 0x80002fffff.
    rig.write(0x20, &[0x00, 0xd0, 0x10, 0xd0]);
    rig.write(0x24, &[0x00, 0x00, 0x20, 0x00]);
    rig.write(0x28, &[0x80, 0, 0, 0, 0x80, 0, 0, 0]);
    let bridge = rig.port.decode().bridge.unwrap();
    assert_eq!((bridge.secondary, bridge.subordinate), (1, 2));
    assert_eq!(bridge.windows, [(0xd000_0000, 0xd01f_ffff), (0x80_0000_0000, 0x80_002f_ffff)]);
    rig.write(4, &[4, 0]);
    assert_eq!(rig.port.decode().bridge.unwrap().windows, []);
}

#[test]
fn an_orderly_removal_as_pciehp_does_it() {
    let mut rig = Rig::new(SlotKind::Button);
    rig.port.occupy_at_start();
    assert!(rig.port.link());
    let on = rig.read(SLOT_CONTROL);
    rig.express(SLOT_CONTROL, on | PCIEHP_BUTTON);
    assert_eq!(rig.messages(), 1, "command completed");
    assert_eq!(rig.acknowledge(), EVENT_COMMAND);

    rig.port.press_button();
    assert_eq!((rig.messages(), rig.acknowledge()), (1, EVENT_BUTTON));
    let control = rig.read(SLOT_CONTROL);
    let changes = rig.express(SLOT_CONTROL, control & !(3 << POWER_SHIFT) | 2 << POWER_SHIFT);
    assert_eq!(changes, [SlotChange::PowerIndicator(Indicator::Blink)]);
    rig.acknowledge();
    let control = rig.read(SLOT_CONTROL);
    let changes = rig.express(SLOT_CONTROL, control | POWER_OFF);
    assert_eq!(changes, [SlotChange::PowerOff]);
    assert!(!rig.port.link() && rig.port.occupied());
    assert_eq!(rig.port.decode().bridge, None, "nothing behind it answers");
    assert!(rig.port.take_reset_behind());
    assert_eq!(rig.acknowledge(), EVENT_COMMAND | EVENT_LINK);
    let changes = rig.express(SLOT_CONTROL, rig.read(SLOT_CONTROL) | 3 << POWER_SHIFT);
    assert_eq!(changes, [SlotChange::PowerIndicator(Indicator::Off), SlotChange::Released]);
    assert_eq!(rig.acknowledge(), EVENT_COMMAND);
    rig.port.set_occupied(false);
    assert_eq!(rig.acknowledge(), EVENT_PRESENCE);
    assert_eq!(rig.read(SLOT_STATUS), 0);
}

#[test]
fn a_dark_indicator_releases_only_what_had_power() {
    let mut rig = Rig::new(SlotKind::Button);
    rig.port.set_occupied(true);
    let dark = rig.read(SLOT_CONTROL);
    let blinking = dark & !(3 << POWER_SHIFT) | 2 << POWER_SHIFT;
    rig.express(SLOT_CONTROL, blinking);
    let changes = rig.express(SLOT_CONTROL, dark);
    assert_eq!(changes, [SlotChange::PowerIndicator(Indicator::Off)], "a request that was taken back");
    assert_eq!(rig.express(SLOT_CONTROL, dark & !POWER_OFF), [SlotChange::PowerOn]);
    assert_eq!(rig.express(SLOT_CONTROL, dark), [SlotChange::PowerOff, SlotChange::Released]);
    assert_eq!(rig.express(SLOT_CONTROL, dark), []);
}

#[test]
fn a_pulled_card_is_told_of_once_with_everything() {
    for (kind, enables) in
        [(SlotKind::Button, PCIEHP_BUTTON), (SlotKind::Plain, EVENT_PRESENCE | HPIE | ENABLE_LINK)]
    {
        let mut rig = Rig::new(kind);
        rig.port.occupy_at_start();
        let on = rig.read(SLOT_CONTROL);
        rig.express(SLOT_CONTROL, on | enables);
        rig.acknowledge();
        rig.messages();
        rig.port.set_occupied(false);
        assert_eq!(rig.port.decode().bridge, None);
        assert_eq!(rig.read(LINK_STATUS) & LINK_ACTIVE, 0);
        assert_eq!((rig.messages(), rig.acknowledge()), (1, EVENT_PRESENCE | EVENT_LINK), "{kind:?}");
    }
}

#[test]
fn a_message_waits_for_its_mask() {
    let mut rig = Rig::new(SlotKind::Plain);
    rig.express(SLOT_CONTROL, EVENT_PRESENCE | HPIE | ENABLE_LINK);
    rig.write(rig.msi + 0x10, &[1, 0, 0, 0]);
    rig.port.set_occupied(true);
    assert_eq!(rig.messages(), 0);
    assert_eq!(rig.port.config.u32(usize::from(rig.msi) + 0x14), 1);
    rig.write(rig.msi + 0x10, &[0, 0, 0, 0]);
    assert_eq!(rig.messages(), 1);
    assert_eq!(rig.port.config.u32(usize::from(rig.msi) + 0x14), 0);
}

#[test]
fn a_reset_of_the_secondary_bus_is_seen_once() {
    let mut rig = Rig::new(SlotKind::Plain);
    assert!(!rig.port.take_reset_behind());
    rig.write(0x3e, &[0x40, 0]);
    rig.write(0x3e, &[0x40, 0]);
    assert!(rig.port.take_reset_behind());
    rig.write(0x3e, &[0, 0]);
    assert!(!rig.port.take_reset_behind());
}

/// What can happen to a port.
#[derive(Clone, Debug)]
enum Step {
    Control(u16),
    Status(u16),
    LinkControl(u16),
    Button,
    Occupied(bool),
    Any(u16, Vec<u8>),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        any::<u16>().prop_map(Step::Control),
        any::<u16>().prop_map(Step::Status),
        any::<u16>().prop_map(Step::LinkControl),
        Just(Step::Button),
        any::<bool>().prop_map(Step::Occupied),
    ]
}

/// The slot in words of the specification, kept apart from the registers.
#[derive(Clone, Copy, Debug, Default)]
struct Model {
    button: bool,
    occupied: bool,
    power: bool,
    disabled: bool,
    link: bool,
    /// Events that the guest has not cleared.
    events: u16,
    /// Events that the guest wants to hear of, by their place in Slot Status.
    wanted: u16,
    interrupt: bool,
    heard: bool,
    messages: usize,
}

impl Model {
    fn settle(&mut self) {
        let link = self.occupied && self.power && !self.disabled;
        if link != self.link {
            self.link = link;
            self.events |= EVENT_LINK;
        }
    }

    fn hear(&mut self) {
        let condition = self.interrupt && self.events & self.wanted != 0;
        self.messages += usize::from(condition && !self.heard);
        self.heard = condition;
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::Control(value) => {
                self.wanted = value & EVENT_PRESENCE;
                if value & ENABLE_LINK != 0 {
                    self.wanted |= EVENT_LINK;
                }
                self.interrupt = value & HPIE != 0;
                if self.button {
                    self.wanted |= value & (EVENT_BUTTON | EVENT_POWER_FAULT | EVENT_COMMAND);
                    self.power = value & POWER_OFF == 0;
                    self.events |= EVENT_COMMAND;
                }
                self.settle();
            }
            Step::Status(value) => self.events &= !value,
            Step::LinkControl(value) => {
                self.disabled = value & LINK_DISABLE != 0;
                self.settle();
            }
            Step::Button => {
                if self.button {
                    self.events |= EVENT_BUTTON;
                }
            }
            Step::Occupied(occupied) => {
                if self.occupied != occupied {
                    self.occupied = occupied;
                    self.events |= EVENT_PRESENCE;
                    self.settle();
                }
            }
            Step::Any(..) => unreachable!("the model knows no such write"),
        }
        self.hear();
    }
}

fn apply(rig: &mut Rig, step: &Step) {
    match step {
        Step::Control(value) => drop(rig.express(SLOT_CONTROL, *value)),
        Step::Status(value) => drop(rig.express(SLOT_STATUS, *value)),
        Step::LinkControl(value) => drop(rig.express(LINK_CONTROL, *value)),
        Step::Button => rig.port.press_button(),
        Step::Occupied(occupied) => rig.port.set_occupied(*occupied),
        Step::Any(offset, data) => drop(rig.write(*offset, data)),
    }
}

proptest! {
    #[test]
    fn a_port_is_its_model(button in any::<bool>(), steps in prop::collection::vec(step(), 0..60)) {
        let kind = if button { SlotKind::Button } else { SlotKind::Plain };
        let mut rig = Rig::new(kind);
        let mut model = Model { button, power: !button, ..Model::default() };
        for step in &steps {
            apply(&mut rig, step);
            model.step(step);
            prop_assert_eq!(rig.read(SLOT_STATUS) & EVENTS, model.events, "{:?}", step);
            prop_assert_eq!(rig.read(SLOT_STATUS) & STATUS_PRESENT != 0, model.occupied);
            prop_assert_eq!(rig.read(LINK_STATUS) & LINK_ACTIVE != 0, model.link);
            prop_assert_eq!(rig.port.decode().bridge.is_some(), model.link);
            prop_assert!(model.button || rig.read(SLOT_CONTROL) & POWER_OFF == 0);
        }
        prop_assert_eq!(rig.messages(), model.messages);
    }

    #[test]
    fn any_write_leaves_a_port_that_works(
        button in any::<bool>(),
        steps in prop::collection::vec(
            prop_oneof![
                step(),
                (0u16..0x1000, prop::collection::vec(any::<u8>(), 1..=8)).prop_map(|(at, data)| Step::Any(at, data)),
                (0u16..0x100, prop::collection::vec(any::<u8>(), 1..=8)).prop_map(|(at, data)| Step::Any(at, data)),
            ],
            0..100,
        ),
    ) {
        let kind = if button { SlotKind::Button } else { SlotKind::Plain };
        let mut rig = Rig::new(kind);
        let identity = rig.port.config.u32(0);
        for step in &steps {
            apply(&mut rig, step);
            prop_assert_eq!(rig.port.decode().bridge.is_some(), rig.port.link());
            prop_assert!(rig.port.occupied() || !rig.port.link());
        }
        prop_assert_eq!(rig.port.config.u32(0), identity);
        rig.port.reset();
        let fresh = RootPort::new(ID, kind, 3, Arc::new(RecordingSink::default())).unwrap();
        prop_assert_eq!(rig.port.config.u16(0x18), fresh.config.u16(0x18));
        prop_assert_eq!(rig.port.link(), rig.port.occupied());
    }
}
