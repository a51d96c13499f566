//! The matrix of bare guests: every kind of instruction against poisoned and clean lines of a guarded page.
//!
//! A row is a guest of a few instructions, without an operating system. It runs once without a guard, for reference,
//! and once with; the monitor's own code ([`aconite::fault::Traps`]) serves the traps. Where no poison is touched,
//! registers, flags, vector registers and memory must end as they did without a guard. Where it is, the guest must
//! find a machine check at that instruction with nothing of it done, and once the line is repaired, the same end.
//!
//! Behind the rows of the lists come random streams of instructions, each from its seed: `aconite-matrix "random stream"
//! --seed N --streams 1` repeats one.

mod case;
mod feature;
mod image;
mod layout;
mod machine;
mod report;
mod rows;
mod ticks;

use aconite::config::HostChoice;
use aconite::host::{self, Where, nested};
use anyhow::{Result, bail};
use clap::Parser;
use feature::Features;
use machine::Machine;
use report::Report;
use rows::Planned;
use std::path::PathBuf;
use std::process::ExitCode;

/// Bare guests: every kind of instruction against poisoned and clean lines of a guarded page
#[derive(Debug, Parser)]
#[command(name = "aconite-matrix")]
struct Arguments {
    /// Only rows whose form contains this
    filter: Option<String>,
    /// Write matrix.json and matrix.tsv into this directory
    #[arg(long, value_name = "DIR")]
    report: Option<PathBuf>,
    /// How many random instruction streams to run
    #[arg(long, value_name = "COUNT", default_value_t = 200)]
    streams: u64,
    /// The seed of the first of them; each further one has the next number
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    seed: u64,
}

fn main() -> ExitCode {
    let result = match host::hidden_command() {
        Some(result) => result.map_err(anyhow::Error::from),
        None => run(&Arguments::parse()),
    };
    match result {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("Error: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run(arguments: &Arguments) -> Result<u8> {
    if let Where::Nested { .. } = host::choose(HostChoice::Auto)? {
        let arguments: Vec<_> = std::env::args_os().skip(1).collect();
        return Ok(nested::front::run(&arguments, Default::default())?);
    }
    let mut machine = Machine::new()?;
    let wanted = |form: &str| arguments.filter.as_ref().is_none_or(|filter| form.contains(filter));
    let features = Features(machine.cpuid());
    let mut planned = rows::all(&features)?;
    planned
        .extend(rows::streams(arguments.seed..arguments.seed.saturating_add(arguments.streams), &features)?);
    let mut done = Vec::new();
    for row in planned {
        match row {
            Planned::Run(case) if wanted(&case.form) => done.push(case.run(&mut machine)),
            Planned::NotRun { form, class, why } if wanted(&form) => {
                done.push(rows::not_run(form, class, why))
            }
            _ => {}
        }
    }
    done.extend(ticks::rows(wanted));
    if done.is_empty() {
        bail!("There is no such row");
    }
    let report = Report::new(done);
    if let Some(dir) = &arguments.report {
        report.write(dir)?;
    }
    print!("{report}");
    Ok(u8::from(report.failed > 0))
}
