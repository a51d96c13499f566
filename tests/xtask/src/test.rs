//! `cargo xtask test`: everything that the tests need, then the tests.
//!
//! Three tiers: `--quick`, all tests that boot nothing; without arguments, those and what every change must hold
//! against real guests; a suite by name, everything of it, wide tables and slow tests too.
//!
//! If the software KVM host ended by itself under every test that failed, these are repeated, once, and it is said.

use crate::fetch;
use anyhow::{Context, Result, bail};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, ExitStatus, Stdio};

/// The package of the tests that boot machines.
const END_TO_END: &str = "aconite-tests";

/// The package of the program, and the one of the bare guests.
const PROGRAM: &str = "aconite";
const MATRIX: &str = "aconite-matrix";

/// Kernels that tests boot beside the default one.
const KERNELS: [&str; 2] = ["6.1", "7.x"];

/// The suites that are about memory errors.
const ERRORS: [&str; 12] = [
    "matrix::",
    "outcomes::",
    "mce::",
    "policy::",
    "ram::",
    "mapped::",
    "apei::",
    "einj::",
    "erst::",
    "dma::",
    "backings::",
    "host_poison::",
];

/// The suites about memory that goes away.
const REMOVAL: [&str; 18] = [
    "removal::",
    "repurposed::",
    "kmem::",
    "cycles::under_load",
    "cycles::over_ports",
    "cycles::over_bridges",
    "defects::",
    "mapped::",
    "ports::",
    "virtio_pmem::",
    "bridges::",
    "disk::",
    "disk_removal::",
    "flushes::",
    "dma_held::",
    "pins::",
    "crowd::",
    "stacked::",
];

/// The suites about NVDIMMs and their firmware.
const NVDIMM: [&str; 10] = [
    "nvdimm::",
    "topology::",
    "lies::",
    "firmware::",
    "scrub::",
    "security::",
    "misbehaving::",
    "power::",
    "online::",
    "e820::",
];

/// Guests at a time: two fit into the software KVM host on two processors, and a wait in one of them costs the
/// other nothing.
const GUESTS: &str = "2";

/// A part of the end-to-end tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Suite {
    /// Guests boot, run commands and end
    Boot,
    /// Clocks with and without kvmclock
    Clocks,
    /// Errors that guests inject through their firmware
    Einj,
    /// What a crashed guest leaves for the next
    Erst,
    /// Memory errors: what kernels make of them, as a table
    Errors,
    /// Bare guests: every kind of instruction against poisoned and clean lines
    Matrix,
    /// A mapped file: signals, repair, accesses after a removal
    Mapped,
    /// Memory that goes away and comes back
    Removal,
    /// Devices that come and go at random, a thousand times (or `ACONITE_CYCLES` times) over each channel
    Cycles,
    /// Requests to a machine
    Api,
    /// `aconite doctor`
    Doctor,
    /// Options, files and images that are wrong
    Input,
    /// Persistent memory as guests see it, its firmware, and what it keeps
    Nvdimm,
    /// Guests that mean harm
    Hostile,
    /// The software KVM host
    Host,
}

impl Suite {
    /// Test target, and the filters for it: a test is run if it passes one of them.
    fn target(self) -> (&'static str, &'static [&'static str]) {
        match self {
            Self::Boot => ("e2e", &["boot::"]),
            Self::Clocks => ("e2e", &["clocks::"]),
            Self::Einj => ("e2e", &["einj::"]),
            Self::Erst => ("e2e", &["erst::"]),
            Self::Errors => ("e2e", &ERRORS),
            Self::Matrix => ("e2e", &["matrix::"]),
            Self::Mapped => ("e2e", &["mapped::"]),
            Self::Removal => ("e2e", &REMOVAL),
            Self::Cycles => ("e2e", &["cycles::a_thousand"]),
            Self::Api => ("e2e", &["api::"]),
            Self::Doctor => ("e2e", &["doctor::"]),
            Self::Input => ("e2e", &["input::"]),
            Self::Nvdimm => ("e2e", &NVDIMM),
            Self::Hostile => ("e2e", &["hostile::"]),
            Self::Host => ("nested_host", &[]),
        }
    }
}

/// Arguments of `cargo xtask test`.
#[derive(clap::Args)]
pub struct Arguments {
    /// Suites of end-to-end tests to run as a whole, slow and wide tests too [default: all other tests]
    suites: Vec<Suite>,
    /// Only the tests that boot no guest: no material is fetched
    #[arg(long, conflicts_with_all = ["suites", "kernel"])]
    quick: bool,
    /// Each property is tried on this many random inputs: fuzzing, for as long as that takes
    #[arg(long, value_name = "COUNT", requires = "quick")]
    cases: Option<u32>,
    /// The kernel of the tests that are not about a certain one, by its name among the material
    #[arg(long, value_name = "NAME", default_value = "6.12")]
    kernel: String,
    /// Passed to the tests: a filter, `--nocapture`
    #[arg(last = true)]
    rest: Vec<String>,
}

/// Runs the command; the exit status is that of the first `cargo test` that fails.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    if arguments.suites.is_empty() {
        let mut unit = cargo();
        unit.args(["test", "--workspace", "--exclude", END_TO_END]);
        if let Some(cases) = arguments.cases {
            unit.env("PROPTEST_CASES", cases.to_string());
        }
        if arguments.quick {
            unit.arg("--").args(&arguments.rest);
        } else {
            fetch::provide(&KERNELS)?;
        }
        let status = unit.status().context("Cannot start cargo")?;
        if arguments.quick || !status.success() {
            return Ok(exit_code(status));
        }
    } else {
        fetch::provide(&KERNELS)?;
    }

    let program = build(PROGRAM, &["--release"])?;
    // Its guests are a few instructions: what the compiler does not optimise costs nothing.
    let matrix = build(MATRIX, &[])?;
    let end_to_end = || {
        let mut test = cargo();
        test.args(["test", "--no-fail-fast", "--package", END_TO_END])
            .env("ACONITE_BIN", &program)
            .env("ACONITE_MATRIX", &matrix)
            .env("ACONITE_KERNEL", &arguments.kernel);
        if std::env::var_os("RUST_TEST_THREADS").is_none() {
            test.env("RUST_TEST_THREADS", GUESTS);
        }
        test
    };
    let mut runs = Vec::new();
    if arguments.suites.is_empty() {
        let mut test = end_to_end();
        test.arg("--").args(&arguments.rest);
        runs.push(test);
    }
    for suite in &arguments.suites {
        let (target, filters) = suite.target();
        let mut test = end_to_end();
        test.args(["--test", target, "--", "--include-ignored"]);
        // A filter of the user's is narrower than the suite's, and two of them would be either.
        match arguments.rest.first() {
            Some(first) if !first.starts_with('-') => {}
            _ => drop(test.args(filters)),
        }
        test.args(&arguments.rest);
        runs.push(test);
    }
    let reports = Reports::new(&program)?;
    let mut worst = ExitCode::SUCCESS;
    for mut test in runs {
        let Ended { mut status, failed } = run_tests(&mut test)?;
        if reports.explain(&failed) {
            eprintln!(
                "the software KVM host ended by itself under these tests; they are repeated: {failed:?}"
            );
            let mut again = end_to_end();
            again.args(["--", "--include-ignored", "--exact"]).args(&failed);
            status = run_tests(&mut again)?.status;
        }
        if !status.success() {
            worst = exit_code(status);
            break;
        }
    }
    reports.show();
    Ok(worst)
}

/// How tests ended.
struct Ended {
    status: ExitStatus,
    /// Names of those that failed.
    failed: Vec<String>,
}

/// Runs tests, and passes on what they print.
fn run_tests(command: &mut Command) -> Result<Ended> {
    let mut child = command.stdout(Stdio::piped()).spawn().context("Cannot start cargo")?;
    let mut output = BufReader::new(child.stdout.take().context("Cargo has no standard output")?);
    let (mut line, mut failed) = (Vec::new(), Vec::new());
    while output.read_until(b'\n', &mut line).context("Cannot read what cargo prints")? > 0 {
        // Who reads this has perhaps gone; the tests go on.
        let _ = std::io::stdout().write_all(&line);
        failed.extend(failed_test(&String::from_utf8_lossy(&line)).map(str::to_owned));
        line.clear();
    }
    Ok(Ended { status: child.wait().context("Cannot wait for cargo")?, failed })
}

/// The name of the test that failed, by a line of the test harness.
fn failed_test(line: &str) -> Option<&str> {
    line.trim_end().strip_prefix("test ")?.strip_suffix(" ... FAILED")
}

/// Tables that tests write to `target/errors`, each with its counts in the last line.
struct Reports(PathBuf);

impl Reports {
    /// Takes away those of earlier runs: `program` was built to `target/release`.
    fn new(program: &Path) -> Result<Self> {
        let target = program.ancestors().nth(2).context("The program is in no target directory")?;
        let dir = target.join("errors");
        match std::fs::remove_dir_all(&dir) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("Cannot remove {}", dir.display()))
            }
            _ => Ok(Self(dir)),
        }
    }

    /// Whether some tests failed, and under each of them the software KVM host ended by itself: its emulated processor is
    /// not perfect, and what ends all of a host is not a guest's or the monitor's doing.
    fn explain(&self, failed: &[String]) -> bool {
        let text = std::fs::read_to_string(self.0.join("lost_hosts.txt")).unwrap_or_default();
        !failed.is_empty() && failed.iter().all(|name| text.lines().any(|line| line == name))
    }

    /// Says what there is.
    fn show(&self) {
        let files = std::fs::read_dir(&self.0).into_iter().flatten().flatten().map(|entry| entry.path());
        let mut tables: Vec<PathBuf> =
            files.filter(|path| path.extension().is_some_and(|e| e == "txt")).collect();
        tables.sort();
        for path in tables {
            let text = std::fs::read_to_string(&path).unwrap_or_default();
            eprintln!("{}\n    {}", path.display(), text.lines().last().unwrap_or_default());
        }
    }
}

/// Builds the program of `package`, and returns its path as cargo tells it.
fn build(package: &str, options: &[&str]) -> Result<PathBuf> {
    let output = cargo()
        .args(["build", "--package", package, "--message-format", "json-render-diagnostics"])
        .args(options)
        .stderr(Stdio::inherit())
        .output()
        .context("Cannot start cargo")?;
    if !output.status.success() {
        bail!("{package} cannot be built: see above");
    }
    let messages = String::from_utf8_lossy(&output.stdout);
    let executable = messages.lines().rev().find_map(|line| {
        let message: serde_json::Value = serde_json::from_str(line).ok()?;
        let named = message["target"]["name"] == package;
        message["executable"].as_str().filter(|_| named).map(PathBuf::from)
    });
    executable.with_context(|| format!("Cargo built {package}, but did not say where it is"))
}

fn cargo() -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo
        .env("ACONITE_MATERIAL", fetch::material_root())
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("../.."));
    cargo
}

fn exit_code(status: ExitStatus) -> ExitCode {
    status.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failed_tests_are_told_by_their_lines() {
        assert_eq!(failed_test("test outcomes::smca_2 ... FAILED\n"), Some("outcomes::smca_2"));
        assert_eq!(failed_test("test outcomes::smca_4 ... ok\n"), None);
        assert_eq!(failed_test("test result: FAILED. 51 passed; 4 failed\n"), None);
    }

    #[test]
    fn only_tests_under_which_the_host_ended_are_explained() {
        let dir = std::env::temp_dir().join(format!("xtask-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("lost_hosts.txt"), "a::one\na::two\n").unwrap();
        let reports = Reports(dir.clone());
        let explain =
            |names: &[&str]| reports.explain(&names.iter().map(|n| n.to_string()).collect::<Vec<_>>());
        assert!(explain(&["a::two"]) && explain(&["a::one", "a::two"]));
        assert!(!explain(&[]) && !explain(&["a::one", "b::other"]));
        std::fs::remove_dir_all(dir).unwrap();
    }
}
