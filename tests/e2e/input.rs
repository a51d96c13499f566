//! What is wrong is refused, with one clear error and before anything is changed.

use aconite_tests::environment::kernel_image;
use aconite_tests::{Run, aconite};
use std::fs;
use std::process::Stdio;

#[test]
fn kernels_that_are_none() {
    let run = Run::image("/no/such/kernel");
    run.output(&["true"]).assert_refused(2, &["/no/such/kernel"]);

    let dir = tempfile::tempdir().unwrap();
    let whole = fs::read(kernel_image("6.12")).unwrap();
    for (name, bytes) in [("half", &whole[..whole.len() / 2]), ("head", &whole[..100]), ("empty", &[][..])] {
        let path = dir.path().join(name);
        fs::write(&path, bytes).unwrap();
        Run::image(&path).output(&["true"]).assert_refused(2, &[path.to_str().unwrap()]);
    }
    let text = dir.path().join("text");
    fs::write(&text, "no kernel\n".repeat(100_000)).unwrap();
    Run::image(&text).output(&["true"]).assert_refused(2, &[text.to_str().unwrap()]);
    Run::image(dir.path()).output(&["true"]).assert_refused(2, &[dir.path().to_str().unwrap()]);
}

#[test]
fn options_that_cannot_be() {
    for (arguments, words) in [
        (vec!["--cpus", "0"], vec!["--cpus", "0"]),
        (vec!["--cpus", "65"], vec!["65", "64"]),
        (vec!["--cpus", "two"], vec!["--cpus", "two"]),
        (vec!["--memory", "100T"], vec!["100T"]),
        (vec!["--memory", "1000001"], vec!["1000001"]),
        (vec!["--pmem", "size=1G,id=a", "--pmem", "size=1G,id=a"], vec!["a"]),
        (vec!["--pmem", "size=1G,colour=red"], vec!["colour"]),
        (vec!["--pmem", "id=a"], vec!["file=", "size="]),
        (vec!["--pmem", "size=0"], vec!["0"]),
        (vec!["--pmem", "size=1000001"], vec!["1000001"]),
        (vec!["--pmem", "size=1G,at=0x1000000"], vec!["0x1000000"]),
        (vec!["--pmem", "size=1G,id=a,at=0x140000000", "--pmem", "size=1G,id=b,at=0x150000000"], vec!["0x1"]),
        (vec!["--timeout", "soon"], vec!["--timeout", "soon"]),
        (vec!["--tool", "/no/such/tool"], vec!["/no/such/tool"]),
    ] {
        let ended = Run::new().args(&arguments).output(&["true"]);
        assert!(matches!(ended.code(), Some(2 | 125)), "{arguments:?}: {:?} {}", ended.status, ended.stderr);
        for word in words {
            assert!(ended.stderr.contains(word), "{arguments:?}: {word:?} is missing in: {}", ended.stderr);
        }
        assert!(ended.stderr.contains("error: "), "{}", ended.stderr);
        assert!(!ended.has_event("machine_started"), "{arguments:?}");
    }
}

#[test]
fn files_that_are_no_memory() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, len: u64| {
        let path = dir.path().join(name);
        fs::File::create(&path).unwrap().set_len(len).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let small = file("small", 256 << 20);
    let odd = file("odd", (256 << 20) + 1);
    for (value, word) in [
        (format!("file={small},size=512M"), small.as_str()),
        (format!("file={odd}"), odd.as_str()),
        (format!("file={}", dir.path().display()), dir.path().to_str().unwrap()),
        (format!("file={}/no/such", dir.path().display()), "no/such"),
        (format!("file={}", file("empty", 0)), "empty"),
    ] {
        let ended = Run::new().pmem(&value).output(&["true"]);
        ended.assert_refused(2, &["--pmem", word]);
    }
    assert_eq!(fs::metadata(&small).unwrap().len(), 256 << 20, "a refused file is as it was");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 3, "nothing was made");
}

#[test]
fn command_lines_without_sense() {
    for arguments in [vec!["run"], vec!["fly"], vec!["ctl", "-s", "/no/such/socket", "info"]] {
        let output = aconite().args(&arguments).stdin(Stdio::null()).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {output:?}");
        assert!(!output.stderr.is_empty(), "{arguments:?}");
    }
}
