//! MADT (ACPI 6.5, 5.2.12): processors and interrupt controllers.

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::layout::{IOAPIC_BASE, LAPIC_BASE};
use crate::{Processor, Table};

/// Fixed part behind the header, table 5.19. PCAT_COMPAT is clear: there is no pair of 8259s.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Fixed {
    local_apic_address: U32,
    flags: U32,
}

/// Processor local APIC, table 5.21.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct LocalApic {
    kind: u8,
    length: u8,
    processor_uid: u8,
    apic_id: u8,
    flags: U32,
}

/// I/O APIC, table 5.23.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct IoApic {
    kind: u8,
    length: u8,
    id: u8,
    reserved: u8,
    address: U32,
    gsi_base: U32,
}

/// Local APIC NMI, table 5.27.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct LocalApicNmi {
    kind: u8,
    length: u8,
    processor_uid: u8,
    flags: U16,
    lint: u8,
}

const _: () = assert!(size_of::<LocalApic>() == 8);
const _: () = assert!(size_of::<IoApic>() == 12);
const _: () = assert!(size_of::<LocalApicNmi>() == 6);

/// Local APIC flags: the processor can be used.
const ENABLED: u32 = 1;
/// ID of the one I/O APIC, as KVM's model has it after reset.
const IOAPIC_ID: u8 = 0;
/// Processor UID that means all processors.
const ALL_PROCESSORS: u8 = 0xFF;

/// MADT for these processors. Their UIDs are their places in the list, as in the DSDT. ISA interrupts have the
/// identity mapping and bus default (edge, active high), so no source overrides are needed.
pub(crate) fn madt(processors: &[Processor]) -> Table {
    let mut body =
        Fixed { local_apic_address: U32::new(LAPIC_BASE as u32), flags: U32::ZERO }.as_bytes().to_vec();
    for (uid, processor) in processors.iter().enumerate() {
        // 255 distinct APIC IDs bound the number of processors (Description::check).
        let entry = LocalApic {
            kind: 0,
            length: size_of::<LocalApic>() as u8,
            processor_uid: uid as u8,
            apic_id: processor.apic_id,
            flags: U32::new(ENABLED),
        };
        body.extend_from_slice(entry.as_bytes());
    }
    let ioapic = IoApic {
        kind: 1,
        length: size_of::<IoApic>() as u8,
        id: IOAPIC_ID,
        reserved: 0,
        address: U32::new(IOAPIC_BASE as u32),
        gsi_base: U32::ZERO,
    };
    body.extend_from_slice(ioapic.as_bytes());
    let nmi = LocalApicNmi {
        kind: 4,
        length: size_of::<LocalApicNmi>() as u8,
        processor_uid: ALL_PROCESSORS,
        flags: U16::ZERO,
        lint: 1,
    };
    body.extend_from_slice(nmi.as_bytes());
    Table::new(*b"APIC", 5, &body)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checksum;

    #[test]
    fn lists_processors_io_apic_and_nmi() {
        let table = madt(&[Processor { apic_id: 0, proximity: 0 }, Processor { apic_id: 4, proximity: 0 }]);
        let bytes = table.bytes();
        assert_eq!(bytes.len(), 44 + 2 * 8 + 12 + 6);
        assert_eq!(checksum(bytes), 0);
        assert_eq!(bytes[36..40], 0xFEE0_0000u32.to_le_bytes());
        assert_eq!(bytes[44..52], [0, 8, 0, 0, 1, 0, 0, 0]);
        assert_eq!(bytes[52..60], [0, 8, 1, 4, 1, 0, 0, 0]);
        assert_eq!(bytes[60..72], [1, 12, 0, 0, 0, 0, 0xC0, 0xFE, 0, 0, 0, 0]);
        assert_eq!(bytes[72..78], [4, 6, 0xFF, 0, 0, 1]);
    }
}
