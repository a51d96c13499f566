//! System calls without a safe wrapper in the crates at hand: terminals, sessions, signals to wait for.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

/// A terminal in raw mode; dropping it restores the mode from before.
#[derive(Debug)]
pub struct RawTerminal<'fd> {
    fd: BorrowedFd<'fd>,
    before: libc::termios,
}

impl<'fd> RawTerminal<'fd> {
    /// Switches the terminal to raw mode: every key goes through, Ctrl-C included.
    ///
    /// # Errors
    /// `fd` is no terminal.
    pub fn enter(fd: BorrowedFd<'fd>) -> io::Result<Self> {
        // SAFETY: termios is plain old data, for which all zeroes are a value.
        let mut before: libc::termios = unsafe { std::mem::zeroed() };
        // SAFETY: the descriptor is open, and the pointer is to a termios of ours.
        check(unsafe { libc::tcgetattr(fd.as_raw_fd(), &raw mut before) })?;
        let mut raw = before;
        // SAFETY: the pointer is to a termios of ours.
        unsafe { libc::cfmakeraw(&raw mut raw) };
        // SAFETY: the descriptor is open, and the pointer is to a termios of ours.
        check(unsafe { libc::tcsetattr(fd.as_raw_fd(), libc::TCSADRAIN, &raw const raw) })?;
        Ok(RawTerminal { fd, before })
    }
}

impl Drop for RawTerminal<'_> {
    fn drop(&mut self) {
        // SAFETY: as in `enter`. The terminal may be gone; there is nothing to restore then.
        unsafe { libc::tcsetattr(self.fd.as_raw_fd(), libc::TCSADRAIN, &raw const self.before) };
    }
}

/// Rows and columns of a terminal; `None` if it is none, or does not know.
pub fn window_size(fd: BorrowedFd) -> Option<(u16, u16)> {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCGWINSZ writes one winsize, which the pointer is to.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) }).ok()?;
    (size.ws_row > 0 && size.ws_col > 0).then_some((size.ws_row, size.ws_col))
}

/// Whether this process is in the foreground of the terminal `fd`, so that using it does not stop the process.
pub fn in_foreground(fd: BorrowedFd) -> bool {
    // SAFETY: neither call touches memory.
    unsafe { libc::tcgetpgrp(fd.as_raw_fd()) == libc::getpgrp() }
}

/// Signals that are blocked, in the thread that made this and those it starts afterwards, and waited for instead.
pub struct Signals(libc::sigset_t);

impl Signals {
    /// Blocks `signals` for this thread and its descendants.
    pub fn block(signals: &[i32]) -> io::Result<Self> {
        // SAFETY: sigset_t is plain old data; sigemptyset makes it a valid set, sigaddset and pthread_sigmask read and
        // write nothing else.
        unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut set);
            for signal in signals {
                check(libc::sigaddset(&raw mut set, *signal))?;
            }
            match libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) {
                0 => Ok(Signals(set)),
                error => Err(io::Error::from_raw_os_error(error)),
            }
        }
    }

    /// Waits for one of them.
    pub fn wait(&self) -> io::Result<i32> {
        let mut signal = 0;
        // SAFETY: both pointers are to values of ours.
        match unsafe { libc::sigwait(&raw const self.0, &raw mut signal) } {
            0 => Ok(signal),
            error => Err(io::Error::from_raw_os_error(error)),
        }
    }
}

/// Lets all signals through: a process has its mask from whoever started it.
pub fn unblock_signals() -> io::Result<()> {
    // SAFETY: sigset_t is plain old data; sigemptyset makes it a valid set, and pthread_sigmask only reads it.
    let result = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const set, std::ptr::null_mut())
    };
    if result == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(result)) }
}

/// Lets the command outlive this process: it gets a session of its own, away from the terminal, and none of the
/// descriptors that this process was itself started with (locks and pipes of whoever waits for it to end).
pub fn detach(command: &mut Command) {
    // SAFETY: between fork and exec only async-signal-safe calls are made, and they touch no memory.
    unsafe {
        command.pre_exec(|| {
            check(libc::setsid())?;
            check(libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) as i32)
        });
    }
}

/// Lets the command die with the thread that starts it.
pub fn die_with_parent(command: &mut Command) {
    // SAFETY: between fork and exec only an async-signal-safe call is made, and it touches no memory.
    unsafe {
        command.pre_exec(|| check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL)));
    }
}

/// Has large pieces of memory mapped one by one, so that they go back to the host as soon as they are free. Left alone,
/// the C library raises the size from which it does so with each such piece (M_MMAP_THRESHOLD in mallopt(3)), and keeps
/// tens of megabytes after a request for a hundred thousand ranges.
pub fn return_large_memory() {
    const LARGE: i32 = 256 << 10;
    // SAFETY: mallopt sets numbers of the allocator's; no thread of ours runs yet that could allocate meanwhile.
    unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE) };
}

/// The user that this process works for.
pub fn user() -> u32 {
    // SAFETY: geteuid touches no memory.
    unsafe { libc::geteuid() }
}

fn check(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::AsFd;

    #[test]
    fn a_file_is_no_terminal() {
        let file = File::open("/dev/null").unwrap();
        assert!(RawTerminal::enter(file.as_fd()).is_err());
        assert_eq!(window_size(file.as_fd()), None);
        assert!(!in_foreground(file.as_fd()));
    }

    #[test]
    fn blocked_signals_are_waited_for() {
        std::thread::spawn(|| {
            let signals = Signals::block(&[libc::SIGUSR2]).unwrap();
            // SAFETY: sends a signal that this thread has blocked.
            unsafe { libc::pthread_kill(libc::pthread_self(), libc::SIGUSR2) };
            assert_eq!(signals.wait().unwrap(), libc::SIGUSR2);
        })
        .join()
        .unwrap();
    }
}
