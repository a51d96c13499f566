//! Poison is exact whatever holds the bytes of a device.

use aconite_tests::machine::PMEM;
use aconite_tests::{Machine, Run, aconite};
use serde_json::json;
use std::fs;
use std::path::Path;
use std::process::{Output, Stdio};

/// Makes file systems below the directory that is its argument, in the software KVM host, where the machine runs that
/// finds them there. Its kernel's modules are among the fetched ones.
const MAKE: &str = r#"
set -e
modules=$(echo "$ACONITE_MATERIAL"/kernels/*/lib/modules/"$(uname -r)"/kernel)
tools=$ACONITE_MATERIAL/tools
run() { program=$1; shift; "$tools/usr/lib64/ld-linux-x86-64.so.2" --library-path "$tools/usr/lib/x86_64-linux-gnu" "$program" "$@"; }
load() {
    grep -q "^$(basename "$1") " /proc/modules && return
    for file in "$modules/$1".ko*; do
        case $file in *.xz) xz -dc "$file" ;; *) cat "$file" ;; esac > /run/module
        "$tools/bin/busybox" insmod /run/module
    done
}
for module in drivers/block/loop lib/crc16 crypto/crc32c_generic lib/libcrc32c fs/mbcache fs/jbd2/jbd2 fs/ext4/ext4 \
    fs/xfs/xfs; do load $module; done
cd "$1"
mount -t tmpfs tmpfs images
truncate -s 400M images/ext4 images/xfs
run "$tools/sbin/mkfs.ext4" -q -F images/ext4
run "$tools/sbin/mkfs.xfs" -q images/xfs
mount -o loop images/ext4 ext4
mount -o loop images/xfs xfs
mount -t tmpfs -o huge=always tmpfs tmpfs
# The guest of another test has memory of this host, too: huge pages are there when it leaves some in one piece.
looks=0
until echo 40 > /proc/sys/vm/nr_hugepages; test "$(cat /proc/sys/vm/nr_hugepages)" -ge 40; do
    echo 3 > /proc/sys/vm/drop_caches
    echo 1 > /proc/sys/vm/compact_memory
    sleep 1; looks=$((looks + 1)); test $looks -lt 60
done
mount -t hugetlbfs -o pagesize=2M hugetlbfs hugetlbfs
"#;

const UNMAKE: &str = r#"
cd "$1"
umount -l ext4 xfs tmpfs hugetlbfs images
echo 0 > /proc/sys/vm/nr_hugepages
"#;

fn inside(script: &str, dir: &Path) -> Output {
    let mut command = aconite();
    command.args(["__inside", "sh", "-c", script, "sh"]).arg(dir).stdin(Stdio::null());
    command.output().unwrap()
}

/// The file systems; they go with the value.
struct FileSystems<'a>(&'a Path);

impl<'a> FileSystems<'a> {
    fn make(dir: &'a Path) -> Self {
        for name in ["images", "ext4", "xfs", "tmpfs", "hugetlbfs"] {
            fs::create_dir(dir.join(name)).unwrap();
        }
        let made = Self(dir);
        let output = inside(MAKE, dir);
        assert!(output.status.success(), "{output:?}");
        made
    }
}

impl Drop for FileSystems<'_> {
    fn drop(&mut self) {
        inside(UNMAKE, self.0);
    }
}

/// What a device is made of.
struct Device {
    id: &'static str,
    /// The file, or none for memory without one.
    file: Option<&'static str>,
    /// MiB, which nothing else in the guest has.
    size: u64,
    readonly: bool,
    /// Small pages that one bad line takes out of reach.
    guarded: u64,
}

const fn device(id: &'static str, file: &'static str, size: u64) -> Device {
    Device { id, file: Some(file), size, readonly: false, guarded: 1 }
}

const DEVICES: [Device; 7] = [
    device("shared", "p.img", 64),
    device("ext4", "ext4/p.img", 66),
    device("xfs", "xfs/p.img", 68),
    device("tmpfs", "tmpfs/p.img", 70),
    Device { guarded: 512, ..device("hugetlbfs", "hugetlbfs/p.img", 72) },
    Device { readonly: true, ..device("readonly", "r.img", 74) },
    Device { id: "memory", file: None, size: 76, readonly: false, guarded: 1 },
];

fn sector(guest: &mut Machine, disk: &str, sector: u64) -> bool {
    let read =
        guest.sh(&format!("/usr/bin/dd if={disk} of=/tmp/s bs=512 count=1 skip={sector} iflag=direct 2>&1"));
    if read.status != 0 {
        assert!(read.text.contains("Input/output error"), "{read:?}");
        return false;
    }
    guest.ok(&format!(
        "/usr/bin/dd if=/tmp/pattern of=/tmp/e bs=512 count=1 skip={sector} 2>/dev/null; cmp /tmp/s /tmp/e"
    ));
    true
}

fn exact(guest: &mut Machine, device: &Device) {
    let Device { id, size, .. } = *device;
    let name = guest.until_ok(
        &format!(
            "for d in /sys/block/pmem*; do test $(cat $d/size) = {} && echo ${{d##*/}}; done | grep .",
            size << 11
        ),
        PMEM,
    );
    let disk = format!("/dev/{}", name.trim());
    if !device.readonly {
        guest.ok(&format!("/usr/bin/dd if=/tmp/pattern of={disk} bs=65536 oflag=direct 2>/dev/null"));
    }
    let before = guest.last_event();
    let added = guest.ctl(&["poison", "add", id, "0x5240+64"]);
    assert_eq!(added["guard"]["guarded_pages"], device.guarded, "{id}: {added}");
    assert_eq!(added["guard"]["clean_guarded_pages"], device.guarded - 1, "{id}: {added}");
    // The line is in sector 41; the others of its page, and those around the page, are as they were.
    for (number, good) in
        [(39, true), (40, true), (41, false), (42, true), (47, true), (48, true), (127, true)]
    {
        assert_eq!(sector(guest, &disk, number), good, "{id}: sector {number}");
    }
    let check = guest.event(before, "poison_trapped", |event| event["decision"] == "machine_check");
    assert_eq!((&check["device"], &check["offset"]), (&json!(id), &json!("0x5240")), "{check}");
    guest.until_ok(&format!("test \"$(cat /sys/block/{}/badblocks)\" = '41 1'", name.trim()), PMEM);
    if device.readonly {
        guest.ctl(&["poison", "clear", id]);
    } else {
        guest.ok(&format!(
            "/usr/bin/dd if=/tmp/pattern of={disk} bs=4096 count=1 seek=5 skip=5 oflag=direct 2>/dev/null"
        ));
        guest.event(before, "poison_cleared", |event| event["by"] == "guest");
        assert!(sector(guest, &disk, 41), "{id}: repaired");
    }
    let state = guest.ctl(&["poison", "list", id]);
    assert_eq!((&state["bytes"], &state["guard"]["guarded_pages"]), (&json!(0), &json!(0)), "{id}");
}

#[test]
fn poison_is_exact_on_every_backing() {
    let dir = tempfile::tempdir().unwrap();
    let made = FileSystems::make(dir.path());
    let pattern: Vec<u8> = (0..20_000).flat_map(|n| format!("{n}\n").into_bytes()).take(65536).collect();
    let mut read_only = pattern.clone();
    read_only.resize(74 << 20, 0);
    fs::write(dir.path().join("r.img"), read_only).unwrap();
    let mut run = Run::new().size(1, "512M").tools(&["dd"]).args(["--slots", "nfit=1,size=256M"]);
    for Device { id, file, size, readonly, .. } in DEVICES {
        let file = file.map(|file| format!(",file={}", dir.path().join(file).display())).unwrap_or_default();
        let readonly = if readonly { ",readonly=on" } else { "" };
        run = run.pmem(&format!("id={id},size={size}M{file}{readonly}"));
    }
    let mut guest = run.shell();
    guest.scrubbed();
    guest.ok("seq 0 19999 | head -c 65536 > /tmp/pattern");
    for device in &DEVICES {
        exact(&mut guest, device);
    }

    // 40 huge pages were made, and 36 are taken.
    let many = dir.path().join("hugetlbfs/q.img");
    let error = guest.ctl_refused(&["insert", "pmem", &format!("id=q,size=64M,file={}", many.display())]);
    let words = error.to_string();
    assert!(
        words.contains("32 huge pages of 0x200000 bytes") && words.contains("vm.nr_hugepages"),
        "{words}"
    );
    guest.finish("exit 0").assert_ended(0, "power_off");
    drop(made);
}
