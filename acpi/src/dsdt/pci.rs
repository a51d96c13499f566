//! PCI Express host bridges of segment 0: one that is always there, and those that come and go with a root bus each.

use acpi_tables::aml::{
    Add, AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, CreateQWordField, Device, EISAName,
    Else, Equal, IO, If, Local, Method, Multiply, Name, NotEqual, ONE, Or, Path, ResourceTemplate, Return,
    Store, Uuid, ZERO,
};

use super::{Body, hotplug};
use crate::layout::{
    HOST_BRIDGE_WINDOW, PCI_CONFIG_PORT, PCI_MMIO32_BASE, PLATFORM_BASE, host_bridge_base, host_bridge_bus,
};
use crate::{AddressRange, Description};

/// `_OSC` of PCI host bridges (PCI Firmware Specification 3.3, 4.5.1).
const OSC_UUID: &str = "33db4d5b-1ff7-401c-9657-7441c03dd766";
/// What the OS may control: native hot-plug (0), PME (2), AER (3), the PCI Express capability (4). Not SHPC
/// hot-plug (1): there is no such controller; not LTR (5) and DPC (7): no port has them.
const OSC_CONTROL: u32 = 0b1_1101;
/// Status bits of the first `_OSC` word.
const OSC_UNKNOWN_UUID: u32 = 1 << 2;
const OSC_UNKNOWN_REVISION: u32 = 1 << 3;
const OSC_MASKED: u32 = 1 << 4;

/// Appends the bridge that is always there, with its windows (the buses that no other has, all I/O ports but those of
/// configuration mechanism #1, the 32-bit memory window, and the 64-bit one if there is one), and those that come and go.
pub(super) fn append(body: &mut Body, description: &Description) {
    let others = description.host_bridges.map_or(0, |bridges| bridges.count);
    let mut windows = Body::default();
    windows.push(&AddressSpace::new_bus_number(0u16, u16::from(u8::MAX) - others as u16));
    windows.push(&IO::new(PCI_CONFIG_PORT, PCI_CONFIG_PORT, 1, 8));
    windows.push(&AddressSpace::new_io(0u16, PCI_CONFIG_PORT - 1, None));
    windows.push(&AddressSpace::new_io(PCI_CONFIG_PORT + 8, u16::MAX, None));
    windows.push(&AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        PCI_MMIO32_BASE as u32,
        (PLATFORM_BASE - 1) as u32,
        None,
    ));
    if let Some(window) = description.pci_window64 {
        windows.push(&memory(window));
    }
    let mut resources = Body::default();
    resources.push(&Name::new("_CRS".into(), &ResourceTemplate::new(vec![&windows])));
    append_one(body, "PCI0", 0, 0, description.pci_proximity, &resources);
    for bridge in 0..others {
        let mut members = hotplug::registers(host_bridge_base(bridge), *b"WNDW");
        members.push(&hotplug::status());
        members.push(&hotplug::answers());
        members.push(&resources_of(bridge, description));
        let (name, bus) = (host_bridge_name(bridge), host_bridge_bus(bridge));
        append_one(body, &name, bridge + 1, bus, description.pci_proximity, &members);
    }
}

/// The name of a bridge that comes and goes.
pub(super) fn host_bridge_name(bridge: u32) -> String {
    format!("HB{bridge:02X}")
}

fn memory(window: AddressRange) -> AddressSpace<u64> {
    AddressSpace::new_memory(AddressSpaceCacheable::NotCacheable, true, window.base, window.end() - 1, None)
}

/// `_CRS` of a bridge that comes and goes: the window that its register names, and its one bus.
fn resources_of(bridge: u32, description: &Description) -> Body {
    /// Where the first descriptor has its first and last address (ACPI 6.5, 6.4.3.5.1).
    const FIRST: u8 = 14;
    const LAST: u8 = 22;
    let mut body = Body::default();
    let Some(all) = description.host_bridges.map(|bridges| bridges.windows) else { return body };
    let bus = u16::from(host_bridge_bus(bridge));
    let window = memory(AddressRange { base: all.base, size: HOST_BRIDGE_WINDOW });
    let buses = AddressSpace::new_bus_number(bus, bus);
    let field = Name::new_field_name;
    body.push(&Name::new("WCRS".into(), &ResourceTemplate::new(vec![&window, &buses])));
    body.push(&Method::new(
        "_CRS".into(),
        0,
        true,
        vec![
            &CreateQWordField::new(&field("FRST"), &field("WCRS"), &FIRST),
            &CreateQWordField::new(&field("LAST"), &field("WCRS"), &LAST),
            &Multiply::new(&Local(0), &field("WNDW"), &HOST_BRIDGE_WINDOW),
            &Add::new(&field("FRST"), &Local(0), &all.base),
            &Add::new(&field("LAST"), &field("FRST"), &(HOST_BRIDGE_WINDOW - 1)),
            &Return::new(&field("WCRS")),
        ],
    ));
    body
}

/// A host bridge of segment 0 whose root bus is `bus`; `members` is what is not the same in all.
fn append_one(body: &mut Body, name: &str, uid: u32, bus: u8, proximity: u32, members: &Body) {
    body.push(&Device::new(
        Path::new(name),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
            &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_UID".into(), &uid),
            &Name::new("_SEG".into(), &ZERO),
            &Name::new("_BBN".into(), &bus),
            &Name::new("_PXM".into(), &proximity),
            members,
            &osc(),
        ],
    ));
}

/// `_OSC`: arguments are UUID, revision, count of words, and the words: status, support, control.
fn osc() -> Body {
    let status = Name::new_field_name("CDW1");
    let control = Name::new_field_name("CDW3");
    let mut body = Body::default();
    body.push(&Method::new(
        "_OSC".into(),
        4,
        true,
        vec![
            &CreateDWordField::new(&status, &Arg(3), &ZERO),
            &If::new(
                &Equal::new(&Arg(0), &Uuid::new(OSC_UUID)),
                vec![
                    &CreateDWordField::new(&control, &Arg(3), &8u8),
                    &And::new(&Local(0), &control, &OSC_CONTROL),
                    &If::new(
                        &NotEqual::new(&Arg(1), &ONE),
                        vec![&Or::new(&status, &status, &OSC_UNKNOWN_REVISION)],
                    ),
                    &If::new(
                        &NotEqual::new(&control, &Local(0)),
                        vec![&Or::new(&status, &status, &OSC_MASKED)],
                    ),
                    &Store::new(&control, &Local(0)),
                ],
            ),
            &Else::new(vec![&Or::new(&status, &status, &OSC_UNKNOWN_UUID)]),
            &Return::new(&Arg(3)),
        ],
    ));
    body
}
