//! Errors of CXL: of the protocol (UEFI 2.10, N.2.13) and events of components (N.2.14), which carry an event record
//! of the CXL specification (CXL 3.1, 8.2.9.2.1) without its UUID.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Section, Validation};
use crate::Guid;

const PROTOCOL: Guid =
    Guid::new(0x80B9_EFB4, 0x52B5, 0x4DE3, [0xA7, 0x77, 0x68, 0x78, 0x4B, 0x77, 0x10, 0x48]);
const GENERAL_MEDIA: Guid =
    Guid::new(0xFBCD_0A77, 0xC260, 0x417F, [0x85, 0xA9, 0x08, 0x8B, 0x16, 0x21, 0xEB, 0xA6]);
const DRAM: Guid = Guid::new(0x601D_CBB3, 0x9C06, 0x4EAB, [0xB8, 0xAF, 0x4E, 0x9B, 0xFB, 0x5C, 0x96, 0x24]);
const MEMORY_MODULE: Guid =
    Guid::new(0xFE92_7475, 0xDD59, 0x4339, [0xA5, 0x86, 0x79, 0xBA, 0xB1, 0x13, 0xB7, 0x74]);

/// Bits 2:0 of a slot are reserved, as in a PCI Express section.
const SLOT_SHIFT: u32 = 3;

/// A PCI function of a CXL component.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CxlPciDevice {
    /// Vendor.
    pub vendor: u16,
    /// Device.
    pub device_id: u16,
    /// Segment.
    pub segment: u16,
    /// Bus.
    pub bus: u8,
    /// Device number, 0 to 31.
    pub device: u8,
    /// Function number, 0 to 7.
    pub function: u8,
    /// Slot number.
    pub slot: u16,
}

/// Who reports an error of the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum CxlAgent {
    /// A restricted CXL device, known by its PCI address.
    RestrictedDevice = 0,
    /// The downstream port above a restricted CXL host, known by the address of its register block.
    RestrictedHostPort = 1,
    /// A CXL device.
    Device = 2,
    /// A logical device.
    LogicalDevice = 3,
    /// The manager of a fabric.
    FabricManager = 4,
    /// A root port.
    RootPort = 5,
    /// A downstream switch port.
    DownstreamPort = 6,
    /// An upstream switch port.
    UpstreamPort = 7,
}

/// An error of the CXL protocol (UEFI 2.10, table N.44).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CxlProtocolError {
    /// Who reports it.
    pub agent: CxlAgent,
    /// Its PCI function.
    pub device: Option<CxlPciDevice>,
    /// Address of its register block; only for [`CxlAgent::RestrictedHostPort`].
    pub rcrb: Option<u64>,
    /// Its serial number.
    pub serial: Option<u64>,
    /// The CXL RAS capability structure: Uncorrectable Error Status, Mask and Severity, Correctable Error Status and
    /// Mask, control, and the header log (CXL 3.1, 8.2.4.17).
    pub ras: Option<[u8; Self::RAS_SIZE]>,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawProtocol {
    validation: U64,
    agent: u8,
    reserved0: [u8; 7],
    agent_address: [u8; 8],
    vendor: U16,
    device_id: U16,
    subsystem_vendor: U16,
    subsystem: U16,
    class: [u8; 2],
    slot: U16,
    reserved1: [u8; 4],
    serial: U64,
    capability: [u8; 60],
    dvsec_length: U16,
    error_log_length: U16,
    reserved2: [u8; 4],
}

const _: () = assert!(size_of::<RawProtocol>() == 116);

impl CxlProtocolError {
    /// Bytes of the CXL RAS capability structure, its header log of 16 words included.
    pub const RAS_SIZE: usize = 0x58;

    /// The section.
    pub fn section(&self) -> Section {
        let mut valid = Validation::default();
        let agent = valid.take(0, Some(self.agent as u8));
        let device = self.device.unwrap_or_default();
        let place = [
            device.function,
            device.device,
            device.bus,
            device.segment as u8,
            (device.segment >> 8) as u8,
            0,
            0,
            0,
        ];
        let address = self.rcrb.map(u64::to_le_bytes).or(self.device.map(|_| place));
        let agent_address = valid.take(1, address);
        let identity = valid.take(2, self.device);
        let serial = valid.u64(3, self.serial);
        let ras = valid.take(6, self.ras.map(Vec::from));
        let raw = RawProtocol {
            validation: valid.bits(),
            agent,
            reserved0: [0; 7],
            agent_address,
            vendor: U16::new(identity.vendor),
            device_id: U16::new(identity.device_id),
            subsystem_vendor: U16::ZERO,
            subsystem: U16::ZERO,
            class: [0; 2],
            slot: U16::new(identity.slot << SLOT_SHIFT),
            reserved1: [0; 4],
            serial,
            capability: [0; 60],
            dvsec_length: U16::ZERO,
            error_log_length: U16::new(ras.len() as u16),
            reserved2: [0; 4],
        };
        Section { guid: PROTOCOL, body: [raw.as_bytes(), &ras].concat() }
    }
}

/// What every event record begins with (CXL 3.1, table 8-42), without the UUID.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CxlEventHeader {
    /// Flags: bits 1:0 the severity (0 informational, 1 warning, 2 failure, 3 fatal), 2 permanent condition,
    /// 3 maintenance needed, 4 performance degraded, 5 hardware replacement needed.
    pub flags: u32,
    /// Number of the record, above 0.
    pub handle: u16,
    /// Number of a related record.
    pub related: u16,
    /// Nanoseconds since 1970.
    pub timestamp: u64,
    /// Maintenance operation that the device asks for.
    pub maintenance: u8,
}

/// What events of media have in common (CXL 3.1, tables 8-43 and 8-44).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CxlMedia {
    /// Device physical address; its low six bits are flags (bit 0 volatile, bit 1 repairable).
    pub address: u64,
    /// Bit 0 uncorrectable, 1 threshold, 2 poison list overflow.
    pub descriptor: u8,
    /// Type of the event.
    pub kind: u8,
    /// Transaction: 1 host read, 2 host write, 3 scan media, 4 poison injection, 5 scrub, 6 management.
    pub transaction: u8,
    /// Channel.
    pub channel: Option<u8>,
    /// Rank.
    pub rank: Option<u8>,
}

/// General media event (CXL 3.1, table 8-43).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CxlGeneralMedia {
    /// What it has in common with other media events.
    pub media: CxlMedia,
    /// Device, 24 bits.
    pub device: Option<u32>,
    /// Component, in the vendor's terms.
    pub component: Option<[u8; 16]>,
}

/// DRAM event (CXL 3.1, table 8-44).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CxlDram {
    /// What it has in common with other media events.
    pub media: CxlMedia,
    /// Nibbles, 24 bits.
    pub nibble_mask: Option<u32>,
    /// Bank group.
    pub bank_group: Option<u8>,
    /// Bank.
    pub bank: Option<u8>,
    /// Row, 24 bits.
    pub row: Option<u32>,
    /// Column.
    pub column: Option<u16>,
    /// Bits that were corrected in a burst.
    pub correction_mask: Option<[u64; 4]>,
}

/// Health of a device (CXL 3.1, table 8-102).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CxlHealth {
    /// Bit 0 maintenance needed, 1 performance degraded, 2 replacement needed.
    pub status: u8,
    /// Media: 0 normal, 1 not ready, 2 write persistency lost, 3 all data lost.
    pub media: u8,
    /// Additional status.
    pub additional: u8,
    /// Life used, in percent.
    pub life_used: u8,
    /// Temperature in degrees Celsius.
    pub temperature: i16,
    /// Dirty shutdowns.
    pub dirty_shutdowns: u32,
    /// Corrected errors of volatile memory.
    pub corrected_volatile: u32,
    /// Corrected errors of persistent memory.
    pub corrected_persistent: u32,
}

/// Memory module event (CXL 3.1, table 8-45).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CxlMemoryModule {
    /// What has changed: 0 health status, 1 media status, 2 life used, 3 temperature, 4 data path, 5 LSA.
    pub kind: u8,
    /// The health as it is now.
    pub health: CxlHealth,
}

/// The events that have a section type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CxlEvent {
    /// General media.
    GeneralMedia(CxlGeneralMedia),
    /// DRAM.
    Dram(CxlDram),
    /// Memory module.
    MemoryModule(CxlMemoryModule),
}

/// An event of a CXL component (UEFI 2.10, table N.46).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CxlComponent {
    /// The component. Linux hands an event to the driver of this function (`cxl_handle_cper_event`).
    pub device: Option<CxlPciDevice>,
    /// Its serial number.
    pub serial: Option<u64>,
    /// The record's head.
    pub header: CxlEventHeader,
    /// The event.
    pub event: CxlEvent,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawComponent {
    length: U32,
    validation: U64,
    vendor: U16,
    device_id: U16,
    function: u8,
    device: u8,
    bus: u8,
    segment: U16,
    slot: U16,
    reserved: u8,
    serial: U64,
    event: RawEvent,
}

/// An event record behind its UUID.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawEvent {
    length: u8,
    flags: [u8; 3],
    handle: U16,
    related: U16,
    timestamp: U64,
    maintenance: u8,
    reserved: [u8; 15],
    data: [u8; 80],
}

const _: () = assert!(size_of::<RawEvent>() == 112 && size_of::<RawComponent>() == 144);

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawMedia {
    address: U64,
    descriptor: u8,
    kind: u8,
    transaction: u8,
    validity: U16,
    channel: u8,
    rank: u8,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawGeneralMedia {
    media: RawMedia,
    device: [u8; 3],
    component: [u8; 16],
    reserved: [u8; 46],
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawDram {
    media: RawMedia,
    nibble_mask: [u8; 3],
    bank_group: u8,
    bank: u8,
    row: [u8; 3],
    column: U16,
    correction_mask: [U64; 4],
    reserved: [u8; 23],
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawMemoryModule {
    kind: u8,
    status: u8,
    media: u8,
    additional: u8,
    life_used: u8,
    temperature: U16,
    dirty_shutdowns: U32,
    corrected_volatile: U32,
    corrected_persistent: U32,
    reserved: [u8; 61],
}

const _: () = assert!(size_of::<RawGeneralMedia>() == 80);
const _: () = assert!(size_of::<RawDram>() == 80);
const _: () = assert!(size_of::<RawMemoryModule>() == 80);

/// The lower three bytes of a number.
fn three_bytes(number: u32) -> [u8; 3] {
    let bytes = number.to_le_bytes();
    [bytes[0], bytes[1], bytes[2]]
}

impl CxlMedia {
    fn raw(&self, valid: &mut Validation) -> RawMedia {
        RawMedia {
            address: U64::new(self.address),
            descriptor: self.descriptor,
            kind: self.kind,
            transaction: self.transaction,
            channel: valid.take(0, self.channel),
            rank: valid.take(1, self.rank),
            validity: U16::ZERO,
        }
    }
}

impl CxlGeneralMedia {
    fn raw(&self) -> RawGeneralMedia {
        let mut valid = Validation::default();
        let mut media = self.media.raw(&mut valid);
        let device = three_bytes(valid.take(2, self.device));
        let component = valid.take(3, self.component);
        media.validity = U16::new(valid.0 as u16);
        RawGeneralMedia { media, device, component, reserved: [0; 46] }
    }
}

impl CxlDram {
    fn raw(&self) -> RawDram {
        let mut valid = Validation::default();
        let mut media = self.media.raw(&mut valid);
        RawDram {
            nibble_mask: three_bytes(valid.take(2, self.nibble_mask)),
            bank_group: valid.take(3, self.bank_group),
            bank: valid.take(4, self.bank),
            row: three_bytes(valid.take(5, self.row)),
            column: valid.u16(6, self.column),
            correction_mask: valid.take(7, self.correction_mask).map(U64::new),
            reserved: [0; 23],
            media: {
                media.validity = U16::new(valid.0 as u16);
                media
            },
        }
    }
}

impl CxlMemoryModule {
    fn raw(&self) -> RawMemoryModule {
        let health = self.health;
        RawMemoryModule {
            kind: self.kind,
            status: health.status,
            media: health.media,
            additional: health.additional,
            life_used: health.life_used,
            temperature: U16::new(health.temperature as u16),
            dirty_shutdowns: U32::new(health.dirty_shutdowns),
            corrected_volatile: U32::new(health.corrected_volatile),
            corrected_persistent: U32::new(health.corrected_persistent),
            reserved: [0; 61],
        }
    }
}

impl CxlEvent {
    fn guid(&self) -> Guid {
        match self {
            Self::GeneralMedia(_) => GENERAL_MEDIA,
            Self::Dram(_) => DRAM,
            Self::MemoryModule(_) => MEMORY_MODULE,
        }
    }

    fn data(&self) -> [u8; 80] {
        match self {
            Self::GeneralMedia(event) => zerocopy::transmute!(event.raw()),
            Self::Dram(event) => zerocopy::transmute!(event.raw()),
            Self::MemoryModule(event) => zerocopy::transmute!(event.raw()),
        }
    }
}

impl CxlComponent {
    /// The section.
    pub fn section(&self) -> Section {
        /// Bytes of an event record with its UUID.
        const RECORD_SIZE: u8 = 128;
        let mut valid = Validation::default();
        let device = valid.take(0, self.device);
        let serial = valid.u64(1, self.serial);
        valid.take(2, Some(()));
        let raw = RawComponent {
            length: U32::new(size_of::<RawComponent>() as u32),
            validation: valid.bits(),
            vendor: U16::new(device.vendor),
            device_id: U16::new(device.device_id),
            function: device.function,
            device: device.device,
            bus: device.bus,
            segment: U16::new(device.segment),
            slot: U16::new(device.slot << SLOT_SHIFT),
            reserved: 0,
            serial,
            event: RawEvent {
                length: RECORD_SIZE,
                flags: three_bytes(self.header.flags),
                handle: U16::new(self.header.handle),
                related: U16::new(self.header.related),
                timestamp: U64::new(self.header.timestamp),
                maintenance: self.header.maintenance,
                reserved: [0; 15],
                data: self.event.data(),
            },
        };
        Section { guid: self.event.guid(), body: raw.as_bytes().to_vec() }
    }
}
