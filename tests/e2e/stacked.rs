//! File systems and device mappers that have persistent memory as a part of theirs, and lose that part by surprise.
//!
//! Expected, and what stock kernels do where that is something else:
//!
//! | the part | expected |
//! |---|---|
//! | one leg of a `dm-mirror` (S37) | reads and writes go on with the other leg; the mirror's status names the dead one |
//! | the log of an XFS whose data are on a disk (S36) | `xfs_fs_shutdown()` by `bdev_mark_dead()`: all fails with EIO; it can be unmounted |
//! | the realtime device of an XFS (S36) | the same: Linux shuts down all of the file system, not only the files on that device |
//! | what is under a `dm-linear`, with ext4 in DAX mode on it (S37) | as without it: mapped pages stay in reach |
//! | the cache of a `dm-writecache` in memory mode (S38) | what only the cache had fails with EIO (`copy_mc_to_kernel()` in `bio_copy_block()`); no byte is read that nobody wrote |
//!
//! The oracle: sums of the files, what programs got, the kernel's log, the census.

use super::mapped::{Mapped, REMOVAL, WORD};
use aconite_tests::machine::PMEM;
use aconite_tests::{Machine, Run};
use std::time::Duration;

/// The mapped device, which needs no udev(7) to get its name.
const MAPPED: &str = "/dev/dm-0";
const EIO: &str = "Input/output error";

/// A guest with that many memory devices of 256 MiB, and a disk.
fn boot(kernel: &str, devices: u32, tools: &[&str]) -> Machine {
    let mut run = Run::kernel(kernel).size(2, "1G").args(["--disk", "size=512M,id=d0"]);
    for number in 0..devices {
        run = run.pmem(&format!("size=256M,id=p{number}"));
    }
    let mut guest = run.tools(tools).shell();
    guest.until_ok(&format!("test $(ls /dev/pmem* | wc -l) = {devices} && test -b /dev/vda"), PMEM);
    guest.ok("mkdir -p /mnt");
    guest
}

/// Takes p0 away.
fn remove(guest: &Machine, via: &str) {
    let patience = format!("{}s", REMOVAL.as_secs());
    let options = ["remove", "p0", "--surprise", "--via", via, "--timeout", &patience, "--wait", &patience];
    let operation = guest.ctl(&options);
    assert_eq!(operation["state"], "done", "{operation}");
}

/// The name of the block device of a memory device.
fn block(guest: &mut Machine, device: &str) -> String {
    let gpa = guest.device(device)["gpa"].as_str().expect("an address").to_owned();
    let name = guest.ok(&format!(
        "for d in /sys/block/pmem*; do test $(($(cat $d/device/resource))) = $(({gpa})) && basename $d; done; true"
    ));
    assert!(name.starts_with("pmem"), "{device} at {gpa}: {name:?}");
    name
}

/// Makes a mapped device.
fn map(guest: &mut Machine, table: &str) {
    guest.ok(&format!("dmsetup --noudevsync create m --table \"{table}\""));
    guest.ok(&format!("test -b {MAPPED}"));
}

fn end(mut guest: Machine) {
    assert_eq!(guest.ok("dmesg | grep -E 'BUG: (kernel|unable)|Oops' || true"), "");
    guest.ctl(&["quit"]);
    guest.wait(Duration::from_secs(60));
}

/// S37: a mirror lives on with one leg.
fn mirror(kernel: &str, via: &str) {
    let mut guest = boot(kernel, 2, &["dmsetup", "mkfs.ext4"]);
    let (first, second) = (block(&mut guest, "p0"), block(&mut guest, "p1"));
    guest.ok("modprobe dm_mirror");
    // Without keep_log, writes would wait for somebody in user space (do_failures() in dm-raid1.c).
    let table = format!(
        "0 $(cat /sys/block/{first}/size) mirror core 2 1024 nosync 2 /dev/{first} 0 /dev/{second} 0 \
         2 handle_errors keep_log"
    );
    map(&mut guest, &table);
    guest.ok(&format!("mkfs.ext4 -q {MAPPED} && mount {MAPPED} /mnt"));
    guest.ok("dd if=/dev/urandom of=/mnt/a bs=64K count=64 2>/dev/null; sync");
    let sum = guest.ok("md5sum < /mnt/a");
    assert!(guest.ok("dmsetup status m").contains(" AA "));
    remove(&guest, via);
    assert_eq!(guest.ok("echo 3 > /proc/sys/vm/drop_caches; md5sum < /mnt/a"), sum, "the other leg has it");
    guest.ok("dd if=/mnt/a of=/mnt/b bs=64K conv=fsync 2>/dev/null");
    assert_eq!(guest.ok("echo 3 > /proc/sys/vm/drop_caches; md5sum < /mnt/b"), sum);
    let status = guest.ok("dmsetup status m");
    assert!([" DA ", " FA "].iter().any(|health| status.contains(health)), "{status}");
    guest.ok("umount /mnt");
    end(guest);
}

#[test]
#[ignore = "wide"]
fn a_mirror_lives_on_with_one_leg() {
    mirror("6.12", "container");
}

/// S36: a device beside that of the data goes; the file system is shut down, and can be unmounted.
fn beside(kernel: &str, via: &str, mkfs: &str, mount: &str) {
    let mut guest = boot(kernel, 1, &["mkfs.xfs"]);
    guest.ok(&format!("mkfs.xfs -q -f {mkfs} /dev/vda && mount -t xfs -o {mount} /dev/vda /mnt"));
    guest.ok("dd if=/dev/zero of=/mnt/a bs=64K count=16 conv=fsync 2>/dev/null");
    remove(&guest, via);
    guest.until_ok("dmesg | grep -q 'Block device removal.*Shutting down'", PMEM);
    for change in ["touch /mnt/new", "cat /mnt/a"] {
        let reply = guest.sh(&format!("echo 3 > /proc/sys/vm/drop_caches; {change}"));
        assert!(reply.status != 0 && reply.text.contains(EIO), "{change}: {reply:?}");
    }
    guest.ok("umount /mnt");
    end(guest);
}

#[test]
#[ignore = "wide"]
fn a_file_system_without_its_log_is_shut_down() {
    beside("6.12", "container", "-l logdev=/dev/pmem0,size=64m", "logdev=/dev/pmem0");
}

#[test]
#[ignore = "wide"]
fn a_file_system_without_its_realtime_device_is_shut_down() {
    beside("6.12", "container", "-r rtdev=/dev/pmem0,size=200m", "rtdev=/dev/pmem0");
}

/// S37: a mapped device between a DAX file system and its memory.
fn linear(kernel: &str, file_system: &str, via: &str) {
    let mut at = Mapped::on_linear(kernel, file_system);
    at.load(WORD);
    remove(&at.guest, via);
    let census = at.guest.ctl(&["census", "p0"]);
    assert!(census["user"]["entries"].as_u64() > Some(0), "{census}");
    assert_eq!(at.load(WORD).0, u64::MAX);
    at.guest.ctl(&["quit"]);
    at.guest.wait(Duration::from_secs(60));
}

#[test]
#[ignore = "wide"]
fn ext4_over_a_linear_device_leaves_processes_in_reach() {
    linear("6.12", "ext4", "container");
}

/// S38: what only the cache of a write cache had is lost with an error, and not read as something else.
fn write_cache(kernel: &str, via: &str) {
    let mut guest = boot(kernel, 1, &["ndctl", "dmsetup", "dd"]);
    guest.ok("ndctl create-namespace -f -e namespace0.0 -m fsdax -M mem");
    guest.until_ok("test -b /dev/pmem0 && modprobe dm_writecache", PMEM);
    map(&mut guest, "0 131072 writecache p /dev/vda /dev/pmem0 4096 0");
    guest.ok(&format!("yes cached | /usr/bin/dd of={MAPPED} bs=64K count=16 iflag=fullblock oflag=direct"));
    let read = |device| format!("/usr/bin/dd if={device} of=/tmp/read bs=4096 count=1 iflag=direct");
    let first = |device| format!("rm -f /tmp/read; {} 2>/dev/null && head -c 6 /tmp/read", read(device));
    assert_eq!(guest.ok(&first(MAPPED)), "cached");
    assert_ne!(guest.ok(&first("/dev/vda")), "cached", "only the cache has it");
    let before = guest.last_event();
    remove(&guest, via);
    let reply = guest.sh(&read(MAPPED));
    assert!(reply.status != 0 && reply.text.contains(EIO), "{reply:?}");
    assert!(guest.ok("dmsetup status m").contains("writecache 1 "), "it knows of an error");
    let after = guest.event(before, "removal", |event| event["step"] == "departed");
    let stale = guest.events_named(after["seq"].as_u64().expect("a number"), "stale_access");
    assert!(stale.is_empty(), "{stale:?}");
    end(guest);
}

#[test]
#[ignore = "wide"]
fn what_a_write_cache_lost_fails() {
    write_cache("6.12", "container");
}
