//! Errors that the guest injects itself, with the stock driver for the firmware's error injection (EINJ).

use crate::ram::{hardware_corrupted, physical, victim};
use aconite_agent::workload::{Reply, Request, pattern};
use aconite_tests::machine::PMEM;
use aconite_tests::workload::Workload;
use aconite_tests::{Machine, Run};
use serde_json::json;
use std::time::Duration;

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

/// What the driver answers to an address that it refuses itself.
const INVALID: &str = "Invalid argument";
/// What 6.1 makes of every status of the firmware but success; later kernels tell "invalid access" apart
/// (__einj_error_inject in drivers/acpi/apei).
const BUSY: &str = "Device or resource busy";

#[track_caller]
fn refused(guest: &mut Machine, script: &str, answer: &str) {
    let reply = guest.sh(script);
    assert!(reply.status != 0 && reply.text.contains(answer), "{script}: {reply:?}");
}

/// All kinds of errors, in a guest whose driver calls the firmware's refusal `answer`.
fn injection(run: Run, answer: &str) {
    let mut guest = run.size(2, "512M").shell();
    prepare(&mut guest);
    let mut workload = Workload::start(&mut guest, 0);
    let (mapping, pid) = victim(&mut guest, &mut workload);
    let [first, second] = LINES.map(|line| physical(&mut guest, pid, mapping + line));

    // What is no memory is refused by the driver itself (region_intersects), and an injection without an address or
    // for a processor that does not exist by the firmware.
    let before = guest.last_event();
    refused(&mut guest, &command(UNCORRECTED, 0, REGISTERS, 0, true), INVALID);
    refused(&mut guest, &command(UNCORRECTED, 1, first, 0, true), answer);
    assert!(guest.events_named(before, "error_injection").is_empty());
    refused(&mut guest, &command(UNCORRECTED, 3, first, 77, true), answer);
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
    let console = ended.record.console().to_lowercase();
    assert!(console.contains("machine check: processor context corrupt"), "the panic names its reason");
}

#[test]
fn a_guest_injects_errors_into_its_memory() {
    injection(Run::new(), INVALID);
}

#[test]
fn a_guest_injects_errors_on_intel() {
    // Left to itself, Linux keeps corrected errors on Intel to itself until they are many (cec_notifier).
    injection(Run::new().args(["--cpu", "vendor=intel,lmce=on", "--append", "ras=cec_disable"]), INVALID);
}

#[test]
fn a_guest_injects_errors_on_6_1() {
    injection(Run::kernel("6.1"), BUSY);
}

#[test]
fn a_guest_injects_errors_on_7() {
    injection(Run::kernel("7.x"), INVALID);
}

#[test]
fn a_guest_injects_errors_into_its_persistent_memory() {
    let mut guest = Run::new().size(1, "512M").pmem("size=256M,id=p0").shell();
    prepare(&mut guest);
    guest.until_ok("test -b /dev/pmem0", PMEM);
    // The scrub at boot would find everything: the count is without a plus when none runs.
    guest.until_ok("grep -qx '[1-9]' /sys/bus/nd/devices/ndbus0/nfit/scrub", PMEM);
    let base = u64::from_str_radix(guest.device("p0")["gpa"].as_str().unwrap().trim_start_matches("0x"), 16);
    let base = base.expect("an address");
    // Injected and left alone: nobody knows of it. 0x1240 is in sector 9.
    guest.ok(&command(UNCORRECTED, 0, base + 0x1240, 0, true));
    let ranges = json!([{"offset": "0x1240", "length": 64}]);
    assert_eq!(guest.ctl(&["poison", "list", "p0"])["ranges"], ranges);
    assert_eq!(guest.ok("cat /sys/block/pmem0/badblocks"), "");
    // Injected and triggered: what the scrubber reports goes into the list of bad blocks, and nothing else does.
    let before = guest.last_event();
    guest.ok(&command(UNCORRECTED, 0, base + 0x3240, 0, false));
    guest.until_ok("test \"$(cat /sys/block/pmem0/badblocks)\" = '25 1'", Duration::from_secs(60));
    assert!(guest.events_named(before, "poison_trapped").is_empty(), "nobody has loaded it");
    // What has departed is no memory any more, neither to the driver nor to the firmware.
    guest.ctl(&["remove", "p0", "--surprise", "--wait"]);
    refused(&mut guest, &command(UNCORRECTED, 0, base + 0x5000, 0, true), INVALID);
    guest.finish("exit 0").assert_ended(0, "power_off");
}
