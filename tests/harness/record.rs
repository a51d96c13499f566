//! What is left of a run: its directory, and how it ended.

use serde_json::Value;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::thread;
use tempfile::TempDir;

/// Lines of the console that a failed test shows.
const CONSOLE_LINES: usize = 60;
/// Events that a failed test shows.
const EVENTS: usize = 25;

/// The directory of a run. If the test panics, it shows what is in it.
#[derive(Debug)]
pub struct Record {
    dir: TempDir,
}

impl Record {
    /// A new, empty directory.
    ///
    /// # Panics
    /// There can be none.
    pub fn new() -> Self {
        Self { dir: tempfile::Builder::new().prefix("aconite-").tempdir().expect("a directory for the run") }
    }

    /// The directory: files of the test may be here, too.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// What the monitor writes.
    pub fn run_dir(&self) -> PathBuf {
        self.dir.path().join("run")
    }

    /// The API socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("api.sock")
    }

    /// The serial line.
    pub fn console(&self) -> String {
        let bytes = fs::read(self.run_dir().join("console.log")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).replace('\r', "")
    }

    /// Complete lines of the event log.
    pub fn events(&self) -> Vec<Value> {
        let text = fs::read_to_string(self.run_dir().join("events.jsonl")).unwrap_or_default();
        let complete = text.rfind('\n').map_or("", |end| &text[..end]);
        complete
            .lines()
            .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("event {line:?}: {error}")))
            .collect()
    }

    /// How the guest ended, if that was in the software KVM host, before its agent answered, and without a word of the
    /// kernel's; `stderr` is the program's.
    pub fn astray_in_boot(&self, stderr: &str) -> Option<String> {
        let result = self.result()?;
        let lost = result["cause"] == "no_agent" || result["cause"] == "triple_fault";
        let early = !self.events().iter().any(|event| event["event"] == "agent_ready");
        let nested = stderr.contains("running in the software KVM host");
        let silent = !self.console().contains("Kernel panic");
        (lost && early && nested && silent).then(|| format!("{}, {}", result["cause"], result["vcpus"]))
    }

    /// `result.json`, if it is there.
    pub fn result(&self) -> Option<Value> {
        let text = fs::read(self.run_dir().join("result.json")).ok()?;
        Some(serde_json::from_slice(&text).expect("result.json is JSON"))
    }
}

impl Default for Record {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        if !thread::panicking() {
            return;
        }
        let console = self.console();
        let lines: Vec<_> = console.lines().collect();
        let tail = lines[lines.len().saturating_sub(CONSOLE_LINES)..].join("\n");
        let text = fs::read_to_string(self.run_dir().join("events.jsonl")).unwrap_or_default();
        let events: Vec<_> = text.lines().collect();
        let last = events[events.len().saturating_sub(EVENTS)..].join("\n");
        eprintln!("---- console\n{tail}\n---- events\n{last}\n----");
    }
}

/// A run that has ended.
#[derive(Debug)]
pub struct Ended {
    /// The exit status of the program.
    pub status: ExitStatus,
    /// What it printed.
    pub stdout: String,
    /// What it printed on standard error.
    pub stderr: String,
    /// What it left.
    pub record: Record,
}

impl Ended {
    /// The exit status, if the program was not ended by a signal.
    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }

    /// The signal that ended the program.
    pub fn signal(&self) -> Option<i32> {
        self.status.signal()
    }

    /// `result.json`.
    ///
    /// # Panics
    /// There is none.
    pub fn result(&self) -> Value {
        self.record.result().unwrap_or_else(|| panic!("there is no result.json; stderr: {}", self.stderr))
    }

    /// Asserts on the exit status and on the cause in `result.json`.
    ///
    /// # Panics
    /// They are others.
    #[track_caller]
    pub fn assert_ended(&self, code: i32, cause: &str) {
        let result = self.record.result();
        let found = result.as_ref().and_then(|result| result["cause"].as_str());
        assert_eq!(
            (self.code(), found),
            (Some(code), Some(cause)),
            "status and cause; stdout:\n{}\nstderr:\n{}",
            self.stdout,
            self.stderr
        );
        assert_eq!(result.unwrap()["status"], code, "result.json has the exit status");
    }

    /// Whether an event with this name was reported.
    pub fn has_event(&self, name: &str) -> bool {
        self.record.events().iter().any(|event| event["event"] == name)
    }

    /// Asserts that the program refused to start: status 125 or 2, and one error that holds all `words`.
    ///
    /// # Panics
    /// It did something else.
    #[track_caller]
    pub fn assert_refused(&self, code: i32, words: &[&str]) {
        assert_eq!(self.code(), Some(code), "stderr: {}", self.stderr);
        for word in words {
            assert!(self.stderr.contains(word), "{word:?} is missing in: {}", self.stderr);
        }
        assert!(!self.stderr.contains("panicked at"), "{}", self.stderr);
        assert!(!self.has_event("machine_started"), "the machine was started all the same");
    }
}
