//! PCI Express: functions with their configuration space, and the root complex that finds them.
//!
//! A function ([`PciFunction`]) owns its registers and says where it decodes memory; it does not know its bus
//! number or who routes to it. The root ([`PciRoot`]) knows the tree, answers the enhanced configuration window
//! ([`Ecam`]) and hands memory accesses to whichever function's base address register claims them now
//! ([`PciWindow`]), so that a guest that moves a BAR never changes the machine's bus.
//!
//! The hierarchy may have bridges: a function whose [`Decode::bridge`] is set forwards configuration cycles of its
//! bus range, and memory cycles of its windows, to the functions inserted behind it. Host bridges that come and go by ACPI
//! have a root bus each, and no function of their own: [`HotplugBridges`] is what their methods see.
//!
//! There is no INTx and there are no legacy configuration ports. Linux takes all ones at 0xCF8 as "no type 1
//! access" (`arch/x86/pci/direct.c` pci_check_type1) and uses the MCFG window for everything, but its early code
//! reads through the ports regardless: `early_quirks` 32 slots, and on AMD `pci_enable_pci_io_ecs` 72 slots, each an
//! `outl` and an `in`. `pci=noearly` on the kernel's command line turns both off.

mod config;
mod ecam;
mod express;
mod firmware;
mod host_bridge;
mod hotplug_bridges;
mod msi;
mod msix;
mod root;
mod root_port;

use std::sync::{Arc, Mutex};

use thiserror::Error;

use crate::bus::{DeviceId, Effects};

pub use config::{BarKind, ConfigError, ConfigSpace, Identity};
pub use ecam::{ECAM_BUS_SIZE, Ecam, PciWindow};
pub use express::{PortType, add_express_capability};
pub use firmware::{BarWindows, assign_bars};
pub use host_bridge::HostBridge;
pub use hotplug_bridges::{HotplugBridges, HotplugBridgesState};
pub use msi::Msi;
pub use msix::{MSIX_ENTRY_SIZE, Msix, NO_VECTOR};
pub use root::PciRoot;
pub use root_port::{Indicator, RootPort, SlotChange, SlotKind};

/// Device and function number: bits 7:3 device, bits 2:0 function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DevFn(u8);

impl DevFn {
    /// The function `function` (0 to 7) of device `device` (0 to 31); higher bits of either are dropped.
    pub const fn new(device: u8, function: u8) -> Self {
        Self((device & 0x1f) << 3 | function & 7)
    }

    /// From the eight bits of a requester id or ECAM offset.
    pub const fn from_bits(bits: u8) -> Self {
        Self(bits)
    }

    /// The device number, 0 to 31.
    pub const fn device(self) -> u8 {
        self.0 >> 3
    }

    /// The function number, 0 to 7.
    pub const fn function(self) -> u8 {
        self.0 & 7
    }
}

impl std::fmt::Display for DevFn {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:02x}.{:x}", self.device(), self.function())
    }
}

/// The bus that a function is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PciBus {
    /// The root bus with this number.
    Root(u8),
    /// The bus behind this bridge, whatever number the guest has given it.
    Behind(DeviceId),
}

/// A range of guest-physical memory that a function decodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BarRange {
    /// Index of the base address register, 0 to 5.
    pub bar: u8,
    /// First address.
    pub base: u64,
    /// Length in bytes, a power of two.
    pub size: u64,
}

/// What a bridge forwards to the bus behind it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BridgeDecode {
    /// Number of the bus right behind the bridge.
    pub secondary: u8,
    /// Highest bus number behind the bridge.
    pub subordinate: u8,
    /// Memory forwarded: first and last address of each window. Empty while the bridge forwards none.
    pub windows: Vec<(u64, u64)>,
}

/// Where a function answers at present.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Decode {
    /// Its memory ranges; empty while memory decoding is off.
    pub bars: Vec<BarRange>,
    /// What it forwards, if it is a bridge.
    pub bridge: Option<BridgeDecode>,
}

/// One PCI function.
///
/// Configuration accesses have 1 to 8 bytes and lie within the 4096 bytes of the space; memory accesses lie within
/// the range of the BAR. Both come at any width and alignment, and none may panic.
pub trait PciFunction: Send {
    /// Reads configuration space.
    fn config_read(&mut self, offset: u16, data: &mut [u8]);

    /// Writes configuration space.
    fn config_write(&mut self, offset: u16, data: &[u8], effects: &mut Effects);

    /// Where the function answers now. The root asks again after each write to the header.
    fn decode(&self) -> Decode;

    /// Reads memory behind `bar` at `offset` from its start.
    fn bar_read(&mut self, bar: u8, offset: u64, data: &mut [u8]);

    /// Writes memory behind `bar` at `offset` from its start.
    fn bar_write(&mut self, bar: u8, offset: u64, data: &[u8], effects: &mut Effects);

    /// The link to the function was lost, or the bridge above has reset its bus: everything is as after power on (PCI
    /// Express Base Specification 6.0, section 6.6.1).
    fn reset(&mut self);

    /// Whether this bridge has reset what is behind it since the last question. The root asks after each write to
    /// configuration space, and whenever it is told to [`PciRoot::refresh`].
    fn take_reset_behind(&mut self) -> bool {
        false
    }
}

/// A function that the root and its owner share.
pub type SharedFunction = Arc<Mutex<dyn PciFunction>>;

/// Why the PCI hierarchy could not be changed.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum PciError {
    /// A function is already there.
    #[error("PCI slot {devfn} is taken by device {by:?}: choose another slot")]
    SlotTaken {
        /// The slot.
        devfn: DevFn,
        /// Who sits there.
        by: DeviceId,
    },
    /// The device is already in the hierarchy.
    #[error("PCI device {id:?} is already inserted: remove it first")]
    Duplicate {
        /// The device.
        id: DeviceId,
    },
    /// The port to insert behind does not exist.
    #[error("PCI port {port:?} does not exist: insert it before what is behind it")]
    NoPort {
        /// The port asked for.
        port: DeviceId,
    },
    /// A window has no room for a BAR.
    #[error(
        "BAR {bar} of PCI slot {devfn} needs {size:#x} bytes and its window is full: make the window larger"
    )]
    WindowFull {
        /// The slot.
        devfn: DevFn,
        /// The BAR.
        bar: u8,
        /// What it needs, in bytes.
        size: u64,
    },
}
