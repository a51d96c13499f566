//! Several DIMMs and several ranges on one bus, as stock kernels and ndctl see them; nodes and tiers of memory; presets.

use aconite_tests::machine::PMEM;
use aconite_tests::{Machine, Run};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::Duration;

/// How long ndctl may take for all regions of a guest.
const LONG: Duration = Duration::from_secs(120);

fn parsed(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// What `ndctl list` with these options lists, an empty list where it says nothing.
fn listed(guest: &mut Machine, options: &str) -> Vec<Value> {
    let text = guest.sh_within(&format!("ndctl list {options}"), LONG).text;
    if text.trim().is_empty() { Vec::new() } else { parsed(&text).as_array().cloned().unwrap_or_default() }
}

/// Names of DIMMs by their handles.
fn dimms(guest: &mut Machine) -> BTreeMap<u64, String> {
    let list = listed(guest, "-Di");
    list.iter()
        .map(|dimm| (dimm["handle"].as_u64().unwrap(), dimm["dev"].as_str().unwrap().to_owned()))
        .collect()
}

/// An error at an address is an error of the right DIMM, and labels are on each of them over a power cycle.
fn interleaved(kernel: &str) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("p0.img");
    let pmem = format!("file={},size=512M,id=p0,dimms=4,interleave=512,labels=init", file.display());
    let machine = || Run::kernel(kernel).size(2, "1G").pmem(&pmem).tools(&["ndctl"]);
    let mut guest = machine().shell();
    guest.until_ok("test -d /sys/bus/nd/devices/region0 && test $(ndctl list -Di | grep -c nmem) = 4", PMEM);
    let names = dimms(&mut guest);
    assert_eq!(names.keys().copied().collect::<Vec<_>>(), [1, 2, 3, 4]);
    let region = &listed(&mut guest, "-BDRi")[0]["regions"][0];
    let mut positions: Vec<_> = region["mappings"]
        .as_array()
        .unwrap()
        .iter()
        .map(|mapping| {
            assert_eq!(mapping["length"], 128 << 20, "{mapping}");
            (mapping["position"].as_u64().unwrap(), mapping["dimm"].as_str().unwrap().to_owned())
        })
        .collect();
    positions.sort();
    assert_eq!(
        positions.into_iter().map(|(_, dimm)| dimm).collect::<Vec<_>>(),
        names.values().cloned().collect::<Vec<_>>()
    );

    guest.ok("ndctl create-namespace -r region0 -m raw -s 128M");
    guest.until_ok("test -b /dev/pmem0", PMEM);
    // A sector is a line: each is on the next DIMM.
    let start = hexadecimal(&guest.ok("cat /sys/bus/nd/devices/namespace0.0/resource"));
    let base = hexadecimal(guest.device("p0")["gpa"].as_str().unwrap());
    for sector in 0..4 {
        let offset = start - base + (8 + sector) * 512;
        guest.ctl(&["poison", "add", "p0", &format!("{offset:#x}+64")]);
    }
    guest.ctl(&["notify", "p0", "uncorrectable"]);
    guest.until_ok("grep -q '8 4' /sys/block/pmem0/badblocks", PMEM);
    for sector in 0..4u64 {
        let offset = start - base + (8 + sector) * 512;
        let expected = &names[&(1 + offset / 512 % 4)];
        guest.ctl(&["poison", "clear", "p0"]);
        guest.ok("ndctl clear-errors namespace0.0 >/dev/null");
        guest.until_ok("test -b /dev/pmem0", PMEM);
        guest.ok(&format!("ndctl inject-error -B {} -n 1 namespace0.0 >/dev/null", 8 + sector));
        let media = &listed(&mut guest, "-N -M")[0]["badblocks"];
        assert_eq!(media[0]["dimms"], json!([expected]), "sector {sector}: {media}");
    }
    guest.ok("ndctl clear-errors namespace0.0 >/dev/null");
    let uuid = listed(&mut guest, "-N")[0]["uuid"].clone();
    guest.finish("exit 0").assert_ended(0, "power_off");

    let mut guest = machine().shell();
    guest.until_ok("test -b /dev/pmem0", PMEM);
    assert_eq!(listed(&mut guest, "-N")[0]["uuid"], uuid);
    let verified = guest.ok("ndctl check-labels all 2>&1");
    assert!(verified.contains("successfully verified 4 nmem labels"), "{verified}");
    guest.finish("exit 0").assert_ended(0, "power_off");
}

fn hexadecimal(text: &str) -> u64 {
    u64::from_str_radix(text.trim().trim_start_matches("0x"), 16)
        .unwrap_or_else(|error| panic!("{error}: {text}"))
}

#[test]
fn an_error_is_on_the_right_dimm_of_a_set() {
    interleaved("6.12");
}

#[test]
#[ignore = "wide"]
fn an_error_is_on_the_right_dimm_of_a_set_on_6_1() {
    interleaved("6.1");
}

#[test]
#[ignore = "wide"]
fn an_error_is_on_the_right_dimm_of_a_set_on_7() {
    interleaved("7.x");
}

/// Devices of a bus are there together, with the DIMMs that they share, and go together.
#[test]
fn devices_of_a_bus_come_and_go_together() {
    let mut guest = Run::kernel("6.12")
        .size(2, "1G")
        .pmem("size=256M,id=p0,bus=b,dimms=x+y")
        .pmem("size=256M,id=p1,bus=b,dimms=y")
        .pmem("size=128M,id=p2,bus=b,range=volatile")
        .pmem("size=64M,id=p3,bus=b,flags=map_fail")
        .pmem("size=64M,id=q0")
        .tools(&["ndctl"])
        .shell();
    guest.until_ok("test $(ls /dev/pmem* | wc -l) = 4", PMEM);
    assert_eq!(listed(&mut guest, "-B").len(), 2);
    let types = guest.ok("cat /sys/bus/nd/devices/region*/devtype | sort | uniq -c | tr -s ' '");
    assert_eq!(types.lines().map(str::trim).collect::<Vec<_>>(), ["3 nd_pmem", "1 nd_volatile"]);
    let buses = listed(&mut guest, "-BDR");
    let bus = buses.iter().find(|bus| bus["dimms"].as_array().is_some_and(|dimms| dimms.len() == 3)).unwrap();
    let failed: Vec<_> =
        bus["dimms"].as_array().unwrap().iter().filter(|d| d["flag_failed_map"] == true).collect();
    assert_eq!(failed.len(), 1, "{bus}");
    // y is behind both persistent ranges.
    let mut used: BTreeMap<String, Vec<u64>> = BTreeMap::new();
    for mapping in bus["regions"]
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|region| region["mappings"].as_array().cloned().unwrap_or_default())
    {
        used.entry(mapping["dimm"].as_str().unwrap().to_owned())
            .or_default()
            .push(mapping["offset"].as_u64().unwrap());
    }
    let mut offsets: Vec<_> = used.into_values().collect();
    offsets.iter_mut().for_each(|offsets| offsets.sort());
    offsets.sort();
    assert_eq!(offsets, [vec![0], vec![0, 128 << 20]]);

    let refused = guest.ctl_refused(&["remove", "p1", "--surprise"]);
    assert_eq!(refused["code"], "not_supported", "{refused}");
    assert_eq!(refused["remedy"], "remove the bus (b)", "{refused}");
    let operation = guest.ctl(&["remove", "b", "--surprise", "--wait"]);
    assert_eq!(operation["state"], "done", "{operation}");
    guest.until_ok("test \"$(ls /dev/pmem* | wc -l)\" = 1", PMEM);
    for id in ["p0", "p1", "p2", "p3"] {
        assert_eq!(guest.device(id)["state"], "departed", "{id}");
    }
    assert_eq!(guest.device("q0")["state"], "present");
    let operation = guest.ctl(&["insert", "pmem", "size=128M,id=n0,at=p0,dimms=2", "--wait"]);
    assert_eq!(operation["state"], "done", "{operation}");
    guest.until_ok(
        "test \"$(ls /dev/pmem* | wc -l)\" = 2 && test $(ndctl list -Di | grep -c '\"nmem') = 3",
        PMEM,
    );
    guest.finish("exit 0").assert_ended(0, "power_off");
}

/// A device joins a bus that is there: Linux is told by Notify 0x80, reads `_FIT` again, keeps what it has and adds a region,
/// with a DIMM of its own and a share of one that the bus had. Errors of it are found, and it goes with the bus.
fn joining(kernel: &str) {
    let mut guest = Run::kernel(kernel)
        .size(2, "1G")
        .pmem("size=256M,id=p0,bus=b,dimms=x+y,labels=init")
        .args(["--slots", "nfit=2,size=256M,dimms=3"])
        .tools(&["ndctl"])
        .shell();
    guest.until_ok("ndctl list -R | grep -q region0", PMEM);
    guest.scrubbed();
    guest.ok("ndctl create-namespace -r region0 -m raw -s 128M");
    let before = listed(&mut guest, "-BDRN");
    let operation = guest.ctl(&["insert", "pmem", "size=128M,id=p1,bus=b,dimms=y+z,labels=init", "--wait"]);
    assert_eq!(operation["state"], "done", "{operation}");
    guest.until_ok("test -e /sys/bus/nd/devices/region1", PMEM);
    guest.until_ok("test $(ndctl list -Di | grep -c '\"nmem') = 3", PMEM);
    let after = listed(&mut guest, "-BDRN");
    assert_eq!((before.len(), after.len()), (1, 1), "one bus: {after:?}");
    let regions = after[0]["regions"].as_array().unwrap();
    assert_eq!(regions.len(), 2, "{after:?}");
    let old = regions.iter().find(|region| region["dev"] == "region0").unwrap();
    assert_eq!(old["namespaces"], before[0]["regions"][0]["namespaces"], "{after:?}");
    let log = guest.ok("dmesg");
    assert!(!log.contains("deletes entries") && !log.contains("failed to merge"), "{log}");
    let device = guest.device("p1");
    assert_eq!(device["bus"], "b", "{device}");
    let names: Vec<_> = device["dimms"].as_array().unwrap().iter().map(|d| d["name"].clone()).collect();
    assert_eq!(names, ["y", "z"], "{device}");

    guest.ctl(&["poison", "add", "p1", "0x100000+64"]);
    guest.ctl(&["notify", "p1", "uncorrectable"]);
    guest.until_ok("grep -q '^2048 1$' /sys/bus/nd/devices/region1/badblocks", PMEM);
    guest.ok("ndctl create-namespace -r region1 -m raw");

    let full = guest.ctl_refused(&["insert", "pmem", "size=128M,id=p2,bus=b"]);
    assert_eq!(full["code"], "no_free_slot", "{full}");
    assert_eq!(guest.ctl_refused(&["remove", "p1", "--surprise"])["remedy"], "remove the bus (b)");
    if kernel != "7.x" {
        let operation = guest.ctl(&["remove", "b", "--surprise", "--wait"]);
        assert_eq!(operation["state"], "done", "{operation}");
        guest.until_ok("! ls /sys/bus/nd/devices | grep -q region", PMEM);
    }
    guest.finish("exit 0").assert_ended(0, "power_off");
}

#[test]
fn a_device_joins_a_bus() {
    joining("6.12");
}

#[test]
#[ignore = "wide"]
fn a_device_joins_a_bus_on_6_1() {
    joining("6.1");
}

#[test]
#[ignore = "wide"]
fn a_device_joins_a_bus_on_7() {
    joining("7.x");
}

/// Memory of a device that becomes RAM is a node of its own, and a slower tier where the kernel knows tiers by HMAT.
fn tier(kernel: &str, tier: Option<&str>) {
    let run = Run::kernel(kernel).size(2, "1G").pmem("size=512M,id=p0,dimms=2").tools(&["ndctl", "daxctl"]);
    let mut guest = run.shell();
    guest.until_ok("test -b /dev/pmem0", PMEM);
    guest.ok("echo offline > /sys/devices/system/memory/auto_online_blocks");
    let made = guest.sh_within("ndctl create-namespace -f -e namespace0.0 -m devdax -M mem", LONG);
    assert_eq!(made.status, 0, "{}", made.text);
    guest.until_ok("test -c /dev/dax0.0", PMEM);
    assert_eq!(parsed(&guest.ok("daxctl list"))[0]["target_node"], 1);
    guest.ok("modprobe kmem");
    let made = guest
        .sh_within("daxctl reconfigure-device -m system-ram -N dax0.0 && daxctl online-memory dax0.0", LONG);
    assert_eq!(made.status, 0, "{}", made.text);
    guest.until_ok(
        "grep -q '^Node 1' /proc/buddyinfo || grep -qx 0-1 /sys/devices/system/node/has_memory",
        PMEM,
    );
    let latency = "/sys/devices/system/node/node1/access0/initiators/read_latency";
    assert_eq!(guest.ok(&format!("cat {latency}")), "300");
    if let Some(tier) = tier {
        let found = guest.ok("grep -lx 1 /sys/devices/virtual/memory_tiering/memory_tier*/nodelist");
        assert!(found.contains(&format!("/{tier}/")), "{found}");
    }
    guest.finish("exit 0").assert_ended(0, "power_off");
}

#[test]
fn memory_that_becomes_ram_has_its_node_and_tier() {
    // DRAM's distance is 576, of which 100 to 300 ns and 20 to 6 GB/s make ten times as much; a tier spans 128.
    tier("6.12", Some("memory_tier45"));
}

#[test]
#[ignore = "wide"]
fn memory_that_becomes_ram_has_its_node_and_tier_on_6_1() {
    // Without HMAT: every DAX device is five times as far as DRAM.
    tier("6.1", Some("memory_tier22"));
}

#[test]
#[ignore = "wide"]
fn memory_that_becomes_ram_has_its_node_and_tier_on_7() {
    tier("7.x", Some("memory_tier45"));
}

/// The shape of the kernel's mock, on the real driver.
fn like_the_mock(kernel: &str) {
    let run = Run::kernel(kernel).size(2, "1G").args(["--preset", "nfit_test"]).tools(&["ndctl"]);
    let mut guest = run.shell();
    guest.until_ok("test $(ls /dev/pmem* | wc -l) = 5", PMEM);
    let buses = listed(&mut guest, "-BDRNHMi");
    let mut shapes: Vec<_> = buses
        .iter()
        .map(|bus| {
            let of = |kind: &str| bus[kind].as_array().cloned().unwrap_or_default();
            let mut regions: Vec<_> = of("regions")
                .iter()
                .map(|region| {
                    let ways = region["mappings"].as_array().map_or(0, Vec::len);
                    (region["size"].as_u64().unwrap() >> 20, ways)
                })
                .collect();
            regions.sort();
            assert!(of("dimms").iter().all(|dimm| dimm["health"]["health_state"] == "ok"), "{bus}");
            (of("dimms").len(), regions)
        })
        .collect();
    shapes.sort();
    assert_eq!(shapes, [(2, vec![(4, 0), (32, 1)]), (5, vec![(32, 1), (32, 2), (64, 4)])]);
    let flags = guest.ok("cat /sys/bus/nd/devices/nmem*/nfit/flags | sort -u");
    assert!(flags.contains("save_fail restore_fail flush_fail not_armed"), "{flags}");
    assert!(flags.contains("map_fail"), "{flags}");
    guest.finish("exit 0").assert_ended(0, "power_off");
}

#[test]
fn the_preset_has_the_shape_of_the_mock() {
    like_the_mock("6.12");
}

#[test]
#[ignore = "wide"]
fn the_preset_has_the_shape_of_the_mock_on_6_1() {
    like_the_mock("6.1");
}

#[test]
#[ignore = "wide"]
fn the_preset_has_the_shape_of_the_mock_on_7() {
    like_the_mock("7.x");
}

#[test]
fn sixty_four_dimms_on_eight_buses_are_listed() {
    let run = Run::kernel("6.12").size(2, "1G").args(["--preset", "nvdimm64"]).tools(&["ndctl"]);
    let mut guest = run.shell();
    guest.until_ok("test $(ls /dev/pmem* | wc -l) = 8", PMEM);
    assert_eq!(listed(&mut guest, "-B").len(), 8);
    assert_eq!(listed(&mut guest, "-Di").len(), 64);
    assert!(listed(&mut guest, "-R").iter().all(|region| region["size"] == 512 << 20));
    guest.finish("exit 0").assert_ended(0, "power_off");
}
