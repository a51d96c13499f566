//! What a guest's kernel leaves behind when it crashes: its last log, in the firmware's store of error records (ERST),
//! found by the next machine that is started with the same state directory.

use aconite_tests::{Machine, Run};
use std::fs;
use std::path::{Path, PathBuf};

const MARK: &str = "a mark of the first machine";

fn run(kernel: Option<&str>, state: &Path) -> Run {
    kernel.map_or_else(Run::new, Run::kernel).size(2, "512M").args(["--state".as_ref(), state.as_os_str()])
}

/// The records in a state directory.
fn records(state: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(state).expect("the state directory");
    let paths = entries.map(|entry| entry.expect("an entry").path());
    paths.filter(|path| path.extension().is_some_and(|extension| extension == "record")).collect()
}

#[track_caller]
fn pstore(guest: &mut Machine) -> String {
    guest.ok("mkdir -p /tmp/pstore && mount -t pstore pstore /tmp/pstore && ls /tmp/pstore")
}

fn last_log(kernel: Option<&str>) {
    let state = tempfile::tempdir().expect("a directory");
    let state = state.path().join("state");
    let mut first = run(kernel, &state).shell();
    assert_eq!(first.ok("cat /sys/module/pstore/parameters/backend"), "erst");
    assert_eq!(pstore(&mut first), "");
    // The directory is the first machine's alone.
    let second = run(kernel, &state).output(&["true"]);
    second.assert_refused(125, &["state", "belongs to the machine of process"]);

    first.ok(&format!("echo '{MARK}' > /dev/kmsg"));
    assert_eq!(records(&state), Vec::<PathBuf>::new(), "nothing is kept before there is something");
    first.finish("echo c > /proc/sysrq-trigger").assert_ended(255, "panic");
    let kept = records(&state);
    assert!(!kept.is_empty(), "the log was kept");

    // A record that is cut short is refused by its name, and left alone.
    let whole = fs::read(&kept[0]).expect("a record");
    fs::write(&kept[0], &whole[..whole.len() - 7]).expect("a shorter record");
    let name = kept[0].file_name().expect("a name").to_string_lossy().into_owned();
    run(kernel, &state).output(&["true"]).assert_refused(125, &[&name, "refused"]);
    assert_eq!(fs::read(&kept[0]).expect("a record").len(), whole.len() - 7);
    fs::write(&kept[0], &whole).expect("the whole record");

    let mut third = run(kernel, &state).shell();
    let files = pstore(&mut third);
    assert!(files.lines().all(|name| name.starts_with("dmesg-erst-")), "{files}");
    assert_eq!(files.lines().count(), kept.len());
    let log = third.ok("cat /tmp/pstore/dmesg-erst-*");
    for words in
        ["Panic#", MARK, "sysrq: Trigger a crash", "Kernel panic - not syncing: sysrq triggered crash"]
    {
        assert!(log.contains(words), "{words:?} is missing in: {log}");
    }
    third.ok("rm /tmp/pstore/dmesg-erst-*");
    assert_eq!(third.ok("ls /tmp/pstore"), "");
    assert_eq!(records(&state), Vec::<PathBuf>::new(), "what the guest removes is gone");
    third.finish("exit 0").assert_ended(0, "power_off");
}

#[test]
fn a_crashed_kernel_leaves_its_log() {
    last_log(None);
}

#[test]
fn a_crashed_6_1_leaves_its_log() {
    last_log(Some("6.1"));
}

#[test]
fn a_crashed_7_leaves_its_log() {
    last_log(Some("7.x"));
}
