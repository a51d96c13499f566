//! The row about disks.

use super::{Judge, Target};
use crate::plan::{Contestant, Measured, Requests, Step};

/// Loads, and what they are.
const LOADS: [(&str, &str); 4] = [
    ("random", "random reads of 4 KiB"),
    ("random-by-four", "random reads of 4 KiB, 4 at a time"),
    ("read", "sequential reads of 128 KiB"),
    ("write", "sequential writes of 128 KiB"),
];

impl Judge<'_> {
    pub(super) fn disk(&mut self) {
        for (load, what) in LOADS {
            let [Some(own), Some(qemu)] =
                [Contestant::Aconite, Contestant::Q35].map(|who| self.requests(who, load))
            else {
                continue;
            };
            let told = |who: &Requests| {
                format!(
                    "{:.0} us, {:.1} exits, {:.1} to the monitor",
                    who.time / 1e3,
                    who.exits,
                    who.monitor_exits
                )
            };
            let note = format!("a request {}; q35 {}", told(&own), told(&qemu));
            self.row("disk", what, own.time / qemu.time, "of q35", Target::AtMost(1.0), note);
        }
    }

    /// The best of all turns of a load.
    fn requests(&self, who: Contestant, load: &str) -> Option<Requests> {
        let turns = self.run.measured.iter().filter_map(|(step, measured)| match (step, measured) {
            (Step::Disk { contestant, .. }, Measured::Disk(loads)) if *contestant == who => {
                loads.get(load).copied()
            }
            _ => None,
        });
        turns.reduce(|best, turn| Requests {
            time: best.time.min(turn.time),
            exits: best.exits.min(turn.exits),
            monitor_exits: best.monitor_exits.min(turn.monitor_exits),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::Run;
    use super::*;

    #[test]
    fn the_best_turns_are_compared() {
        let turn = |contestant, round, time| {
            let read = Requests { time, exits: 2.0, monitor_exits: 1.0 };
            (Step::Disk { contestant, round }, Measured::Disk([("read".to_owned(), read)].into()))
        };
        let measured = vec![
            turn(Contestant::Aconite, 0, 500.0),
            turn(Contestant::Q35, 0, 400.0),
            turn(Contestant::Aconite, 1, 300.0),
            turn(Contestant::Q35, 1, 600.0),
        ];
        let run = Run { clock: "wall", measured, failed: Vec::new() };
        let mut rows = Vec::new();
        Judge { run: &run, rows: &mut rows }.disk();
        let rows: Vec<_> = rows.iter().map(|row| (row.row, row.value, row.met)).collect();
        assert_eq!(rows, [("disk", 0.75, Some(true))]);
    }
}
