//! Registers and methods of what comes and goes with notifications: `_STA`, `_EJ0` and `_OST`.

use acpi_tables::aml::{
    And, Arg, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, Local, Method, Name, ONE,
    OpRegion, OpRegionSpace, Or, Return, ShiftLeft, Store,
};

use super::Body;
use crate::platform::hotplug;

/// The device's registers at `base`, with one of its own kind. Every field is one whole access, so nothing is ever read to
/// be written back.
pub(super) fn registers(base: u64, own: [u8; 4]) -> Body {
    const {
        assert!(hotplug::STATUS == 0 && hotplug::EJECT == 4 && hotplug::OS_STATUS == 12);
        assert!(hotplug::DOORBELL == 8 && hotplug::WINDOW == 8 && hotplug::SIZE == 16);
    };
    let mut body = Body::default();
    body.push(&OpRegion::new("REGS".into(), OpRegionSpace::SystemMemory, &base, &hotplug::SIZE));
    body.push(&Field::new(
        "REGS".into(),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        vec![
            FieldEntry::Named(*b"STAT", 32),
            FieldEntry::Named(*b"EJCT", 32),
            FieldEntry::Named(own, 32),
            FieldEntry::Named(*b"OSTA", 32),
        ],
    ));
    body
}

/// `_STA`.
pub(super) fn status() -> Body {
    let mut body = Body::default();
    body.push(&Method::new("_STA".into(), 0, false, vec![&Return::new(&Name::new_field_name("STAT"))]));
    body
}

/// `_EJ0` and `_OST`.
pub(super) fn answers() -> Body {
    let mut body = Body::default();
    body.push(&Method::new("_EJ0".into(), 1, false, vec![&Store::new(&Name::new_field_name("EJCT"), &ONE)]));
    body.push(&os_status());
    body
}

/// `_OST (event, status, details)`: what the OS has come to with a notification, so that nobody has to guess.
fn os_status() -> Body {
    let (event, status) = (Local(0), Local(1));
    let mut body = Body::default();
    body.push(&Method::new(
        "_OST".into(),
        3,
        false,
        vec![
            &And::new(&event, &Arg(0), &0xFFFFu16),
            &And::new(&status, &Arg(1), &0xFFFFu16),
            &ShiftLeft::new(&status, &status, &16u8),
            &Or::new(&Name::new_field_name("OSTA"), &event, &status),
        ],
    ));
    body
}
