//! Virtio-pmem behind ACPI host bridges of its own: it goes and comes on every kernel, without an agent and without a
//! wait for a button.

use aconite_tests::machine::PMEM;
use serde_json::{Value, json};
use std::fs;

use crate::removal::steps;
use crate::virtio_pmem::{FOUND, boot, file, write};

/// What a kernel must have forgotten after a removal.
const GONE: &str = "! ls /dev/pmem* 2>/dev/null && ! grep -q 'Persistent Memory' /proc/iomem && ! ls -d /sys/devices/pci0000:f* 2>/dev/null";

fn done(operation: &Value) {
    assert_eq!(
        (&operation["state"], &operation["channel"]),
        (&json!("done"), &json!("bridge")),
        "{operation}"
    );
}

/// What an administrator says in a guest to have host bridge `number` ejected.
pub fn eject(number: u64) -> String {
    format!(
        "for b in /sys/bus/acpi/devices/PNP0A08:*; do \
         case $(cat $b/path) in *HB{number:02X}) echo 1 > $b/eject;; esac; done"
    )
}

/// Asked by its host bridge, a guest lets go; another device takes the place, with its own bytes, and goes at the
/// administrator's wish; the first one comes back as it was, behind the bridge that was never there before.
fn goes_and_comes(kernel: &str) {
    let dir = tempfile::tempdir().unwrap();
    let [first, second] =
        ["first", "second"].map(|name| format!("{},via=virtio,channel=bridge", file(dir.path(), name)));
    let mut guest = boot(kernel, "bridge=1,size=256M", &format!("{first},id=p0"));
    assert_eq!(guest.ok("head -n 1 /dev/pmem0"), "the first device");
    assert_eq!(
        guest.ok("ls -d /sys/devices/pci0000:f*/*/virtio*"),
        "/sys/devices/pci0000:ff/0000:ff:00.0/virtio1"
    );
    write(&mut guest, 1, "written to the first");
    let gpa = guest.device("p0")["gpa"].clone();

    let before = guest.last_event();
    let operation = guest.ctl(&["remove", "p0", "--eject", "--wait", "120s"]);
    done(&operation);
    assert_eq!(steps(&guest, before), ["requested", "notified", "quiescing", "ejected", "departed"]);
    guest.until_ok(GONE, PMEM);
    assert_eq!(guest.device("p0")["state"], "departed");
    assert_eq!(guest.ctl(&["info"])["free_bridges"], json!(2));
    // `pci_remove_root_bus()` drops no reference: what the guest has of the bridge stays, and its window with it.
    assert_eq!(guest.ok("grep -c 'PCI Bus 0000:ff' /proc/iomem"), "1");

    done(&guest.ctl(&["insert", "pmem", &format!("{second},id=p1,at=p0"), "--wait"]));
    guest.until_ok(FOUND, PMEM);
    assert_eq!(guest.ok("head -n 1 /dev/pmem0"), "the second device");
    assert_eq!(guest.device("p1")["gpa"], gpa, "it has the address of the first");
    write(&mut guest, 1, "written to the second");
    guest.ok("test -e /sys/bus/pci/devices/0000:ff:00.0");

    // The bridge that nothing was behind yet.
    done(&guest.ctl(&["insert", "pmem", &format!("{first},id=p0"), "--wait"]));
    guest.until_ok("test -b /dev/pmem1 && test -e /sys/bus/pci/devices/0000:fe:00.0", PMEM);
    assert_eq!(
        guest.ok("dd if=/dev/pmem1 bs=4096 skip=1 count=1 2>/dev/null | head -n 1"),
        "written to the first"
    );
    let refused = guest.ctl_refused(&["insert", "pmem", "size=256M,via=virtio,channel=bridge"]);
    assert_eq!(refused["code"], "no_free_slot", "{refused}");

    // By itself: the administrator's switch.
    let before = guest.last_event();
    guest.ok(&eject(0));
    guest.event(before, "removal", |event| event["step"] == "departed");
    assert_eq!(steps(&guest, before), ["ejected", "departed"]);
    guest.until_ok("! test -e /sys/bus/pci/devices/0000:ff:00.0 && ! test -b /dev/pmem0", PMEM);
    assert_eq!(
        (&guest.device("p1")["state"], &guest.device("p0")["state"]),
        (&json!("departed"), &json!("present"))
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

/// A bridge that vanishes while its device is in use: Linux does not get over it, as behind a port. `vp_reset()` in
/// drivers/virtio/virtio_pci_modern.c waits for a status of 0 from a device that reads as ones, and with it the one worker
/// that ACPI's notifications have (`kacpi_hotplug_wq`): the guest hears of nothing that comes or goes any more. Address and
/// id are free, but the bridge is not: the guest has not let go of it.
fn vanished(kernel: &str) {
    let mut guest = boot(kernel, "bridge=1,size=256M", "size=256M,id=p0,via=virtio,channel=bridge");
    write(&mut guest, 1, "written to the first");
    let gpa = guest.device("p0")["gpa"].clone();
    let before = guest.last_event();
    let operation = guest.ctl_failed(&["remove", "p0", "--surprise", "--timeout", "20s", "--wait", "60s"]);
    assert_eq!(operation["error"]["code"], "guest_timed_out", "{operation}");
    assert_eq!(steps(&guest, before), ["requested", "surprised", "notified", "timed_out", "departed"]);
    guest.until_ok("! ls /dev/pmem* 2>/dev/null && ! grep -q 'Persistent Memory' /proc/iomem", PMEM);
    // A task that runs at that moment has no stack to show.
    guest.until_ok("cat /proc/[0-9]*/stack | grep -A 40 vp_reset | grep -q acpi_pci_root_remove", PMEM);

    assert_eq!(guest.ctl(&["info"])["free_bridges"], json!(1));
    done(&guest.ctl(&["insert", "pmem", "size=256M,id=p0,via=virtio,channel=bridge", "--wait"]));
    assert_eq!(guest.device("p0")["gpa"], gpa);
    guest.ok("sleep 3; ! test -e /sys/bus/pci/devices/0000:fe:00.0");
    let refused = guest.ctl_refused(&["insert", "pmem", "size=256M,id=p1,via=virtio,channel=bridge"]);
    assert_eq!(refused["code"], "no_free_slot", "{refused}");
    guest.ctl(&["quit"]);
    guest.wait(std::time::Duration::from_secs(60));
}

#[test]
fn a_bridge_that_vanishes_hangs_all_hot_plug_by_acpi() {
    vanished("6.12");
}

#[test]
#[ignore = "wide"]
fn a_bridge_that_vanishes_hangs_all_hot_plug_by_acpi_on_6_1() {
    vanished("6.1");
}

#[test]
#[ignore = "wide"]
fn a_bridge_that_vanishes_hangs_all_hot_plug_by_acpi_on_7() {
    vanished("7.x");
}

/// A bridge that vanishes when nobody uses what is behind it is noticed, and comes again.
fn unused(kernel: &str) {
    let mut guest = boot(kernel, "size=256M", "size=256M,id=p0,via=virtio,channel=bridge");
    guest.ok("echo 0000:ff:00.0 > /sys/bus/pci/drivers/virtio-pci/unbind");
    let before = guest.last_event();
    done(&guest.ctl(&["remove", "p0", "--surprise", "--wait", "120s"]));
    assert_eq!(steps(&guest, before), ["requested", "surprised", "notified", "departed"]);
    guest.until_ok(GONE, PMEM);
    let wrong = guest.ctl_refused(&["remove", "p0", "--eject"]);
    assert_eq!(wrong["code"], "wrong_device_state", "{wrong}");
    done(&guest.ctl(&["insert", "pmem", "size=256M,id=p0,via=virtio,channel=bridge", "--wait"]));
    guest.until_ok(FOUND, PMEM);
    write(&mut guest, 1, "and again");
    let wrong = guest.ctl_refused(&["remove", "p0", "--eject", "--via", "pcie"]);
    assert!(wrong["message"].as_str().unwrap().contains("goes through its host bridge"), "{wrong}");
    guest.finish("exit 0").assert_ended(0, "power_off");
}

#[test]
fn a_bridge_that_nobody_uses_may_vanish() {
    unused("7.x");
}

#[test]
#[ignore = "wide"]
fn a_bridge_that_nobody_uses_may_vanish_on_6_1() {
    unused("6.1");
}
