//! Disks: what is written is there, in the guest and on the host, whatever happens to single requests.

use std::fs;
use std::os::unix::fs::FileExt;

use aconite_tests::Run;
use aconite_tests::machine::{Machine, PMEM};
use serde_json::json;

/// Programs that the tests need in the guest.
const TOOLS: [&str; 5] = ["mkfs.ext4", "e2fsck", "dd", "fstrim", "blkdiscard"];

/// A guest with two vCPUs and the disk `d0`.
fn guest(kernel: &str, disk: &str) -> Machine {
    let mut guest = Run::kernel(kernel).size(2, "768M").args(["--disk", disk]).tools(&TOOLS).shell();
    guest.until_ok("test -b /dev/vda", PMEM);
    guest
}

/// A file system is made, used with and without the page cache, trimmed and checked; the host finds the bytes.
fn used(kernel: &str) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("d0.img");
    let mut guest = guest(kernel, &format!("file={},size=256M", file.display()));
    assert_eq!(guest.ok("cat /sys/block/vda/serial; ls /sys/block/vda/mq | wc -l"), "d02");
    guest.ok("mkfs.ext4 -q /dev/vda && mkdir -p /mnt && mount -t ext4 /dev/vda /mnt");
    guest.ok("dd if=/dev/urandom of=/tmp/data bs=1M count=8 2>/dev/null && cp /tmp/data /mnt/copied && sync");
    guest.ok("echo 3 > /proc/sys/vm/drop_caches && cmp /tmp/data /mnt/copied");
    guest.ok("dd if=/tmp/data of=/mnt/direct bs=1M oflag=direct 2>/dev/null");
    guest.ok("dd if=/mnt/direct of=/tmp/back bs=64K iflag=direct 2>/dev/null && cmp /tmp/data /tmp/back");
    guest.ok("rm /mnt/copied && fstrim /mnt && umount /mnt && e2fsck -fn /dev/vda");
    // The driver goes and comes again: the device is reset, and everything is there.
    guest.ok("cd /sys/bus/virtio/drivers/virtio_blk && ls -d virtio* > /tmp/name && cat /tmp/name > unbind && ! test -b /dev/vda");
    guest.ok("cat /tmp/name > /sys/bus/virtio/drivers/virtio_blk/bind && test -b /dev/vda");
    guest.ok("mount -t ext4 /dev/vda /mnt && cmp /tmp/data /mnt/direct && umount /mnt");
    guest.ok("yes the last sector | head -c 512 | dd of=/dev/vda seek=524287 conv=fsync,notrunc 2>/dev/null");
    guest.ok("/usr/sbin/blkdiscard -z -o 1M -l 64K /dev/vda && dd if=/dev/vda skip=1M bs=64K count=1 iflag=skip_bytes 2>/dev/null | cmp -n 65536 - /dev/zero");
    guest.finish("exit 0").assert_ended(0, "power_off");
    let mut last = [0; 17];
    fs::File::open(&file).unwrap().read_exact_at(&mut last, (256 << 20) - 512).unwrap();
    assert_eq!(&last, b"the last sector\nt");
}

#[test]
fn a_file_system_is_used() {
    used("6.12");
}

#[test]
#[ignore = "wide"]
fn a_file_system_is_used_on_6_1() {
    used("6.1");
}

#[test]
#[ignore = "wide"]
fn a_file_system_is_used_on_7() {
    used("7.x");
}

/// Each fault does to requests what it says, and the guest sees it; a disk that is read-only stays as it is.
#[test]
fn requests_fail_are_torn_wait_and_are_reordered() {
    let mut guest = guest("6.12", "size=64M");
    guest.ok("yes old | head -c 4096 | dd of=/dev/vda bs=4096 oflag=direct 2>/dev/null");
    guest.ok("yes new | head -c 4096 > /tmp/new");
    let overwrite = "dd if=/tmp/new of=/dev/vda bs=4096 oflag=direct";
    let first = "dd if=/dev/vda bs=4096 count=1 iflag=direct 2>/dev/null";

    let before = guest.last_event();
    let armed =
        guest.ctl(&["disk", "fail", "d0", "--operation", "write", "--sectors", "0+8", "--count", "1"]);
    assert_eq!(armed["number"], 1);
    let reply = guest.sh(overwrite);
    assert!(reply.status != 0 && reply.text.contains("Input/output error"), "{reply:?}");
    assert_eq!(guest.ok(&format!("{first} | head -n 1")), "old");
    let told = guest.event(before, "disk_completed", |_| true);
    assert_eq!(
        (&told["device"], &told["operation"], &told["sector"], &told["bytes"], &told["status"]),
        (&json!("d0"), &json!("write"), &json!(0), &json!(4096), &json!("io_error"))
    );
    assert_eq!(told["memory"], "ram");

    guest.ctl(&["disk", "tear", "d0", "2048", "--operation", "write", "--status", "ok", "--count", "1"]);
    guest.ok(overwrite);
    assert_eq!(guest.ok(&format!("{first} | sort | uniq -c | tr -s \" \"")), " 512 new\n 512 old");

    guest.ctl(&["disk", "delay", "d0", "2s", "--operation", "read", "--count", "1"]);
    let took = guest.ok("time -p dd if=/dev/vda of=/dev/null bs=4096 count=1 iflag=direct");
    assert!(took.contains("real 2."), "{took}");
    guest.finish("exit 0").assert_ended(0, "power_off");
}
