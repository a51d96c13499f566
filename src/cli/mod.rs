//! The command line, as `clap` reads it.
//!
//! Every subcommand has its arguments in a type of its own and ends in one function call, made by `main`. What can be
//! said about a machine is said through [`MachineArgs`], which puts the options over a machine file and hands out the
//! one description ([`crate::config::Machine`]).

mod ctl;
mod disk;
mod flush;
mod machine;
mod mce;
mod report;
mod show;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

pub use self::ctl::{CtlArgs, CtlError, ctl};
pub use self::machine::MachineArgs;
pub use self::report::error_chain;

/// A virtual machine monitor in which guest kernels meet broken memory
#[derive(Debug, Clone, Parser)]
#[command(name = "aconite", version, subcommand_required = true, arg_required_else_help = true)]
pub struct Cli {
    /// What is to be done.
    #[command(subcommand)]
    pub action: Action,
}

/// What is to be done.
#[derive(Debug, Clone, Subcommand)]
pub enum Action {
    /// Boot a machine, and run a command in its guest
    ///
    /// The exit status is that of the command; 124 after a timeout, 125 when the monitor failed, 254 when the guest
    /// reset itself, 255 when it panicked or a processor shut down. result.json in --run-dir says which it was.
    Run(RunArgs),
    /// Ask something of a running machine, through its API socket
    ///
    /// The exit status is 0 when it was done, 1 when the machine refused or an operation failed, 2 when the command
    /// line is wrong or no machine answers.
    Ctl(CtlArgs),
    /// Say what this host can do, and what is missing
    Doctor(DoctorArgs),
    /// Write the ACPI tables that a machine would have
    Tables(TablesArgs),
}

/// Arguments of `aconite run`.
#[derive(Debug, Clone, Args)]
pub struct RunArgs {
    /// The machine.
    #[command(flatten)]
    pub machine: MachineArgs,
    /// What to run in the guest, with its arguments [default: run until the guest powers off]
    #[arg(last = true, value_name = "COMMAND")]
    pub command: Vec<String>,
}

/// Arguments of `aconite doctor`.
#[derive(Debug, Clone, Args)]
pub struct DoctorArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `aconite tables`.
#[derive(Debug, Clone, Args)]
pub struct TablesArgs {
    /// The machine.
    #[command(flatten)]
    pub machine: MachineArgs,
    /// The directory to write them to, one file each; it is made if it is missing
    #[arg(short, long, value_name = "DIR", default_value = "tables")]
    pub output: PathBuf,
}

#[cfg(test)]
#[path = "cli_test.rs"]
mod tests;
