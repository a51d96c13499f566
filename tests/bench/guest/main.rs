//! What runs in the guests of the benchmarks.
//!
//! As process 1 it says that user space is reached, and waits to be killed with its machine; before it waits, it puts a
//! disk to work if `disk` is in its environment. As an ordinary program
//! (`aconite-bench-guest pmem`) it makes a device-dax of the first memory device, then reads requests from its
//! standard input and answers each with a line: `read ram|dax sequential|random` with the nanoseconds that it took,
//! `touch` with the bytes of which every page was touched for the first time, `load OFFSET COUNT` and
//! `copy OFFSET LENGTH COUNT` with the nanoseconds of so many loads of a word of the device or copies of a part of it.
//! As `aconite-bench-guest plug` it answers `there` and `gone` when the block device of a memory device is there or is
//! not, and `offline` when it has allowed the ejection of all containers.
//! As `aconite-bench-guest nvdimm` it waits for the first region of an NVDIMM bus; `ask COUNT` is so many questions to its
//! firmware, `scrub` a scrub of the region, and `scrub-by-kernel COUNT` one by the kernel until it lists so many errors,
//! all with nanoseconds; `records` is how many errors the last scrub has listed.

mod disk;
mod firmware;

use std::fs::{self, File};
use std::hint::black_box;
use std::io::{self, BufRead, Write};
use std::os::fd::AsRawFd;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

/// The line that process 1 prints.
const MARKER: &str = "aconite-bench: init";
/// Bytes that are read: more than the caches and translation buffers of processors hold.
const WINDOW: usize = 64 << 20;
/// Loads of a random reading.
const RANDOM_LOADS: usize = 1 << 20;
/// How often it is looked whether a device is there.
const LOOK: Duration = Duration::from_millis(1);
const PAGE: usize = 4096;
const HUGE_PAGE: usize = 2 << 20;
const DEVICE: &str = "/dev/dax0.0";

fn main() {
    if std::process::id() == 1 {
        println!("{MARKER}");
        if std::env::var_os("disk").is_some()
            && let Err(error) = disk::run()
        {
            println!("disk-error {error}");
        }
        loop {
            std::thread::park();
        }
    }
    let served = match std::env::args().nth(1).as_deref() {
        Some("plug") => plug(),
        Some("nvdimm") => nvdimm(),
        _ => serve(),
    };
    if let Err(error) = served {
        println!("error {error}");
        std::process::exit(1);
    }
}

fn serve() -> io::Result<()> {
    if !fs::exists(DEVICE)? {
        let made = Command::new("ndctl")
            .args(["create-namespace", "--force", "--reconfig=namespace0.0", "--mode=devdax", "--map=mem"])
            .output()?;
        if !made.status.success() {
            return Err(io::Error::other(String::from_utf8_lossy(&made.stderr).replace('\n', " ")));
        }
    }
    let device = File::options().read(true).write(true).open(DEVICE)?;
    let size = fs::read_to_string("/sys/bus/dax/devices/dax0.0/size")?;
    let size: usize = size.trim().parse().map_err(io::Error::other)?;
    let (dax, ram) = (Map::of(&device, size)?, Map::anonymous(WINDOW)?);
    answer_each(size as u64, |words| {
        Ok(Some(match *words {
            ["touch"] => dax.touch(),
            ["read", "ram", order] => read(&ram.words()[..WINDOW / 8], order),
            ["read", "dax", order] => read(&dax.words()[..WINDOW / 8], order),
            ["load", offset, count] => match (offset.parse::<usize>(), count.parse()) {
                (Ok(offset), Ok(count)) if offset / 8 < dax.len / 8 => load(&dax.words()[offset / 8], count),
                _ => return Ok(None),
            },
            ["copy", offset, length, count] => match (offset.parse::<usize>(), length.parse(), count.parse())
            {
                (Ok(offset), Ok(length @ 0..=PAGE), Ok(count)) if offset + length <= dax.len => {
                    copy(&dax.words()[offset / 8..][..length / 8], count)
                }
                _ => return Ok(None),
            },
            _ => return Ok(None),
        }))
    })
}

/// Says that it is ready, with a number, and answers each request with one, until one is not understood (`None`).
fn answer_each(ready: u64, mut answer: impl FnMut(&[&str]) -> io::Result<Option<u64>>) -> io::Result<()> {
    println!("ready {ready}");
    for line in io::stdin().lock().lines() {
        let line = line?;
        let Some(number) = answer(&line.split_whitespace().collect::<Vec<_>>())? else { return Ok(()) };
        println!("{number}");
        io::stdout().flush()?;
    }
    Ok(())
}

fn plug() -> io::Result<()> {
    answer_each(0, |words| {
        match *words {
            ["there"] => wait_for_block_device(true)?,
            ["gone"] => wait_for_block_device(false)?,
            ["offline"] => {
                for container in fs::read_dir("/sys/devices/system/container")? {
                    let switch = container?.path().join("online");
                    if switch.exists() {
                        fs::write(switch, "0")?;
                    }
                }
            }
            _ => return Ok(None),
        }
        Ok(Some(0))
    })
}

fn nvdimm() -> io::Result<()> {
    let mut bus = firmware::Bus::open()?;
    let mut records = 0;
    answer_each(bus.length, |words| {
        Ok(Some(match *words {
            ["ask", count] => bus.ask(count.parse().map_err(io::Error::other)?)?,
            ["scrub"] => {
                let scrubbed = bus.scrub()?;
                records = scrubbed.records;
                scrubbed.nanoseconds
            }
            ["records"] => records,
            ["scrub-by-kernel", count] => bus.scrub_by_kernel(count.parse().map_err(io::Error::other)?)?,
            _ => return Ok(None),
        }))
    })
}

fn wait_for_block_device(there: bool) -> io::Result<()> {
    let any = || -> io::Result<bool> {
        let names = fs::read_dir("/sys/block")?
            .map(|entry| Ok(entry?.file_name()))
            .collect::<io::Result<Vec<_>>>()?;
        Ok(names.iter().any(|name| name.to_string_lossy().starts_with("pmem")))
    };
    while any()? != there {
        thread::sleep(LOOK);
    }
    Ok(())
}

/// Memory that this process has mapped, for as long as it lives.
struct Map {
    base: *const u8,
    len: usize,
}

impl Map {
    fn of(file: &File, len: usize) -> io::Result<Self> {
        // SAFETY: a new map at an address of the kernel's choice.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Map { base: base.cast(), len })
    }

    /// Memory of the guest in huge pages, all of it there.
    fn anonymous(len: usize) -> io::Result<Self> {
        // SAFETY: a new map at an address of the kernel's choice.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len + HUGE_PAGE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = (base as usize).next_multiple_of(HUGE_PAGE);
        // SAFETY: the range lies in the map made above, which is writable.
        unsafe {
            libc::madvise(start as *mut libc::c_void, len, libc::MADV_HUGEPAGE);
            std::ptr::write_bytes(start as *mut u8, 1, len);
        }
        Ok(Map { base: start as *const u8, len })
    }

    fn words(&self) -> &[u64] {
        // SAFETY: the map is page aligned, readable, as long as said, and never unmapped; nobody writes to it.
        unsafe { std::slice::from_raw_parts(self.base.cast(), self.len / 8) }
    }

    /// Touches every page; returns the bytes that they hold.
    fn touch(&self) -> u64 {
        for word in self.words().iter().step_by(PAGE / 8) {
            black_box(*word);
        }
        self.len as u64
    }
}

/// Loads one word `count` times; returns nanoseconds.
fn load(word: &u64, count: u64) -> u64 {
    let start = Instant::now();
    for _ in 0..count {
        // SAFETY: a reference can be read.
        black_box(unsafe { std::ptr::read_volatile(word) });
    }
    start.elapsed().as_nanos() as u64
}

/// Copies `words` by one instruction, `count` times; returns nanoseconds.
fn copy(words: &[u64], count: u64) -> u64 {
    let mut page = [0u8; PAGE];
    let start = Instant::now();
    for _ in 0..count {
        // SAFETY: both are as long as is copied; the direction flag is clear, as the ABI has it.
        unsafe {
            std::arch::asm!(
                "rep movsb",
                inout("rcx") words.len() * 8 => _,
                inout("rsi") words.as_ptr() => _,
                inout("rdi") page.as_mut_ptr() => _,
            );
        }
        black_box(&page);
    }
    start.elapsed().as_nanos() as u64
}

/// Reads `words`; returns nanoseconds.
fn read(words: &[u64], order: &str) -> u64 {
    let start = Instant::now();
    let mut sum = 0u64;
    if order == "random" {
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        for _ in 0..RANDOM_LOADS {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            sum = sum.wrapping_add(words[state as usize % words.len()]);
        }
    } else {
        for word in words {
            sum = sum.wrapping_add(black_box(*word));
        }
    }
    black_box(sum);
    start.elapsed().as_nanos() as u64
}
