//! HEST (ACPI 6.5, 18.3.2): the error sources of which firmware tells.
//!
//! There are only generic sources. A structure for machine checks (types 0 to 2) would change what an OS does with
//! its own banks (Linux `hest_parse_cmc`, and `FIRMWARE_FIRST` flags), and one for AER (types 6 to 8) would say how
//! firmware has set up the capability; both stay as the hardware shows them.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::Table;
use crate::cper::{ENTRY_SIZE, MAX_ENTRIES, STATUS_BLOCK_SIZE};
use crate::ghes::{ACKNOWLEDGE, BLOCK_SIZE, POLL_INTERVAL_MS, Source};
use crate::table::GenericAddress;

/// Hardware error notification structure (table 18.11).
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Notification {
    kind: u8,
    length: u8,
    write_enable: U16,
    poll_interval: U32,
    vector: U32,
    polling_threshold_value: U32,
    polling_threshold_window: U32,
    error_threshold_value: U32,
    error_threshold_window: U32,
}

const _: () = assert!(size_of::<Notification>() == 28);

/// Generic hardware error source version 2 (table 18.10).
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct GenericSource {
    kind: U16,
    source_id: U16,
    related_source_id: U16,
    reserved: u8,
    enabled: u8,
    records_to_preallocate: U32,
    max_sections_per_record: U32,
    max_raw_data_length: U32,
    error_status_address: GenericAddress,
    notification: Notification,
    error_status_block_length: U32,
    read_ack_register: GenericAddress,
    read_ack_preserve: U64,
    read_ack_write: U64,
}

const _: () = assert!(size_of::<GenericSource>() == 92);

const GENERIC_V2: u16 = 10;
/// No source is an alternative to this one.
const NO_RELATED_SOURCE: u16 = 0xFFFF;

// Notification types.
const POLLED: u8 = 0;
const NMI: u8 = 4;
/// An interrupt of the generic event device, which notifies the error device (ACPI 6.5, 18.3.2.9 and 5.6.9).
const GSIV: u8 = 10;

/// Sections that fit into a status block if they are as short as sections can be.
const MAX_SECTIONS: usize = (BLOCK_SIZE as usize - STATUS_BLOCK_SIZE) / ENTRY_SIZE;

const _: () = assert!(MAX_SECTIONS <= MAX_ENTRIES);

/// HEST with all sources.
pub(crate) fn hest() -> Table {
    let mut body = (Source::ALL.len() as u32).to_le_bytes().to_vec();
    for source in Source::ALL {
        body.extend_from_slice(generic(source).as_bytes());
    }
    Table::new(*b"HEST", 1, &body)
}

fn generic(source: Source) -> GenericSource {
    let (kind, poll_interval) = match source {
        Source::Corrected | Source::Uncorrected => (GSIV, 0),
        Source::Nmi => (NMI, 0),
        Source::Polled => (POLLED, POLL_INTERVAL_MS),
    };
    GenericSource {
        kind: U16::new(GENERIC_V2),
        source_id: U16::new(source as u16),
        related_source_id: U16::new(NO_RELATED_SOURCE),
        reserved: 0,
        enabled: 1,
        records_to_preallocate: U32::new(1),
        max_sections_per_record: U32::new(MAX_SECTIONS as u32),
        max_raw_data_length: U32::new(BLOCK_SIZE as u32),
        error_status_address: GenericAddress::memory64(source.address_register()),
        notification: Notification {
            kind,
            length: size_of::<Notification>() as u8,
            write_enable: U16::ZERO,
            poll_interval: U32::new(poll_interval),
            vector: U32::ZERO,
            polling_threshold_value: U32::ZERO,
            polling_threshold_window: U32::ZERO,
            error_threshold_value: U32::ZERO,
            error_threshold_window: U32::ZERO,
        },
        error_status_block_length: U32::new(BLOCK_SIZE as u32),
        read_ack_register: GenericAddress::memory64(source.acknowledge_register()),
        read_ack_preserve: U64::new(!ACKNOWLEDGE),
        read_ack_write: U64::new(ACKNOWLEDGE),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checksum;

    #[test]
    fn fields_are_where_the_spec_says() {
        let table = hest();
        let bytes = table.bytes();
        assert_eq!(bytes.len(), 40 + 4 * 92);
        assert_eq!(checksum(bytes), 0);
        assert_eq!(bytes[36..40], 4u32.to_le_bytes());
        let nmi = &bytes[40 + 2 * 92..][..92];
        assert_eq!(nmi[..8], [10, 0, 2, 0, 0xFF, 0xFF, 0, 1]);
        assert_eq!(nmi[8..12], 1u32.to_le_bytes());
        assert_eq!(nmi[20..24], [0, 64, 0, 4]);
        assert_eq!(nmi[24..32], 0x20_0010u64.to_le_bytes());
        assert_eq!(nmi[32..36], [4, 28, 0, 0]);
        assert_eq!(nmi[60..64], 0x4000u32.to_le_bytes());
        assert_eq!(nmi[64..68], [0, 64, 0, 4]);
        assert_eq!(nmi[68..76], 0xFE83_2010u64.to_le_bytes());
        assert_eq!(nmi[76..84], 0xFFFF_FFFF_FFFF_FFFEu64.to_le_bytes());
        assert_eq!(nmi[84..92], 1u64.to_le_bytes());
        let polled = &bytes[40 + 3 * 92..];
        assert_eq!(polled[32..40], [0, 28, 0, 0, 0xE8, 3, 0, 0]);
        assert_eq!(bytes[40 + 32], 10);
    }
}
