//! Errors told by firmware: records of every kind, what Linux makes of them, and what it acts on.

use aconite_agent::workload::{BUS_MCEERR_AO, Reply, Request, SIGBUS, Source};
use aconite_tests::workload::Workload;
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

/// A page of the workload's memory, as number and as address.
#[track_caller]
fn page(workload: &mut Workload, guest: &mut Machine, offset: u64) -> u64 {
    match workload.ask(guest, &Request::Physical(offset)) {
        Reply::At(gpa) => gpa,
        other => panic!("{other}"),
    }
}

/// What Linux does about pages of a process whose errors firmware could not correct, or corrects too often. Nothing is
/// poisoned: all of it is done for the sake of the records.
fn pages_out_of_use(guest: &mut Machine) {
    const LENGTH: u64 = 0x10000;
    let mut workload = Workload::start(guest, 0);
    let Reply::At(mapping) = workload.ask(guest, &Request::Map(Source::Anonymous(LENGTH))) else {
        panic!("no mapping")
    };
    let recovered = |gpa: u64| format!("Memory failure: {:#x}: recovery action for", gpa >> 12);

    // A process that did not ask to be told finds out when it loads the page.
    let gpa = page(&mut workload, guest, 0x1000);
    let accepted = cper(guest, &format!("memory --severity recoverable --address {gpa:#x}"));
    assert_eq!(accepted["source"], "uncorrected");
    logged(guest, &["Hardware error from APEI Generic Hardware Error Source: 1", &recovered(gpa)]);
    hardware_corrupted(guest, 4);
    assert_eq!(workload.ask(guest, &Request::Notice), Reply::Done, "nothing was consumed");
    let Reply::Signal(signal) = workload.ask(guest, &Request::Load(0x1008)) else { panic!("no signal") };
    assert!(signal.is_poison_at(mapping + 0x1008), "{signal}");

    // By NMI, and to a process that asked to be told.
    assert_eq!(workload.ask(guest, &Request::Early(true)), Reply::Done);
    let gpa = page(&mut workload, guest, 0x3000);
    cper(guest, &format!("memory --severity recoverable --notify nmi --address {:#x}", gpa + 0x40));
    logged(guest, &["Hardware error from APEI Generic Hardware Error Source: 2", &recovered(gpa)]);
    hardware_corrupted(guest, 8);
    assert_ne!(guest.ok("awk '/NMI:/ {print $2}' /proc/interrupts"), "0");
    let Reply::Signal(signal) = workload.ask(guest, &Request::Notice) else { panic!("no signal") };
    assert_eq!((signal.number, signal.code, signal.lsb), (SIGBUS, BUS_MCEERR_AO, 12), "{signal}");
    assert_eq!(signal.address >> 12, (mapping + 0x3000) >> 12, "{signal}");

    // Corrected too often: the content moves to another page, and the process goes on.
    let gpa = page(&mut workload, guest, 0x5000);
    cper(guest, &format!("memory --flag threshold-exceeded --address {gpa:#x}"));
    hardware_corrupted(guest, 12);
    assert_ne!(page(&mut workload, guest, 0x5000), gpa);
    let same = workload.ask(guest, &Request::Scan(0x5000, 0x1000));
    assert_eq!(same, Reply::Compared { good: 0x1000 / 8, bad: 0 });
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

/// The lines about the previous boot.
#[track_caller]
fn previous_boot(guest: &mut Machine) -> String {
    guest.ok("dmesg | sed -n '/BERT: Error records from previous boot/,/^$/p' | head -40")
}

#[test]
fn what_ended_a_boot_is_told_to_the_next_one_once() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let boot = || Run::new().size(2, "512M").args(["--state".as_ref(), state.as_os_str()]).shell();

    // Firmware's own record ends the kernel, at once.
    let mut guest = boot();
    assert_eq!(previous_boot(&mut guest), "");
    let accepted = guest.ctl(&["cper", "memory", "--severity", "fatal", "--address", "0x10000000"]);
    assert_eq!(accepted["source"], "nmi");
    let ended = guest.wait(Duration::from_secs(60));
    ended.assert_ended(255, "panic");
    assert!(ended.stderr.contains("Fatal hardware error"), "{}", ended.stderr);

    // So does a machine check; the kernel leaves it in its bank.
    let mut guest = boot();
    let shown = guest.event(0, "boot_errors_shown", |_| true);
    assert_eq!(shown["records"], 1);
    let lines = previous_boot(&mut guest);
    for line in ["event severity: fatal", "section_type: memory error", "0x0000000010000000"] {
        assert!(lines.contains(line), "{lines}");
    }
    let line = ["mce", "--vcpu", "1", "--class", "fatal", "--address", "0x12345640"];
    guest.ctl(&line);
    let ended = guest.wait(Duration::from_secs(60));
    ended.assert_ended(255, "panic");

    let mut guest = boot();
    let lines = previous_boot(&mut guest);
    for line in
        ["event severity: fatal", "0x0000000012345640", "Local APIC_ID: 0x1", "IA32/X64 processor error"]
    {
        assert!(lines.contains(line), "{lines}");
    }
    assert!(!lines.contains("0x0000000010000000"), "{lines}");
    guest.signal("KILL");
    drop(guest);

    let mut guest = boot();
    assert_eq!(previous_boot(&mut guest), "", "it was shown");
    guest.finish("exit 0").assert_ended(0, "power_off");
}
