//! The two ways from the CPU to PCI functions: the configuration window and the memory windows, each one device
//! on the machine's memory bus.

use super::root::PciRoot;
use super::{DevFn, config::CONFIG_SIZE};
use crate::bus::{BusDevice, Effects, lock};

/// Bytes of the configuration window that one bus takes.
pub const ECAM_BUS_SIZE: u64 = 1 << 20;

/// The enhanced configuration window (PCI Express Base Specification 6.0, section 7.2.2): bits 27:20 of the offset
/// are the bus, 19:12 device and function, 11:0 the register. A function that does not exist reads as ones.
pub struct Ecam {
    root: PciRoot,
}

impl Ecam {
    /// The window onto `root`.
    pub fn new(root: PciRoot) -> Self {
        Self { root }
    }

    /// Bus, slot and register of an access; none if it leaves the register space of one function.
    fn target(offset: u64, length: usize) -> Option<(u8, DevFn, u16)> {
        let bus = u8::try_from(offset / ECAM_BUS_SIZE).ok()?;
        let register = (offset & 0xfff) as u16;
        let fits = usize::from(register) + length <= CONFIG_SIZE;
        fits.then_some((bus, DevFn::from_bits((offset >> 12) as u8), register))
    }
}

impl BusDevice for Ecam {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let found = Self::target(offset, data.len())
            .and_then(|(bus, devfn, register)| Some((self.root.find(bus, devfn)?, register)));
        match found {
            Some((found, register)) => lock(&*found.function).config_read(register, data),
            None => data.fill(0xff),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8], effects: &mut Effects) {
        let Some((bus, devfn, register)) = Self::target(offset, data.len()) else { return };
        let Some(found) = self.root.find(bus, devfn) else { return };
        lock(&*found.function).config_write(register, data, effects);
        // A capability can change the answer too: a port whose slot has lost its power forwards nothing.
        self.root.refresh(found.id);
    }
}

/// A window of memory addresses that the host bridge forwards to PCI.
pub struct PciWindow {
    root: PciRoot,
    base: u64,
}

impl PciWindow {
    /// The window of `root` that starts at the guest-physical address `base`.
    pub fn new(root: PciRoot, base: u64) -> Self {
        Self { root, base }
    }
}

impl BusDevice for PciWindow {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match self.root.route(self.base.wrapping_add(offset), data.len()) {
            Some(routed) => lock(&*routed.function).bar_read(routed.bar, routed.offset, data),
            None => data.fill(0xff),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8], effects: &mut Effects) {
        if let Some(routed) = self.root.route(self.base.wrapping_add(offset), data.len()) {
            lock(&*routed.function).bar_write(routed.bar, routed.offset, data, effects);
        }
    }
}

#[cfg(test)]
#[path = "ecam_test.rs"]
mod tests;
