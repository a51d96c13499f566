//! `cargo xtask test`: everything that the tests need, then the tests.

use crate::fetch;
use anyhow::{Context, Result};
use std::path::Path;
use std::process::{Command, ExitCode};

/// Arguments of `cargo xtask test`.
#[derive(clap::Args)]
pub struct Arguments {
    /// Only the tests that boot no guest: no material is fetched
    #[arg(long)]
    quick: bool,
    /// Passed to cargo test: package selection, a filter, `-- --nocapture`
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    rest: Vec<String>,
}

/// Runs the command; the exit status is that of `cargo test`.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    if !arguments.quick {
        fetch::run(&fetch::Arguments::default())?;
    }
    let status = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["test", "--workspace"])
        .args(&arguments.rest)
        .env("ACONITE_MATERIAL", fetch::material_root())
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("../.."))
        .status()
        .context("Cannot start cargo")?;
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from))
}
