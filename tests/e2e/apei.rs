//! Errors told by firmware: records of every kind, what Linux makes of them, and what it acts on.

use aconite_tests::{Machine, Run};
use serde_json::{Value, json};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(20);

fn guest(kernel: Option<&str>) -> Machine {
    let run = kernel.map_or_else(Run::new, Run::kernel);
    let mut guest = run.size(2, "512M").shell();
    guest.ok("dmesg | grep 'GHES: APEI firmware first mode is enabled by APEI bit and WHEA _OSC'");
    guest
}

/// Tells of an error and waits until the guest has taken it.
#[track_caller]
fn cper(guest: &Machine, words: &str) -> Value {
    let before = guest.last_event();
    let words: Vec<&str> = std::iter::once("cper").chain(words.split(' ')).collect();
    let accepted = guest.ctl(&words);
    assert_eq!(accepted["ahead"], 0, "{accepted}");
    for event in ["cper_queued", "cper_delivered", "cper_acknowledged"] {
        let event = guest.event(before, event, |event| event["record"] == accepted["record"]);
        assert_eq!(event["source"], accepted["source"]);
    }
    accepted
}

/// Waits for all of `lines` in the kernel's log, then empties it, and lets the kernel's rate limit for records (two in
/// five seconds, `ghes_print_estatus`) pass.
#[track_caller]
fn logged(guest: &mut Machine, lines: &[&str]) {
    for line in lines {
        guest.until_ok(&format!("dmesg | grep -qF '{line}'"), PATIENCE);
    }
    guest.ok("dmesg -c > /dev/null; sleep 3");
}

#[track_caller]
fn hardware_corrupted(guest: &mut Machine, kib: u64) {
    guest.until_ok(&format!("grep -q 'HardwareCorrupted: *{kib} kB' /proc/meminfo"), PATIENCE);
}

/// A page of RAM that nobody uses, and how Linux prints its number.
const FREE_PAGE: u64 = 0x1800_0000;

/// Each kind of section, as `cper_estatus_print_section` prints it.
fn every_section(guest: &mut Machine) {
    let accepted = cper(
        guest,
        "memory --address 0x10000000 --node 1 --card 2 --module 3 --bank 4 --row 0x5 --error-type 2 --fru-text DIMM_A1",
    );
    assert_eq!(accepted["source"], "corrected");
    logged(
        guest,
        &[
            "Hardware error from APEI Generic Hardware Error Source: 0",
            "event severity: corrected",
            "fru_text: DIMM_A1",
            "section_type: memory error",
            "physical_address: 0x0000000010000000",
            "node:1 card:2 module:3 bank:4 row:5",
            "error_type: 2, single-bit ECC",
        ],
    );
    hardware_corrupted(guest, 0);
    cper(
        guest,
        "pcie --device 0000:00:01.0 --vendor 0x1af4 --device-id 0x1043 --port-type 0 --correctable 1",
    );
    logged(guest, &["section_type: PCIe error", "device_id: 0000:00:01.0", "aer_cor_status: 0x00000001"]);
    cper(guest, "processor --apic-id 1 --error-type 1 --operation 1 --level 2 --address 0x1234000");
    logged(guest, &["section_type: general processor error", "operation: 1, data read", "level: 2"]);
    cper(guest, "firmware --record 0x1234");
    logged(guest, &["section_type: Firmware Error Record Reference"]);
    cper(guest, "cxl-protocol --device 0000:35:00.0 --uncorrectable 1 --severity recoverable");
    logged(
        guest,
        &[
            "section_type: CXL Protocol Error",
            "agent_address: 0000:35:00.0",
            "cxl_ras_uncor_status: 0x00000001",
        ],
    );
    cper(guest, "memory --wide --address 0x10000000 --notify poll");
    logged(
        guest,
        &[
            "Hardware error from APEI Generic Hardware Error Source: 3",
            "section type: unknown, 61ec04fc-48e6-d813-25c9-8daa44750b12",
        ],
    );
}

/// What Linux does about a page whose error firmware could not correct, or corrects too often.
fn pages_out_of_use(guest: &mut Machine) {
    let accepted = cper(guest, &format!("memory --severity recoverable --address {FREE_PAGE:#x}"));
    assert_eq!(accepted["source"], "uncorrected");
    let page = FREE_PAGE >> 12;
    logged(
        guest,
        &[
            "Hardware error from APEI Generic Hardware Error Source: 1",
            &format!("Memory failure: {page:#x}: recovery action for free buddy page: Recovered"),
        ],
    );
    hardware_corrupted(guest, 4);

    let nmi = FREE_PAGE + 0x1000;
    cper(guest, &format!("memory --severity recoverable --notify nmi --address {nmi:#x}"));
    logged(
        guest,
        &[
            "Hardware error from APEI Generic Hardware Error Source: 2",
            &format!("Memory failure: {:#x}: recovery action for free buddy page: Recovered", page + 1),
        ],
    );
    hardware_corrupted(guest, 8);
    assert_ne!(guest.ok("awk '/NMI:/ {print $2}' /proc/interrupts"), "0");

    let worn = FREE_PAGE + 0x2000;
    cper(guest, &format!("memory --flag threshold-exceeded --address {worn:#x}"));
    hardware_corrupted(guest, 12);
    guest.ok("dmesg -c > /dev/null; sleep 3");
}

/// Records that wait for each other, and values without a place.
fn in_line(guest: &mut Machine) {
    let before = guest.last_event();
    let records: Vec<Value> = (0..5)
        .map(|row| guest.ctl(&["cper", "memory", "--row", &row.to_string()])["record"].clone())
        .collect();
    for record in &records {
        guest.event(before, "cper_acknowledged", |event| event["record"] == *record);
    }
    let error = guest.ctl_refused(&["cper", "memory", "--row", "0x40000"]);
    assert_eq!(error["code"], "bad_parameter");
    assert_eq!(
        (&error["message"], &error["remedy"]),
        (&json!("row 0x40000 does not fit into the section"), &json!("give at most 0x3ffff"))
    );
}

#[test]
fn records_are_taken_and_acted_on() {
    let mut guest = guest(None);
    every_section(&mut guest);
    pages_out_of_use(&mut guest);
    in_line(&mut guest);
    guest.finish("exit 0").assert_ended(0, "power_off");
}

#[test]
fn a_fatal_record_ends_the_kernel() {
    let mut guest = guest(None);
    guest.ok("echo 1 > /proc/sys/kernel/panic");
    guest.ctl(&["cper", "memory", "--severity", "fatal", "--address", "0x10000000"]);
    let ended = guest.wait(Duration::from_secs(60));
    ended.assert_ended(255, "panic");
    assert!(ended.stderr.contains("Kernel panic - not syncing: Fatal hardware error!"), "{}", ended.stderr);
}
