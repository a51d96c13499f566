//! The rows.

mod compatibility;
mod fetches;
mod forms;
mod operands;
mod steps;
mod streams;
mod strings;
mod tables;
mod walks;

use crate::case::{Case, Class, Row};
use crate::feature::Features;
use anyhow::Result;

pub use streams::rows as streams;

/// A case, or why there is none.
pub enum Planned {
    /// To be run.
    Run(Box<Case>),
    /// Not here.
    NotRun {
        /// The instruction form.
        form: String,
        /// What it does with the page.
        class: Class,
        /// Why.
        why: String,
    },
}

/// All rows for a processor with `features`.
pub fn all(features: &Features) -> Result<Vec<Planned>> {
    let parts = [
        operands::rows(features)?,
        strings::rows()?,
        walks::rows(features)?,
        fetches::rows()?,
        steps::rows()?,
        tables::rows()?,
        compatibility::rows()?,
    ];
    Ok(parts.into_iter().flatten().collect())
}

/// What can be said of a row that is not run.
pub fn not_run(form: String, class: Class, why: String) -> Row {
    Row {
        form,
        class,
        variant: "all".to_owned(),
        line: crate::case::Line::Hit,
        outcome: crate::case::Verdict::NotRun,
        detail: why,
    }
}
