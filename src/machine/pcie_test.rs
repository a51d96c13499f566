use aconite_devices::bus::Effects;
use aconite_devices::pci::HostBridge;

use super::*;

struct Nobody;

impl MsiSink for Nobody {
    fn signal(&self, _address: u64, _data: u32) {}
}

impl QueueHandler for Nobody {
    fn process_queue(&mut self, _queue: u16, _effects: &mut Effects) {}
}

fn pcie(ports: u32, bridges: u32) -> (Pcie, HotplugBridgesState, PciRoot) {
    let (root, state) = (PciRoot::new(), HotplugBridgesState::new(8));
    let msi: Arc<dyn MsiSink> = Arc::new(Nobody);
    let pcie = Pcie::new(root.clone(), ports, SlotKind::Button, bridges, state.clone(), &msi).unwrap();
    (pcie, state, root)
}

fn card(pcie: &mut Pcie, id: &str) -> Card {
    let function = Arc::new(Mutex::new(HostBridge::new()));
    let (id, device) = (id.to_owned(), pcie.name_card());
    Card { kind: CardKind::Memory, id, device, function, queues: Arc::new(Mutex::new(Nobody)) }
}

/// Puts a card of that id behind a host bridge.
fn insert(pcie: &mut Pcie, id: &str) -> Result<(), PcieError> {
    let card = card(pcie, id);
    pcie.insert(card, At::HostBridge, None)
}

#[test]
fn ports_and_bridges_do_not_stand_in_for_each_other() {
    let (mut pcie, state, root) = pcie(1, 1);
    let first = card(&mut pcie, "p0");
    pcie.install(first, At::HostBridge).unwrap();
    assert!(state.present(0));
    assert_eq!([At::Port, At::HostBridge].map(|at| pcie.free_places(at)), [1, 0]);
    let message = insert(&mut pcie, "p1").unwrap_err().to_string();
    assert_eq!(message, "No host bridge is free for p1: declare more (--slots bridge=N), or remove a device");
    assert_eq!(pcie.check_free(At::HostBridge).unwrap_err().code, ErrorCode::NoFreeSlot);
    let second = card(&mut pcie, "p1");
    pcie.insert(second, At::Port, None).unwrap();
    let buses: Vec<_> = root.functions().iter().map(|(_, bus, _)| *bus).collect();
    assert_eq!(buses, [PciBus::Root(0), PciBus::Root(0xff), PciBus::Behind(DeviceId(PORT_IDS))]);
}

#[test]
fn a_bridge_is_taken_until_the_guest_has_let_go() {
    let (mut pcie, state, root) = pcie(0, 1);
    insert(&mut pcie, "p0").unwrap();
    assert!(pcie.answers("p0"));
    pcie.pull("p0");
    assert!(!state.present(0) && !pcie.answers("p0"));
    assert_eq!(root.functions(), []);
    assert_eq!(pcie.behind(0), Some("p0"), "the guest may still say something of it");
    assert!(insert(&mut pcie, "p1").is_err());
    pcie.let_go_of_bridge(0);
    insert(&mut pcie, "p1").unwrap();
    assert!(state.present(0));
    assert_eq!(pcie.behind(0), Some("p1"));
    assert_eq!(pcie.bridge_of(CardKind::Memory, "p0"), None);
}

#[test]
fn a_card_is_known_where_it_was_last() {
    let (mut pcie, _, _) = pcie(0, 2);
    insert(&mut pcie, "p0").unwrap();
    pcie.pull("p0");
    insert(&mut pcie, "p0").unwrap();
    assert_eq!(pcie.bridge_of(CardKind::Memory, "p0"), Some(1), "the guest has not let go of bridge 0");
    assert_eq!(pcie.behind(0), None, "what the guest says of bridge 0 is not about p0 any more");
    pcie.pull("p0");
    assert_eq!(pcie.bridge_of(CardKind::Memory, "p0"), Some(1));
    assert_eq!(pcie.bridge_of(CardKind::Disk, "p0"), None);
}
