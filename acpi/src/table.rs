//! The header that all tables share (ACPI 6.5, 5.2.6), and the generic address structure.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes in the header of a table.
pub const HEADER_SIZE: usize = 36;

const OEM_ID: [u8; 6] = *b"ACONIT";
const OEM_TABLE_ID: [u8; 8] = *b"ACONITE ";
const CREATOR_ID: [u8; 4] = *b"ACNT";

/// System description table header, ACPI 6.5, table 5.4.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    signature: [u8; 4],
    length: U32,
    revision: u8,
    checksum: u8,
    oem_id: [u8; 6],
    oem_table_id: [u8; 8],
    oem_revision: U32,
    creator_id: [u8; 4],
    creator_revision: U32,
}

const _: () = assert!(size_of::<Header>() == HEADER_SIZE);

/// OEM ID of all tables, RSDP included.
pub(crate) const fn oem_id() -> [u8; 6] {
    OEM_ID
}

/// The byte that makes the sum of all bytes 0 modulo 256.
pub fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, &byte| sum.wrapping_add(byte)).wrapping_neg()
}

/// One table: header and body, with a valid length and checksum.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    signature: [u8; 4],
    bytes: Vec<u8>,
}

impl Table {
    /// A table with the given signature, revision, and everything behind the header.
    pub(crate) fn new(signature: [u8; 4], revision: u8, body: &[u8]) -> Self {
        let header = Header {
            signature,
            // Bodies are at most some hundred KiB; Tables::build refuses what does not fit the reserved range.
            length: U32::new((HEADER_SIZE + body.len()) as u32),
            revision,
            checksum: 0,
            oem_id: OEM_ID,
            oem_table_id: OEM_TABLE_ID,
            oem_revision: U32::new(1),
            creator_id: CREATOR_ID,
            creator_revision: U32::new(1),
        };
        let mut bytes = [header.as_bytes(), body].concat();
        bytes[std::mem::offset_of!(Header, checksum)] = checksum(&bytes);
        Self { signature, bytes }
    }

    /// The same table with a checksum that is wrong.
    pub(crate) fn with_wrong_checksum(mut self) -> Self {
        let checksum = &mut self.bytes[std::mem::offset_of!(Header, checksum)];
        *checksum = checksum.wrapping_add(1);
        self
    }

    /// The four characters that name the table.
    pub fn signature(&self) -> [u8; 4] {
        self.signature
    }

    /// The signature as text.
    pub fn name(&self) -> String {
        String::from_utf8_lossy(&self.signature).into_owned()
    }

    /// The whole table.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

/// Generic address structure, ACPI 6.5, table 5.1.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct GenericAddress {
    space: u8,
    bit_width: u8,
    bit_offset: u8,
    access_size: u8,
    address: U64,
}

const _: () = assert!(size_of::<GenericAddress>() == 12);

impl GenericAddress {
    /// No register.
    pub(crate) const NONE: Self =
        Self { space: 0, bit_width: 0, bit_offset: 0, access_size: 0, address: U64::ZERO };

    /// An 8-bit register in system memory.
    pub(crate) const fn memory8(address: u64) -> Self {
        Self { space: 0, bit_width: 8, bit_offset: 0, access_size: 1, address: U64::new(address) }
    }

    /// A 32-bit register in system memory.
    pub(crate) const fn memory32(address: u64) -> Self {
        Self { space: 0, bit_width: 32, bit_offset: 0, access_size: 3, address: U64::new(address) }
    }

    /// A 64-bit register in system memory.
    pub(crate) const fn memory64(address: u64) -> Self {
        Self { space: 0, bit_width: 64, bit_offset: 0, access_size: 4, address: U64::new(address) }
    }

    /// A 32-bit register in system I/O.
    pub(crate) const fn io32(port: u16) -> Self {
        Self { space: 1, bit_width: 32, bit_offset: 0, access_size: 3, address: U64::new(port as u64) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_fields_are_where_the_spec_says() {
        let table = Table::new(*b"TEST", 7, &[1, 2, 3]);
        let bytes = table.bytes();
        assert_eq!(&bytes[0..4], b"TEST");
        assert_eq!(bytes[4..8], 39u32.to_le_bytes());
        assert_eq!(bytes[8], 7);
        assert_eq!(&bytes[10..16], b"ACONIT");
        assert_eq!(&bytes[16..24], b"ACONITE ");
        assert_eq!(&bytes[36..], [1, 2, 3]);
        assert_eq!(checksum(bytes), 0);
        assert_eq!(table.name(), "TEST");
    }

    #[test]
    fn checksum_completes_the_sum() {
        assert_eq!(checksum(&[]), 0);
        assert_eq!(checksum(&[1]), 255);
        assert_eq!(checksum(&[0xFF, 0x02]), 0xFF);
    }
}
