//! `cargo xtask demo`: a stock kernel meets a bad line of memory, is repaired, and loses the memory.
//!
//! The demo drives the built program from outside, as a user does: `aconite run` with a workload in the guest that is
//! spoken to by lines, and `aconite ctl`. What it says at the end is what it has seen, and nothing else.

mod console;
mod guest;
mod program;
mod report;
mod story;
mod words;

use crate::fetch;
use anyhow::{Context, Result, bail};
use program::Program;
use report::Report;
use std::fs::{self, File, TryLockError};
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;
use story::{Place, Story};

/// Where the demo keeps its files, from the top of the tree.
const DIRECTORY: &str = "target/demo";

/// Arguments of `cargo xtask demo`.
#[derive(clap::Args)]
pub struct Arguments {}

/// Runs the command; it fails unless everything was seen.
pub fn run(_: &Arguments) -> Result<ExitCode> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let root = root.canonicalize().with_context(|| format!("Cannot resolve {}", root.display()))?;
    let directory = root.join(DIRECTORY);
    fs::create_dir_all(&directory).with_context(|| format!("Cannot create {}", directory.display()))?;
    let lock = File::create(directory.join("lock")).context("Cannot create the lock of the demo")?;
    if let Err(TryLockError::WouldBlock) = lock.try_lock() {
        bail!("Another demo runs in {}: wait for its end", directory.display());
    }
    let start = Instant::now();
    let mut report = Report::default();

    println!(
        "Step 1: get a stock kernel, guest programs and QEMU (downloaded once, kept in target/material)"
    );
    fetch::provide(&[])?;
    report.took("material", start.elapsed());

    println!("Step 2: build aconite (the first time takes minutes)");
    let built = Instant::now();
    let material = fetch::material_root().canonicalize().context("Cannot find the material")?;
    // Commands are run at the top of the tree, and shown as they would be typed there.
    let place = Place::new(Path::new(DIRECTORY), material.strip_prefix(&root).unwrap_or(&material));
    let program = Program::build(&root, &place.socket)?;
    report.took("build", built.elapsed());

    // A device of the last run holds its file system, and its run directory its findings.
    for old in [&place.media, &place.socket] {
        remove_file(&root.join(old))?;
    }
    let run_dir = root.join(&place.run_dir);
    if run_dir.exists() {
        fs::remove_dir_all(&run_dir).with_context(|| format!("Cannot remove {}", run_dir.display()))?;
    }
    let told = Instant::now();
    let error = Story::new(&root, &place, &program, &mut report).tell().err();
    // The log is whole once the machine has ended.
    let log = fs::read(run_dir.join("console.log")).unwrap_or_default();
    report.kernel_log(console::classify(&String::from_utf8_lossy(&log)));
    report.took("demo", told.elapsed());
    report.took("all", start.elapsed());
    let passed = report.finish(error.map(|error| format!("{error:#}")));
    print!("{}", report.summary());
    let result = directory.join("result.json");
    report.write(&result)?;
    println!("The same is in {DIRECTORY}/result.json, the run's own record in {DIRECTORY}/run.");
    Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn remove_file(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("Cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}
