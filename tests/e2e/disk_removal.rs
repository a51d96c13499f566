//! Disks that go and come: asked for and pulled, idle and mounted, with requests in flight.

use std::fs;
use std::path::Path;
use std::time::Duration;

use aconite_tests::machine::PMEM;
use aconite_tests::{Machine, Run};
use serde_json::{Value, json};

use crate::removal::steps;

const THERE: &str = "test -b /dev/vda";
const GONE: &str = "! ls /dev/vd* 2>/dev/null && ! test -e /sys/bus/pci/devices/0000:01:00.0";
/// The kernel stack of the thread that drives the slot.
const PCIEHP: &str = "cat $(grep -l pciehp /proc/[0-9]*/comm | sed s/comm/stack/)";

fn boot(kernel: &str, slots: &str, disk: &str) -> Machine {
    let run = Run::kernel(kernel).size(2, "768M").args(["--slots", slots, "--disk", disk]);
    let mut guest = run.tools(&["mkfs.ext4", "dd"]).shell();
    guest.until_ok(THERE, PMEM);
    guest
}

/// A file for a disk of 64 MiB that begins with a line.
fn file(dir: &Path, name: &str) -> String {
    let path = dir.join(name);
    fs::write(&path, format!("the {name} disk\n")).unwrap();
    fs::File::options().write(true).open(&path).unwrap().set_len(64 << 20).unwrap();
    format!("file={}", path.display())
}

fn done(operation: &Value) {
    assert_eq!((&operation["state"], &operation["channel"]), (&json!("done"), &json!("pcie")), "{operation}");
}

fn disks(guest: &Machine) -> Vec<(String, String)> {
    let list = guest.ctl(&["disk", "list"]);
    let text = |disk: &Value, key: &str| disk[key].as_str().unwrap().to_owned();
    list["disks"].as_array().unwrap().iter().map(|disk| (text(disk, "id"), text(disk, "state"))).collect()
}

/// Asked by the button, a guest lets go; another disk comes into the slot, and goes by the administrator's switch; the
/// first one comes back as it was.
fn goes_and_comes(kernel: &str) {
    let dir = tempfile::tempdir().unwrap();
    let (first, second) = (file(dir.path(), "first"), file(dir.path(), "second"));
    let mut guest = boot(kernel, "pcie=0", &format!("{first},id=d0"));
    assert_eq!(guest.ok("head -n 1 /dev/vda"), "the first disk");
    guest.ok("echo written to the first | dd of=/dev/vda bs=4096 seek=1 conv=sync,fsync,notrunc 2>/dev/null");

    let refused = guest.ctl_refused(&["remove", "d0", "--eject", "--via", "agent"]);
    assert_eq!(refused["code"], "not_supported", "{refused}");
    let refused = guest.ctl_refused(&["insert", "disk", &format!("{second},id=d1,at=d0")]);
    assert_eq!(refused["code"], "address_in_use", "{refused}");
    let refused = guest.ctl_refused(&["insert", "disk", &format!("{second},id=d1")]);
    assert_eq!(refused["code"], "no_free_slot", "{refused}");
    let refused = guest.ctl_refused(&["insert", "disk", &format!("{second},id=d0")]);
    assert_eq!(refused["code"], "id_in_use", "{refused}");

    let before = guest.last_event();
    done(&guest.ctl(&["remove", "d0", "--eject", "--wait", "120s"]));
    assert_eq!(steps(&guest, before), ["requested", "notified", "quiescing", "ejected", "departed"]);
    guest.until_ok(GONE, PMEM);
    assert_eq!(disks(&guest), []);
    let refused = guest.ctl_refused(&["remove", "d0", "--eject"]);
    assert_eq!(refused["code"], "no_such_device", "{refused}");

    let before = guest.last_event();
    done(&guest.ctl(&["insert", "disk", &format!("{second},id=d1,at=d0"), "--wait"]));
    assert_eq!(steps(&guest, before), ["replaced"]);
    let inserted = guest.event(before, "inserted", |_| true);
    assert_eq!(
        (&inserted["device"], &inserted["size"], &inserted["gpa"]),
        (&json!("d1"), &json!(64 << 20), &Value::Null)
    );
    guest.until_ok(THERE, PMEM);
    assert_eq!(guest.ok("cat /sys/block/vda/serial; head -n 1 /dev/vda"), "d1the second disk");
    guest
        .ok("echo written to the second | dd of=/dev/vda bs=4096 seek=1 conv=sync,fsync,notrunc 2>/dev/null");

    let before = guest.last_event();
    guest.ok("echo 0 > /sys/bus/pci/slots/1/power");
    guest.event(before, "removal", |event| event["step"] == "departed");
    assert_eq!(steps(&guest, before), ["ejected", "departed"]);
    guest.until_ok(GONE, PMEM);

    done(&guest.ctl(&["insert", "disk", &format!("{first},id=d0"), "--wait"]));
    guest.until_ok(THERE, PMEM);
    assert_eq!(disks(&guest), [("d0".to_owned(), "present".to_owned())]);
    let line = guest.ok("dd if=/dev/vda bs=4096 skip=1 count=1 iflag=direct 2>/dev/null | head -n 1");
    assert_eq!(line, "written to the first");
    guest.finish("exit 0").assert_ended(0, "power_off");
    assert_eq!(fs::read(dir.path().join("second")).unwrap()[4096..][..21], *b"written to the second");
}

#[test]
fn it_goes_and_comes() {
    goes_and_comes("6.12");
}

#[test]
#[ignore = "wide"]
fn it_goes_and_comes_on_6_1() {
    goes_and_comes("6.1");
}

#[test]
#[ignore = "wide"]
fn it_goes_and_comes_on_7() {
    goes_and_comes("7.x");
}

/// A guest whose disk has a mounted file system with a file, of which a process reads; the read is held.
fn mounted_and_held(kernel: &str) -> Machine {
    let mut guest = boot(kernel, "pcie=1", "size=64M,id=d0");
    guest.ok("mkfs.ext4 -q /dev/vda && mkdir -p /mnt && mount -t ext4 /dev/vda /mnt");
    guest.ok("yes a file | dd of=/mnt/file bs=64K count=4 iflag=fullblock 2>/dev/null; sync");
    guest.ctl(&["disk", "hold", "d0", "--operation", "read"]);
    let before = guest.last_event();
    guest.type_in(b"(/usr/bin/dd if=/mnt/file of=/tmp/read bs=64K count=1 iflag=direct; echo $? > /tmp/status) >/tmp/said 2>&1 &\n");
    let held = guest.event(before, "disk_held", |_| true);
    assert_eq!((&held["device"], &held["memory"]), (&json!("d0"), &json!("ram")));
    guest
}

/// A guest that is asked for a disk with a mounted file system takes it away (`del_gendisk()` shuts the file system
/// down), but not before its requests have ended: one that is held holds the removal, which is over time. When it goes on,
/// the guest goes on, too, and gives back what nobody asks for any more.
fn asked_while_a_read_is_held(kernel: &str) {
    let mut guest = mounted_and_held(kernel);
    let before = guest.last_event();
    let operation = guest.ctl_failed(&["remove", "d0", "--eject", "--timeout", "20s", "--wait", "60s"]);
    assert_eq!(operation["error"]["code"], "guest_timed_out", "{operation}");
    assert_eq!(steps(&guest, before), ["requested", "notified", "quiescing", "timed_out"]);
    assert_eq!(disks(&guest), [("d0".to_owned(), "present".to_owned())]);
    guest.ok(&format!("{PCIEHP} | grep -q blk_mq_freeze_queue_wait && ! test -e /tmp/status"));

    let before = guest.last_event();
    guest.ctl(&["disk", "release", "d0"]);
    guest.event(before, "removal", |event| event["step"] == "departed");
    assert_eq!(steps(&guest, before), ["ejected", "departed"]);
    guest.until_ok("test -e /tmp/status", PMEM);
    assert_eq!(guest.ok("cat /tmp/status; head -n 1 /tmp/read"), "0\na file");
    guest.ok("umount /mnt");
    assert_eq!(disks(&guest), []);
    done(&guest.ctl(&["insert", "disk", "size=64M,id=d0,at=d0", "--wait"]));
    guest.until_ok(THERE, PMEM);
    guest.finish("exit 0").assert_ended(0, "power_off");
}

#[test]
fn a_held_read_holds_an_orderly_removal() {
    asked_while_a_read_is_held("6.12");
}

#[test]
#[ignore = "wide"]
fn a_held_read_holds_an_orderly_removal_on_6_1() {
    asked_while_a_read_is_held("6.1");
}

#[test]
#[ignore = "wide"]
fn a_held_read_holds_an_orderly_removal_on_7() {
    asked_while_a_read_is_held("7.x");
}

/// A disk that is pulled is gone at once, with what the guest waits for. Linux does not get over it: pciehp's thread waits
/// for ever in `place`, with the lock that every other slot needs; a disk that comes into another slot is not found.
fn pulled(guest: &mut Machine, place: &str) {
    let before = guest.last_event();
    let operation = guest.ctl_failed(&["remove", "d0", "--surprise", "--timeout", "20s", "--wait", "60s"]);
    assert_eq!(operation["error"]["code"], "guest_timed_out", "{operation}");
    assert_eq!(steps(guest, before), ["requested", "surprised", "notified", "timed_out", "departed"]);
    assert_eq!(disks(guest), []);
    guest.until_ok(&format!("{PCIEHP} | grep -q {place}"), PMEM);

    let refused = guest.ctl_refused(&["insert", "disk", "size=64M,id=d0,at=d0"]);
    assert_eq!(refused["code"], "address_in_use", "{refused}");
    done(&guest.ctl(&["insert", "disk", "size=64M,id=d0", "--wait"]));
    assert_eq!(disks(guest), [("d0".to_owned(), "present".to_owned())]);
    let waits = format!("{PCIEHP} | grep -q pciehp_configure_device");
    guest.until_ok(&waits, PMEM);
    guest.ok("! test -e /sys/bus/pci/devices/0000:02:00.0");
}

/// `vp_reset()` waits for a status of 0 from a device that reads as ones.
fn pulled_idle(kernel: &str) {
    let mut guest = boot(kernel, "pcie=1", "size=64M,id=d0");
    pulled(&mut guest, "vp_reset");
    guest.ctl(&["quit"]);
    guest.wait(Duration::from_secs(60));
}

/// `virtblk_remove()` waits for the end of requests that nobody ends. They land nowhere: of each is told that it was
/// left behind, and what the process reads stays as it is.
fn pulled_with_a_request(kernel: &str) {
    let mut guest = mounted_and_held(kernel);
    let before = guest.last_event();
    pulled(&mut guest, "blk_mq_freeze_queue_wait");
    let left = guest.events_named(before, "disk_released");
    let read = left.iter().find(|event| event["operation"] == "read").unwrap();
    assert_eq!((&read["how"], &read["fault"], &read["memory"]), (&json!("depart"), &json!(1), &json!("ram")));
    let refused = guest.ctl_refused(&["disk", "release", "d0", &read["request"].to_string()]);
    assert_eq!(refused["code"], "wrong_device_state", "{refused}");
    guest.ok("! test -e /tmp/status && ! test -s /tmp/read");
    guest.ctl(&["quit"]);
    guest.wait(Duration::from_secs(60));
}

#[test]
fn a_disk_that_is_pulled_hangs_the_hot_plug_driver() {
    pulled_idle("6.12");
}

#[test]
#[ignore = "wide"]
fn a_disk_that_is_pulled_hangs_the_hot_plug_driver_on_6_1() {
    pulled_idle("6.1");
}

#[test]
#[ignore = "wide"]
fn a_disk_that_is_pulled_hangs_the_hot_plug_driver_on_7() {
    pulled_idle("7.x");
}

#[test]
#[ignore = "wide"]
fn a_disk_that_is_pulled_leaves_its_requests_behind() {
    pulled_with_a_request("6.12");
}

#[test]
#[ignore = "wide"]
fn a_disk_that_is_pulled_leaves_its_requests_behind_on_6_1() {
    pulled_with_a_request("6.1");
}

#[test]
#[ignore = "wide"]
fn a_disk_that_is_pulled_leaves_its_requests_behind_on_7() {
    pulled_with_a_request("7.x");
}
