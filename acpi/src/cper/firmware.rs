//! A reference to a record that firmware keeps (UEFI 2.10, N.2.10).

use zerocopy::little_endian::U64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::Section;
use crate::Guid;

const FIRMWARE: Guid =
    Guid::new(0x8121_2A96, 0x09ED, 0x4996, [0x94, 0x71, 0x8D, 0x72, 0x9C, 0x8E, 0x69, 0xED]);

/// Revision with which a GUID came.
const GUID_REVISION: u8 = 2;

/// A firmware error record reference (UEFI 2.10, table N.41).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FirmwareError {
    /// Kind of record: 0 IPF SAL, 1 SoC firmware type 1, 2 SoC firmware type 2.
    pub record_type: u8,
    /// Number of the record.
    pub record: u64,
    /// GUID of the record, which takes the place of the number and makes the reference one of revision 2.
    pub record_guid: Option<Guid>,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Raw {
    record_type: u8,
    revision: u8,
    reserved: [u8; 6],
    record: U64,
    record_guid: [u8; 16],
}

const _: () = assert!(size_of::<Raw>() == 32);

impl FirmwareError {
    /// The section.
    pub fn section(&self) -> Section {
        let raw = Raw {
            record_type: self.record_type,
            revision: if self.record_guid.is_some() { GUID_REVISION } else { 0 },
            reserved: [0; 6],
            record: U64::new(self.record),
            record_guid: self.record_guid.unwrap_or_default().bytes(),
        };
        Section { guid: FIRMWARE, body: raw.as_bytes().to_vec() }
    }
}
