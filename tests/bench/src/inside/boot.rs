//! A boot: to the line of process 1, with the counters and the memory of that moment.

use super::monitor::{Monitor, Start};
use super::trace::Trace;
use super::{counters, monitor};
use crate::plan::{Boot, Console, Contestant, Image, Plan, Profile};
use anyhow::Result;

/// Boots once and measures.
pub fn measure(plan: &Plan, contestant: Contestant, image: Image, console: Console) -> Result<Boot> {
    let start = Start { image, console, ..Start::quiet(contestant) };
    let mut monitor = Monitor::start(plan, &start)?;
    let to_init = monitor.wait_for_init()?.as_nanos() as u64;
    let counters = counters::of_machine(monitor.pid())?;
    Ok(Boot {
        to_init,
        console_bytes: monitor.console_bytes(),
        counters,
        memory: counters::memory(monitor.pid(), monitor::RAM_MIB << 10)?,
    })
}

/// Boots once under tracing.
pub fn profile(plan: &Plan, contestant: Contestant, console: Console, pmem: bool) -> Result<Profile> {
    let start = Start { console, pmem, ..Start::quiet(contestant) };
    let trace = Trace::start()?;
    let mut monitor = Monitor::start(plan, &start)?;
    monitor.wait_for_init()?;
    let mut profile = trace.read(monitor.started())?;
    profile.console_bytes = monitor.console_bytes();
    Ok(profile)
}
