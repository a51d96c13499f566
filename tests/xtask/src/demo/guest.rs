//! A running `aconite run` whose guest runs the workload `map`, spoken to by lines.

use super::program::Program;
use aconite_agent::workload::{self, OUTPUT, Reply, Request};
use anyhow::{Context, Result, bail};
use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

/// How much longer than its own time limit a command may take to be answered.
const GRACE: Duration = Duration::from_secs(20);
/// How long a request that is not a command may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// The guest.
pub struct Guest {
    child: Child,
    requests: Option<ChildStdin>,
    lines: Receiver<String>,
}

impl Guest {
    /// Starts the program with `arguments` and the workload as the guest's command.
    pub fn start(program: &Program, arguments: &[&str]) -> Result<Self> {
        let command = ["--", workload::PROGRAM, "workload", workload::MAP];
        let words: Vec<&OsStr> = arguments.iter().chain(&command).map(OsStr::new).collect();
        let mut child = program
            .command(&words)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("Cannot start aconite")?;
        let requests = child.stdin.take();
        let output = child.stdout.take().context("aconite has no output")?;
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Ok(Guest { child, requests, lines })
    }

    /// Asks the workload.
    pub fn ask(&mut self, request: &Request) -> Result<Reply> {
        self.ask_within(request, PATIENCE).map(|(reply, _)| reply)
    }

    /// Runs a command in the guest, which is shown with its output.
    pub fn run(&mut self, seconds: u64, command: &str) -> Result<(Reply, String)> {
        println!("guest# {command}");
        let request = Request::Run(seconds, command.to_owned());
        let (reply, output) = self.ask_within(&request, Duration::from_secs(seconds) + GRACE)?;
        output.iter().for_each(|line| println!("  | {line}"));
        Ok((reply, output.join("\n")))
    }

    /// Runs a command that must succeed; its output.
    pub fn must_run(&mut self, command: &str) -> Result<String> {
        match self.run(PATIENCE.as_secs(), command)? {
            (Reply::Exit(0), output) => Ok(output),
            (reply, output) => bail!("{command:?} failed in the guest: {reply}. {output}"),
        }
    }

    /// Asks, and waits at most `patience` for the reply and the output before it.
    pub fn ask_within(&mut self, request: &Request, patience: Duration) -> Result<(Reply, Vec<String>)> {
        let requests = self.requests.as_mut().context("The workload has been told to end")?;
        let sent = writeln!(requests, "{request}").and_then(|()| requests.flush());
        if sent.is_err() {
            bail!("The guest does not take requests any more: {}", self.ending());
        }
        let deadline = Instant::now() + patience;
        let mut output = Vec::new();
        loop {
            match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => match line.strip_prefix(OUTPUT) {
                    Some(text) => output.push(text.to_owned()),
                    None => {
                        let reply = Reply::parse(&line).map_err(anyhow::Error::msg)?;
                        return Ok((reply, output));
                    }
                },
                Err(RecvTimeoutError::Timeout) => {
                    bail!("The guest has not answered `{request}` in {} s", patience.as_secs())
                }
                Err(RecvTimeoutError::Disconnected) => {
                    bail!("The guest is gone and has not answered `{request}`: {}", self.ending())
                }
            }
        }
    }

    fn ending(&mut self) -> String {
        match self.wait(Duration::from_secs(5)) {
            Some(status) => format!("aconite has ended with {status}"),
            None => "aconite still runs".into(),
        }
    }

    /// Lets the workload end; the guest powers off after it.
    pub fn dismiss(&mut self) {
        self.requests = None;
    }

    /// Waits for the end of the program.
    pub fn wait(&mut self, patience: Duration) -> Option<ExitStatus> {
        let deadline = Instant::now() + patience;
        loop {
            if let Ok(Some(status)) = self.child.try_wait() {
                return Some(status);
            }
            if Instant::now() > deadline {
                return None;
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Guest {
    /// However the demo ends, nothing is left running.
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            // Killed, the front end of the software KVM host takes its machine along.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
