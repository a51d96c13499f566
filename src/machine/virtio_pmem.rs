//! A virtio-pmem device over a memory device's region: the card that goes into a slot.

use std::sync::{Arc, Mutex};

use aconite_devices::bus::DeviceId;
use aconite_devices::dma::Dma;
use aconite_devices::irq::MsiSink;
use aconite_devices::pci::PortType;
use aconite_devices::virtio::pmem::{Medium, Pmem};
use aconite_devices::virtio::{TransportError, VirtioPci, Wiring};

use crate::command::{Event, EventBus};
use crate::memory::Region;

/// A virtio-pmem device.
#[derive(Clone)]
pub struct Function(pub Arc<Mutex<VirtioPci<Pmem>>>);

impl std::fmt::Debug for Function {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Function").finish_non_exhaustive()
    }
}

/// What a device needs of the machine.
#[derive(Clone)]
pub struct Surroundings {
    /// Guest memory, for the queue.
    pub dma: Dma,
    /// Where interrupts go.
    pub msi: Arc<dyn MsiSink>,
    /// Who is told of flushes.
    pub events: EventBus,
}

impl std::fmt::Debug for Surroundings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Surroundings").field("dma", &self.dma).finish_non_exhaustive()
    }
}

/// The memory of a region as its device sees it.
struct Flushed {
    region: Arc<Region>,
    events: EventBus,
}

impl Medium for Flushed {
    fn flush(&mut self) -> bool {
        let done = self.region.flush();
        if let Err(error) = &done {
            tracing::error!(%error, device = self.region.name(), "data could not be written back");
            self.events.publish(Event::DeviceError {
                device: self.region.name().to_owned(),
                message: format!("Flush failed: {error}"),
            });
        }
        done.is_ok()
    }

    fn held(&mut self) {
        self.events.publish(Event::FlushHeld { device: self.region.name().to_owned() });
    }
}

/// The device of `region`, called `device` in effects.
pub fn function(
    around: &Surroundings,
    region: &Arc<Region>,
    device: DeviceId,
) -> Result<Function, TransportError> {
    let wiring = Wiring {
        id: device,
        dma: around.dma.named(region.name()),
        msi: around.msi.clone(),
        express: Some(PortType::Endpoint),
    };
    let medium = Flushed { region: region.clone(), events: around.events.clone() };
    let pmem = Pmem::new(region.gpa(), region.len(), Box::new(medium));
    Ok(Function(Arc::new(Mutex::new(VirtioPci::new(pmem, wiring)?))))
}
