//! Memory errors: the section that every kernel knows (UEFI 2.10, N.2.5) and its wider successor (N.2.6).

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Section, Validation};
use crate::Guid;

/// Section type of [`MemoryError`].
const MEMORY: Guid = Guid::new(0xA5BC_1114, 0x6F64, 0x4EDE, [0xB8, 0x63, 0x3E, 0x83, 0xED, 0x7C, 0x83, 0xB1]);
/// Section type of [`MemoryError2`].
const MEMORY_2: Guid =
    Guid::new(0x61EC_04FC, 0x48E6, 0xD813, [0x25, 0xC9, 0x8D, 0xAA, 0x44, 0x75, 0x0B, 0x12]);

/// An error of memory (UEFI 2.10, table N.31).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryError {
    /// Error status in the encoding of N.2.12.
    pub error_status: Option<u64>,
    /// Physical address.
    pub address: Option<u64>,
    /// Which bits of the address are valid.
    pub mask: Option<u64>,
    /// Node of a multi-node system.
    pub node: Option<u16>,
    /// Card.
    pub card: Option<u16>,
    /// Module, or rank.
    pub module: Option<u16>,
    /// Bank.
    pub bank: Option<u16>,
    /// Device.
    pub device: Option<u16>,
    /// Row, 18 bits; the upper two travel in the field `extended`.
    pub row: Option<u32>,
    /// Column.
    pub column: Option<u16>,
    /// Bit.
    pub bit_position: Option<u16>,
    /// Who asked for the data.
    pub requestor: Option<u64>,
    /// Who answered.
    pub responder: Option<u64>,
    /// Whom the access was for.
    pub target: Option<u64>,
    /// Type of the error: 2 single-bit ECC, 3 multi-bit ECC, 14 scrub corrected, and so on.
    pub error_type: Option<u8>,
    /// Rank.
    pub rank: Option<u16>,
    /// SMBIOS handle of the memory array.
    pub card_handle: Option<u16>,
    /// SMBIOS handle of the memory device.
    pub module_handle: Option<u16>,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawMemory {
    validation: U64,
    error_status: U64,
    address: U64,
    mask: U64,
    node: U16,
    card: U16,
    module: U16,
    bank: U16,
    device: U16,
    row: U16,
    column: U16,
    bit_position: U16,
    requestor: U64,
    responder: U64,
    target: U64,
    error_type: u8,
    extended: u8,
    rank: U16,
    card_handle: U16,
    module_handle: U16,
}

const _: () = assert!(size_of::<RawMemory>() == 80);

impl MemoryError {
    /// The highest row that the section can name.
    pub const MAX_ROW: u32 = (1 << 18) - 1;

    /// The section. A row above [`Self::MAX_ROW`] loses its upper bits.
    pub fn section(&self) -> Section {
        const ROW_EXTENSION: u32 = 18;
        let mut valid = Validation::default();
        let extension = self.row.map(|row| (row >> 16) as u8 & 3).filter(|&upper| upper != 0);
        let raw = RawMemory {
            error_status: valid.u64(0, self.error_status),
            address: valid.u64(1, self.address),
            mask: valid.u64(2, self.mask),
            node: valid.u16(3, self.node),
            card: valid.u16(4, self.card),
            module: valid.u16(5, self.module),
            bank: valid.u16(6, self.bank),
            device: valid.u16(7, self.device),
            row: valid.u16(8, self.row.map(|row| row as u16)),
            column: valid.u16(9, self.column),
            bit_position: valid.u16(10, self.bit_position),
            requestor: valid.u64(11, self.requestor),
            responder: valid.u64(12, self.responder),
            target: valid.u64(13, self.target),
            error_type: valid.take(14, self.error_type),
            rank: valid.u16(15, self.rank),
            card_handle: valid.u16(16, self.card_handle),
            module_handle: valid.u16(17, self.module_handle),
            extended: valid.take(ROW_EXTENSION, extension),
            validation: valid.bits(),
        };
        Section { guid: MEMORY, body: raw.as_bytes().to_vec() }
    }
}

/// An error of memory, with room for wider coordinates (UEFI 2.10, table N.32). Linux prints it as a section of an
/// unknown type.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryError2 {
    /// Error status in the encoding of N.2.12.
    pub error_status: Option<u64>,
    /// Physical address.
    pub address: Option<u64>,
    /// Which bits of the address are valid.
    pub mask: Option<u64>,
    /// Node of a multi-node system.
    pub node: Option<u16>,
    /// Card.
    pub card: Option<u16>,
    /// Module.
    pub module: Option<u16>,
    /// Bank.
    pub bank: Option<u16>,
    /// Device.
    pub device: Option<u32>,
    /// Row.
    pub row: Option<u32>,
    /// Column.
    pub column: Option<u32>,
    /// Rank.
    pub rank: Option<u32>,
    /// Bit.
    pub bit_position: Option<u32>,
    /// Chip of a stack.
    pub chip: Option<u8>,
    /// Type of the error, as in [`MemoryError::error_type`].
    pub error_type: Option<u8>,
    /// Who asked for the data.
    pub requestor: Option<u64>,
    /// Who answered.
    pub responder: Option<u64>,
    /// Whom the access was for.
    pub target: Option<u64>,
    /// SMBIOS handle of the memory array.
    pub card_handle: Option<u32>,
    /// SMBIOS handle of the memory device.
    pub module_handle: Option<u32>,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawMemory2 {
    validation: U64,
    error_status: U64,
    address: U64,
    mask: U64,
    node: U16,
    card: U16,
    module: U16,
    bank: U16,
    device: U32,
    row: U32,
    column: U32,
    rank: U32,
    bit_position: U32,
    chip: u8,
    error_type: u8,
    status: u8,
    reserved: u8,
    requestor: U64,
    responder: U64,
    target: U64,
    card_handle: U32,
    module_handle: U32,
}

const _: () = assert!(size_of::<RawMemory2>() == 96);

impl MemoryError2 {
    /// The section.
    pub fn section(&self) -> Section {
        let mut valid = Validation::default();
        let raw = RawMemory2 {
            error_status: valid.u64(0, self.error_status),
            address: valid.u64(1, self.address),
            mask: valid.u64(2, self.mask),
            node: valid.u16(3, self.node),
            card: valid.u16(4, self.card),
            module: valid.u16(5, self.module),
            bank: valid.u16(6, self.bank),
            device: valid.u32(7, self.device),
            row: valid.u32(8, self.row),
            column: valid.u32(9, self.column),
            rank: valid.u32(10, self.rank),
            bit_position: valid.u32(11, self.bit_position),
            chip: valid.take(12, self.chip),
            error_type: valid.take(13, self.error_type),
            status: 0,
            reserved: 0,
            requestor: valid.u64(15, self.requestor),
            responder: valid.u64(16, self.responder),
            target: valid.u64(17, self.target),
            card_handle: valid.u32(18, self.card_handle),
            module_handle: valid.u32(19, self.module_handle),
            validation: valid.bits(),
        };
        Section { guid: MEMORY_2, body: raw.as_bytes().to_vec() }
    }
}
