//! PCI Express ports with slots, as the guest's hot-plug driver finds them.

use aconite_tests::Run;

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
