//! Tests of requests: what they become, and what is refused.

use std::time::{Duration, UNIX_EPOCH};

use aconite_acpi::ghes::BLOCK_SIZE;
use clap::Parser;
use serde_json::json;

use super::*;

/// The words of a command line, as `ctl cper` takes them.
#[derive(Debug, Parser)]
struct Line {
    #[command(flatten)]
    common: CperCommon,
    #[command(subcommand)]
    section: CperSection,
}

fn line(words: &str) -> Result<CperRequest, clap::Error> {
    let words = std::iter::once("cper").chain(words.split_whitespace());
    Line::try_parse_from(words).map(|line| CperRequest { common: line.common, section: line.section })
}

fn block(request: &CperRequest) -> Result<Vec<u8>, Error> {
    request.status_block(UNIX_EPOCH + Duration::from_secs(1_795_223_345))
}

#[test]
fn a_line_and_its_json_are_one_request() {
    for words in [
        "memory --address 0x18000000 --row 0x2ffff --severity recoverable --notify nmi --flag latent --flag primary",
        "memory --wide --device 0x12345678",
        "pcie --device 0001:35:1f.7 --vendor 0x8086 --slot 3 --uncorrectable 0x4000",
        "processor --apic-id 1 --ip 0xffffffff81000000",
        "x86 --apic-id 1 --bank 4 --status 0xbc0008000000011b --address 0x1000",
        "firmware --record 5",
        "cxl-protocol --agent restricted-host-port --rcrb 0xfe000000",
        "cxl-event --event memory-module --temperature -3 --fru-text X",
    ] {
        let request = line(words).unwrap_or_else(|error| panic!("{words}: {error}"));
        let json = json!(request);
        assert_eq!(serde_json::from_value::<CperRequest>(json).unwrap(), request, "{words}");
        assert!(block(&request).unwrap().len() > STATUS, "{words}");
    }
}

const STATUS: usize = 92;

#[test]
fn the_shortest_json_is_a_corrected_error() {
    let request: CperRequest = serde_json::from_value(json!({"section": {"memory": {}}})).unwrap();
    assert_eq!(request.source(), Source::Corrected);
    let block = block(&request).unwrap();
    assert_eq!(block[16], 2);
    assert_eq!(block[STATUS..], [0; 80]);
    assert_eq!(block[84..92], [0x05, 0x09, 0x01, 1, 0x21, 0x11, 0x26, 0x20], "2026-11-21 01:09:05");
}

#[test]
fn severity_and_wish_choose_the_source() {
    for (words, source) in [
        ("--severity informational", Source::Corrected),
        ("--severity corrected", Source::Corrected),
        ("--severity recoverable", Source::Uncorrected),
        ("--severity fatal", Source::Nmi),
        ("--severity fatal --notify interrupt", Source::Uncorrected),
        ("--severity fatal --notify poll", Source::Polled),
        ("--notify nmi", Source::Nmi),
    ] {
        assert_eq!(line(&format!("memory {words}")).unwrap().source(), source, "{words}");
    }
}

#[test]
fn values_without_a_place_are_refused_by_name() {
    for (words, expected) in [
        ("memory --row 0x40000", "row 0x40000 does not fit into the section; give at most 0x3ffff"),
        ("memory --device 65536", "device 0x10000 does not fit into the section; give at most 0xffff"),
        (
            "pcie --device 00:1f.3 --class 0x1000000",
            "class 0x1000000 does not fit into the section; give at most 0xffffff",
        ),
        (
            "pcie --correctable 0x100000000",
            "correctable 0x100000000 does not fit into the section; give at most 0xffffffff",
        ),
        (
            "cxl-event --event dram --row 0x1000000",
            "row 0x1000000 does not fit into the section; give at most 0xffffff",
        ),
        (
            "cxl-event --life-used 3",
            "life_used has no place in a general_media event; leave it out, or choose another event",
        ),
        (
            "cxl-protocol --agent root-port --rcrb 1",
            "rcrb is the address of the agent restricted_host_port and of no other; give both or neither; other agents are known by their device",
        ),
        (
            "memory --fru-text 123456789012345678901",
            "fru_text \"123456789012345678901\" is longer than 20 characters or not printable ASCII; shorten it, such as \"DIMM_A1\"",
        ),
    ] {
        let request = line(words).unwrap_or_else(|error| panic!("{words}: {error}"));
        let error = block(&request).expect_err(words);
        assert_eq!((error.code, error.to_string().as_str()), (ErrorCode::BadParameter, expected));
    }
}

#[test]
fn json_without_its_context_is_refused() {
    for section in [json!({"pcie": {"vendor": 1}}), json!({"x86": {"status": 1}})] {
        let request: CperRequest = serde_json::from_value(json!({ "section": section })).unwrap();
        assert_eq!(block(&request).unwrap_err().code, ErrorCode::BadParameter);
    }
    for wrong in [
        json!({}),
        json!({"section": {"memory": {"colour": 1}}}),
        json!({"section": {"raw": {"guid": "x", "data": ""}}}),
        json!({"section": {"raw": {"guid": "a5bc1114-6f64-4ede-b863-3e83ed7c83b1", "data": "0"}}}),
        json!({"section": {"raw": {"guid": "a5bc1114-6f64-4ede-b863-3e83ed7c83b1", "data": "é0"}}}),
        json!({"section": {"memory": {}}, "severity": "fatal"}),
    ] {
        assert!(serde_json::from_value::<CperRequest>(wrong.clone()).is_err(), "{wrong}");
    }
}

#[test]
fn lines_that_make_no_sense_are_refused() {
    for words in [
        "",
        "memory --address nowhere",
        "memory --rank 0x1ffffffff",
        "pcie --vendor 1",
        "pcie --device 00:20.0",
        "pcie --device 00:1f.8",
        "pcie --device +0:1f.0",
        "x86 --status 1",
        "x86 --bank 1",
        "raw --guid a5bc1114-6f64-4ede-b863-3e83ed7c83b1",
        "raw --guid a5bc1114-6f64-4ede-b863-3e83ed7c83b1 --file /nowhere",
        "memory --severity deadly",
    ] {
        assert!(line(words).is_err(), "{words}");
    }
}

#[test]
fn a_raw_section_is_a_file_of_at_most_a_block() {
    let guid = "a5bc1114-6f64-4ede-b863-3e83ed7c83b1";
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("section.bin");
    let raw = |length: usize| {
        std::fs::write(&path, vec![0xAB; length]).unwrap();
        line(&format!("raw --guid {guid} --file {}", path.display()))
    };
    let request = raw(BLOCK_SIZE as usize - STATUS).unwrap();
    let block = block(&request).unwrap();
    assert_eq!(block.len() as u64, BLOCK_SIZE);
    assert!(block[STATUS..].iter().all(|&byte| byte == 0xAB));
    let error = raw(BLOCK_SIZE as usize - STATUS + 1).unwrap_err().to_string();
    assert!(error.contains("at most 16292 bytes"), "{error}");
}
