//! Virtio 1.2 devices behind PCI.
//!
//! A device ([`VirtioDevice`]) knows its features, its configuration and what to do with its queues. The transport
//! ([`VirtioPci`]) knows registers, negotiation and interrupts. A notification from the guest becomes
//! [`Effect::QueueNotify`](crate::bus::Effect::QueueNotify); the machine's main loop answers it by calling
//! [`QueueHandler::process_queue`], so that no vCPU works on a queue. A device with threads of its own can have them hear
//! notifications that never come to the function ([`Doorbells`]).
//!
//! Nothing a driver puts into a queue is trusted. A ring or chain that breaks the rules of the specification puts
//! the device into DEVICE_NEEDS_RESET (section 2.1.1); a buffer that cannot be reached, or that is poisoned, is
//! completed with zero length.

pub mod blk;
mod common;
pub mod console;
mod doorbell;
mod faults;
pub mod pmem;
mod queue;
mod transport;
mod work;

#[cfg(test)]
mod testing;

use crate::bus::Effects;

pub use doorbell::Doorbells;
pub use faults::{Armed, Fault, MAX_FAULTS};
pub use queue::{Chain, QueueError, Queues, Segment};
pub use transport::{NOTIFY_MULTIPLIER, TransportError, VirtioPci, Wiring};
pub use work::{Backend, Worked};

/// What a virtio device is, apart from how it is attached.
pub trait VirtioDevice: Send {
    /// Virtio device id (section 5).
    fn device_type(&self) -> u16;

    /// PCI class code, 24 bits.
    fn class(&self) -> u32;

    /// Device-specific feature bits offered. The transport adds VERSION_1, INDIRECT_DESC and EVENT_IDX.
    fn features(&self) -> u64;

    /// Greatest size of each queue, a power of two each. The number of queues never changes.
    fn queue_sizes(&self) -> &[u16];

    /// Reads device configuration at any offset and width; bytes past its end read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes device configuration at any offset and width.
    fn write_config(&mut self, offset: u64, data: &[u8]);

    /// The driver is ready (DRIVER_OK) and has accepted `features`.
    fn activate(&mut self, features: u64);

    /// Back to the state before any driver. Chains that the device still holds are forgotten.
    fn reset(&mut self);

    /// The driver has notified queue `index`, or there may be more in it. A device does a bounded amount of work
    /// and asks for more with [`Queues::again`].
    ///
    /// # Errors
    /// [`QueueError`] when the driver broke the rules; the device then needs a reset.
    fn process_queue(&mut self, index: u16, queues: &mut Queues<'_>) -> Result<(), QueueError>;

    /// Something changed on the host's side: move what can be moved.
    ///
    /// # Errors
    /// As [`VirtioDevice::process_queue`].
    fn host_ready(&mut self, queues: &mut Queues<'_>) -> Result<(), QueueError>;
}

/// Something that answers [`Effect::QueueNotify`](crate::bus::Effect::QueueNotify), whatever the device.
pub trait QueueHandler: Send {
    /// Works on queue `queue`. What is left to do, more work included, goes to `effects`.
    fn process_queue(&mut self, queue: u16, effects: &mut Effects);
}
