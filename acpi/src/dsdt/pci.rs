//! PCI Express host bridge of segment 0.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Else, Equal, IO, If,
    Local, Method, Name, NotEqual, ONE, Or, ResourceTemplate, Return, Store, Uuid, ZERO,
};

use super::Body;
use crate::Description;
use crate::layout::{PCI_CONFIG_PORT, PCI_MMIO32_BASE, PLATFORM_BASE};

/// `_OSC` of PCI host bridges (PCI Firmware Specification 3.3, 4.5.1).
const OSC_UUID: &str = "33db4d5b-1ff7-401c-9657-7441c03dd766";
/// What the OS may control: native hot-plug (0), PME (2), AER (3), the PCI Express capability (4). Not SHPC
/// hot-plug (1): there is no such controller; not LTR (5) and DPC (7): no port has them.
const OSC_CONTROL: u32 = 0b1_1101;
/// Status bits of the first `_OSC` word.
const OSC_UNKNOWN_UUID: u32 = 1 << 2;
const OSC_UNKNOWN_REVISION: u32 = 1 << 3;
const OSC_MASKED: u32 = 1 << 4;

/// Appends the bridge with its windows: all buses, all I/O ports but those of configuration mechanism #1, the
/// 32-bit memory window, and the 64-bit one if there is one.
pub(super) fn append(body: &mut Body, description: &Description) {
    let mut windows = Body::default();
    windows.push(&AddressSpace::new_bus_number(0u16, 255));
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
        windows.push(&AddressSpace::new_memory(
            AddressSpaceCacheable::NotCacheable,
            true,
            window.base,
            window.end() - 1,
            None,
        ));
    }
    body.push(&Device::new(
        "PCI0".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
            &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_SEG".into(), &ZERO),
            &Name::new("_BBN".into(), &ZERO),
            &Name::new("_PXM".into(), &description.pci_proximity),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&windows])),
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
