//! Bare guests: every kind of instruction against poisoned and clean lines of a guarded page (`tests/matrix`).
//!
//! The table with every row is left in `target/errors`: `matrix.txt`, `matrix.tsv` and `matrix.json`.

use aconite_tests::environment::matrix;
use std::fs;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

/// Distinct instruction forms that must be run at least.
const FORMS: u64 = 60;

#[test]
fn every_form_does_with_a_guard_what_it_does_without() {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("../errors");
    fs::create_dir_all(&dir).unwrap();
    let dir = fs::canonicalize(dir).unwrap();
    let output = matrix().arg("--report").arg(&dir).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    println!("{text}The table is in {}", dir.display());
    assert!(output.status.success(), "{}{}", text, String::from_utf8_lossy(&output.stderr));
    let report: serde_json::Value =
        serde_json::from_slice(&fs::read(dir.join("matrix.json")).unwrap()).unwrap();
    let count = |name: &str| report[name].as_u64().unwrap();
    assert!(count("forms") >= FORMS, "{text}");
    assert_eq!(count("failed"), 0, "{text}");
    let rows = report["rows"].as_array().unwrap();
    for row in rows.iter().filter(|row| row["outcome"] == "not-run") {
        assert_ne!(row["detail"], "", "a row that is not run says why: {row}");
    }
}

/// Seeds that no run before has had: a failure says its seed.
#[test]
#[ignore = "wide: 10000 random instruction streams"]
fn random_streams() {
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let output =
        matrix().args(["random stream", "--streams", "10000", "--seed", &seed.to_string()]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "from seed {seed}: {text}{}", String::from_utf8_lossy(&output.stderr));
}
