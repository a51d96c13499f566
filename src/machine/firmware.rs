//! Firmware that misbehaves on command: faults are planned, and who meets them is told.

use aconite_devices::nvdimm::Callee;

use super::memory::MemoryDevices;
use crate::command::{Error, Event, FirmwareChange, FirmwareState, FirmwareTarget};

impl MemoryDevices {
    /// Changes the faults of a device's firmware, and says which there are.
    pub fn firmware(&self, id: &str, change: &FirmwareChange) -> Result<FirmwareState, Error> {
        let device = self.present(id)?;
        let Some(unit) = self.units.get(device.unit as u32) else {
            return Ok(FirmwareState { device: id.to_owned(), faults: Vec::new() });
        };
        match change {
            FirmwareChange::Show => {}
            FirmwareChange::Plan(fault) => unit.plan_fault(fault.plan()?),
            FirmwareChange::Forget => unit.forget_faults(),
        }
        let faults = unit.faults().into_iter().map(Into::into).collect();
        Ok(FirmwareState { device: id.to_owned(), faults })
    }

    /// The answer to a call was not what it should have been.
    pub fn firmware_failed(&self, unit: u32, callee: Callee, function: u32, status: Option<u32>) {
        if let Some(device) = self.devices.iter().find(|device| device.unit == unit as usize) {
            self.events.publish(Event::FirmwareFault {
                device: device.id.clone(),
                target: FirmwareTarget::from(callee),
                function: callee.is_dsm().then_some(function),
                status,
            });
        }
    }
}
