//! What a process of the workload `crowd` does with a file that others use at the same time, and what it says of it:
//! `aconite-agent workload crowd FILE NUMBER KIND`, one [`Note`] a line on standard output, each once.
//!
//! The file is one of [`crate::workload::pattern`]. Process NUMBER stores to the first word of a page of its own; the
//! second word of each page stays what it is.

use std::fmt;

use crate::workload::Signal;

/// The name of the workload.
pub const CROWD: &str = "crowd";

/// What the process does again and again, until the kernel tells it that it cannot. It holds its mapping after that.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Stores to its own page, shared with all, and loads what it has stored.
    Write,
    /// Loads from every page.
    Read,
    /// As [`Kind::Write`] to a copy of its page (MAP_PRIVATE), and loads from all others.
    Copy,
    /// Hands all pages to a pipe (vmsplice(2)), which pins them without a lock.
    Splice,
}

impl Kind {
    const NAMES: [(Self, &str); 4] =
        [(Self::Write, "write"), (Self::Read, "read"), (Self::Copy, "copy"), (Self::Splice, "splice")];

    /// Reads a word of the command line.
    pub fn parse(word: &str) -> Option<Self> {
        Self::NAMES.iter().find(|(_, name)| *name == word).map(|(kind, _)| *kind)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (_, name) = Self::NAMES[*self as usize];
        f.write_str(name)
    }
}

/// What a process has met.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Note {
    /// The first round is over.
    AtWork,
    /// A word was all ones.
    Ones,
    /// A word was neither what it should be nor all ones.
    Found(u64),
    /// A signal: its number and `si_code`.
    Signal(i32, i32),
    /// An error of vmsplice(2).
    Errno(i32),
}

impl From<Signal> for Note {
    fn from(signal: Signal) -> Self {
        Self::Signal(signal.number, signal.code)
    }
}

impl Note {
    /// Whether the kernel has told the process that it cannot go on.
    pub fn is_refusal(self) -> bool {
        matches!(self, Self::Signal(..) | Self::Errno(_))
    }

    /// Reads a line. `None` if it is none of these.
    pub fn parse(line: &str) -> Option<Self> {
        let words: Vec<&str> = line.split(' ').collect();
        Some(match words[..] {
            ["work"] => Self::AtWork,
            ["ones"] => Self::Ones,
            ["found", word] => Self::Found(u64::from_str_radix(word.strip_prefix("0x")?, 16).ok()?),
            ["signal", number, code] => Self::Signal(number.parse().ok()?, code.parse().ok()?),
            ["errno", number] => Self::Errno(number.parse().ok()?),
            _ => return None,
        })
    }
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AtWork => f.write_str("work"),
            Self::Ones => f.write_str("ones"),
            Self::Found(word) => write!(f, "found {word:#x}"),
            Self::Signal(number, code) => write!(f, "signal {number} {code}"),
            Self::Errno(number) => write!(f, "errno {number}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_read_as_they_are_written() {
        for (kind, name) in Kind::NAMES {
            assert_eq!((kind.to_string().as_str(), Kind::parse(name)), (name, Some(kind)));
        }
        assert_eq!(Kind::parse("writes"), None);
    }

    #[test]
    fn notes_are_read_as_they_are_written() {
        for note in [Note::AtWork, Note::Ones, Note::Found(0x1234), Note::Signal(7, 5), Note::Errno(14)] {
            assert_eq!(Note::parse(&note.to_string()), Some(note));
        }
        assert_eq!((Note::parse("found 12"), Note::parse("errno"), Note::parse("")), (None, None, None));
    }
}
