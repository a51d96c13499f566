//! Flushes of virtio-pmem that are held, fail, or are answered by nobody.

use std::thread;
use std::time::Duration;

use aconite_tests::machine::PMEM;
use aconite_tests::{Machine, Run};
use serde_json::json;

use crate::removal::steps;

/// Where Linux waits for the answer, without a limit.
const PLACE: &str = "virtio_pmem_flush";
/// The kernel stack of the thread that drives the slot.
const PCIEHP: &str = "cat $(grep -l pciehp /proc/[0-9]*/comm | sed s/comm/stack/)";
/// Writes a block and flushes; says how it ended in /tmp/status.
const WRITE: &[u8] = b"rm -f /tmp/status; (/usr/bin/dd if=/dev/zero of=/dev/pmem0 bs=4096 count=1 conv=fsync; echo $? > /tmp/status) >/tmp/said 2>&1 &\n";
/// How long the guest is watched waiting.
const WATCHED: Duration = Duration::from_secs(4);

fn boot(kernel: &str) -> Machine {
    let run = Run::kernel(kernel).size(2, "768M").pmem("size=256M,id=p0,via=virtio").tools(&["dd"]);
    let mut guest = run.shell();
    guest.until_ok("test -b /dev/pmem0", PMEM);
    guest
}

/// A process waits for a flush that is held.
fn waits(guest: &mut Machine) -> u64 {
    let before = guest.last_event();
    guest.type_in(WRITE);
    let held = guest.event(before, "flush_held", |_| true);
    assert_eq!((&held["device"], &held["fault"]), (&json!("p0"), &json!(1)), "{held}");
    held["request"].as_u64().unwrap()
}

const WAITS: &str = "! test -e /tmp/status && cat /proc/$(pidof dd)/stack | grep -q virtio_pmem_flush";

/// A flush waits as long as it is held, one is delayed, and one that fails is an error of `fsync`.
fn held(kernel: &str) {
    let mut guest = boot(kernel);
    let before = guest.last_event();
    guest.ctl(&["flush", "hold", "p0", "--count", "1"]);
    let number = waits(&mut guest);
    guest.until_ok(WAITS, PMEM);
    thread::sleep(WATCHED);
    guest.ok(WAITS);
    let state = guest.ctl(&["flush", "show", "p0"]);
    assert_eq!((&state["held"][0]["request"], &state["faults"]), (&json!(number), &json!([])), "{state}");
    guest.ctl(&["flush", "release", "p0", &number.to_string()]);
    guest.until_ok("test -e /tmp/status", PMEM);
    assert_eq!(guest.ok("cat /tmp/status"), "0");
    let released = guest.event(before, "flush_released", |_| true);
    assert_eq!(released["how"], "complete");
    assert!(released["held_ns"].as_u64().unwrap() > WATCHED.as_nanos() as u64, "{released}");
    assert_eq!(guest.event(before, "flush_completed", |_| true)["durable"], true);

    guest.ctl(&["flush", "delay", "p0", "2s", "--count", "1"]);
    let took = guest.ok("time -p /usr/bin/dd if=/dev/zero of=/dev/pmem0 bs=4096 count=1 conv=fsync");
    assert!(took.contains("real 2."), "{took}");

    guest.ctl(&["flush", "fail", "p0", "--count", "1"]);
    let reply = guest.sh("/usr/bin/dd if=/dev/zero of=/dev/pmem0 bs=4096 count=1 conv=fsync");
    assert!(reply.status != 0 && reply.text.contains("Input/output error"), "{reply:?}");
    guest.ok("/usr/bin/dd if=/dev/zero of=/dev/pmem0 bs=4096 count=1 conv=fsync");
    let refused = guest.ctl_refused(&["flush", "release", "p0", "77"]);
    assert_eq!(refused["code"], "wrong_device_state", "{refused}");
    guest.finish("exit 0").assert_ended(0, "power_off");
}

#[test]
fn flushes_are_held_delayed_and_failed() {
    held("6.12");
}

#[test]
#[ignore = "wide"]
fn flushes_are_held_delayed_and_failed_on_6_1() {
    held("6.1");
}

#[test]
#[ignore = "wide"]
fn flushes_are_held_delayed_and_failed_on_7() {
    held("7.x");
}

/// A removal flushes the device (`nd_pmem_remove()`), and waits for the answer as long as it takes: for ever, if nobody
/// answers. Here somebody does in the end, and the guest gives back what nobody asks for any more.
fn unanswered(kernel: &str) {
    let mut guest = boot(kernel);
    guest.ctl(&["flush", "hold", "p0"]);
    let before = guest.last_event();
    let operation = guest.ctl_failed(&["remove", "p0", "--eject", "--timeout", "30s", "--wait", "60s"]);
    assert_eq!(operation["error"]["code"], "guest_timed_out", "{operation}");
    assert_eq!(steps(&guest, before), ["requested", "notified", "quiescing", "timed_out"]);
    let stack = guest.ok(PCIEHP);
    assert!(stack.contains(PLACE), "{stack}");
    assert_eq!(guest.device("p0")["state"], "present");
    let before = guest.last_event();
    guest.ctl(&["flush", "release", "p0"]);
    guest.event(before, "removal", |event| event["step"] == "departed");
    assert_eq!(steps(&guest, before), ["ejected", "departed"]);
    guest.finish("exit 0").assert_ended(0, "power_off");
}

#[test]
#[ignore = "wide"]
fn a_removal_waits_for_a_flush() {
    unanswered("6.12");
}

#[test]
#[ignore = "wide"]
fn a_removal_waits_for_a_flush_on_6_1() {
    unanswered("6.1");
}

#[test]
#[ignore = "wide"]
fn a_removal_waits_for_a_flush_on_7() {
    unanswered("7.x");
}

/// Who waits for a flush of a device that is pulled waits for ever.
fn pulled(kernel: &str) {
    let mut guest = boot(kernel);
    guest.ctl(&["flush", "hold", "p0"]);
    let number = waits(&mut guest);
    let before = guest.last_event();
    let operation = guest.ctl_failed(&["remove", "p0", "--surprise", "--timeout", "20s", "--wait", "60s"]);
    assert_eq!(operation["error"]["code"], "guest_timed_out", "{operation}");
    let left = guest.event(before, "flush_released", |_| true);
    assert_eq!((&left["request"], &left["how"]), (&json!(number), &json!("depart")), "{left}");
    guest.ok(WAITS);
    guest.ctl(&["quit"]);
    guest.wait(Duration::from_secs(60));
}

#[test]
fn a_flush_that_nobody_answers_ends_never() {
    pulled("6.12");
}

#[test]
#[ignore = "wide"]
fn a_flush_that_nobody_answers_ends_never_on_6_1() {
    pulled("6.1");
}

#[test]
#[ignore = "wide"]
fn a_flush_that_nobody_answers_ends_never_on_7() {
    pulled("7.x");
}
