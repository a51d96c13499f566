//! A virtio-pmem device over a memory device's region: the card that goes into a slot, and the thread that flushes.

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use aconite_devices::bus::{DeviceId, lock};
use aconite_devices::clock::Clock;
use aconite_devices::dma::Dma;
use aconite_devices::irq::MsiSink;
use aconite_devices::virtio::pmem::{Job, Parts, Pmem, What, Witness};
use aconite_devices::virtio::{VirtioPci, Wiring};

use super::doorbells;
use super::memory::MemoryError;
use super::pcie::At;
use crate::command::{Event, EventBus, FlushOutcome};
use crate::kvm::IoEvents;
use crate::memory::Region;
use crate::workers::{Outbox, Pool, Workers};

/// What a device needs of the machine.
#[derive(Clone)]
pub struct Surroundings {
    /// Guest memory, for the queue.
    pub dma: Dma,
    /// Where interrupts go.
    pub msi: Arc<dyn MsiSink>,
    /// Where notifications come from.
    pub io_events: IoEvents,
    /// Who is told of flushes.
    pub events: EventBus,
    /// What delays are measured by.
    pub clock: Clock,
}

impl fmt::Debug for Surroundings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Surroundings").field("dma", &self.dma).finish_non_exhaustive()
    }
}

/// A virtio-pmem device.
pub struct Card {
    /// Its function.
    pub function: Arc<Mutex<VirtioPci<Pmem>>>,
    region: Arc<Region>,
    events: EventBus,
    workers: Workers<Job>,
    pool: Option<Pool<Job>>,
}

impl fmt::Debug for Card {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Card").finish_non_exhaustive()
    }
}

impl Card {
    /// The device of `region`, called `device` in effects, which goes to `at`. Its thread is still to be started.
    pub fn new(
        around: &Surroundings,
        region: &Arc<Region>,
        device: DeviceId,
        at: At,
    ) -> Result<Self, MemoryError> {
        let workers = Workers::new(around.clock.clone())?;
        let pmem = Pmem::new(Parts {
            start: region.gpa(),
            size: region.len(),
            backend: Box::new(workers.clone()),
            witness: Arc::new(Teller { device: region.name().to_owned(), events: around.events.clone() }),
            clock: around.clock.clone(),
        });
        let wiring = Wiring {
            id: device,
            dma: around.dma.named(region.name()),
            msi: around.msi.clone(),
            express: Some(at.port_type()),
        };
        let mut function = VirtioPci::new(pmem, wiring)?;
        doorbells::install(&mut function, &workers, &around.io_events)?;
        let function = Arc::new(Mutex::new(function));
        Ok(Self { function, region: region.clone(), events: around.events.clone(), workers, pool: None })
    }

    /// Starts the thread that carries flushes out; what it leaves to do goes to `send`.
    pub fn start(&mut self, send: &Outbox) -> io::Result<()> {
        let (region, events) = (self.region.clone(), self.events.clone());
        let perform = move |job: &Job| job.done(durable(&region, &events));
        let name = format!("pmem-{}", self.region.name());
        self.pool = Some(Pool::start(&name, self.workers.clone(), 1, &self.function, perform, send)?);
        Ok(())
    }

    /// The device has gone: what the guest waits for is forgotten.
    pub fn depart(&self) {
        let mut function = lock(&self.function);
        function.depart();
        function.set_doorbells(None);
    }

    /// Ends its thread.
    pub fn stop(&mut self) {
        self.pool = None;
    }
}

/// Flushes a region; whether everything is durable.
fn durable(region: &Region, events: &EventBus) -> bool {
    let done = region.flush();
    if let Err(error) = &done {
        tracing::error!(%error, device = region.name(), "data could not be written back");
        events.publish(Event::DeviceError {
            device: region.name().to_owned(),
            message: format!("Flush failed: {error}"),
        });
    }
    done.is_ok()
}

/// Who tells of a device's flushes.
struct Teller {
    device: String,
    events: EventBus,
}

impl Witness for Teller {
    fn tell(&self, request: u64, fault: u64, what: What) {
        let device = self.device.clone();
        let released = |how, after: Duration| {
            let held_ns = u64::try_from(after.as_nanos()).unwrap_or(u64::MAX);
            Event::FlushReleased { device: device.clone(), request, fault, how, held_ns }
        };
        self.events.publish(match what {
            What::Held => Event::FlushHeld { device, request, fault },
            What::Answered(durable) => Event::FlushCompleted { device, request, fault, durable },
            What::Released { fail: false, after } => released(FlushOutcome::Complete, after),
            What::Released { fail: true, after } => released(FlushOutcome::Fail, after),
            What::Reset { after } => released(FlushOutcome::Drop, after),
            What::Departed { after } => released(FlushOutcome::Depart, after),
        });
    }
}
