//! Defects of stock kernels under the removal of a mounted, mapped device: each is expected by its name, so that the
//! suite sees it and goes on, and says so when a kernel does without it.
//!
//! | scenario | kernel | what is expected | where |
//! |---|---|---|---|
//! | ext4, unmounted after the removal | 6.1, 6.12 | oops | `dax_disassociate_entry()` under `ext4_evict_inode()`: the page descriptors are gone |
//! | the same, the driver unbound instead | 6.12 | the same oops: the channel makes no difference | |
//! | ext4, process ends after the removal | 7.x | oops | `unmap_vmas()` under `exit_mmap()` |
//! | XFS with rmapbt, several allocation groups | 7.x | the removal does not end | `xfs_dax_notify_dev_failure()`: a count of blocks wraps to 0 |
//!
//! The oracle is the kernel's own log, and for the last one the operation, which times out.

use super::mapped::{Mapped, REMOVAL, WORD};
use std::time::Duration;

/// How long a symptom may take to show.
const SYMPTOM: Duration = Duration::from_secs(60);

/// A mapped file whose device has been told to go.
fn removed(kernel: &str, file_system: &str, via: &str, patience: Duration) -> (Mapped, serde_json::Value) {
    let mut at = Mapped::on(kernel, file_system);
    at.load(WORD);
    let patience = format!("{}s", patience.as_secs());
    let options = ["remove", "p0", "--surprise", "--via", via, "--timeout", &patience];
    let number = at.guest.ctl(&options)["operation"].clone();
    let finished = |event: &serde_json::Value| event["operation"] == number;
    let ended = aconite_tests::wait_for("the end of the removal", REMOVAL + SYMPTOM, || {
        at.guest.events_named(0, "operation_finished").into_iter().find(|event| finished(event))
    });
    (at, ended)
}

/// Does something in the guest that its kernel may not survive, and waits for the words in its log.
fn symptom(at: &mut Mapped, action: &str, words: &[&str]) {
    at.guest.ok(&format!("({action}) >/dev/null 2>&1 & true"));
    for word in words {
        at.guest.until_ok(&format!("dmesg | grep -q '{word}'"), SYMPTOM);
    }
}

fn quit(at: Mapped) {
    at.guest.ctl(&["quit"]);
    at.guest.wait(Duration::from_secs(60));
}

fn oops_at_umount(kernel: &str, via: &str) {
    let (mut at, ended) = removed(kernel, "ext4", via, REMOVAL);
    assert!(ended["error"].is_null(), "{ended}");
    symptom(
        &mut at,
        "kill $(pidof aconite-agent); sleep 1; umount /mnt",
        &["Oops", "dax_disassociate_entry"],
    );
    quit(at);
}

#[test]
fn umount_of_ext4_oopses() {
    oops_at_umount("6.12", "container");
}

#[test]
#[ignore = "wide"]
fn umount_of_ext4_oopses_when_the_driver_is_unbound() {
    oops_at_umount("6.12", "agent");
}

#[test]
#[ignore = "wide"]
fn umount_of_ext4_oopses_on_6_1() {
    oops_at_umount("6.1", "container");
}

#[test]
#[ignore = "wide"]
fn the_end_of_a_process_with_ext4_mapped_oopses_on_7() {
    let (mut at, ended) = removed("7.x", "ext4", "agent", REMOVAL);
    assert!(ended["error"].is_null(), "{ended}");
    symptom(&mut at, "kill -9 $(cat /tmp/workload0)", &["unmap_vmas", "exit_mmap"]);
    quit(at);
}

#[test]
#[ignore = "wide"]
fn the_removal_of_xfs_does_not_end_on_7() {
    let (mut at, ended) = removed("7.x", "xfs", "agent", Duration::from_secs(45));
    assert_eq!(ended["error"]["code"], "guest_timed_out", "{ended}");
    // What the processors are at, looked at again and again: not all of the loop is in that function.
    symptom(
        &mut at,
        "for look in $(seq 20); do echo l > /proc/sysrq-trigger; sleep 2; done",
        &["mf_dax_kill_procs"],
    );
    quit(at);
}
