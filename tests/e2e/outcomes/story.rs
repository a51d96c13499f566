//! Rows that are more than one access.

use super::Seen;
use super::subject::{FILE, PAGE, Subject, hex, signal_in_words};
use super::table::Place;
use aconite_agent::workload::{Reply, Request, WORD, pattern};
use aconite_tests::workload::Workload;
use std::thread;
use std::time::{Duration, Instant};

/// How long the kernel's workers may take to write down a bad block, after the access.
const LIST: Duration = Duration::from_secs(20);
/// How long a corrected error is given to do harm: several polls.
const QUIET: Duration = Duration::from_secs(5);
/// Pages with a bad line each in the row with two readers.
const PAGES: u64 = 8;
/// First page of those.
const FIRST: u64 = 32;

/// Shell functions of the guest. The busybox of the shell has a dd of its own, which does not read past the page
/// cache: the path names the other one. `good N` reads sector N past the page cache and compares it with what was written,
/// `bad N` succeeds if the read ends in EIO, `mend N` writes page N.
const FUNCTIONS: &str = r#"
raw() { /usr/bin/dd if=$D of=$2 bs=512 count=1 skip=$1 iflag=direct 2>$2.err; }
good() { raw $1 /tmp/a$$ || { cat /tmp/a$$.err; return 1; }; dd if=/tmp/pattern of=/tmp/b$$ bs=512 count=1 skip=$1 2>/dev/null && cmp /tmp/a$$ /tmp/b$$; }
bad() { ! raw $1 /tmp/c$$ && grep -q 'Input/output error' /tmp/c$$.err; }
mend() { /usr/bin/dd if=/tmp/pattern of=$D bs=4096 count=1 seek=$1 skip=$1 oflag=direct 2>/dev/null; }
"#;

/// Gives the block device its bytes, and the guest the functions.
pub fn prepare(subject: &mut Subject) {
    let device = subject.block("block");
    subject.guest.ok(&format!("cat > /tmp/f << 'EOF'\nD={device}\n{FUNCTIONS}\nEOF"));
    subject.guest.ok("seq 200000 | head -c 1048576 > /tmp/pattern");
    let write = format!("/usr/bin/dd if=/tmp/pattern of={device} bs=65536 oflag=direct 2>/dev/null");
    subject.guest.ok(&write);
}

fn call(subject: &mut Subject, functions: &str) -> String {
    subject.guest.ok(&format!(". /tmp/f; {functions}"))
}

/// Waits until the kernel's list of bad blocks is this: it is filled after the machine check, by a worker.
fn wait_for_bad_blocks(subject: &mut Subject, expected: &str) {
    let list = format!("/sys/block/{}/badblocks", subject.block("block").trim_start_matches("/dev/"));
    subject.guest.until_ok(&format!("test \"$(cat {list})\" = \"{expected}\""), LIST);
}

fn machine_checks(subject: &mut Subject) -> usize {
    let events = subject.events();
    let traps = events.iter().filter(|event| event["event"] == "poison_trapped");
    traps.filter(|event| event["decision"] == "machine_check").count()
}

/// A read of the bad line's sector past the page cache fails; the page's other sectors are read.
pub fn block_read(subject: &mut Subject) -> Seen {
    wait_for_bad_blocks(subject, "");
    subject.guest.ctl(&["poison", "add", "block", "0x1240+64"]);
    call(subject, "good 8 && good 10 && good 15");
    assert_eq!(machine_checks(subject), 0, "no poison was loaded yet");
    call(subject, "bad 9");
    let gpa = subject.device("block").gpa + 0x1240;
    let events = subject.events();
    let trap = events.iter().find(|event| event["decision"] == "machine_check").expect("a trap");
    assert_eq!((hex(&trap["gpa"]), trap["cpl"].as_u64()), (gpa, Some(0)), "{trap}");
    let check = events.iter().find(|event| event["event"] == "mce_delivered").expect("a machine check");
    assert_eq!((hex(&check["address"]), &check["vcpu"]), (gpa, &trap["vcpu"]), "{check}");
    wait_for_bad_blocks(subject, "9 1");
    let region = subject.device("block").region;
    assert_eq!(subject.guest.ok(&format!("cat /sys/bus/nd/devices/region{region}/badblocks")), "9 1");
    let good: Vec<String> =
        (8..16).filter(|sector| *sector != 9).map(|sector| format!("good {sector}")).collect();
    call(subject, &format!("{} && bad 9", good.join(" && ")));
    let more = machine_checks(subject);
    Ok(format!("EIO at the sector, {} others good; {} machine check; badblocks 9 1", good.len(), 1 + more))
}

/// A write of the whole page makes Linux ask the firmware to clear it.
pub fn block_repair(subject: &mut Subject) -> Seen {
    call(subject, "mend 1");
    let events = subject.events();
    let cleared = events.iter().find(|event| event["event"] == "poison_cleared");
    let by = cleared.map_or("nobody", |event| event["by"].as_str().unwrap_or("?")).to_owned();
    wait_for_bad_blocks(subject, "");
    call(subject, "for s in 8 9 10 11 12 13 14 15; do good $s || exit 1; done");
    assert_eq!(subject.guest.ctl(&["poison", "list", "block"])["ranges"], serde_json::json!([]));
    Ok(format!("cleared by the {by}; badblocks empty; all sectors good"))
}

/// A notification makes Linux scrub: the list is right before anything was consumed.
pub fn block_scrub(subject: &mut Subject) -> Seen {
    subject.guest.ctl(&["poison", "add", "block", "0x80000+512"]);
    subject.guest.ctl(&["notify", "block", "uncorrectable"]);
    wait_for_bad_blocks(subject, "1024 1");
    call(subject, "bad 1024 && good 1023 && good 1025");
    let checks = machine_checks(subject);
    call(subject, "mend 128");
    wait_for_bad_blocks(subject, "");
    call(subject, "good 1024");
    Ok(format!("badblocks 1024 1 before any access; EIO; {checks} machine checks"))
}

/// Two processes, on two processors where there are, read bad and good sectors of the same pages at the same time.
pub fn block_readers(subject: &mut Subject) -> Seen {
    let ranges: Vec<String> =
        (FIRST..FIRST + PAGES).map(|page| format!("{:#x}+64", page * PAGE + 0x240)).collect();
    let mut add = vec!["poison", "add", "block"];
    add.extend(ranges.iter().map(String::as_str));
    subject.guest.ctl(&add);
    let last = FIRST + PAGES - 1;
    subject.guest.ok(&format!(
        "cat > /tmp/reader << 'EOF'\n. /tmp/f\n\
         for p in $(seq {FIRST} {last}) $(seq {FIRST} {last}); do $1 $((p * 8 + $2)) || echo \"page $p: $1 failed\"; \
         done; echo done\nEOF"
    ));
    let other = if subject.column.vcpus > 1 { 2 } else { 1 };
    let script = format!(
        "taskset 1 sh /tmp/reader bad 1 > /tmp/bad 2>&1 & taskset {other} sh /tmp/reader good 2 > /tmp/good 2>&1 & \
         wait; cat /tmp/bad /tmp/good"
    );
    let reply = subject.guest.sh_within(&script, Duration::from_secs(120));
    assert_eq!(reply.text, "done\ndone", "the reader of bad sectors, then that of good ones");
    let list: Vec<String> = (FIRST..=last).map(|page| format!("{} 1", page * 8 + 1)).collect();
    wait_for_bad_blocks(subject, &list.join("\n"));
    let checks = machine_checks(subject);
    call(subject, &format!("for p in $(seq {FIRST} {last}); do mend $p || exit 1; done"));
    wait_for_bad_blocks(subject, "");
    Ok(format!("all bad sectors EIO, all good sectors good; {checks} machine checks"))
}

/// read(2) of a file with DAX: EIO, and a write of the page brings it back.
pub fn fsdax_read(subject: &mut Subject) -> Seen {
    let page = subject.fresh(Place::Fsdax);
    let path = || FILE.into();
    let Reply::At(block) = subject.ask(Request::Locate(path(), page)) else { panic!("no place") };
    let script = format!("cat /sys/block/pmem{}/device/resource", subject.device("fs").region);
    let start = hex(&serde_json::Value::String(subject.guest.ok(&script)));
    let (device, offset) = subject.place_of(start + block);
    subject.guest.ctl(&["poison", "add", device, &format!("{:#x}+64", offset + 0x240)]);
    let sector = page + 0x200;
    let good = subject.ask(Request::Read(path(), page + 0x400, 512));
    assert_eq!(good, Reply::Compared { good: 64, bad: 0 }, "another sector");
    let first = subject.ask(Request::Read(path(), sector, 512));
    assert_eq!(first, Reply::Compared { good: 8, bad: 56 }, "what is before the line");
    let list = format!("/sys/block/pmem{}/badblocks", subject.device("fs").region);
    subject.guest.until_ok(&format!("test -n \"$(cat {list})\""), LIST);
    assert_eq!(subject.ask(Request::Read(path(), sector, 512)), Reply::Errno(5), "the sector");
    // dax_iomap_rw() goes on behind what was copied, and meets the line again, unless it is in the list by then.
    let checks = machine_checks(subject);
    assert!((1..=2).contains(&checks), "{checks} machine checks");
    assert_eq!(subject.ask(Request::Write(path(), page, PAGE)), Reply::Done);
    assert_eq!(subject.ask(Request::Read(path(), page, PAGE)), Reply::Compared { good: 512, bad: 0 });
    assert_eq!(subject.guest.ctl(&["poison", "list", device])["ranges"], serde_json::json!([]));
    Ok("64 bytes before the line, then EIO; repaired by a write".to_owned())
}

/// A process that shares the page with the one that consumes poison, and asked to be told early, gets its own signal.
pub fn sharer(subject: &mut Subject) -> Seen {
    let place = Place::Devdax4k;
    let source = subject.source(place);
    let page = subject.fresh(place);
    let mut other = Workload::start(&mut subject.guest, 1);
    let requests = [Request::Map(source.clone()), Request::Early(true), Request::Load(page), Request::Notice];
    let replies = other.ask_all(&mut subject.guest, &requests);
    let Reply::At(mapping) = replies[0] else { panic!("{replies:?}") };
    assert_eq!((&replies[1], &replies[3]), (&Reply::Done, &Reply::Done), "no signal yet");
    let own = subject.map(place);
    let Reply::At(gpa) = subject
        .workload
        .ask_all(&mut subject.guest, &[Request::Fill(page, PAGE), Request::Physical(page)])[1]
    else {
        panic!("no place")
    };
    let (device, offset) = subject.place_of(gpa);
    subject.guest.ctl(&["poison", "add", device, &format!("{offset:#x}+64")]);
    let reader = subject.ask(Request::Load(page));
    let notice = other.ask(&mut subject.guest, &Request::Notice);
    subject.guest.ctl(&["poison", "clear", device]);
    let words = |reply: &Reply, mapping| match reply {
        Reply::Signal(signal) => signal_in_words(signal, mapping + page),
        other => other.to_string(),
    };
    let checks = machine_checks(subject);
    let (reader, sharer) = (words(&reader, own), words(&notice, mapping));
    Ok(format!("{reader} to the reader, {sharer} to the sharer; {checks} machine check"))
}

/// An error of this class is raised in a page of the process, which does not touch it; then it loads a word.
fn raised(subject: &mut Subject, class: &str, early: bool) -> Seen {
    let place = Place::Anonymous;
    let mapping = subject.map(place);
    let page = subject.fresh(place);
    let word = page + WORD;
    let requests = [Request::Early(early), Request::Physical(page)];
    let replies = subject.workload.ask_all(&mut subject.guest, &requests);
    let Reply::At(gpa) = replies[1] else { panic!("where the page is: {replies:?}") };
    let before = subject.corrupted();
    subject.guest.ctl(&["mce", "--class", class, "--address", &format!("{gpa:#x}")]);
    let deadline = Instant::now() + if class == "corrected" { QUIET } else { LIST };
    let (mut signal, mut lost) = (None, 0);
    while Instant::now() < deadline && (lost == 0 || (early && signal.is_none())) {
        thread::sleep(Duration::from_millis(200));
        if let Reply::Signal(notice) = subject.ask(Request::Notice) {
            signal = Some(notice);
        }
        lost = subject.corrupted() - before;
    }
    let replies = subject.workload.ask_all(&mut subject.guest, &[Request::Early(false), Request::Load(word)]);
    let then = match &replies[1] {
        Reply::Signal(signal) => signal_in_words(signal, mapping + word),
        Reply::Loaded { word: loaded, .. } if *loaded == pattern(word) => "good".to_owned(),
        other => other.to_string(),
    };
    let signal = signal.map_or("no signal".to_owned(), |signal| signal_in_words(&signal, mapping + page));
    let traps = machine_checks(subject);
    assert_eq!(traps, 0, "nothing was poisoned");
    Ok(format!("{signal}; +{lost} kB; then {then}"))
}

/// The process asked to be told before it consumes poison.
pub fn optional_early(subject: &mut Subject) -> Seen {
    raised(subject, "srao", true)
}

/// The process did not ask.
pub fn optional(subject: &mut Subject) -> Seen {
    raised(subject, "srao", false)
}

/// No machine check: the error waits in its bank until the kernel polls.
pub fn deferred_early(subject: &mut Subject) -> Seen {
    raised(subject, "ucna", true)
}

/// A corrected error costs nothing.
pub fn corrected(subject: &mut Subject) -> Seen {
    raised(subject, "corrected", true)
}
