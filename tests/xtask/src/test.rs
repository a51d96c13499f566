//! `cargo xtask test`: everything that the tests need, then the tests.

use crate::fetch;
use anyhow::{Context, Result};
use std::path::Path;
use std::process::{Command, ExitCode, ExitStatus};

/// The package of the tests that boot machines.
const END_TO_END: &str = "aconite-tests";

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
    let mut test = cargo();
    test.args(["test", "--workspace"]);
    if arguments.quick {
        test.args(["--exclude", END_TO_END]);
    } else {
        fetch::run(&fetch::Arguments::default())?;
        // The end-to-end tests start the program, which cargo test alone does not build.
        let built = cargo().args(["build", "--package", "aconite"]).status().context("Cannot start cargo")?;
        if !built.success() {
            return Ok(exit_code(built));
        }
    }
    let status = test.args(&arguments.rest).status().context("Cannot start cargo")?;
    Ok(exit_code(status))
}

fn cargo() -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo
        .env("ACONITE_MATERIAL", fetch::material_root())
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("../.."));
    cargo
}

fn exit_code(status: ExitStatus) -> ExitCode {
    status.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from)
}
