//! The report: a file for each column, and one table of all columns that there are, written anew after each.
//!
//! `target/errors/outcomes/COLUMN.json` and `target/errors/outcomes.txt`.

use super::column::Column;
use aconite_tests::Machine;
use serde_json::{Value, json};
use std::any::Any;
use std::collections::BTreeMap;
use std::fmt::{self, Write};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// What a row came to in a column.
pub struct Cell {
    /// The row.
    pub row: String,
    /// What was seen, in the words of the table.
    pub seen: String,
    /// What that means.
    pub verdict: Verdict,
    /// Why something else than usual is expected here.
    pub because: Option<String>,
}

/// Whether a row came to what stands in the table.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It did.
    Passed,
    /// It did not; what is wrong.
    Failed(String),
    /// It was not run; why.
    NotRun(String),
}

impl Verdict {
    fn parts(&self) -> (&'static str, Option<&str>) {
        match self {
            Self::Passed => ("pass", None),
            Self::Failed(why) => ("FAIL", Some(why)),
            Self::NotRun(why) => ("not run", Some(why)),
        }
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (word, why) = self.verdict.parts();
        write!(f, "{}: {word}: {}", self.row, self.seen)?;
        why.map_or(Ok(()), |why| write!(f, " ({why})"))
    }
}

/// What a panic says.
pub fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a panic without words").to_owned()
}

fn directory() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("../errors")
}

/// Keeps what the guest and the monitor said when a row went wrong: `target/errors/outcomes/COLUMN ROW.log`.
pub fn keep_log(column: &Column, row: &str, guest: &Machine) {
    let dir = directory().join("outcomes");
    let events: Vec<String> = guest.record().events().iter().map(ToString::to_string).collect();
    let text = format!("{}\n---- events\n{}\n", guest.record().console(), events.join("\n"));
    let path = dir.join(format!("{column} {row}.log"));
    if let Err(error) = fs::create_dir_all(&dir).and_then(|()| fs::write(&path, text)) {
        eprintln!("{}: {error}", path.display());
    }
}

/// Writes down a column, and the table of all columns.
///
/// # Panics
/// A row failed, or nothing can be written.
#[track_caller]
pub fn write(column: &str, cells: Vec<Cell>) {
    let dir = directory();
    let parts = dir.join("outcomes");
    fs::create_dir_all(&parts).expect("a directory for the report");
    let lock = File::create(dir.join("outcomes.lock")).expect("a lock");
    lock.lock().expect("the lock");
    let rows: Vec<Value> = cells
        .iter()
        .map(|cell| {
            let (verdict, why) = cell.verdict.parts();
            json!({"row": cell.row, "seen": cell.seen, "verdict": verdict, "why": why, "because": cell.because})
        })
        .collect();
    let text = serde_json::to_vec_pretty(&rows).expect("JSON");
    fs::write(parts.join(format!("{column}.json")), text).expect("the report of the column");
    let table = render(&read(&parts));
    let path = dir.join("outcomes.txt");
    fs::write(&path, &table).expect("the report");
    eprintln!("{}\n{}", path.display(), table.lines().last().unwrap_or_default());
    let failed: Vec<String> = cells
        .iter()
        .filter(|cell| matches!(cell.verdict, Verdict::Failed(_)))
        .map(ToString::to_string)
        .collect();
    assert!(failed.is_empty(), "{column}:\n{}", failed.join("\n"));
}

fn read(parts: &Path) -> BTreeMap<String, Vec<Value>> {
    let paths: Vec<PathBuf> =
        fs::read_dir(parts).expect("the parts").map(|entry| entry.expect("a part").path()).collect();
    let part = |path: &PathBuf| {
        path.extension().filter(|extension| *extension == "json")?;
        let name = path.file_stem()?.to_string_lossy().into_owned();
        Some((name, serde_json::from_slice(&fs::read(path).ok()?).ok()?))
    };
    paths.iter().filter_map(part).collect()
}

/// Rows and columns, then what was seen in each kind of cell, then counts.
fn render(columns: &BTreeMap<String, Vec<Value>>) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let mut rows: Vec<String> = Vec::new();
    for row in columns.values().flatten().map(|cell| text(&cell["row"])) {
        if !rows.contains(&row) {
            rows.push(row);
        }
    }
    let mut counts: BTreeMap<String, u32> = BTreeMap::new();
    let mut out = String::new();
    let width = rows.iter().map(String::len).max().unwrap_or(0);
    for (number, column) in columns.keys().enumerate() {
        writeln!(out, "{:width$}  {}{column}", "", "|       ".repeat(number)).expect("a string");
    }
    let mut details = String::new();
    for row in &rows {
        write!(out, "{row:width$}  ").expect("a string");
        let mut kinds: BTreeMap<(String, String), Vec<&str>> = BTreeMap::new();
        for (column, cells) in columns {
            let cell = cells.iter().find(|cell| text(&cell["row"]) == *row);
            let verdict = cell.map_or_else(|| "-".to_owned(), |cell| text(&cell["verdict"]));
            write!(out, "{verdict:8}").expect("a string");
            let Some(cell) = cell else { continue };
            *counts.entry(verdict.clone()).or_default() += 1;
            let words = [&cell["seen"], &cell["why"], &cell["because"]].map(text);
            let words: Vec<&str> = words.iter().map(String::as_str).filter(|word| !word.is_empty()).collect();
            kinds.entry((verdict, words.join(" -- "))).or_default().push(column);
        }
        out.push('\n');
        writeln!(details, "{row}").expect("a string");
        for ((verdict, words), columns) in kinds {
            writeln!(details, "    {verdict}: {words} [{}]", columns.join(" ")).expect("a string");
        }
    }
    let counts: Vec<String> = counts.iter().map(|(verdict, count)| format!("{count} {verdict}")).collect();
    format!("{out}\n{details}\noutcomes: {} columns: {}\n", columns.len(), counts.join(", "))
}
