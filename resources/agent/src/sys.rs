//! The system calls that the standard library has no safe name for, each wrapped
//! once. All of the agent's unsafe code is here and in the workloads that exist for it.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{self, Error};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use aconite_agent::protocol::{ExitStatus, WindowSize};

/// What to wait for on one descriptor, and what came.
#[repr(transparent)]
pub struct Poll(libc::pollfd);

impl Poll {
    /// Wait for the descriptor to become readable or writable.
    pub fn new(fd: BorrowedFd<'_>, readable: bool, writable: bool) -> Poll {
        let events = if readable { libc::POLLIN } else { 0 } | if writable { libc::POLLOUT } else { 0 };
        Poll(libc::pollfd { fd: fd.as_raw_fd(), events, revents: 0 })
    }

    /// Something can be read, or reading will tell why not.
    pub fn readable(&self) -> bool {
        self.0.revents & (libc::POLLIN | libc::POLLHUP | libc::POLLERR) != 0
    }

    /// The other side is gone.
    pub fn hung_up(&self) -> bool {
        self.0.revents & libc::POLLHUP != 0
    }

    /// Something can be written, or writing will tell why not.
    pub fn writable(&self) -> bool {
        self.0.revents & (libc::POLLOUT | libc::POLLHUP | libc::POLLERR) != 0
    }
}

/// Waits for one of the descriptors, at most `timeout` milliseconds (forever if negative).
pub fn poll(fds: &mut [Poll], timeout: i32) -> io::Result<()> {
    // SAFETY: the slice is valid for its length, and Poll is a transparent pollfd.
    let count = unsafe { libc::poll(fds.as_mut_ptr().cast(), fds.len() as libc::nfds_t, timeout) };
    match check(count) {
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
        other => other.map(drop),
    }
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(Error::last_os_error()) } else { Ok(result) }
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)
}

/// Takes over a descriptor that was passed to this process by its number.
pub fn inherited(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_GETFD takes no pointers; it fails when the descriptor is not open.
    check(unsafe { libc::fcntl(fd, libc::F_GETFD) })?;
    // SAFETY: it is open, and nobody else in this process uses what the command line has handed over.
    let owned = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: F_SETFD takes no pointers.
    check(unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) })?;
    Ok(owned)
}

/// Reads and writes fail instead of waiting.
pub fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: F_GETFL takes no pointers.
    let flags = check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) })?;
    // SAFETY: F_SETFL takes no pointers.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) }).map(drop)
}

/// Blocks the signals in this process and its threads, and returns a descriptor that reads
/// as one `signalfd_siginfo` for each.
pub fn signal_fd(signals: &[libc::c_int]) -> io::Result<OwnedFd> {
    // SAFETY: sigset_t is plain data, sigemptyset makes it valid, the pointers are to locals.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        for signal in signals {
            libc::sigaddset(&mut set, *signal);
        }
        check(libc::sigprocmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()))?;
        let fd = check(libc::signalfd(-1, &set, libc::SFD_NONBLOCK | libc::SFD_CLOEXEC))?;
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// The number of the next signal that waits on a descriptor of [`signal_fd`].
pub fn next_signal(fd: BorrowedFd<'_>) -> Option<i32> {
    // SAFETY: signalfd_siginfo is plain data, and the kernel writes at most its size.
    unsafe {
        let mut info: libc::signalfd_siginfo = std::mem::zeroed();
        let size = size_of_val(&info);
        let got = libc::read(fd.as_raw_fd(), (&raw mut info).cast(), size);
        (got == size as isize).then_some(info.ssi_signo as i32)
    }
}

/// A child that has ended, if there is one: its process id and how.
pub fn reap() -> Option<(u32, ExitStatus)> {
    let mut status = 0;
    // SAFETY: the pointer is to a local.
    let pid = unsafe { libc::waitpid(-1, &mut status, libc::WNOHANG) };
    if pid <= 0 {
        return None;
    }
    let status = if libc::WIFSIGNALED(status) {
        ExitStatus::Signal(libc::WTERMSIG(status))
    } else {
        ExitStatus::Code(libc::WEXITSTATUS(status))
    };
    Some((pid as u32, status))
}

/// Sends a signal to a process group. A group that is gone is no error.
pub fn kill_group(group: u32, signal: i32) {
    // A group of 0 or 1 would mean the agent's own, or everybody.
    if let Ok(group @ 2..) = i32::try_from(group) {
        // SAFETY: no pointers.
        unsafe { libc::kill(-group, signal) };
    }
}

/// Mounts a file system. `flags` are those of mount(2).
pub fn mount(
    source: &str,
    target: &Path,
    kind: Option<&str>,
    flags: libc::c_ulong,
    data: &str,
) -> io::Result<()> {
    let source = CString::new(source).map_err(io::Error::other)?;
    let target = c_path(target)?;
    let kind = kind.map(CString::new).transpose().map_err(io::Error::other)?;
    let data = CString::new(data).map_err(io::Error::other)?;
    let kind = kind.as_deref().map_or(std::ptr::null(), CStr::as_ptr);
    // SAFETY: all strings end with a zero byte and outlive the call; a null type is allowed for MS_MOVE.
    check(unsafe { libc::mount(source.as_ptr(), target.as_ptr(), kind, flags, data.as_ptr().cast()) })
        .map(drop)
}

/// Unmounts what is mounted there.
pub fn unmount(target: &Path) -> io::Result<()> {
    let target = c_path(target)?;
    // SAFETY: the string ends with a zero byte and outlives the call.
    check(unsafe { libc::umount2(target.as_ptr(), 0) }).map(drop)
}

/// Loads the kernel module in the open file with its parameters.
pub fn load_module(file: BorrowedFd<'_>, parameters: &str) -> io::Result<()> {
    let parameters = CString::new(parameters).map_err(io::Error::other)?;
    // SAFETY: the string ends with a zero byte and outlives the call.
    let result = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), parameters.as_ptr(), 0) };
    check(result as libc::c_int).map(drop)
}

/// Ends the machine by reboot(2); returns only if that fails.
pub fn reboot(how: libc::c_int) -> Error {
    // SAFETY: no pointers.
    unsafe { libc::reboot(how) };
    Error::last_os_error()
}

/// Writes back all file systems.
pub fn sync() {
    // SAFETY: no arguments.
    unsafe { libc::sync() }
}

/// Release and version of the running kernel.
pub fn uname() -> (String, String) {
    let text = |field: &[libc::c_char]| {
        let bytes: Vec<u8> = field.iter().take_while(|c| **c != 0).map(|c| *c as u8).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    };
    // SAFETY: utsname is plain data, and the kernel fills it.
    let names = unsafe {
        let mut names: libc::utsname = std::mem::zeroed();
        libc::uname(&mut names);
        names
    };
    (text(&names.release), text(&names.version))
}

/// Moves this process, and those that it starts, away from a processor.
///
/// # Errors
/// There is no other processor (`InvalidInput`), or the kernel does not allow it.
pub fn leave_processor(number: usize) -> io::Result<()> {
    let size = size_of::<libc::cpu_set_t>();
    // SAFETY: cpu_set_t is plain data for which all zeroes are a value, the pointers are to a local, and `number` is
    // checked by CPU_CLR.
    let result = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        if libc::sched_getaffinity(0, size, &mut set) < 0 {
            return Err(io::Error::last_os_error());
        }
        libc::CPU_CLR(number, &mut set);
        libc::sched_setaffinity(0, size, &set)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Allows as many open files as the system does.
pub fn raise_file_limit() {
    // SAFETY: rlimit is plain data and the pointers are to a local.
    unsafe {
        let mut limit: libc::rlimit = std::mem::zeroed();
        if libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) == 0 {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &limit);
        }
    }
}

/// Connects to a Unix stream socket, without waiting for a listener whose queue is full.
pub fn connect(path: &[u8]) -> io::Result<UnixStream> {
    // SAFETY: no pointers; a new descriptor is owned at once.
    let socket = unsafe {
        let kind = libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
        OwnedFd::from_raw_fd(check(libc::socket(libc::AF_UNIX, kind, 0))?)
    };
    // SAFETY: sockaddr_un is plain data.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    if path.len() >= address.sun_path.len() {
        return Err(Error::from_raw_os_error(libc::ENAMETOOLONG));
    }
    for (to, from) in address.sun_path.iter_mut().zip(path) {
        *to = *from as libc::c_char;
    }
    let size = size_of_val(&address) as libc::socklen_t;
    // SAFETY: the address is valid for its size.
    check(unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), size) })?;
    Ok(UnixStream::from(socket))
}

/// A new pseudo-terminal: the side of the terminal's user, and the side of the programs on it.
pub fn open_terminal(size: WindowSize) -> io::Result<(OwnedFd, OwnedFd)> {
    // SAFETY: no pointers but to locals; new descriptors are owned at once.
    unsafe {
        let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
        let master = OwnedFd::from_raw_fd(check(libc::posix_openpt(flags))?);
        let unlock: libc::c_int = 0;
        check(libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &unlock))?;
        let slave = OwnedFd::from_raw_fd(check(libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags))?);
        resize_terminal(std::os::fd::AsFd::as_fd(&master), size)?;
        Ok((master, slave))
    }
}

/// Gives a terminal its size; the programs on it hear of it.
pub fn resize_terminal(master: BorrowedFd<'_>, size: WindowSize) -> io::Result<()> {
    let size = libc::winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the pointer is to a local.
    check(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSWINSZ, &size) }).map(drop)
}

/// The process group in the foreground of a terminal, if there is one.
pub fn foreground_group(master: BorrowedFd<'_>) -> Option<u32> {
    let mut group: libc::pid_t = 0;
    // SAFETY: the pointer is to a local.
    check(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPGRP, &mut group) }).ok()?;
    u32::try_from(group).ok().filter(|group| *group > 0)
}

/// Makes the command's process take the signals that the agent blocks or that its starter ignores (a shell starts
/// what runs in the background with SIGINT ignored, and a command would inherit that), and lead a session of its
/// own, with its standard input as the controlling terminal if that is asked.
pub fn lead_session(command: &mut Command, on_terminal: bool) {
    let prepare = move || {
        // SAFETY: only calls that are safe between fork and exec, with pointers to locals.
        unsafe {
            let mut none: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&mut none);
            check(libc::sigprocmask(libc::SIG_SETMASK, &none, std::ptr::null_mut()))?;
            for signal in [libc::SIGINT, libc::SIGQUIT, libc::SIGHUP] {
                libc::signal(signal, libc::SIG_DFL);
            }
            check(libc::setsid())?;
            if on_terminal {
                check(libc::ioctl(0, libc::TIOCSCTTY, 0))?;
            }
        }
        Ok(())
    };
    // SAFETY: the closure makes async-signal-safe calls only and allocates nothing.
    unsafe { command.pre_exec(prepare) };
}

/// FIEMAP's request and one extent (include/uapi/linux/fiemap.h, `struct fiemap` and `struct fiemap_extent`).
#[repr(C)]
#[derive(Default)]
struct Fiemap {
    start: u64,
    length: u64,
    flags: u32,
    mapped_extents: u32,
    extent_count: u32,
    reserved: u32,
    logical: u64,
    physical: u64,
    extent_length: u64,
    extent_reserved64: [u64; 2],
    extent_flags: u32,
    extent_reserved: [u32; 3],
}

/// `_IOWR('f', 11, struct fiemap)`.
const FS_IOC_FIEMAP: u64 = 0xC020_660B;
/// The data have no place on the device that could be named: FIEMAP_EXTENT_UNKNOWN, DELALLOC, ENCODED, DATA_INLINE,
/// UNWRITTEN.
const NO_PLACE: u32 = 0x2 | 0x4 | 0x8 | 0x200 | 0x800;

/// Where byte `offset` of a file is on the block device of its file system.
pub fn locate(file: &File, offset: u64) -> io::Result<u64> {
    let mut map = Fiemap { start: offset, length: 1, extent_count: 1, ..Fiemap::default() };
    // SAFETY: the request has room for the one extent that it allows.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_FIEMAP as _, &mut map) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    let within = offset.checked_sub(map.logical).filter(|within| *within < map.extent_length);
    match within {
        Some(within) if map.mapped_extents == 1 && map.extent_flags & NO_PLACE == 0 => {
            Ok(map.physical + within)
        }
        _ => Err(io::Error::from_raw_os_error(libc::ENODATA)),
    }
}

/// Asks the kernel to tell this process of poison in its memory at once (PR_MCE_KILL_EARLY), or to do as for others.
pub fn set_early_kill(on: bool) -> io::Result<()> {
    let how = if on { libc::PR_MCE_KILL_EARLY } else { libc::PR_MCE_KILL_DEFAULT };
    // SAFETY: no pointers.
    check(unsafe { libc::prctl(libc::PR_MCE_KILL, libc::PR_MCE_KILL_SET, how, 0, 0) }).map(drop)
}

/// Whether the processor has MOVDIR64B: CPUID.7.0:ECX[28] (SDM volume 2, CPUID).
pub fn has_movdir64b() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    __cpuid(0).eax >= 7 && __cpuid_count(7, 0).ecx & 1 << 28 != 0
}
