//! Requests to a disk whose file is in memory: what differs is what the monitors add.

use super::counters;
use super::monitor::{Monitor, Start};
use crate::plan::{Contestant, Plan, Requests};
use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::fs;

/// Bytes of the disk.
const SIZE: usize = 64 << 20;
/// The load that consists of nothing.
const NOTHING: &str = "nothing";

/// A turn of a load.
#[derive(Clone, Copy, Debug)]
struct Turn {
    requests: u64,
    time: u64,
    exits: u64,
    monitor_exits: u64,
}

/// Boots with a disk, and has the guest carry out its loads.
pub fn measure(plan: &Plan, contestant: Contestant) -> Result<BTreeMap<String, Requests>> {
    let file = plan.dir.join("disk.img");
    fs::write(&file, vec![0xa5; SIZE]).context("Cannot make the disk's file")?;
    let start = Start { disk: Some(&file), ..Start::quiet(contestant) };
    let mut monitor = Monitor::start(plan, &start)?;
    monitor.wait_for_init()?;
    let mut turns: BTreeMap<String, Vec<Turn>> = BTreeMap::new();
    loop {
        let said = monitor.wait_for_line("disk-")?;
        let Some(load) = said.strip_prefix("begin ") else { break };
        let before = exits(&monitor)?;
        let ended = monitor.wait_for_line("disk-end")?;
        let after = exits(&monitor)?;
        let (requests, time) = ended
            .split_once(' ')
            .and_then(|(requests, time)| Some((requests.parse().ok()?, time.parse().ok()?)))
            .with_context(|| format!("The guest says {ended:?}"))?;
        let turn = Turn { requests, time, exits: after.0 - before.0, monitor_exits: after.1 - before.1 };
        turns.entry(load.to_owned()).or_default().push(turn);
    }
    Ok(summary(&turns))
}

/// Exits of the machine, and those of them in which the monitor was to serve a device in memory.
fn exits(monitor: &Monitor) -> Result<(u64, u64)> {
    let counters = counters::of_machine(monitor.pid())?;
    let of = |name| counters.get(name).copied().unwrap_or(0);
    Ok((of("exits"), of("mmio_exits")))
}

/// The best turn of each load, without what a turn of nothing has.
fn summary(turns: &BTreeMap<String, Vec<Turn>>) -> BTreeMap<String, Requests> {
    let least = |turns: &[Turn], value: fn(&Turn) -> u64| turns.iter().map(value).min().unwrap_or(0);
    let nothing = turns.get(NOTHING).map_or(&[][..], Vec::as_slice);
    let loads = turns.iter().filter(|(name, _)| *name != NOTHING);
    loads
        .map(|(name, turns)| {
            let each = |sum: u64| sum as f64 / least(turns, |turn| turn.requests).max(1) as f64;
            let more = |value| each(least(turns, value).saturating_sub(least(nothing, value)));
            let requests = Requests {
                time: each(least(turns, |turn| turn.time)),
                exits: more(|turn| turn.exits),
                monitor_exits: more(|turn| turn.monitor_exits),
            };
            (name.clone(), requests)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_told_without_the_cost_of_counting() {
        let turn = |requests, time, exits, monitor_exits| Turn { requests, time, exits, monitor_exits };
        let turns = BTreeMap::from([
            (NOTHING.to_owned(), vec![turn(0, 10, 30, 3), turn(0, 20, 20, 5)]),
            ("read".to_owned(), vec![turn(10, 5000, 70, 23), turn(10, 4000, 60, 33)]),
        ]);
        let read = Requests { time: 400.0, exits: 4.0, monitor_exits: 2.0 };
        assert_eq!(summary(&turns), BTreeMap::from([("read".to_owned(), read)]));
    }
}
