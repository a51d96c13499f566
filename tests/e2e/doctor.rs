//! `aconite doctor` on a host that has things, and on one that has nothing.

use aconite_tests::aconite;
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::process::Command;

fn examine(mut command: Command) -> (Option<i32>, Value, Vec<Value>) {
    let output = command.args(["doctor", "--json"]).output().unwrap();
    let report: Value =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"));
    let checks = report["checks"].as_array().unwrap().clone();
    (output.status.code(), report, checks)
}

fn find<'a>(checks: &'a [Value], subject: &str) -> &'a Value {
    checks.iter().find(|check| check["subject"] == subject).unwrap_or_else(|| panic!("{subject}: {checks:?}"))
}

/// What doctor must say of KVM here, found out another way.
fn assert_kvm(check: &Value, host: &Value) {
    let flags = fs::read_to_string("/proc/cpuinfo").unwrap();
    let extension = flags.split_whitespace().find(|word| ["svm", "vmx"].contains(word));
    let opens = fs::File::options().read(true).write(true).open("/dev/kvm").is_ok();
    let found = check["found"].as_str().unwrap();
    match (Path::new("/dev/kvm").exists(), opens, extension) {
        (true, true, Some(extension)) => {
            assert_eq!((&check["mark"], host), (&"ok".into(), &"kvm".into()), "{check}");
            assert!(found.contains(extension), "{check}");
        }
        (true, true, None) => {
            assert_eq!(check["mark"], "missing", "{check}");
            assert!(found.contains("svm") && found.contains("vmx"), "{check}");
        }
        (true, false, _) => assert!(check["mark"] == "missing" && check["remedy"].is_string(), "{check}"),
        (false, ..) => {
            assert_eq!(check["mark"], "missing", "{check}");
            assert!(found.contains("/dev/kvm"), "{check}");
        }
    }
}

#[test]
fn a_host_with_everything() {
    let (status, report, checks) = examine(aconite());
    assert_eq!(status, Some(0), "{report}");
    assert_kvm(find(&checks, "KVM"), &report["host"]);
    for subject in ["kernel 6.12", "kernel 6.1", "kernel 7.x", "ndctl", "mkfs.xfs", "busybox"] {
        let check = find(&checks, subject);
        assert_ne!(check["mark"], "missing", "{check}");
    }
    let text = aconite().arg("doctor").output().unwrap();
    let text = String::from_utf8(text.stdout).unwrap();
    assert!(text.lines().last().unwrap().starts_with("Machines run here"), "{text}");
}

#[test]
fn a_host_with_nothing() {
    let empty = tempfile::tempdir().unwrap();
    let bare = || {
        let mut command = aconite();
        command.current_dir(empty.path()).env("PATH", "").env("ACONITE_MATERIAL", empty.path());
        command
    };
    let (status, report, checks) = examine(bare());
    assert_kvm(find(&checks, "KVM"), &report["host"]);
    for subject in ["kernel 6.12", "busybox", "ndctl", "daxctl", "cxl", "mkfs.xfs"] {
        let check = find(&checks, subject);
        assert_eq!(check["mark"], "missing", "{check}");
        let remedy = check["remedy"].as_str().unwrap_or_else(|| panic!("no remedy: {check}"));
        assert!(remedy.contains("cargo xtask fetch"), "{check}");
    }
    if report["host"] != "kvm" {
        assert_eq!((status, &report["host"]), (Some(1), &Value::Null), "{report}");
        assert_eq!(find(&checks, "QEMU")["mark"], "missing");
        assert_eq!(find(&checks, "kernel 6.12-plain")["mark"], "missing");
        // A run says the same, and does not hang or crash.
        let kernel = aconite_tests::environment::kernel_image("6.12");
        let output = bare().args(["run", "-k"]).arg(kernel).args(["--", "true"]).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(125), "{text}");
        assert!(text.contains("cargo xtask fetch") && !text.contains("panicked"), "{text}");
    }
}
