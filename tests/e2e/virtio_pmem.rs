//! Virtio-pmem behind PCI Express ports: it works, and it goes and comes on every kernel.

use aconite_tests::machine::PMEM;
use aconite_tests::{Machine, Run};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;

use crate::removal::steps;

/// What a kernel must have forgotten after a removal.
const GONE: &str = "! ls /dev/pmem* 2>/dev/null && ! grep -q 'Persistent Memory' /proc/iomem && ! test -e /sys/bus/pci/devices/0000:01:00.0";
/// Until the driver has found a device that came: enumeration, probe, a new block device.
pub const FOUND: &str = "test -b /dev/pmem0";

/// A guest that has found its device.
pub fn boot(kernel: &str, slots: &str, pmem: &str) -> Machine {
    let mut guest = Run::kernel(kernel).size(2, "1G").args(["--slots", slots]).pmem(pmem).shell();
    guest.until_ok(FOUND, PMEM);
    guest
}

/// Writes a line to a block of the device, through its flush queue.
pub fn write(guest: &mut Machine, block: u32, text: &str) {
    guest.ok(&format!("echo {text} | dd of=/dev/pmem0 bs=4096 seek={block} conv=sync,fsync 2>/dev/null"));
}

/// A file of 256 MiB in `dir` that says its name, as the option has it.
pub fn file(dir: &Path, name: &str) -> String {
    let path = dir.join(name);
    fs::write(&path, format!("the {name} device\n")).unwrap();
    fs::File::options().write(true).open(&path).unwrap().set_len(256 << 20).unwrap();
    format!("file={}", path.display())
}

fn done(operation: &Value) {
    assert_eq!((&operation["state"], &operation["channel"]), (&json!("done"), &json!("pcie")), "{operation}");
}

/// Asked by the button, a guest lets go; another device takes the place, with its own bytes, and is pulled; the first
/// one comes back as it was.
fn goes_and_comes(kernel: &str) {
    let dir = tempfile::tempdir().unwrap();
    let [first, second] = ["first", "second"].map(|name| file(dir.path(), name));
    let mut guest = boot(kernel, "size=256M", &format!("{first},id=p0,via=virtio"));
    assert_eq!(guest.ok("head -n 1 /dev/pmem0"), "the first device");
    write(&mut guest, 1, "written to the first");
    let gpa = guest.device("p0")["gpa"].clone();

    let before = guest.last_event();
    let operation = guest.ctl(&["remove", "p0", "--eject", "--wait", "120s"]);
    done(&operation);
    assert_eq!(steps(&guest, before), ["requested", "notified", "quiescing", "ejected", "departed"]);
    guest.until_ok(GONE, PMEM);
    assert_eq!(guest.device("p0")["state"], "departed");

    done(&guest.ctl(&["insert", "pmem", &format!("{second},id=p1,via=virtio,at=p0"), "--wait"]));
    guest.until_ok(FOUND, PMEM);
    assert_eq!(guest.ok("head -n 1 /dev/pmem0"), "the second device");
    assert_eq!(guest.device("p1")["gpa"], gpa, "it has the address of the first");
    write(&mut guest, 1, "written to the second");

    // By itself: the administrator's switch.
    let before = guest.last_event();
    guest.ok("echo 0 > /sys/bus/pci/slots/1/power");
    guest.event(before, "removal", |event| event["step"] == "departed");
    assert_eq!(steps(&guest, before), ["ejected", "departed"]);
    guest.until_ok(GONE, PMEM);
    assert_eq!(guest.device("p1")["state"], "departed");

    done(&guest.ctl(&["insert", "pmem", &format!("{first},id=p0,via=virtio"), "--wait"]));
    guest.until_ok(FOUND, PMEM);
    assert_eq!(
        guest.ok("dd if=/dev/pmem0 bs=4096 skip=1 count=1 2>/dev/null | head -n 1"),
        "written to the first"
    );
    guest.finish("exit 0").assert_ended(0, "power_off");
    let bytes = fs::read(dir.path().join("second")).unwrap();
    assert_eq!(bytes[4096..][..21], *b"written to the second");
}

#[test]
fn it_goes_and_comes() {
    goes_and_comes("6.12");
}

#[test]
fn it_goes_and_comes_on_7() {
    goes_and_comes("7.x");
}

#[test]
#[ignore = "wide"]
fn it_goes_and_comes_on_6_1() {
    goes_and_comes("6.1");
}

/// A card that is pulled takes its memory with it at once. Linux does not get over it (seen on 6.12): `vp_reset()` in
/// drivers/virtio/virtio_pci_modern.c waits for a status of 0 from a device that reads as ones, and pciehp's thread with
/// it, with the lock that every other slot needs (`pci_lock_rescan_remove()`): no card is found any more. Address and id
/// are free, but the slot is not: the guest has not let go of it.
fn pulled(kernel: &str) {
    let mut guest = boot(kernel, "pcie=1,size=256M", "size=256M,id=p0,via=virtio");
    write(&mut guest, 1, "written to the first");
    let gpa = guest.device("p0")["gpa"].clone();
    let before = guest.last_event();
    let operation = guest.ctl_failed(&["remove", "p0", "--surprise", "--timeout", "20s", "--wait", "60s"]);
    assert_eq!(operation["error"]["code"], "guest_timed_out", "{operation}");
    assert_eq!(steps(&guest, before), ["requested", "surprised", "notified", "timed_out", "departed"]);
    guest.until_ok("! ls /dev/pmem* 2>/dev/null && ! grep -q 'Persistent Memory' /proc/iomem", PMEM);
    guest.until_ok("cat $(grep -l pciehp /proc/[0-9]*/comm | sed s/comm/stack/) | grep -q vp_reset", PMEM);

    assert_eq!(guest.ctl(&["info"])["free_ports"], json!(1));
    done(&guest.ctl(&["insert", "pmem", "size=256M,id=p0,via=virtio", "--wait"]));
    assert_eq!(guest.device("p0")["gpa"], gpa);
    guest.until_ok(
        "cat $(grep -l pciehp /proc/[0-9]*/comm | sed s/comm/stack/) | grep -q pciehp_configure_device",
        PMEM,
    );
    guest.ok("! test -e /sys/bus/pci/devices/0000:02:00.0");
    let refused = guest.ctl_refused(&["insert", "pmem", "size=256M,id=p1,via=virtio"]);
    assert_eq!(refused["code"], "no_free_slot", "{refused}");
    guest.ctl(&["quit"]);
    guest.wait(std::time::Duration::from_secs(60));
}

#[test]
fn a_card_that_is_pulled_hangs_the_hot_plug_driver() {
    pulled("6.12");
}

#[test]
#[ignore = "wide"]
fn a_card_that_is_pulled_hangs_the_hot_plug_driver_on_6_1() {
    pulled("6.1");
}

#[test]
#[ignore = "wide"]
fn a_card_that_is_pulled_hangs_the_hot_plug_driver_on_7() {
    pulled("7.x");
}
