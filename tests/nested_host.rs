//! The software KVM host, seen from outside: programs of the host run in it as if they ran here.

use aconite_tests::aconite;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

fn inside(command: &[&str]) -> Command {
    let mut aconite = aconite();
    aconite.arg("__inside").args(command);
    aconite
}

fn sh(script: &str) -> Output {
    inside(&["sh", "-c", script]).stdin(Stdio::null()).output().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Waits for what must come soon; generous, because machines that emulate are slow.
fn wait_for(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !condition() {
        assert!(Instant::now() < deadline, "{what} did not come");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn kill(child: &Child, signal: &str) {
    let status = Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap();
    assert!(status.success());
}

#[test]
fn there_is_real_kvm() {
    let output = sh("grep -qw svm /proc/cpuinfo && test -c /dev/kvm && uname -r");
    assert!(output.status.success(), "{output:?}");
    assert!(stdout(&output).starts_with("6.12."), "{output:?}");
}

#[test]
fn status_and_streams_pass_through() {
    let output = sh("echo out; echo err >&2; exit 7");
    assert_eq!(output.status.code(), Some(7));
    assert_eq!((stdout(&output).as_str(), output.stderr.as_slice()), ("out\n", b"err\n".as_slice()));
    assert_eq!(sh("kill -KILL $$").status.code(), Some(128 + 9));
    assert_eq!(inside(&["/nonexistent/program"]).output().unwrap().status.code(), Some(125));

    let mut child =
        inside(&["sh", "-c", "wc -c"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut input = child.stdin.take().unwrap();
    let writer = std::thread::spawn(move || {
        for _ in 0..300 {
            input.write_all(&[7; 10_000]).unwrap();
        }
    });
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    assert_eq!(stdout(&output).trim(), "3000000");
}

#[test]
fn files_are_reached_under_their_own_paths() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    for text in ["first", "second version"] {
        fs::write(&file, text).unwrap();
        // The working directory, too, is the same.
        let output = inside(&["sh", "-c", "cat file; printf %s \"$1\" > back", "sh", text])
            .current_dir(dir.path())
            .output()
            .unwrap();
        assert_eq!(stdout(&output), text, "what changed here is seen inside");
        assert_eq!(
            fs::read_to_string(dir.path().join("back")).unwrap(),
            text,
            "what is written inside is here"
        );
    }
    let output = sh("touch /usr/bin/aconite-was-here && ls /usr/bin/aconite-was-here");
    assert!(output.status.success(), "{output:?}");
    assert!(!Path::new("/usr/bin/aconite-was-here").exists(), "the host's own programs are not written");
}

#[test]
fn signals_pass_through() {
    let dir = tempfile::tempdir().unwrap();
    let script = "trap 'exit 5' INT; touch ready; while :; do sleep 0.05; done";
    let mut child = inside(&["sh", "-c", script]).current_dir(dir.path()).spawn().unwrap();
    wait_for("the file of the command", || dir.path().join("ready").exists());
    kill(&child, "-INT");
    assert_eq!(child.wait().unwrap().code(), Some(5));
}

#[test]
fn a_killed_front_end_ends_its_command_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let script = "trap 'touch told; exit' TERM; touch ready; while :; do sleep 0.05; done";
    let mut child = inside(&["sh", "-c", script]).current_dir(dir.path()).spawn().unwrap();
    wait_for("the file of the command", || dir.path().join("ready").exists());
    kill(&child, "-KILL");
    child.wait().unwrap();
    wait_for("the signal inside", || dir.path().join("told").exists());
}

#[test]
fn it_ends_when_idle_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let start = |number: u32| {
        let mut command = inside(&["sh", "-c", &format!("exit {number}")]);
        command.env("XDG_RUNTIME_DIR", dir.path()).env("ACONITE_NESTED_IDLE", "1");
        command.spawn().unwrap()
    };
    // Several at once start one host.
    let children: Vec<Child> = (1..=3).map(start).collect();
    for (number, mut child) in (1..).zip(children) {
        assert_eq!(child.wait().unwrap().code(), Some(number));
    }
    wait_for("the end of the idle host", || fs::read_dir(dir.path()).unwrap().next().is_none());
}
