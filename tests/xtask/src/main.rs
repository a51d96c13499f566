//! The project's own commands: `cargo xtask COMMAND`.

mod bench;
mod demo;
mod fetch;
#[path = "../../../src/host/manifest.rs"]
#[allow(dead_code)]
mod manifest;
mod test;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// The project's own commands.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Get kernels, QEMU and guest programs, as packages of Debian, into target/material: nothing is installed
    Fetch(fetch::Arguments),
    /// Show what aconite is for, on a stock kernel: poison, repair and removal of its memory
    Demo(demo::Arguments),
    /// Run all tests; what they need is fetched first
    Test(test::Arguments),
    /// Measure boot, exits, footprint, memory devices and control, beside QEMU
    Bench(bench::Arguments),
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Fetch(arguments) => fetch::run(&arguments).map(|()| ExitCode::SUCCESS),
        Command::Demo(arguments) => demo::run(&arguments),
        Command::Test(arguments) => test::run(&arguments),
        Command::Bench(arguments) => bench::run(&arguments),
    };
    match result {
        Ok(status) => status,
        Err(error) => {
            eprintln!("Error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
