//! Where the memory of the guest's processes is: its agent is asked.

use aconite_agent::pagemap::{COMMAND, Piece};
use aconite_agent::protocol::Exec;
use aconite_agent::workload::PROGRAM;

use crate::command::{Error, ErrorCode, ProcessMemory};
use crate::guest::client::Client;
use crate::machine::ProcessLookup;
use crate::units::ByteRange;

/// The agent of the guest, asked for the memory of processes.
#[derive(Debug)]
pub struct AgentLookup(pub Client);

impl ProcessLookup for AgentLookup {
    fn look_up(&self, memory: ProcessMemory) -> Result<Vec<ByteRange>, Error> {
        let refused = |message: String| {
            Error::new(ErrorCode::GuestRefused, message, "see what the process has mapped in /proc/PID/maps")
        };
        let words = [
            PROGRAM.to_owned(),
            COMMAND.to_owned(),
            memory.pid.to_string(),
            memory.address.to_string(),
            memory.length.to_string(),
        ];
        let exec = Exec { argv: words.map(String::into_bytes).to_vec(), ..Exec::default() };
        let asked = self.0.exec(exec).and_then(|process| process.output());
        let output = asked.map_err(|error| refused(error.to_string()))?;
        if !output.status.success() {
            return Err(refused(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
        }
        let pieces: Result<Vec<Piece>, String> =
            String::from_utf8_lossy(&output.stdout).lines().map(str::parse).collect();
        let pieces = pieces.map_err(|error| refused(format!("The agent's answer is none: {error}")))?;
        Ok(pieces.iter().map(|piece| ByteRange::new(piece.gpa, piece.length)).collect())
    }
}
