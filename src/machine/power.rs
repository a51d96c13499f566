//! Loss of power.

use super::memory::MemoryDevices;
use crate::command::{DeviceLoss, DeviceState, Error, ErrorCode, Event, PowerCut, PowerLoss};
use crate::kvm::Held;

impl MemoryDevices {
    /// Takes the power from all devices: what was not flushed is lost where that counts, and no DIMM hears of it.
    ///
    /// The machine must not run any more.
    pub fn cut(&self, _held: &Held, cut: PowerCut) -> Result<PowerLoss, Error> {
        let mut devices = Vec::new();
        for device in self.devices.iter().filter(|device| device.state != DeviceState::Departed) {
            let loss = device.region.cut(cut.survivors()).map_err(|error| {
                Error::new(
                    ErrorCode::Internal,
                    format!("The file of {} cannot be left as a loss of power leaves it: {error}", device.id),
                    "look at the file's file system; the machine ends all the same",
                )
            })?;
            devices.extend(loss.map(|loss| DeviceLoss {
                device: device.id.clone(),
                lost: loss.lost,
                survived: loss.survived,
            }));
        }
        self.events.publish(Event::PowerCut { devices: devices.clone() });
        Ok(PowerLoss { devices })
    }
}
