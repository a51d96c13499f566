//! Memory that the kernel pins for a long time: the registered buffer of a ring of io_uring(7).
//!
//! The pin (`FOLL_LONGTERM`) has no page table entry: it outlives the mapping, and goes with the ring.

use std::fs::OpenOptions;
use std::io::{self, Error};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};

/// Requests that a ring has room for.
const ENTRIES: u32 = 1;
/// IORING_REGISTER_BUFFERS (include/uapi/linux/io_uring.h, as all that follows).
const REGISTER_BUFFERS: u32 = 0;
/// IORING_OP_READ_FIXED.
const READ_FIXED: u8 = 4;
/// IORING_ENTER_GETEVENTS.
const GET_EVENTS: u32 = 1;
/// IORING_FEAT_SINGLE_MMAP: both rings are one area (since Linux 5.4).
const SINGLE_MMAP: u32 = 1;
/// IORING_OFF_SQES.
const ENTRIES_OFFSET: libc::off_t = 0x1000_0000;
/// Bytes of `struct io_uring_cqe`.
const COMPLETION: usize = 16;

/// `struct io_sqring_offsets`.
#[repr(C)]
#[derive(Default)]
struct Submissions {
    head: u32,
    tail: u32,
    ring_mask: u32,
    ring_entries: u32,
    flags: u32,
    dropped: u32,
    array: u32,
    reserved: u32,
    user_address: u64,
}

/// `struct io_cqring_offsets`.
#[repr(C)]
#[derive(Default)]
struct Completions {
    head: u32,
    tail: u32,
    ring_mask: u32,
    ring_entries: u32,
    overflow: u32,
    entries: u32,
    flags: u32,
    reserved: u32,
    user_address: u64,
}

/// `struct io_uring_params`.
#[repr(C)]
#[derive(Default)]
struct Parameters {
    submissions: u32,
    completions: u32,
    flags: u32,
    thread_cpu: u32,
    thread_idle: u32,
    features: u32,
    queue: u32,
    reserved: [u32; 3],
    submission: Submissions,
    completion: Completions,
}

/// `struct io_uring_sqe`, as far as it is used.
#[repr(C)]
#[derive(Default)]
struct Entry {
    operation: u8,
    flags: u8,
    priority: u16,
    file: i32,
    offset: u64,
    address: u64,
    length: u32,
    operation_flags: u32,
    user_data: u64,
    buffer: u16,
    personality: u16,
    more: u32,
    reserved: [u64; 2],
}

/// Memory shared with the kernel, unmapped when it goes.
struct Area {
    address: *mut u8,
    length: usize,
}

impl Area {
    fn new(ring: &OwnedFd, offset: libc::off_t, length: usize) -> io::Result<Self> {
        let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_POPULATE);
        // SAFETY: a new mapping at an address of the kernel's choice.
        let address = unsafe { libc::mmap(ptr::null_mut(), length, access, flags, ring.as_raw_fd(), offset) };
        if address == libc::MAP_FAILED {
            return Err(Error::last_os_error());
        }
        Ok(Self { address: address.cast(), length })
    }

    /// The number at a byte offset that the kernel gave.
    fn number(&self, offset: u32) -> &AtomicU32 {
        let offset = offset as usize;
        assert!(offset.is_multiple_of(4) && offset + 4 <= self.length, "the kernel's own layout");
        // SAFETY: aligned, within the area, which lives as long as `self`; all accesses are atomic.
        unsafe { AtomicU32::from_ptr(self.address.add(offset).cast()) }
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        // SAFETY: the area is that of `new`, and no reference into it outlives `self`.
        unsafe { libc::munmap(self.address.cast(), self.length) };
    }
}

/// A ring with one registered buffer.
pub struct Ring {
    ring: OwnedFd,
    rings: Area,
    entries: Area,
    parameters: Parameters,
    buffer: (u64, u32),
}

impl Ring {
    /// Pins memory of this process.
    pub fn new(address: *mut u8, length: u64) -> io::Result<Self> {
        let size = u32::try_from(length).map_err(io::Error::other)?;
        let mut parameters = Parameters::default();
        // SAFETY: the structure is the kernel's, and as large as it writes.
        let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, ENTRIES, &mut parameters) };
        let fd = checked(fd)? as i32;
        // SAFETY: a new descriptor of our own.
        let ring = unsafe { OwnedFd::from_raw_fd(fd) };
        if parameters.features & SINGLE_MMAP == 0 {
            return Err(io::Error::other("the kernel's rings are two areas"));
        }
        let submissions =
            parameters.submission.array as usize + parameters.submissions as usize * size_of::<u32>();
        let completions =
            parameters.completion.entries as usize + parameters.completions as usize * COMPLETION;
        let rings = Area::new(&ring, 0, submissions.max(completions))?;
        let entries = Area::new(&ring, ENTRIES_OFFSET, parameters.submissions as usize * size_of::<Entry>())?;
        let part = libc::iovec { iov_base: address.cast(), iov_len: size as usize };
        // SAFETY: one part, which is a local; the kernel pins what is there.
        checked(unsafe {
            libc::syscall(libc::SYS_io_uring_register, ring.as_raw_fd(), REGISTER_BUFFERS, &raw const part, 1)
        })?;
        Ok(Self { ring, rings, entries, parameters, buffer: (address as u64, size) })
    }

    /// Lets a device store to the buffer what a file or disk has at `at`. Returns what a system call would.
    pub fn read(&self, path: &Path, at: u64) -> io::Result<i32> {
        let file = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path)?;
        let entry = Entry {
            operation: READ_FIXED,
            file: file.as_raw_fd(),
            offset: at,
            address: self.buffer.0,
            length: self.buffer.1,
            ..Entry::default()
        };
        let (submission, completion) = (&self.parameters.submission, &self.parameters.completion);
        // SAFETY: the area has room for an entry, and the kernel reads it only after the tail has moved.
        unsafe { self.entries.address.cast::<Entry>().write(entry) };
        self.rings.number(submission.array).store(0, Ordering::Relaxed);
        self.rings.number(submission.tail).fetch_add(1, Ordering::Release);
        let no_signals: *const libc::c_void = ptr::null();
        // SAFETY: what is stored to is pinned memory that nothing in this process holds a reference into.
        checked(unsafe {
            libc::syscall(libc::SYS_io_uring_enter, self.ring.as_raw_fd(), 1, 1, GET_EVENTS, no_signals, 0)
        })?;
        let head = self.rings.number(completion.head);
        let at = head.load(Ordering::Relaxed);
        if self.rings.number(completion.tail).load(Ordering::Acquire) == at {
            return Err(io::Error::other("the ring has no completion"));
        }
        let slot = at & self.rings.number(completion.ring_mask).load(Ordering::Relaxed);
        // `res` comes after `user_data`.
        let result =
            self.rings.number(completion.entries + slot * COMPLETION as u32 + 8).load(Ordering::Relaxed);
        head.store(at.wrapping_add(1), Ordering::Release);
        Ok(result as i32)
    }
}

fn checked(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(Error::last_os_error()) } else { Ok(result) }
}
