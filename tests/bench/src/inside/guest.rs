//! A machine of aconite's, and a program in its guest that answers requests.

use super::counters;
use crate::plan::Plan;
use anyhow::{Context, Result};
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// A machine of aconite's with a worker in its guest. It is killed when this is dropped.
#[derive(Debug)]
pub struct Guest {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Guest {
    /// Starts a machine with these options that listens on `socket`; returns it, and the number that the worker begins
    /// with.
    pub fn start(plan: &Plan, socket: &Path, options: &[&str], worker: &str) -> Result<(Self, u64)> {
        let errors = plan.dir.join("errors");
        let _ = std::fs::remove_file(socket);
        let mut command = Command::new(plan.dir.join("aconite"));
        command.args(["run", "--host=kvm", "--memory=768M"]).args(options);
        command.arg("--kernel").arg(plan.dir.join("vmlinux")).arg("--modules").arg(&plan.modules);
        command.arg("--api-socket").arg(socket);
        command.arg("--").arg(plan.dir.join("guest")).arg(worker);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(File::create(&errors)?);
        let mut child = command.spawn().context("Cannot start aconite")?;
        let (input, output) = (child.stdin.take(), child.stdout.take());
        let mut guest = Guest {
            child,
            input: input.context("No standard input")?,
            output: BufReader::new(output.context("No standard output")?),
        };
        let ready =
            guest.number("ready").with_context(|| std::fs::read_to_string(&errors).unwrap_or_default())?;
        Ok((guest, ready))
    }

    /// Process id of the monitor.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The number in the guest's next line, which starts with `word`.
    fn number(&mut self, word: &str) -> Result<u64> {
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        let number = line.trim().strip_prefix(word).and_then(|rest| rest.trim().parse().ok());
        number.with_context(|| format!("The guest says {line:?}"))
    }

    /// What the worker answers.
    pub fn ask(&mut self, request: &str) -> Result<u64> {
        writeln!(self.input, "{request}")?;
        self.number("")
    }

    /// The sum of these counters.
    pub fn counters(&self, names: &[&str]) -> Result<u64> {
        let counters = counters::of_machine(self.child.id())?;
        Ok(names.iter().filter_map(|name| counters.get(*name)).sum())
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
