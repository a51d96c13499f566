//! Address range scrubs that take their time, and lists of errors that are too long for one answer.
//!
//! Expected of every kernel, from drivers/acpi/nfit/core.c:
//!
//! - each region gets a short scrub when it is found, which is over at once, and then a long one by itself. While that
//!   runs, `scrub` reads with a `+` and the block device is there. One more request waits for its turn, and further
//!   ones are refused with EBUSY (`acpi_nfit_ars_rescan`).
//! - `ndctl wait-scrub` waits for the end of it. What was poisoned before a long scrub ended is known after it.
//! - "ARS stopped" (Notify 0x82) is ignored; the status is asked for after 1, 2, 4, … seconds.
//! - of a list that overflows, only what the first answer holds is known (`ars_continue` does not set ARS_VALID, and
//!   `ars_complete` skips what was not marked by it): a finding.

use std::time::{Duration, Instant};

use aconite_tests::machine::PMEM;
use aconite_tests::{Machine, Run};

const SCRUB: &str = "/sys/bus/nd/devices/ndbus0/nfit/scrub";

/// How often the guest was told that a scrub of p0 has stopped.
fn stops(guest: &Machine) -> usize {
    let told = guest.events_named(0, "notify_sent");
    told.iter().filter(|event| event["kind"] == "ars_stopped" && event["device"] == "p0").count()
}

fn takes_time(kernel: &str) {
    let run = Run::kernel(kernel).size(2, "1G").pmem("size=256M,id=p0,ars=15s").tools(&["ndctl"]);
    let mut guest = run.shell();
    guest.until_ok("test -b /dev/pmem0", PMEM);
    // The first scrub goes on while the device is in use.
    let first = guest.ok(&format!("cat {SCRUB}"));
    assert!(first.ends_with('+'), "{first}");
    guest.ok("head -c 4096 /dev/pmem0 >/dev/null");
    guest.ctl(&["poison", "add", "p0", "0x10000+64"]);
    assert_eq!(guest.ok("cat /sys/block/pmem0/badblocks"), "", "nobody has found it");
    let waited = guest.sh_within("ndctl wait-scrub", Duration::from_secs(120));
    assert!(waited.status == 0 && waited.text.contains("\"scrub_state\":\"idle\""), "{}", waited.text);
    assert_eq!(guest.ok("cat /sys/block/pmem0/badblocks"), "128 1");
    let before = guest.ok(&format!("cat {SCRUB}"));
    assert_eq!(stops(&guest), 1);

    guest.ctl(&["poison", "add", "p0", "0x20000+64"]);
    let start = Instant::now();
    let started = guest.ok("ndctl start-scrub");
    assert!(started.contains("\"scrub_state\":\"active\""), "{started}");
    guest.until_ok(&format!("echo 1 > {SCRUB}"), PMEM);
    let third = guest.sh(&format!("echo 1 > {SCRUB}"));
    assert!(third.status != 0 && third.text.contains("busy"), "{}", third.text);
    let waited = guest.sh_within("ndctl wait-scrub", Duration::from_secs(120));
    assert_eq!(waited.status, 0, "{}", waited.text);
    assert!(start.elapsed() >= Duration::from_secs(30), "{:?}", start.elapsed());
    let counts = [before, guest.ok(&format!("cat {SCRUB}"))].map(|count| count.parse::<u32>().unwrap());
    assert_eq!(counts[1], counts[0] + 1, "once all of them are over");
    assert_eq!(guest.ok("cat /sys/block/pmem0/badblocks | tr '\\n' ' '").trim(), "128 1 256 1");
    assert_eq!(stops(&guest), 3);
    guest.finish("exit 0").assert_ended(0, "power_off");
}

#[test]
fn a_scrub_takes_its_time() {
    takes_time("6.12");
}

#[test]
#[ignore = "wide"]
fn a_scrub_takes_its_time_on_6_1() {
    takes_time("6.1");
}

#[test]
#[ignore = "wide"]
fn a_scrub_takes_its_time_on_7() {
    takes_time("7.x");
}

/// Ten errors, and answers that hold four.
fn overflows(kernel: &str) {
    let run = Run::kernel(kernel).size(2, "1G").pmem("size=256M,id=p0,ars_records=4").tools(&["ndctl"]);
    let mut guest = run.shell();
    guest.until_ok("test -b /dev/pmem0", PMEM);
    guest.scrubbed();
    let lines: Vec<String> = (1..=10).map(|n| format!("{:#x}+64", n << 16)).collect();
    let mut add = vec!["poison", "add", "p0"];
    add.extend(lines.iter().map(String::as_str));
    guest.ctl(&add);
    let mut first = 1;
    for (known, rest) in [(4, 6), (4, 2), (2, 0)] {
        guest.ok("ndctl start-scrub");
        guest.ok("ndctl wait-scrub");
        let expected: Vec<String> = (first..first + known).map(|n| format!("{} 1", n << 7)).collect();
        let listed = guest.ok("cat /sys/block/pmem0/badblocks");
        assert_eq!(listed.lines().collect::<Vec<_>>(), expected, "of {} errors", known + rest);
        guest.ok("ndctl clear-errors namespace0.0");
        guest.until_ok("test -b /dev/pmem0", PMEM);
        assert_eq!(guest.device("p0")["poisoned"], rest * 64, "what was known is cleared, the rest is not");
        first += known;
    }
    guest.finish("exit 0").assert_ended(0, "power_off");
}

#[test]
fn more_errors_than_fit_are_known_one_answer_at_a_time() {
    overflows("6.12");
}

#[test]
#[ignore = "wide"]
fn more_errors_than_fit_are_known_one_answer_at_a_time_on_6_1() {
    overflows("6.1");
}

#[test]
#[ignore = "wide"]
fn more_errors_than_fit_are_known_one_answer_at_a_time_on_7() {
    overflows("7.x");
}
