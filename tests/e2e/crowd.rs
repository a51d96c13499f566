//! Many processes use a mapped file on a DAX file system when its device goes by surprise: writers and readers of shared
//! pages, owners of copies, and those that hand pages to a pipe, which pins them without a lock (gup-fast).
//!
//! Expected of XFS with rmapbt on 6.12 (S01, S05), which is told before the device goes (`xfs_dax_notify_failure()`):
//!
//! - every process gets SIGBUS, or EFAULT from vmsplice(2), and the file system is shut down;
//! - no descriptor of a page is used after its end: no oops, no warning;
//! - nobody is in reach afterwards. What 6.12 does instead: see resources/removal.md. The test says how many are.
//!
//! Expected of ext4 (S02), which nobody tells: whoever only loads goes on, and reads ones; nothing unmaps it. How many
//! entries are left, and how many accesses they serve, is the measure of the defect. No oops as long as it is mounted
//! ([`super::defects`]).
//!
//! The oracle: what each process met, by its own account, which goes on living with its mapping; the census; the kernel's
//! log. In none of them does a word become another one, except all ones.

use super::mapped::{Mapped, REMOVAL};
use aconite_agent::crowd::{CROWD, Kind, Note};
use aconite_agent::workload::{PROGRAM, Reply, Request, SIGBUS};
use serde_json::json;
use std::time::Duration;

const FILE: &str = "/mnt/crowd";
/// Pages of the file: a pipe holds as many (pipe(7)).
const PAGES: usize = 16;
/// Processes of each kind.
const EACH: usize = 4;
/// How long all of them may take to begin, or to hear from the kernel.
const PATIENCE: Duration = Duration::from_secs(60);
/// Lines of the kernel's log that nothing of this may bring about.
const DEFECTS: &str = "dmesg | grep -E 'BUG: (kernel|unable|Bad)|kernel BUG|Oops|WARNING: CPU|refcount_t'";

/// Processes at work on one file.
struct Crowd {
    at: Mapped,
    kinds: Vec<Kind>,
}

impl Crowd {
    fn new(kernel: &str, file_system: &str, kinds: &[Kind]) -> Self {
        let mut at = Mapped::on(kernel, file_system);
        let create = at.ask(&Request::Create(FILE.into(), PAGES as u64 * 4096));
        assert_eq!(create, Reply::Done);
        let kinds: Vec<Kind> = kinds.iter().copied().cycle().take(EACH * kinds.len()).collect();
        let start = kinds.iter().enumerate().map(|(number, kind)| {
            let command = format!("{PROGRAM} workload {CROWD} {FILE} {number} {kind}");
            format!("{command} > /tmp/crowd{number} 2>&1 & echo $! > /tmp/crowd{number}.id; ")
        });
        at.guest.ok(&start.collect::<String>());
        let mut crowd = Self { at, kinds };
        crowd.until(|_, met| met.contains(&Note::AtWork));
        crowd
    }

    /// What each process has met.
    fn met(&mut self) -> Vec<Vec<Note>> {
        let one = |number| {
            format!("test -d /proc/$(cat /tmp/crowd{number}.id) && cat /tmp/crowd{number} && echo . && ")
        };
        let all: String = (0..self.kinds.len()).map(one).collect();
        let text = self.at.guest.ok(&(all + "true"));
        let parse = |line: &str| Note::parse(line).unwrap_or_else(|| panic!("{text}"));
        text.split_terminator('.').map(|met| met.trim().lines().map(parse).collect()).collect()
    }

    /// Waits until every process has met what it is to meet.
    #[track_caller]
    fn until(&mut self, wanted: impl Fn(Kind, &[Note]) -> bool) -> Vec<Vec<Note>> {
        let what = format!("what {:?} meet", self.kinds);
        aconite_tests::wait_for(&what, PATIENCE, || {
            let met = self.met();
            met.iter().zip(&self.kinds).all(|(met, kind)| wanted(*kind, met)).then_some(met)
        })
    }

    /// Entries of page tables for the device, of processes.
    fn in_reach(&self) -> u64 {
        let census = self.at.guest.ctl(&["census", "p0"]);
        assert_eq!(census["complete"], json!(true), "{census}");
        census["user"]["entries"].as_u64().expect("a number")
    }

    /// Takes the device away.
    fn remove(&mut self, via: &str) {
        let entries = |kind: &Kind| match kind {
            Kind::Write => 1,
            Kind::Copy => PAGES - 1,
            _ => PAGES,
        };
        assert_eq!(self.in_reach(), self.kinds.iter().map(entries).sum::<usize>() as u64);
        let patience = format!("{}s", REMOVAL.as_secs());
        let options =
            ["remove", "p0", "--surprise", "--via", via, "--timeout", &patience, "--wait", &patience];
        let operation = self.at.guest.ctl(&options);
        assert_eq!(operation["state"], "done", "{operation}");
    }

    fn stale_accesses(&self) -> u64 {
        self.at.guest.device("p0")["stale_accesses"].as_u64().expect("a number")
    }

    fn no_defects(&mut self) {
        let reply = self.at.guest.sh(DEFECTS);
        assert_eq!((reply.status, reply.text.as_str()), (1, ""));
    }

    fn quit(self) {
        self.at.guest.ctl(&["quit"]);
        self.at.guest.wait(Duration::from_secs(60));
    }
}

const ALL: [Kind; 4] = [Kind::Write, Kind::Read, Kind::Copy, Kind::Splice];

fn no_other_words(met: &[Vec<Note>]) {
    let found = |note: &Note| matches!(note, Note::Found(_));
    assert!(!met.iter().flatten().any(found), "{met:?}");
}

/// XFS tells all of them.
fn told(kernel: &str, via: &str) {
    let mut crowd = Crowd::new(kernel, "xfs", &ALL);
    crowd.remove(via);
    let met = crowd.until(|_, met| met.iter().any(|note| note.is_refusal()));
    no_other_words(&met);
    for (kind, met) in crowd.kinds.iter().zip(&met) {
        let bus = met.iter().any(|note| matches!(note, Note::Signal(SIGBUS, _)));
        assert!(bus || *kind == Kind::Splice, "{kind}: {met:?}");
    }
    crowd.at.guest.ok("dmesg | grep -q 'Device is about to be removed'");
    crowd.no_defects();
    let census = crowd.at.guest.ctl(&["census", "p0"]);
    let mappings = census["user"]["mappings"].as_array().expect("a list");
    assert!(mappings.iter().all(|mapping| mapping["writable"] == false), "{census}");
    let entries = crowd.in_reach();
    let umount = crowd.at.guest.sh(
        "kill $(pidof aconite-agent); sleep 1; umount /mnt; echo $?; dmesg | grep -A 30 -E 'BUG: |Oops' | grep -E 'RIP: 0010|dax_'",
    );
    eprintln!("XFS on {kernel}: {entries} entries; {met:?}; umount: {}", umount.text);
    crowd.quit();
}

#[test]
#[ignore = "wide"]
fn xfs_tells_all() {
    told("6.12", "container");
}

/// ext4 takes it from nobody that only loads.
fn left_in_reach(kernel: &str, via: &str) {
    let mut crowd = Crowd::new(kernel, "ext4", &ALL);
    crowd.remove(via);
    let loads = |kind| matches!(kind, Kind::Read | Kind::Copy);
    let met = crowd.until(|kind, met| !loads(kind) || met.contains(&Note::Ones));
    no_other_words(&met);
    let refused = |(kind, met): (&Kind, &Vec<Note>)| loads(*kind) && met.iter().any(|note| note.is_refusal());
    assert!(!crowd.kinds.iter().zip(&met).any(refused), "{met:?}");
    let entries = crowd.in_reach();
    assert!(entries >= (EACH * (2 * PAGES - 1)) as u64, "{entries}");
    let before = crowd.stale_accesses();
    crowd.at.guest.ok("sleep 2");
    let accesses = crowd.stale_accesses() - before;
    assert!(accesses >= (EACH * (2 * PAGES - 1)) as u64, "{accesses}");
    eprintln!("ext4 on {kernel}: {entries} entries, {accesses} accesses in 2 s; {met:?}");
    crowd.no_defects();
    crowd.quit();
}

#[test]
#[ignore = "wide"]
fn ext4_leaves_all_in_reach() {
    left_in_reach("6.12", "container");
}

#[test]
#[ignore = "wide"]
fn ext4_leaves_all_in_reach_on_6_1() {
    left_in_reach("6.1", "container");
}
