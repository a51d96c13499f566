//! Root pointers: RSDP (ACPI 6.5, 5.2.5.3) and XSDT (5.2.8).

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::Table;
use crate::table::{checksum, oem_id};

/// Bytes in the RSDP.
pub const RSDP_SIZE: usize = 36;
/// The first checksum covers the part that ACPI 1.0 had.
const V1_SIZE: usize = 20;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Rsdp {
    signature: [u8; 8],
    checksum: u8,
    oem_id: [u8; 6],
    revision: u8,
    rsdt_address: U32,
    length: U32,
    xsdt_address: U64,
    extended_checksum: u8,
    reserved: [u8; 3],
}

const _: () = assert!(size_of::<Rsdp>() == RSDP_SIZE);

/// RSDP that names an XSDT and no RSDT.
pub(crate) fn rsdp(xsdt_address: u64) -> [u8; RSDP_SIZE] {
    let mut rsdp = Rsdp {
        signature: *b"RSD PTR ",
        checksum: 0,
        oem_id: oem_id(),
        revision: 2,
        rsdt_address: U32::ZERO,
        length: U32::new(RSDP_SIZE as u32),
        xsdt_address: U64::new(xsdt_address),
        extended_checksum: 0,
        reserved: [0; 3],
    };
    rsdp.checksum = checksum(&rsdp.as_bytes()[..V1_SIZE]);
    rsdp.extended_checksum = checksum(rsdp.as_bytes());
    zerocopy::transmute!(rsdp)
}

/// XSDT that lists tables by address.
pub(crate) fn xsdt(addresses: &[u64]) -> Table {
    let body: Vec<u8> = addresses.iter().flat_map(|address| address.to_le_bytes()).collect();
    Table::new(*b"XSDT", 1, &body)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rsdp_bytes() {
        let bytes = rsdp(0x12_3456);
        assert_eq!(&bytes[0..8], b"RSD PTR ");
        assert_eq!(bytes[15], 2);
        assert_eq!(bytes[16..20], [0; 4]);
        assert_eq!(bytes[20..24], 36u32.to_le_bytes());
        assert_eq!(bytes[24..32], 0x12_3456u64.to_le_bytes());
        assert_eq!(checksum(&bytes[..20]), 0);
        assert_eq!(checksum(&bytes), 0);
    }

    #[test]
    fn xsdt_lists_addresses() {
        let table = xsdt(&[0x10_0000, 0x10_1000]);
        assert_eq!(table.bytes().len(), 52);
        assert_eq!(table.bytes()[44..52], 0x10_1000u64.to_le_bytes());
        assert_eq!(checksum(table.bytes()), 0);
    }
}
