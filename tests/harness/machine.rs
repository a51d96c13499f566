//! A machine that runs: its shell, its API, its events, its end.

use crate::environment::{aconite, note};
use crate::record::{Ended, Record};
use crate::streams::Collected;
use crate::wait_for;
use serde_json::Value;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// How long a boot may take, with the start of the software KVM host before it and other guests beside it.
pub const BOOT: Duration = Duration::from_secs(180);
/// How long a command in a guest may take if nothing else is said.
pub const COMMAND: Duration = Duration::from_secs(90);
/// How long a kernel may take to find a memory device, after the start of its agent or a notification.
pub const PMEM: Duration = Duration::from_secs(30);
/// How long an event may take.
pub const EVENT: Duration = Duration::from_secs(60);
/// How long the end of a machine may take.
pub const END: Duration = Duration::from_secs(90);

/// A program `aconite run` that has been started. It is killed when this value goes.
#[derive(Debug)]
pub struct Machine {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: Collected,
    stderr: Collected,
    record: Option<Record>,
    commands: u32,
    ended: bool,
    /// A machine that was lost in its boot: files of this one may be in its directory.
    lost: Option<Box<Machine>>,
}

/// What a command in the guest came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// Its exit status.
    pub status: i32,
    /// What it printed on both streams, without white space at the end.
    pub text: String,
}

impl Machine {
    /// Starts `program`, which writes to the directories of `record`.
    ///
    /// # Panics
    /// It cannot be started.
    pub fn start(mut program: Command, record: Record) -> Self {
        program.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = program.spawn().unwrap_or_else(|error| panic!("{program:?}: {error}"));
        let stdout = Collected::start(child.stdout.take().expect("a pipe"));
        let stderr = Collected::start(child.stderr.take().expect("a pipe"));
        let stdin = child.stdin.take();
        Self { child, stdin, stdout, stderr, record: Some(record), commands: 0, ended: false, lost: None }
    }

    /// This machine takes the place of one that was lost in its boot.
    pub(crate) fn instead_of(mut self, lost: Machine) -> Self {
        self.lost = Some(Box::new(lost));
        self
    }

    /// The directories of the run.
    ///
    /// # Panics
    /// Never before the end.
    pub fn record(&self) -> &Record {
        self.record.as_ref().expect("the record of a machine that runs")
    }

    /// What the program has printed on standard error.
    pub fn stderr(&self) -> String {
        self.stderr.text()
    }

    /// What the program has printed on standard output.
    pub fn stdout(&self) -> String {
        self.stdout.text()
    }

    /// Waits until standard output contains `text`.
    ///
    /// # Panics
    /// It does not come.
    #[track_caller]
    pub fn wait_for_output(&self, text: &str, limit: Duration) {
        assert!(self.stdout.wait_for(0, text, limit).is_some(), "{text:?} did not come; {}", self.heard());
    }

    /// The command in the guest gets the end of its input.
    pub fn close_input(&mut self) {
        self.stdin = None;
    }

    /// Waits for the shell's first answer.
    ///
    /// # Panics
    /// It does not come.
    #[track_caller]
    pub fn wait_for_shell(&mut self) {
        let reply = self.sh_within("echo ready", BOOT);
        assert_eq!(reply, Reply { status: 0, text: "ready".into() });
    }

    /// What the vCPUs of a guest do that has fallen silent: it is told to quit.
    fn vcpus(&self) -> Value {
        self.run_ctl(&["quit"]);
        self.result_soon().map_or(Value::Null, |result| result["vcpus"].clone())
    }

    /// `result.json` of a program that has gone or is about to.
    fn result_soon(&self) -> Option<Value> {
        let end = Instant::now() + END;
        while self.record().result().is_none() && Instant::now() < end {
            thread::sleep(Duration::from_millis(100));
        }
        self.record().result()
    }

    fn heard(&self) -> String {
        format!("stdout:\n{}\nstderr:\n{}", self.stdout.text(), self.stderr.text())
    }

    /// Runs a script in the guest.
    ///
    /// # Panics
    /// The shell does not answer.
    #[track_caller]
    pub fn sh(&mut self, script: &str) -> Reply {
        self.sh_within(script, COMMAND)
    }

    /// Runs a script in the guest that may take until `limit`.
    ///
    /// # Panics
    /// The shell does not answer.
    #[track_caller]
    pub fn sh_within(&mut self, script: &str, limit: Duration) -> Reply {
        self.commands += 1;
        // The shell that reads these lines echoes nothing: the mark only stands in what printf prints.
        let quoted = script.replace('\'', r"'\''");
        let from = self.stdout.len();
        let line =
            format!("sh -c '{quoted}' </dev/null 2>&1; printf '\\n%s-%d=%d.\\n' END {} $?\n", self.commands);
        self.type_in(line.as_bytes());
        let mark = format!("\nEND-{}=", self.commands);
        let Some(after) = self.stdout.wait_for(from, &mark, limit) else {
            panic!("no answer to {script:?} within {limit:?}; vCPUs: {}; {}", self.vcpus(), self.heard())
        };
        let end = self.stdout.wait_for(after, ".\n", limit).expect("the status");
        let status = self.stdout.between(after, end - 2).parse().expect("a status");
        let text = self.stdout.between(from, after - mark.len()).trim_end().to_owned();
        Reply { status, text }
    }

    /// Runs a script in the guest that must succeed, and returns what it printed.
    ///
    /// # Panics
    /// It fails.
    #[track_caller]
    pub fn ok(&mut self, script: &str) -> String {
        let reply = self.sh(script);
        assert_eq!(reply.status, 0, "{script:?} printed: {}", reply.text);
        reply.text
    }

    /// Waits until the guest's nfit driver scrubs nothing any more: the first scrub begins by itself, and may still be
    /// under way when its block device is there.
    #[track_caller]
    pub fn scrubbed(&mut self) {
        self.until_ok("! grep -q + /sys/bus/nd/devices/ndbus0/nfit/scrub", PMEM);
    }

    /// Runs a script in the guest until it succeeds, and returns what it printed then.
    ///
    /// # Panics
    /// It does not succeed in time.
    #[track_caller]
    pub fn until_ok(&mut self, script: &str, limit: Duration) -> String {
        let mut last = String::new();
        let deadline = std::time::Instant::now() + limit;
        while std::time::Instant::now() < deadline {
            let reply = self.sh(script);
            if reply.status == 0 {
                return reply.text;
            }
            last = reply.text;
            thread::sleep(Duration::from_millis(200));
        }
        panic!("{script:?} did not succeed within {limit:?}; at last it printed: {last}")
    }

    /// Writes to the standard input of the command in the guest.
    ///
    /// # Panics
    /// The program has gone.
    #[track_caller]
    pub fn type_in(&mut self, bytes: &[u8]) {
        let written = self.stdin.as_mut().expect("an open input").write_all(bytes);
        if let Err(error) = written {
            let end = self.result_soon().map_or(Value::Null, |result| result["cause"].clone());
            panic!("the program has gone: {error}; cause: {end}; {}", self.heard());
        }
    }

    fn run_ctl(&self, arguments: &[&str]) -> Output {
        let mut command = aconite();
        command.args(["ctl", "--json", "-s"]).arg(self.record().socket()).args(arguments);
        command.stdin(Stdio::null()).output().expect("aconite ctl")
    }

    /// Asks through the API socket, as `aconite ctl --json` does.
    ///
    /// # Panics
    /// It is refused.
    #[track_caller]
    pub fn ctl(&self, arguments: &[&str]) -> Value {
        let output = self.run_ctl(arguments);
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success(),
            "ctl {arguments:?}: {:?} {text}{}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("ctl {arguments:?}: {error}: {text}"))
    }

    /// Asks for what must be refused, and returns the error.
    ///
    /// # Panics
    /// It is not refused.
    #[track_caller]
    pub fn ctl_refused(&self, arguments: &[&str]) -> Value {
        let output = self.run_ctl(arguments);
        let text = String::from_utf8_lossy(&output.stdout);
        assert_eq!(output.status.code(), Some(1), "ctl {arguments:?}: {text}");
        let reply: Value = serde_json::from_str(&text).expect("a refusal in JSON");
        reply["error"].clone()
    }

    /// Asks for an operation that must fail, and returns how it ended.
    ///
    /// # Panics
    /// It is refused, or does not fail.
    #[track_caller]
    pub fn ctl_failed(&self, arguments: &[&str]) -> Value {
        let output = self.run_ctl(arguments);
        let text = String::from_utf8_lossy(&output.stdout);
        assert_eq!(output.status.code(), Some(1), "ctl {arguments:?}: {text}");
        let reply: Value = serde_json::from_str(&text).expect("an operation in JSON");
        assert_eq!(reply["state"], "failed", "{reply}");
        reply
    }

    /// The memory device with this id.
    ///
    /// # Panics
    /// There is none.
    #[track_caller]
    pub fn device(&self, id: &str) -> Value {
        self.ctl(&["memory", id])
    }

    /// The API socket.
    pub fn socket(&self) -> PathBuf {
        self.record().socket()
    }

    /// The events after number `since`, up to now: from the machine if it answers, else from the file, which a
    /// software KVM host may write late.
    #[track_caller]
    pub fn events(&self, since: u64) -> Vec<Value> {
        let output = self.run_ctl(&["events", "--since", &since.to_string()]);
        if !output.status.success() {
            // Before the socket is there, at the end, and after it.
            let error = String::from_utf8_lossy(&output.stderr);
            let is_gone = error.contains("No machine answers") || error.contains("broke");
            assert!(is_gone, "ctl events: {error}");
            let written = self.record().events().into_iter();
            return written.filter(|event| event["seq"].as_u64() > Some(since)).collect();
        }
        let text = String::from_utf8_lossy(&output.stdout);
        let parse = |line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line:?}"));
        text.lines().map(parse).collect()
    }

    /// Number of the last event.
    #[track_caller]
    pub fn last_event(&self) -> u64 {
        self.events(0).last().and_then(|event| event["seq"].as_u64()).unwrap_or(0)
    }

    /// Waits for an event after number `since` that `wanted` accepts.
    ///
    /// # Panics
    /// It does not come.
    #[track_caller]
    pub fn event(&self, since: u64, name: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        // What there is instead is shown by the record.
        wait_for(&format!("the event {name} after number {since}"), EVENT, || {
            self.events(since).into_iter().find(|event| event["event"] == name && wanted(event))
        })
    }

    /// Waits until the guest's agent is there.
    ///
    /// # Panics
    /// The guest does not get that far.
    #[track_caller]
    pub fn booted(&self) {
        wait_for("the event agent_ready", BOOT, || {
            self.events(0).into_iter().find(|event| event["event"] == "agent_ready")
        });
    }

    /// Waits until a guest whose power has come back answers in its shell.
    ///
    /// # Panics
    /// It does not get that far.
    #[track_caller]
    pub fn booted_again(&mut self) {
        wait_for("the event agent_ready of the new machine", BOOT, || {
            let events = self.events(0);
            let gone = events.iter().any(|event| event["event"] == "power_cut");
            events.into_iter().find(|event| event["event"] == "agent_ready" && !gone)
        });
        self.wait_for_shell();
    }

    /// Waits until the guest's agent answers or the machine ends: how it ended, if the guest was led astray
    /// ([`Record::astray_in_boot`]).
    pub fn astray_in_boot(&self) -> Option<String> {
        let end = Instant::now() + BOOT;
        while Instant::now() < end {
            if self.events(0).iter().any(|event| event["event"] == "agent_ready") {
                return None;
            }
            if self.record().result().is_some() {
                return self.record().astray_in_boot(&self.stderr());
            }
            thread::sleep(Duration::from_millis(100));
        }
        None
    }

    /// All events with this name after number `since`.
    #[track_caller]
    pub fn events_named(&self, since: u64, name: &str) -> Vec<Value> {
        self.events(since).into_iter().filter(|event| event["event"] == name).collect()
    }

    /// Sends the program a signal, by its name: `INT`, `KILL`.
    ///
    /// # Panics
    /// It has gone.
    #[track_caller]
    pub fn signal(&self, name: &str) {
        let status = Command::new("kill").arg(format!("-{name}")).arg(self.child.id().to_string()).status();
        assert!(status.is_ok_and(|status| status.success()), "kill -{name}; {}", self.heard());
    }

    /// Types the last line into the shell, and waits for the end of the machine.
    ///
    /// # Panics
    /// It does not end.
    #[track_caller]
    pub fn finish(mut self, last: &str) -> Ended {
        self.type_in(format!("{last}\n").as_bytes());
        self.close_input();
        self.wait(END)
    }

    /// Waits for the end of the program.
    ///
    /// # Panics
    /// It does not end.
    #[track_caller]
    pub fn wait(mut self, limit: Duration) -> Ended {
        let deadline = std::time::Instant::now() + limit;
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("a child") {
                break status;
            }
            assert!(
                std::time::Instant::now() < deadline,
                "the machine did not end within {limit:?}; {}",
                self.heard()
            );
            thread::sleep(Duration::from_millis(50));
        };
        self.ended = true;
        let stderr = self.stderr.to_end(END);
        note_lost_host(&stderr);
        Ended {
            status,
            stdout: self.stdout.to_end(END),
            stderr,
            record: self.record.take().expect("the record of a machine that ran"),
        }
    }
}

/// Writes down the test that runs, if the software KVM host has ended under its machine; `stderr` is the program's.
fn note_lost_host(stderr: &str) {
    if stderr.contains("The software KVM host has ended: QEMU has ended") {
        note("lost_hosts.txt", thread::current().name().unwrap_or_default());
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        // It may have ended by itself; a child that was not waited for keeps its id.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            let stderr = self.stderr.text();
            eprintln!("---- standard error of the program\n{stderr}");
            note_lost_host(&stderr);
        }
    }
}
