//! Another device at the address of one that went while processes had it mapped: who still reaches the address is known
//! before, and what they do to the new device afterwards.
//!
//! Expected, by kernel and file system, of a file that is mapped and was read when its device goes by surprise:
//!
//! | | the process's page tables | a load through the old mapping |
//! |---|---|---|
//! | ext4, 6.1, 6.12 and 7.x | still map the device: `ext4` has no `notify_failure`, and `kill_dax` unmaps nothing | ones, then the new device's bytes |
//! | XFS with rmapbt, 6.12 | map nothing: `xfs_dax_notify_failure` unmaps every page | SIGBUS |
//!
//! The oracle is the census: what it lists is reached, what it does not list is not, and no byte of the new device
//! changes but through an entry that it listed as writable.

use super::mapped::{Mapped, REMOVAL, WORD};
use aconite_agent::workload::{Reply, Request, SIGBUS};
use serde_json::Value;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::time::Duration;

/// What every word of the new device's page is.
const NEW: u64 = 0xB0B0_B0B0_B0B0_B0B0;
/// What the old mapping's owner writes.
const OLD: u64 = 0x01D0_01D0_01D0_01D0;

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value} is no number"))
}

fn hex(value: &Value) -> u64 {
    u64::from_str_radix(value.as_str().unwrap().trim_start_matches("0x"), 16).unwrap()
}

/// The user mapping of a census that holds virtual address `va`.
fn mapping_of(census: &Value, va: u64) -> Option<&Value> {
    let mappings = census["user"]["mappings"].as_array().unwrap();
    mappings.iter().find(|m| (hex(&m["va"])..hex(&m["va"]) + number(&m["bytes"])).contains(&va))
}

/// Whether the old mapping reaches the address after the removal, by the census and by what becomes of the new device.
fn repurposed(kernel: &str, file_system: &str, via: &str) -> bool {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("new.img");
    let mut at = Mapped::on(kernel, file_system);
    assert_eq!(at.load(WORD).0, aconite_agent::workload::pattern(WORD));
    let va = at.mapping + WORD;

    let census = at.guest.ctl(&["census", "p0"]);
    assert_eq!(census["complete"], true, "{census}");
    assert!(number(&census["address_spaces"]) >= 3, "{census}");
    assert!(number(&census["kernel"]["bytes"]) >= 1 << 29, "the direct map: {census}");
    let mapping = mapping_of(&census, va).unwrap_or_else(|| panic!("{va:#x} is mapped: {census}"));
    assert_eq!(hex(&mapping["offset"]) + va - hex(&mapping["va"]), at.word, "{mapping}");
    assert_eq!(mapping["processes"][0]["name"], "aconite-agent", "{mapping}");

    let patience = format!("{}s", REMOVAL.as_secs());
    at.guest.ctl(&["remove", "p0", "--surprise", "--via", via, "--timeout", &patience, "--wait", &patience]);
    let census = at.guest.ctl(&["census", "p0"]);
    assert_eq!((&census["complete"], &census["kernel"]["entries"]), (&true.into(), &0.into()), "{census}");
    let still = mapping_of(&census, va);
    let reached = still.is_some();
    if let Some(mapping) = still {
        // Told without a look at the page, which 7.2 does not survive (`pagemap_pmd_range()`).
        assert_eq!(
            (&census["departed"], &mapping["processes"][0]["name"]),
            (&true.into(), &"aconite-agent".into())
        );
    }
    let reply = at.ask(&Request::Load(WORD));
    match &reply {
        Reply::Loaded { word, .. } if reached => assert_eq!(*word, u64::MAX),
        Reply::Signal(signal) if !reached => assert_eq!(signal.number, SIGBUS),
        _ => panic!("{reply}, and the census says {census}"),
    }
    if !reached {
        assert_eq!(census["user"]["entries"], 0, "{census}");
    }

    let page = at.word & !0xFFF;
    let file = File::create(&path).unwrap();
    file.set_len(1 << 30).unwrap();
    file.write_all_at(&NEW.to_le_bytes().repeat(512), page).unwrap();
    let before = at.guest.last_event();
    let value = format!("file={},id=p1,at=p0", path.display());
    let operation = at.guest.ctl(&["insert", "pmem", &value, "--wait"]);
    let told = at.guest.event(before, "census", |_| true);
    assert_eq!((&told["operation"], &told["device"]), (&operation["operation"], &"p0".into()), "{told}");
    assert_eq!(mapping_of(&told, va).is_some(), reached, "{told}");

    let writable = mapping_of(&told, va).is_some_and(|mapping| mapping["writable"] == true);
    if reached {
        assert_eq!(at.load(WORD).0, NEW, "the old mapping shows the new device");
    }
    // On 7.x the fault of a store to a page that is mapped without the right to write has been seen not to return.
    if reached && (writable || !kernel.starts_with('7')) {
        match at.ask(&Request::Store(WORD, OLD)) {
            Reply::Done => assert!(writable, "{told}"),
            Reply::Signal(signal) => assert_eq!((signal.number, writable), (SIGBUS, false)),
            other => panic!("{other}"),
        }
    }
    at.guest.ctl(&["quit"]);
    at.guest.wait(Duration::from_secs(60));
    let bytes = &fs::read(&path).unwrap()[page as usize..][..4096];
    let changed = bytes.chunks(8).filter(|word| **word != NEW.to_le_bytes()).count();
    assert_eq!(changed, usize::from(writable), "what the old mapping wrote into the new device");
    reached
}

#[test]
fn ext4_leaves_processes_in_reach_of_the_next_device() {
    assert!(repurposed("6.12", "ext4", "container"));
}

#[test]
#[ignore = "wide"]
fn ext4_leaves_processes_in_reach_of_the_next_device_on_6_1() {
    assert!(repurposed("6.1", "ext4", "container"));
}

#[test]
#[ignore = "wide"]
fn ext4_leaves_processes_in_reach_of_the_next_device_on_7() {
    assert!(repurposed("7.x", "ext4", "agent"));
}

#[test]
#[ignore = "wide"]
fn xfs_takes_the_old_device_from_its_processes() {
    assert!(!repurposed("6.12", "xfs", "container"));
}
