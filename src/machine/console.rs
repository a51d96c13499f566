//! Where the guest's serial line goes: a log file, the terminal, a tail for reports, and the search for the
//! line with which a kernel panics.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Bytes of the tail that is kept for reports.
const TAIL: usize = 64 << 10;
/// What Linux prints first when it panics (`panic()` in kernel/panic.c).
const PANIC: &[u8] = b"Kernel panic - not syncing";

#[derive(Debug, Default)]
struct State {
    tail: VecDeque<u8>,
    matched: usize,
    panicked: bool,
    bytes: u64,
}

/// What the serial line has said so far; clones see the same.
#[derive(Clone, Debug, Default)]
pub struct ConsoleLog {
    state: Arc<Mutex<State>>,
}

impl ConsoleLog {
    /// The last lines, at most `lines`.
    pub fn tail(&self, lines: usize) -> String {
        let state = self.state();
        let (a, b) = state.tail.as_slices();
        let text = String::from_utf8_lossy(&[a, b].concat()).replace('\r', "");
        let kept: Vec<_> = text.lines().rev().take(lines).collect();
        kept.into_iter().rev().collect::<Vec<_>>().join("\n")
    }

    /// Whether the kernel said that it panics.
    pub fn panicked(&self) -> bool {
        self.state().panicked
    }

    /// Bytes printed.
    pub fn bytes(&self) -> u64 {
        self.state().bytes
    }

    fn note(&self, bytes: &[u8]) {
        let mut state = self.state();
        state.bytes += bytes.len() as u64;
        state.tail.extend(bytes);
        let excess = state.tail.len().saturating_sub(TAIL);
        state.tail.drain(..excess);
        for byte in bytes {
            // A mismatch can only begin a new match at its own first byte: no prefix of the line repeats.
            state.matched = match PANIC.get(state.matched) {
                Some(expected) if expected == byte => state.matched + 1,
                _ => usize::from(PANIC[0] == *byte),
            };
            if state.matched == PANIC.len() {
                state.panicked = true;
                state.matched = 0;
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The time that a kernel gets to print why it panics. It reports the panic (pvpanic) before that where it cannot
/// print at once, as in a machine check: `panic()` in kernel/panic.c calls its notifiers before
/// `console_flush_on_panic()`. It resets the machine when it is done, if its command line says so.
#[derive(Debug)]
pub struct LastWords {
    began: Instant,
    changed: Instant,
    bytes: u64,
}

impl LastWords {
    /// How often to look.
    pub const LOOK: Duration = Duration::from_millis(100);
    /// A kernel that prints nothing for so long has no more to say.
    const SILENCE: Duration = Duration::from_secs(2);
    /// A kernel that still prints after that will never end.
    const LIMIT: Duration = Duration::from_secs(20);

    /// The kernel has reported its panic.
    pub fn new(log: &ConsoleLog) -> Self {
        let now = Instant::now();
        Self { began: now, changed: now, bytes: log.bytes() }
    }

    /// Whether the time is over.
    pub fn are_said(&mut self, log: &ConsoleLog) -> bool {
        let bytes = log.bytes();
        if bytes != self.bytes {
            self.bytes = bytes;
            self.changed = Instant::now();
        }
        self.changed.elapsed() >= Self::SILENCE || self.began.elapsed() >= Self::LIMIT
    }
}

/// The sink of the serial line.
#[derive(Debug)]
pub struct ConsoleSink {
    log: ConsoleLog,
    file: Option<File>,
    terminal: bool,
}

impl ConsoleSink {
    /// Everything goes to `log`, to `file` if there is one, and to standard output if `terminal` is set.
    pub fn new(log: ConsoleLog, file: Option<File>, terminal: bool) -> Self {
        Self { log, file, terminal }
    }
}

impl Write for ConsoleSink {
    /// Always takes everything: a full disk or a closed terminal must not stop the guest.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.log.note(bytes);
        if let Some(file) = &mut self.file
            && let Err(error) = file.write_all(bytes)
        {
            tracing::warn!(%error, "the console log ends here");
            self.file = None;
        }
        if self.terminal {
            let mut out = io::stdout().lock();
            self.terminal = out.write_all(bytes).and_then(|()| out.flush()).is_ok();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_seen_in_pieces() {
        let log = ConsoleLog::default();
        let mut sink = ConsoleSink::new(log.clone(), None, false);
        sink.write_all(b"[1.0] KernelKernel panic - not ").unwrap();
        assert!(!log.panicked());
        sink.write_all(b"syncing: Attempted to kill init!\r\n").unwrap();
        assert!(log.panicked());
    }

    #[test]
    fn the_tail_is_bounded_and_ends_with_the_last_line() {
        let log = ConsoleLog::default();
        let mut sink = ConsoleSink::new(log.clone(), None, false);
        for n in 0..20_000 {
            writeln!(sink, "line {n}\r").unwrap();
        }
        assert_eq!(log.tail(2), "line 19998\nline 19999");
        assert!(log.state().tail.len() <= TAIL);
        assert!(!log.panicked());
    }
}
