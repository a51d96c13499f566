//! A disk's DMA into and out of a mapped file on a DAX file system, while the file loses its blocks or the device goes.
//!
//! The file system has no free block but those of the file, so whatever is made next has them. The request is held by
//! its memory ([`HOLD`]): the data moves when the test says so.
//!
//! | what the guest does meanwhile | 6.12, 7.x | 6.1 |
//! |---|---|---|
//! | truncates the file, or punches it | waits in `ext4_break_layouts()` (7.x: `dax_break_layout()` under it) until the request ends, and no longer | waits until the request ends, and on: a defect |
//! | makes a second file of the blocks | has them after that only: its bytes are its own | the same |
//!
//! The defect of 6.1 (seen in 6.1.176): `__bio_release_pages()` gives the pages back with `folio_put_refs()`, and not with
//! `put_page()`, which alone calls `__put_devmap_managed_page_refs()` and so `wake_up_var()`. Nobody tells who waits that
//! the count of the page has come down to 1. Whatever else wakes the process, like a signal, makes it look again.

use aconite_agent::workload::{Reply, Request, Source};
use aconite_tests::machine::{COMMAND, PMEM};
use aconite_tests::workload::Workload;
use aconite_tests::{Machine, Run};
use serde_json::json;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

const FILE: &str = "/mnt/file";
const SECOND: &str = "/mnt/second";
const LENGTH: u64 = 64 << 10;
const HOLD: [&str; 4] = ["disk", "hold", "d0", "--dax"];
/// Where it waits: in `ext4_break_layouts()`.
const PLACE: &str = "_break_layout";
/// How long the guest is watched waiting.
const WATCHED: Duration = Duration::from_secs(4);

struct Held {
    guest: Machine,
    workload: Workload,
    /// Number of the last event before the request.
    before: u64,
    /// Where the file's blocks are in its block device.
    blocks: Vec<u64>,
}

impl Held {
    /// A guest whose process waits for a held request into its mapped file, or out of it if `put`.
    fn new(kernel: &str, put: bool) -> Self {
        let run = Run::kernel(kernel).size(2, "1G").pmem("size=1G,id=p0").args(["--disk", "size=16M,id=d0"]);
        let mut guest = run.tools(&["ndctl", "mkfs.ext4", "dd", "fallocate", "truncate"]).shell();
        guest.until_ok("test -b /dev/pmem0 && test -b /dev/vda", PMEM);
        guest.ok("yes the disk | dd of=/dev/vda bs=64K count=1 iflag=fullblock oflag=direct 2>/dev/null");
        guest.ok("ndctl create-namespace -f -e namespace0.0 -m fsdax -M mem");
        guest.until_ok("test -b /dev/pmem0", PMEM);
        guest.ok("mkfs.ext4 -q -b 4096 -O ^has_journal -m 0 /dev/pmem0 8M && mkdir -p /mnt");
        guest.ok("mount -t ext4 -o dax=always,noinit_itable /dev/pmem0 /mnt");
        let mut workload = Workload::start(&mut guest, 0);
        let create = Request::Create(FILE.into(), LENGTH);
        assert_eq!(workload.ask(&mut guest, &create), Reply::Done);
        guest.ok("echo 0 > /sys/fs/ext4/pmem0/reserved_clusters");
        guest.ok("dd if=/dev/zero of=/mnt/filler bs=4096 2>/dev/null; sync; test $(stat -f -c %f /mnt) = 0");
        let map = Request::Map(Source::File(FILE.into()));
        assert!(matches!(workload.ask(&mut guest, &map), Reply::At(_)));
        let mut held = Self { before: guest.last_event(), blocks: Vec::new(), guest, workload };
        held.blocks = held.blocks_of(FILE);
        held.guest.ctl(&HOLD);
        let disk = PathBuf::from("/dev/vda");
        let request = match put {
            false => Request::Fetch(disk, 0, 0, LENGTH),
            true => Request::Put(disk, 0, 0, LENGTH),
        };
        held.workload.tell(&mut held.guest, &request);
        let told = held.guest.event(held.before, "disk_held", |_| true);
        let operation = if put { "write" } else { "read" };
        assert_eq!(
            (&told["device"], &told["operation"], &told["memory"], &told["sector"]),
            (&json!("d0"), &json!(operation), &json!("p0"), &json!(0)),
            "{told}"
        );
        held
    }

    fn blocks_of(&mut self, file: &str) -> Vec<u64> {
        let pages = (0..LENGTH).step_by(4096);
        let requests: Vec<_> = pages.map(|at| Request::Locate(PathBuf::from(file), at)).collect();
        let replies = self.workload.ask_all(&mut self.guest, &requests);
        replies
            .into_iter()
            .map(|reply| if let Reply::At(at) = reply { at } else { panic!("{reply}") })
            .collect()
    }

    /// Starts what must wait, and watches it wait for [`WATCHED`] in [`PLACE`].
    fn waits(&mut self, command: &str) {
        let script = format!(
            "rm -f /tmp/done; ({command}; echo $? > /tmp/done) > /tmp/said 2>&1 & echo $! > /tmp/waiter"
        );
        self.guest.ok(&script);
        let name = command.split(' ').next().unwrap_or_default();
        let waits = format!("! test -e /tmp/done && grep -q {PLACE} /proc/$(pidof {name})/stack");
        self.guest.until_ok(&waits, COMMAND);
        thread::sleep(WATCHED);
        self.guest.ok(&waits);
    }

    /// Lets the request go on, and it ends.
    fn released(&mut self) {
        let released = self.guest.ctl(&["disk", "release", "d0"]);
        assert_eq!(
            (released["requests"].as_array().map(Vec::len), &released["faults"]),
            (Some(1), &json!([1]))
        );
        let told = self.guest.event(self.before, "disk_released", |_| true);
        assert!(told["held_ns"].as_u64().unwrap() > WATCHED.as_nanos() as u64, "{told}");
        let completed = self.guest.event(self.before, "disk_completed", |_| true);
        assert_eq!(completed["status"], "ok");
    }

    /// What waited ends.
    fn ends(&mut self) {
        let done = "test -e /tmp/done || { cat /proc/$(pidof truncate fallocate)/stack; false; }";
        self.guest.until_ok(done, COMMAND);
        assert_eq!(self.guest.ok("cat /tmp/done /tmp/said"), "0");
    }

    /// The request has ended, and who waited for it is not told; a signal that changes nothing makes it look.
    fn is_not_told(&mut self) {
        thread::sleep(WATCHED);
        self.guest
            .ok(&format!("! test -e /tmp/done && grep -q {PLACE} /proc/$(pidof truncate fallocate)/stack"));
        self.guest.ok("kill -STOP $(pidof truncate fallocate); kill -CONT $(pidof truncate fallocate)");
        self.ends();
    }

    /// How it is after the release, by kernel.
    fn ends_on(&mut self, kernel: &str) {
        match kernel {
            "6.1" => self.is_not_told(),
            _ => self.ends(),
        }
    }

    /// The reply to what was asked first.
    fn result(&mut self) -> Reply {
        // The workload answers in order: what it is asked now comes after.
        let last = self.workload.ask(&mut self.guest, &Request::Process);
        assert!(matches!(last, Reply::Process(_)));
        let line = self.guest.ok("grep called /tmp/replies0");
        Reply::parse(&line).unwrap()
    }

    /// A second file is made of the blocks that the first one had, and has its own bytes.
    fn second_file(&mut self) {
        let create = Request::Create(SECOND.into(), LENGTH);
        assert_eq!(self.workload.ask(&mut self.guest, &create), Reply::Done);
        let blocks = self.blocks_of(SECOND);
        assert!(
            blocks.iter().all(|block| self.blocks.contains(block)),
            "{blocks:x?} are not of {:x?}",
            self.blocks
        );
        self.guest.ok("echo 3 > /proc/sys/vm/drop_caches");
        let read = self.workload.ask(&mut self.guest, &Request::Read(SECOND.into(), 0, LENGTH));
        assert_eq!(read, Reply::Compared { good: LENGTH / 8, bad: 0 });
        assert!(self.guest.events_named(0, "stale_dma").is_empty());
    }
}

/// A truncation waits as long as a read of the disk into the file is held, and then the blocks are free.
fn truncated(kernel: &str) {
    let mut held = Held::new(kernel, false);
    held.waits("/usr/bin/truncate -s 0 /mnt/file");
    held.released();
    assert_eq!(held.result(), Reply::Called(LENGTH as i64, None));
    held.ends_on(kernel);
    held.second_file();
    held.guest.finish("exit 0").assert_ended(0, "power_off");
}

#[test]
fn a_truncation_waits_for_dma() {
    truncated("6.12");
}

#[test]
#[ignore = "wide"]
fn a_truncation_waits_for_dma_on_6_1() {
    truncated("6.1");
}

#[test]
#[ignore = "wide"]
fn a_truncation_waits_for_dma_on_7() {
    truncated("7.x");
}

/// A hole waits as long as a write from the file to the disk is held, and the disk gets what the file had.
fn punched(kernel: &str) {
    let mut held = Held::new(kernel, true);
    held.waits("/usr/bin/fallocate -p -o 0 -l 65536 /mnt/file");
    held.released();
    assert_eq!(held.result(), Reply::Called(LENGTH as i64, None));
    held.ends_on(kernel);
    let read = held.workload.ask(&mut held.guest, &Request::Read("/dev/vda".into(), 0, LENGTH));
    assert_eq!(read, Reply::Compared { good: LENGTH / 8, bad: 0 }, "the disk has the first file's bytes");
    held.second_file();
    held.guest.finish("exit 0").assert_ended(0, "power_off");
}

#[test]
fn a_hole_waits_for_dma() {
    punched("6.12");
}

#[test]
#[ignore = "wide"]
fn a_hole_waits_for_dma_on_6_1() {
    punched("6.1");
}

#[test]
#[ignore = "wide"]
fn a_hole_waits_for_dma_on_7() {
    punched("7.x");
}

/// The memory goes by surprise while a read into it is held: released then, it lands nowhere, and ends with an error.
fn removed(kernel: &str, via: &str) {
    let held = Held::new(kernel, false);
    let gpa = held.guest.device("p0")["gpa"].clone();
    held.guest.ctl(&["remove", "p0", "--surprise", "--via", via]);
    held.guest.event(held.before, "removal", |event| event["step"] == "surprised");
    held.guest.ctl(&["disk", "release", "d0"]);
    let stale = held.guest.event(held.before, "stale_dma", |_| true);
    assert_eq!(
        (&stale["by"], &stale["device"], &stale["direction"]),
        (&json!("d0"), &json!("p0"), &json!("write")),
        "{stale}"
    );
    assert!(stale["gpa"].as_str() >= gpa.as_str(), "{stale}");
    let completed = held.guest.event(held.before, "disk_completed", |_| true);
    assert_eq!(completed["status"], "io_error");
    held.guest.ctl(&["quit"]);
    held.guest.wait(Duration::from_secs(60));
}

#[test]
fn dma_after_a_surprise_lands_nowhere() {
    removed("6.12", "container");
}

#[test]
#[ignore = "wide"]
fn dma_after_a_surprise_lands_nowhere_on_6_1() {
    removed("6.1", "container");
}

#[test]
#[ignore = "wide"]
fn dma_after_a_surprise_lands_nowhere_on_7() {
    removed("7.x", "agent");
}
