//! S28: memory is scrubbed before the kernel gets it as RAM (dax/kmem), or it is not.
//!
//! Expected: after `ndctl start-scrub` and `ndctl clear-errors` nothing of it is bad, and a process walks all of it. Without,
//! it becomes RAM all the same, since neither daxctl nor dax/kmem looks at bad blocks, and the first load of a bad line
//! is a machine check at exactly one of the lines that the scrub has listed.

use std::collections::BTreeSet;
use std::time::Duration;

use aconite_agent::workload::{Reply, Request, SIGBUS, Source};
use aconite_tests::machine::PMEM;
use aconite_tests::workload::Workload;
use aconite_tests::{Machine, Run};

/// How long a reconfiguration of a namespace, or of memory, may take.
const RECONFIGURE: Duration = Duration::from_secs(120);
/// What the process has of the memory: enough of it that it meets one of the bad lines.
const WALKED: u64 = 128 << 20;

fn long(guest: &mut Machine, script: &str) {
    let reply = guest.sh_within(script, RECONFIGURE);
    assert_eq!(reply.status, 0, "{script}: {}", reply.text);
}

/// A process all of whose memory is on node 1.
pub fn on_node_1(guest: &mut Machine) -> Workload {
    guest.ok(
        "mkdir -p /tmp/cg && mount -t cgroup2 none /tmp/cg && echo +cpuset > /tmp/cg/cgroup.subtree_control && \
         mkdir /tmp/cg/far && echo 1 > /tmp/cg/far/cpuset.mems",
    );
    let mut workload = Workload::start(guest, 0);
    assert!(matches!(workload.ask(guest, &Request::Process), Reply::Process(_)));
    guest.ok("cat /tmp/workload0 > /tmp/cg/far/cgroup.procs");
    workload
}

fn scrubbed(kernel: &str, clear: bool) {
    let dir = tempfile::tempdir().unwrap();
    let pmem = format!("file={},size=512M,id=p0,labels=init", dir.path().join("p0.img").display());
    let boot = || {
        let mut guest = Run::kernel(kernel).size(2, "1G").pmem(&pmem).tools(&["ndctl", "daxctl"]).shell();
        guest.ok("echo offline > /sys/devices/system/memory/auto_online_blocks");
        guest
    };
    let mut guest = boot();
    guest.until_ok("ndctl list -R | grep -q region0", PMEM);
    long(&mut guest, "ndctl create-namespace -r region0 -m devdax -M mem -s 384M");
    guest.finish("exit 0").assert_ended(0, "power_off");

    // Lines go bad while nobody looks: the machine that has them is another one, which does not know the name space.
    let guest = Run::kernel(kernel).size(1, "512M").pmem(&pmem).shell();
    guest.ctl(&["poison", "add", "p0", "--every", "8M", "--within", "0x4000000+192M"]);
    let listed = guest.ctl(&["poison", "list", "p0"]);
    let ranges = listed["ranges"].as_array().unwrap();
    let bad: BTreeSet<u64> = ranges
        .iter()
        .map(|range| {
            u64::from_str_radix(range["offset"].as_str().unwrap().trim_start_matches("0x"), 16).unwrap()
        })
        .collect();
    assert_eq!(bad.len(), 24, "{listed}");
    guest.ctl(&["quit"]);
    guest.wait(Duration::from_secs(60));

    let mut guest = boot();
    guest.until_ok("test -c /dev/dax0.0", PMEM);
    if clear {
        guest.ok("ndctl start-scrub && ndctl wait-scrub");
        guest.until_ok("test $(wc -l < /sys/bus/nd/devices/region0/badblocks) = 24", PMEM);
        long(&mut guest, "ndctl clear-errors namespace0.0");
        guest.until_ok("test -c /dev/dax0.0", PMEM);
        assert_eq!(guest.device("p0")["poisoned"], 0);
    }
    guest.ok("modprobe kmem");
    long(&mut guest, "daxctl reconfigure-device -m system-ram dax0.0");
    guest.until_ok("grep -q '^Node 1' /proc/buddyinfo", PMEM);
    let mut workload = on_node_1(&mut guest);
    let before = guest.last_event();
    let replies =
        workload.ask_all(&mut guest, &[Request::Map(Source::Anonymous(WALKED)), Request::Scan(0, WALKED)]);
    let trapped = guest.events_named(before, "poison_trapped");
    let met: Vec<&serde_json::Value> = trapped.iter().filter(|event| event["device"] == "p0").collect();
    if clear {
        assert_eq!(replies[1], Reply::Compared { good: WALKED / 8, bad: 0 }, "{replies:?}");
        assert_eq!((met.len(), guest.events_named(before, "mce_delivered").len()), (0, 0));
    } else {
        assert!(
            replies.iter().any(|reply| matches!(reply, Reply::Signal(signal) if signal.number == SIGBUS)),
            "{replies:?} {trapped:?}"
        );
        let first = met.iter().find(|event| event["decision"] == "machine_check").unwrap();
        let offset =
            u64::from_str_radix(first["offset"].as_str().unwrap().trim_start_matches("0x"), 16).unwrap();
        assert!(bad.contains(&(offset & !63)), "{offset:#x}: {bad:x?}");
    }
    guest.ctl(&["quit"]);
    guest.wait(Duration::from_secs(60));
}

#[test]
#[ignore = "wide"]
fn what_was_scrubbed_and_cleared_is_good_ram() {
    scrubbed("6.12", true);
}

#[test]
#[ignore = "wide"]
fn what_was_scrubbed_and_cleared_is_good_ram_on_6_1() {
    scrubbed("6.1", true);
}

#[test]
#[ignore = "wide"]
fn what_was_scrubbed_and_cleared_is_good_ram_on_7() {
    scrubbed("7.x", true);
}

#[test]
#[ignore = "wide"]
fn what_was_not_scrubbed_kills_who_meets_it() {
    scrubbed("6.12", false);
}
