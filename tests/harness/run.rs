//! A run of the program, before it is started.

use crate::environment::{aconite, default_kernel, kernel_image, note};
use crate::machine::Machine;
use crate::record::{Ended, Record};
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long a run without a conversation may take: longer than the monitor's own patience with a guest.
const WHOLE_RUN: Duration = Duration::from_secs(240);

/// `aconite run` with a run directory and an API socket of its own.
#[derive(Debug)]
pub struct Run {
    record: Record,
    kernel: PathBuf,
    arguments: Vec<OsString>,
}

impl Run {
    /// A run of the default kernel.
    pub fn new() -> Self {
        Self::kernel(&default_kernel())
    }

    /// A run of a kernel of the material.
    pub fn kernel(name: &str) -> Self {
        Self::image(kernel_image(name))
    }

    /// A run of a kernel image.
    pub fn image(path: impl Into<PathBuf>) -> Self {
        Self { record: Record::new(), kernel: path.into(), arguments: Vec::new() }
    }

    /// A directory that lives as long as the run's record.
    pub fn dir(&self) -> &Path {
        self.record.path()
    }

    /// Adds arguments of `aconite run`.
    #[must_use]
    pub fn args<I: IntoIterator<Item = S>, S: AsRef<OsStr>>(mut self, arguments: I) -> Self {
        self.arguments.extend(arguments.into_iter().map(|a| a.as_ref().to_owned()));
        self
    }

    /// Sets the number of vCPUs and the size of RAM.
    #[must_use]
    pub fn size(self, cpus: u32, memory: &str) -> Self {
        self.args(["--cpus", &cpus.to_string(), "--memory", memory])
    }

    /// Adds a memory device.
    #[must_use]
    pub fn pmem(self, value: &str) -> Self {
        self.args(["--pmem", value])
    }

    /// Packs programs.
    #[must_use]
    pub fn tools(self, names: &[&str]) -> Self {
        names.iter().fold(self, |run, name| run.args(["--tool", name]))
    }

    /// Starts the program with a command for the guest (none if it is empty), without a conversation.
    ///
    /// # Panics
    /// The program cannot be started.
    pub fn start(self, command: &[&str]) -> Machine {
        let mut program = aconite();
        program
            .arg("run")
            .arg("--kernel")
            .arg(&self.kernel)
            .arg("--run-dir")
            .arg(self.record.run_dir())
            .arg("--api-socket")
            .arg(self.record.socket())
            .args(&self.arguments);
        if !command.is_empty() {
            program.arg("--").args(command);
        }
        Machine::start(program, self.record)
    }

    /// Runs a command to the end of the machine. A guest that is led astray in its boot is started once more
    /// ([`Self::booted`]).
    ///
    /// # Panics
    /// It does not end.
    pub fn output(self, command: &[&str]) -> Ended {
        let again = self.again();
        let ended = self.output_once(command);
        match ended.record.astray_in_boot(&ended.stderr) {
            Some(end) => {
                note_lost_boot(&end);
                again.output_once(command)
            }
            None => ended,
        }
    }

    fn output_once(self, command: &[&str]) -> Ended {
        let mut machine = self.start(command);
        machine.close_input();
        machine.wait(WHOLE_RUN)
    }

    /// Boots a guest for a command, and waits until its agent answers or the machine ends.
    ///
    /// A guest that the emulated processor of the software KVM host has led astray in its boot, before anything was
    /// done to it, is started once more (resources/outcomes.md, "Open"), and a line in `target/errors/boots.txt` says so.
    pub fn booted(self, command: &[&str]) -> Machine {
        let again = self.again();
        let machine = self.start(command);
        match machine.astray_in_boot() {
            Some(end) => {
                note_lost_boot(&end);
                again.start(command).instead_of(machine)
            }
            None => machine,
        }
    }

    /// Boots a guest with a shell, and waits until the shell answers.
    ///
    /// # Panics
    /// It does not.
    pub fn shell(self) -> Machine {
        let mut machine = self.booted(&["sh"]);
        machine.wait_for_shell();
        machine
    }

    /// The same run with a record of its own.
    fn again(&self) -> Self {
        Self { record: Record::new(), kernel: self.kernel.clone(), arguments: self.arguments.clone() }
    }
}

/// Writes down that a boot was repeated.
fn note_lost_boot(end: &str) {
    note("boots.txt", &format!("A boot was repeated, of a guest that never got to its agent: {end}"));
    eprintln!("a boot is repeated: {end}");
}

impl Default for Run {
    fn default() -> Self {
        Self::new()
    }
}
