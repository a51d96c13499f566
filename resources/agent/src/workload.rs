//! What a workload inside the guest and its driver outside say to each other: lines of text on standard input and
//! output, so that a person at a terminal can be the driver.
//!
//! The driver writes one [`Request`] a line; each is answered with any number of output lines, which begin with
//! [`OUTPUT`], and one line with the [`Reply`]. Numbers are written in hexadecimal and read in either form; paths and
//! commands are written as fields of [`crate::config::escape`].

use std::fmt;
use std::path::{Path, PathBuf};

use crate::config::{escape, unescape};

/// The program, as it is called inside a guest.
pub const PROGRAM: &str = "aconite-agent";
/// The name of the workload that maps a file: `aconite-agent workload map`.
pub const MAP: &str = "map";
/// The name of the workload that touches devices at random: `aconite-agent workload garbage SEED SECONDS`.
pub const GARBAGE: &str = "garbage";
/// What output lines of a command begin with.
pub const OUTPUT: &str = "| ";
/// Bytes of a word: loads and stores are as long, and [`pattern`] is divided so.
pub const WORD: u64 = 8;

/// The word that a file made by [`Request::Create`] has at byte `offset`. No two words of a file are the same, and none
/// is all zeroes or all ones.
pub fn pattern(offset: u64) -> u64 {
    0xACED_0000_0000_0000 | (offset / WORD) & 0xFFFF_FFFF_FFFF
}

/// The bytes of [`pattern`] from `offset` on.
pub fn pattern_bytes(offset: u64, length: usize) -> Vec<u8> {
    (offset..).take(length).map(|at| pattern(at).to_le_bytes()[(at % WORD) as usize]).collect()
}

/// What the driver wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Make a file of that many bytes of [`pattern`], and wait until they are on the media.
    Create(PathBuf, u64),
    /// Map all of a file, shared, to be read and written.
    Map(PathBuf),
    /// Undo the mapping.
    Unmap,
    /// Where a byte of a file is: its offset in the block device of the file system (FIEMAP).
    Locate(PathBuf, u64),
    /// Load the word at an offset of the mapping.
    Load(u64),
    /// Store a word at an offset of the mapping.
    Store(u64, u64),
    /// Load the words of a part of the mapping, offset and length, and compare them with [`pattern`].
    Scan(u64, u64),
    /// Read a part of a file, offset and length, by one pread(2), and compare it with [`pattern`].
    Read(PathBuf, u64, u64),
    /// Write [`pattern`] over a part of a file, offset and length, by one pwrite(2), and wait until it is on the media.
    Write(PathBuf, u64, u64),
    /// Run a command with the shell, for at most that many seconds.
    Run(u64, String),
}

/// How a request ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// It is done.
    Done,
    /// Where something is: the address of the mapping, or the offset of a byte in the block device.
    At(u64),
    /// What was loaded, and the address of the instruction that did so.
    Loaded {
        /// The word.
        word: u64,
        /// The instruction.
        rip: u64,
    },
    /// What a part was made of.
    Compared {
        /// Words that are as they should be.
        good: u64,
        /// Words that are not.
        bad: u64,
    },
    /// An access was ended by a signal.
    Signal(Signal),
    /// The system refused, with this number of errno(3).
    Errno(i32),
    /// The command's exit status, as the shell has it (128 and the signal's number if a signal ended it).
    Exit(i32),
    /// The command was not done in time. It has been killed, but may hang in the kernel for ever.
    Timeout,
    /// The request makes no sense.
    Wrong(String),
}

/// A signal as `siginfo_t` describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Signal {
    /// Its number: 7 is SIGBUS.
    pub number: i32,
    /// `si_code`: of SIGBUS, 2 is BUS_ADRERR, 4 BUS_MCEERR_AR, 5 BUS_MCEERR_AO.
    pub code: i32,
    /// `si_addr`: the address that the kernel names.
    pub address: u64,
    /// `si_addr_lsb`: the address is that of an area of 2^lsb bytes. Only with BUS_MCEERR_AR and BUS_MCEERR_AO.
    pub lsb: u32,
    /// The instruction.
    pub rip: u64,
}

/// SIGBUS's number.
pub const SIGBUS: i32 = 7;
/// The code of a SIGBUS whose process consumed poison.
pub const BUS_MCEERR_AR: i32 = 4;

impl Signal {
    /// Whether the signal says that the process loaded poison at `address`: the code, and an area that holds it.
    pub fn is_poison_at(&self, address: u64) -> bool {
        let area = u32::min(self.lsb, 63);
        self.number == SIGBUS && self.code == BUS_MCEERR_AR && self.address >> area == address >> area
    }
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Create(path, length) => write!(f, "create {} {length:#x}", field(path)),
            Self::Map(path) => write!(f, "map {}", field(path)),
            Self::Unmap => write!(f, "unmap"),
            Self::Locate(path, offset) => write!(f, "locate {} {offset:#x}", field(path)),
            Self::Load(offset) => write!(f, "load {offset:#x}"),
            Self::Store(offset, word) => write!(f, "store {offset:#x} {word:#x}"),
            Self::Scan(offset, length) => write!(f, "scan {offset:#x} {length:#x}"),
            Self::Read(path, offset, length) => write!(f, "read {} {offset:#x} {length:#x}", field(path)),
            Self::Write(path, offset, length) => write!(f, "write {} {offset:#x} {length:#x}", field(path)),
            Self::Run(seconds, command) => write!(f, "run {seconds} {}", field(Path::new(command))),
        }
    }
}

impl Request {
    /// Reads a line.
    ///
    /// # Errors
    /// It is no request; why, in words.
    pub fn parse(line: &str) -> Result<Self, String> {
        let mut fields = Fields::new(line);
        let request = match fields.word()? {
            "create" => Self::Create(fields.path()?, fields.number()?),
            "map" => Self::Map(fields.path()?),
            "unmap" => Self::Unmap,
            "locate" => Self::Locate(fields.path()?, fields.number()?),
            "load" => Self::Load(fields.number()?),
            "store" => Self::Store(fields.number()?, fields.number()?),
            "scan" => Self::Scan(fields.number()?, fields.number()?),
            "read" => Self::Read(fields.path()?, fields.number()?, fields.number()?),
            "write" => Self::Write(fields.path()?, fields.number()?, fields.number()?),
            "run" => Self::Run(fields.number()?, fields.text()?),
            other => return Err(format!("{other:?} is no request")),
        };
        fields.end().map(|()| request)
    }
}

impl fmt::Display for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Done => write!(f, "done"),
            Self::At(place) => write!(f, "at {place:#x}"),
            Self::Loaded { word, rip } => write!(f, "loaded {word:#x} {rip:#x}"),
            Self::Compared { good, bad } => write!(f, "compared {good} {bad}"),
            Self::Signal(Signal { number, code, address, lsb, rip }) => {
                write!(f, "signal {number} {code} {address:#x} {lsb} {rip:#x}")
            }
            Self::Errno(number) => write!(f, "errno {number}"),
            Self::Exit(status) => write!(f, "exit {status}"),
            Self::Timeout => write!(f, "timeout"),
            Self::Wrong(why) => write!(f, "wrong {}", field(Path::new(why))),
        }
    }
}

impl Reply {
    /// Reads a line.
    ///
    /// # Errors
    /// It is no reply; why, in words.
    pub fn parse(line: &str) -> Result<Self, String> {
        let mut fields = Fields::new(line);
        let reply = match fields.word()? {
            "done" => Self::Done,
            "at" => Self::At(fields.number()?),
            "loaded" => Self::Loaded { word: fields.number()?, rip: fields.number()? },
            "compared" => Self::Compared { good: fields.number()?, bad: fields.number()? },
            "signal" => Self::Signal(Signal {
                number: fields.small()?,
                code: fields.small()?,
                address: fields.number()?,
                lsb: fields.small()?,
                rip: fields.number()?,
            }),
            "errno" => Self::Errno(fields.small()?),
            "exit" => Self::Exit(fields.small()?),
            "timeout" => Self::Timeout,
            "wrong" => Self::Wrong(fields.text()?),
            other => return Err(format!("{other:?} is no reply")),
        };
        fields.end().map(|()| reply)
    }
}

fn field(path: &Path) -> String {
    let mut bytes = Vec::new();
    escape(path.as_os_str().as_encoded_bytes(), &mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}

struct Fields<'a> {
    line: &'a str,
    fields: std::str::SplitAsciiWhitespace<'a>,
}

impl<'a> Fields<'a> {
    fn new(line: &'a str) -> Self {
        Fields { line, fields: line.split_ascii_whitespace() }
    }

    fn word(&mut self) -> Result<&'a str, String> {
        self.fields.next().ok_or_else(|| format!("{:?} is too short", self.line))
    }

    fn number(&mut self) -> Result<u64, String> {
        let word = self.word()?;
        let number = match word.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16),
            None => word.parse(),
        };
        number.map_err(|_| format!("{word:?} is no number"))
    }

    fn small<N: std::str::FromStr>(&mut self) -> Result<N, String> {
        let word = self.word()?;
        word.parse().map_err(|_| format!("{word:?} is no small number"))
    }

    fn text(&mut self) -> Result<String, String> {
        let word = self.word()?;
        let bytes = unescape(word.as_bytes());
        bytes.and_then(|bytes| String::from_utf8(bytes).ok()).ok_or_else(|| format!("{word:?} is no text"))
    }

    fn path(&mut self) -> Result<PathBuf, String> {
        self.text().map(PathBuf::from)
    }

    fn end(mut self) -> Result<(), String> {
        match self.fields.next() {
            Some(word) => Err(format!("{word:?} is too much")),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_read_as_they_are_written() {
        let path = || PathBuf::from("/mnt/a file\\\n");
        let requests = [
            Request::Create(path(), 1 << 20),
            Request::Map(path()),
            Request::Unmap,
            Request::Locate(path(), 0x1240),
            Request::Load(8),
            Request::Store(8, u64::MAX),
            Request::Scan(0, 4096),
            Request::Read(path(), 512, 512),
            Request::Write(path(), 4096, 4096),
            Request::Run(10, "cat /sys/block/pmem0/badblocks | wc -l".into()),
        ];
        for request in requests {
            let line = request.to_string();
            assert!(!line.contains('\n'), "{line:?}");
            assert_eq!(Request::parse(&line), Ok(request));
        }
        assert_eq!(Request::parse("load 4096"), Ok(Request::Load(4096)));
        for wrong in ["", "load", "load x", "load 1 2", "lode 1", "map \\9"] {
            assert!(Request::parse(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn replies_are_read_as_they_are_written() {
        let signal = Signal { number: 7, code: 4, address: 0x7f00_0000_a000, lsb: 12, rip: 0x40_1000 };
        let replies = [
            Reply::Done,
            Reply::At(0x7f00_0000_0000),
            Reply::Loaded { word: u64::MAX, rip: 0x40_1000 },
            Reply::Compared { good: 512, bad: 0 },
            Reply::Signal(signal),
            Reply::Errno(5),
            Reply::Exit(-1),
            Reply::Timeout,
            Reply::Wrong("There is no mapping".into()),
        ];
        for reply in replies {
            assert_eq!(Reply::parse(&reply.to_string()), Ok(reply));
        }
        assert!(Reply::parse("| output").is_err() && Reply::parse("exit").is_err());
    }

    #[test]
    fn a_signal_names_an_area() {
        let signal = Signal { number: 7, code: 4, address: 0x7000, lsb: 12, rip: 0 };
        assert!(signal.is_poison_at(0x7240) && !signal.is_poison_at(0x8000));
        assert!(!Signal { code: 2, ..signal }.is_poison_at(0x7240));
        assert!(!Signal { number: 11, ..signal }.is_poison_at(0x7240));
        assert!(!Signal { lsb: 6, ..signal }.is_poison_at(0x7240));
    }

    #[test]
    fn the_pattern_tells_places_apart() {
        assert_ne!(pattern(0), pattern(8));
        assert_eq!(pattern(8), pattern(15));
        let bytes = pattern_bytes(4, 12);
        assert_eq!(bytes[..4], pattern(0).to_le_bytes()[4..]);
        assert_eq!(bytes[4..], pattern(8).to_le_bytes());
    }
}
