//! The common configuration registers and the negotiation they carry (virtio 1.2, sections 2.1, 2.2, 3.1.1 and
//! 4.1.4.3).
//!
//! A register accepts a write of its own width, and halves of the 64-bit ones; anything else is dropped. Reads of
//! any width and offset are answered.

use virtio_bindings::bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::queue::VirtQueue;
use crate::dma::DmaView;
use crate::pci::NO_VECTOR;

/// Feature bits that every device here offers.
const TRANSPORT_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;
const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;

const ACKNOWLEDGE: u8 = VIRTIO_CONFIG_S_ACKNOWLEDGE as u8;
const DRIVER: u8 = VIRTIO_CONFIG_S_DRIVER as u8;
const DRIVER_OK: u8 = VIRTIO_CONFIG_S_DRIVER_OK as u8;
const FEATURES_OK: u8 = VIRTIO_CONFIG_S_FEATURES_OK as u8;
const NEEDS_RESET: u8 = VIRTIO_CONFIG_S_NEEDS_RESET as u8;
const FAILED: u8 = VIRTIO_CONFIG_S_FAILED as u8;

/// Length of the register block in bytes: through queue_reset.
pub(super) const LENGTH: u32 = 0x40;

/// What a write to the registers leaves to the transport.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Nothing.
    Done,
    /// The driver reset the device.
    Reset,
    /// The driver set DRIVER_OK.
    Activate,
    /// The driver set up a queue that cannot work.
    Broken,
}

/// The registers, and the queues they set up.
pub(super) struct Common {
    pub(super) queues: Vec<VirtQueue>,
    pub(super) config_vector: u16,
    /// Accepted by the driver.
    pub(super) features: u64,
    offered: u64,
    vectors: u16,
    device_feature_select: u32,
    driver_feature_select: u32,
    status: u8,
    generation: u8,
    queue_select: u16,
}

impl Common {
    /// Registers for `queues`, offering `features` beside the transport's own, with `vectors` MSI-X vectors.
    pub(super) fn new(queues: Vec<VirtQueue>, features: u64, vectors: u16) -> Self {
        Self {
            queues,
            config_vector: NO_VECTOR,
            features: 0,
            offered: features | TRANSPORT_FEATURES,
            vectors,
            device_feature_select: 0,
            driver_feature_select: 0,
            status: 0,
            generation: 0,
            queue_select: 0,
        }
    }

    /// Back to the state before any driver.
    pub(super) fn reset(&mut self) {
        for queue in &mut self.queues {
            queue.reset();
        }
        self.config_vector = NO_VECTOR;
        self.features = 0;
        self.device_feature_select = 0;
        self.driver_feature_select = 0;
        self.status = 0;
        self.queue_select = 0;
    }

    /// Whether the driver is running and the device works.
    pub(super) fn running(&self) -> bool {
        self.status & (DRIVER_OK | NEEDS_RESET) == DRIVER_OK
    }

    /// Marks the device broken until it is reset. True if the driver is running and must be told.
    pub(super) fn needs_reset(&mut self) -> bool {
        let tell = self.running();
        self.status |= NEEDS_RESET;
        tell
    }

    /// The device configuration changed: a driver that reads it in parts must be able to see that.
    pub(super) fn config_changed(&mut self) {
        self.generation = self.generation.wrapping_add(1);
    }

    /// Reads any bytes of the block; bytes past its end are zero.
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        let image = self.image();
        for (index, byte) in data.iter_mut().enumerate() {
            let at = offset.saturating_add(index as u64);
            *byte = usize::try_from(at).ok().and_then(|at| image.get(at)).copied().unwrap_or(0);
        }
    }

    /// Writes one register.
    pub(super) fn write(&mut self, offset: u64, data: &[u8], view: impl FnOnce() -> DmaView) -> Outcome {
        match (offset, data) {
            (0x00, &[a, b, c, d]) => self.device_feature_select = u32::from_le_bytes([a, b, c, d]),
            (0x08, &[a, b, c, d]) => self.driver_feature_select = u32::from_le_bytes([a, b, c, d]),
            (0x0c, &[a, b, c, d]) => self.accept_features(u32::from_le_bytes([a, b, c, d])),
            (0x10, &[a, b]) => self.config_vector = self.vector(u16::from_le_bytes([a, b])),
            (0x14, &[status]) => return self.write_status(status),
            (0x16, &[a, b]) => self.queue_select = u16::from_le_bytes([a, b]),
            (0x18..0x38, _) => return self.write_queue(offset, data, view),
            _ => {}
        }
        Outcome::Done
    }

    fn accept_features(&mut self, half: u32) {
        if self.status & FEATURES_OK != 0 {
            return;
        }
        self.features = match self.driver_feature_select {
            0 => self.features & !0xffff_ffff | u64::from(half),
            1 => self.features & 0xffff_ffff | u64::from(half) << 32,
            // Bits 64 and up do not exist: claiming one is refused at FEATURES_OK by dropping VERSION_1.
            _ if half != 0 => 0,
            _ => self.features,
        };
    }

    /// A vector that does not exist reads back as none (section 4.1.5.1.2.1).
    fn vector(&self, vector: u16) -> u16 {
        if vector < self.vectors { vector } else { NO_VECTOR }
    }

    fn write_status(&mut self, value: u8) -> Outcome {
        if value == 0 {
            return Outcome::Reset;
        }
        // Bits are only ever added; a driver that clears one must reset instead (section 2.1.1).
        let mut added = value & (ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | FAILED) & !self.status;
        let acceptable = self.features & !self.offered == 0 && self.features & VERSION_1 != 0;
        if added & FEATURES_OK != 0 && !acceptable {
            added &= !FEATURES_OK;
        }
        if (self.status | added) & FEATURES_OK == 0 {
            added &= !DRIVER_OK;
        }
        self.status |= added;
        if added & DRIVER_OK != 0 { Outcome::Activate } else { Outcome::Done }
    }

    fn write_queue(&mut self, offset: u64, data: &[u8], view: impl FnOnce() -> DmaView) -> Outcome {
        let (vectors, features) = (self.vectors, self.features);
        let ready = self.status & FEATURES_OK != 0 && self.status & NEEDS_RESET == 0;
        let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) else {
            return Outcome::Done;
        };
        match (offset, data) {
            (0x1a, &[a, b]) => {
                let vector = u16::from_le_bytes([a, b]);
                queue.vector = if vector < vectors { vector } else { NO_VECTOR };
                return Outcome::Done;
            }
            // The rest of an enabled queue is fixed until reset (section 4.1.4.3.2).
            _ if queue.enabled() => return Outcome::Done,
            _ => {}
        }
        match (offset, data) {
            (0x18, &[a, b]) => {
                let size = u16::from_le_bytes([a, b]);
                if size.is_power_of_two() && size <= queue.max_size() {
                    queue.size = size;
                }
            }
            (0x1c, &[1, 0]) if ready => {
                let event_idx = features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
                if let Err(error) = queue.enable(&view(), event_idx) {
                    tracing::debug!(queue = self.queue_select, %error, "driver enabled a queue that cannot work");
                    return Outcome::Broken;
                }
            }
            (0x20..0x28, data) => half(&mut queue.descriptors, offset - 0x20, data),
            (0x28..0x30, data) => half(&mut queue.available, offset - 0x28, data),
            (0x30..0x38, data) => half(&mut queue.used, offset - 0x30, data),
            _ => {}
        }
        Outcome::Done
    }

    fn image(&self) -> [u8; LENGTH as usize] {
        let mut image = [0; LENGTH as usize];
        let mut put =
            |offset: usize, value: &[u8]| image[offset..offset + value.len()].copy_from_slice(value);
        put(0x00, &self.device_feature_select.to_le_bytes());
        put(0x04, &select(self.offered, self.device_feature_select).to_le_bytes());
        put(0x08, &self.driver_feature_select.to_le_bytes());
        put(0x0c, &select(self.features, self.driver_feature_select).to_le_bytes());
        put(0x10, &self.config_vector.to_le_bytes());
        put(0x12, &(self.queues.len() as u16).to_le_bytes());
        put(0x14, &[self.status, self.generation]);
        put(0x16, &self.queue_select.to_le_bytes());
        // A queue that does not exist has size 0 (section 4.1.4.3.1).
        if let Some(queue) = self.queues.get(usize::from(self.queue_select)) {
            put(0x18, &queue.size.to_le_bytes());
            put(0x1a, &queue.vector.to_le_bytes());
            put(0x1c, &u16::from(queue.enabled()).to_le_bytes());
            put(0x1e, &self.queue_select.to_le_bytes());
            put(0x20, &queue.descriptors.to_le_bytes());
            put(0x28, &queue.available.to_le_bytes());
            put(0x30, &queue.used.to_le_bytes());
        }
        image
    }
}

fn select(features: u64, half: u32) -> u32 {
    match half {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

/// Writes the low half, the high half or all of a 64-bit register.
fn half(register: &mut u64, offset: u64, data: &[u8]) {
    let mut bytes = register.to_le_bytes();
    match (offset, data.len()) {
        (0, 4 | 8) | (4, 4) => {
            let at = offset as usize;
            bytes[at..at + data.len()].copy_from_slice(data);
            *register = u64::from_le_bytes(bytes);
        }
        _ => {}
    }
}

#[cfg(test)]
#[path = "common_test.rs"]
mod tests;
