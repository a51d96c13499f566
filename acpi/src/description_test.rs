use super::*;
use crate::sample::{sample, slot_base, unit};

fn error(change: impl FnOnce(&mut Description)) -> Error {
    let mut description = sample();
    change(&mut description);
    description.check().expect_err("a wrong description")
}

#[test]
fn sample_is_right() {
    assert_eq!(sample().check(), Ok(()));
    assert_eq!(sample().proximity_domains(), 4);
}

#[test]
fn processors_must_be_distinct() {
    assert_eq!(error(|d| d.processors.clear()), Error::NoProcessors);
    assert_eq!(error(|d| d.processors[1].apic_id = 0), Error::ApicIdTwice(0));
    assert_eq!(error(|d| d.processors[1].apic_id = 255), Error::ApicIdBroadcast(255));
}

#[test]
fn units_are_bounded_and_numbered() {
    let slot = sample().units[2].clone();
    assert_eq!(error(|d| d.units = vec![slot; 65]), Error::TooManyUnits(65));
    assert_eq!(error(|d| d.units[2].occupant = Some(unit(1))), Error::WrongUnit { slot: 2, given: 1 });
    let message = error(|d| d.units[0].windows[0].range.size /= 2).to_string();
    assert_eq!(
        message,
        "Range 0x240000000+0x40000000 of unit 0 is outside the windows of its slot: place it inside one"
    );
    assert_eq!(error(|d| d.units[1].dimms = 0), Error::MissingDimms { unit: 1, dimms: 1, room: 0 });
    assert_eq!(error(|d| d.units[2].dimms = 33), Error::TooManyDimms { unit: 2, dimms: 33 });
}

#[test]
fn ranges_must_be_sound_and_disjoint() {
    assert!(matches!(error(|d| d.memory[0].range.size = 0), Error::BadRange { what: "Memory range", .. }));
    assert!(matches!(
        error(|d| d.pci_window64 = Some(AddressRange { base: u64::MAX, size: 2 })),
        Error::BadRange { .. }
    ));
    assert!(matches!(error(|d| d.units[2].windows[0].range.base = slot_base(1) + 1), Error::Overlap { .. }));
    let bridges = sample().host_bridges.unwrap();
    let windows = AddressRange { base: bridges.windows.base - 1, ..bridges.windows };
    assert!(matches!(
        error(|d| d.host_bridges = Some(HostBridges { windows, ..bridges })),
        Error::Overlap { .. }
    ));
    let many = HostBridges { count: 17, ..bridges };
    assert_eq!(error(|d| d.host_bridges = Some(many)), Error::TooManyHostBridges(17));
    assert!(matches!(error(|d| d.memory[1].range.size = 1 << 40), Error::Overlap { .. }));
}

#[test]
fn proximity_domains_are_bounded() {
    assert_eq!(error(|d| d.units[1].windows[0].proximity = 256), Error::ProximityTooLarge(256));
}
