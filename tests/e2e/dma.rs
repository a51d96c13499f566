//! Devices are not blind: a request of theirs that meets poison fails, and an event says so.

use aconite_tests::Run;
use aconite_tests::machine::PMEM;
use serde_json::json;

/// The mailbox of the first unit, in guest RAM: what the firmware's code writes there the device reads.
const MAILBOX: &str = "0x180000";

#[test]
fn a_firmware_call_through_poison_fails_and_is_told() {
    let mut guest = Run::new().size(1, "512M").pmem("size=512M,id=p0").tools(&["ndctl"]).shell();
    guest.until_ok("test -b /dev/pmem0", PMEM);
    guest.scrubbed();
    let scrub = "echo 1 > /sys/bus/nd/devices/ndbus0/nfit/scrub";
    let before = guest.last_event();
    guest.until_ok(scrub, PMEM);
    guest.scrubbed();
    assert!(guest.events_named(before, "dma_poisoned").is_empty());

    guest.ctl(&["poison", "add", "ram", &format!("{MAILBOX}+64")]);
    let before = guest.last_event();
    guest.sh(scrub);
    let met = guest.event(before, "dma_poisoned", |_| true);
    assert_eq!((&met["by"], &met["device"]), (&json!("nvdimm"), &json!("ram")));
    assert_eq!((&met["line"], &met["direction"]), (&json!(MAILBOX), &json!("read")));
    assert!(guest.events_named(before, "mce_delivered").is_empty(), "no processor has loaded it");

    guest.ctl(&["poison", "clear", "ram", &format!("{MAILBOX}+64")]);
    let before = guest.last_event();
    // Not another scrub: a region whose scrub could not be started gets none any more (`ARS_FAILED` in
    // drivers/acpi/nfit/core.c).
    guest.ok("ndctl list -DH | grep health_state");
    assert!(guest.events_named(before, "dma_poisoned").is_empty());
    guest.finish("exit 0");
}
