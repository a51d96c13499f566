//! Power goes without a word: what was flushed is there at the next start, and what was not is lost where that counts.

use std::fs;
use std::os::unix::fs::FileExt;

use aconite_tests::machine::{END, PMEM};
use aconite_tests::{Machine, Run};
use serde_json::{Value, json};

/// Writes a block of /dev/pmem0 past the page cache, with a flush behind it or without.
fn write(guest: &mut Machine, text: &str, block: u32, flush: bool) {
    let flush = if flush { ",fsync" } else { "" };
    guest.ok(&format!(
        "printf {text} | dd of=/dev/pmem0 bs=4096 seek={block} conv=sync,notrunc{flush} oflag=direct 2>&1"
    ));
}

fn health(guest: &mut Machine, dimm: &str) -> Value {
    let text = guest.ok(&format!("ndctl list -DH -d {dimm}"));
    let list: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
    list[0]["health"].clone()
}

fn unflushed(kernel: &str) {
    let dir = tempfile::tempdir().unwrap();
    let (raw, fs_file, kept) =
        (dir.path().join("raw.img"), dir.path().join("fs.img"), dir.path().join("kept.img"));
    let boot = || {
        Run::kernel(kernel)
            .size(2, "1G")
            .pmem(&format!("file={},size=128M,id=p0,unflushed=drop", raw.display()))
            .pmem(&format!("file={},size=256M,id=p1,labels=init,unflushed=drop", fs_file.display()))
            .pmem(&format!("file={},size=128M,id=p2", kept.display()))
            .tools(&["ndctl", "mkfs.ext4"])
            .shell()
    };
    let block = |path: &std::path::Path, number: u64| {
        let mut bytes = [0; 7];
        fs::File::open(path).unwrap().read_exact_at(&mut bytes, number * 4096).unwrap();
        String::from_utf8_lossy(&bytes).trim_end_matches('\0').to_owned()
    };

    let mut guest = boot();
    guest.until_ok("test -b /dev/pmem0 -a -b /dev/pmem2", PMEM);
    // Only a flush makes what is written durable, and Linux is told that there is nothing else to rely on.
    assert_eq!(guest.ok("cat /sys/bus/nd/devices/region*/persistence_domain"), "memory_controller");
    let region = guest.ok("basename $(dirname $(grep -lx 268435456 /sys/bus/nd/devices/region*/size))");
    let dev = guest.ok(&format!(
        "ndctl create-namespace -m fsdax -r {region} | sed -n 's/.*\"blockdev\":\"\\(.*\\)\".*/\\1/p'"
    ));
    guest.ok(&format!(
        "mkfs.ext4 -q -b 4096 /dev/{dev} && mkdir -p /mnt && mount -t ext4 -o dax,commit=600 /dev/{dev} /mnt 2>&1"
    ));
    guest.ok("echo synced > /mnt/synced && sync && echo unsynced > /mnt/unsynced");
    write(&mut guest, "first", 0, false);
    write(&mut guest, "second", 1, true);
    assert_eq!(
        (block(&raw, 0), block(&raw, 1)),
        ("first".into(), "second".into()),
        "a flush is of all of it"
    );
    write(&mut guest, "third", 1, false);
    write(&mut guest, "fourth", 2, false);
    guest.ok("printf kept | dd of=/dev/pmem2 bs=4096 conv=sync,notrunc oflag=direct 2>&1");
    assert_eq!(guest.ok("head -c 5 /dev/pmem0 && dd if=/dev/pmem0 bs=4096 skip=1 count=1 iflag=direct 2>/dev/null | head -c 5"), "firstthird");

    let loss = guest.ctl(&["power", "cut"]);
    let of =
        |id: &str| loss["devices"].as_array().unwrap().iter().find(|d| d["device"] == id).unwrap().clone();
    assert_eq!((&of("p0")["lost"], &of("p0")["survived"]), (&128.into(), &0.into()), "two lines: {loss}");
    assert_eq!(loss["devices"].as_array().unwrap().len(), 2, "{loss}");
    let ended = guest.wait(END);
    ended.assert_ended(0, "power_cut");
    assert_eq!(
        (block(&raw, 0), block(&raw, 1), block(&raw, 2)),
        ("first".into(), "second".into(), String::new())
    );
    assert_eq!(block(&kept, 0), "kept");

    let mut guest = boot();
    guest.until_ok(&format!("test -b /dev/pmem0 -a -b /dev/{dev}"), PMEM);
    assert_eq!(
        guest.ok("dd if=/dev/pmem0 bs=4096 skip=1 count=1 iflag=direct 2>/dev/null | head -c 6"),
        "second"
    );
    guest.ok(&format!("mkdir -p /mnt && mount -t ext4 -o dax,commit=600 /dev/{dev} /mnt 2>&1"));
    assert_eq!(guest.ok("cat /mnt/synced"), "synced");
    assert_ne!(guest.sh("cat /mnt/unsynced").text, "unsynced", "its journal was not written yet");
    println!("{} {}", health(&mut guest, "nmem0"), health(&mut guest, "nmem1"));
    // A power-off by the guest is no loss of power: firmware writes back what there is.
    write(&mut guest, "fifth", 3, false);
    guest.finish("umount /mnt; exit 0").assert_ended(0, "power_off");
    assert_eq!(block(&raw, 3), "fifth");
}

#[test]
fn what_was_not_flushed_is_lost() {
    unflushed("6.12");
}

#[test]
#[ignore = "wide"]
fn what_was_not_flushed_is_lost_on_6_1() {
    unflushed("6.1");
}

#[test]
#[ignore = "wide"]
fn what_was_not_flushed_is_lost_on_7() {
    unflushed("7.x");
}

/// Power goes and comes back: the same command line boots again, with what was durable. A shutdown that was to be counted
/// is (S40), since nobody announced it.
#[test]
fn a_power_cycle_boots_again() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("p0.img");
    let mut guest = Run::new()
        .size(2, "1G")
        .pmem(&format!("file={},size=128M,id=p0,unflushed=drop", file.display()))
        .tools(&["ndctl"])
        .shell();
    guest.until_ok("test -b /dev/pmem0", PMEM);
    write(&mut guest, "kept", 0, true);
    write(&mut guest, "lost", 1, false);
    guest.ok("touch /tmp/before; ndctl inject-smart -s 4 nmem0");
    guest.ctl(&["poison", "add", "p0", "0x100000+64"]);
    // What ndctl's helper for udev asks for when a DIMM appears: latch the system shutdown status.
    assert_eq!(guest.ok("aconite-agent dsm nmem0 0 10 4 01"), "00000000");
    let clean = health(&mut guest, "nmem0");
    assert_eq!((&clean["shutdown_state"], &clean["shutdown_count"]), (&json!("clean"), &json!(0)), "{clean}");
    let loss = guest.ctl(&["power", "cycle"]);
    assert_eq!(loss["devices"][0]["lost"], 64, "{loss}");
    guest.booted_again();
    guest.until_ok("test -b /dev/pmem0 -a ! -e /tmp/before", PMEM);
    let read = |guest: &mut Machine, block: u32| {
        guest.ok(&format!(
            "dd if=/dev/pmem0 bs=4096 skip={block} count=1 iflag=direct 2>/dev/null | head -c 4 | tr -d '\\000'"
        ))
    };
    assert_eq!((&*read(&mut guest, 0), &*read(&mut guest, 1)), ("kept", ""));
    guest.until_ok("grep -q '^2048 1$' /sys/block/pmem0/badblocks", PMEM);
    let dirty = health(&mut guest, "nmem0");
    assert_eq!(dirty["spares_percentage"], 4);
    assert_eq!((&dirty["shutdown_state"], &dirty["shutdown_count"]), (&json!("dirty"), &json!(1)), "{dirty}");
    guest.finish("exit 0").assert_ended(0, "power_off");
}
