//! The firmware of NVDIMMs: a call of it, a scrub that finds much, and what many DIMMs add to a boot.

use super::guest::Guest;
use super::pmem::{self, Poisoned};
use crate::plan::{Dimms, Dsm, Layout, Plan, Scrub};
use aconite::api::Client;
use aconite::command::Event;
use aconite::config::Ars;
use anyhow::{Context, Result, ensure};

const ROUNDS: usize = 5;
/// Calls that are timed together.
const CALLS: u64 = 100;

/// A call that asks what can be scrubbed (function 1 of the root device).
pub fn call(plan: &Plan) -> Result<Dsm> {
    let socket = plan.dir.join("nvdimm.sock");
    let (mut guest, _) = Guest::start(plan, &socket, &["--pmem=size=1G,id=p0"], "nvdimm")?;
    let mut best = Dsm { time: f64::MAX, exits: f64::MAX };
    for _ in 0..ROUNDS {
        // The exits of the request itself are those of one without calls.
        let mut exits = [0; 2];
        for (exits, count) in exits.iter_mut().zip([CALLS, 0]) {
            let before = guest.counters(&["exits"])?;
            let time = guest.ask(&format!("ask {count}"))?;
            *exits = guest.counters(&["exits"])? - before;
            if count == CALLS {
                best.time = best.time.min(time as f64 / CALLS as f64);
            }
        }
        best.exits = best.exits.min(exits[0].saturating_sub(exits[1]) as f64 / CALLS as f64);
    }
    Ok(best)
}

/// A scrub of a device of `gib` GiB with `poisons` errors, by a process and, of what one answer holds, by the kernel.
/// The device has no namespace but its raw one, whose memory the kernel does not describe page by page.
pub fn scrub(plan: &Plan, gib: u64, poisons: u64) -> Result<Scrub> {
    let socket = plan.dir.join("nvdimm.sock");
    let device = format!("--pmem=size={gib}G,id=p0");
    let (mut guest, length) = Guest::start(plan, &socket, &[&device], "nvdimm")?;
    ensure!(length == gib << 30, "the guest has a region of {length} bytes");
    let Poisoned { said, .. } = pmem::poison(&socket, poisons, Layout::Scattered)?;
    let listed = guest.ask("scrub")?;
    let records = guest.ask("records")?;
    ensure!(records == poisons, "{records} of {poisons} errors are listed; the monitor said {said}");
    Client::new(&socket).call("DELETE", "/v1/memory/p0/poison", None)?;
    let answer = Ars::default().records as u64;
    pmem::poison(&socket, answer, Layout::Scattered)?;
    let by_kernel = guest.ask(&format!("scrub-by-kernel {answer}"))?;
    Ok(Scrub { listed, answer, by_kernel })
}

/// Boots with these DIMMs; returns nanoseconds from the first run of the processors to the agent, which speaks once the
/// kernel has its modules and they have their devices.
pub fn boot(plan: &Plan, dimms: Dimms) -> Result<u64> {
    let socket = plan.dir.join("nvdimm.sock");
    let option = match dimms {
        Dimms::One => "--pmem=size=512M,id=p0",
        Dimms::Many => "--preset=nvdimm64",
    };
    let (_guest, _) = Guest::start(plan, &socket, &[option], "plug")?;
    let (mut started, mut ready) = (None, None);
    for record in Client::new(&socket).events(0, false)? {
        let record = record?;
        match record.event {
            Event::MachineStarted { .. } => started = Some(record.host_ns),
            Event::AgentReady { .. } => ready = Some(record.host_ns),
            _ => {}
        }
    }
    let (started, ready) = started.zip(ready).context("No event tells of the boot")?;
    Ok(ready - started)
}
