//! The rows about the firmware of NVDIMMs.

use super::{Judge, Target};
use crate::plan::{Dimms, Measured, Step};

impl Judge<'_> {
    pub(super) fn nvdimm(&mut self) {
        let exit = self.floor("mmio exit (write)").unwrap_or(f64::NAN);
        for (step, measured) in self.run.measured.clone() {
            match (step, measured) {
                (Step::Dsm, Measured::Dsm(dsm)) => {
                    let note = format!(
                        "{:.0} us with {:.1} exits, a bare exit {:.1} us",
                        dsm.time / 1e3,
                        dsm.exits,
                        exit / 1e3
                    );
                    self.row("dsm", "round trip", dsm.time / exit, "exits", Target::None, note);
                }
                (Step::Scrub { gib, poisons }, Measured::Scrub(scrub)) => {
                    let answers = poisons.div_ceil(scrub.answer);
                    let note = format!(
                        "in {answers} answers, each as long as {:.0} exits; 1 TiB does not fit into 40 bits of addresses beside RAM",
                        scrub.listed as f64 / answers as f64 / exit
                    );
                    let (what, most) = (format!("{gib} GiB, {poisons} errors"), Target::AtMost(5.0));
                    self.row("scrub", &what, scrub.listed as f64 / 1e9, "s", most, note);
                    let what = format!("the kernel's, {} errors", scrub.answer);
                    let note = "all that it takes from a scrub, which is one answer".to_owned();
                    self.row("scrub", &what, scrub.by_kernel as f64 / 1e9, "s", Target::None, note);
                }
                _ => {}
            }
        }
        let [Some(one), Some(many)] = Dimms::ALL.map(|dimms| self.boot_with(dimms)) else { return };
        let note = format!("{:.0} ms and {:.0} ms", many / 1e6, one / 1e6);
        self.row("dimms", "boot to the agent, 64 DIMMs", many / one, "of one's", Target::None, note);
    }

    /// The shortest boot with these DIMMs, in nanoseconds.
    fn boot_with(&self, with: Dimms) -> Option<f64> {
        let boots = self.run.measured.iter().filter_map(|(step, measured)| match (step, measured) {
            (Step::Dimms { dimms, .. }, Measured::Dimms(time)) if *dimms == with => Some(*time as f64),
            _ => None,
        });
        boots.reduce(f64::min)
    }
}

#[cfg(test)]
mod tests {
    use super::super::Run;
    use super::*;
    use crate::plan::{Dsm, Scrub};

    #[test]
    fn rows_are_ratios_of_one_run() {
        let boot = |dimms, round, time| (Step::Dimms { dimms, round }, Measured::Dimms(time));
        let floors = [("mmio exit (write)".to_owned(), 1000.0)];
        let measured = vec![
            (Step::Floors, Measured::Floors(floors.into())),
            (Step::Dsm, Measured::Dsm(Dsm { time: 5000.0, exits: 3.0 })),
            (
                Step::Scrub { gib: 512, poisons: 100 },
                Measured::Scrub(Scrub { listed: 6_000_000_000, answer: 30, by_kernel: 1_000_000_000 }),
            ),
            boot(Dimms::One, 0, 200),
            boot(Dimms::Many, 0, 300),
            boot(Dimms::One, 1, 100),
            boot(Dimms::Many, 1, 400),
        ];
        let run = Run { clock: "wall", measured, failed: Vec::new() };
        let mut rows = Vec::new();
        Judge { run: &run, rows: &mut rows }.nvdimm();
        let rows: Vec<_> = rows.iter().map(|row| (row.row, row.value, row.met)).collect();
        assert_eq!(
            rows,
            [("dsm", 5.0, None), ("scrub", 6.0, Some(false)), ("scrub", 1.0, None), ("dimms", 3.0, None)]
        );
    }
}
