//! Generic event device: takes firmware events off the platform's queue and notifies.

use acpi_tables::aml::{
    And, Device, Equal, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, If, Local,
    Method, Name, NotEqual, Notify, OpRegion, OpRegionSpace, Path, ResourceTemplate, ShiftRight, Store,
    While, ZERO,
};

use super::{Body, legacy::edge_interrupt};
use crate::Description;
use crate::layout::{GED_GSI, PLATFORM_BASE};
use crate::platform::{EVENT, EventTarget};

/// ACPI0013 (ACPI 6.5, 5.6.9). `_EVT` reads the event register until it is empty, since one edge of the
/// interrupt can stand for several events.
pub(super) fn append(body: &mut Body, description: &Description) {
    let event = Name::new_field_name("EVNT");
    let mut dispatch = Body::default();
    dispatch.push(&ShiftRight::new(&Local(1), &Local(0), &8u8));
    dispatch.push(&And::new(&Local(2), &Local(0), &0xFFu8));
    let unit_targets = (0..).zip(&description.units).flat_map(|(unit, slot)| {
        let dimms = (0..slot.dimms).map(move |dimm| EventTarget::Dimm { unit, dimm });
        [EventTarget::Container(unit), EventTarget::Root(unit)].into_iter().chain(dimms)
    });
    let bridges = 0..description.host_bridges.map_or(0, |bridges| bridges.count);
    let bridges = bridges.map(EventTarget::HostBridge);
    for target in unit_targets.chain([EventTarget::ErrorDevice]).chain(bridges) {
        dispatch.push(&If::new(
            &Equal::new(&Local(1), &(target.index() + 1)),
            vec![&Notify::new(&Path::new(&super::target_path(target)), &Local(2))],
        ));
    }
    body.push(&Device::new(
        "GED_".into(),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&edge_interrupt(GED_GSI)])),
            &OpRegion::new("PLAT".into(), OpRegionSpace::SystemMemory, &(PLATFORM_BASE + EVENT), &4u8),
            &Field::new(
                "PLAT".into(),
                FieldAccessType::DWord,
                FieldLockRule::NoLock,
                FieldUpdateRule::WriteAsZeroes,
                vec![FieldEntry::Named(*b"EVNT", 32)],
            ),
            &Method::new(
                "_EVT".into(),
                1,
                true,
                vec![
                    &Store::new(&Local(0), &event),
                    &While::new(
                        &NotEqual::new(&Local(0), &ZERO),
                        vec![&dispatch, &Store::new(&Local(0), &event)],
                    ),
                ],
            ),
        ],
    ));
}
