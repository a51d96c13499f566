//! The aconite program: parses arguments, calls one function, prints errors, returns an exit status.

use std::error::Error;
use std::ffi::OsString;
use std::io;
use std::process::ExitCode;

use aconite::cli::{Action, Cli, DoctorArgs, RunArgs, TablesArgs, ctl, error_chain};
use aconite::host::{self, doctor};
use aconite::run::{self, STATUS_FAILED, STATUS_USAGE};
use clap::Parser;

fn main() -> ExitCode {
    tracing_subscriber::fmt().with_writer(io::stderr).with_target(false).without_time().init();
    if let Some(result) = host::hidden_command() {
        return ExitCode::from(result.unwrap_or_else(|error| failed(&error)));
    }
    let status = match Cli::parse().action {
        Action::Run(args) => run_machine(&args),
        Action::Ctl(args) => match ctl(&args, &mut io::stdout().lock()) {
            Ok(()) => 0,
            Err(error) => {
                failed(&error);
                error.exit_status()
            }
        },
        Action::Doctor(args) => diagnose(&args),
        Action::Tables(args) => tables(&args),
    };
    ExitCode::from(status)
}

fn run_machine(args: &RunArgs) -> u8 {
    let config = match args.machine.machine(&args.command) {
        Ok(config) => config,
        Err(error) => {
            failed(&error);
            return STATUS_USAGE;
        }
    };
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    run::run_anywhere(&config, &arguments).unwrap_or_else(|error| {
        failed(&error);
        error.exit_status()
    })
}

fn diagnose(args: &DoctorArgs) -> u8 {
    let report = doctor::examine();
    if args.json {
        match serde_json::to_string_pretty(&report) {
            Ok(text) => println!("{text}"),
            Err(error) => return failed(&error),
        }
    } else {
        print!("{report}");
    }
    u8::from(report.host.is_none())
}

fn tables(args: &TablesArgs) -> u8 {
    let config = match args.machine.machine(&[]) {
        Ok(config) => config,
        Err(error) => {
            failed(&error);
            return STATUS_USAGE;
        }
    };
    match run::dump_tables(&config, &args.output) {
        Ok(names) => {
            for name in names {
                println!("{}", args.output.join(name).display());
            }
            0
        }
        Err(error) => failed(&error),
    }
}

/// Prints an error with what led to it.
fn failed(error: &(dyn Error + 'static)) -> u8 {
    eprint!("{}", error_chain(error));
    STATUS_FAILED
}
