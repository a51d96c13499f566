//! What the agent of the guest is asked for by the machine.

use std::fmt::Display;
use std::str::FromStr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use aconite_agent::owners::{self, Owner};
use aconite_agent::pagemap::{self, Piece};
use aconite_agent::protocol::Exec;
use aconite_agent::unit;
use aconite_agent::workload::PROGRAM;

use crate::command::{Census, CensusProcess, Error, ErrorCode, ProcessMemory, RemoveMode};
use crate::guest::client::Client;
use crate::machine::{GuestAgent, GuestUnit};
use crate::units::ByteRange;

/// Mappings whose owners are asked for at a time.
const ASKED: usize = 256;

/// How long a guest may take to say something of its processes.
const PATIENCE: Duration = Duration::from_secs(20);
/// Questions that a guest may leave without an answer, each of which keeps a thread.
const UNANSWERED: usize = 8;

/// The agent of the guest.
#[derive(Debug)]
pub struct Agent {
    client: Client,
    unanswered: Arc<AtomicUsize>,
}

impl Agent {
    /// The agent that `client` has met.
    pub fn new(client: Client) -> Self {
        Self { client, unanswered: Arc::default() }
    }

    /// [`run`], for at most [`PATIENCE`]: a kernel that is broken answers never.
    fn ask<T>(&self, words: Vec<String>) -> Result<Vec<T>, String>
    where
        T: FromStr<Err: Display> + Send + 'static,
    {
        let (client, unanswered) = (self.client.clone(), self.unanswered.clone());
        if unanswered.fetch_add(1, Ordering::Relaxed) >= UNANSWERED {
            unanswered.fetch_sub(1, Ordering::Relaxed);
            return Err(format!("The agent in the guest has left {UNANSWERED} questions without an answer"));
        }
        let (sender, answer) = mpsc::channel();
        let question = move || {
            let said = run(&client, words);
            unanswered.fetch_sub(1, Ordering::Relaxed);
            // Whoever asked may have gone.
            let _ = sender.send(said);
        };
        if let Err(error) = thread::Builder::new().name("question".to_owned()).spawn(question) {
            self.unanswered.fetch_sub(1, Ordering::Relaxed);
            return Err(format!("The agent in the guest cannot be asked: {error}"));
        }
        let seconds = PATIENCE.as_secs();
        answer
            .recv_timeout(PATIENCE)
            .unwrap_or_else(|_| Err(format!("The agent in the guest does not answer within {seconds} s")))
    }
}

/// Runs the agent's program with `words`, and returns the lines that it prints.
fn run<T: FromStr<Err: Display>>(client: &Client, words: Vec<String>) -> Result<Vec<T>, String> {
    let words = std::iter::once(PROGRAM.to_owned()).chain(words);
    let exec = Exec { argv: words.map(String::into_bytes).collect(), ..Exec::default() };
    let asked = client.exec(exec).and_then(|process| process.output());
    let output = asked.map_err(|error| error.to_string())?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).trim().to_owned());
    }
    let lines: Result<Vec<T>, _> = String::from_utf8_lossy(&output.stdout).lines().map(str::parse).collect();
    lines.map_err(|error| format!("The agent's answer is none: {error}"))
}

impl Agent {
    fn unit<'a>(&self, words: impl IntoIterator<Item = &'a str>) -> Result<(), Error> {
        let words = std::iter::once(unit::COMMAND).chain(words).map(str::to_owned);
        let said = run::<String>(&self.client, words.collect());
        said.map(drop)
            .map_err(|message| Error::new(ErrorCode::GuestRefused, message, "see the guest's kernel log"))
    }
}

impl GuestAgent for Agent {
    fn look_up(&self, memory: ProcessMemory) -> Result<Vec<ByteRange>, Error> {
        let words = vec![
            pagemap::COMMAND.to_owned(),
            memory.pid.to_string(),
            memory.address.to_string(),
            memory.length.to_string(),
        ];
        let pieces: Vec<Piece> = self.ask(words).map_err(|message| {
            Error::new(ErrorCode::GuestRefused, message, "see what the process has mapped in /proc/PID/maps")
        })?;
        Ok(pieces.iter().map(|piece| ByteRange::new(piece.gpa, piece.length)).collect())
    }

    fn name_owners(&self, census: &mut Census) -> Result<(), Error> {
        let (gpa, departed) = (census.gpa.0, census.departed);
        let mappings = &mut census.user.mappings;
        let asked = mappings.len().min(ASKED);
        if asked == 0 {
            return Ok(());
        }
        let pages = mappings[..asked].iter().map(|mapping| match departed {
            true => mapping.va.to_string(),
            false => format!("{}:{:#x}", mapping.va, gpa + mapping.offset.0),
        });
        let words: Vec<String> = std::iter::once(owners::COMMAND.to_owned()).chain(pages).collect();
        let found: Vec<Owner> = self
            .ask(words)
            .map_err(|message| Error::new(ErrorCode::GuestRefused, message, "see the guest's kernel log"))?;
        for Owner { page, pid, name } in found {
            if let Some(mapping) = mappings.get_mut(page) {
                mapping.processes.push(CensusProcess { pid, name });
            }
        }
        Ok(())
    }

    fn let_go(&self, unit: &GuestUnit, mode: RemoveMode) -> Result<(), Error> {
        let word = if mode == RemoveMode::Eject { unit::RELEASE } else { unit::DROP };
        let numbers = unit.ranges.iter().flat_map(|range| [range.start, range.end - range.start]);
        let numbers: Vec<_> = numbers.map(|number| format!("{number:#x}")).collect();
        self.unit([word, unit.path.as_str()].into_iter().chain(numbers.iter().map(String::as_str)))
    }

    fn take_up(&self, unit: &GuestUnit) -> Result<(), Error> {
        self.unit([unit::BIND, unit.path.as_str()])
    }
}
