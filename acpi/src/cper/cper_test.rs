//! Bytes of sections and blocks, laid out by hand from the tables of the specifications and from Linux's structures
//! (`include/linux/cper.h`, `drivers/firmware/efi/cper_cxl.h`, `include/cxl/event.h`).

use super::*;

/// Zeros with the given pieces in them.
fn laid(length: usize, pieces: &[(usize, &[u8])]) -> Vec<u8> {
    let mut bytes = vec![0; length];
    for (offset, piece) in pieces {
        bytes[*offset..][..piece.len()].copy_from_slice(piece);
    }
    bytes
}

#[track_caller]
fn check(section: &Section, guid: &str, expected: &[u8]) {
    assert_eq!(section.guid.to_string(), guid);
    for (offset, (left, right)) in section.body.iter().zip(expected).enumerate() {
        assert_eq!(left, right, "byte {offset:#x}");
    }
    assert_eq!(section.body.len(), expected.len());
}

#[test]
fn status_block_and_entry() {
    let section = Section { guid: Guid::from_bytes(*b"0123456789abcdef"), body: vec![0xEE; 5] };
    let entry = Entry {
        flags: SectionFlags::PRIMARY.union(SectionFlags::THRESHOLD_EXCEEDED),
        fru_id: Some(Guid::from_bytes(*b"ABCDEFGHIJKLMNOP")),
        fru_text: FruText::new("DIMM A1"),
        timestamp: Some(Timestamp { year: 2026, month: 11, day: 9, hour: 23, minute: 59, second: 58 }),
        ..Entry::new(Severity::Corrected, section)
    };
    let expected = laid(
        20 + 72 + 5,
        &[
            (0, &[0x12, 0, 0, 0]),
            (12, &[77, 0, 0, 0]),
            (16, &[2, 0, 0, 0]),
            (20, b"0123456789abcdef"),
            (36, &[2, 0, 0, 0]),
            (40, &[0x00, 0x03, 0b111, 0b1001]),
            (44, &[5, 0, 0, 0]),
            (48, b"ABCDEFGHIJKLMNOP"),
            (64, b"DIMM A1"),
            (84, &[0x58, 0x59, 0x23, 1, 0x09, 0x11, 0x26, 0x20]),
            (92, &[0xEE; 5]),
        ],
    );
    assert_eq!(status_block(Severity::Corrected, &[entry]), expected);
}

#[test]
fn status_counts_entries_by_severity() {
    let entry = |severity| Entry::new(severity, Section { guid: Guid::default(), body: Vec::new() });
    let status = |severities: &[Severity]| {
        let entries: Vec<_> = severities.iter().copied().map(entry).collect();
        let block = status_block(Severity::Fatal, &entries);
        assert_eq!(block.len(), STATUS_BLOCK_SIZE + severities.len() * ENTRY_SIZE);
        assert_eq!(block[16], 1);
        u32::from_le_bytes(block[..4].try_into().expect("4 bytes"))
    };
    use Severity::{Corrected, Fatal, Informational, Recoverable};
    assert_eq!(status(&[]), 0);
    assert_eq!(status(&[Fatal]), 0x11);
    assert_eq!(status(&[Recoverable, Fatal]), 0x25);
    assert_eq!(status(&[Corrected, Informational]), 0x2A);
    assert_eq!(status(&[Corrected, Recoverable, Corrected]), 0x3B);
}

#[test]
fn fru_text_is_short_ascii() {
    assert!(FruText::new("12345678901234567890").is_some());
    assert!(FruText::new("").is_some());
    for text in ["123456789012345678901", "DIMM\n", "Bänk", "\u{7f}"] {
        assert_eq!(FruText::new(text), None, "{text:?}");
    }
}

#[test]
fn memory() {
    let section = MemoryError {
        error_status: Some(0x400),
        address: Some(0x1_2345_6780),
        mask: Some(!0x3F),
        node: Some(0x0102),
        card: Some(0x0304),
        module: Some(0x0506),
        bank: Some(0x0708),
        device: Some(0x090A),
        row: Some(0x2_0B0C),
        column: Some(0x0D0E),
        bit_position: Some(0x0F10),
        requestor: Some(0x11),
        responder: Some(0x12),
        target: Some(0x13),
        error_type: Some(3),
        rank: Some(0x1415),
        card_handle: Some(0x1617),
        module_handle: Some(0x1819),
    }
    .section();
    let expected = laid(
        80,
        &[
            (0, &0x7_FFFFu64.to_le_bytes()),
            (8, &[0, 4]),
            (16, &[0x80, 0x67, 0x45, 0x23, 1]),
            (24, &[0xC0, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF]),
            (32, &[2, 1, 4, 3, 6, 5, 8, 7, 0x0A, 9, 0x0C, 0x0B, 0x0E, 0x0D, 0x10, 0x0F]),
            (48, &[0x11]),
            (56, &[0x12]),
            (64, &[0x13]),
            (72, &[3, 2, 0x15, 0x14, 0x17, 0x16, 0x19, 0x18]),
        ],
    );
    check(&section, "a5bc1114-6f64-4ede-b863-3e83ed7c83b1", &expected);
}

#[test]
fn what_is_not_known_of_memory_is_not_said() {
    let section = MemoryError { address: Some(0x1000), row: Some(5), ..MemoryError::default() }.section();
    let expected = laid(80, &[(0, &[0x02, 0x01]), (16, &[0, 0x10]), (42, &[5])]);
    check(&section, "a5bc1114-6f64-4ede-b863-3e83ed7c83b1", &expected);
}

#[test]
fn memory_2() {
    let section = MemoryError2 {
        error_status: Some(1),
        address: Some(2),
        mask: Some(3),
        node: Some(4),
        card: Some(5),
        module: Some(6),
        bank: Some(7),
        device: Some(8),
        row: Some(9),
        column: Some(10),
        rank: Some(11),
        bit_position: Some(12),
        chip: Some(13),
        error_type: Some(14),
        requestor: Some(15),
        responder: Some(16),
        target: Some(17),
        card_handle: Some(18),
        module_handle: Some(19),
    }
    .section();
    let expected = laid(
        96,
        &[
            (0, &0xF_BFFFu64.to_le_bytes()),
            (8, &[1]),
            (16, &[2]),
            (24, &[3]),
            (32, &[4, 0, 5, 0, 6, 0, 7, 0]),
            (40, &[8, 0, 0, 0, 9, 0, 0, 0, 10, 0, 0, 0, 11, 0, 0, 0, 12, 0, 0, 0]),
            (60, &[13, 14]),
            (64, &[15]),
            (72, &[16]),
            (80, &[17]),
            (88, &[18, 0, 0, 0, 19]),
        ],
    );
    check(&section, "61ec04fc-48e6-d813-25c9-8daa44750b12", &expected);
}

#[test]
fn pcie() {
    let section = PcieError {
        port_type: Some(4),
        version: Some((6, 1)),
        command_status: Some((0x0102, 0x0304)),
        device: Some(PcieDevice {
            vendor: 0x8086,
            device_id: 0x1234,
            class: 0x06_0400,
            segment: 0x0102,
            bus: 0x35,
            device: 0x1F,
            function: 7,
            secondary_bus: 0x36,
            slot: 3,
        }),
        serial: Some(0x1122_3344_5566_7788),
        bridge: Some((0x0506, 0x0708)),
        capability: Some([0xCA; 60]),
        aer: Some([0xAE; 96]),
    }
    .section();
    let expected = laid(
        208,
        &[
            (0, &[0xFF]),
            (8, &[4]),
            (12, &[1, 6]),
            (16, &[2, 1, 4, 3]),
            (24, &[0x86, 0x80, 0x34, 0x12, 0x00, 0x04, 0x06, 7, 0x1F, 2, 1, 0x35, 0x36, 0x18, 0, 0]),
            (40, &0x1122_3344_5566_7788u64.to_le_bytes()),
            (48, &[6, 5, 8, 7]),
            (52, &[0xCA; 60]),
            (112, &[0xAE; 96]),
        ],
    );
    check(&section, "d995e954-bbc1-430f-ad91-b44dcb3c6f35", &expected);
    assert_eq!(PcieError::default().section().body, vec![0; 208]);
}

#[test]
fn processor() {
    let section = ProcessorError {
        error_type: Some(1),
        operation: Some(2),
        flags: Some(3),
        level: Some(4),
        version: Some(0x80_0F12),
        apic_id: Some(5),
        target: Some(6),
        requestor: Some(7),
        responder: Some(8),
        ip: Some(9),
    }
    .section();
    let expected = laid(
        192,
        &[
            (0, &[0x7F, 0x1F]),
            (8, &[0, 2, 1, 2, 3, 4]),
            (16, &[0x12, 0x0F, 0x80]),
            (152, &[5]),
            (160, &[6]),
            (168, &[7]),
            (176, &[8]),
            (184, &[9]),
        ],
    );
    check(&section, "9876ccad-47b4-4bdb-b65e-16f193c4f3db", &expected);
}

#[test]
fn x86_processor_with_a_bank() {
    let section = X86ProcessorError {
        apic_id: Some(3),
        cpuid: Some([0x0080_0F12, 1, 2, 3]),
        target: Some(0x1240),
        ip: Some(0xFFFF_FFFF_8100_0000),
        bank: Some(SmcaBank { bank: 2, status: 1, address: 2, misc: 3, config: 4, ipid: 5, synd: 6 }),
    }
    .section();
    let expected = laid(
        64 + 64 + 64,
        &[
            (0, &[0b111, 1]),
            (8, &[3]),
            (16, &[0x12, 0x0F, 0x80, 0, 1, 0, 0, 0, 2, 0, 0, 0, 3]),
            (64, b"\xf5\x01\x57\xa5\xef\xe3\xde\x43\xac\x72\x24\x9b\x57\x3f\xad\x2c"),
            (80, &[0b1_0010]),
            (96, &[0x40, 0x12]),
            (120, &[0, 0, 0, 0x81, 0xFF, 0xFF, 0xFF, 0xFF]),
            (128, &[1, 0, 48, 0, 0x21, 0x20, 0x00, 0xC0]),
            (144, &[1]),
            (152, &[2]),
            (160, &[3]),
            (168, &[4]),
            (176, &[5]),
            (184, &[6]),
        ],
    );
    check(&section, "dc3ea0b0-a144-4797-b95b-53fa242b6e1d", &expected);
    let bare = X86ProcessorError { apic_id: Some(3), ..X86ProcessorError::default() }.section();
    assert_eq!(bare.body, laid(64, &[(0, &[1]), (8, &[3])]));
}

#[test]
fn firmware() {
    let numbered = FirmwareError { record_type: 1, record: 0x1234, record_guid: None }.section();
    let expected = laid(32, &[(0, &[1, 0]), (8, &[0x34, 0x12])]);
    check(&numbered, "81212a96-09ed-4996-9471-8d729c8e69ed", &expected);
    let guid = Guid::from_bytes(*b"0123456789abcdef");
    let named = FirmwareError { record_type: 2, record: 0, record_guid: Some(guid) }.section();
    assert_eq!(named.body, laid(32, &[(0, &[2, 2]), (16, b"0123456789abcdef")]));
}

#[test]
fn cxl_protocol() {
    let device = CxlPciDevice {
        vendor: 0x1AF4,
        device_id: 0x1234,
        segment: 0x0102,
        bus: 0x35,
        device: 0x1F,
        function: 7,
        slot: 2,
    };
    let error = CxlProtocolError {
        agent: CxlAgent::RootPort,
        device: Some(device),
        rcrb: None,
        serial: Some(0x99),
        ras: Some([0xAA; 0x58]),
    };
    let expected = laid(
        116 + 0x58,
        &[
            (0, &[0b100_1111]),
            (8, &[5]),
            (16, &[7, 0x1F, 0x35, 2, 1]),
            (24, &[0xF4, 0x1A, 0x34, 0x12]),
            (34, &[0x10]),
            (40, &[0x99]),
            (110, &[0x58, 0]),
            (116, &[0xAA; 0x58]),
        ],
    );
    check(&error.section(), "80b9efb4-52b5-4de3-a777-68784b771048", &expected);

    let port = CxlProtocolError {
        agent: CxlAgent::RestrictedHostPort,
        device: None,
        rcrb: Some(0xFE00_0000),
        serial: None,
        ras: None,
    };
    assert_eq!(port.section().body, laid(116, &[(0, &[0b11]), (8, &[1]), (16, &[0, 0, 0, 0xFE])]));
}

/// The head of every component event of the tests, and the event's bytes behind it.
fn component(data: &[(usize, &[u8])]) -> Vec<u8> {
    let head: [(usize, &[u8]); 8] = [
        (0, &[144, 0, 0, 0]),
        (4, &[0b111]),
        (12, &[0xF4, 0x1A, 0x34, 0x12, 7, 0x1F, 0x35, 2, 1, 0x10, 0, 0]),
        (24, &[0x99]),
        (32, &[128, 0x03, 0x02, 0x01, 0x34, 0x12, 0x78, 0x56]),
        (40, &[0xEF, 0xBE]),
        (48, &[5]),
        (64, &[]),
    ];
    let data = data.iter().map(|(offset, bytes)| (64 + offset, *bytes));
    laid(144, &head.into_iter().chain(data).collect::<Vec<_>>())
}

#[test]
fn cxl_events() {
    let section = |event| {
        CxlComponent {
            device: Some(CxlPciDevice {
                vendor: 0x1AF4,
                device_id: 0x1234,
                segment: 0x0102,
                bus: 0x35,
                device: 0x1F,
                function: 7,
                slot: 2,
            }),
            serial: Some(0x99),
            header: CxlEventHeader {
                flags: 0x01_0203,
                handle: 0x1234,
                related: 0x5678,
                timestamp: 0xBEEF,
                maintenance: 5,
            },
            event,
        }
        .section()
    };
    let media = CxlMedia {
        address: 0x1_0000_0041,
        descriptor: 1,
        kind: 2,
        transaction: 3,
        channel: Some(4),
        rank: Some(5),
    };
    let common = (0, &[0x41, 0, 0, 0, 1, 0, 0, 0, 1, 2, 3][..]);

    let general = CxlGeneralMedia { media, device: Some(0x0A_0B0C), component: Some(*b"0123456789abcdef") };
    check(
        &section(CxlEvent::GeneralMedia(general)),
        "fbcd0a77-c260-417f-85a9-088b1621eba6",
        &component(&[common, (11, &[0b1111, 0, 4, 5, 0x0C, 0x0B, 0x0A]), (18, b"0123456789abcdef")]),
    );

    let dram = CxlDram {
        media,
        nibble_mask: Some(0x01_0203),
        bank_group: Some(6),
        bank: Some(7),
        row: Some(0x08_090A),
        column: Some(0x0B0C),
        correction_mask: Some([0x11; 4]),
    };
    check(
        &section(CxlEvent::Dram(dram)),
        "601dcbb3-9c06-4eab-b8af-4e9bfb5c9624",
        &component(&[
            common,
            (11, &[0xFF, 0, 4, 5, 3, 2, 1, 6, 7, 0x0A, 9, 8, 0x0C, 0x0B]),
            (25, &[0x11]),
            (33, &[0x11]),
            (41, &[0x11]),
            (49, &[0x11]),
        ]),
    );

    let module = CxlMemoryModule {
        kind: 3,
        health: CxlHealth {
            status: 4,
            media: 2,
            additional: 1,
            life_used: 50,
            temperature: -2,
            dirty_shutdowns: 6,
            corrected_volatile: 7,
            corrected_persistent: 8,
        },
    };
    check(
        &section(CxlEvent::MemoryModule(module)),
        "fe927475-dd59-4339-a586-79bab113b774",
        &component(&[(0, &[3, 4, 2, 1, 50, 0xFE, 0xFF, 6, 0, 0, 0, 7, 0, 0, 0, 8])]),
    );
}
