//! Memory errors of the host under guest memory, taken as signals.
//!
//! A page of the host that is really bad, or that lies beyond the end of a file which somebody has made shorter,
//! answers an access with SIGBUS (kernel: `kill_proc` in mm/memory-failure.c, `kvm_send_hwpoison_signal`). Without a
//! handler that is the end of the monitor. The handler here notes what happened, and where the access was the
//! monitor's own puts a zero page in place of the bad one, so that the access ends; whoever made it asks
//! [`generation`] whether what it got is worth anything. The machine turns the notes into poison of the guest.
//!
//! A handler may interrupt anything, so it touches nothing but atomics and makes nothing but system calls.

use std::io;
use std::ops::Range;
use std::os::fd::RawFd;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, Ordering};

/// Maps that can be watched: two for each region.
const MOST_MAPS: usize = 256;
/// Errors that can wait to be served.
const MOST_NOTES: usize = 256;
/// si_code of SIGBUS (asm-generic/siginfo.h): beyond the end of a file, poison consumed, poison found.
const BUS_ADRERR: i32 = 2;
const BUS_MCEERR_AR: i32 = 4;
const BUS_MCEERR_AO: i32 = 5;
/// The smallest unit in which memory goes bad.
const PAGE_BITS: u32 = 12;

/// What the host says of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostCause {
    /// Bad memory was accessed.
    Consumed,
    /// Memory was found bad, and nobody has accessed it yet.
    Found,
    /// The page lies beyond the end of its file.
    BeyondEnd,
}

/// An error of the host's memory under a watched map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostFault {
    /// Host address of the first bad byte.
    pub address: u64,
    /// Bad bytes: a page, or a large one.
    pub len: u64,
    /// What is wrong.
    pub cause: HostCause,
}

struct Slot {
    used: AtomicBool,
    start: AtomicU64,
    end: AtomicU64,
    /// Accessed by the monitor itself, so a bad page must be replaced for the access to end.
    own: AtomicBool,
}

struct Note {
    /// [`FREE`], [`BUSY`] or [`READY`].
    state: AtomicU32,
    address: AtomicU64,
    code: AtomicI32,
    bits: AtomicU32,
}

const FREE: u32 = 0;
const BUSY: u32 = 1;
const READY: u32 = 2;

static MAPS: [Slot; MOST_MAPS] = [const {
    Slot {
        used: AtomicBool::new(false),
        start: AtomicU64::new(0),
        end: AtomicU64::new(0),
        own: AtomicBool::new(false),
    }
}; MOST_MAPS];
static NOTES: [Note; MOST_NOTES] = [const {
    Note {
        state: AtomicU32::new(FREE),
        address: AtomicU64::new(0),
        code: AtomicI32::new(0),
        bits: AtomicU32::new(0),
    }
}; MOST_NOTES];
static PENDING: AtomicBool = AtomicBool::new(false);
/// Notes that are not free.
static WAITING: AtomicU32 = AtomicU32::new(0);
static LOST: AtomicU64 = AtomicU64::new(0);
static GENERATION: AtomicU64 = AtomicU64::new(0);
/// Written after each note; -1 for none.
static WAKE: AtomicI32 = AtomicI32::new(-1);

/// A map whose errors are noted, until this is dropped.
#[derive(Debug)]
pub(super) struct Watch {
    slot: Option<usize>,
}

impl Watch {
    /// Watches the host addresses `range`. `own` says that the monitor itself reads and writes there.
    pub fn new(range: Range<u64>, own: bool) -> Self {
        install();
        let slot = MAPS.iter().position(|slot| {
            slot.used.compare_exchange(false, true, Ordering::AcqRel, Ordering::Relaxed).is_ok()
        });
        match slot.map(|index| &MAPS[index]) {
            Some(slot) => {
                slot.own.store(own, Ordering::Relaxed);
                slot.end.store(range.end, Ordering::Relaxed);
                slot.start.store(range.start, Ordering::Release);
            }
            None => {
                tracing::warn!("too many maps: an error of the host's memory in one of them ends the program")
            }
        }
        Self { slot }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if let Some(slot) = self.slot.map(|index| &MAPS[index]) {
            slot.start.store(u64::MAX, Ordering::Relaxed);
            slot.end.store(0, Ordering::Relaxed);
            slot.used.store(false, Ordering::Release);
        }
    }
}

/// Has `wake` (an eventfd) written after each error, and errors that nobody has met yet told to the calling thread.
/// That ends with what is returned.
pub fn tell(wake: RawFd) -> Told {
    WAKE.store(wake, Ordering::Relaxed);
    // SAFETY: takes numbers only (prctl(2), PR_MCE_KILL); a refusal means that such errors are told late.
    unsafe { libc::prctl(libc::PR_MCE_KILL, libc::PR_MCE_KILL_SET, libc::PR_MCE_KILL_EARLY, 0, 0) };
    Told(())
}

/// See [`tell`].
#[derive(Debug)]
pub struct Told(());

impl Drop for Told {
    fn drop(&mut self) {
        WAKE.store(-1, Ordering::Relaxed);
    }
}

/// Whether [`take`] would find something.
pub fn pending() -> bool {
    PENDING.load(Ordering::Acquire)
}

/// A number that is another one after every error that the monitor itself met: what was read or written meanwhile may
/// have gone to a page of zeros.
pub fn generation() -> u64 {
    GENERATION.load(Ordering::Acquire)
}

/// Whether an error within `range` of host addresses has not been served yet.
pub fn noted(range: &Range<u64>) -> bool {
    WAITING.load(Ordering::Acquire) > 0
        && NOTES
            .iter()
            .filter_map(Note::fault)
            .any(|fault| fault.address < range.end && range.start < fault.address + fault.len)
}

/// An error that is being served: it stays [`noted`] until this is dropped.
#[derive(Debug)]
pub struct Noted {
    /// The error.
    pub fault: HostFault,
    index: usize,
}

impl Drop for Noted {
    fn drop(&mut self) {
        NOTES[self.index].state.store(FREE, Ordering::Release);
        WAITING.fetch_sub(1, Ordering::AcqRel);
    }
}

/// The errors to be served, and the number of those that were not noted for want of space. One thread at a time asks.
pub fn take() -> (Vec<Noted>, u64) {
    PENDING.store(false, Ordering::Release);
    let noted = NOTES
        .iter()
        .enumerate()
        .filter_map(|(index, note)| note.fault().map(|fault| Noted { fault, index }))
        .collect();
    (noted, LOST.swap(0, Ordering::Relaxed))
}

impl Note {
    /// What is noted here.
    fn fault(&self) -> Option<HostFault> {
        if self.state.load(Ordering::Acquire) != READY {
            return None;
        }
        let len = 1u64 << self.bits.load(Ordering::Relaxed).clamp(PAGE_BITS, 30);
        Some(HostFault {
            address: self.address.load(Ordering::Relaxed) & !(len - 1),
            len,
            cause: match self.code.load(Ordering::Relaxed) {
                BUS_MCEERR_AR => HostCause::Consumed,
                BUS_MCEERR_AO => HostCause::Found,
                _ => HostCause::BeyondEnd,
            },
        })
    }
}

/// The part of `siginfo_t` that SIGBUS fills (asm-generic/siginfo.h, `_sigfault`).
#[repr(C)]
struct SigBus {
    _signal: i32,
    _error: i32,
    code: i32,
    _pad: i32,
    address: u64,
    bits: i16,
}

fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: an all-zero `sigaction` is valid, and its fields are set before use.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = on_sigbus as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
        // SAFETY: the handler is async-signal-safe, as its documentation says.
        if unsafe { libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut()) } != 0 {
            tracing::warn!(error = %io::Error::last_os_error(), "errors of the host's memory end the program");
        }
    });
}

/// Notes the error, and puts a zero page under an access of the monitor's own.
extern "C" fn on_sigbus(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the thread's own variable, which the system calls below may change.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above.
    let saved = unsafe { *errno };
    // SAFETY: the kernel passes a valid siginfo_t, which for SIGBUS begins like `SigBus` and is longer.
    let (code, address, bits) = unsafe {
        let info = info.cast::<SigBus>();
        ((*info).code, (*info).address, (*info).bits)
    };
    let bits = if matches!(code, BUS_MCEERR_AR | BUS_MCEERR_AO) { u32::from(bits.unsigned_abs()) } else { 0 };
    let slot = MAPS.iter().find(|slot| {
        let start = slot.start.load(Ordering::Acquire);
        start <= address && address < slot.end.load(Ordering::Relaxed)
    });
    let known = matches!(code, BUS_ADRERR | BUS_MCEERR_AR | BUS_MCEERR_AO);
    let served = match slot {
        Some(slot) if known => {
            let own = slot.own.load(Ordering::Relaxed);
            note(address, code, bits);
            if own && code != BUS_MCEERR_AO { replace(address, bits) } else { true }
        }
        _ => false,
    };
    if !served {
        // Not ours: the access is repeated without a handler.
        // SAFETY: takes constants.
        unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
    }
    // SAFETY: as above.
    unsafe { *errno = saved };
}

fn note(address: u64, code: i32, bits: u32) {
    let free = NOTES
        .iter()
        .find(|note| note.state.compare_exchange(FREE, BUSY, Ordering::AcqRel, Ordering::Relaxed).is_ok());
    match free {
        Some(note) => {
            note.address.store(address, Ordering::Relaxed);
            note.code.store(code, Ordering::Relaxed);
            note.bits.store(bits, Ordering::Relaxed);
            WAITING.fetch_add(1, Ordering::AcqRel);
            note.state.store(READY, Ordering::Release);
        }
        None => {
            LOST.fetch_add(1, Ordering::Relaxed);
        }
    }
    PENDING.store(true, Ordering::Release);
    let wake = WAKE.load(Ordering::Relaxed);
    if wake >= 0 {
        let one = 1u64;
        // SAFETY: writes eight bytes of a local; a descriptor that was closed meanwhile makes it fail.
        unsafe { libc::write(wake, (&raw const one).cast(), 8) };
    }
}

/// Puts zeros in the place of a bad page of a map of the monitor's own.
fn replace(address: u64, bits: u32) -> bool {
    GENERATION.fetch_add(1, Ordering::AcqRel);
    let len = 1u64 << bits.clamp(PAGE_BITS, 30);
    // SAFETY: the page lies in a watched map, which belongs to a live region, and whose bytes nobody holds references
    // to: they are only accessed as volatile memory.
    let page = unsafe {
        libc::mmap(
            (address & !(len - 1)) as *mut libc::c_void,
            len as usize,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    page != libc::MAP_FAILED
}
