//! The host's own memory goes bad under a device: the guest gets poison, and the monitor lives.

use aconite_tests::machine::PMEM;
use aconite_tests::{Machine, Run, aconite};
use serde_json::{Value, json};
use std::process::Stdio;
use std::time::Duration;

/// A size that no other test gives a device.
const SIZE: u64 = 528 << 20;
/// How soon the monitor is told of a page that is not part of a large one.
const TOLD: Duration = Duration::from_secs(5);
/// SIGBUS ends a program with this status.
const BY_SIGBUS: i32 = 128 + 7;

/// Makes the page at `offset` of the device bad. The machine may run in the software KVM host: the program goes there too.
fn make_bad(offset: u64) {
    let output = aconite()
        .args(["__inside", env!("CARGO_BIN_EXE_host-poison"), &SIZE.to_string(), &offset.to_string()])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(matches!(output.status.code(), Some(0 | BY_SIGBUS)), "{output:?}");
}

fn read(sector: u64) -> String {
    format!("/usr/bin/dd if=/dev/pmem0 of=/tmp/s bs=512 count=1 skip={sector} iflag=direct 2>&1")
}

/// The sector is read, and is as it was written.
fn good(guest: &mut Machine, sector: u64) {
    guest.ok(&read(sector));
    guest.ok(&format!("/usr/bin/dd if=/tmp/pattern of=/tmp/e bs=512 count=1 skip={sector} 2>/dev/null"));
    guest.ok("cmp /tmp/s /tmp/e");
}

/// The page at `offset` goes bad: its sectors end in EIO by a machine check, its neighbours are read, and a write by the
/// guest makes it good.
///
/// The monitor is told at once, and the guest gets an error that it may ignore. If the page is part of a large one, the
/// kernel of the host splits that and unmaps it instead (`unmap_folio` in mm/huge_memory.c), so that nobody is told
/// before somebody touches it: the vCPU.
fn goes_bad_and_is_repaired(guest: &mut Machine, offset: u64) {
    guest.ok("/usr/bin/dd if=/tmp/pattern of=/dev/pmem0 bs=65536 oflag=direct 2>/dev/null");
    let before = guest.last_event();
    make_bad(offset);
    let told = (0..TOLD.as_millis() / 100).any(|_| {
        std::thread::sleep(Duration::from_millis(100));
        !guest.events_named(before, "host_memory_error").is_empty()
    });
    if told {
        guest.event(before, "mce_logged", |event| event["origin"] == "host");
    }
    let consumed = !told;
    let sector = offset / 512;
    let reply = guest.sh(&read(sector + 1));
    assert!(reply.status != 0 && reply.text.contains("Input/output error"), "{reply:?}");
    let found = guest.event(before, "host_memory_error", |_| true);
    assert_eq!((&found["device"], &found["bytes"]), (&json!("p0"), &json!(4096)));
    assert_eq!((&found["offset"], &found["consumed"]), (&json!(format!("{offset:#x}")), &json!(consumed)));
    let trap = guest.event(before, "poison_trapped", |event| event["decision"] == "machine_check");
    assert_eq!(trap["offset"], json!(format!("{:#x}", offset + 512)));
    let list = guest.ctl(&["poison", "list", "p0"]);
    assert_eq!(list["ranges"], json!([{"offset": format!("{offset:#x}"), "length": 4096}]));
    good(guest, sector - 1);
    good(guest, sector + 8);

    guest.until_ok("grep -q . /sys/block/pmem0/badblocks", PMEM);
    let page = offset / 4096;
    guest.ok(&format!(
        "/usr/bin/dd if=/tmp/pattern of=/dev/pmem0 bs=4096 count=1 seek={page} skip={page} oflag=direct 2>/dev/null"
    ));
    guest.event(before, "poison_cleared", |event| event["by"] == "guest");
    good(guest, sector + 1);
    assert_eq!(guest.events_named(before, "vcpu_stuck"), Vec::<Value>::new());
}

#[test]
fn bad_pages_of_the_host_are_poison_of_the_guest() {
    let mut guest = Run::new().size(2, "512M").pmem("size=528M,id=p0").tools(&["dd"]).shell();
    guest.until_ok("test -b /dev/pmem0", PMEM);
    guest.scrubbed();
    guest.ok("seq 20000 | head -c 65536 > /tmp/pattern");
    for offset in [0x5000, 0x9000] {
        goes_bad_and_is_repaired(&mut guest, offset);
    }
    guest.finish("exit 0");
}
