//! What runs in level 1: carries out the steps of a plan and says what they yield.

mod bare;
mod boot;
mod control;
mod counters;
mod disk;
mod floors;
mod guest;
mod hotplug;
mod monitor;
mod nvdimm;
mod pmem;
mod qmp;
mod trace;

use crate::plan::{Line, Measured, Plan, Step};
use anyhow::{Context, Result};
use std::fs::File;
use std::io::Write;
use std::path::Path;

/// Carries out the plan in `path`.
pub fn run(path: &Path) -> Result<()> {
    let file = File::open(path).with_context(|| format!("Cannot read {}", path.display()))?;
    let plan: Plan = serde_json::from_reader(file).context("Cannot understand the plan")?;
    for step in &plan.steps {
        say(&Line::Begin(*step))?;
        say(&match measure(&plan, *step) {
            Ok(measured) => Line::Done(*step, measured),
            Err(error) => Line::Failed(*step, format!("{error:#}")),
        })?;
    }
    Ok(())
}

fn say(line: &Line) -> Result<()> {
    let mut out = std::io::stdout().lock();
    serde_json::to_writer(&mut out, line)?;
    out.write_all(b"\n")?;
    Ok(out.flush()?)
}

fn measure(plan: &Plan, step: Step) -> Result<Measured> {
    Ok(match step {
        Step::Floors => Measured::Floors(floors::measure()?),
        Step::Boot { contestant, image, console, round: _ } => {
            Measured::Boot(boot::measure(plan, contestant, image, console)?)
        }
        Step::Profile { contestant, console, pmem } => {
            Measured::Profile(boot::profile(plan, contestant, console, pmem)?)
        }
        Step::Control { contestant } => Measured::Control(control::measure(plan, contestant)?),
        Step::Pmem { poisons, layout } => Measured::Pmem(pmem::measure(plan, poisons, layout)?),
        Step::Clean { cpus } => Measured::Clean(pmem::clean(plan, cpus)?),
        Step::Trap => Measured::Trap(bare::trap(plan)?),
        Step::Cycles { way } => Measured::Cycles(hotplug::measure(plan, way)?),
        Step::Disk { contestant, round: _ } => Measured::Disk(disk::measure(plan, contestant)?),
        Step::Dsm => Measured::Dsm(nvdimm::call(plan)?),
        Step::Scrub { gib, poisons } => Measured::Scrub(nvdimm::scrub(plan, gib, poisons)?),
        Step::Dimms { dimms, round: _ } => Measured::Dimms(nvdimm::boot(plan, dimms)?),
        Step::Add { poisons, layout } => Measured::Add(bare::add(plan, poisons, layout)?),
    })
}
