//! Virtio persistent memory (virtio 1.2, section 5.19).
//!
//! The memory itself lies in the guest-physical address space, where the configuration says; the machine maps it. The
//! one queue carries flushes: everything that was stored before a request is durable when it is answered. Linux gives
//! a flush no limit of time (`virtio_pmem_flush()` in drivers/nvdimm/nd_virtio.c), so a device that holds it holds
//! whoever waits for it.

use super::VirtioDevice;
use super::queue::{QueueError, Queues};

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

/// What a virtio-pmem device asks of the memory behind it.
pub trait Medium: Send {
    /// Makes everything that was stored durable. Whether it is.
    fn flush(&mut self) -> bool;

    /// A flush was asked for and is held.
    fn held(&mut self);
}

/// What becomes of flushes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Flushes {
    /// They are carried out and answered.
    #[default]
    Answered,
    /// They stay in the queue, and nobody answers.
    Held,
    /// They are answered with an error, and nothing is made durable.
    Failed,
}

/// A persistent memory device.
pub struct Pmem {
    start: u64,
    size: u64,
    medium: Box<dyn Medium>,
    flushes: Flushes,
    waiting: bool,
    answered: u64,
    failed: u64,
}

impl Pmem {
    /// The device whose memory is `size` bytes from guest-physical address `start`.
    pub fn new(start: u64, size: u64, medium: Box<dyn Medium>) -> Self {
        Self { start, size, medium, flushes: Flushes::default(), waiting: false, answered: 0, failed: 0 }
    }

    /// What becomes of flushes.
    pub fn flushes(&self) -> Flushes {
        self.flushes
    }

    /// Says what becomes of flushes from now on, those that are held included: call
    /// [`VirtioPci::service`](super::VirtioPci::service) after it.
    pub fn set_flushes(&mut self, flushes: Flushes) {
        self.flushes = flushes;
    }

    /// Whether a flush is held.
    pub fn waiting(&self) -> bool {
        self.waiting
    }

    /// Flushes that were carried out.
    pub fn answered(&self) -> u64 {
        self.answered
    }

    /// Flushes that were answered with an error.
    pub fn failed(&self) -> u64 {
        self.failed
    }

    fn answer(&mut self, request: u32) -> u32 {
        let done = request == REQUEST_FLUSH && self.flushes != Flushes::Failed && self.medium.flush();
        if done {
            self.answered += 1;
            DONE
        } else {
            self.failed += 1;
            FAILED
        }
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
        config[..8].copy_from_slice(&self.start.to_le_bytes());
        config[8..].copy_from_slice(&self.size.to_le_bytes());
        for (at, byte) in (offset..).zip(data) {
            *byte = usize::try_from(at).ok().and_then(|at| config.get(at)).copied().unwrap_or(0);
        }
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, _features: u64) {}

    fn reset(&mut self) {
        self.waiting = false;
    }

    fn process_queue(&mut self, index: u16, queues: &mut Queues<'_>) -> Result<(), QueueError> {
        if index != QUEUE {
            return Ok(());
        }
        if self.flushes == Flushes::Held {
            // They are left where they are: a queue is as long as it is, however long nobody answers.
            self.waiting = true;
            self.medium.held();
            return Ok(());
        }
        self.waiting = false;
        for _ in 0..BATCH {
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
            // A request that cannot be read or answered comes back with nothing written.
            let mut written = 0;
            if asked {
                let answer = self.answer(u32::from_le_bytes(request));
                if chain.write(queues.view(), 0, &answer.to_le_bytes()).is_ok() {
                    written = WORD as u32;
                }
            }
            queues.complete(QUEUE, &chain, written)?;
        }
        queues.again(QUEUE);
        Ok(())
    }

    fn host_ready(&mut self, queues: &mut Queues<'_>) -> Result<(), QueueError> {
        if self.flushes == Flushes::Held { Ok(()) } else { self.process_queue(QUEUE, queues) }
    }
}

#[cfg(test)]
#[path = "pmem_test.rs"]
mod tests;
