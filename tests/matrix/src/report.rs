//! The report: every row with its outcome.

use crate::case::{Row, Verdict};
use anyhow::{Context, Result};
use serde::Serialize;
use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::path::Path;

/// All rows, and what they come to.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Distinct instruction forms that were run.
    pub forms: usize,
    /// Rows that passed.
    pub passed: usize,
    /// Rows that failed.
    pub failed: usize,
    /// Rows in which the processor is shown to do the same without a guard.
    pub known: usize,
    /// Rows that this processor cannot run.
    pub not_run: usize,
    /// The rows.
    pub rows: Vec<Row>,
}

impl Report {
    /// Counts `rows`.
    pub fn new(rows: Vec<Row>) -> Self {
        let count = |verdict| rows.iter().filter(|row| row.outcome == verdict).count();
        let run = rows.iter().filter(|row| row.outcome != Verdict::NotRun);
        Self {
            forms: run.map(|row| &row.form).collect::<BTreeSet<_>>().len(),
            passed: count(Verdict::Pass),
            failed: count(Verdict::Fail),
            known: count(Verdict::Known),
            not_run: count(Verdict::NotRun),
            rows,
        }
    }

    /// Writes `matrix.json`, `matrix.tsv` and, with rows that did not pass and the counts, `matrix.txt` into `dir`.
    pub fn write(&self, dir: &Path) -> Result<()> {
        let write = |name: &str, bytes: &[u8]| {
            let path = dir.join(name);
            fs::write(&path, bytes).with_context(|| format!("Cannot write {}", path.display()))
        };
        fs::create_dir_all(dir).with_context(|| format!("Cannot make {}", dir.display()))?;
        write("matrix.json", &serde_json::to_vec_pretty(self)?)?;
        let mut table = String::from("form\tclass\tvariant\tline\toutcome\tdetail\n");
        for row in &self.rows {
            table.push_str(&format!("{row}\n"));
        }
        write("matrix.tsv", table.as_bytes())?;
        write("matrix.txt", self.to_string().as_bytes())
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Row { form, class, variant, line, outcome, detail } = self;
        write!(f, "{form}\t{class:?}\t{variant}\t{line:?}\t{outcome:?}\t{detail}")
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for row in self.rows.iter().filter(|row| row.outcome != Verdict::Pass) {
            writeln!(f, "{row}")?;
        }
        let Report { forms, passed, failed, known, not_run, .. } = self;
        writeln!(
            f,
            "{forms} forms: {passed} rows passed, {failed} failed, {known} known of this processor, {not_run} not run"
        )
    }
}
