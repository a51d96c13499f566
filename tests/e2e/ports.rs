//! PCI Express ports with slots, as the guest's hot-plug driver finds them.

use std::time::Duration;

use aconite_tests::Run;
use aconite_tests::machine::PMEM;
use serde_json::json;

use crate::removal::steps;

/// Every free port is a slot that pciehp drives, under its number, empty and without power.
fn slots(kernel: &str) {
    for (button, said) in [
        ("on", "AttnBtn+ PwrCtrl+ MRL- AttnInd+ PwrInd+"),
        ("off", "AttnBtn- PwrCtrl- MRL- AttnInd- PwrInd-"),
    ] {
        let slots = format!("pcie=2,button={button}");
        let mut guest = Run::kernel(kernel).args(["--slots", &slots]).shell();
        for slot in ["1", "2"] {
            let line = format!("dmesg | grep -F 'pciehp: Slot #{slot} {said}'");
            guest.ok(&line);
            let empty = guest.ok(&format!("cat /sys/bus/pci/slots/{slot}/adapter"));
            assert_eq!(empty, "0", "slot {slot}, button {button}");
        }
        guest.finish("exit 0").assert_ended(0, "power_off");
    }
}

#[test]
fn slots_are_driven_by_pciehp() {
    slots("6.12");
}

#[test]
#[ignore = "wide"]
fn slots_are_driven_by_pciehp_on_6_1() {
    slots("6.1");
}

#[test]
#[ignore = "wide"]
fn slots_are_driven_by_pciehp_on_7() {
    slots("7.x");
}

/// A slot without a button takes cards as they come. Nobody can ask for one: it is pulled, and all that is heard of the
/// guest is that it has seen it. One that the administrator has switched off before goes without harm; with one that is
/// in use pciehp's thread hangs (`vp_reset()` waits for a status of 0 from a device that reads as ones).
fn without_button(kernel: &str) {
    let mut guest =
        Run::kernel(kernel).args(["--slots", "pcie=1,button=off", "--disk", "size=64M,id=d0"]).shell();
    guest.until_ok("test -b /dev/vda", PMEM);
    let refused = guest.ctl_refused(&["remove", "d0", "--eject"]);
    assert_eq!(refused["code"], "not_supported", "{refused}");
    assert!(refused["remedy"].as_str().unwrap().contains("pull it"), "{refused}");

    for _ in 0..2 {
        assert_eq!(guest.ctl(&["insert", "disk", "size=64M,id=d1", "--wait"])["state"], "done");
        guest.until_ok("grep -q d1 /sys/block/vdb/serial", PMEM);
        guest.ok("echo 0 > /sys/bus/pci/slots/2/power");
        guest.until_ok("! test -e /sys/block/vdb", PMEM);
        let before = guest.last_event();
        let operation = guest.ctl(&["remove", "d1", "--surprise", "--wait"]);
        assert_eq!(operation["state"], "done", "{operation}");
        assert_eq!(steps(&guest, before), ["requested", "surprised", "notified", "departed"]);
        assert_eq!(guest.ctl(&["info"])["free_ports"], json!(1));
    }

    let before = guest.last_event();
    let operation = guest.ctl(&["remove", "d0", "--surprise", "--wait"]);
    assert_eq!(operation["state"], "done", "{operation}");
    assert_eq!(steps(&guest, before), ["requested", "surprised", "notified", "departed"]);
    guest.until_ok("cat $(grep -l pciehp /proc/[0-9]*/comm | sed s/comm/stack/) | grep -q vp_reset", PMEM);
    guest.ctl(&["quit"]);
    guest.wait(Duration::from_secs(60));
}

#[test]
#[ignore = "wide"]
fn a_slot_without_a_button_takes_cards_as_they_come() {
    without_button("6.12");
}

#[test]
#[ignore = "wide"]
fn a_slot_without_a_button_takes_cards_as_they_come_on_6_1() {
    without_button("6.1");
}

#[test]
#[ignore = "wide"]
fn a_slot_without_a_button_takes_cards_as_they_come_on_7() {
    without_button("7.x");
}
