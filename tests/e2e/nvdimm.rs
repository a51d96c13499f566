//! Persistent memory as stock kernels see it: regions, nodes, alignment; and what it keeps.

use aconite_tests::environment::{fetched_program, kernel_image};
use aconite_tests::machine::PMEM;
use aconite_tests::{Machine, Run, aconite, wait_for};
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

const GIB: u64 = 1 << 30;

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// Two devices are two regions with these sizes, each on a NUMA node of its own, at addresses at which Linux can
/// use its largest pages.
fn regions_and_nodes(guest: &mut Machine) {
    guest.until_ok("test -b /dev/pmem0 && test -b /dev/pmem1", PMEM);
    let regions = json(&guest.ok("ndctl list -R"));
    let regions = regions.as_array().expect("a list of two");
    let sizes: BTreeSet<u64> = regions.iter().map(|region| region["size"].as_u64().unwrap()).collect();
    assert_eq!((regions.len(), sizes), (2, BTreeSet::from([GIB, GIB / 2])), "{regions:?}");
    assert!(regions.iter().all(|region| region["type"] == "pmem"), "{regions:?}");
    let mut nodes = BTreeSet::new();
    for region in 0..2 {
        let path = format!("/sys/bus/nd/devices/region{region}");
        let of_region = guest.ok(&format!("cd {path}; cat size resource"));
        let numbers: Vec<&str> = of_region.lines().collect();
        let size: u64 = numbers[0].parse().unwrap();
        let base = u64::from_str_radix(numbers[1].trim_start_matches("0x"), 16).unwrap();
        assert_eq!(base % GIB, 0, "region{region} is at {base:#x}");
        let device = guest.device(if size == GIB { "p0" } else { "p1" });
        assert_eq!(device["gpa"], format!("{base:#x}"), "guest and monitor mean the same");
        nodes.insert(
            guest.ok(&format!("cat {path}/target_node 2>/dev/null || ls -d {path}/dax*/target_node")),
        );
    }
    assert_eq!(nodes.len(), 2, "each device is its own target node: {nodes:?}");
    assert!(!nodes.contains("0") && !nodes.contains("-1"), "{nodes:?}");
}

#[test]
fn two_devices_are_two_regions() {
    let run = Run::new().size(2, "1G").pmem("size=1G,id=p0").pmem("size=512M,id=p1").tools(&["ndctl"]);
    let mut guest = run.shell();
    regions_and_nodes(&mut guest);
    // Firmware's tables as the guest has them are those that the monitor wrote down.
    guest.ok("ls /sys/firmware/acpi/tables/NFIT");
    guest.finish("exit 0").assert_ended(0, "power_off");
}

fn resident(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}

#[test]
fn data_outlives_the_monitor() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("p0.img");
    let pmem = format!("file={},size=512M,id=p0", file.display());
    let machine = || Run::new().size(2, "1G").pmem(&pmem).tools(&["mkfs.ext4", "ndctl"]);
    let mut guest = machine().shell();
    guest.until_ok("test -b /dev/pmem0", PMEM);
    guest.ok("ndctl create-namespace -f -e namespace0.0 -m fsdax -M mem");
    guest.until_ok("test -b /dev/pmem0", PMEM);
    guest.ok(
        "mkfs.ext4 -q -b 4096 /dev/pmem0 && mkdir -p /mnt && mount -t ext4 -o dax=always /dev/pmem0 /mnt",
    );
    guest.ok("seq 100000 > /mnt/numbers && mkdir /mnt/dir && sync && sha256sum /mnt/numbers");
    let sum = guest.ok("sha256sum < /mnt/numbers");

    // Another process cannot have the same file meanwhile.
    let other = machine().output(&["true"]);
    assert_eq!(other.code(), Some(125), "{}", other.stderr);
    assert!(other.stderr.contains(file.to_str().unwrap()), "{}", other.stderr);
    assert!(!other.has_event("machine_started"));
    let refused = guest.ctl_refused(&["insert", "pmem", &pmem.replace("id=p0", "id=p9")]);
    assert_ne!(refused["code"], "internal", "{refused}");

    guest.signal("KILL");
    let ended = guest.wait(Duration::from_secs(30));
    assert_eq!(ended.signal(), Some(9));
    // What the guest had synced is in the file, and the file is free as soon as the monitor is gone.
    wait_for("the end of the killed monitor", Duration::from_secs(30), || {
        let locked =
            Command::new("flock").args(["--nonblock", "--exclusive"]).arg(&file).arg("true").status();
        locked.is_ok_and(|status| status.success()).then_some(())
    });
    assert!(resident(&file) > 1 << 20 && resident(&file) < 200 << 20, "{}", resident(&file));

    let mut guest = machine().shell();
    guest.until_ok("test -b /dev/pmem0", PMEM);
    guest.ok("mkdir -p /mnt && mount -t ext4 -o dax=always /dev/pmem0 /mnt && test -d /mnt/dir");
    assert_eq!(guest.ok("sha256sum < /mnt/numbers"), sum);
    guest.finish("umount /mnt; exit $?").assert_ended(0, "power_off");
}

#[test]
fn a_read_only_device_is_not_written() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("p0.img");
    fs::File::create(&file).unwrap().set_len(256 << 20).unwrap();
    let mut guest = Run::new().pmem(&format!("file={},id=p0,readonly=on", file.display())).shell();
    guest.until_ok("test -b /dev/pmem0", PMEM);
    assert_eq!(guest.ok("cat /sys/block/pmem0/ro"), "1");
    assert_ne!(guest.sh("dd if=/dev/urandom of=/dev/pmem0 bs=4096 count=1 conv=fsync").status, 0);
    assert_eq!(guest.ok("head -c 4096 /dev/pmem0 | tr -d '\\000' | wc -c"), "0");
    guest.finish("exit 0").assert_ended(0, "power_off");
    assert_eq!(resident(&file), 0, "nothing was written");
}

#[test]
fn tables_are_those_that_iasl_reads() {
    let dir = tempfile::tempdir().unwrap();
    let machine = ["--cpus", "2", "--memory", "1G", "--pmem", "size=1G,id=p0", "--slots", "nfit=2,size=1G"];
    let status = aconite()
        .args(["tables", "-k"])
        .arg(kernel_image("6.12"))
        .args(machine)
        .arg("-o")
        .arg(dir.path())
        .status()
        .unwrap();
    assert!(status.success());
    let names: BTreeSet<String> = fs::read_dir(dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    for name in ["RSDP", "XSDT", "FACP", "APIC", "MCFG", "SRAT", "SLIT", "DSDT", "NFIT"] {
        assert!(names.contains(&format!("{name}.dat")), "{name} is missing in {names:?}");
    }
    // The root pointer has no header that iasl knows.
    for name in names.iter().filter(|name| *name != "RSDP.dat") {
        assert_decoded(&dir.path().join(name));
    }

    let mut guest = Run::new().args(machine).tools(&["ndctl"]).shell();
    for name in names.iter().map(|name| name.trim_end_matches(".dat")) {
        // The kernel shows neither the root pointer nor the list of tables.
        if ["RSDP", "XSDT"].contains(&name) {
            continue;
        }
        let inside = guest.ok(&format!("sha256sum < /sys/firmware/acpi/tables/{name}"));
        let outside = Command::new("sha256sum")
            .stdin(fs::File::open(dir.path().join(format!("{name}.dat"))).unwrap())
            .output()
            .unwrap();
        assert_eq!(inside, String::from_utf8_lossy(&outside.stdout).trim(), "{name} of the guest");
    }
    guest.finish("exit 0").assert_ended(0, "power_off");
}

/// iasl takes the table apart without an error, and finds its checksum right.
fn assert_decoded(table: &Path) {
    let output = fetched_program("iasl").arg("-d").arg(table).output().expect("iasl of the material");
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let wrong = ["Error", "Incorrect checksum", "Invalid", "Could not"];
    let complaint = text.lines().find(|line| wrong.iter().any(|word| line.contains(word)));
    assert!(output.status.success() && complaint.is_none(), "{}: {text}", table.display());
    assert!(table.with_extension("dsl").is_file(), "{text}");
}

/// A sparse file as large as half of 40 address bits costs nothing until it is touched. A raw namespace has page
/// structs for all of its memory (8 GiB for 512), so its driver is kept from it; a region needs none, and device DAX
/// can keep them in the device itself.
#[test]
fn half_a_terabyte_is_sparse() {
    const SIZE: u64 = 512 * GIB;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("large.img");
    let run = Run::new()
        .pmem(&format!("file={},size=512G,id=p0", file.display()))
        .args(["--append", "modprobe.blacklist=nd_pmem module_blacklist=nd_pmem"])
        .tools(&["ndctl"]);
    let mut guest = run.shell();
    guest.until_ok("test \"$(cat /sys/bus/nd/devices/region0/size)\" = 549755813888", PMEM);
    let regions = json(&guest.ok("ndctl list -R"));
    assert_eq!(regions[0]["size"], SIZE, "{regions}");
    let device = guest.device("p0");
    assert_eq!(device["size"], SIZE);
    // The last line can be poisoned, and the firmware finds it there.
    let before = guest.last_event();
    guest.ctl(&["poison", "add", "p0", &format!("{:#x}+64", SIZE - 64)]);
    guest.ctl(&["notify", "p0", "uncorrectable"]);
    let sector = format!("{} 1", SIZE / 512 - 1);
    guest.until_ok(&format!("test \"$(cat /sys/bus/nd/devices/region0/badblocks)\" = \"{sector}\""), PMEM);
    assert_eq!(guest.events_named(before, "mce_delivered"), Vec::<Value>::new());
    guest.finish("exit 0").assert_ended(0, "power_off");
    assert_eq!(fs::metadata(&file).unwrap().len(), SIZE);
    assert!(resident(&file) < 16 << 20, "{} bytes are on the disk", resident(&file));
}
