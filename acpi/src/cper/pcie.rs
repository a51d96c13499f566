//! Errors of PCI Express components (UEFI 2.10, N.2.7).

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Section, Validation};
use crate::Guid;

const PCIE: Guid = Guid::new(0xD995_E954, 0xBBC1, 0x430F, [0xAD, 0x91, 0xB4, 0x4D, 0xCB, 0x3C, 0x6F, 0x35]);

/// Which component, by place and by what it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PcieDevice {
    /// Vendor.
    pub vendor: u16,
    /// Device.
    pub device_id: u16,
    /// Class, 24 bits: base class in bits 23:16.
    pub class: u32,
    /// Segment.
    pub segment: u16,
    /// Bus.
    pub bus: u8,
    /// Device number, 0 to 31.
    pub device: u8,
    /// Function number, 0 to 7.
    pub function: u8,
    /// Secondary bus of a bridge.
    pub secondary_bus: u8,
    /// Slot number.
    pub slot: u16,
}

/// An error of a PCI Express component (UEFI 2.10, table N.34).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PcieError {
    /// Port type: 0 endpoint, 4 root port, 5 upstream and 6 downstream switch port, and so on.
    pub port_type: Option<u32>,
    /// Version of the specification, major and minor.
    pub version: Option<(u8, u8)>,
    /// Command and status registers.
    pub command_status: Option<(u16, u16)>,
    /// The component.
    pub device: Option<PcieDevice>,
    /// Serial number.
    pub serial: Option<u64>,
    /// Bridge: secondary status and control.
    pub bridge: Option<(u16, u16)>,
    /// PCI Express capability structure.
    pub capability: Option<[u8; 60]>,
    /// AER extended capability structure. Linux recovers a component only if it is there (`ghes_handle_aer`).
    pub aer: Option<[u8; 96]>,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Raw {
    validation: U64,
    port_type: U32,
    version_minor: u8,
    version_major: u8,
    reserved0: [u8; 2],
    command: U16,
    status: U16,
    reserved1: U32,
    vendor: U16,
    device_id: U16,
    class: [u8; 3],
    function: u8,
    device: u8,
    segment: U16,
    bus: u8,
    secondary_bus: u8,
    slot: U16,
    reserved2: u8,
    serial: U64,
    bridge_secondary_status: U16,
    bridge_control: U16,
    capability: [u8; 60],
    aer: [u8; 96],
}

const _: () = assert!(size_of::<Raw>() == 208);

impl PcieError {
    /// The section.
    pub fn section(&self) -> Section {
        /// Bits 2:0 of the slot are reserved.
        const SLOT_SHIFT: u32 = 3;
        let mut valid = Validation::default();
        let port_type = valid.u32(0, self.port_type);
        let (version_major, version_minor) = valid.take(1, self.version);
        let (command, status) = valid.take(2, self.command_status);
        let device = valid.take(3, self.device);
        let serial = valid.u64(4, self.serial);
        let (bridge_status, bridge_control) = valid.take(5, self.bridge);
        let capability = valid.take(6, self.capability.map(Bytes)).0;
        let aer = valid.take(7, self.aer.map(Bytes)).0;
        let class = device.class.to_le_bytes();
        let raw = Raw {
            validation: valid.bits(),
            port_type,
            version_minor,
            version_major,
            reserved0: [0; 2],
            command: U16::new(command),
            status: U16::new(status),
            reserved1: U32::ZERO,
            vendor: U16::new(device.vendor),
            device_id: U16::new(device.device_id),
            class: [class[0], class[1], class[2]],
            function: device.function,
            device: device.device,
            segment: U16::new(device.segment),
            bus: device.bus,
            secondary_bus: device.secondary_bus,
            slot: U16::new(device.slot << SLOT_SHIFT),
            reserved2: 0,
            serial,
            bridge_secondary_status: U16::new(bridge_status),
            bridge_control: U16::new(bridge_control),
            capability,
            aer,
        };
        Section { guid: PCIE, body: raw.as_bytes().to_vec() }
    }
}

/// An array that is zero by default, which longer arrays are not by themselves.
struct Bytes<const N: usize>([u8; N]);

impl<const N: usize> Default for Bytes<N> {
    fn default() -> Self {
        Self([0; N])
    }
}
