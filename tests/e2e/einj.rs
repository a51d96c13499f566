//! Errors that the guest injects itself, with the stock driver for the firmware's error injection (EINJ).

use crate::ram::{hardware_corrupted, physical};
use aconite_agent::workload::{Reply, Request, Source, pattern};
use aconite_tests::workload::Workload;
use aconite_tests::{Machine, Run};
use serde_json::json;
use std::path::PathBuf;
use std::time::Duration;

const FILE: &str = "/tmp/victim";
const LENGTH: u64 = 0x10000;
/// A bad line of the file, and one in another page.
const LINES: [u64; 2] = [0x3240, 0x7a80];
const PAGE_MASK: u64 = !0xfff;
const CORRECTED: u32 = 0x8;
const UNCORRECTED: u32 = 0x10;
const FATAL: u32 = 0x20;
/// Registers of the machine: memory to nobody.
const REGISTERS: u64 = 0xfe83_0000;

/// Loads the driver, and makes `inject TYPE FLAGS ADDRESS MASK PROCESSOR NOTRIGGER` a command: a user's way, by
/// the files that Documentation/firmware-guide/acpi/apei/einj.rst names.
#[track_caller]
fn prepare(guest: &mut Machine) {
    guest.ok("mount -t debugfs debugfs /sys/kernel/debug; modprobe einj");
    let offered = guest.ok("cut -f 1 /sys/kernel/debug/apei/einj/available_error_type");
    assert_eq!(offered, "0x00000008\n0x00000010\n0x00000020");
    guest.ok(
        "cat > /tmp/inject << 'EOF'\ncd /sys/kernel/debug/apei/einj\n\
         echo $1 > error_type && echo $2 > flags && echo $3 > param1 && echo $4 > param2 && echo $5 > param3 && \
         echo $6 > notrigger && echo 1 > error_inject\nEOF",
    );
    // What is only logged is found at the next look at the banks.
    guest.ok("echo 1 > /sys/devices/system/machinecheck/machinecheck0/check_interval");
}

fn command(kind: u32, flags: u32, address: u64, processor: u32, notrigger: bool) -> String {
    let notrigger = u32::from(notrigger);
    format!("sh /tmp/inject {kind:#x} {flags:#x} {address:#x} {PAGE_MASK:#x} {processor:#x} {notrigger}")
}

#[track_caller]
fn refused(guest: &mut Machine, script: &str) {
    let reply = guest.sh(script);
    // 6.1 takes every status of the firmware but success for "busy" (__einj_error_inject).
    let known = ["Invalid argument", "Device or resource busy"];
    assert!(reply.status != 0 && known.iter().any(|word| reply.text.contains(word)), "{script}: {reply:?}");
}

fn injection(kernel: Option<&str>) {
    let run = kernel.map_or_else(Run::new, Run::kernel);
    let mut guest = run.size(2, "512M").shell();
    prepare(&mut guest);
    let mut workload = Workload::start(&mut guest, 0);
    let path = || PathBuf::from(FILE);
    assert_eq!(workload.ask(&mut guest, &Request::Create(path(), LENGTH)), Reply::Done);
    let Reply::At(mapping) = workload.ask(&mut guest, &Request::Map(Source::File(path()))) else {
        panic!("no mapping")
    };
    let all_good = Reply::Compared { good: LENGTH / 8, bad: 0 };
    assert_eq!(workload.ask(&mut guest, &Request::Scan(0, LENGTH)), all_good);
    let Reply::Process(pid) = workload.ask(&mut guest, &Request::Process) else { panic!("no process") };
    let [first, second] = LINES.map(|line| physical(&mut guest, pid, mapping + line));

    // What is no memory is refused by the driver itself (region_intersects), and an injection without an address or
    // for a processor that does not exist by the firmware.
    let before = guest.last_event();
    refused(&mut guest, &command(UNCORRECTED, 0, REGISTERS, 0, true));
    refused(&mut guest, &command(UNCORRECTED, 1, first, 0, true));
    assert!(guest.events_named(before, "error_injection").is_empty());
    refused(&mut guest, &command(UNCORRECTED, 3, first, 77, true));
    let event = guest.event(before, "error_injection", |_| true);
    assert_eq!(
        (&event["step"], &event["gpa"]),
        (&json!("refused"), &json!(format!("{first:#x}"))),
        "{event}"
    );
    assert_eq!(guest.ctl(&["poison", "list", "ram"])["ranges"], json!([]));

    // Injected, and left to whoever loads it.
    guest.ok(&command(UNCORRECTED, 0, first, 0, true));
    let event = guest.event(before, "error_injection", |event| event["step"] == "injected");
    assert_eq!(event["severity"], "non_fatal", "{event}");
    let bad = json!([{"offset": format!("{first:#x}"), "length": 64}]);
    assert_eq!(guest.ctl(&["poison", "list", "ram"])["ranges"], bad);
    let good = LINES[0] - 8;
    let reply = workload.ask(&mut guest, &Request::Load(good));
    assert!(matches!(reply, Reply::Loaded { word, .. } if word == pattern(good)), "{reply:?}");
    assert!(guest.events_named(before, "mce_delivered").is_empty(), "no poison was loaded yet");
    let Reply::Signal(signal) = workload.ask(&mut guest, &Request::Load(LINES[0])) else {
        panic!("no signal")
    };
    assert!(signal.is_poison_at(mapping + LINES[0]), "{signal:?}");
    let check = guest.event(before, "mce_delivered", |_| true);
    assert_eq!(
        (&check["address"], &check["origin"]),
        (&json!(format!("{first:#x}")), &json!("access")),
        "{check}"
    );
    guest.until_ok("grep -q 'HardwareCorrupted: *4 kB' /proc/meminfo", Duration::from_secs(20));

    // Injected and triggered: the scrubber finds it, and Linux takes the page away before anybody loads it.
    let before = guest.last_event();
    guest.ok(&command(UNCORRECTED, 0, second, 0, false));
    guest.event(before, "error_injection", |event| event["step"] == "triggered");
    guest.until_ok("grep -q 'HardwareCorrupted: *8 kB' /proc/meminfo", Duration::from_secs(60));
    assert!(guest.events_named(before, "poison_trapped").is_empty(), "nobody has loaded it");
    let Reply::Signal(signal) = workload.ask(&mut guest, &Request::Load(LINES[1] - 8)) else {
        panic!("no signal")
    };
    assert!(signal.is_poison_at(mapping + LINES[1]), "{signal:?}");

    // A corrected error is told in the log, and nothing is lost.
    let (before, third) = (guest.last_event(), physical(&mut guest, pid, mapping));
    guest.ok(&command(CORRECTED, 0, third, 0, false));
    let logged = guest.event(before, "mce_logged", |_| true);
    assert_eq!(logged["address"], json!(format!("{third:#x}")), "{logged}");
    guest.until_ok(&format!("dmesg | grep -q 'Hardware Error.*ADDR {third:x} '"), Duration::from_secs(60));
    let reply = workload.ask(&mut guest, &Request::Load(0));
    assert!(matches!(reply, Reply::Loaded { word, .. } if word == pattern(0)), "{reply:?}");
    assert_eq!(hardware_corrupted(&mut guest), 8);

    // Nothing survives a fatal one.
    let ended = guest.finish(&command(FATAL, 0, third, 0, false));
    ended.assert_ended(255, "panic");
    let console = ended.record.console();
    assert!(console.contains("Processor Context Corrupt"), "the panic names its reason");
}

#[test]
fn a_guest_injects_errors_into_its_memory() {
    injection(None);
}

#[test]
fn a_guest_injects_errors_on_6_1() {
    injection(Some("6.1"));
}

#[test]
fn a_guest_injects_errors_on_7() {
    injection(Some("7.x"));
}
