//! The host bridge at 00:00.0: an identity for `lspci` and for kernels that look for one, nothing more.

use super::config::{ConfigSpace, Identity};
use super::{Decode, PciFunction};
use crate::bus::Effects;

/// Red Hat's id for a generic PCI Express host bridge.
const IDENTITY: Identity = Identity {
    vendor: 0x1b36,
    device: 0x0008,
    revision: 0,
    class: 0x06_0000,
    subsystem_vendor: 0x1af4,
    subsystem: 0x1100,
};

/// A host bridge without BARs.
#[derive(Debug)]
pub struct HostBridge {
    config: ConfigSpace,
}

impl HostBridge {
    /// A host bridge.
    pub fn new() -> Self {
        Self { config: ConfigSpace::new(IDENTITY) }
    }
}

impl Default for HostBridge {
    fn default() -> Self {
        Self::new()
    }
}

impl PciFunction for HostBridge {
    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        self.config.read(offset, data);
    }

    fn config_write(&mut self, offset: u16, data: &[u8], _effects: &mut Effects) {
        self.config.write(offset, data);
    }

    fn decode(&self) -> Decode {
        self.config.decode()
    }

    fn bar_read(&mut self, _bar: u8, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn bar_write(&mut self, _bar: u8, _offset: u64, _data: &[u8], _effects: &mut Effects) {}

    fn reset(&mut self) {
        *self = Self::new();
    }
}
