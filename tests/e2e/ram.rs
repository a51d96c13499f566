//! Poison of plain RAM: the process that loads it dies of it or lives with it, and the rest of the machine goes on.

use aconite_agent::pagemap::Piece;
use aconite_agent::workload::{Reply, Request, Source, pattern};
use aconite_tests::workload::Workload;
use aconite_tests::{Machine, Run, aconite};
use serde_json::json;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

/// A file of the guest's, in its RAM.
const FILE: &str = "/tmp/victim";
/// Bytes of the file.
const LENGTH: u64 = 0x10000;
/// The bad line, in the file.
const LINE: u64 = 0x3240;

#[track_caller]
pub fn physical(guest: &mut Machine, pid: u32, va: u64) -> u64 {
    let line = guest.ok(&format!("aconite-agent pagemap {pid} {va:#x} 64"));
    line.parse::<Piece>().unwrap_or_else(|error| panic!("{error}")).gpa
}

/// Maps a file in RAM all of which can be read. Its address and the process.
#[track_caller]
pub fn victim(guest: &mut Machine, workload: &mut Workload) -> (u64, u32) {
    let path = || PathBuf::from(FILE);
    assert_eq!(workload.ask(guest, &Request::Create(path(), LENGTH)), Reply::Done);
    let Reply::At(mapping) = workload.ask(guest, &Request::Map(Source::File(path()))) else {
        panic!("no mapping")
    };
    let all_good = Reply::Compared { good: LENGTH / 8, bad: 0 };
    assert_eq!(workload.ask(guest, &Request::Scan(0, LENGTH)), all_good);
    let Reply::Process(pid) = workload.ask(guest, &Request::Process) else { panic!("no process") };
    (mapping, pid)
}

#[track_caller]
pub fn hardware_corrupted(guest: &mut Machine) -> u64 {
    let line = guest.ok("grep HardwareCorrupted /proc/meminfo");
    line.split_whitespace().nth(1).and_then(|number| number.parse().ok()).unwrap_or_else(|| panic!("{line}"))
}

#[test]
fn a_process_loads_poisoned_ram() {
    let mut guest = Run::new().size(2, "512M").pmem("size=256M,id=p0").shell();
    let mut workload = Workload::start(&mut guest, 0);
    let (mapping, pid) = victim(&mut guest, &mut workload);
    let gpa = physical(&mut guest, pid, mapping + LINE);
    assert_eq!(gpa % 4096, LINE % 4096);
    assert_eq!(hardware_corrupted(&mut guest), 0);

    // What is not RAM is refused by the name of what is there, and nothing of the request is done.
    let p0 = guest.device("p0")["gpa"].as_str().unwrap().to_owned();
    for (address, words) in
        [(p0.as_str(), "byte 0x0 of p0"), ("0xc0000000", "ECAM"), ("0x30000000", "nothing")]
    {
        let error = guest.ctl_refused(&["poison", "add", "ram", &format!("{gpa:#x}+64"), address]);
        assert_eq!(error["code"], "outside_device", "{error}");
        assert!(error["message"].as_str().is_some_and(|text| text.contains(words)), "{error}");
    }
    assert_eq!(guest.ctl(&["poison", "list", "ram"])["ranges"], json!([]));

    // The monitor has the agent look up where that is; what cannot be looked up is refused in words.
    let before = guest.last_event();
    let va = format!("{:#x}+64", mapping + LINE);
    let added = guest.ctl(&["poison", "add", "--pid", &pid.to_string(), "--va", &va]);
    let placed = &added["placed"][0];
    assert_eq!(placed["armed"], json!([{"offset": format!("{gpa:#x}"), "length": 64}]), "{added}");
    assert_eq!(placed["device"], "ram", "{added}");
    for (pid, va, words) in [(999_999, va.as_str(), "no process"), (pid, "0x1000", "no page in memory")] {
        let error = guest.ctl_refused(&["poison", "add", "--pid", &pid.to_string(), "--va", va]);
        assert_eq!(error["code"], "guest_refused", "{error}");
        assert!(error["message"].as_str().is_some_and(|text| text.contains(words)), "{error}");
    }
    assert_eq!(guest.ctl(&["info"])["memory_poisoned"], 64);
    // The page's other lines are as they were.
    for at in [LINE - 8, LINE + 64] {
        let reply = workload.ask(&mut guest, &Request::Load(at));
        assert!(matches!(reply, Reply::Loaded { word, .. } if word == pattern(at)), "{reply:?}");
    }
    assert!(guest.events_named(before, "mce_delivered").is_empty(), "no poison was loaded yet");

    let Reply::Signal(signal) = workload.ask(&mut guest, &Request::Load(LINE + 8)) else {
        panic!("no signal")
    };
    assert!(signal.is_poison_at(mapping + LINE), "{signal:?}");
    assert_eq!(signal.lsb, 12);
    let trap = guest.event(before, "poison_trapped", |event| event["decision"] == "machine_check");
    assert_eq!((&trap["device"], &trap["cpl"]), (&json!("ram"), &json!(3)), "{trap}");
    assert_eq!(trap["offset"], json!(format!("{:#x}", gpa + 8)), "{trap}");
    assert_eq!(trap["gpa"], trap["offset"], "an offset in RAM is a guest-physical address");
    assert_eq!(trap["rip"], json!(format!("{:#x}", signal.rip)), "{trap}");
    let check = guest.event(before, "mce_delivered", |_| true);
    assert_eq!(check["address"], json!(format!("{gpa:#x}")), "{check}");

    // Linux takes the page out of use: the next load meets Linux's own mark and no hardware.
    guest.until_ok("grep -q 'HardwareCorrupted: *4 kB' /proc/meminfo", Duration::from_secs(20));
    let checks = guest.events_named(before, "mce_delivered").len();
    let Reply::Signal(signal) = workload.ask(&mut guest, &Request::Load(LINE - 8)) else {
        panic!("no signal")
    };
    assert!(signal.is_poison_at(mapping + LINE), "{signal:?}");
    assert_eq!(guest.events_named(before, "mce_delivered").len(), checks, "the page was not touched");
    let log = guest.ok("dmesg");
    assert!(log.contains("Memory failure") && log.contains("Recovered"), "{log}");

    let cleared = guest.ctl(&["poison", "clear", "ram", &format!("{gpa:#x}+64")]);
    assert_eq!(cleared["cleared"], json!([{"offset": format!("{gpa:#x}"), "length": 64}]));
    assert_eq!(guest.ctl(&["poison", "list", "ram"])["ranges"], json!([]));
    guest.finish("exit 0").assert_ended(0, "power_off");
}

/// Bad RAM stays bad with `--state`, whatever becomes of the monitor, until it is replaced.
#[test]
fn bad_ram_outlives_its_machine() {
    // A part of RAM that the kernel leaves alone, so that nobody but the test meets the line.
    const PART: &str = "memmap=64K$0x18000000";
    const LINE: &str = "0x18000040";
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let boot = || {
        let run = Run::new().size(1, "512M").args(["--state".as_ref(), state.as_os_str()]);
        run.args(["--cmdline", PART]).shell()
    };
    let bad = json!([{"offset": LINE, "length": 64}]);
    let mut guest = boot();
    guest.ok("true");
    assert_eq!(guest.ctl(&["poison", "list", "ram"])["ranges"], json!([]));
    guest.ctl(&["poison", "add", "ram", LINE]);
    guest.signal("KILL");
    drop(guest);

    let mut guest = boot();
    let before = guest.last_event();
    assert_eq!(guest.ctl(&["poison", "list", "ram"])["ranges"], bad);
    assert_eq!(guest.ctl(&["info"])["memory_poisoned"], 64);
    assert_ne!(guest.sh(&format!("busybox devmem {LINE} 64")).status, 0, "a bad line was read");
    let trap = guest.event(before, "poison_trapped", |event| event["decision"] == "machine_check");
    assert_eq!((&trap["device"], &trap["offset"]), (&json!("ram"), &json!(LINE)), "{trap}");
    guest.finish("exit 0").assert_ended(0, "power_off");

    let mut guest = boot();
    assert_eq!(guest.ctl(&["poison", "clear", "ram"])["cleared"], bad);
    guest.ok(&format!("busybox devmem {LINE} 64"));
    guest.finish("exit 0").assert_ended(0, "power_off");

    let mut guest = boot();
    guest.ok("true");
    assert_eq!(guest.ctl(&["poison", "list", "ram"])["ranges"], json!([]));
    guest.finish("exit 0").assert_ended(0, "power_off");
}

/// Bytes of the monitor's own memory, and of its page tables, which guards by marks need.
#[track_caller]
fn own_memory(guest: &Machine) -> u64 {
    let info = guest.ctl(&["info"]);
    let status = format!("/proc/{}/status", info["pid"]);
    let text = if info["host"] == "nested" {
        let output = aconite().args(["__inside", "cat", &status]).stdin(Stdio::null()).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    } else {
        std::fs::read_to_string(&status).unwrap()
    };
    let field = |name: &str| {
        let line = text.lines().find(|line| line.starts_with(name));
        let number = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
        number.unwrap_or_else(|| panic!("no {name} in {text}")) << 10
    };
    field("RssAnon:") + field("VmPTE:")
}

/// A hundred thousand lines in one request, however they lie; the guest reads all around them, and they go as they came.
#[test]
fn a_hundred_thousand_lines() {
    const LINES: u64 = 100_000;
    let mut guest = Run::new().size(2, "512M").pmem("size=1G,id=p0").tools(&["dd"]).shell();
    guest.until_ok("test -b /dev/pmem0", aconite_tests::machine::PMEM);
    guest.scrubbed();
    let count = LINES.to_string();
    let base = own_memory(&guest);
    for (name, arguments) in [
        ("packed", vec!["--every", "64", "--within", "0x10000000+6400000"]),
        ("one in two pages", vec!["--every", "8192", "--within", "0x200000+819200000"]),
        ("at random", vec!["--count", count.as_str(), "--seed", "5"]),
    ] {
        let before = guest.last_event();
        let start = std::time::Instant::now();
        let mut add = vec!["poison", "add", "p0"];
        add.extend(&arguments);
        let added = guest.ctl(&add);
        let taken = start.elapsed();
        let lengths =
            added["armed"].as_array().expect("ranges").iter().map(|range| range["length"].as_u64().unwrap());
        assert_eq!(lengths.sum::<u64>(), LINES * 64, "{name}");
        let event = guest.event(before, "poison_added", |_| true);
        assert_eq!(event["bytes"], LINES * 64);
        assert!(event["ranges"].as_array().is_some_and(|ranges| ranges.len() <= 64), "an event is small");
        let grown = own_memory(&guest).saturating_sub(base);
        eprintln!("{name}: {taken:?}, guard {}, {} KiB more", added["guard"], grown >> 10);
        assert!(grown < 32 << 20, "{name}: {grown} bytes more");

        // The list comes in pages.
        let mut from = "0x0".to_owned();
        let mut listed = 0;
        loop {
            let page = guest.ctl(&["poison", "list", "p0", "--from", &from, "--limit", "40000"]);
            listed += page["ranges"]
                .as_array()
                .map_or(0, |r| r.iter().map(|r| r["length"].as_u64().unwrap()).sum::<u64>());
            match page["next"].as_str() {
                Some(next) => from = next.to_owned(),
                None => break,
            }
        }
        assert_eq!(listed, LINES * 64, "{name}");
        let device = guest.device("p0");
        assert_eq!(device["poisoned"], LINES * 64);
        let cleared = guest.ctl(&["poison", "clear", "p0"]);
        assert_eq!(cleared["device"], "p0");
        let state = guest.ctl(&["poison", "list", "p0"]);
        assert_eq!((&state["bytes"], &state["guard"]["guarded_pages"]), (&json!(0), &json!(0)), "{name}");
        assert_eq!(state["guard"]["method"], "protection");
        guest.ok("/usr/bin/dd if=/dev/pmem0 of=/dev/null bs=1M count=32 skip=256 iflag=direct 2>/dev/null");
        assert!(guest.events_named(before, "mce_delivered").is_empty(), "{name}");
    }
    guest.finish("exit 0").assert_ended(0, "power_off");
}
