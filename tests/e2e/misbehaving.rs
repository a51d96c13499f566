//! Firmware that fails, delays and corrupts its answers on command.
//!
//! Expected, from drivers/acpi/nfit/core.c and drivers/nvdimm/pmem.c, of 6.1, 6.12 and 7.x alike:
//!
//! | fault | outcome |
//! |---|---|
//! | the status of a scrub is "in progress" three times more | the scrub ends later, with all errors (`acpi_nfit_scrub` asks again) |
//! | clearing fails once | the write fails with EIO and the error stays; the next write succeeds (`pmem_clear_poison`) |
//! | the status of a scrub comes 3 s late | the scrub ends with all errors |
//! | a status claims 1000 records and holds one | "detected truncated ars results" is all that happens (`ars_status_process_records`) |
//! | a status has no bytes at all | the scrub finds nothing, and the next one does |
//! | a scrub cannot be started | "ARS failed" once; the range is never scrubbed again, requests end in ENOTTY (ARS_FAILED) |
//!
//! 7.x clears no error for a write of less than a page: it is EIO, and the firmware is not asked (seen on 7.2.13).

use std::time::{Duration, Instant};

use aconite_tests::machine::PMEM;
use aconite_tests::{Machine, Run};

const SCRUB: &str = "/sys/bus/nd/devices/ndbus0/nfit/scrub";
const BAD: &str = "cat /sys/block/pmem0/badblocks";

/// A scrub from its request to its end.
fn scrub(guest: &mut Machine) {
    guest.ok("ndctl start-scrub");
    let waited = guest.sh_within("ndctl wait-scrub", Duration::from_secs(120));
    assert_eq!(waited.status, 0, "{}", waited.text);
}

fn fail(guest: &Machine, order: &str) {
    let mut arguments = vec!["firmware", "p0", "fail"];
    arguments.extend(order.split(' '));
    guest.ctl(&arguments);
}

/// How many calls the last fault has met.
fn met(guest: &Machine) -> u64 {
    let faults = guest.ctl(&["firmware", "p0"]);
    faults["faults"].as_array().and_then(|faults| faults.last()?["met"].as_u64()).expect("a fault")
}

fn goes_on(kernel: &str) {
    let run = Run::kernel(kernel).size(2, "1G").pmem("size=512M,id=p0").tools(&["ndctl"]);
    let mut guest = run.shell();
    guest.until_ok("test -b /dev/pmem0", PMEM);
    guest.scrubbed();

    guest.ctl(&["poison", "add", "p0", "0x10000+64"]);
    let before = guest.last_event();
    fail(&guest, "--function 3 --status 0x10000 --count 3");
    scrub(&mut guest);
    assert_eq!((guest.ok(BAD).as_str(), met(&guest)), ("128 1", 3));
    let told = guest.events_named(before, "firmware_fault");
    assert_eq!(told.len(), 3, "{told:?}");
    assert!(told.iter().all(|event| event["function"] == 3 && event["status"] == 0x10000), "{told:?}");

    let write = |at: u64| {
        let bytes = if kernel == "7.x" { 4096 } else { 512 };
        format!("dd if=/dev/zero of=/dev/pmem0 bs={bytes} seek={} count=1 oflag=direct 2>&1", at / bytes)
    };
    fail(&guest, "--function 4 --status 2");
    let failed = guest.sh(&write(0x10000));
    assert!(failed.status != 0 && failed.text.contains("Input/output error"), "{}", failed.text);
    assert_eq!((guest.ok(BAD).as_str(), guest.device("p0")["poisoned"].as_u64()), ("128 1", Some(64)));
    guest.ok(&write(0x10000));
    assert_eq!((guest.ok(BAD).as_str(), guest.device("p0")["poisoned"].as_u64()), ("", Some(0)));

    guest.ctl(&["poison", "add", "p0", "0x20000+64"]);
    fail(&guest, "--function 3 --delay 3s --count 2");
    let start = Instant::now();
    scrub(&mut guest);
    assert!(start.elapsed() >= Duration::from_secs(6), "{:?}", start.elapsed());
    assert_eq!(guest.ok(BAD), "256 1");
    guest.ok(&write(0x20000));

    guest.ctl(&["firmware", "p0", "behave"]);
    guest.ctl(&["poison", "add", "p0", "0x30000+64"]);
    fail(&guest, "--function 3 --bytes e8030000 --offset 44 --count 0");
    scrub(&mut guest);
    assert!(guest.ok("dmesg").contains("detected truncated ars results"));
    guest.ctl(&["firmware", "p0", "behave"]);

    fail(&guest, "--function 3 --length 0 --count 0");
    scrub(&mut guest);
    assert!(met(&guest) > 0);
    guest.ctl(&["firmware", "p0", "behave"]);
    scrub(&mut guest);
    assert_eq!(guest.ok(BAD), "384 1");

    fail(&guest, "--function 2 --status 5");
    scrub(&mut guest);
    assert!(guest.ok("dmesg").contains("ARS failed"));
    let refused = guest.sh(&format!("echo 1 > {SCRUB}"));
    assert!(refused.status != 0, "{}", refused.text);
    assert_eq!(met(&guest), 1);
    guest.finish("exit 0").assert_ended(0, "power_off");
}

#[test]
fn wrong_answers_harm_nothing_else() {
    goes_on("6.12");
}

#[test]
#[ignore = "wide"]
fn wrong_answers_harm_nothing_else_on_6_1() {
    goes_on("6.1");
}

#[test]
#[ignore = "wide"]
fn wrong_answers_harm_nothing_else_on_7() {
    goes_on("7.x");
}
