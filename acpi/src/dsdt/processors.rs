//! Processor devices.

use acpi_tables::aml::{Device, Name, Path};

use super::Body;

/// One ACPI0007 per processor (ACPI 6.5, 8.4), with the UID under which MADT lists it.
pub(super) fn append(body: &mut Body, count: usize) {
    for uid in 0..count as u32 {
        body.push(&Device::new(
            Path::new(&format!("C{uid:03X}")),
            vec![&Name::new("_HID".into(), &"ACPI0007"), &Name::new("_UID".into(), &uid)],
        ));
    }
}
