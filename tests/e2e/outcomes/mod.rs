//! The outcome table: what stock kernels make of memory errors, row by row, on every kind of machine.
//!
//! A row is an error and what is expected to come of it ([`table`]), a column a kernel, a kind of machine checks and a
//! number of vCPUs ([`column`]). One guest goes through all rows of its column that it survives ([`subject`], [`story`]);
//! those that end a machine have guests of their own ([`fatal`]). Results go to a file ([`report`]).

mod column;
mod fatal;
mod report;
mod story;
mod subject;
mod table;

use column::Column;
use report::{Cell, Verdict};
use std::panic::{self, AssertUnwindSafe};
use std::thread;
use subject::Subject;
use table::{Expected, Row, Run};

/// What a row came to, in the words of the table; or why it could not be run.
type Seen = Result<String, NotRun>;

/// Why a row was not run: what the machine below lacks.
#[derive(Debug)]
struct NotRun(String);

/// Runs all rows of a column in one guest, and writes down what came of each.
fn run_column(column: Column) {
    let mut subject = Subject::boot(column);
    let mut cells = Vec::new();
    for row in table::ROWS {
        let result = panic::catch_unwind(AssertUnwindSafe(|| row.run(&mut subject)));
        // A guest in an unknown state would only blame the rows that follow.
        let must_boot_again = result.is_err();
        if must_boot_again {
            report::keep_log(&column, row.name, &subject.guest);
        }
        let cell = judge(row.name, &row.expected, &column, result);
        eprintln!("{column}: {cell}");
        cells.push(cell);
        if must_boot_again {
            subject = Subject::boot(column);
        }
    }
    subject.finish();
    report::write(&column.to_string(), cells);
}

impl Row {
    fn run(&self, subject: &mut Subject) -> Seen {
        match self.run {
            Run::Access(place, act) => subject.access(place, act),
            Run::Story(story) => story(subject),
        }
    }
}

/// Compares what was seen with what stands in the table.
fn judge(row: &str, expected: &Expected, column: &Column, result: thread::Result<Seen>) -> Cell {
    let (expected, because) = expected.on(column);
    let verdict = match &result {
        Ok(Ok(seen)) if seen == expected => Verdict::Passed,
        Ok(Ok(_)) => Verdict::Failed(format!("expected: {expected}")),
        Ok(Err(NotRun(why))) => Verdict::NotRun(why.clone()),
        Err(panic) => Verdict::Failed(report::panic_text(panic.as_ref())),
    };
    let seen = result.ok().and_then(Result::ok).unwrap_or_default();
    Cell { row: row.to_owned(), seen, verdict, because }
}

/// One test for each column.
macro_rules! columns {
    ($run:path; $($(#[$attribute:meta])* $name:ident: $kernel:literal, $flavour:ident, $vcpus:literal;)*) => {
        $(
            #[test]
            $(#[$attribute])*
            fn $name() {
                $run(Column { kernel: $kernel, flavour: column::Flavour::$flavour, vcpus: $vcpus });
            }
        )*
    };
}

columns! {
    run_column;
    #[ignore = "wide"]
    smca_1: "6.12", Smca, 1;
    smca_2: "6.12", Smca, 2;
    #[ignore = "wide"]
    smca_4: "6.12", Smca, 4;
    #[ignore = "wide"]
    legacy_1: "6.12", Legacy, 1;
    #[ignore = "wide"]
    legacy_2: "6.12", Legacy, 2;
    #[ignore = "wide"]
    legacy_4: "6.12", Legacy, 4;
    #[ignore = "wide"]
    lmce_1: "6.12", IntelLmce, 1;
    #[ignore = "wide"]
    lmce_2: "6.12", IntelLmce, 2;
    #[ignore = "wide"]
    lmce_4: "6.12", IntelLmce, 4;
    #[ignore = "wide"]
    broadcast_1: "6.12", IntelBroadcast, 1;
    #[ignore = "wide"]
    broadcast_2: "6.12", IntelBroadcast, 2;
    #[ignore = "wide"]
    broadcast_4: "6.12", IntelBroadcast, 4;
    #[ignore = "wide"]
    smca_6_1: "6.1", Smca, 2;
    #[ignore = "wide"]
    legacy_6_1: "6.1", Legacy, 2;
    #[ignore = "wide"]
    lmce_6_1: "6.1", IntelLmce, 2;
    #[ignore = "wide"]
    broadcast_6_1: "6.1", IntelBroadcast, 2;
    #[ignore = "wide"]
    smca_7: "7.x", Smca, 2;
    #[ignore = "wide"]
    legacy_7: "7.x", Legacy, 2;
    #[ignore = "wide"]
    lmce_7: "7.x", IntelLmce, 2;
    #[ignore = "wide"]
    broadcast_7: "7.x", IntelBroadcast, 2;
}

columns! {
    fatal::run_column;
    #[ignore = "wide"]
    fatal_smca: "6.12", Smca, 2;
    #[ignore = "wide"]
    fatal_legacy: "6.12", Legacy, 2;
    #[ignore = "wide"]
    fatal_lmce: "6.12", IntelLmce, 2;
    #[ignore = "wide"]
    fatal_broadcast: "6.12", IntelBroadcast, 2;
    #[ignore = "wide"]
    fatal_smca_6_1: "6.1", Smca, 2;
    #[ignore = "wide"]
    fatal_lmce_6_1: "6.1", IntelLmce, 2;
    #[ignore = "wide"]
    fatal_smca_7: "7.x", Smca, 2;
    #[ignore = "wide"]
    fatal_lmce_7: "7.x", IntelLmce, 2;
}
