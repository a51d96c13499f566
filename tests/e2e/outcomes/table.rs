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
    /// RAM of the process's own.
    Anonymous,
    /// The same, in transparent huge pages.
    Transparent,
    /// RAM of a file in memory, mapped shared.
    Shared,
    /// RAM in huge pages of 2 MiB (hugetlbfs).
    Huge,
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
    pub expected: Expected,
}

/// What comes of a row.
#[derive(Clone, Copy)]
pub struct Expected {
    /// On most machines.
    usually: &'static str,
    /// Where something else comes of it.
    differences: &'static [Difference],
}

impl Expected {
    /// The same on all machines.
    pub const fn always(usually: &'static str) -> Self {
        Self { usually, differences: &[] }
    }

    /// Something else on some machines.
    pub const fn but(self, differences: &'static [Difference]) -> Self {
        Self { differences, ..self }
    }

    /// In a column: what comes of the row, and why if that is not the usual.
    pub fn on(&self, column: &Column) -> (&'static str, Option<String>) {
        match self.differences.iter().find(|difference| difference.holds_for(column)) {
            Some(Difference { expected, function, reason, .. }) => {
                (expected, Some(format!("{function}: {reason}")))
            }
            None => (self.usually, None),
        }
    }
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
    fn holds_for(&self, column: &Column) -> bool {
        (self.kernels.is_empty() || self.kernels.contains(&column.kernel))
            && (self.flavours.is_empty() || self.flavours.contains(&column.flavour))
    }
}

const fn access(name: &'static str, place: Place, act: Act, expected: &'static str) -> Row {
    Row { name, run: Run::Access(place, act), expected: Expected::always(expected) }
}

const fn story(name: &'static str, run: fn(&mut Subject) -> Seen, expected: &'static str) -> Row {
    Row { name, run: Run::Story(run), expected: Expected::always(expected) }
}

const AR: &str = "SIGBUS AR, lsb 12; 1 machine check; +4 kB";
const AR_LARGE: &str = "SIGBUS AR, lsb 21; 1 machine check; +4 kB";
// copy_page_from_iter() tries again behind what it could copy, until it copies nothing.
const COPY_IN: &str = "EFAULT, SIGBUS AR, lsb 12; 2 machine checks; +4 kB";
// futex_wait_setup() loads the word with page faults off, and when that fails with get_user().
const FUTEX: &str = COPY_IN;
// The process is spared: kill_me_never() does not ask memory_failure() to kill, and a page in RAM can be unmapped. A page
// of a DAX device cannot: mf_generic_kill_procs() kills in any case.
const COPY_IN_RAM: &str = "EFAULT; 2 machine checks; +4 kB";
const NOTHING: &str = "done; 0 machine checks; +0 kB";
const COPY_OUT: &str = "4096; 0 machine checks; +0 kB";

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
    access("devdax 4K load", Place::Devdax4k, Act::Load, AR),
    // memory_failure_dev_pagemap() counts the page each time that it is met, action_result() adds to the sum.
    access(
        "devdax 4K load again",
        Place::Devdax4k,
        Act::LoadAgain,
        "SIGBUS AR, lsb 12; 2 machine checks; +8 kB",
    ),
    access("devdax 4K store", Place::Devdax4k, Act::Store, NOTHING),
    access("devdax 4K atomic", Place::Devdax4k, Act::Add, AR),
    access("devdax 4K rep movsb", Place::Devdax4k, Act::Copy, AR),
    access(
        "devdax 4K movdir64b",
        Place::Devdax4k,
        Act::Line,
        "good; 0 machine checks; +0 kB; line good again",
    ),
    access("devdax 4K fetch", Place::Devdax4k, Act::Execute, AR),
    access("devdax 4K copy in", Place::Devdax4k, Act::Send, COPY_IN),
    access("devdax 4K copy out", Place::Devdax4k, Act::Receive, COPY_OUT),
    access("devdax 4K futex", Place::Devdax4k, Act::Futex, FUTEX),
    access("devdax 2M load", Place::Devdax2m, Act::Load, AR_LARGE),
    access("devdax 2M fetch", Place::Devdax2m, Act::Execute, AR_LARGE),
    access(
        "devdax 2M copy in",
        Place::Devdax2m,
        Act::Send,
        "EFAULT, SIGBUS AR, lsb 21; 2 machine checks; +4 kB",
    ),
    access("fsdax load", Place::Fsdax, Act::Load, AR),
    access("fsdax copy in", Place::Fsdax, Act::Send, COPY_IN),
    story(
        "fsdax read",
        story::fsdax_read,
        "64 bytes before the line, then EIO; repaired by a write",
    ),
    story(
        "early kill of a sharer",
        story::sharer,
        "SIGBUS AR, lsb 12 to the reader, SIGBUS AO, lsb 12 to the sharer; 1 machine check",
    ),
    access("anonymous load", Place::Anonymous, Act::Load, AR),
    // The page has gone from the process's tables: it meets Linux's own mark, and do_sigbus() names the address itself.
    access(
        "anonymous load again",
        Place::Anonymous,
        Act::LoadAgain,
        "SIGBUS AR, lsb 12, to the byte; 1 machine check; +4 kB",
    ),
    access("anonymous store", Place::Anonymous, Act::Store, NOTHING),
    access("anonymous atomic", Place::Anonymous, Act::Add, AR),
    access("anonymous rep movsb", Place::Anonymous, Act::Copy, AR),
    access("anonymous fetch", Place::Anonymous, Act::Execute, AR),
    access("anonymous copy in", Place::Anonymous, Act::Send, COPY_IN_RAM),
    access("anonymous copy out", Place::Anonymous, Act::Receive, COPY_OUT),
    access("anonymous futex", Place::Anonymous, Act::Futex, COPY_IN_RAM),
    access("shared load", Place::Shared, Act::Load, AR),
    access("shared fetch", Place::Shared, Act::Execute, AR),
    access("shared copy in", Place::Shared, Act::Send, COPY_IN_RAM),
    Row {
        name: "huge page load",
        run: Run::Access(Place::Huge, Act::Load),
        expected: Expected::always("SIGBUS AR, lsb 21, to the page; 1 machine check; +4 kB").but(&[Difference {
            kernels: &["6.1"],
            flavours: &[],
            expected: AR_LARGE,
            function: "hwpoison_user_mappings()",
            reason: "6.1 hands the head of a huge page on to collect_procs(), later kernels the page in it",
        }]),
    },
    access("huge page copy in", Place::Huge, Act::Send, COPY_IN_RAM),
    // memory_failure() splits the page: only 4 KiB of it are lost.
    access("transparent huge page load", Place::Transparent, Act::Load, AR),
    access("transparent huge page copy in", Place::Transparent, Act::Send, COPY_IN_RAM),
    story(
        "action optional, early kill",
        story::optional_early,
        "SIGBUS AO, lsb 12; +4 kB; then SIGBUS AR, lsb 12, to the byte",
    ),
    story("action optional", story::optional, "no signal; +4 kB; then SIGBUS AR, lsb 12, to the byte"),
    story(
        "no action, early kill",
        story::deferred_early,
        "SIGBUS AO, lsb 12; +4 kB; then SIGBUS AR, lsb 12, to the byte",
    ),
    story("corrected", story::corrected, "no signal; +0 kB; then good"),
];
