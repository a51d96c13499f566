//! Loads and stores that outlive the signals they raise.
//!
//! The accesses are instructions of their own with names, so that what the monitor reports of them can be compared
//! with where they really are, and so that the handler knows how to go on behind them.

use std::arch::global_asm;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering};

use aconite_agent::workload::Signal;

global_asm!(
    // rdi: the address; rsi: the word. Each returns 0 in eax, or 1 after a signal.
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
    "aconite_access_failed:",
    "mov eax, 1",
    "ret",
);

unsafe extern "C" {
    fn aconite_load(address: *const u64, word: *mut u64) -> i32;
    fn aconite_store(address: *mut u64, word: *const u64) -> i32;
    static aconite_load_access: u8;
    static aconite_store_access: u8;
    static aconite_access_failed: u8;
}

/// `si_addr_lsb` of `siginfo_t` on x86-64 (include/uapi/asm-generic/siginfo.h, `_sigfault`), which has no name in libc.
const ADDRESS_LSB_OFFSET: usize = 24;
/// The instruction pointer in `gregs` of `ucontext_t`.
const RIP: usize = libc::REG_RIP as usize;

static NUMBER: AtomicI32 = AtomicI32::new(0);
static CODE: AtomicI32 = AtomicI32::new(0);
static ADDRESS: AtomicU64 = AtomicU64::new(0);
static LSB: AtomicU32 = AtomicU32::new(0);

extern "C" fn note_signal(number: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let accesses = [&raw const aconite_load_access as u64, &raw const aconite_store_access as u64];
    // SAFETY: with SA_SIGINFO the kernel passes a siginfo_t and a ucontext_t that live as long as the handler runs;
    // the default action is set for an instruction that is none of ours, which then ends the process.
    unsafe {
        let rip = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs[RIP];
        if !accesses.contains(&(*rip as u64)) {
            libc::signal(number, libc::SIG_DFL);
            return;
        }
        *rip = &raw const aconite_access_failed as i64;
        let lsb = info.cast::<u8>().add(ADDRESS_LSB_OFFSET).cast::<i16>().read_unaligned();
        let code = (*info).si_code;
        // Other codes leave the field as it is.
        let is_mce = number == libc::SIGBUS && matches!(code, libc::BUS_MCEERR_AR | libc::BUS_MCEERR_AO);
        NUMBER.store(number, Ordering::Relaxed);
        CODE.store(code, Ordering::Relaxed);
        ADDRESS.store((*info).si_addr() as u64, Ordering::Relaxed);
        LSB.store(if is_mce { lsb as u16 as u32 } else { 0 }, Ordering::Relaxed);
    }
}

fn noted(rip: *const u8) -> Signal {
    Signal {
        number: NUMBER.load(Ordering::Relaxed),
        code: CODE.load(Ordering::Relaxed),
        address: ADDRESS.load(Ordering::Relaxed),
        lsb: LSB.load(Ordering::Relaxed),
        rip: rip as u64,
    }
}

/// Installs the handler for SIGBUS and SIGSEGV of the accesses of [`Mapping`].
pub fn catch_signals() -> io::Result<()> {
    for number in [libc::SIGBUS, libc::SIGSEGV] {
        // SAFETY: sigaction is plain data and valid when zeroed; the handler has the type that SA_SIGINFO asks for,
        // and touches nothing but its arguments and atomics.
        let result = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = note_signal as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO;
            libc::sigaction(number, &action, ptr::null_mut())
        };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// A file mapped shared, to be read and written. It stays mapped until [`Mapping::undo`] or the process's end.
pub struct Mapping {
    address: *mut u8,
    length: u64,
}

impl Mapping {
    /// Maps all of a file.
    pub fn new(file: &File) -> io::Result<Self> {
        let length = file.metadata()?.len();
        let size = usize::try_from(length).map_err(io::Error::other)?;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let address =
            unsafe { libc::mmap(ptr::null_mut(), size, access, libc::MAP_SHARED, file.as_raw_fd(), 0) };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Mapping { address: address.cast(), length })
    }

    /// Unmaps the file.
    pub fn undo(self) -> io::Result<()> {
        // SAFETY: the area is that of `new`, nobody else knows of it, and it is not used after this.
        let result = unsafe { libc::munmap(self.address.cast(), self.length as usize) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Its address.
    pub fn address(&self) -> u64 {
        self.address as u64
    }

    /// Loads the word at `offset`; returns it and the address of the instruction. `None` when there is no such word.
    pub fn load(&self, offset: u64) -> Option<Result<(u64, u64), Signal>> {
        let address = self.word(offset)?;
        let mut word = 0;
        let rip = &raw const aconite_load_access;
        // SAFETY: the word is within the mapping, which is there as long as `self`; a signal that the access raises is caught.
        let failed = unsafe { aconite_load(address, &mut word) } != 0;
        Some(if failed { Err(noted(rip)) } else { Ok((word, rip as u64)) })
    }

    /// Stores `word` at `offset`. `None` when there is no such word.
    pub fn store(&self, offset: u64, word: u64) -> Option<Result<(), Signal>> {
        let address = self.word(offset)?;
        // SAFETY: as for loads; nothing else in this process holds a reference into the mapping.
        let failed = unsafe { aconite_store(address, &word) } != 0;
        Some(if failed { Err(noted(&raw const aconite_store_access)) } else { Ok(()) })
    }

    fn word(&self, offset: u64) -> Option<*mut u64> {
        let end = offset.checked_add(8)?;
        (offset.is_multiple_of(8) && end <= self.length)
            .then(|| self.address.wrapping_add(offset as usize).cast())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn accesses_outlive_their_signals() {
        catch_signals().unwrap();
        let path = std::env::temp_dir().join(format!("aconite-probe-{}", std::process::id()));
        let mut file =
            File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        file.write_all(&7u64.to_le_bytes()).unwrap();
        file.set_len(8192).unwrap();
        let mapping = Mapping::new(&file).unwrap();
        let (word, rip) = mapping.load(0).unwrap().unwrap();
        assert_eq!(word, 7);
        mapping.store(8, 9).unwrap().unwrap();
        assert_eq!(mapping.load(8).unwrap().unwrap().0, 9);
        // Behind the end of the file there is no page.
        file.set_len(0).unwrap();
        let signal = mapping.load(4096).unwrap().unwrap_err();
        assert_eq!(
            signal,
            Signal {
                number: libc::SIGBUS,
                code: libc::BUS_ADRERR,
                address: mapping.address() + 4096,
                lsb: 0,
                rip
            }
        );
        let signal = mapping.store(4104, 1).unwrap().unwrap_err();
        assert_eq!((signal.number, signal.address), (libc::SIGBUS, mapping.address() + 4104));
        assert_ne!(signal.rip, rip);
        assert!(
            mapping.load(8192).is_none() && mapping.load(4).is_none() && mapping.load(u64::MAX).is_none()
        );
    }
}
