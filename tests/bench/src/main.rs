//! Benchmarks: `cargo xtask bench`.
//!
//! Everything runs in a software KVM host of its own ([`level1`]), where KVM is real and its counters can be read. Two
//! clocks drive it. Under the instruction clock a nanosecond is an instruction, of all levels together: it repeats,
//! but knows neither the cost of leaving a guest nor caches. Under the wall clock all contestants take turns in one
//! run, and only ratios mean anything. Neither shows true exit latency nor what page sizes do to bandwidth.

mod census;
mod inside;
mod kernel;
mod level1;
mod plan;
mod report;
mod stage;

use aconite::host::nested::machine::Clock;
use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use plan::{Console, Contestant, Dimms, Image, Layout, Step, Way};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// The hidden command that carries out a plan in level 1.
const INSIDE: &str = "inside";

/// What is measured together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
enum Group {
    /// From exec to process 1, beside QEMU
    Boot,
    /// Where the exits of a boot come from
    BootExits,
    /// Memory of the monitor and size of its program
    Footprint,
    /// A memory device beside RAM, with poisoned lines elsewhere in it
    PmemArmed,
    /// The first touch of a memory device
    PmemCold,
    /// Round trips on the control socket
    Control,
    /// Clean lines of a guarded page
    CleanAccess,
    /// From a request to the guest's handler
    FaultLatency,
    /// A poisoned line that is loaded, cleared and loaded
    PoisonTrap,
    /// 100 000 lines that are poisoned by request
    PoisonAdd,
    /// A device that goes and comes, over each channel, beside QEMU's memory slots
    HotplugCycle,
    /// Requests to a disk, beside QEMU
    Disk,
    /// A call of the firmware of NVDIMMs
    Dsm,
    /// A scrub of a large device with 100 000 errors
    Scrub,
    /// A boot with 64 DIMMs beside one with a DIMM
    Dimms,
    /// Who maps a memory device: page tables of 200 processes, on this host itself
    Census,
    /// All rows about poison: pmem-armed, clean-access, fault-latency, poison-trap, poison-add
    Poison,
    /// All rows about NVDIMMs: dsm, scrub, dimms
    Nvdimm,
}

/// The rows of [`Group::Poison`].
const POISON: [Group; 5] =
    [Group::PmemArmed, Group::CleanAccess, Group::FaultLatency, Group::PoisonTrap, Group::PoisonAdd];
/// The rows of [`Group::Nvdimm`].
const NVDIMM: [Group; 3] = [Group::Dsm, Group::Scrub, Group::Dimms];

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ClockName {
    /// A nanosecond is an instruction
    Instruction,
    /// The host's time
    Wall,
}

/// Measures aconite beside QEMU and beside what KVM itself costs
#[derive(Debug, Parser)]
#[command(name = "cargo xtask bench", bin_name = "cargo xtask bench")]
struct Arguments {
    /// What to measure [default: everything]
    #[arg(value_name = "ROWS")]
    groups: Vec<Group>,
    /// Only with this clock [default: both, one after the other]
    #[arg(long)]
    clock: Option<ClockName>,
    /// Turns of each contestant
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Write everything that was measured to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// The monitor
    #[arg(long, hide = true)]
    aconite: PathBuf,
    /// The program of the guests
    #[arg(long, hide = true)]
    guest: PathBuf,
}

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().collect();
    let result = match &arguments[..] {
        [_, command, plan] if command == INSIDE => inside::run(Path::new(plan)),
        _ => run(&Arguments::parse()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("Error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let mut groups: BTreeSet<Group> = if arguments.groups.is_empty() {
        Group::value_variants().iter().copied().collect()
    } else {
        arguments.groups.iter().copied().collect()
    };
    // Guests with Linux take minutes by the instruction clock, and these rows are ratios.
    let ratios =
        matches!(arguments.groups[..], [Group::Poison | Group::HotplugCycle | Group::Disk | Group::Nvdimm]);
    let only = arguments.clock.or(ratios.then_some(ClockName::Wall));
    if groups.remove(&Group::Poison) {
        groups.extend(POISON);
    }
    if groups.remove(&Group::Nvdimm) {
        groups.extend(NVDIMM);
    }
    if groups.remove(&Group::Census) {
        print!("{}", census::measure()?);
        if groups.is_empty() {
            return Ok(());
        }
    }
    let dir = tempfile::tempdir().context("Cannot make a directory")?;
    let stage = stage::Stage::prepare(dir.path(), &arguments.aconite, &arguments.guest)?;
    let clocks = [(ClockName::Instruction, Clock::Instructions), (ClockName::Wall, Clock::Wall)];
    let mut runs = Vec::new();
    for (name, clock) in clocks.into_iter().filter(|(name, _)| only.is_none_or(|only| only == *name)) {
        let name = if name == ClockName::Wall { "wall" } else { "instruction" };
        eprintln!("{name} clock");
        let level1::Outcome { measured, failed } =
            level1::measure(&stage, clock, &steps(&groups, arguments.rounds, clock))?;
        runs.push(report::Run { clock: name, measured, failed });
    }
    let report = report::Report::new(&stage, runs);
    print!("{report}");
    if let Some(path) = &arguments.json {
        std::fs::write(path, serde_json::to_vec_pretty(&report)?)
            .with_context(|| format!("Cannot write {}", path.display()))?;
    }
    Ok(())
}

/// The steps for `groups`: contestants take turns.
fn steps(groups: &BTreeSet<Group>, rounds: u32, clock: Clock) -> Vec<Step> {
    let has = |group| groups.contains(&group);
    let mut steps = vec![Step::Floors];
    let boots: &[(Image, Console)] = if has(Group::Boot) {
        &[(Image::Vmlinux, Console::Quiet), (Image::Vmlinux, Console::Log), (Image::Bzimage, Console::Quiet)]
    } else if has(Group::Footprint) {
        &[(Image::Vmlinux, Console::Quiet)]
    } else {
        &[]
    };
    // A kernel that unpacks itself only adds the same to everybody's time: once, by the quicker clock.
    let wanted = |image, round| image == Image::Vmlinux || (round == 0 && clock == Clock::Wall);
    for round in 0..rounds {
        for (image, console) in boots.iter().copied().filter(|(image, _)| wanted(*image, round)) {
            steps.extend(Contestant::ALL.map(|contestant| Step::Boot { contestant, image, console, round }));
        }
    }
    if has(Group::Boot) || has(Group::BootExits) {
        for console in [Console::Quiet, Console::Log] {
            steps.extend(Contestant::ALL.map(|contestant| Step::Profile {
                contestant,
                console,
                pmem: false,
            }));
        }
        steps.push(Step::Profile { contestant: Contestant::Aconite, console: Console::Quiet, pmem: true });
    }
    if has(Group::Control) {
        steps.extend([Contestant::Aconite, Contestant::Q35].map(|contestant| Step::Control { contestant }));
    }
    if has(Group::PmemArmed) || has(Group::PmemCold) {
        steps.push(Step::Pmem { poisons: 0, layout: Layout::Packed });
    }
    if has(Group::PmemArmed) {
        for (poisons, layout) in [
            (10_000, Layout::Packed),
            (100_000, Layout::Packed),
            (10_000, Layout::Paged),
            (100_000, Layout::Paged),
            (250, Layout::Scattered),
        ] {
            steps.push(Step::Pmem { poisons, layout });
        }
    }
    if has(Group::CleanAccess) {
        steps.extend([1, 2, 4].map(|cpus| Step::Clean { cpus }));
    }
    if has(Group::FaultLatency) || has(Group::PoisonTrap) {
        steps.push(Step::Trap);
    }
    if has(Group::PoisonAdd) {
        let layouts = [Layout::Packed, Layout::Paged, Layout::Scattered];
        steps.extend(layouts.map(|layout| Step::Add { poisons: 100_000, layout }));
    }
    if has(Group::HotplugCycle) {
        steps.extend(Way::ALL.map(|way| Step::Cycles { way }));
    }
    if has(Group::Disk) {
        for round in 0..rounds {
            steps.extend(
                [Contestant::Aconite, Contestant::Q35].map(|contestant| Step::Disk { contestant, round }),
            );
        }
    }
    if has(Group::Dsm) {
        steps.push(Step::Dsm);
    }
    if has(Group::Scrub) {
        // With 40 bits of addresses, the largest power of two that has room beside RAM and PCI.
        steps.push(Step::Scrub { gib: 512, poisons: 100_000 });
    }
    if has(Group::Dimms) {
        for round in 0..rounds {
            steps.extend(Dimms::ALL.map(|dimms| Step::Dimms { dimms, round }));
        }
    }
    steps
}
