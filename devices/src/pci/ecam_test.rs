use std::sync::{Arc, Mutex};

use proptest::prelude::*;

use super::super::{
    BarKind, BarRange, BarWindows, BridgeDecode, ConfigSpace, Decode, HostBridge, Identity, PciBus, PciError,
    PciFunction, RootPort, SlotChange, SlotKind, assign_bars,
};
use super::*;
use crate::bus::{Bus, DeviceId, Effect};

const ECAM: u64 = 0xc000_0000;
const LOW: (u64, u64) = (0xd000_0000, 0x2e80_0000);
const HIGH: (u64, u64) = (0x80_0000_0000, 0x10_0000_0000);
fn windows() -> BarWindows {
    BarWindows { low: LOW.0..LOW.0 + LOW.1, high: HIGH.0..HIGH.0 + HIGH.1 }
}

const ENDPOINT: Identity = Identity {
    vendor: 0x1af4,
    device: 0x1050,
    revision: 1,
    class: 0x00ff00,
    subsystem_vendor: 0x1af4,
    subsystem: 0x1100,
};

/// An endpoint with two BARs that read as bar + offset, and a write that asks for a reset.
struct Endpoint(ConfigSpace);

impl Endpoint {
    fn shared() -> Arc<Mutex<Self>> {
        let mut config = ConfigSpace::new(ENDPOINT);
        config.add_bar(0, 0x4000, BarKind::Memory64).unwrap();
        config.add_bar(2, 0x1_0000, BarKind::Prefetchable64).unwrap();
        Arc::new(Mutex::new(Self(config)))
    }
}

impl PciFunction for Endpoint {
    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        self.0.read(offset, data);
    }

    fn config_write(&mut self, offset: u16, data: &[u8], _effects: &mut Effects) {
        self.0.write(offset, data);
    }

    fn decode(&self) -> Decode {
        self.0.decode()
    }

    fn bar_read(&mut self, bar: u8, offset: u64, data: &mut [u8]) {
        data.fill(bar.wrapping_add(offset as u8));
    }

    fn bar_write(&mut self, _bar: u8, _offset: u64, _data: &[u8], effects: &mut Effects) {
        effects.push(Effect::Reset);
    }

    fn reset(&mut self) {}
}

/// A bridge with byte 0x19 and 0x1a as bus numbers, forwarding one fixed window.
struct Bridge {
    secondary: u8,
    subordinate: u8,
}

impl PciFunction for Bridge {
    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        let header = [0x36, 0x1b, 0x0c, 0, 0, 0, 0, 0, 0, 0, 4, 6, 0, 0, 1, 0];
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = header.get(usize::from(offset) + index).copied().unwrap_or(0);
        }
    }

    fn config_write(&mut self, offset: u16, data: &[u8], _effects: &mut Effects) {
        match (offset, data) {
            (0x19, [bus]) => self.secondary = *bus,
            (0x1a, [bus]) => self.subordinate = *bus,
            _ => {}
        }
    }

    fn decode(&self) -> Decode {
        let bridge = BridgeDecode {
            secondary: self.secondary,
            subordinate: self.subordinate,
            windows: vec![(0xe000_0000, 0xe00f_ffff)],
        };
        Decode { bars: Vec::new(), bridge: Some(bridge) }
    }

    fn bar_read(&mut self, _bar: u8, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn bar_write(&mut self, _bar: u8, _offset: u64, _data: &[u8], _effects: &mut Effects) {}

    fn reset(&mut self) {}
}

struct Machine {
    root: PciRoot,
    bus: Bus,
}

impl Machine {
    fn new() -> Self {
        let root = PciRoot::new();
        let mut bus = Bus::new();
        let ecam = Ecam::new(root.clone());
        bus.insert("ecam", ECAM, 256 * ECAM_BUS_SIZE, Arc::new(Mutex::new(ecam))).unwrap();
        for (name, (base, size)) in [("pci32", LOW), ("pci64", HIGH)] {
            bus.insert(name, base, size, Arc::new(Mutex::new(PciWindow::new(root.clone(), base)))).unwrap();
        }
        root.insert(PciBus::Root(0), DevFn::new(0, 0), DeviceId(0), Arc::new(Mutex::new(HostBridge::new())))
            .unwrap();
        Self { root, bus }
    }

    fn address(bus: u8, devfn: DevFn, register: u16) -> u64 {
        let devfn = u64::from(devfn.device()) << 3 | u64::from(devfn.function());
        ECAM + (u64::from(bus) << 20 | devfn << 12 | u64::from(register))
    }

    fn get(&self, bus: u8, devfn: DevFn, register: u16) -> u32 {
        let mut data = [0; 4];
        self.bus.read(Self::address(bus, devfn, register), &mut data);
        u32::from_le_bytes(data)
    }

    fn put(&self, bus: u8, devfn: DevFn, register: u16, data: &[u8]) {
        self.bus.write(Self::address(bus, devfn, register), data, &mut Effects::new());
    }

    fn memory(&self, address: u64) -> u8 {
        let mut data = [0];
        self.bus.read(address, &mut data);
        data[0]
    }
}

#[test]
fn present_functions_answer_and_absent_ones_read_as_ones() {
    let machine = Machine::new();
    let slot = DevFn::new(3, 0);
    machine.root.insert(PciBus::Root(0), slot, DeviceId(1), Endpoint::shared()).unwrap();
    assert_eq!(machine.get(0, DevFn::new(0, 0), 0), 0x0008_1b36);
    assert_eq!(machine.get(0, slot, 0), 0x1050_1af4);
    for (bus, devfn) in [(0, DevFn::new(3, 1)), (0, DevFn::new(31, 7)), (1, slot), (255, slot)] {
        assert_eq!(machine.get(bus, devfn, 0), u32::MAX);
        machine.put(bus, devfn, 4, &[7]);
    }
    let mut crossing = [0; 8];
    machine.bus.read(Machine::address(0, slot, 0xffc), &mut crossing);
    assert_eq!(crossing, [0xff; 8]);
}

#[test]
fn memory_follows_the_bars() {
    let machine = Machine::new();
    let slot = DevFn::new(1, 0);
    machine.root.insert(PciBus::Root(0), slot, DeviceId(1), Endpoint::shared()).unwrap();
    machine.put(0, slot, 0x10, &0xd000_4000u32.to_le_bytes());
    machine.put(0, slot, 0x1c, &0x80u32.to_le_bytes());
    assert_eq!(machine.memory(0xd000_4005), 0xff, "decoding is off");
    machine.put(0, slot, 4, &[2]);
    assert_eq!(machine.memory(0xd000_4005), 5);
    assert_eq!(machine.memory(0x80_0000_0003), 5);
    machine.put(0, slot, 0x10, &0xd001_0000u32.to_le_bytes());
    assert_eq!(machine.memory(0xd000_4005), 0xff);
    assert_eq!(machine.memory(0xd001_0005), 5);
    let mut effects = Effects::new();
    machine.bus.write(0xd001_0000, &[1], &mut effects);
    machine.bus.write(0xd001_3fff, &[1, 1], &mut effects);
    assert_eq!(effects.as_slice(), [Effect::Reset]);
    let mut crossing = [0; 2];
    machine.bus.read(0xd001_3fff, &mut crossing);
    assert_eq!(crossing, [0xff; 2]);
}

#[test]
fn a_removed_function_reads_as_ones() {
    let machine = Machine::new();
    let slot = DevFn::new(1, 0);
    machine.root.insert(PciBus::Root(0), slot, DeviceId(1), Endpoint::shared()).unwrap();
    machine.put(0, slot, 0x10, &0xd000_4000u32.to_le_bytes());
    machine.put(0, slot, 4, &[2]);
    assert_eq!(machine.root.remove(DeviceId(1)).len(), 1);
    assert_eq!(machine.get(0, slot, 0), u32::MAX);
    assert_eq!(machine.memory(0xd000_4000), 0xff);
    assert!(machine.root.remove(DeviceId(1)).is_empty());
}

#[test]
fn wrong_places_are_refused() {
    let root = PciRoot::new();
    let slot = DevFn::new(1, 0);
    root.insert(PciBus::Root(0), slot, DeviceId(1), Endpoint::shared()).unwrap();
    let again = |bus, devfn, id| root.insert(bus, devfn, DeviceId(id), Endpoint::shared()).unwrap_err();
    assert_eq!(again(PciBus::Root(0), slot, 2), PciError::SlotTaken { devfn: slot, by: DeviceId(1) });
    assert_eq!(again(PciBus::Root(0), DevFn::new(2, 0), 1), PciError::Duplicate { id: DeviceId(1) });
    assert_eq!(again(PciBus::Behind(DeviceId(9)), slot, 2), PciError::NoPort { port: DeviceId(9) });
}

#[test]
fn bridges_forward_their_buses_and_windows() {
    let machine = Machine::new();
    let port = DevFn::new(2, 0);
    let slot = DevFn::new(0, 0);
    let bridge = Arc::new(Mutex::new(Bridge { secondary: 0, subordinate: 0 }));
    machine.root.insert(PciBus::Root(0), port, DeviceId(1), bridge).unwrap();
    machine.root.insert(PciBus::Behind(DeviceId(1)), slot, DeviceId(2), Endpoint::shared()).unwrap();
    assert_eq!(machine.get(1, slot, 0), u32::MAX);
    machine.put(0, port, 0x19, &[4]);
    machine.put(0, port, 0x1a, &[6]);
    assert_eq!(machine.get(4, slot, 0), 0x1050_1af4);
    assert_eq!(machine.get(5, slot, 0), u32::MAX);
    machine.put(4, slot, 0x10, &0xe000_0000u32.to_le_bytes());
    machine.put(4, slot, 4, &[2]);
    assert_eq!(machine.memory(0xe000_0001), 1);
    machine.put(4, slot, 0x10, &0xe010_0000u32.to_le_bytes());
    assert_eq!(machine.memory(0xe010_0001), 0xff, "outside the bridge's window");
    assert_eq!(machine.root.remove(DeviceId(1)).len(), 2);
    assert_eq!(machine.get(4, slot, 0), u32::MAX);
}

#[test]
fn a_root_bus_answers_while_something_is_on_it() {
    let machine = Machine::new();
    let slot = DevFn::new(0, 0);
    let bridge = Arc::new(Mutex::new(Bridge { secondary: 4, subordinate: 255 }));
    machine.root.insert(PciBus::Root(0), DevFn::new(2, 0), DeviceId(1), bridge).unwrap();
    assert_eq!(machine.get(255, slot, 0), u32::MAX);
    machine.root.insert(PciBus::Root(255), slot, DeviceId(2), Endpoint::shared()).unwrap();
    assert_eq!(machine.get(255, slot, 0), 0x1050_1af4);
    assert_eq!(machine.get(254, slot, 0), u32::MAX);
    assign_bars(&machine.root, windows()).unwrap();
    assert_eq!(machine.get(255, slot, 0x10) & !0xf, 0, "firmware places what is on root bus 0");
    machine.put(255, slot, 0x10, &0xd000_4000u32.to_le_bytes());
    machine.put(255, slot, 4, &[2]);
    assert_eq!(machine.memory(0xd000_4005), 5, "no bridge is above it");
    machine.root.remove(DeviceId(2));
    assert_eq!(machine.get(255, slot, 0), u32::MAX);
    assert_eq!(machine.memory(0xd000_4005), 0xff);
}

#[test]
fn firmware_places_bars_aligned_and_apart() {
    let machine = Machine::new();
    for device in 1..4 {
        let id = DeviceId(device.into());
        machine.root.insert(PciBus::Root(0), DevFn::new(device, 0), id, Endpoint::shared()).unwrap();
    }
    assign_bars(&machine.root, windows()).unwrap();
    let mut ranges: Vec<BarRange> = Vec::new();
    for device in 1..4 {
        assert_eq!(machine.root.decoded(), ranges, "decoding stays off");
        machine.put(0, DevFn::new(device, 0), 4, &[2]);
        ranges = machine.root.decoded();
    }
    assert_eq!(ranges.len(), 6);
    for pair in ranges.windows(2) {
        assert!(pair[0].base + pair[0].size <= pair[1].base);
    }
    assert!(ranges.iter().all(|range| range.base % range.size == 0 && range.base >= HIGH.0));
    let before = ranges.clone();
    assign_bars(&machine.root, windows()).unwrap();
    assert_eq!(machine.root.decoded(), before, "what has an address keeps it");
}

#[test]
fn a_full_window_names_the_bar() {
    let machine = Machine::new();
    machine.root.insert(PciBus::Root(0), DevFn::new(1, 0), DeviceId(1), Endpoint::shared()).unwrap();
    let windows = BarWindows { high: 0x1_0000..0x1_8000, ..windows() };
    let error = assign_bars(&machine.root, windows).unwrap_err();
    assert_eq!(error, PciError::WindowFull { devfn: DevFn::new(1, 0), bar: 2, size: 0x1_0000 });
}

proptest! {
    #[test]
    fn any_access_is_answered_and_identities_stay(
        accesses in prop::collection::vec(
            (any::<bool>(), 0u64..0x10_0000, 0u8..3, prop::collection::vec(any::<u8>(), 1..=8)),
            0..300,
        ),
    ) {
        let machine = Machine::new();
        for device in 1..3 {
            let id = DeviceId(device.into());
            machine.root.insert(PciBus::Root(0), DevFn::new(device, 0), id, Endpoint::shared()).unwrap();
        }
        let mut effects = Effects::new();
        for (write, offset, space, mut data) in accesses {
            let base = [ECAM, LOW.0, HIGH.0][usize::from(space)];
            // Half of the configuration accesses go to functions that exist.
            let offset = if space == 0 && offset & 1 == 0 { offset & 0x10fff } else { offset };
            if write {
                machine.bus.write(base + offset, &data, &mut effects);
            } else {
                machine.bus.read(base + offset, &mut data);
            }
        }
        prop_assert_eq!(machine.get(0, DevFn::new(0, 0), 0), 0x0008_1b36);
        for device in 1..3 {
            prop_assert_eq!(machine.get(0, DevFn::new(device, 0), 0), 0x1050_1af4);
            prop_assert_eq!(machine.get(0, DevFn::new(device, 0), 8), 0x00ff_0001);
            prop_assert_eq!(machine.get(0, DevFn::new(device, 0), 0x2c), 0x1100_1af4);
        }
    }
}

#[test]
fn a_slot_without_power_shows_nothing_and_its_card_starts_anew() {
    const PORT: DeviceId = DeviceId(20);
    const CARD: DeviceId = DeviceId(21);
    let root = PciRoot::new();
    let sink = Arc::new(crate::irq::testing::RecordingSink::default());
    let mut port = RootPort::new(PORT, SlotKind::Button, 1, sink).unwrap();
    port.occupy_at_start();
    root.insert(PciBus::Root(0), DevFn::new(2, 0), PORT, Arc::new(Mutex::new(port))).unwrap();
    let wiring = crate::virtio::Wiring {
        id: CARD,
        dma: crate::dma::testing::dma(&[(0, 0x1000)]).0,
        msi: Arc::new(crate::irq::testing::RecordingSink::default()),
        express: Some(super::super::PortType::Endpoint),
    };
    let console = crate::virtio::console::Console::new(["port"]);
    let card = Arc::new(Mutex::new(crate::virtio::VirtioPci::new(console, wiring).unwrap()));
    root.insert(PciBus::Behind(PORT), DevFn::new(0, 0), CARD, card).unwrap();

    let mut ecam = Ecam::new(root.clone());
    let mut effects = Effects::new();
    let at_port = |register: u64| 2 << 15 | register;
    let at_card = |register: u64| ECAM_BUS_SIZE | register;
    let read = |ecam: &mut Ecam, offset| {
        let mut data = [0; 4];
        ecam.read(offset, &mut data);
        u32::from_le_bytes(data)
    };
    ecam.write(at_port(0x18), &[0, 1, 1], &mut effects);
    assert_eq!(read(&mut ecam, at_card(0)), 0x1043_1af4);
    ecam.write(at_card(4), &[6, 0], &mut effects);
    ecam.write(at_card(0x10), &0xd000_0000u32.to_le_bytes(), &mut effects);
    assert_eq!((read(&mut ecam, at_card(4)) & 0xffff, read(&mut ecam, at_card(0x10)) >> 4), (6, 0xd00_0000));

    let control = at_port(0x40 + 0x18);
    let on = read(&mut ecam, control) as u16;
    ecam.write(control, &(on | 1 << 10).to_le_bytes(), &mut effects);
    assert_eq!(read(&mut ecam, at_card(0)), u32::MAX, "no power, no configuration space");
    let off = Effect::Slot { port: PORT, change: SlotChange::PowerOff };
    assert!(effects.as_slice().contains(&off));
    ecam.write(control, &on.to_le_bytes(), &mut effects);
    assert_eq!(read(&mut ecam, at_card(0)), 0x1043_1af4);
    assert_eq!((read(&mut ecam, at_card(4)) & 0xffff, read(&mut ecam, at_card(0x10)) >> 4), (0, 0));
}
