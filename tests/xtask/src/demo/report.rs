//! What the demo wants to see, and what it has seen.

use super::console::Finding;
use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::time::Duration;

/// Something that the demo must see to succeed, in the order in which it comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Check {
    /// A stock kernel boots with a pmem device.
    Boot,
    /// A file of a DAX file system is mapped, and the mapping shows what was written.
    DaxMapping,
    /// The line to poison is where the guest says, in the device's file on this host.
    Place,
    /// One line of 64 bytes is poisoned.
    OneLine,
    /// The lines around it can be loaded.
    Neighbours,
    /// Loading the line raises SIGBUS at the right address.
    Sigbus,
    /// The machine check is the monitor's, for that load and that line.
    #[serde(rename = "machine_check")]
    Delivered,
    /// Reading the sector fails with EIO.
    Eio,
    /// The kernel lists the sector as bad, and no other.
    BadBlock,
    /// After a page-aligned write the data can be loaded and read.
    RepairedRead,
    /// Neither the kernel's nor the monitor's list holds anything bad.
    NothingBad,
    /// The device is gone, and the kernel has let go of it.
    SurpriseRemoval,
    /// The workload's access to memory that is gone is reported.
    StaleAccess,
}

impl Check {
    /// All of them.
    pub const ALL: [Check; 13] = [
        Check::Boot,
        Check::DaxMapping,
        Check::Place,
        Check::OneLine,
        Check::Neighbours,
        Check::Sigbus,
        Check::Delivered,
        Check::Eio,
        Check::BadBlock,
        Check::RepairedRead,
        Check::NothingBad,
        Check::SurpriseRemoval,
        Check::StaleAccess,
    ];

    /// What it is called in the summary.
    pub fn title(self) -> &'static str {
        match self {
            Check::Boot => "boot",
            Check::DaxMapping => "DAX mapping",
            Check::Place => "place of the line",
            Check::OneLine => "one poisoned line",
            Check::Neighbours => "neighbouring lines",
            Check::Sigbus => "SIGBUS",
            Check::Delivered => "machine check",
            Check::Eio => "EIO",
            Check::BadBlock => "bad-block list",
            Check::RepairedRead => "repaired read",
            Check::NothingBad => "empty lists",
            Check::SurpriseRemoval => "surprise removal",
            Check::StaleAccess => "stale access",
        }
    }
}

/// How a check ended: what was seen, or what was seen instead.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Outcome {
    seen: bool,
    text: String,
}

/// All that was seen in a run.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// Whether every check was seen.
    passed: bool,
    /// What ended the demo before its end.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    checks: BTreeMap<Check, Outcome>,
    /// Checks that the demo did not come to.
    not_reached: Vec<Check>,
    /// What the kernel did after the removal, and other things that are neither right nor wrong.
    observations: Vec<String>,
    /// Findings in the kernel's log.
    kernel_log: Vec<Finding>,
    /// The stale accesses as the monitor reported them.
    stale_accesses: Vec<Value>,
    /// Seconds that parts of the demo took.
    seconds: BTreeMap<&'static str, f64>,
}

impl Report {
    /// Notes how a check ended: `Ok` if it was seen.
    pub fn check(&mut self, check: Check, outcome: Result<String, String>) {
        let (seen, text) = match outcome {
            Ok(text) => (true, text),
            Err(text) => (false, text),
        };
        println!("  {} {text}", if seen { "seen:" } else { "NOT SEEN:" });
        self.checks.insert(check, Outcome { seen, text });
    }

    /// Notes something that is neither right nor wrong.
    pub fn observe(&mut self, text: String) {
        println!("  seen: {text}");
        self.observations.push(text);
    }

    /// Notes the accesses to departed memory.
    pub fn stale(&mut self, accesses: Vec<Value>) {
        self.stale_accesses = accesses;
    }

    /// Notes what the kernel's log says.
    pub fn kernel_log(&mut self, findings: Vec<Finding>) {
        self.kernel_log = findings;
    }

    /// Notes how long a part took.
    pub fn took(&mut self, part: &'static str, time: Duration) {
        self.seconds.insert(part, (time.as_secs_f64() * 10.0).round() / 10.0);
    }

    /// Closes the report: `error` is what ended the demo early. Returns whether everything was seen.
    pub fn finish(&mut self, error: Option<String>) -> bool {
        self.error = error;
        self.not_reached = Check::ALL.into_iter().filter(|check| !self.checks.contains_key(check)).collect();
        self.passed = self.error.is_none()
            && self.not_reached.is_empty()
            && self.checks.values().all(|outcome| outcome.seen);
        self.passed
    }

    /// The summary in words.
    pub fn summary(&self) -> String {
        let mut text = String::from("\nSummary of what was seen in this run\n");
        let width = Check::ALL.iter().map(|check| check.title().len()).max().unwrap_or(0);
        for (check, outcome) in &self.checks {
            let mark = if outcome.seen { "  " } else { "! " };
            let _ = writeln!(text, "{mark}{:width$}  {}", check.title(), outcome.text);
        }
        for check in &self.not_reached {
            let _ = writeln!(text, "! {:width$}  not reached", check.title());
        }
        let after = self.observations.iter().map(|text| ("afterwards", text.clone()));
        let log = self.kernel_log.iter().map(|finding| {
            let place = finding.function.as_ref().map(|name| format!(" in {name}")).unwrap_or_default();
            let title = if finding.damage { "FINDING" } else { "kernel log" };
            (title, format!("{}{place}: {:?}", finding.meaning, finding.first))
        });
        for (title, line) in after.chain(log) {
            let _ = writeln!(text, "  {title:width$}  {line}");
        }
        if let Some(error) = &self.error {
            let _ = writeln!(text, "! The demo ended early: {error}");
        }
        let seen = self.checks.values().filter(|outcome| outcome.seen).count();
        let _ = match self.passed {
            true => writeln!(text, "All {} things that the demo is about were seen.", Check::ALL.len()),
            false => writeln!(text, "Only {seen} of {} things were seen.", Check::ALL.len()),
        };
        text
    }

    /// Writes the report as JSON, whole or not at all.
    pub fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self).context("Cannot write JSON")? + "\n";
        let next = path.with_extension("json.new");
        fs::write(&next, text).with_context(|| format!("Cannot write {}", next.display()))?;
        fs::rename(&next, path).with_context(|| format!("Cannot replace {}", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::console;

    fn all_but(left_out: &[Check]) -> Report {
        let mut report = Report::default();
        for check in Check::ALL.into_iter().filter(|check| !left_out.contains(check)) {
            report.check(check, Ok(format!("{check:?} was seen")));
        }
        report
    }

    /// The summary without its columns.
    fn words(report: &Report) -> String {
        report
            .summary()
            .lines()
            .flat_map(|line| line.split_whitespace().chain(["/"]))
            .collect::<Vec<_>>()
            .join(" ")
    }

    #[test]
    fn it_passes_only_if_everything_was_seen() {
        assert!(all_but(&[]).finish(None));
        assert!(!all_but(&[]).finish(Some("the guest is gone".into())));
        let mut report = all_but(&[Check::StaleAccess]);
        assert!(!report.finish(None));
        assert!(words(&report).contains("! stale access not reached /"), "{}", words(&report));
        report.check(Check::StaleAccess, Err("no stale access was reported".into()));
        assert!(!report.finish(None));
        let summary = words(&report);
        assert!(summary.contains("! stale access no stale access was reported"), "{summary}");
        assert!(summary.contains("Only 12 of 13 things"), "{summary}");
    }

    #[test]
    fn findings_do_not_fail_it_and_are_told() {
        let mut report = all_but(&[]);
        let log =
            "[1.0] BUG: unable to handle page fault\n[1.1] RIP: 0010:dax_disassociate_entry+0x35/0x70\n";
        report.kernel_log(console::classify(log));
        report.observe("umount(8) was killed".into());
        assert!(report.finish(None));
        let summary = words(&report);
        assert!(
            summary.contains("/ FINDING the kernel crashed (oops) in dax_disassociate_entry+0x35/0x70: ")
        );
        assert!(summary.contains("/ afterwards umount(8) was killed"), "{summary}");
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["passed"], true);
        assert_eq!(json["checks"]["sigbus"]["seen"], true);
        assert_eq!(json["kernel_log"][0]["damage"], true);
    }

    #[test]
    fn every_check_is_there_once() {
        let mut checks = Check::ALL.to_vec();
        checks.dedup();
        assert!(checks.is_sorted() && checks.len() == Check::ALL.len());
    }
}
