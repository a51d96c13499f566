//! Accesses that outlive the signals they raise.
//!
//! The accesses are instructions of their own with names, so that what the monitor reports of them can be compared
//! with where they really are, and so that the handler knows how to go on behind them.

use std::arch::global_asm;
use std::io;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, Ordering};

use aconite_agent::workload::Signal;

global_asm!(
    // rdi: the address; rsi: the word, or other memory; rdx: a length. Each returns 0 in eax, or 1 after a signal.
    "aconite_load:",
    "aconite_load_access:",
    "mov rax, qword ptr [rdi]",
    "mov qword ptr [rsi], rax",
    "xor eax, eax",
    "ret",
    "aconite_store:",
    "mov rax, qword ptr [rsi]",
    "aconite_store_access:",
    "mov qword ptr [rdi], rax",
    "xor eax, eax",
    "ret",
    "aconite_add:",
    "mov rax, qword ptr [rsi]",
    "aconite_add_access:",
    "lock xadd qword ptr [rdi], rax",
    "mov qword ptr [rsi], rax",
    "xor eax, eax",
    "ret",
    "aconite_copy:",
    "mov rcx, rdx",
    "xchg rsi, rdi",
    "aconite_copy_access:",
    "rep movsb",
    "xor eax, eax",
    "ret",
    "aconite_line:",
    // MOVDIR64B to [rdi] from [rsi], which assemblers know only for processors that have it.
    "aconite_line_access:",
    ".byte 0x66, 0x0f, 0x38, 0xf8, 0x3e",
    "xor eax, eax",
    "ret",
    "aconite_execute:",
    "xor eax, eax",
    "jmp rdi",
    "aconite_access_failed:",
    "mov eax, 1",
    "ret",
    // rdi: the number of a system call and five arguments; the result is in rax.
    "aconite_call:",
    "mov rax, qword ptr [rdi]",
    "mov rsi, qword ptr [rdi + 16]",
    "mov rdx, qword ptr [rdi + 24]",
    "mov r10, qword ptr [rdi + 32]",
    "mov r8, qword ptr [rdi + 40]",
    "mov rdi, qword ptr [rdi + 8]",
    "syscall",
    "aconite_call_done:",
    "ret",
);

unsafe extern "C" {
    fn aconite_load(address: *mut u8, word: *mut u8, length: usize) -> i32;
    fn aconite_store(address: *mut u8, word: *mut u8, length: usize) -> i32;
    fn aconite_add(address: *mut u8, word: *mut u8, length: usize) -> i32;
    fn aconite_copy(address: *mut u8, to: *mut u8, length: usize) -> i32;
    fn aconite_line(address: *mut u8, from: *mut u8, length: usize) -> i32;
    fn aconite_execute(address: *mut u8, unused: *mut u8, length: usize) -> i32;
    fn aconite_call(words: *const [u64; 6]) -> i64;
    static aconite_load_access: u8;
    static aconite_store_access: u8;
    static aconite_add_access: u8;
    static aconite_copy_access: u8;
    static aconite_line_access: u8;
    static aconite_access_failed: u8;
    static aconite_call_done: u8;
}

/// What is done to memory by one instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Eight bytes are loaded.
    Load,
    /// Eight bytes are stored.
    Store,
    /// Eight bytes are added to, atomically.
    Add,
    /// Any number of bytes is loaded by a repeated instruction.
    Copy,
    /// 64 bytes are stored at once.
    Line,
    /// An instruction is fetched.
    Execute,
}

/// `si_addr_lsb` of `siginfo_t` on x86-64 (include/uapi/asm-generic/siginfo.h, `_sigfault`), which has no name in libc.
const ADDRESS_LSB_OFFSET: usize = 24;
/// The instruction pointer in `gregs` of `ucontext_t`.
const RIP: usize = libc::REG_RIP as usize;

/// A signal, kept so that a handler may write it.
struct Noted {
    is_new: AtomicBool,
    number: AtomicI32,
    code: AtomicI32,
    address: AtomicU64,
    lsb: AtomicU32,
    rip: AtomicU64,
}

impl Noted {
    const fn new() -> Self {
        Self {
            is_new: AtomicBool::new(false),
            number: AtomicI32::new(0),
            code: AtomicI32::new(0),
            address: AtomicU64::new(0),
            lsb: AtomicU32::new(0),
            rip: AtomicU64::new(0),
        }
    }

    fn set(&self, signal: Signal) {
        self.number.store(signal.number, Ordering::Relaxed);
        self.code.store(signal.code, Ordering::Relaxed);
        self.address.store(signal.address, Ordering::Relaxed);
        self.lsb.store(signal.lsb, Ordering::Relaxed);
        self.rip.store(signal.rip, Ordering::Relaxed);
        self.is_new.store(true, Ordering::Release);
    }

    fn take(&self) -> Option<Signal> {
        self.is_new.swap(false, Ordering::Acquire).then(|| Signal {
            number: self.number.load(Ordering::Relaxed),
            code: self.code.load(Ordering::Relaxed),
            address: self.address.load(Ordering::Relaxed),
            lsb: self.lsb.load(Ordering::Relaxed),
            rip: self.rip.load(Ordering::Relaxed),
        })
    }
}

/// The signal of an access or a system call.
static ACCESS: Noted = Noted::new();
/// The signal that came by itself.
static NOTICE: Noted = Noted::new();
/// What is called outside this program, while it is.
static EXECUTED: AtomicU64 = AtomicU64::new(0);

/// For tests that raise signals, which are noted for the whole process.
#[cfg(test)]
pub static TURNS: std::sync::Mutex<()> = std::sync::Mutex::new(());

extern "C" fn note_signal(number: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let accesses = [
        &raw const aconite_load_access as u64,
        &raw const aconite_store_access as u64,
        &raw const aconite_add_access as u64,
        &raw const aconite_copy_access as u64,
        &raw const aconite_line_access as u64,
        EXECUTED.load(Ordering::Relaxed),
    ];
    // SAFETY: with SA_SIGINFO the kernel passes a siginfo_t and a ucontext_t that live as long as the handler runs;
    // the default action is set for an instruction that is none of ours, which then ends the process.
    unsafe {
        let rip = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs[RIP];
        let code = (*info).si_code;
        // Other codes leave the field as it is.
        let is_mce = number == libc::SIGBUS && matches!(code, libc::BUS_MCEERR_AR | libc::BUS_MCEERR_AO);
        let lsb = info.cast::<u8>().add(ADDRESS_LSB_OFFSET).cast::<i16>().read_unaligned();
        let signal = Signal {
            number,
            code,
            address: (*info).si_addr() as u64,
            lsb: if is_mce { lsb as u16 as u32 } else { 0 },
            rip: *rip as u64,
        };
        if number == libc::SIGBUS && code == libc::BUS_MCEERR_AO {
            NOTICE.set(signal);
        } else if accesses.contains(&signal.rip) {
            *rip = &raw const aconite_access_failed as i64;
            ACCESS.set(signal);
        } else if signal.rip == &raw const aconite_call_done as u64 {
            ACCESS.set(signal);
        } else {
            libc::signal(number, libc::SIG_DFL);
        }
    }
}

/// Installs the handler for SIGBUS and SIGSEGV of the accesses of this module.
pub fn catch_signals() -> io::Result<()> {
    for number in [libc::SIGBUS, libc::SIGSEGV] {
        // SAFETY: sigaction is plain data and valid when zeroed; the handler has the type that SA_SIGINFO asks for,
        // and touches nothing but its arguments and atomics.
        let result = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = note_signal as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART;
            libc::sigaction(number, &action, ptr::null_mut())
        };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// The signal that came outside any access since this was last asked.
pub fn notice() -> Option<Signal> {
    NOTICE.take()
}

/// Touches `address`, with `other` as the word or memory that the access moves from or to. Returns the address of
/// the instruction.
///
/// # Safety
/// `address` is valid for the access, but for what [`catch_signals`] catches; `other` is valid for `length` bytes. What
/// is executed is code that returns and changes nothing.
pub unsafe fn touch(access: Access, address: *mut u8, other: &mut [u8]) -> Result<u64, Signal> {
    type Function = unsafe extern "C" fn(*mut u8, *mut u8, usize) -> i32;
    let (function, rip): (Function, u64) = match access {
        Access::Load => (aconite_load, &raw const aconite_load_access as u64),
        Access::Store => (aconite_store, &raw const aconite_store_access as u64),
        Access::Add => (aconite_add, &raw const aconite_add_access as u64),
        Access::Copy => (aconite_copy, &raw const aconite_copy_access as u64),
        Access::Line => (aconite_line, &raw const aconite_line_access as u64),
        Access::Execute => (aconite_execute, address as u64),
    };
    if access == Access::Execute {
        EXECUTED.store(rip, Ordering::Relaxed);
    }
    // SAFETY: the caller's.
    let failed = unsafe { function(address, other.as_mut_ptr(), other.len()) } != 0;
    EXECUTED.store(0, Ordering::Relaxed);
    match ACCESS.take() {
        Some(signal) if failed => Err(signal),
        _ => Ok(rip),
    }
}

/// Makes a system call, its number first; returns what it returned, and the signal that it raised.
///
/// # Safety
/// The call keeps the promises that safe code relies on.
pub unsafe fn call(words: [u64; 6]) -> (i64, Option<Signal>) {
    // SAFETY: the caller's.
    let result = unsafe { aconite_call(&words) };
    (result, ACCESS.take())
}
