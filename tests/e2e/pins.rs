//! Memory that is pinned without being mapped (a registered buffer of io_uring, `FOLL_LONGTERM`) when its device goes.
//!
//! Expected of a DAX device by surprise: the removal waits until the ring is closed, or not; and nothing is touched that
//! is not there. What stock kernels do (seen in 6.12.107 and 7.2.13):
//!
//! | | 6.12 | 7.x |
//! |---|---|---|
//! | the removal | does not wait: `memunmap_pages()` waits for references of the device (`pgmap->ref`), and `gup` gave those of a pinned page back when it was done | does not wait |
//! | a read through the ring while nothing is there | lands nowhere (event `stale_dma`) | |
//! | the same when another device has come to the address | lands in it: a disk overwrites memory that nobody has given to the process | oops in `blk_map_iter_next()` under `virtblk_prep_rq()`: the pages have no descriptors any more |
//! | the ring is closed | oops in `io_buffer_unmap()`, for the same reason | |
//!
//! The oracle: the census says that nobody maps the range, and that it does not see pins; the new device's file has a
//! watermark, which shows them. Closed is the ring last, and the oops is looked for in the kernel's log.

use super::kmem::with_dax;
use super::removal::steps;
use aconite_agent::workload::{Reply, Request, Source};
use aconite_tests::machine::PMEM;
use aconite_tests::workload::Workload;
use aconite_tests::{Machine, Run};
use serde_json::json;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::Duration;

const LENGTH: u64 = 64 << 10;
/// What every byte of the new device is.
const WATERMARK: u8 = 0xB0;

/// A guest with a process that has pinned the first pages of its DAX device and does not map them, and a disk of pattern.
fn pinned(kernel: &str) -> (Machine, Workload) {
    let run = Run::kernel(kernel).args(["--disk", "size=16M,id=d0"]);
    let mut guest = with_dax(run);
    let mut workload = Workload::start(&mut guest, 0);
    let disk = || PathBuf::from("/dev/vda");
    assert_eq!(workload.ask(&mut guest, &Request::Write(disk(), 0, LENGTH)), Reply::Done);
    let map = Request::Map(Source::File("/dev/dax0.0".into()));
    assert!(matches!(workload.ask(&mut guest, &map), Reply::At(_)));
    let asked =
        [Request::Pin(0, LENGTH), Request::Deliver(disk(), 0), Request::Scan(0, LENGTH), Request::Unmap];
    let replies = workload.ask_all(&mut guest, &asked);
    let expected = [
        Reply::Done,
        Reply::Called(LENGTH as i64, None),
        Reply::Compared { good: LENGTH / 8, bad: 0 },
        Reply::Done,
    ];
    assert_eq!(replies, expected);
    (guest, workload)
}

/// S13: the device goes, another one comes in its place, and the pin reaches it.
fn outlives(kernel: &str, via: &str, closes: &str) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("new.img");
    fs::write(&path, vec![WATERMARK; 16 << 20]).unwrap();
    File::options().write(true).open(&path).unwrap().set_len(1 << 30).unwrap();
    let (mut guest, mut workload) = pinned(kernel);
    let before = guest.last_event();
    let operation = guest.ctl(&["remove", "p0", "--surprise", "--via", via, "--wait", "120s"]);
    assert_eq!(operation["state"], "done", "the removal does not wait: {operation}");
    assert_eq!(steps(&guest, before), ["requested", "surprised", "notified", "departed"]);

    // As long as nothing is there, the DMA is late, and lands nowhere.
    let deliver = Request::Deliver("/dev/vda".into(), 0);
    let reply = workload.ask(&mut guest, &deliver);
    assert!(matches!(reply, Reply::Called(result, None) if result < 0), "{reply}");
    let stale = guest.event(before, "stale_dma", |_| true);
    assert_eq!((&stale["by"], &stale["device"]), (&json!("d0"), &json!("p0")), "{stale}");

    let value = format!("file={},id=p1,at=p0,channel={via}", path.display());
    guest.ctl(&["insert", "pmem", &value, "--wait", "120s"]);
    guest.until_ok("test -b /dev/pmem*", PMEM);
    let census = guest.event(before, "census", |_| true);
    assert_eq!((&census["complete"], &census["user"]["entries"]), (&json!(true), &json!(0)), "{census}");
    assert!(census["unseen"].as_str().unwrap().contains("pinned"), "{census}");
    assert_eq!(workload.ask(&mut guest, &deliver), Reply::Called(LENGTH as i64, None));

    workload.tell(&mut guest, &Request::Unpin);
    guest
        .until_ok(&format!("dmesg | grep -A 20 -E 'BUG: |Oops' | grep -q {closes}"), Duration::from_secs(60));
    guest.ctl(&["quit"]);
    guest.wait(Duration::from_secs(60));
    let mut bytes = vec![0; 16 << 20];
    File::open(&path).unwrap().read_exact_at(&mut bytes, 0).unwrap();
    let changed: Vec<usize> = (0..bytes.len()).filter(|at| bytes[*at] != WATERMARK).collect();
    let (first, last) = (changed.first().copied(), changed.last().copied());
    assert!(
        changed.len() as u64 >= LENGTH / 2 && last.zip(first).is_some_and(|(l, f)| ((l - f) as u64) < LENGTH),
        "the watermark is gone from {first:x?} to {last:x?}"
    );
}

#[test]
fn a_pin_reaches_the_next_device() {
    outlives("6.12", "container", "io_buffer_unmap");
}

/// 7.x looks at the pages' descriptors when it makes a request of them, not only when it gives them back.
#[test]
#[ignore = "wide"]
fn a_request_into_what_is_pinned_oopses_on_7() {
    let (mut guest, mut workload) = pinned("7.x");
    let operation = guest.ctl(&["remove", "p0", "--surprise", "--via", "agent", "--wait", "120s"]);
    assert_eq!(operation["state"], "done", "the removal does not wait: {operation}");
    let operation = guest.ctl(&["insert", "pmem", "size=1G,id=p1,at=p0", "--wait", "120s"]);
    assert_eq!(operation["state"], "done", "{operation}");
    workload.tell(&mut guest, &Request::Deliver("/dev/vda".into(), 0));
    guest.until_ok("dmesg | grep -A 20 'BUG: ' | grep -q blk_map_iter_next", Duration::from_secs(60));
    guest.ctl(&["quit"]);
    guest.wait(Duration::from_secs(60));
}
