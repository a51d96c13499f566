//! Persistent memory that the kernel uses as RAM (dax/kmem), or that a process has mapped as a DAX device, is removed.
//!
//! Expected, by what its memory is doing:
//!
//! | | asked (the agent offlines and unbinds) | by surprise, agent | by surprise, ACPI container |
//! |---|---|---|---|
//! | online, in use | refused, nothing changed; or let go of, if the kernel can move what is in it | the driver goes, the memory stays "System RAM (kmem)" until the next boot | |
//! | half online | the same as online | all of the memory stays in use, and is not there | |
//! | offline | let go of, `/proc/iomem` as before | | `kacpi_hotplug` waits for a lock that it holds itself: `remove_memory` under `acpi_device_hotplug` (6.1, 6.12) |
//!
//! A device that is mapped: its process gets SIGBUS at the next touch, the removal does not wait (all kernels).

use super::online::on_node_1;
use super::removal::{GONE, steps};
use aconite_agent::workload::{Reply, Request, SIGBUS, Source};
use aconite_tests::machine::PMEM;
use aconite_tests::workload::Workload;
use aconite_tests::{Machine, Run};
use serde_json::json;
use std::path::PathBuf;
use std::time::Duration;

/// How long the reconfiguration of a namespace may take.
const RECONFIGURE: Duration = Duration::from_secs(120);
const TOTAL: &str = "awk '/^MemTotal/ { print $2 }' /proc/meminfo";

/// A guest with a DAX device over all of p0.
pub fn with_dax(run: Run) -> Machine {
    let run = run.size(2, "1G").pmem("size=1G,id=p0").tools(&["ndctl", "daxctl"]);
    let mut guest = run.shell();
    guest.until_ok("test -b /dev/pmem0", PMEM);
    guest.ok("echo offline > /sys/devices/system/memory/auto_online_blocks");
    let made =
        guest.sh_within("ndctl create-namespace -f -e namespace0.0 -m devdax -M mem -a 4096", RECONFIGURE);
    assert_eq!(made.status, 0, "{}", made.text);
    guest.until_ok("test -c /dev/dax0.0", PMEM);
    guest
}

fn as_ram(guest: &mut Machine) {
    guest.ok("modprobe kmem");
    let made = guest.sh_within("daxctl reconfigure-device -m system-ram -N dax0.0", RECONFIGURE);
    assert_eq!(made.status, 0, "{}", made.text);
    guest.ok("grep -q 'System RAM (kmem)' /proc/iomem");
}

/// Brings half of the device's memory blocks online; the others stay offline. Returns how many these are.
fn half_online(guest: &mut Machine) -> usize {
    const OFFLINE: &str = "grep -l offline /sys/devices/system/memory/memory*/state";
    let states = guest.ok(OFFLINE);
    let states: Vec<&str> = states.lines().collect();
    let half = states.len() / 2;
    assert!(half > 0, "{states:?}");
    guest.ok(&format!("for s in {}; do echo online_movable > $s || exit 1; done", states[..half].join(" ")));
    let left = guest.ok(OFFLINE).lines().count();
    assert_eq!(left, states.len() - half);
    left
}

/// S12: memory that is taken offline goes and comes back, and nothing of it is left in between. The agent does what the
/// ACPI channel cannot.
fn given_back(kernel: &str, half: bool) {
    let mut guest = with_dax(Run::kernel(kernel));
    let total = guest.ok(TOTAL);
    as_ram(&mut guest);
    if half {
        half_online(&mut guest);
    } else {
        guest.ok("daxctl online-memory dax0.0 >/dev/null 2>&1; true");
    }
    guest.until_ok(&format!("test $({TOTAL}) -gt {total}"), PMEM);
    let before = guest.last_event();
    let operation = guest.ctl(&["remove", "p0", "--eject", "--via", "agent", "--wait", "120s"]);
    assert_eq!(
        (&operation["state"], &operation["channel"]),
        (&json!("done"), &json!("agent")),
        "{operation}"
    );
    assert_eq!(steps(&guest, before), ["requested", "notified", "ejected", "departed"]);
    guest.ok(GONE);
    guest.ok("! grep -q kmem /proc/iomem");
    assert_eq!(guest.ok(TOTAL), total, "MemTotal is what it was");
    let census = guest.ctl(&["census", "p0"]);
    assert_eq!(
        (&census["user"]["entries"], &census["kernel"]["entries"]),
        (&json!(0), &json!(0)),
        "{census}"
    );

    let operation = guest.ctl(&["insert", "pmem", "size=1G,id=p1,at=p0", "--wait"]);
    assert_eq!(operation["state"], "done", "{operation}");
    guest.until_ok("test -b /dev/pmem* && test \"$(cat /sys/block/pmem*/size)\" = 2097152", PMEM);
    guest.finish("exit 0").assert_ended(0, "power_off");
}

#[test]
fn memory_that_is_given_back_leaves_nothing() {
    given_back("6.12", false);
}

#[test]
#[ignore = "wide"]
fn memory_that_is_given_back_leaves_nothing_on_6_1() {
    given_back("6.1", false);
}

#[test]
#[ignore = "wide"]
fn memory_that_is_given_back_leaves_nothing_on_7() {
    given_back("7.x", false);
}

#[test]
#[ignore = "wide"]
fn memory_of_which_half_is_used_is_given_back() {
    given_back("6.12", true);
}

/// Memory of which half is online goes by surprise: `remove_memory()` takes a range whole or not at all, so the kernel
/// keeps all of it and goes on to use it, and the oracle sees it do so. What is in it is whatever moved there with a
/// process: text that init shares with it, too, and then the kernel panics soon.
fn half_gone(kernel: &str) {
    const USED: u64 = 1 << 20;
    let mut guest = with_dax(Run::kernel(kernel));
    as_ram(&mut guest);
    half_online(&mut guest);
    let mut workload = on_node_1(&mut guest);
    let filled =
        workload.ask_all(&mut guest, &[Request::Map(Source::Anonymous(USED)), Request::Scan(0, USED)]);
    assert_eq!(filled[1], Reply::Compared { good: USED / 8, bad: 0 }, "{filled:?}");
    let before = guest.last_event();
    guest.ctl(&["remove", "p0", "--surprise", "--via", "agent", "--timeout", "60s"]);
    guest.event(before, "removal", |event| event["step"] == "surprised");
    workload.tell(&mut guest, &Request::Scan(0, USED));
    let stale = guest.event(before, "stale_access", |event| event["device"] == "p0");
    let gpa = u64::from_str_radix(stale["gpa"].as_str().unwrap().trim_start_matches("0x"), 16).unwrap();
    let offset = u64::from_str_radix(stale["offset"].as_str().unwrap().trim_start_matches("0x"), 16).unwrap();
    assert_eq!((gpa - offset) % (1 << 30), 0, "{stale}");
}

#[test]
#[ignore = "wide"]
fn memory_of_which_half_is_used_stays_in_use_when_it_has_gone() {
    half_gone("6.12");
}

/// S11: memory that is offline, and removed over ACPI: the worker of hotplug waits for its own lock. The defect is found
/// by the operation's deadline and named by the worker's stack; the guest lives on without ACPI hotplug.
fn deadlock(kernel: &str) {
    let mut guest = with_dax(Run::kernel(kernel));
    as_ram(&mut guest);
    let before = guest.last_event();
    let ended = guest.ctl_failed(&["remove", "p0", "--surprise", "--timeout", "20s", "--wait"]);
    assert_eq!(ended["error"]["code"], "guest_timed_out", "{ended}");
    assert_eq!(steps(&guest, before), ["requested", "surprised", "notified", "timed_out", "departed"]);
    let stacks = guest.ok("for p in /proc/[0-9]*; do grep -q kacpi_hotplug $p/comm 2>/dev/null && cat $p/stack; done; \
                           grep -l 'acpi_device_hotplug' /proc/[0-9]*/stack 2>/dev/null | while read s; do cat $s; done");
    assert!(stacks.contains("remove_memory") && stacks.contains("acpi_device_hotplug"), "{stacks}");
    assert_eq!(guest.ok("echo alive"), "alive");
    // Its power-off hangs on the same lock.
    guest.ctl(&["quit"]);
    guest.wait(Duration::from_secs(60));
}

#[test]
#[ignore = "wide"]
fn acpi_removal_of_memory_waits_for_its_own_lock() {
    deadlock("6.12");
}

#[test]
#[ignore = "wide"]
fn acpi_removal_of_memory_waits_for_its_own_lock_on_6_1() {
    deadlock("6.1");
}

/// A process that has the device mapped is stopped at its next touch, and is in nobody's reach afterwards.
fn mapped_device(kernel: &str, via: &str) {
    let mut guest = with_dax(Run::kernel(kernel));
    let mut workload = Workload::start(&mut guest, 0);
    let map = workload.ask(&mut guest, &Request::Map(Source::File(PathBuf::from("/dev/dax0.0"))));
    let Reply::At(address) = map else { panic!("{map}") };
    assert_eq!(workload.ask(&mut guest, &Request::Store(0x3008, 7)), Reply::Done);
    let census = guest.ctl(&["census", "p0"]);
    let mapping = &census["user"]["mappings"][0];
    assert_eq!(mapping["processes"][0]["name"], "aconite-agent", "{census}");
    assert_eq!(mapping["va"], format!("{:#x}", address + 0x3000), "{census}");
    guest.ctl(&["remove", "p0", "--surprise", "--via", via, "--wait", "120s"]);
    let reply = workload.ask(&mut guest, &Request::Load(0x3008));
    assert!(matches!(&reply, Reply::Signal(signal) if signal.number == SIGBUS), "{reply}");
    let census = guest.ctl(&["census", "p0"]);
    assert_eq!(
        (&census["user"]["entries"], &census["kernel"]["entries"]),
        (&json!(0), &json!(0)),
        "{census}"
    );
    guest.finish("exit 0").assert_ended(0, "power_off");
}

#[test]
fn a_mapped_device_is_taken_from_its_process() {
    mapped_device("6.12", "container");
}

#[test]
#[ignore = "wide"]
fn a_mapped_device_is_taken_from_its_process_on_6_1() {
    mapped_device("6.1", "container");
}

#[test]
#[ignore = "wide"]
fn a_mapped_device_is_taken_from_its_process_on_7() {
    mapped_device("7.x", "agent");
}
