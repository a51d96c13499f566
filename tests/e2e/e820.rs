//! Memory devices that only the E820 map tells of.
//!
//! | type | expected of Linux | seen |
//! |---|---|---|
//! | 12 | "Persistent Memory (legacy)": nd_e820 makes a region of it, whose name space has DAX without labels | as expected; on 6.1 it is `pmem1`, since `memregion_alloc()` gives the soft-reserved one its number first |
//! | 7 | "Persistent Memory" in `/proc/iomem`, and no driver: Linux looks for an NFIT that says more | as expected |
//! | soft | "Soft Reserved": dax_hmem makes a DAX device of it on the node that SRAT gives it, and dax/kmem RAM | as expected; 7.x does not list it in `/proc/iomem` before a driver has it, and 6.1 gives it to device_dax, until it is asked for RAM |

use aconite_tests::Run;
use aconite_tests::machine::PMEM;

fn described(kernel: &str) {
    let mut guest = Run::kernel(kernel)
        .size(2, "1G")
        .pmem("size=512M,id=p0,via=e820")
        .pmem("size=128M,id=p1,via=e820,type=7")
        .pmem("size=256M,id=p2,via=e820,type=soft")
        .tools(&["ndctl", "daxctl", "mkfs.ext4"])
        .shell();
    let list = guest.ctl(&["memory"]);
    let devices = list["memory"].as_array().unwrap().clone();
    let range = |id: &str| {
        let device = devices.iter().find(|device| device["id"] == id).unwrap();
        assert_eq!((&device["via"], &device["channel"]), (&"e820".into(), &"none".into()), "{device}");
        let start =
            u64::from_str_radix(device["gpa"].as_str().unwrap().trim_start_matches("0x"), 16).unwrap();
        format!("{start:x}-{:x}", start + device["size"].as_u64().unwrap() - 1)
    };
    let iomem = guest.ok("cat /proc/iomem");
    for (id, kind) in [("p0", "Persistent Memory (legacy)"), ("p1", "Persistent Memory")] {
        assert!(iomem.contains(&format!("{} : {kind}\n", range(id))), "{id}: {kind}: {iomem}");
    }

    // Its name space has struct pages without being made anew, and its poison is a machine check as anywhere.
    guest.until_ok("test -b /dev/pmem?", PMEM);
    let block = guest.ok("basename /dev/pmem*");
    assert_eq!(guest.ok(&format!("cat /sys/block/{block}/size")), (512 * 2048).to_string());
    assert_eq!(guest.ok("ls /dev/pmem* | wc -l"), "1", "nothing drives type 7");
    guest.ok(&format!(
        "mkfs.ext4 -q -b 4096 /dev/{block} && mkdir -p /mnt && mount -t ext4 -o dax /dev/{block} /mnt"
    ));
    guest.ok("echo kept > /mnt/f && sync && grep -q kept /mnt/f && umount /mnt");
    guest.ctl(&["poison", "add", "p0", "0x8000000+64"]);
    let before = guest.last_event();
    let read = format!("dd if=/dev/{block} of=/dev/null bs=4096 skip=32768 count=1 iflag=direct");
    assert_ne!(guest.sh(&read).status, 0);
    guest.event(before, "poison_trapped", |event| event["device"] == "p0");

    // Set aside: a DAX device, on its own node, which becomes RAM.
    guest.until_ok("test -e /sys/bus/dax/devices/dax*.0", PMEM);
    let listed = guest.ok("cat /proc/iomem").contains(&format!("{} : Soft Reserved\n", range("p2")));
    assert_eq!(listed, kernel != "7.x");
    assert_eq!(guest.ok("cat /sys/bus/dax/devices/dax*.0/size"), (256u64 << 20).to_string());
    assert_eq!(guest.ok("cat /sys/bus/dax/devices/dax*.0/target_node"), "3");
    guest.ok("modprobe kmem");
    if kernel == "6.1" {
        guest.ok("daxctl reconfigure-device -N -m system-ram $(basename /sys/bus/dax/devices/dax*.0)");
    }
    guest.until_ok("grep -q 'System RAM (kmem)' /proc/iomem", PMEM);

    let refused = guest.ctl_refused(&["remove", "p0", "--surprise"]);
    assert_eq!(refused["code"], "not_supported", "{refused}");
    let refused = guest.ctl_refused(&["insert", "pmem", "size=128M,via=e820"]);
    assert_eq!(refused["code"], "invalid_config", "{refused}");
    guest.finish("exit 0").assert_ended(0, "power_off");
}

#[test]
fn memory_of_the_map_is_what_its_type_says() {
    described("6.12");
}

#[test]
#[ignore = "wide"]
fn memory_of_the_map_is_what_its_type_says_on_6_1() {
    described("6.1");
}

#[test]
#[ignore = "wide"]
fn memory_of_the_map_is_what_its_type_says_on_7() {
    described("7.x");
}
