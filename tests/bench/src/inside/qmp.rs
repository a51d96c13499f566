//! QEMU's control socket (docs/interop/qmp-spec.rst): lines of JSON both ways.

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

const TIMEOUT: Duration = Duration::from_secs(30);

/// A connection that takes commands.
#[derive(Debug)]
pub struct Qmp {
    stream: BufReader<UnixStream>,
    /// Events that came before they were asked for.
    events: VecDeque<Value>,
}

impl Qmp {
    /// Connects to the QEMU that listens on `socket`.
    pub fn connect(socket: &Path) -> Result<Self> {
        let stream =
            UnixStream::connect(socket).with_context(|| format!("Cannot connect to {}", socket.display()))?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        let mut qmp = Qmp { stream: BufReader::new(stream), events: VecDeque::new() };
        qmp.line()?;
        qmp.execute("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    /// Sends a line, and returns the one that comes back.
    pub fn exchange(&mut self, line: &str) -> Result<String> {
        self.stream.get_mut().write_all(line.as_bytes())?;
        self.line()
    }

    /// Has a command carried out, and returns what it returns.
    pub fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let mut line =
            self.exchange(&format!("{}\n", json!({ "execute": command, "arguments": arguments })))?;
        loop {
            let answer: Value = serde_json::from_str(&line).context("QEMU's answer is no JSON")?;
            if answer.get("event").is_some() {
                self.events.push_back(answer);
            } else if let Some(returned) = answer.get("return") {
                return Ok(returned.clone());
            } else {
                bail!("QEMU refuses {command}: {}", answer["error"]["desc"]);
            }
            line = self.line()?;
        }
    }

    /// Waits for the event `name`; those before it are told of if it does not come.
    pub fn event(&mut self, name: &str) -> Result<Value> {
        let mut others = Vec::new();
        loop {
            let event = match self.events.pop_front() {
                Some(event) => event,
                None => {
                    let line = self.line();
                    let line = line.with_context(|| format!("No event {name} after {others:?}"))?;
                    serde_json::from_str(&line).context("QEMU's event is no JSON")?
                }
            };
            if event["event"] == name {
                return Ok(event);
            }
            others.push(event.to_string());
        }
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        if self.stream.read_line(&mut line).context("QEMU says nothing")? == 0 {
            bail!("QEMU closed the connection");
        }
        Ok(line)
    }
}
