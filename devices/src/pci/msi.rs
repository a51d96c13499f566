//! MSI with one vector that can be masked (PCI Express Base Specification 6.0, section 7.7.1).
//!
//! All state stands in the registers of the capability; a message goes out when the function raises one.

use std::sync::Arc;

use super::config::{ConfigError, ConfigSpace};
use crate::irq::MsiSink;

const ID: u8 = 0x05;
const CONTROL: usize = 2;
const ADDRESS: usize = 4;
const DATA: usize = 0xc;
const MASK: usize = 0x10;
const PENDING: usize = 0x14;
/// Length after id and link.
const BODY: usize = 0x18 - 2;

const CONTROL_ENABLE: u16 = 1;
const CONTROL_64_BIT: u16 = 1 << 7;
const CONTROL_MASKABLE: u16 = 1 << 8;

/// The MSI capability of one function.
pub struct Msi {
    capability: usize,
    sink: Arc<dyn MsiSink>,
}

impl Msi {
    /// Adds the capability, switched off, to `space`.
    ///
    /// # Errors
    /// [`ConfigError::CapabilitySpace`].
    pub fn new(space: &mut ConfigSpace, sink: Arc<dyn MsiSink>) -> Result<Self, ConfigError> {
        let mut body = [0; BODY];
        body[..2].copy_from_slice(&(CONTROL_64_BIT | CONTROL_MASKABLE).to_le_bytes());
        let mut writable = [0; BODY];
        writable[CONTROL - 2] = CONTROL_ENABLE as u8;
        writable[ADDRESS - 2..DATA]
            .copy_from_slice(&[0xfc, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
        writable[MASK - 2] = 1;
        let capability = usize::from(space.add_capability(ID, &body, &writable)?);
        Ok(Self { capability, sink })
    }

    /// Whether a message would go out: MSI and bus mastering are on, and the vector is not masked.
    pub fn ready(&self, space: &ConfigSpace) -> bool {
        let enabled = space.u16(self.capability + CONTROL) & CONTROL_ENABLE != 0;
        enabled && space.bus_master() && space.u32(self.capability + MASK) & 1 == 0
    }

    /// Shows whether a message waits for its mask to be lifted.
    pub fn set_pending(&self, space: &mut ConfigSpace, pending: bool) {
        space.set(self.capability + PENDING, &[pending.into()]);
    }

    /// Sends the message.
    pub fn send(&self, space: &ConfigSpace) {
        let address = u64::from(space.u32(self.capability + ADDRESS))
            | u64::from(space.u32(self.capability + ADDRESS + 4)) << 32;
        self.sink.signal(address, space.u16(self.capability + DATA).into());
    }
}
