//! Virtio persistent memory (virtio 1.2, section 5.19), whose flushes can be held, delayed and failed.
//!
//! The memory itself lies in the guest-physical address space, where the configuration says; the machine maps it. The
//! one queue carries flushes: everything that was stored before a request is durable when it is answered. Linux gives
//! a flush no limit of time (`virtio_pmem_flush()` in drivers/nvdimm/nd_virtio.c), so a device that holds it holds
//! whoever waits for it.
//!
//! A [`Backend`] carries flushes out where nobody waits. One that is held is carried out when it is released: until then
//! nothing is made durable for it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::faults::{self, Faults};
use super::queue::{Chain, QueueError, Queues};
use super::work::{Backend, Worked};
use super::{VirtioDevice, VirtioPci};
use crate::clock::Clock;
use crate::pci::PciFunction;

/// Virtio device id (section 5.19.1).
const DEVICE_TYPE: u16 = 27;
/// PCI class: memory, other.
const CLASS: u32 = 0x05_8000;
const QUEUE: u16 = 0;
const QUEUE_SIZES: [u16; 1] = [64];
/// Chains taken from the queue at a time, so that a guest cannot keep the main loop for itself.
const BATCH: usize = 64;

/// VIRTIO_PMEM_REQ_TYPE_FLUSH.
const REQUEST_FLUSH: u32 = 0;
/// Length of a request and of its answer.
const WORD: u64 = 4;
const DONE: u32 = 0;
/// Any other number is a failure (section 5.19.6.2).
const FAILED: u32 = 1;

/// What is done to a flush.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// It waits until it is released.
    Hold,
    /// It waits for a time.
    Delay(Duration),
    /// It is answered with an error, and nothing is made durable for it.
    Fail,
}

/// A fault: any flush is like any other.
pub type Fault = faults::Fault<(), Action>;
/// A fault of a device.
pub type Armed = faults::Armed<(), Action>;

/// A flush that is to be carried out: everything that was stored up to now is made durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Job {
    number: u64,
}

impl Job {
    /// What came of it: whether everything is durable.
    pub fn done(self, durable: bool) -> Done {
        Done { number: self.number, durable }
    }
}

/// What came of a [`Job`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Done {
    number: u64,
    durable: bool,
}

/// What happened to a flush that met a fault, or that the device has left behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// It waits.
    Held,
    /// It waits no longer: it is carried out, or fails.
    Released {
        /// Whether it fails.
        fail: bool,
        /// How long it has waited.
        after: Duration,
    },
    /// The driver has got its answer; whether it was a good one.
    Answered(bool),
    /// It is forgotten: the driver has reset the device.
    Reset {
        /// How long it has waited.
        after: Duration,
    },
    /// It is forgotten: the device has gone.
    Departed {
        /// How long it has waited.
        after: Duration,
    },
}

/// Whoever tells of flushes. Called under the device's lock.
pub trait Witness: Send + Sync {
    /// Something happened to flush `number`, which has met `fault`; 0 is none.
    fn tell(&self, number: u64, fault: u64, what: What);
}

/// A flush that is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// Its number.
    pub number: u64,
    /// The fault that it met.
    pub fault: u64,
    /// For how long it has been held.
    pub waited: Duration,
    /// How long from now it will go on by itself, if it will.
    pub left: Option<Duration>,
}

/// What a persistent memory device is made of.
pub struct Parts {
    /// Guest-physical address of its memory.
    pub start: u64,
    /// Bytes of it.
    pub size: u64,
    /// Who carries flushes out.
    pub backend: Box<dyn Backend<Job>>,
    /// Who is told.
    pub witness: Arc<dyn Witness>,
    /// What delays are measured by.
    pub clock: Clock,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Held,
    Working,
    /// It can be answered; whether everything is durable.
    Ended(bool),
}

#[derive(Debug)]
struct Flight {
    chain: Chain,
    stage: Stage,
    fault: Option<u64>,
    since: Duration,
    /// When it goes on by itself.
    due: Option<Duration>,
}

/// A persistent memory device.
pub struct Pmem {
    parts: Parts,
    faults: Faults<(), Action>,
    /// What the driver waits for, by number.
    flights: BTreeMap<u64, Flight>,
    /// Number of the last flush: numbers never come again, not after a reset either.
    last: u64,
    /// Nothing was taken out of the queue because it had too much in flight.
    stalled: bool,
}

impl Pmem {
    /// A device.
    pub fn new(parts: Parts) -> Self {
        Self { parts, faults: Faults::default(), flights: BTreeMap::new(), last: 0, stalled: false }
    }

    /// The faults that there are.
    pub fn faults(&self) -> &[Armed] {
        self.faults.armed()
    }

    /// Adds a fault for flushes to come; its number, or nothing if there are too many.
    pub fn arm(&mut self, fault: Fault) -> Option<u64> {
        self.faults.arm(fault)
    }

    /// Takes faults away for which `unwanted` says so; returns their numbers. What they hold stays held.
    pub fn disarm(&mut self, unwanted: impl FnMut(&Armed) -> bool) -> Vec<u64> {
        self.faults.disarm(unwanted)
    }

    /// The flushes that are held, in the order in which they came.
    pub fn held(&self) -> Vec<Held> {
        let now = (self.parts.clock)();
        let held = self.flights.iter().filter(|(_, flight)| flight.stage == Stage::Held);
        held.map(|(number, flight)| Held {
            number: *number,
            fault: flight.fault.unwrap_or(0),
            waited: now.saturating_sub(flight.since),
            left: flight.due.map(|due| due.saturating_sub(now)),
        })
        .collect()
    }

    /// Number of flushes that the driver waits for.
    pub fn in_flight(&self) -> usize {
        self.flights.len()
    }

    /// Lets flushes go on that are held, in this order: they are carried out, or fail. Call
    /// [`VirtioPci::service`] after it.
    ///
    /// # Errors
    /// The first one that is not held; nothing has been released then.
    pub fn release(&mut self, numbers: &[u64], fail: bool) -> Result<(), u64> {
        let held = |number: &&u64| self.flights.get(number).is_some_and(|flight| flight.stage == Stage::Held);
        if let Some(not_held) = numbers.iter().find(|number| !held(number)) {
            return Err(*not_held);
        }
        numbers.iter().for_each(|number| self.go_on(*number, fail));
        Ok(())
    }

    fn go_on(&mut self, number: u64, fail: bool) {
        let now = (self.parts.clock)();
        let Some(flight) = self.flights.get_mut(&number) else { return };
        flight.stage = if fail { Stage::Ended(false) } else { Stage::Working };
        let what = What::Released { fail, after: now.saturating_sub(flight.since) };
        self.parts.witness.tell(number, flight.fault.unwrap_or(0), what);
        if !fail {
            self.parts.backend.start(Job { number });
        }
    }

    /// Takes a flush over.
    fn submit(&mut self, chain: Chain) {
        self.last += 1;
        let number = self.last;
        let met = self.faults.meet(|()| true);
        let since = (self.parts.clock)();
        let (stage, due) = match met.map(|(_, action)| action) {
            None => (Stage::Working, None),
            Some(Action::Hold) => (Stage::Held, None),
            Some(Action::Delay(time)) => (Stage::Held, Some(since.saturating_add(time))),
            Some(Action::Fail) => (Stage::Ended(false), None),
        };
        let fault = met.map(|(fault, _)| fault);
        self.flights.insert(number, Flight { chain, stage, fault, since, due });
        match stage {
            Stage::Working => self.parts.backend.start(Job { number }),
            Stage::Held => self.parts.witness.tell(number, fault.unwrap_or(0), What::Held),
            Stage::Ended(_) => {}
        }
        self.call_back();
    }

    fn call_back(&mut self) {
        let held = self.flights.values().filter(|flight| flight.stage == Stage::Held);
        if let Some(at) = held.filter_map(|flight| flight.due).min() {
            self.parts.backend.call_at(at);
        }
    }

    /// Takes what the driver has put into the queue.
    fn take(&mut self, queues: &mut Queues<'_>) -> Result<(), QueueError> {
        for _ in 0..BATCH {
            if self.flights.len() >= usize::from(queues.size(QUEUE).max(1)) {
                self.stalled = true;
                return queues.pause(QUEUE);
            }
            let Some(chain) = queues.pop(QUEUE)? else {
                if queues.resume(QUEUE)? {
                    continue;
                }
                return Ok(());
            };
            let mut request = [0; WORD as usize];
            let asked = chain.readable_len() >= WORD
                && chain.writable_len() >= WORD
                && chain.read(queues.view(), 0, &mut request).is_ok();
            match u32::from_le_bytes(request) {
                // A request that cannot be read or answered comes back with nothing written.
                _ if !asked => queues.complete(QUEUE, &chain, 0)?,
                REQUEST_FLUSH => self.submit(chain),
                _ => answer(queues, &chain, FAILED)?,
            }
        }
        queues.again(QUEUE);
        Ok(())
    }

    /// Answers flushes that have come to their end.
    fn answer(&mut self, queues: &mut Queues<'_>) -> Result<(), QueueError> {
        let ended = |flight: &Flight| matches!(flight.stage, Stage::Ended(_));
        while let Some(number) =
            self.flights.iter().find(|(_, flight)| ended(flight)).map(|(number, _)| *number)
        {
            let Some(flight) = self.flights.remove(&number) else { break };
            let durable = flight.stage == Stage::Ended(true);
            if let Some(fault) = flight.fault {
                self.parts.witness.tell(number, fault, What::Answered(durable));
            }
            answer(queues, &flight.chain, if durable { DONE } else { FAILED })?;
            if std::mem::take(&mut self.stalled) {
                queues.again(QUEUE);
            }
        }
        Ok(())
    }

    /// Forgets what the driver waits for; `what` is told of those that have met a fault, or of all if the device has gone.
    fn forget(&mut self, all: bool, what: impl Fn(Duration) -> What) {
        let now = (self.parts.clock)();
        for (number, flight) in std::mem::take(&mut self.flights) {
            if all || (flight.stage == Stage::Held && flight.fault.is_some()) {
                let what = what(now.saturating_sub(flight.since));
                self.parts.witness.tell(number, flight.fault.unwrap_or(0), what);
            }
        }
        self.stalled = false;
    }
}

fn answer(queues: &mut Queues<'_>, chain: &Chain, answer: u32) -> Result<(), QueueError> {
    let written = chain.write(queues.view(), 0, &answer.to_le_bytes()).map_or(0, |_| WORD as u32);
    queues.complete(QUEUE, chain, written)
}

impl VirtioPci<Pmem> {
    /// The device has gone: what the driver waits for will not come, and each of these flushes is told of.
    pub fn depart(&mut self) {
        self.device_mut().forget(true, |after| What::Departed { after });
        self.reset();
    }
}

impl Worked for Pmem {
    type Job = Job;
    type Done = Done;

    fn finished(&mut self, done: Done) {
        // After a reset, nobody waits for it.
        if let Some(flight) = self.flights.get_mut(&done.number) {
            flight.stage = Stage::Ended(done.durable);
        }
    }

    fn clock_struck(&mut self) {
        let now = (self.parts.clock)();
        let over = |flight: &Flight| flight.stage == Stage::Held && flight.due.is_some_and(|due| due <= now);
        let mut due: Vec<_> = self.flights.iter().filter(|(_, flight)| over(flight)).collect();
        due.sort_by_key(|(number, flight)| (flight.due, **number));
        let numbers: Vec<_> = due.into_iter().map(|(number, _)| *number).collect();
        numbers.into_iter().for_each(|number| self.go_on(number, false));
        self.call_back();
    }
}

impl VirtioDevice for Pmem {
    fn device_type(&self) -> u16 {
        DEVICE_TYPE
    }

    fn class(&self) -> u32 {
        CLASS
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 16];
        config[..8].copy_from_slice(&self.parts.start.to_le_bytes());
        config[8..].copy_from_slice(&self.parts.size.to_le_bytes());
        for (at, byte) in (offset..).zip(data) {
            *byte = usize::try_from(at).ok().and_then(|at| config.get(at)).copied().unwrap_or(0);
        }
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, _features: u64) {}

    fn reset(&mut self) {
        self.forget(false, |after| What::Reset { after });
    }

    fn process_queue(&mut self, index: u16, queues: &mut Queues<'_>) -> Result<(), QueueError> {
        if index == QUEUE {
            self.take(queues)?;
        }
        // Also what could not be told before: the driver may have switched bus mastering on.
        self.answer(queues)
    }

    fn host_ready(&mut self, queues: &mut Queues<'_>) -> Result<(), QueueError> {
        self.answer(queues)
    }
}

#[cfg(test)]
#[path = "pmem_test.rs"]
mod tests;
