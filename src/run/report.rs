//! The run directory: events, tables and the result.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use aconite_acpi::Tables;
use serde::Serialize;

use crate::command::{EventBus, Next};
use crate::config::Machine as Config;
use crate::machine::Outcome;

/// `result.json`.
#[derive(Debug, Serialize)]
pub struct Report<'a> {
    /// Version of the program.
    version: &'static str,
    /// Exit status of the program.
    status: u8,
    /// Exit status of the guest's command, if it ended.
    command_status: Option<u8>,
    /// The machine as it was described.
    machine: &'a Config,
    /// How the run ended.
    #[serde(flatten)]
    outcome: &'a Outcome,
}

impl<'a> Report<'a> {
    /// The report of a run.
    pub fn new(machine: &'a Config, outcome: &'a Outcome, status: u8, command_status: Option<u8>) -> Self {
        Self { version: env!("CARGO_PKG_VERSION"), status, command_status, machine, outcome }
    }

    /// Writes `result.json` whole or not at all.
    pub fn write(&self, dir: &Path) -> io::Result<()> {
        let next = dir.join("result.json.new");
        let mut file = File::create(&next)?;
        serde_json::to_writer_pretty(&mut file, self)?;
        file.write_all(b"\n")?;
        fs::rename(next, dir.join("result.json"))
    }
}

/// Writes every event to `file`, a line each, until the stream is closed.
pub fn log_events(events: &EventBus, file: File) -> io::Result<JoinHandle<()>> {
    let mut reader = events.subscribe(0);
    thread::Builder::new().name("events".to_owned()).spawn(move || {
        let mut out = BufWriter::new(file);
        loop {
            let written = match reader.next(Duration::from_secs(1)) {
                Next::Record(record) => serde_json::to_writer(&mut out, &*record)
                    .map_err(io::Error::from)
                    .and_then(|()| out.write_all(b"\n"))
                    .and_then(|()| out.flush()),
                Next::Nothing => Ok(()),
                Next::Closed => return,
            };
            if let Err(error) = written {
                tracing::warn!(%error, "the event log ends here");
                return;
            }
        }
    })
}

/// Writes each firmware table to `dir/SIGNATURE.dat`, and returns the names of the files.
pub fn write_tables(dir: &Path, tables: &Tables) -> io::Result<Vec<String>> {
    fs::create_dir_all(dir)?;
    let mut names = vec!["RSDP.dat".to_owned()];
    fs::write(dir.join(&names[0]), tables.rsdp())?;
    for placed in tables.iter() {
        let name = format!("{}.dat", placed.table.name());
        fs::write(dir.join(&name), placed.table.bytes())?;
        names.push(name);
    }
    Ok(names)
}
