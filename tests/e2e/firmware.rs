//! What stock ndctl makes of the firmware of NVDIMMs, and what of it outlives the machine.

use std::fs;

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
