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
                        "in {answers} answers, {:.0} exits' worth each; 1 TiB has no room in 40 bits of addresses",
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
