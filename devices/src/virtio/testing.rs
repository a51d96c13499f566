//! A driver for device tests: sets a function up as Linux does, and moves buffers through its queues.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::{Backend, NOTIFY_MULTIPLIER, QueueHandler, VirtioDevice, VirtioPci, Wiring};
use crate::bus::{DeviceId, Effect, Effects};
use crate::dma::testing::{Lines, dma};
use crate::dma::{Dma, DmaView};
use crate::irq::testing::RecordingSink;
use crate::pci::PciFunction;

pub(super) const MEMORY: usize = 0x40_0000;
pub(super) const VERSION_1: u64 = 1 << 32;
pub(super) const INDIRECT: u64 = 1 << 28;
pub(super) const EVENT_IDX: u64 = 1 << 29;

pub(super) const STATUS: u64 = 0x14;
pub(super) const NEEDS_RESET: u8 = 64;

pub(super) const NEXT: u16 = 1;
pub(super) const WRITE: u16 = 2;
pub(super) const IS_INDIRECT: u16 = 4;

/// Rings of queue `i` start at `RINGS + i * 0x4000`; buffers for tests start at `BUFFERS`.
const RINGS: u64 = 0x10_0000;
pub(super) const BUFFERS: u64 = 0x20_0000;
const SIZE: u16 = 8;

pub(super) struct Driver<D: VirtioDevice> {
    pub(super) function: VirtioPci<D>,
    pub(super) dma: Dma,
    pub(super) poison: Arc<Lines>,
    pub(super) sink: RecordingSink,
    next_descriptor: Vec<u16>,
    next_used: Vec<u16>,
}

/// A backend that does nothing until the test does it: what it was given, and when it is to call.
pub(super) struct Later<J>(pub(super) Arc<Mutex<(Vec<J>, Option<Duration>)>>);

impl<J> Clone for Later<J> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<J> Default for Later<J> {
    fn default() -> Self {
        Self(Arc::new(Mutex::new((Vec::new(), None))))
    }
}

impl<J: Send> Backend<J> for Later<J> {
    fn start(&mut self, job: J) {
        self.0.lock().unwrap().0.push(job);
    }

    fn call_at(&mut self, at: Duration) {
        self.0.lock().unwrap().1 = Some(at);
    }
}

impl<D: VirtioDevice> Driver<D> {
    /// A function with bus mastering and MSI-X on; vector `v` has data `v` and is not masked.
    pub(super) fn new(device: D) -> Self {
        let (dma, poison) = dma(&[(0, MEMORY)]);
        Self::in_memory(device, dma, poison)
    }

    /// As [`Self::new`], for a device that reaches memory by itself.
    pub(super) fn in_memory(device: D, dma: Dma, poison: Arc<Lines>) -> Self {
        let sink = RecordingSink::default();
        let queues = device.queue_sizes().len();
        let wiring = Wiring { id: DeviceId(7), dma: dma.clone(), msi: Arc::new(sink.clone()), express: None };
        let mut driver = Self {
            function: VirtioPci::new(device, wiring).unwrap(),
            dma,
            poison,
            sink,
            next_descriptor: vec![0; queues],
            next_used: vec![0; queues],
        };
        driver.config(4, &[6, 0]);
        let msix = driver.capability(0x11, None);
        driver.config(msix + 2, &[0, 0x80]);
        for vector in 0..=queues as u64 {
            let mut entry = [0; 16];
            entry[..4].copy_from_slice(&0xfee0_0000u32.to_le_bytes());
            entry[8] = vector as u8;
            driver.put(0x3000 + 16 * vector, &entry);
        }
        driver
    }

    pub(super) fn config(&mut self, offset: u16, data: &[u8]) {
        self.function.config_write(offset, data, &mut Effects::new());
    }

    pub(super) fn config_read<const N: usize>(&mut self, offset: u16) -> [u8; N] {
        let mut data = [0; N];
        self.function.config_read(offset, &mut data);
        data
    }

    /// Offset of the capability `id`, of virtio type `kind` if given.
    pub(super) fn capability(&mut self, id: u8, kind: Option<u8>) -> u16 {
        let [mut at] = self.config_read::<1>(0x34);
        loop {
            let [found, next, _, cfg] = self.config_read::<4>(at.into());
            if found == id && kind.is_none_or(|kind| kind == cfg) {
                return at.into();
            }
            assert_ne!(next, 0, "no capability {id:#x} {kind:?}");
            at = next;
        }
    }

    pub(super) fn get<const N: usize>(&mut self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.function.bar_read(0, offset, &mut data);
        data
    }

    /// Writes the BAR and does what follows from it. Returns how many queue notifications that took.
    pub(super) fn put(&mut self, offset: u64, data: &[u8]) -> usize {
        let mut effects = Effects::new();
        self.function.bar_write(0, offset, data, &mut effects);
        self.run(effects)
    }

    /// Answers queue notifications as the main loop does.
    pub(super) fn run(&mut self, mut effects: Effects) -> usize {
        let mut rounds = 0;
        while !effects.is_empty() {
            let mut next = Effects::new();
            for effect in effects {
                let Effect::QueueNotify { device, queue } = effect else { panic!("{effect:?}") };
                assert_eq!(device, DeviceId(7));
                self.function.process_queue(queue, &mut next);
                rounds += 1;
                assert!(rounds < 10_000, "the device never comes to rest");
            }
            effects = next;
        }
        rounds
    }

    pub(super) fn status(&mut self) -> u8 {
        self.get::<1>(STATUS)[0]
    }

    /// Up to FEATURES_OK. Returns whether the device agreed.
    pub(super) fn negotiate(&mut self, features: u64) -> bool {
        self.put(STATUS, &[1]);
        self.put(STATUS, &[3]);
        for half in 0..2u32 {
            self.put(0x08, &half.to_le_bytes());
            self.put(0x0c, &((features >> (32 * half)) as u32).to_le_bytes());
        }
        self.put(STATUS, &[0xb]);
        self.status() & 8 != 0
    }

    pub(super) fn ring(queue: u16) -> u64 {
        RINGS + u64::from(queue) * 0x4000
    }

    /// Sets queue `queue` up with 8 entries and vector `queue + 1`.
    pub(super) fn setup(&mut self, queue: u16) {
        let base = Self::ring(queue);
        self.put(0x16, &queue.to_le_bytes());
        self.put(0x18, &SIZE.to_le_bytes());
        self.put(0x1a, &(queue + 1).to_le_bytes());
        for (offset, address) in [(0x20, base), (0x28, base + 0x1000), (0x30, base + 0x2000)] {
            self.put(offset, &(address as u32).to_le_bytes());
            self.put(offset + 4, &((address >> 32) as u32).to_le_bytes());
        }
        self.put(0x1c, &[1, 0]);
    }

    /// The whole way to DRIVER_OK, with every queue.
    pub(super) fn start(&mut self, features: u64) {
        assert!(self.negotiate(features));
        self.put(0x10, &[0, 0]);
        for queue in 0..self.next_used.len() as u16 {
            self.setup(queue);
            assert_eq!(self.get::<2>(0x1c), [1, 0], "queue {queue}");
        }
        self.put(STATUS, &[0xf]);
        assert_eq!(self.status(), 0xf);
    }

    pub(super) fn view(&self) -> DmaView {
        self.dma.view()
    }

    pub(super) fn descriptor(
        &self,
        table: u64,
        index: u16,
        address: u64,
        length: u32,
        flags: u16,
        next: u16,
    ) {
        let at = table + 16 * u64::from(index);
        let view = self.view();
        view.write_obj(at, address).unwrap();
        view.write_obj(at + 8, length).unwrap();
        view.write_obj(at + 12, flags).unwrap();
        view.write_obj(at + 14, next).unwrap();
    }

    /// Makes the descriptor `head` available.
    pub(super) fn make_available(&self, queue: u16, head: u16) {
        let ring = Self::ring(queue) + 0x1000;
        let view = self.view();
        let index: u16 = view.read_obj(ring + 2).unwrap();
        view.write_obj(ring + 4 + 2 * u64::from(index % SIZE), head).unwrap();
        view.write_obj(ring + 2, index.wrapping_add(1)).unwrap();
    }

    /// Offers a chain of `(address, length, device writes)` without notifying. Returns its head.
    pub(super) fn offer(&mut self, queue: u16, buffers: &[(u64, u32, bool)]) -> u16 {
        let next = &mut self.next_descriptor[usize::from(queue)];
        let head = *next % SIZE;
        let first = *next;
        *next = next.wrapping_add(buffers.len() as u16);
        for (index, &(address, length, write)) in buffers.iter().enumerate() {
            let at = first.wrapping_add(index as u16) % SIZE;
            let more = if index + 1 < buffers.len() { NEXT } else { 0 };
            let flags = more | if write { WRITE } else { 0 };
            self.descriptor(Self::ring(queue), at, address, length, flags, (at + 1) % SIZE);
        }
        self.make_available(queue, head);
        head
    }

    pub(super) fn kick(&mut self, queue: u16) -> usize {
        self.put(0x5000 + u64::from(queue) * u64::from(NOTIFY_MULTIPLIER), &queue.to_le_bytes())
    }

    /// What the device has completed since the last call: head and length.
    pub(super) fn used(&mut self, queue: u16) -> Vec<(u32, u32)> {
        let ring = Self::ring(queue) + 0x2000;
        let view = self.view();
        let index: u16 = view.read_obj(ring + 2).unwrap();
        let seen = &mut self.next_used[usize::from(queue)];
        let mut completed = Vec::new();
        while *seen != index {
            let at = ring + 4 + 8 * u64::from(*seen % SIZE);
            completed.push((view.read_obj(at).unwrap(), view.read_obj(at + 4).unwrap()));
            *seen = seen.wrapping_add(1);
        }
        completed
    }

    pub(super) fn bytes(&self, address: u64, length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        self.dma.read(address, &mut data).unwrap();
        data
    }

    /// The data words of the interrupts since the last call.
    pub(super) fn interrupts(&self) -> Vec<u32> {
        self.sink.take().into_iter().map(|(_, data)| data).collect()
    }
}

/// A device with two queues: queue 0 copies what is readable in a chain to what is writable.
#[derive(Default)]
pub(super) struct Echo {
    pub(super) active: Option<u64>,
    pub(super) config: [u8; 4],
}

impl VirtioDevice for Echo {
    fn device_type(&self) -> u16 {
        0x2a
    }

    fn class(&self) -> u32 {
        0xff_0000
    }

    fn features(&self) -> u64 {
        1 << 5
    }

    fn queue_sizes(&self) -> &[u16] {
        &[16, 16]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = self.config.get(offset as usize + index).copied().unwrap_or(0);
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        for (index, byte) in data.iter().enumerate() {
            if let Some(to) = self.config.get_mut(offset as usize + index) {
                *to = *byte;
            }
        }
    }

    fn activate(&mut self, features: u64) {
        self.active = Some(features);
    }

    fn reset(&mut self) {
        self.active = None;
    }

    fn process_queue(&mut self, index: u16, queues: &mut super::Queues<'_>) -> Result<(), super::QueueError> {
        for _ in 0..4 {
            let Some(chain) = queues.pop(index)? else {
                if queues.resume(index)? {
                    continue;
                }
                return Ok(());
            };
            let length = chain.readable_len().min(chain.writable_len()).min(0x1_0000);
            let mut data = vec![0; length as usize];
            let done =
                chain.read(queues.view(), 0, &mut data).and_then(|_| chain.write(queues.view(), 0, &data));
            queues.complete(index, &chain, done.unwrap_or(0) as u32)?;
        }
        queues.again(index);
        Ok(())
    }

    fn host_ready(&mut self, _queues: &mut super::Queues<'_>) -> Result<(), super::QueueError> {
        Ok(())
    }
}
