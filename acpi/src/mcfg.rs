//! MCFG (PCI Firmware Specification 3.3, 4.1.2): where the enhanced configuration space is.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::Table;
use crate::layout::ECAM_BASE;

/// Everything behind the header: reserved bytes and one allocation, table 4-2 and 4-3.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Mcfg {
    reserved0: [u8; 8],
    base: U64,
    segment: U16,
    first_bus: u8,
    last_bus: u8,
    reserved1: U32,
}

const _: () = assert!(size_of::<Mcfg>() == 24);

/// MCFG of the one segment.
pub(crate) fn mcfg() -> Table {
    let body = Mcfg {
        reserved0: [0; 8],
        base: U64::new(ECAM_BASE),
        segment: U16::ZERO,
        first_bus: 0,
        last_bus: 255,
        reserved1: U32::ZERO,
    };
    Table::new(*b"MCFG", 1, body.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checksum;

    #[test]
    fn names_base_segment_and_buses() {
        let table = mcfg();
        let bytes = table.bytes();
        assert_eq!(bytes.len(), 60);
        assert_eq!(checksum(bytes), 0);
        assert_eq!(bytes[44..52], 0xC000_0000u64.to_le_bytes());
        assert_eq!(bytes[52..56], [0, 0, 0, 255]);
    }
}
