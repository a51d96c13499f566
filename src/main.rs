//! The aconite program.

use std::process::ExitCode;

/// The exit status when the monitor itself failed.
const FAILED: u8 = 125;

fn main() -> ExitCode {
    match aconite::host::hidden_command() {
        None => ExitCode::SUCCESS,
        Some(Ok(status)) => ExitCode::from(status),
        Some(Err(error)) => {
            eprintln!("Error: {:#}", anyhow::Error::from(error));
            ExitCode::from(FAILED)
        }
    }
}
