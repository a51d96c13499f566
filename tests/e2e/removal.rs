//! Memory that goes away: what the kernel lets go of, who still touches it, and what comes in its place.

use aconite_tests::machine::PMEM;
use aconite_tests::{Machine, Run};
use serde_json::json;
use std::fs;

/// What a kernel must have forgotten after a removal.
pub const GONE: &str = "! ls /dev/pmem* 2>/dev/null && test -z \"$(ndctl list -R)\" && ! grep -q 'Persistent Memory' /proc/iomem";

/// An idle device goes by surprise, and another one comes in its place, with its own bytes.
fn replaced(kernel: &str) {
    let dir = tempfile::tempdir().unwrap();
    let new = dir.path().join("new.img");
    fs::write(&new, "the new device\n").unwrap();
    fs::File::options().write(true).open(&new).unwrap().set_len(512 << 20).unwrap();

    let mut guest = Run::kernel(kernel).pmem("size=1G,id=p0").tools(&["ndctl"]).shell();
    guest.until_ok("test -b /dev/pmem0", PMEM);
    guest.ok("echo the old device > /tmp/t && dd if=/tmp/t of=/dev/pmem0 conv=sync bs=4096 2>/dev/null");
    let gpa = guest.device("p0")["gpa"].clone();

    let before = guest.last_event();
    let operation = guest.ctl(&["remove", "p0", "--surprise", "--wait"]);
    assert_eq!((&operation["state"], &operation["channel"]), (&json!("done"), &json!("container")));
    guest.ok(GONE);
    assert_eq!(guest.device("p0")["state"], "departed");
    assert_eq!(steps(&guest, before), ["requested", "surprised", "notified", "departed"]);
    let refused = guest.ctl_refused(&["poison", "add", "p0", "0"]);
    assert_eq!(refused["code"], "wrong_device_state", "{refused}");
    let refused = guest.ctl_refused(&["remove", "p0", "--surprise"]);
    assert_eq!(refused["code"], "wrong_device_state", "{refused}");

    let value = format!("file={},id=p1,at=p0", new.display());
    let operation = guest.ctl(&["insert", "pmem", &value, "--wait"]);
    assert_eq!(operation["state"], "done");
    guest.until_ok("test \"$(cat /sys/block/pmem*/size)\" = 1048576", PMEM);
    assert_eq!(guest.ok("head -n 1 /dev/pmem*"), "the new device");
    assert_eq!(guest.device("p1")["gpa"], gpa, "it has the address of the old one");
    guest.ok("echo written by the guest | dd of=$(ls /dev/pmem*) seek=1 bs=4096 conv=sync,fsync 2>/dev/null");
    guest.finish("exit 0").assert_ended(0, "power_off");
    let bytes = fs::read(&new).unwrap();
    assert_eq!(bytes[4096..][..20], *b"written by the guest", "and its own file");
}

#[test]
fn an_idle_device_is_replaced() {
    replaced("6.12");
}

#[test]
fn an_idle_device_is_replaced_on_6_1() {
    replaced("6.1");
}

/// The steps of removals since event `before`, as words.
pub fn steps(guest: &Machine, before: u64) -> Vec<String> {
    let events = guest.events_named(before, "removal");
    events.iter().map(|event| event["step"].as_str().unwrap().to_owned()).collect()
}

/// Asks the guest for a device: it refuses while its container is online, and lets go once its user space has agreed.
/// The id is free then, and keeps its address.
fn orderly(kernel: &str) {
    let mut guest = Run::kernel(kernel).pmem("size=1G,id=p0").tools(&["ndctl"]).shell();
    guest.until_ok("test -b /dev/pmem0", PMEM);
    let gpa = guest.device("p0")["gpa"].clone();

    let before = guest.last_event();
    let ended = guest.ctl_failed(&["remove", "p0", "--eject", "--wait"]);
    assert_eq!(
        (&ended["state"], &ended["error"]["code"]),
        (&json!("failed"), &json!("guest_refused")),
        "{ended}"
    );
    assert_eq!(steps(&guest, before), ["requested", "notified", "quiescing", "refused"]);
    assert_eq!(guest.device("p0")["state"], "present");
    guest.ok("dd if=/dev/pmem0 of=/dev/null bs=4096 count=1 2>/dev/null");

    guest.ok("echo 0 > /sys/devices/system/container/ACPI0004:00/online");
    let before = guest.last_event();
    let operation = guest.ctl(&["remove", "p0", "--eject", "--wait"]);
    assert_eq!(operation["state"], "done", "{operation}");
    assert_eq!(steps(&guest, before), ["requested", "notified", "quiescing", "ejected", "departed"]);
    guest.ok(GONE);
    assert_eq!(guest.device("p0")["state"], "departed");

    let operation = guest.ctl(&["insert", "pmem", "size=512M,id=p0", "--wait"]);
    assert_eq!(operation["state"], "done", "{operation}");
    guest.until_ok("test \"$(cat /sys/block/pmem*/size)\" = 1048576", PMEM);
    assert_eq!(guest.device("p0")["gpa"], gpa);
    guest.finish("exit 0").assert_ended(0, "power_off");
}

#[test]
fn a_guest_that_is_asked_refuses_or_lets_go() {
    orderly("6.12");
}

#[test]
#[ignore = "wide"]
fn a_guest_that_is_asked_refuses_or_lets_go_on_6_1() {
    orderly("6.1");
}

/// The agent unbinds the driver, and binds it again for what comes in its place: this works on every kernel.
fn by_the_agent(kernel: &str) {
    let mut guest = Run::kernel(kernel).pmem("size=1G,id=p0,channel=agent").tools(&["ndctl"]).shell();
    guest.until_ok("test -b /dev/pmem0", PMEM);
    for (mode, seen) in [
        ("--eject", vec!["requested", "notified", "ejected", "departed"]),
        ("--surprise", vec!["requested", "surprised", "notified", "departed"]),
    ] {
        let before = guest.last_event();
        let operation = guest.ctl(&["remove", "p0", mode, "--wait", "120s"]);
        assert_eq!(
            (&operation["state"], &operation["channel"]),
            (&json!("done"), &json!("agent")),
            "{operation}"
        );
        assert_eq!(steps(&guest, before), seen);
        guest.ok(GONE);
        let operation = guest.ctl(&["insert", "pmem", "size=1G,id=p0,channel=agent", "--wait", "120s"]);
        assert_eq!(
            (&operation["state"], &operation["channel"]),
            (&json!("done"), &json!("agent")),
            "{operation}"
        );
        guest.until_ok("test -b /dev/pmem*", PMEM);
    }
    guest.finish("exit 0").assert_ended(0, "power_off");
}

#[test]
#[ignore = "wide"]
fn the_agent_unbinds_and_binds() {
    by_the_agent("6.12");
}

#[test]
fn the_agent_unbinds_and_binds_on_7() {
    by_the_agent("7.x");
}

/// A kernel from 7.0 on does not let go: the removal is refused with its reason, and nothing changes.
#[test]
fn a_removal_is_refused_on_7() {
    let mut guest = Run::kernel("7.x").pmem("size=1G,id=p0").tools(&["dd"]).shell();
    guest.until_ok("test -b /dev/pmem0", PMEM);
    let before = guest.last_event();
    for mode in ["--surprise", "--eject"] {
        let refused = guest.ctl_refused(&["remove", "p0", mode]);
        assert_eq!(refused["code"], "not_supported", "{refused}");
        assert!(refused["message"].as_str().unwrap().contains("Linux 7."), "{refused}");
        assert!(refused["remedy"].as_str().unwrap().contains("via=agent"), "{refused}");
    }
    assert_eq!(guest.events_named(before, "removal"), Vec::<serde_json::Value>::new());
    assert_eq!(guest.device("p0")["state"], "present");
    guest.ok("/usr/bin/dd if=/dev/pmem0 of=/dev/null bs=4096 count=1 iflag=direct");
    guest.finish("exit 0").assert_ended(0, "power_off");
}
