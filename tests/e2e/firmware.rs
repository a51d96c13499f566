//! What stock ndctl makes of the firmware of NVDIMMs, and what of it outlives the machine.

use std::fs;
use std::time::Duration;

use aconite_tests::machine::PMEM;
use aconite_tests::{Machine, Run};
use serde_json::Value;

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// A name space of each mode is made, and all are there and whole after the next start.
#[test]
fn namespaces_survive_in_labels() {
    let dir = tempfile::tempdir().unwrap();
    let (intel, acpi) = (dir.path().join("intel.img"), dir.path().join("acpi.img"));
    let machine = || {
        Run::new()
            .size(2, "1G")
            .pmem(&format!("file={},size=1G,id=p0,labels=init", intel.display()))
            .pmem(&format!("file={},size=512M,id=p1,labels=init,family=msft", acpi.display()))
            .tools(&["ndctl", "mkfs.ext4"])
    };
    let mut guest = machine().shell();
    let (intel_region, acpi_region) = (region(&mut guest, 1 << 30), region(&mut guest, 512 << 20));
    for (region, mode) in [
        (&intel_region, "-m fsdax -M dev"),
        (&intel_region, "-m sector"),
        (&intel_region, "-m devdax -M mem"),
        (&intel_region, "-m raw"),
        (&acpi_region, "-m fsdax -M mem"),
        (&acpi_region, "-m devdax -M dev"),
    ] {
        guest.ok(&format!("ndctl create-namespace -r {region} {mode} -s 128M"));
    }
    let labels = guest.ok("ndctl check-labels all 2>&1");
    assert!(labels.contains("successfully verified 2 nmem labels"), "{labels}");
    let made = namespaces(&mut guest);
    assert_eq!(made.len(), 6, "{made:?}");
    let block = made.iter().find(|n| n["mode"] == "fsdax" && n["map"] == "dev").unwrap()["blockdev"].clone();
    let block = block.as_str().unwrap();
    guest.ok(&format!(
        "mkfs.ext4 -q /dev/{block} && mkdir -p /mnt && mount /dev/{block} /mnt && echo kept > /mnt/f"
    ));
    guest.finish("umount /mnt; exit $?").assert_ended(0, "power_off");
    for file in ["intel.img.aconite", "acpi.img.aconite"] {
        assert!(dir.path().join(file).is_file(), "{file}");
    }

    let mut guest = machine().shell();
    guest.until_ok("test $(ndctl list -N | grep -c uuid) = 6", PMEM);
    let again = namespaces(&mut guest);
    let uuids =
        |list: &[Value]| list.iter().map(|n| (n["uuid"].clone(), n["mode"].clone())).collect::<Vec<_>>();
    assert_eq!(uuids(&again), uuids(&made));
    let kept = again.iter().find(|n| n["mode"] == "fsdax" && n["map"] == "dev").unwrap();
    let block = kept["blockdev"].as_str().unwrap();
    assert_eq!(guest.ok(&format!("mkdir -p /mnt && mount /dev/{block} /mnt && cat /mnt/f")), "kept");
    guest.ok("umount /mnt; ndctl destroy-namespace -f all");
    guest.finish("exit 0").assert_ended(0, "power_off");

    // A side file that was cut short is refused by name, and stays.
    let side = dir.path().join("intel.img.aconite");
    let cut = fs::read(&side).unwrap();
    fs::write(&side, &cut[..cut.len() - 1]).unwrap();
    let refused = machine().output(&["true"]);
    assert_eq!(refused.code(), Some(125), "{}", refused.stderr);
    assert!(refused.stderr.contains(side.to_str().unwrap()), "{}", refused.stderr);
    assert_eq!(fs::read(&side).unwrap().len(), cut.len() - 1);
}

/// A namespace of each mode is listed as what it was made as, and nothing is left of it when it is destroyed.
fn come_and_go(kernel: &str) {
    const REGION: u64 = 512 << 20;
    const NAMESPACE: u64 = 128 << 20;
    let run = Run::kernel(kernel).size(2, "1G").pmem("size=512M,id=p0,labels=init").tools(&["ndctl"]);
    let mut guest = run.shell();
    let region = region(&mut guest, REGION);
    let listed = |guest: &mut Machine| {
        let list = json(&guest.ok("ndctl list -RN"));
        // A list of regions, which has a name as soon as there are namespaces.
        list.get("regions").unwrap_or(&list)[0].clone()
    };
    let empty = listed(&mut guest);
    assert!(empty["available_size"] == REGION && empty["namespaces"].is_null(), "{empty}");
    let mut sizes = Vec::new();
    for (mode, map) in [
        ("raw", None),
        ("sector", None),
        ("fsdax", Some("mem")),
        ("fsdax", Some("dev")),
        ("devdax", Some("mem")),
        ("devdax", Some("dev")),
    ] {
        let map_option = map.map_or(String::new(), |map| format!("--map={map}"));
        guest.ok(&format!("ndctl create-namespace -r {region} --mode={mode} {map_option} -s 128M"));
        let with = listed(&mut guest);
        assert_eq!(with["available_size"], REGION - NAMESPACE, "{with}");
        let [made] = &with["namespaces"].as_array().expect("a list")[..] else { panic!("{with}") };
        assert_eq!((made["mode"].as_str(), made["map"].as_str()), (Some(mode), map), "{made}");
        sizes.push(made["size"].as_u64().unwrap());
        let node = &made[if mode == "devdax" { "chardev" } else { "blockdev" }];
        guest.until_ok(&format!("test -e /dev/{}", node.as_str().unwrap()), PMEM);

        guest.ok(&format!("ndctl destroy-namespace -f {}", made["dev"].as_str().unwrap()));
        assert_eq!(listed(&mut guest), empty, "{mode} {map_option}");
        guest.until_ok("! ls /dev | grep -q -e ^pmem -e ^dax", PMEM);
    }
    let [raw, sector, mem, dev, devdax_mem, devdax_dev] = sizes[..] else { panic!("{sizes:?}") };
    assert_eq!((raw, devdax_mem, devdax_dev), (NAMESPACE, mem, dev));
    assert!(sector < raw && dev < mem && mem < raw, "{sizes:?}");
    let labels = guest.ok("ndctl check-labels all 2>&1");
    assert!(labels.contains("successfully verified 1 nmem label"), "{labels}");
    guest.finish("exit 0").assert_ended(0, "power_off");
}

#[test]
fn namespaces_of_each_mode_come_and_go() {
    come_and_go("6.12");
}

#[test]
#[ignore = "wide"]
fn namespaces_of_each_mode_come_and_go_on_6_1() {
    come_and_go("6.1");
}

#[test]
#[ignore = "wide"]
fn namespaces_of_each_mode_come_and_go_on_7() {
    come_and_go("7.x");
}

/// Errors that the guest and the API injected are there after the monitor was killed, are known before anyone reads
/// them, and go once they are cleared; so is the health that was injected.
#[test]
fn poison_and_health_survive_a_kill() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("p0.img");
    let pmem = format!("file={},size=512M,id=p0", file.display());
    let machine = || Run::new().size(2, "1G").pmem(&pmem).tools(&["ndctl"]);
    let mut guest = machine().shell();
    guest.until_ok("test -b /dev/pmem0", PMEM);
    let injected = json(&guest.ok("ndctl inject-error -B 12 -n 8 namespace0.0"));
    assert_eq!(injected["badblocks"][0]["offset"], 12, "{injected}");
    assert_eq!(injected["badblocks"][0]["dimms"][0], "nmem0", "{injected}");
    guest.ctl(&["poison", "add", "p0", "0x10000+64"]);
    let health = json(&guest.ok("ndctl inject-smart -m 45 -s 4 nmem0"));
    assert_eq!(health[0]["health"]["alarm_spares"], true, "{health}");
    guest.signal("KILL");
    guest.wait(Duration::from_secs(30));

    let mut guest = machine().shell();
    guest.until_ok("test \"$(cat /sys/block/pmem0/badblocks | tr '\\n' ' ')\" = '12 8 128 1 '", PMEM);
    let read = |guest: &mut Machine| {
        guest.sh("dd if=/dev/pmem0 of=/dev/null bs=512 skip=12 count=1 iflag=direct").status
    };
    assert_ne!(read(&mut guest), 0, "a bad sector is not read");
    let health = json(&guest.ok("ndctl list -DH"));
    assert_eq!(health[0]["health"]["temperature_celsius"], 45.0, "{health}");
    assert_eq!(health[0]["health"]["spares_percentage"], 4, "{health}");
    guest.ok("ndctl clear-errors namespace0.0");
    guest.until_ok("test -b /dev/pmem0 && test -z \"$(cat /sys/block/pmem0/badblocks)\"", PMEM);
    assert_eq!(read(&mut guest), 0);
    assert_eq!(guest.device("p0")["poisoned"], 0);
    guest.finish("exit 0").assert_ended(0, "power_off");
}

/// `ndctl monitor` hears of health that crosses a threshold; new firmware is sent, armed, and activated in a live
/// machine, or by the next start.
fn health_and_firmware(kernel: &str) {
    let dir = tempfile::tempdir().unwrap();
    let pmem = format!("file={},size=512M,id=p0", dir.path().join("p0.img").display());
    let boot = || {
        let mut guest = Run::kernel(kernel).size(2, "1G").pmem(&pmem).tools(&["ndctl"]).shell();
        guest.until_ok("test -b /dev/pmem0", PMEM);
        guest
    };
    let version = |guest: &mut Machine, which: &str| {
        json(&guest.ok("ndctl list -DF"))[0]["firmware"][which].as_u64().unwrap_or(0)
    };
    let mut guest = boot();
    guest.ok("(ndctl monitor -l /tmp/monitor.log -D all >/dev/null 2>&1 &) && sleep 3");
    guest.ok("ndctl inject-smart -m 99 nmem0");
    let line = guest.until_ok("grep dimm-media-temperature /tmp/monitor.log", PMEM);
    let heard = json(line.lines().next().unwrap());
    assert_eq!(heard["event"]["dimm-media-temperature"], true, "{heard}");
    assert_eq!(heard["event"]["dimm-spares-remaining"], false, "{heard}");
    assert_eq!(heard["dimm"]["health"]["temperature_celsius"], 99.0, "{heard}");
    let events = guest.events_named(0, "notify_sent");
    assert!(events.iter().any(|event| event["kind"] == "health"), "{events:?}");

    let old = version(&mut guest, "current_version");
    guest.ok("seq 60000 > /tmp/firmware");
    guest.ok("ndctl update-firmware -f /tmp/firmware nmem0 2>&1");
    let next = version(&mut guest, "next_version");
    assert_ne!(next, old);
    assert_eq!(version(&mut guest, "current_version"), old, "it waits");
    guest.ok("ndctl activate-firmware ndbus0 2>&1");
    assert_eq!(version(&mut guest, "current_version"), next, "activated while the machine runs");
    guest.ok("seq 70000 > /tmp/firmware");
    guest.ok("ndctl update-firmware -f /tmp/firmware nmem0 2>&1");
    let later = version(&mut guest, "next_version");
    guest.finish("exit 0").assert_ended(0, "power_off");

    let mut guest = boot();
    assert_eq!(version(&mut guest, "current_version"), later, "activated by the start");
    guest.finish("exit 0").assert_ended(0, "power_off");
}

#[test]
fn health_is_monitored_and_firmware_activated() {
    health_and_firmware("6.12");
}

#[test]
#[ignore = "wide"]
fn health_is_monitored_and_firmware_activated_on_6_1() {
    health_and_firmware("6.1");
}

#[test]
#[ignore = "wide"]
fn health_is_monitored_and_firmware_activated_on_7() {
    health_and_firmware("7.x");
}

/// The region of this size.
fn region(guest: &mut Machine, size: u64) -> String {
    guest.until_ok(&format!("grep -qx {size} /sys/bus/nd/devices/region*/size"), PMEM);
    let regions = json(&guest.ok("ndctl list -R"));
    let found = regions.as_array().and_then(|regions| regions.iter().find(|region| region["size"] == size));
    found.unwrap_or_else(|| panic!("{regions}"))["dev"].as_str().unwrap().to_owned()
}

/// All namespaces, sorted.
fn namespaces(guest: &mut Machine) -> Vec<Value> {
    let mut list = json(&guest.ok("ndctl list -N")).as_array().cloned().unwrap_or_default();
    list.sort_by_key(|namespace| namespace["uuid"].to_string());
    list
}
