//! Virtio block device (virtio 1.2, section 5.2), with faults.
//!
//! The device takes requests from its queues, checks them, and gives each to a [`Backend`], which performs it
//! ([`Job::perform`]) where nobody waits and hands the result back ([`VirtioPci::finish`]). All that happens to a
//! request in between is decided here: it may be held, delayed, failed, torn, or put behind others ([`Fault`]).
//!
//! A request's data moves when the request is performed. One that is held has moved nothing, unless it was asked for
//! otherwise ([`Transfer`]): so a test says when its DMA lands. What it means by its addresses is the memory of its
//! submission ([`Dma::view_of`]); a reset ends all of them, and nothing of them moves any more when it is over.
//!
//! Whatever a driver writes ends in a status, or without one where it has left no room for it. As many requests of a
//! queue are taken as the queue has entries, so a driver that offers one chain many times makes no list grow.

mod faults;
mod flight;
mod job;
mod request;

use std::sync::Arc;
use std::time::Duration;

use super::queue::{Chain, QueueError, Queues};
use super::work::{Backend, Worked};
use super::{VirtioDevice, VirtioPci};
use crate::bus::Effects;
use crate::clock::Clock;
use crate::dma::Dma;
use crate::pci::PciFunction;

use self::flight::{Flights, Step};
use self::request::{ID_LENGTH, Limits, MAX_RANGE_SECTORS, MAX_RANGES, Parsed, SEG_MAX, SIZE_MAX, finish};

pub use faults::{Action, Armed, Fault, Order, Pattern, Transfer};
pub use flight::{Held, Release, ReleaseError};
pub use job::{Done, Extent, Job, Storage};
pub use request::{Operation, Request, SECTOR, Status};

/// Virtio device id (section 5.2.1).
const DEVICE_TYPE: u16 = 2;
/// Entries of each queue.
pub const QUEUE_SIZE: u16 = 128;
/// Most queues of a disk.
pub const MAX_QUEUES: u16 = 64;
/// Chains taken from a queue at a time, so that a guest cannot keep a thread for itself.
const BATCH: usize = 256;

const F_SIZE_MAX: u64 = 1 << 1;
const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_MQ: u64 = 1 << 12;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

/// Whoever knows the machine around a disk, and tells of what happens in it. Called under the device's lock.
pub trait Witness: Send + Sync {
    /// Whether any of `[gpa, gpa + len)` is persistent memory.
    fn persistent(&self, gpa: u64, len: u64) -> bool;

    /// Something happened to a request that met a fault, or that the disk has left behind.
    fn tell(&self, notice: &Notice<'_>);
}

/// What happened to a request.
#[derive(Clone, Copy, Debug)]
pub struct Notice<'a> {
    /// The request's number: from 1 on, for as long as the disk lives.
    pub number: u64,
    /// The request.
    pub request: &'a Request,
    /// The fault that it met; 0 if it has met none.
    pub fault: u64,
    /// What happened.
    pub what: What,
}

/// See [`Notice`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// It waits.
    Held(Transfer),
    /// It waits no longer.
    Released {
        /// How it goes on.
        how: Release,
        /// How long it has waited.
        after: Duration,
    },
    /// The driver has got it back, with this status.
    Completed(Status),
    /// It is forgotten: it will not end, and nothing of it moves any more.
    Dropped {
        /// Why.
        end: End,
        /// How long it has waited.
        after: Duration,
    },
}

/// Why requests are forgotten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The driver has reset the device.
    Reset,
    /// The disk has gone.
    Departed,
}

/// What a disk is made of.
pub struct Parts {
    /// Its name, which the driver can ask for: the first 20 bytes of it.
    pub name: String,
    /// Its size in sectors of 512 bytes.
    pub sectors: u64,
    /// Whether it can only be read.
    pub readonly: bool,
    /// Number of request queues, 1 to [`MAX_QUEUES`].
    pub queues: u16,
    /// Guest memory.
    pub dma: Dma,
    /// Who performs requests.
    pub backend: Box<dyn Backend<Job>>,
    /// Who is told.
    pub witness: Arc<dyn Witness>,
    /// What delays are measured by.
    pub clock: Clock,
}

/// A disk.
pub struct Blk {
    id: [u8; ID_LENGTH],
    limits: Limits,
    queue_sizes: Vec<u16>,
    /// Chains that each queue has in flight.
    taken: Vec<u16>,
    /// Queues out of which nothing was taken because they had too many.
    stalled: Vec<bool>,
    write_through: bool,
    flights: Flights,
}

impl Blk {
    /// A disk.
    pub fn new(parts: Parts) -> Self {
        let mut id = [0; ID_LENGTH];
        for (to, from) in id.iter_mut().zip(parts.name.bytes()) {
            *to = from;
        }
        let queues = usize::from(parts.queues.clamp(1, MAX_QUEUES));
        Self {
            id,
            limits: Limits { sectors: parts.sectors, readonly: parts.readonly },
            queue_sizes: vec![QUEUE_SIZE; queues],
            taken: vec![0; queues],
            stalled: vec![false; queues],
            write_through: true,
            flights: Flights::new(parts.dma, parts.backend, parts.witness, parts.clock),
        }
    }

    /// The faults that there are.
    pub fn faults(&self) -> &[Armed] {
        self.flights.faults.armed()
    }

    /// Adds a fault for requests to come; its number, or nothing if there are [`MAX_FAULTS`](crate::virtio::MAX_FAULTS).
    pub fn arm(&mut self, fault: Fault) -> Option<u64> {
        self.flights.faults.arm(fault)
    }

    /// Takes faults away for which `unwanted` says so; returns their numbers. What they hold stays held.
    pub fn disarm(&mut self, unwanted: impl FnMut(&Armed) -> bool) -> Vec<u64> {
        self.flights.faults.disarm(unwanted)
    }

    /// The requests that are held, in the order in which they came.
    pub fn held(&self) -> Vec<Held> {
        self.flights.held()
    }

    /// Number of requests that the driver waits for.
    pub fn in_flight(&self) -> usize {
        self.flights.len()
    }

    /// Takes what the driver has put into queue `index`.
    fn take(&mut self, index: u16, queues: &mut Queues<'_>) -> Result<(), QueueError> {
        for _ in 0..BATCH {
            let place = usize::from(index);
            if self.taken.get(place).is_some_and(|taken| *taken >= queues.size(index).max(1)) {
                self.stalled[place] = true;
                return queues.pause(index);
            }
            let Some(chain) = queues.pop(index)? else {
                if queues.resume(index)? {
                    continue;
                }
                return Ok(());
            };
            self.submit(index, chain, queues)?;
        }
        queues.again(index);
        Ok(())
    }

    fn submit(&mut self, queue: u16, chain: Chain, queues: &mut Queues<'_>) -> Result<(), QueueError> {
        match Request::parse(chain, queues.view(), &self.limits) {
            Parsed::Good(request) => {
                self.taken[usize::from(queue)] += 1;
                let generation = queues.view().generation();
                self.flights.submit(queue, request, generation, self.write_through, self.id);
                Ok(())
            }
            Parsed::Refused(chain, status) => {
                let written = finish(&chain, queues.view(), status);
                queues.complete(queue, &chain, written)
            }
            Parsed::NoStatus(chain) => queues.complete(queue, &chain, 0),
        }
    }

    /// Gives requests back to the driver that have come to their end.
    fn complete(&mut self, queues: &mut Queues<'_>) -> Result<(), QueueError> {
        while let Some(Step { queue, request, view, status }) = self.flights.next_finished() {
            let written = finish(&request.chain, &view, status);
            let index = usize::from(queue);
            self.taken[index] = self.taken[index].saturating_sub(1);
            queues.complete(queue, &request.chain, written)?;
            if std::mem::take(&mut self.stalled[index]) {
                queues.again(queue);
            }
        }
        Ok(())
    }

    /// struct virtio_blk_config (section 5.2.4).
    fn config(&self) -> [u8; 60] {
        let mut config = [0; 60];
        let mut put =
            |offset: usize, value: &[u8]| config[offset..offset + value.len()].copy_from_slice(value);
        put(0, &self.limits.sectors.to_le_bytes());
        put(8, &SIZE_MAX.to_le_bytes());
        put(12, &SEG_MAX.to_le_bytes());
        put(20, &(SECTOR as u32).to_le_bytes());
        put(34, &(self.queue_sizes.len() as u16).to_le_bytes());
        put(36, &MAX_RANGE_SECTORS.to_le_bytes());
        put(40, &MAX_RANGES.to_le_bytes());
        // Storage is given back in pages.
        put(44, &8u32.to_le_bytes());
        put(48, &MAX_RANGE_SECTORS.to_le_bytes());
        put(52, &MAX_RANGES.to_le_bytes());
        put(56, &[1]);
        config
    }
}

impl VirtioDevice for Blk {
    fn device_type(&self) -> u16 {
        DEVICE_TYPE
    }

    fn class(&self) -> u32 {
        // Mass storage controller, other.
        0x01_8000
    }

    fn features(&self) -> u64 {
        let change = if self.limits.readonly { F_RO } else { F_DISCARD | F_WRITE_ZEROES };
        F_SIZE_MAX | F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_MQ | change
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.config();
        for (index, byte) in data.iter_mut().enumerate() {
            let at = usize::try_from(offset).unwrap_or(usize::MAX).saturating_add(index);
            *byte = config.get(at).copied().unwrap_or(0);
        }
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, features: u64) {
        self.write_through = features & F_FLUSH == 0;
    }

    fn reset(&mut self) {
        self.flights.forget(End::Reset);
        self.taken.fill(0);
        self.stalled.fill(false);
        self.write_through = true;
    }

    fn process_queue(&mut self, index: u16, queues: &mut Queues<'_>) -> Result<(), QueueError> {
        self.take(index, queues)?;
        // Also what could not be told before: the driver may have switched bus mastering on.
        self.complete(queues)
    }

    fn host_ready(&mut self, queues: &mut Queues<'_>) -> Result<(), QueueError> {
        self.complete(queues)
    }
}

impl Worked for Blk {
    type Job = Job;
    type Done = Done;

    fn finished(&mut self, done: Done) {
        self.flights.finish(done);
    }

    fn clock_struck(&mut self) {
        self.flights.tick();
    }
}

impl VirtioPci<Blk> {
    /// The disk has gone: what the driver waits for will not come, and each of these requests is told of. When this
    /// returns, nothing of them moves any more.
    pub fn depart(&mut self) {
        self.device_mut().flights.forget(End::Departed);
        self.reset();
    }

    /// Lets requests go on that are held, one after the other in the order of `numbers`.
    ///
    /// # Errors
    /// [`ReleaseError`]; nothing has been released then.
    pub fn release(
        &mut self,
        numbers: &[u64],
        how: Release,
        effects: &mut Effects,
    ) -> Result<(), ReleaseError> {
        self.device_mut().flights.release(numbers, how)?;
        self.service(effects);
        Ok(())
    }
}

#[cfg(test)]
#[path = "blk_test.rs"]
mod tests;
