//! Where a process's memory is: `aconite-agent pagemap PID ADDRESS [LENGTH]` prints, one [`Piece`] a line, the
//! guest-physical addresses behind virtual ones (Documentation/admin-guide/mm/pagemap.rst).

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::str::FromStr;

/// The name of the command.
pub const COMMAND: &str = "pagemap";

/// Bytes of the pages that pagemap counts in, whatever size the mapping has.
const PAGE_SIZE: u64 = 4096;
/// Bytes of an entry.
const ENTRY: u64 = 8;
/// Bit of an entry: the page is in memory.
const PRESENT: u64 = 1 << 63;
/// Bits of an entry: the number of the page frame; all zero for a reader without CAP_SYS_ADMIN.
const FRAME: u64 = (1 << 55) - 1;
/// The most bytes that are looked up at a time.
const MOST_BYTES: u64 = 1 << 30;

/// Bytes that lie side by side in virtual and in guest-physical memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Virtual address of the first byte.
    pub va: u64,
    /// Its guest-physical address.
    pub gpa: u64,
    /// Number of bytes.
    pub length: u64,
}

impl fmt::Display for Piece {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x} {:#x} {:#x}", self.va, self.gpa, self.length)
    }
}

impl FromStr for Piece {
    type Err = String;

    fn from_str(line: &str) -> Result<Self, String> {
        let mut numbers = line.split_whitespace().map(number);
        let mut next = || numbers.next().unwrap_or_else(|| Err(format!("{line:?} has too few numbers")));
        let piece = Self { va: next()?, gpa: next()?, length: next()? };
        match numbers.next() {
            None => Ok(piece),
            Some(_) => Err(format!("{line:?} has too many numbers")),
        }
    }
}

/// Reads a number, hexadecimal after `0x`.
///
/// # Errors
/// It is none, in words.
pub fn number(text: &str) -> Result<u64, String> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    }
    .map_err(|_| format!("{text:?} is no number: write 4096 or 0x1000"))
}

/// The guest-physical memory behind `length` bytes at `va` of the process `pid`, in order of address.
///
/// # Errors
/// There is no such process, or a page is not in memory; in words, with the remedy.
pub fn look_up(pid: u32, va: u64, length: u64) -> Result<Vec<Piece>, String> {
    let path = format!("/proc/{pid}/pagemap");
    let failed = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => format!("There is no process {pid}: name one that ps shows in the guest"),
        _ => format!("Cannot read {path}: {error}"),
    };
    let end = va.checked_add(length).filter(|_| (1..=MOST_BYTES).contains(&length)).ok_or_else(|| {
        format!("{length:#x} bytes at {va:#x} cannot be looked up: name 1 to {MOST_BYTES:#x} bytes")
    })?;
    let file = File::open(&path).map_err(failed)?;
    let mut pieces: Vec<Piece> = Vec::new();
    let mut at = va;
    while at < end {
        let mut entry = [0; ENTRY as usize];
        file.read_exact_at(&mut entry, at / PAGE_SIZE * ENTRY).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => format!("{at:#x} is no address of a process: name a lower one"),
            _ => failed(error),
        })?;
        let entry = u64::from_ne_bytes(entry);
        let frame = entry & FRAME;
        if entry & PRESENT == 0 {
            return Err(format!(
                "Process {pid} has no page in memory at {at:#x}: let it touch the page first"
            ));
        }
        if frame == 0 {
            return Err(format!("{path} hides page frames: look them up as root"));
        }
        let stop = end.min((at / PAGE_SIZE + 1) * PAGE_SIZE);
        let piece = Piece { va: at, gpa: frame * PAGE_SIZE + at % PAGE_SIZE, length: stop - at };
        match pieces.last_mut() {
            Some(last) if last.gpa + last.length == piece.gpa => last.length += piece.length,
            _ => pieces.push(piece),
        }
        at = stop;
    }
    Ok(pieces)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_written_and_read() {
        let piece = Piece { va: 0x7f00_0000_0040, gpa: 0x1_2345_6040, length: 64 };
        assert_eq!(piece.to_string(), "0x7f0000000040 0x123456040 0x40");
        assert_eq!(piece.to_string().parse(), Ok(piece));
        for wrong in ["", "1 2", "1 2 3 4", "1 2 x"] {
            assert!(wrong.parse::<Piece>().is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_page_of_this_process_is_found_or_hidden() {
        let bytes = vec![1u8; 3 * 4096];
        let va = bytes.as_ptr() as u64;
        match look_up(std::process::id(), va + 0x10, 0x2000) {
            Ok(pieces) => {
                assert_eq!(pieces[0].va, va + 0x10);
                assert_eq!(pieces[0].gpa % 4096, (va + 0x10) % 4096);
                assert_eq!(pieces.iter().map(|piece| piece.length).sum::<u64>(), 0x2000);
            }
            Err(why) => assert!(why.contains("as root"), "{why}"),
        }
    }

    #[test]
    fn what_is_not_there_is_said_in_words() {
        let this = std::process::id();
        assert!(look_up(u32::MAX, 0x1000, 1).unwrap_err().starts_with("There is no process"));
        assert!(look_up(this, 0x1000, 1).unwrap_err().contains("no page in memory"));
        assert!(look_up(this, 0, 0).unwrap_err().contains("name 1 to"));
        assert!(look_up(this, u64::MAX, 2).unwrap_err().contains("name 1 to"));
        assert!(look_up(this, u64::MAX - 4, 2).is_err());
    }
}
