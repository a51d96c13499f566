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
/// The name of the workload that maps memory: `aconite-agent workload map`.
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
    /// Map memory, to be read and written, in the place of what was mapped before.
    Map(Source),
    /// Undo the mapping.
    Unmap,
    /// Where a byte of a file is: its offset in the block device of the file system (FIEMAP).
    Locate(PathBuf, u64),
    /// Where a byte of the mapping is: its guest-physical address (/proc/self/pagemap).
    Physical(u64),
    /// The number of this process.
    Process,
    /// Store [`pattern`] over a part of the mapping, offset and length.
    Fill(u64, u64),
    /// Load the word at an offset of the mapping.
    Load(u64),
    /// Store a word at an offset of the mapping.
    Store(u64, u64),
    /// Add to the word at an offset of the mapping, atomically; what it was is the answer.
    Add(u64, u64),
    /// Copy a part of the mapping, offset and length, by one `rep movsb`, and compare it with [`pattern`].
    Copy(u64, u64),
    /// Store a whole line at an offset of the mapping by one MOVDIR64B, where the processor has it.
    Line(u64),
    /// Make the mapping executable and call what is at an offset of it.
    Execute(u64),
    /// Let the kernel load a part of the mapping, offset and length: write(2) into a pipe.
    Send(u64, u64),
    /// Let the kernel store to a part of the mapping, offset and length: read(2) of [`pattern`] from a file of its own.
    Receive(u64, u64),
    /// Let a device store to a part of the mapping, by one pread(2) with O_DIRECT: the file or disk, where in it, offset
    /// and length.
    Fetch(PathBuf, u64, u64, u64),
    /// Let a device load a part of the mapping, by one pwrite(2) with O_DIRECT: as [`Request::Fetch`].
    Put(PathBuf, u64, u64, u64),
    /// Pin a part of the mapping, offset and length, for as long as a ring of io_uring(7) is open that has it as its
    /// registered buffer, in the place of the one before.
    Pin(u64, u64),
    /// Close the ring.
    Unpin,
    /// Let a device store to what is pinned, all of it, whether or not it is mapped still: a read of the ring
    /// (IORING_OP_READ_FIXED) with O_DIRECT: the file or disk, and where in it.
    Deliver(PathBuf, u64),
    /// Let the kernel load the word at an offset of the mapping: futex(2), with a value that is not there.
    Futex(u64),
    /// Ask to be told of poison before it is consumed, or not (PR_MCE_KILL).
    Early(bool),
    /// The last signal that came outside any access, once.
    Notice,
    /// Load the words of a part of the mapping, offset and length, and compare them with [`pattern`].
    Scan(u64, u64),
    /// Read a part of a file, offset and length, by one pread(2), and compare it with [`pattern`].
    Read(PathBuf, u64, u64),
    /// Write [`pattern`] over a part of a file, offset and length, by one pwrite(2), and wait until it is on the media.
    Write(PathBuf, u64, u64),
    /// Run a command with the shell, for at most that many seconds.
    Run(u64, String),
}

/// What can be mapped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// All of a file or of a DAX device, shared.
    File(PathBuf),
    /// That many bytes of the process's own, filled with [`pattern`].
    Anonymous(u64),
    /// The same in huge pages of 2 MiB, which the system must have set aside.
    Huge(u64),
}

/// How a request ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// It is done.
    Done,
    /// Where something is: the address of the mapping or of a byte, or its offset in the block device.
    At(u64),
    /// The number of the process.
    Process(u32),
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
    /// A system call returned this (an error as its number below zero), and there was perhaps a signal.
    Called(i64, Option<Signal>),
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
/// The code of a SIGBUS whose process has poison that it did not consume yet.
pub const BUS_MCEERR_AO: i32 = 5;

impl Signal {
    /// Whether the signal says that the process loaded poison at `address`: the code, and an area that holds it.
    pub fn is_poison_at(&self, address: u64) -> bool {
        let area = u32::min(self.lsb, 63);
        self.number == SIGBUS && self.code == BUS_MCEERR_AR && self.address >> area == address >> area
    }
}

impl fmt::Display for Signal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Signal { number, code, address, lsb, rip } = self;
        write!(f, "{number} {code} {address:#x} {lsb} {rip:#x}")
    }
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Create(path, length) => write!(f, "create {} {length:#x}", field(path)),
            Self::Map(Source::File(path)) => write!(f, "map {}", field(path)),
            Self::Map(Source::Anonymous(length)) => write!(f, "anonymous {length:#x}"),
            Self::Map(Source::Huge(length)) => write!(f, "huge {length:#x}"),
            Self::Unmap => write!(f, "unmap"),
            Self::Locate(path, offset) => write!(f, "locate {} {offset:#x}", field(path)),
            Self::Physical(offset) => write!(f, "physical {offset:#x}"),
            Self::Process => write!(f, "process"),
            Self::Fill(offset, length) => write!(f, "fill {offset:#x} {length:#x}"),
            Self::Load(offset) => write!(f, "load {offset:#x}"),
            Self::Store(offset, word) => write!(f, "store {offset:#x} {word:#x}"),
            Self::Add(offset, word) => write!(f, "add {offset:#x} {word:#x}"),
            Self::Copy(offset, length) => write!(f, "copy {offset:#x} {length:#x}"),
            Self::Line(offset) => write!(f, "line {offset:#x}"),
            Self::Execute(offset) => write!(f, "execute {offset:#x}"),
            Self::Send(offset, length) => write!(f, "send {offset:#x} {length:#x}"),
            Self::Receive(offset, length) => write!(f, "receive {offset:#x} {length:#x}"),
            Self::Fetch(path, at, offset, length) => {
                write!(f, "fetch {} {at:#x} {offset:#x} {length:#x}", field(path))
            }
            Self::Put(path, at, offset, length) => {
                write!(f, "put {} {at:#x} {offset:#x} {length:#x}", field(path))
            }
            Self::Pin(offset, length) => write!(f, "pin {offset:#x} {length:#x}"),
            Self::Unpin => write!(f, "unpin"),
            Self::Deliver(path, at) => write!(f, "deliver {} {at:#x}", field(path)),
            Self::Futex(offset) => write!(f, "futex {offset:#x}"),
            Self::Early(on) => write!(f, "early {}", u8::from(*on)),
            Self::Notice => write!(f, "notice"),
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
            "map" => Self::Map(Source::File(fields.path()?)),
            "anonymous" => Self::Map(Source::Anonymous(fields.number()?)),
            "huge" => Self::Map(Source::Huge(fields.number()?)),
            "unmap" => Self::Unmap,
            "locate" => Self::Locate(fields.path()?, fields.number()?),
            "physical" => Self::Physical(fields.number()?),
            "process" => Self::Process,
            "fill" => Self::Fill(fields.number()?, fields.number()?),
            "load" => Self::Load(fields.number()?),
            "store" => Self::Store(fields.number()?, fields.number()?),
            "add" => Self::Add(fields.number()?, fields.number()?),
            "copy" => Self::Copy(fields.number()?, fields.number()?),
            "line" => Self::Line(fields.number()?),
            "execute" => Self::Execute(fields.number()?),
            "send" => Self::Send(fields.number()?, fields.number()?),
            "receive" => Self::Receive(fields.number()?, fields.number()?),
            "fetch" => Self::Fetch(fields.path()?, fields.number()?, fields.number()?, fields.number()?),
            "put" => Self::Put(fields.path()?, fields.number()?, fields.number()?, fields.number()?),
            "pin" => Self::Pin(fields.number()?, fields.number()?),
            "unpin" => Self::Unpin,
            "deliver" => Self::Deliver(fields.path()?, fields.number()?),
            "futex" => Self::Futex(fields.number()?),
            "early" => Self::Early(fields.number()? != 0),
            "notice" => Self::Notice,
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
            Self::Process(number) => write!(f, "process {number}"),
            Self::Loaded { word, rip } => write!(f, "loaded {word:#x} {rip:#x}"),
            Self::Compared { good, bad } => write!(f, "compared {good} {bad}"),
            Self::Signal(signal) => write!(f, "signal {signal}"),
            Self::Called(result, None) => write!(f, "called {result}"),
            Self::Called(result, Some(signal)) => write!(f, "called {result} {signal}"),
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
            "process" => Self::Process(fields.small()?),
            "loaded" => Self::Loaded { word: fields.number()?, rip: fields.number()? },
            "compared" => Self::Compared { good: fields.number()?, bad: fields.number()? },
            "signal" => Self::Signal(fields.signal()?),
            "called" => {
                let result = fields.small()?;
                Self::Called(result, if fields.is_done() { None } else { Some(fields.signal()?) })
            }
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

    fn signal(&mut self) -> Result<Signal, String> {
        Ok(Signal {
            number: self.small()?,
            code: self.small()?,
            address: self.number()?,
            lsb: self.small()?,
            rip: self.number()?,
        })
    }

    fn is_done(&self) -> bool {
        self.fields.clone().next().is_none()
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
            Request::Map(Source::File(path())),
            Request::Map(Source::Anonymous(1 << 16)),
            Request::Map(Source::Huge(1 << 21)),
            Request::Unmap,
            Request::Locate(path(), 0x1240),
            Request::Physical(0x1240),
            Request::Process,
            Request::Fill(0x1000, 4096),
            Request::Add(8, 1),
            Request::Copy(0, 4096),
            Request::Line(64),
            Request::Execute(0x1000),
            Request::Send(0, 4096),
            Request::Receive(0, 4096),
            Request::Fetch(path(), 512, 4096, 8192),
            Request::Put(path(), 512, 4096, 8192),
            Request::Pin(0x1000, 0x2000),
            Request::Unpin,
            Request::Deliver(path(), 512),
            Request::Futex(4),
            Request::Early(true),
            Request::Notice,
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
            Reply::Process(77),
            Reply::Signal(signal),
            Reply::Called(4096, None),
            Reply::Called(-14, Some(signal)),
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
