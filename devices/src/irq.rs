//! Interrupts as devices see them: a line that can be raised, and a place to send messages to.
//!
//! The monitor implements both on its interrupt controllers; devices never learn which. Both calls must be short
//! and must not call back into a device, because devices make them under their own lock.

/// A wire into an interrupt controller (a GSI).
pub trait IrqLine: Send + Sync {
    /// Sends one edge: the line goes up and down again.
    fn trigger(&self);

    /// Drives a level-triggered line: asserted while `asserted` is true.
    fn set(&self, asserted: bool);
}

/// Takes message-signalled interrupts (PCI Local Bus Specification 3.0, section 6.8).
pub trait MsiSink: Send + Sync {
    /// Delivers the message `data` written to the guest-physical `address`.
    ///
    /// A message that no interrupt controller accepts is dropped, as hardware drops it.
    fn signal(&self, address: u64, data: u32);
}

#[cfg(test)]
pub(crate) mod testing {
    //! A sink that remembers.

    use std::sync::{Arc, Mutex};

    use super::MsiSink;

    /// Records every message in order.
    #[derive(Clone, Default)]
    pub(crate) struct RecordingSink(Arc<Mutex<Vec<(u64, u32)>>>);

    impl RecordingSink {
        /// The messages since the last call.
        pub(crate) fn take(&self) -> Vec<(u64, u32)> {
            std::mem::take(&mut self.0.lock().unwrap())
        }
    }

    impl MsiSink for RecordingSink {
        fn signal(&self, address: u64, data: u32) {
            self.0.lock().unwrap().push((address, data));
        }
    }
}
