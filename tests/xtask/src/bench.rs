//! `cargo xtask bench`: builds what is measured, then measures.

use crate::fetch;
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// The target of the guest's program, which is static: it is process 1 of its machine.
const GUEST_TARGET: &str = "x86_64-unknown-linux-gnu";

/// Arguments of `cargo xtask bench`.
#[derive(clap::Args)]
#[command(disable_help_flag = true)]
pub struct Arguments {
    /// Rows and options; --help lists them
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    rest: Vec<String>,
}

/// Runs the command; the exit status is 0 if everything could be measured, whether targets are met or not.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    fetch::provide(&[])?;
    let target = target_directory()?;
    let guest_target = target.join("bench");
    cargo(&["--package", "aconite", "--package", "aconite-bench", "--bins"], &target, None)?;
    cargo(
        &["--package", "aconite-bench-guest", "--target", GUEST_TARGET],
        &guest_target,
        Some("-Ctarget-feature=+crt-static"),
    )?;
    let status = Command::new(target.join("release/aconite-bench"))
        .arg("--aconite")
        .arg(target.join("release/aconite"))
        .arg("--guest")
        .arg(guest_target.join(GUEST_TARGET).join("release/aconite-bench-guest"))
        .args(&arguments.rest)
        .env("ACONITE_MATERIAL", fetch::material_root())
        .status()
        .context("Cannot start the benchmarks")?;
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from))
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Where this program was built: `.../debug/xtask`.
fn target_directory() -> Result<PathBuf> {
    let program = std::env::current_exe().context("Cannot find this program")?;
    program.ancestors().nth(2).map(Path::to_owned).context("This program is in no target directory")
}

fn cargo(arguments: &[&str], target: &Path, flags: Option<&str>) -> Result<()> {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["build", "--release", "--locked"]).args(arguments).arg("--target-dir").arg(target);
    cargo.current_dir(root());
    if let Some(flags) = flags {
        cargo.env("RUSTFLAGS", flags);
    }
    if !cargo.status().context("Cannot start cargo")?.success() {
        bail!("What is to be measured cannot be built: see above");
    }
    Ok(())
}
