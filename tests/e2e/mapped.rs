//! A mapped file on a DAX file system: SIGBUS at the bad line, its repair, and loads and stores after the device has
//! gone.

use aconite_agent::workload::{Reply, Request, Signal, Source, pattern};
use aconite_tests::machine::PMEM;
use aconite_tests::workload::Workload;
use aconite_tests::{Machine, Run};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::time::Duration;

const FILE: &str = "/mnt/file";
const LENGTH: u64 = 1 << 20;
/// How long a kernel may take to let go of a device with a mounted file system.
pub const REMOVAL: Duration = Duration::from_secs(180);
/// The bad line, in the file.
const LINE: u64 = 0x5240;
/// A word that is touched after the removal.
pub const WORD: u64 = 0x8100;

fn hex(value: &Value) -> u64 {
    let text = value.as_str().unwrap_or_else(|| panic!("{value} is no number in hexadecimal"));
    u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap()
}

/// Another one, in another page.
const OTHER: u64 = 0xA100;

/// A guest with a mapped file, and where things are.
pub struct Mapped {
    pub guest: Machine,
    workload: Workload,
    /// Virtual address of the file's first byte.
    pub mapping: u64,
    /// Guest-physical address of the device.
    gpa: u64,
    /// Offset of the bad line in the device.
    line: u64,
    /// Offset of the word in the device.
    pub word: u64,
}

impl Mapped {
    fn new(kernel: &str) -> Self {
        Self::on(kernel, "ext4")
    }

    /// On a file system, `ext4` or `xfs`.
    pub fn on(kernel: &str, file_system: &str) -> Self {
        Self::set_up(kernel, file_system, false)
    }

    /// The same, over a linear mapped device.
    pub fn on_linear(kernel: &str, file_system: &str) -> Self {
        Self::set_up(kernel, file_system, true)
    }

    fn set_up(kernel: &str, file_system: &str, linear: bool) -> Self {
        let (mkfs, options) = match file_system {
            "ext4" => ("mkfs.ext4 -q -b 4096", "dax=always,noinit_itable"),
            _ => ("mkfs.xfs -q -f -m rmapbt=1,reflink=0", "dax=always"),
        };
        let mut tools = vec!["ndctl", mkfs.split(' ').next().expect("a program")];
        tools.extend(linear.then_some("dmsetup"));
        let run = Run::kernel(kernel).size(2, "1G").pmem("size=1G,id=p0").tools(&tools);
        let mut guest = run.shell();
        guest.until_ok("test -b /dev/pmem0", PMEM);
        guest.ok("ndctl create-namespace -f -e namespace0.0 -m fsdax -M mem");
        guest.until_ok("test -b /dev/pmem0", PMEM);
        let mut device = "/dev/pmem0";
        if linear {
            device = "/dev/dm-0";
            let table = "0 $(cat /sys/block/pmem0/size) linear /dev/pmem0 0";
            guest.ok(&format!("dmsetup --noudevsync create m --table \"{table}\" && test -b {device}"));
        }
        guest.ok(&format!("{mkfs} {device} && mkdir -p /mnt"));
        guest.ok(&format!("mount -t {file_system} -o {options} {device} /mnt"));
        let mut workload = Workload::start(&mut guest, 0);
        let path = || PathBuf::from(FILE);
        let create = workload.ask(&mut guest, &Request::Create(path(), LENGTH));
        assert_eq!(create, Reply::Done);
        let Reply::At(mapping) = workload.ask(&mut guest, &Request::Map(Source::File(path()))) else {
            panic!("no mapping")
        };
        let start = guest.ok("cat /sys/block/pmem0/device/resource");
        let gpa = hex(&guest.device("p0")["gpa"]);
        let base = hex(&json!(start)) - gpa;
        let mut locate = |offset| match workload.ask(&mut guest, &Request::Locate(path(), offset)) {
            Reply::At(block) => base + block,
            other => panic!("{other}"),
        };
        let (line, word) = (locate(LINE), locate(WORD));
        Self { guest, workload, mapping, gpa, line, word }
    }

    #[track_caller]
    pub fn ask(&mut self, request: &Request) -> Reply {
        self.workload.ask(&mut self.guest, request)
    }

    #[track_caller]
    pub fn load(&mut self, offset: u64) -> (u64, u64) {
        match self.ask(&Request::Load(offset)) {
            Reply::Loaded { word, rip } => (word, rip),
            other => panic!("loading {offset:#x}: {other}"),
        }
    }
}

/// A process that loads a bad line gets SIGBUS with the right address and instruction, and nothing else is amiss.
fn signal_and_repair(at: &mut Mapped) {
    let path = || PathBuf::from(FILE);
    assert_eq!(at.ask(&Request::Scan(0, LENGTH)), Reply::Compared { good: LENGTH / 8, bad: 0 });
    let before = at.guest.last_event();
    at.guest.ctl(&["poison", "add", "p0", &format!("{:#x}+64", at.line)]);
    assert_eq!(at.load(LINE - 8).0, pattern(LINE - 8), "the line before");
    assert_eq!(at.load(LINE + 64).0, pattern(LINE + 64), "the line after");
    assert_eq!(at.guest.events_named(before, "mce_delivered").len(), 0);

    let reply = at.ask(&Request::Load(LINE + 8));
    let Reply::Signal(Signal { rip, .. }) = reply else { panic!("no signal: {reply}") };
    assert!(matches!(&reply, Reply::Signal(signal) if signal.is_poison_at(at.mapping + LINE)), "{reply}");
    let trap = at.guest.event(before, "poison_trapped", |event| event["decision"] == "machine_check");
    assert_eq!(
        (hex(&trap["rip"]), hex(&trap["va"]), hex(&trap["gpa"])),
        (rip, at.mapping + LINE + 8, at.gpa + at.line + 8),
        "{trap}"
    );
    assert_eq!(
        (&trap["cpl"], &trap["bytes"], &trap["direction"]),
        (&json!(3), &json!(8), &json!("read")),
        "{trap}"
    );
    let check = at.guest.event(before, "mce_delivered", |_| true);
    assert_eq!((hex(&check["address"]), &check["vcpu"]), (at.gpa + at.line, &trap["vcpu"]), "{check}");
    at.guest.until_ok("dmesg | grep 'recovery action for dax page: Recovered'", Duration::from_secs(20));
    at.guest.until_ok("test -n \"$(cat /sys/block/pmem0/badblocks)\"", Duration::from_secs(20));

    // read(2) of the sector fails, and a write of the page brings it back.
    let sector = LINE / 512 * 512;
    assert_eq!(at.ask(&Request::Read(path(), sector, 512)), Reply::Errno(5));
    let page = LINE / 4096 * 4096;
    assert_eq!(at.ask(&Request::Write(path(), page, 4096)), Reply::Done);
    let cleared = at.guest.event(before, "poison_cleared", |event| event["by"] == "guest");
    assert_eq!(hex(&cleared["ranges"][0]["offset"]), at.line);
    assert_eq!(at.ask(&Request::Read(path(), page, 4096)), Reply::Compared { good: 512, bad: 0 });
    assert_eq!(at.load(LINE + 8).0, pattern(LINE + 8), "the mapping is good again");
    assert_eq!(at.guest.ok("cat /sys/block/pmem0/badblocks"), "");
}

/// The device goes while the file is mapped: loads through the old mapping give ones, stores land nowhere, and each
/// is reported as it was. Linux up to 6.19 leaves such mappings in place.
fn removed_under_the_mapping(at: &mut Mapped) {
    for word in [WORD, OTHER] {
        assert_eq!(at.load(word).0, pattern(word));
    }
    let before = at.guest.last_event();
    // The kernel writes back what it has: each store to what is not there is trapped and dropped.
    let patience = format!("{}s", REMOVAL.as_secs());
    at.guest.ctl(&["remove", "p0", "--surprise", "--timeout", &patience, "--wait", &patience]);
    at.guest.ok("! test -b /dev/pmem0");

    let (word, rip) = at.load(WORD);
    assert_eq!(word, u64::MAX, "what is not there reads as ones");
    let stale = at.guest.event(before, "stale_access", |event| event["cpl"] == 3);
    assert_eq!(
        (hex(&stale["rip"]), hex(&stale["va"]), hex(&stale["gpa"]), hex(&stale["offset"])),
        (rip, at.mapping + WORD, at.gpa + at.word, at.word),
        "{stale}"
    );
    assert_eq!(
        (&stale["device"], &stale["bytes"], &stale["direction"], &stale["count"]),
        (&json!("p0"), &json!(8), &json!("read"), &json!(1)),
        "{stale}"
    );
    assert_ne!(hex(&stale["cr3"]), 0, "{stale}");
    let counted = at.guest.device("p0")["stale_accesses"].as_u64().unwrap();
    assert_eq!(at.load(WORD).0, u64::MAX);
    assert!(at.guest.device("p0")["stale_accesses"].as_u64().unwrap() > counted, "every touch is counted");

    match at.ask(&Request::Store(WORD, 0x1234)) {
        // The page is writable still: the store is dropped.
        Reply::Done => {
            let stale = at
                .guest
                .event(before, "stale_access", |event| event["cpl"] == 3 && event["direction"] == "write");
            assert_eq!((hex(&stale["va"]), &stale["bytes"]), (at.mapping + WORD, &json!(8)), "{stale}");
        }
        // The kernel had write-protected it, and now knows that nothing is there.
        Reply::Signal(signal) => assert_eq!(signal.number, aconite_agent::workload::SIGBUS),
        other => panic!("{other}"),
    }
    assert_eq!(at.load(WORD).0, u64::MAX);
}

/// What a touch of the departed device is answered with is chosen while the machine runs: a machine check ends a load,
/// stores still go nowhere; a pause comes behind the load.
fn answered_otherwise(at: &mut Mapped) {
    let answer = |at: &Mapped, answer| at.guest.ctl(&["stale", "p0", "--answer", answer]);
    let before = at.guest.last_event();
    answer(at, "machine-check");
    let reply = at.ask(&Request::Load(WORD));
    let Reply::Signal(signal) = reply else { panic!("no signal: {reply}") };
    assert_eq!(signal.number, aconite_agent::workload::SIGBUS);
    let check = at.guest.event(before, "mce_delivered", |_| true);
    assert_eq!(hex(&check["address"]), (at.gpa + at.word) & !63, "{check}");
    let stale = at.guest.event(before, "stale_access", |event| event["cpl"] == 3);
    assert_eq!((hex(&stale["va"]), hex(&stale["rip"])), (at.mapping + WORD, signal.rip), "{stale}");
    assert_eq!(at.guest.events_named(before, "poison_trapped"), Vec::<Value>::new());

    // The kernel has taken the page away from the process, so another one pauses the machine.
    let before = at.guest.last_event();
    answer(at, "pause");
    at.workload.tell(&mut at.guest, &Request::Load(OTHER));
    let stale = at.guest.event(before, "stale_access", |event| event["cpl"] == 3);
    assert_eq!(hex(&stale["va"]), at.mapping + OTHER, "{stale}");
    at.guest.event(before, "paused", |_| true);
    assert_eq!(at.guest.ctl(&["info"])["state"], "paused");
    answer(at, "ones");
    at.guest.ctl(&["resume"]);
    assert_eq!(at.load(OTHER).0, u64::MAX);
}

/// Both parts in one boot. The machine is ended from outside: these kernels oops when they unmount what is gone.
fn story(kernel: &str) {
    let mut at = Mapped::new(kernel);
    signal_and_repair(&mut at);
    removed_under_the_mapping(&mut at);
    answered_otherwise(&mut at);
    at.guest.ctl(&["quit"]);
    let ended = at.guest.wait(Duration::from_secs(60));
    assert_eq!(ended.result()["cause"], "quit");
    let devices = &ended.result()["memory"];
    assert!(devices[0]["stale_accesses"].as_u64() >= Some(3), "{devices}");
}

#[test]
fn signal_repair_and_removal() {
    story("6.12");
}

#[test]
fn signal_repair_and_removal_on_6_1() {
    story("6.1");
}

#[test]
fn signal_and_repair_on_7() {
    let mut at = Mapped::new("7.x");
    signal_and_repair(&mut at);
    at.guest.finish("exit 0").assert_ended(0, "power_off");
}
