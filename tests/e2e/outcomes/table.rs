//! The rows: errors, and what kernels make of them (Linux 6.12 where nothing else is said).
//!
//! An expectation is a sentence that the test composes from what it saw. Where a kernel or a kind of machine differs, the
//! row says so, with the kernel's function and why.

use super::column::{Column, Flavour};
use super::subject::Subject;
use super::{Seen, story};

/// Where the bad line is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// A DAX device mapped in pages of 4 KiB.
    Devdax4k,
    /// A DAX device mapped in pages of 2 MiB.
    Devdax2m,
    /// A file of ext4 with DAX.
    Fsdax,
}

/// Who touches it, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// The process loads a word.
    Load,
    /// The process loads a word; it gets its signal, and does it again.
    LoadAgain,
    /// The process stores a word.
    Store,
    /// The process adds to a word, atomically.
    Add,
    /// The process copies a page by `rep movsb`.
    Copy,
    /// The process stores a whole line by MOVDIR64B, and then loads it.
    Line,
    /// The process executes it.
    Execute,
    /// The kernel copies a page from the process: write(2).
    Send,
    /// The kernel copies a page to the process: read(2).
    Receive,
    /// The kernel loads a word of the process: futex(2).
    Futex,
}

/// How a row is run.
#[derive(Clone, Copy)]
pub enum Run {
    /// One access to a bad line in mapped memory, after the same access to a good line of the page.
    Access(Place, Act),
    /// Anything else.
    Story(fn(&mut Subject) -> Seen),
}

/// A row.
pub struct Row {
    /// Its name.
    pub name: &'static str,
    /// What is done.
    pub run: Run,
    /// What comes of it.
    pub expected: &'static str,
    /// Where something else comes of it.
    pub differences: &'static [Difference],
}

/// Machines on which a row comes to something else.
pub struct Difference {
    /// The kernels; all if there are none.
    pub kernels: &'static [&'static str],
    /// The kinds of machine; all if there are none.
    pub flavours: &'static [Flavour],
    /// What comes of it.
    pub expected: &'static str,
    /// The function of the kernel.
    pub function: &'static str,
    /// Why.
    pub reason: &'static str,
}

impl Difference {
    /// Whether `column` is meant.
    pub fn holds_for(&self, column: &Column) -> bool {
        (self.kernels.is_empty() || self.kernels.contains(&column.kernel))
            && (self.flavours.is_empty() || self.flavours.contains(&column.flavour))
    }
}

const fn access(name: &'static str, place: Place, act: Act, expected: &'static str) -> Row {
    Row { name, run: Run::Access(place, act), expected, differences: &[] }
}

const fn story(name: &'static str, run: fn(&mut Subject) -> Seen, expected: &'static str) -> Row {
    Row { name, run: Run::Story(run), expected, differences: &[] }
}

/// The rows.
pub const ROWS: &[Row] = &[
    story(
        "block read",
        story::block_read,
        "EIO at the sector, 7 others good; 1 machine check; badblocks 9 1",
    ),
    story("block repair", story::block_repair, "cleared by the guest; badblocks empty; all sectors good"),
    story("block scrub", story::block_scrub, "badblocks 1024 1 before any access; EIO; 0 machine checks"),
    story(
        "block readers",
        story::block_readers,
        "all bad sectors EIO, all good sectors good; 8 machine checks",
    ),
    access("devdax 4K load", Place::Devdax4k, Act::Load, "SIGBUS AR, lsb 12; 1 machine check; +4 kB"),
    access(
        "devdax 4K load again",
        Place::Devdax4k,
        Act::LoadAgain,
        "SIGBUS AR, lsb 12; 2 machine checks; +8 kB",
    ),
    access("devdax 4K store", Place::Devdax4k, Act::Store, "done; 0 machine checks; +0 kB"),
    access("devdax 4K atomic", Place::Devdax4k, Act::Add, "SIGBUS AR, lsb 12; 1 machine check; +4 kB"),
    access("devdax 4K rep movsb", Place::Devdax4k, Act::Copy, "SIGBUS AR, lsb 12; 1 machine check; +4 kB"),
    access("devdax 4K movdir64b", Place::Devdax4k, Act::Line, "good; 0 machine checks; +0 kB"),
    access("devdax 4K fetch", Place::Devdax4k, Act::Execute, "SIGBUS AR, lsb 12; 1 machine check; +4 kB"),
    access(
        "devdax 4K copy in",
        Place::Devdax4k,
        Act::Send,
        "EFAULT, SIGBUS AR, lsb 12; 1 machine check; +4 kB",
    ),
    access("devdax 4K copy out", Place::Devdax4k, Act::Receive, "4096; 0 machine checks; +0 kB"),
    access(
        "devdax 4K futex",
        Place::Devdax4k,
        Act::Futex,
        "EFAULT, SIGBUS AR, lsb 12; 1 machine check; +4 kB",
    ),
    access("devdax 2M load", Place::Devdax2m, Act::Load, "SIGBUS AR, lsb 21; 1 machine check; +4 kB"),
    access("devdax 2M fetch", Place::Devdax2m, Act::Execute, "SIGBUS AR, lsb 21; 1 machine check; +4 kB"),
    access(
        "devdax 2M copy in",
        Place::Devdax2m,
        Act::Send,
        "EFAULT, SIGBUS AR, lsb 21; 1 machine check; +4 kB",
    ),
    access("fsdax load", Place::Fsdax, Act::Load, "SIGBUS AR, lsb 12; 1 machine check; +4 kB"),
    access("fsdax copy in", Place::Fsdax, Act::Send, "EFAULT, SIGBUS AR, lsb 12; 1 machine check; +4 kB"),
    story(
        "fsdax read",
        story::fsdax_read,
        "64 bytes before the line, then EIO; 1 machine check; repaired by a write",
    ),
    story(
        "early kill of a sharer",
        story::sharer,
        "SIGBUS AR, lsb 12 to the reader, SIGBUS AO, lsb 12 to the sharer",
    ),
];
