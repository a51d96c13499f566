//! Virtqueues as devices see them: chains come out checked, and go back with a length.

use std::sync::atomic::Ordering;

use thiserror::Error;
use virtio_queue::{Error as RingError, Queue, QueueOwnedT, QueueT};
use vm_memory::GuestAddress;

use crate::dma::{DmaError, DmaView};

/// Longest chain accepted. Indirect tables may be longer than the queue; a device's own limits (seg_max and the
/// like) stay far below this.
const MAX_CHAIN: usize = 1024;

/// How a driver broke a queue. The device needs a reset.
#[derive(Debug, Error)]
pub enum QueueError {
    /// The rings are misplaced, unreachable, poisoned or inconsistent.
    #[error("Virtqueue {queue} has a broken ring: the driver must reset the device")]
    Ring {
        /// Index of the queue.
        queue: u16,
        /// What was wrong.
        #[source]
        source: RingError,
    },
    /// A descriptor chain does not end, leaves its table, or has a readable buffer behind a writable one.
    #[error("Virtqueue {queue} has a malformed chain at descriptor {head}: the driver must reset the device")]
    Chain {
        /// Index of the queue.
        queue: u16,
        /// The chain's first descriptor.
        head: u16,
    },
}

/// A piece of guest memory that a chain names. Not checked: it may lie anywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Guest-physical address.
    pub address: u64,
    /// Length in bytes.
    pub length: u32,
}

/// One request of the driver: buffers to read, then buffers to write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    head: u16,
    readable: Vec<Segment>,
    writable: Vec<Segment>,
}

impl Chain {
    /// The buffers the device may read.
    pub fn readable(&self) -> &[Segment] {
        &self.readable
    }

    /// The buffers the device may write.
    pub fn writable(&self) -> &[Segment] {
        &self.writable
    }

    /// Bytes the device may read.
    pub fn readable_len(&self) -> u64 {
        self.readable.iter().map(|segment| u64::from(segment.length)).sum()
    }

    /// Bytes the device may write.
    pub fn writable_len(&self) -> u64 {
        self.writable.iter().map(|segment| u64::from(segment.length)).sum()
    }

    /// The guest memory of the `length` bytes of readable buffers after the first `offset`, as far as there are any.
    pub fn readable_parts(&self, offset: u64, length: u64) -> Vec<Segment> {
        parts(&self.readable, offset, length)
    }

    /// The guest memory of the `length` bytes of writable buffers after the first `offset`, as far as there are any.
    pub fn writable_parts(&self, offset: u64, length: u64) -> Vec<Segment> {
        parts(&self.writable, offset, length)
    }

    /// Reads from the readable buffers, `offset` bytes in, as much as there is; returns how much.
    ///
    /// # Errors
    /// [`DmaError`] if a buffer is outside memory or poisoned; part of `data` may have been filled.
    pub fn read(&self, view: &DmaView, offset: u64, data: &mut [u8]) -> Result<usize, DmaError> {
        let mut done = 0;
        for (address, length) in pieces(&self.readable, offset, data.len()) {
            view.read(address, &mut data[done..done + length])?;
            done += length;
        }
        Ok(done)
    }

    /// Writes to the writable buffers, `offset` bytes in, as much as there is room; returns how much.
    ///
    /// # Errors
    /// [`DmaError`] if a buffer is outside memory or poisoned; part of `data` may have been written.
    pub fn write(&self, view: &DmaView, offset: u64, data: &[u8]) -> Result<usize, DmaError> {
        let mut done = 0;
        for (address, length) in pieces(&self.writable, offset, data.len()) {
            view.write(address, &data[done..done + length])?;
            done += length;
        }
        Ok(done)
    }
}

/// The parts of `segments` that hold the `length` bytes after the first `skip`.
fn pieces(segments: &[Segment], skip: u64, length: usize) -> impl Iterator<Item = (u64, usize)> + '_ {
    let mut skip = skip;
    let mut left = length;
    segments.iter().filter_map(move |segment| {
        let skipped = skip.min(u64::from(segment.length));
        skip -= skipped;
        let here = usize::try_from(u64::from(segment.length) - skipped).unwrap_or(usize::MAX).min(left);
        left -= here;
        (here > 0).then(|| (segment.address.wrapping_add(skipped), here))
    })
}

fn parts(segments: &[Segment], offset: u64, length: u64) -> Vec<Segment> {
    // A segment has less than 4 GiB.
    let segment = |(address, length)| Segment { address, length: u32::try_from(length).unwrap_or(u32::MAX) };
    pieces(segments, offset, usize::try_from(length).unwrap_or(usize::MAX)).map(segment).collect()
}

/// One queue: what the driver has set up, and the rings once it is enabled.
#[derive(Debug)]
pub(super) struct VirtQueue {
    /// Size chosen by the driver.
    pub(super) size: u16,
    /// MSI-X vector.
    pub(super) vector: u16,
    /// Guest-physical address of the descriptor table.
    pub(super) descriptors: u64,
    /// Guest-physical address of the available ring ("driver area").
    pub(super) available: u64,
    /// Guest-physical address of the used ring ("device area").
    pub(super) used: u64,
    ring: Queue,
    completed: bool,
}

impl VirtQueue {
    /// A disabled queue of at most `max_size` entries.
    pub(super) fn new(max_size: u16) -> Result<Self, RingError> {
        let ring = Queue::new(max_size)?;
        let vector = crate::pci::NO_VECTOR;
        Ok(Self { size: max_size, vector, descriptors: 0, available: 0, used: 0, ring, completed: false })
    }

    /// Back to disabled.
    pub(super) fn reset(&mut self) {
        self.ring.reset();
        self.size = self.ring.max_size();
        self.vector = crate::pci::NO_VECTOR;
        (self.descriptors, self.available, self.used) = (0, 0, 0);
        self.completed = false;
    }

    pub(super) fn max_size(&self) -> u16 {
        self.ring.max_size()
    }

    /// Whether the driver has enabled the queue.
    pub(super) fn enabled(&self) -> bool {
        self.ring.ready()
    }

    /// Puts the rings where the driver said.
    pub(super) fn enable(&mut self, view: &DmaView, event_idx: bool) -> Result<(), RingError> {
        self.ring.try_set_size(self.size)?;
        self.ring.try_set_desc_table_address(GuestAddress(self.descriptors))?;
        self.ring.try_set_avail_ring_address(GuestAddress(self.available))?;
        self.ring.try_set_used_ring_address(GuestAddress(self.used))?;
        self.ring.set_event_idx(event_idx);
        self.ring.set_ready(true);
        if !self.ring.is_valid(view) {
            self.ring.set_ready(false);
            return Err(RingError::FindMemoryRegion);
        }
        Ok(())
    }

    /// Whether the driver wants an interrupt for what was completed since the last call.
    pub(super) fn take_interrupt(&mut self, view: &DmaView) -> Result<bool, RingError> {
        if !std::mem::take(&mut self.completed) {
            return Ok(false);
        }
        self.ring.needs_notification(view)
    }

    fn pop(&mut self, index: u16, view: &DmaView) -> Result<Option<Chain>, QueueError> {
        let ring = |source| QueueError::Ring { queue: index, source };
        if self.ring.avail_idx(view, Ordering::Acquire).map_err(ring)?.0 == self.ring.next_avail() {
            return Ok(None);
        }
        let mut available = self.ring.iter(view).map_err(ring)?;
        // The index says there is one more: none means that its entry could not be read.
        let mut chain = available.next().ok_or(ring(RingError::FindMemoryRegion))?;
        let head = chain.head_index();
        let malformed = QueueError::Chain { queue: index, head };
        let mut result = Chain { head, readable: Vec::new(), writable: Vec::new() };
        let mut ended = false;
        // The iterator stops without a word at a loop, a bad index or an unreadable table: the last descriptor
        // then still announces another.
        for descriptor in chain.by_ref() {
            let segment = Segment { address: descriptor.addr().0, length: descriptor.len() };
            ended = !descriptor.has_next();
            if descriptor.is_write_only() {
                result.writable.push(segment);
            } else if result.writable.is_empty() {
                result.readable.push(segment);
            } else {
                return Err(malformed);
            }
            if result.readable.len() + result.writable.len() > MAX_CHAIN {
                return Err(malformed);
            }
        }
        if ended { Ok(Some(result)) } else { Err(malformed) }
    }
}

/// The queues of a device while it works on them, with one snapshot of guest memory.
pub struct Queues<'a> {
    queues: &'a mut [VirtQueue],
    view: DmaView,
    again: Vec<u16>,
}

impl<'a> Queues<'a> {
    pub(super) fn new(queues: &'a mut [VirtQueue], view: DmaView) -> Self {
        Self { queues, view, again: Vec::new() }
    }

    /// Guest memory.
    pub fn view(&self) -> &DmaView {
        &self.view
    }

    /// Entries of queue `index`, as the driver has chosen; none if it is not enabled.
    pub fn size(&self, index: u16) -> u16 {
        let queue = self.queues.get(usize::from(index)).filter(|queue| queue.enabled());
        queue.map_or(0, |queue| queue.size)
    }

    /// The next chain of queue `index`; none if it is empty or not enabled.
    ///
    /// # Errors
    /// [`QueueError`].
    pub fn pop(&mut self, index: u16) -> Result<Option<Chain>, QueueError> {
        match self.queues.get_mut(usize::from(index)) {
            Some(queue) if queue.enabled() => queue.pop(index, &self.view),
            _ => Ok(None),
        }
    }

    /// Gives `chain` back to the driver with `written` bytes written. The interrupt follows when the device's
    /// work is done.
    ///
    /// # Errors
    /// [`QueueError::Ring`].
    pub fn complete(&mut self, index: u16, chain: &Chain, written: u32) -> Result<(), QueueError> {
        let Some(queue) = self.queues.get_mut(usize::from(index)).filter(|queue| queue.enabled()) else {
            return Ok(());
        };
        queue
            .ring
            .add_used(&self.view, chain.head, written)
            .map_err(|source| QueueError::Ring { queue: index, source })?;
        queue.completed = true;
        Ok(())
    }

    /// Tells the driver that notifications for queue `index` are of no use for now.
    ///
    /// # Errors
    /// [`QueueError::Ring`].
    pub fn pause(&mut self, index: u16) -> Result<(), QueueError> {
        match self.queues.get_mut(usize::from(index)) {
            Some(queue) if queue.enabled() => queue
                .ring
                .disable_notification(&self.view)
                .map_err(|source| QueueError::Ring { queue: index, source }),
            _ => Ok(()),
        }
    }

    /// Asks the driver to notify when it next adds to queue `index`. True if it already has: pop again.
    ///
    /// # Errors
    /// [`QueueError::Ring`].
    pub fn resume(&mut self, index: u16) -> Result<bool, QueueError> {
        match self.queues.get_mut(usize::from(index)) {
            Some(queue) if queue.enabled() => queue
                .ring
                .enable_notification(&self.view)
                .map_err(|source| QueueError::Ring { queue: index, source }),
            _ => Ok(false),
        }
    }

    /// Asks for queue `index` to be processed again soon, as if the driver had notified it.
    pub fn again(&mut self, index: u16) {
        if !self.again.contains(&index) {
            self.again.push(index);
        }
    }

    pub(super) fn take_again(&mut self) -> Vec<u16> {
        std::mem::take(&mut self.again)
    }
}

#[cfg(test)]
#[path = "queue_test.rs"]
mod tests;
