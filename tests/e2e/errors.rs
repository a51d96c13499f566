//! Poison: what a guest meets at a bad line, at its neighbours, and after the repair.

use aconite_tests::machine::PMEM;
use aconite_tests::{Machine, Run};
use serde_json::{Value, json};
use std::time::Duration;

/// Pages with a bad line each, beginning with page 1, in the test with two readers.
const PAGES: u64 = 12;

/// Shell functions of the guest. The busybox of the shell has a dd of its own, which does not read past the page
/// cache: the path names the other one. `good N` reads sector N past the page cache and compares it with what was written,
/// `bad N` succeeds if the read ends in EIO.
const FUNCTIONS: &str = r#"
raw() { /usr/bin/dd if=/dev/pmem0 of=$2 bs=512 count=1 skip=$1 iflag=direct 2>$2.err; }
good() { raw $1 /tmp/a$$ || { cat /tmp/a$$.err; return 1; }; dd if=/tmp/pattern of=/tmp/b$$ bs=512 count=1 skip=$1 2>/dev/null && cmp /tmp/a$$ /tmp/b$$; }
bad() { ! raw $1 /tmp/c$$ && grep -q 'Input/output error' /tmp/c$$.err; }
"#;

/// A guest with a device whose first MiB is known, and the functions.
fn guest(kernel: Option<&str>) -> Machine {
    let run = kernel.map_or_else(Run::new, Run::kernel);
    let dd = ["dd", "ndctl"];
    let mut guest = run.size(2, "1G").pmem("size=1G,id=p0").tools(&dd).shell();
    guest.until_ok("test -b /dev/pmem0", PMEM);
    guest.ok(&format!("cat > /tmp/f << 'EOF'\n{FUNCTIONS}\nEOF"));
    guest.ok("seq 200000 | head -c 1048576 > /tmp/pattern");
    guest.ok("/usr/bin/dd if=/tmp/pattern of=/dev/pmem0 bs=65536 oflag=direct 2>/dev/null");
    guest
}

#[track_caller]
fn call(guest: &mut Machine, function: &str) {
    guest.ok(&format!(". /tmp/f; {function}"));
}

fn bad_blocks(guest: &mut Machine) -> String {
    guest.ok("cat /sys/block/pmem0/badblocks")
}

/// Waits until the kernel's list of bad blocks is this: it is filled after the machine check, by a worker.
#[track_caller]
fn wait_for_bad_blocks(guest: &mut Machine, expected: &str) {
    guest.until_ok(
        &format!("test \"$(cat /sys/block/pmem0/badblocks)\" = \"{expected}\""),
        Duration::from_secs(20),
    );
}

/// One bad line: EIO at its sector only, the right entry in the list, and the repair by a write.
fn one_bad_line(guest: &mut Machine) {
    assert_eq!(bad_blocks(guest), "");
    let before = guest.last_event();
    let added = guest.ctl(&["poison", "add", "p0", "0x1240+64"]);
    assert_eq!(added["armed"], json!([{"offset": "0x1240", "length": 64}]), "{added}");
    assert_eq!(added["rounded"], false);

    // 0x1240 is in sector 9. The page's other sectors are read as if nothing had happened.
    call(guest, "good 8 && good 10 && good 15");
    assert_eq!(guest.events_named(before, "mce_delivered").len(), 0, "no poison was loaded yet");
    call(guest, "bad 9");
    let trap = guest.event(before, "poison_trapped", |event| event["decision"] == "machine_check");
    let check = guest.event(before, "mce_delivered", |_| true);
    let base = u64::from_str_radix(guest.device("p0")["gpa"].as_str().unwrap().trim_start_matches("0x"), 16)
        .unwrap();
    let address = format!("{:#x}", base + 0x1240);
    assert_eq!((&trap["gpa"], &trap["offset"], &trap["cpl"]), (&json!(address), &json!("0x1240"), &json!(0)));
    assert_eq!((&check["address"], &check["vcpu"]), (&json!(address), &trap["vcpu"]));
    wait_for_bad_blocks(guest, "9 1");
    assert_eq!(guest.ok("cat /sys/bus/nd/devices/region0/badblocks"), "9 1");
    call(guest, "good 8 && good 10 && bad 9");

    // A write of the whole page makes Linux ask the firmware to clear it.
    let before = guest.last_event();
    guest.ok(
        "/usr/bin/dd if=/tmp/pattern of=/dev/pmem0 bs=4096 count=1 seek=1 skip=1 oflag=direct 2>/dev/null",
    );
    let cleared = guest.event(before, "poison_cleared", |event| event["by"] == "guest");
    assert_eq!(cleared["ranges"], json!([{"offset": "0x1240", "length": 64}]));
    wait_for_bad_blocks(guest, "");
    call(guest, "good 9 && good 8");
    assert_eq!(guest.ctl(&["poison", "list", "p0"])["ranges"], json!([]));
}

/// A notification makes Linux scrub: the list is right before anything was consumed.
fn notified(guest: &mut Machine) {
    let before = guest.last_event();
    guest.ctl(&["poison", "add", "p0", "0x80000+512"]);
    guest.ctl(&["notify", "p0", "uncorrectable"]);
    wait_for_bad_blocks(guest, "1024 1");
    assert_eq!(guest.events_named(before, "mce_delivered"), Vec::<Value>::new(), "nobody loaded it");
    call(guest, "bad 1024 && good 1023 && good 1025");
    assert_eq!(
        guest.events_named(before, "mce_delivered"),
        Vec::<Value>::new(),
        "the driver knows it is bad"
    );

    // Good media in the place of the bad: the guest's list stays until it writes.
    let cleared = guest.ctl(&["poison", "clear", "p0"]);
    assert_eq!(cleared["cleared"], json!([{"offset": "0x80000", "length": 512}]));
    assert!(
        cleared["note"].as_str().is_some_and(|note| note.contains("until the guest writes")),
        "{cleared}"
    );
    assert_eq!(bad_blocks(guest), "1024 1");
    call(guest, "bad 1024");
    guest.ok("/usr/bin/dd if=/tmp/pattern of=/dev/pmem0 bs=4096 count=1 seek=128 skip=128 oflag=direct 2>/dev/null");
    wait_for_bad_blocks(guest, "");
    call(guest, "good 1024");
}

/// Two processors read one bad and one clean sector of the same pages at the same time: the first always get EIO,
/// the second always get the data.
fn two_readers(guest: &mut Machine) {
    let before = guest.last_event();
    let ranges: Vec<String> = (1..=PAGES).map(|page| format!("{:#x}+64", page * 4096 + 0x240)).collect();
    let mut add = vec!["poison", "add", "p0"];
    add.extend(ranges.iter().map(String::as_str));
    guest.ctl(&add);
    guest.ok(&format!(
        "cat > /tmp/reader << 'EOF'\n. /tmp/f\n\
         for p in $(seq {PAGES}) $(seq {PAGES}); do $1 $((p * 8 + $2)) || echo \"page $p: $1 failed\"; done; \
         echo done\nEOF"
    ));
    let script = "taskset 1 sh /tmp/reader bad 1 > /tmp/bad 2>&1 & taskset 2 sh /tmp/reader good 2 > /tmp/good 2>&1 & \
                  wait; cat /tmp/bad /tmp/good";
    let reply = guest.sh_within(script, Duration::from_secs(120));
    assert_eq!(reply.text, "done\ndone", "the reader of bad sectors, then that of good ones");
    let list: Vec<String> = (1..=PAGES).map(|page| format!("{} 1", page * 8 + 1)).collect();
    wait_for_bad_blocks(guest, &list.join("\n"));
    let checks = guest.events_named(before, "mce_delivered");
    assert_eq!(
        checks.len() as u64,
        PAGES,
        "one machine check for each line: the driver does not touch it again"
    );
    guest.ok(&format!(
        "/usr/bin/dd if=/tmp/pattern of=/dev/pmem0 bs=4096 count={PAGES} seek=1 skip=1 oflag=direct 2>/dev/null"
    ));
    wait_for_bad_blocks(guest, "");
    call(guest, "good 9 && good 17");
}

#[test]
fn read_errors_and_repair() {
    let mut guest = guest(None);
    one_bad_line(&mut guest);
    notified(&mut guest);
    two_readers(&mut guest);
    guest.finish("exit 0").assert_ended(0, "power_off");
}

#[test]
fn read_errors_on_6_1() {
    let mut guest = guest(Some("6.1"));
    one_bad_line(&mut guest);
    notified(&mut guest);
    guest.finish("exit 0").assert_ended(0, "power_off");
}

#[test]
fn read_errors_on_7_and_no_removal() {
    let mut guest = guest(Some("7.x"));
    one_bad_line(&mut guest);
    notified(&mut guest);
    crate::removal::refused(&mut guest);
    guest.finish("exit 0").assert_ended(0, "power_off");
}
