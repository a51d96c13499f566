//! DSDT: the devices that cannot be enumerated, and the methods that reach the platform's registers.
//!
//! One function per device; each appends the bytes of its device to the body of the table. All of it stands
//! under `\_SB`, but for `\_S5`.

mod errors;
mod events;
mod hotplug;
mod legacy;
mod pci;
mod processors;
mod units;

use acpi_tables::Aml;
use acpi_tables::aml::{Name, Package, Path, Scope};

use crate::platform::{EventTarget, SLEEP_TYPE_S5};
use crate::{Description, Table};

/// Absolute path of a target of firmware events in the ACPI namespace, such as `\_SB_.NV00.NVDR`.
pub fn target_path(target: EventTarget) -> String {
    match target {
        EventTarget::Container(unit) => format!("\\_SB_.NV{unit:02X}"),
        EventTarget::Root(unit) => format!("\\_SB_.NV{unit:02X}.NVDR"),
        EventTarget::Dimm { unit, dimm } => format!("\\_SB_.NV{unit:02X}.NVDR.{}", units::dimm_name(dimm)),
        EventTarget::ErrorDevice => "\\_SB_.HED_".to_owned(),
        EventTarget::HostBridge(bridge) => format!("\\_SB_.{}", pci::host_bridge_name(bridge)),
    }
}

/// AML that is put together already.
#[derive(Default)]
struct Body(Vec<u8>);

impl Body {
    fn push(&mut self, object: &dyn Aml) {
        object.to_aml_bytes(&mut self.0);
    }
}

impl Aml for Body {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}

/// DSDT of a machine. Revision 2, so that integers have 64 bits.
pub(crate) fn dsdt(description: &Description) -> Table {
    let mut devices = Body::default();
    processors::append(&mut devices, description.processors.len());
    errors::append(&mut devices);
    legacy::append(&mut devices);
    pci::append(&mut devices, description);
    for (number, unit) in (0..).zip(&description.units) {
        units::append(&mut devices, number, unit.dimms);
    }
    events::append(&mut devices, description);

    let mut body = Body::default();
    body.push(&Scope::new(Path::new("\\_SB_"), vec![&devices]));
    // Soft off: SLP_TYP for SLEEP_CONTROL_REG; the other elements belong to PM1b and are reserved.
    body.push(&Name::new("_S5_".into(), &Package::new(vec![&SLEEP_TYPE_S5, &0u8, &0u8, &0u8])));
    Table::new(*b"DSDT", 2, &body.0)
}
