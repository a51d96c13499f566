//! What poison does to the processors that touch it, as a device's policy says.

use aconite_tests::machine::PMEM;
use aconite_tests::{Machine, Run};
use serde_json::json;

/// The line 0x1240 is in sector 9, which is in page 1.
const LINE: &str = "0x1240+64";
const READ: &str = "/usr/bin/dd if=/dev/pmem0 of=/tmp/s bs=512 count=1 skip=9 iflag=direct 2>&1 && \
                    /usr/bin/dd if=/tmp/pattern of=/tmp/e bs=512 count=1 skip=9 2>/dev/null && cmp /tmp/s /tmp/e";
const WRITE: &str =
    "/usr/bin/dd if=/tmp/pattern of=/dev/pmem0 bs=4096 count=1 seek=1 skip=1 oflag=direct 2>/dev/null";

fn policy(guest: &Machine, change: &[&str]) -> serde_json::Value {
    guest.ctl(&[&["poison", "policy", "p0"], change].concat())
}

#[test]
fn policies_of_a_device() {
    let run = Run::new().size(1, "512M").pmem("size=512M,id=p0").pmem("size=2M,id=p1,full_line_store=clear");
    let mut guest = run.tools(&["dd"]).shell();
    guest.until_ok("test -b /dev/pmem0", PMEM);
    guest.scrubbed();
    guest.ok("seq 20000 | head -c 65536 > /tmp/pattern");
    guest.ok("/usr/bin/dd if=/tmp/pattern of=/dev/pmem0 bs=65536 oflag=direct 2>/dev/null");
    let usual = policy(&guest, &[]);
    for (name, value) in [("consume", "machine_check"), ("address", "line"), ("full_line_store", "keep")] {
        assert_eq!(usual[name], value, "{usual}");
    }
    let chosen = guest.ctl(&["poison", "policy", "p1"]);
    assert_eq!(
        chosen,
        json!({"seq": chosen["seq"], "full_line_store": "clear", "consume": "machine_check", "address": "line"})
    );

    // What only logs gets the bytes that are there.
    assert_eq!(policy(&guest, &["--consume", "log"])["consume"], "log");
    guest.ctl(&["poison", "add", "p0", LINE]);
    let before = guest.last_event();
    guest.ok(READ);
    let trap = guest.event(before, "poison_trapped", |event| event["decision"] == "proceed");
    assert_eq!(trap["offset"], "0x1240");
    assert!(trap["instruction_bytes"].is_string() && trap["reason"].as_str().unwrap().contains("policy"));
    assert!(guest.events_named(before, "mce_delivered").is_empty());

    // The kernel, whose first scrub is over, writes the page with non-temporal stores
    // (`memcpy_flushcache`) that fill it.
    guest.ctl(&["poison", "clear", "p0"]);
    guest.ok(WRITE);
    policy(&guest, &["--consume", "machine-check", "--full-line-store", "clear"]);
    guest.ctl(&["poison", "add", "p0", LINE]);
    let before = guest.last_event();
    guest.ok(WRITE);
    let cleared = guest.event(before, "poison_cleared", |_| true);
    assert_eq!(
        (&cleared["by"], &cleared["ranges"]),
        (&json!("store"), &json!([{"offset": "0x1240", "length": 64}]))
    );
    guest.ok(READ);

    // A machine check that names no more than the page makes all of its sectors bad blocks.
    policy(&guest, &["--address", "page"]);
    guest.ctl(&["poison", "add", "p0", LINE]);
    let before = guest.last_event();
    assert_ne!(guest.sh(READ).status, 0);
    let check = guest.event(before, "mce_delivered", |_| true);
    assert_eq!(check["misc"], "0x8c");
    guest.until_ok("test \"$(cat /sys/block/pmem0/badblocks)\" = '8 8'", PMEM);
    guest.finish("exit 0");
}
