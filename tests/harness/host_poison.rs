//! Makes a page of a running machine's memory device really bad, as the host's memory controller would:
//! `host-poison SIZE OFFSET`, as root of the host that the machine runs on. SIZE, in bytes, says which device is meant.
//!
//! The kernel sends SIGBUS to whoever asks for this (`madvise_inject_error` in mm/madvise.c), so that is how the program
//! ends when all went well.

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::process::ExitCode;

/// The memory of a device that has no file of its own.
const NAME: &str = "/memfd:aconite-pmem (deleted)";
const PAGE: usize = 4096;

fn find(size: u64) -> Option<File> {
    let processes = fs::read_dir("/proc").ok()?.flatten();
    let descriptors = processes.filter_map(|process| fs::read_dir(process.path().join("fd")).ok());
    descriptors.flat_map(|list| list.flatten()).find_map(|descriptor| {
        let path = descriptor.path();
        let link = fs::read_link(&path).ok()?;
        let wanted = link.to_str() == Some(NAME) && fs::metadata(&path).ok()?.len() == size;
        wanted.then(|| OpenOptions::new().read(true).write(true).open(&path).ok()).flatten()
    })
}

fn main() -> ExitCode {
    let numbers: Vec<u64> = std::env::args().skip(1).filter_map(|text| text.parse().ok()).collect();
    let &[size, offset] = &numbers[..] else {
        eprintln!("usage: host-poison SIZE OFFSET, in bytes");
        return ExitCode::from(2);
    };
    let Some(file) = find(size) else {
        eprintln!("No machine has a memory device of {size} bytes");
        return ExitCode::FAILURE;
    };
    // SAFETY: a fresh map at an address of the kernel's choice.
    let page = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            PAGE,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            offset as libc::off_t,
        )
    };
    if page == libc::MAP_FAILED {
        eprintln!("Cannot map the page: {}", std::io::Error::last_os_error());
        return ExitCode::FAILURE;
    }
    // SAFETY: the page was mapped just now; the machine's own accesses to it are none of the compiler's business.
    unsafe { page.cast::<u8>().read_volatile() };
    // SAFETY: our own map.
    if unsafe { libc::madvise(page, PAGE, libc::MADV_HWPOISON) } != 0 {
        eprintln!("Cannot make the page bad: {}", std::io::Error::last_os_error());
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}
