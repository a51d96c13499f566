//! The workload `garbage`: random accesses to every port and device register that a guest can reach.
//!
//! It needs root, and a kernel that lets /dev/mem map what drivers have claimed (`iomem=relaxed`). It does not touch
//! what ends the machine at a guest's honest request: sleep, reset and panic registers.

use std::arch::asm;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

const PAGE: usize = 4096;
/// The reset control register (a byte-wide write resets).
const RESET_PORT: u16 = 0xcf9;
/// Physical ranges of devices: platform registers below the panic page, unit registers, registers of error injection,
/// error records and error sources, flush hints, configuration space of the first bus, the start of the 32-bit PCI
/// window, and an address that is nobody's.
const RANGES: [(u64, usize); 7] = [
    (0xfe80_0000, PAGE),
    (0xfe81_0000, PAGE),
    (0xfe83_0000, 3 * PAGE),
    (0xfe90_0000, 4 * PAGE),
    (0xc000_0000, 256 * PAGE),
    (0xd000_0000, 16 * PAGE),
    (0xf000_0000, PAGE),
];
/// Offsets of the sleep and reset registers in the platform page.
const ENDINGS: std::ops::Range<usize> = 0x10..0x20;

/// xorshift64* (Vigna, "An experimental exploration of Marsaglia's xorshift generators"): reproducible from its seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() >> 16) as usize % limit
    }
}

/// A mapped range of device registers.
struct Registers {
    base: *mut u8,
    length: usize,
    first: u64,
}

impl Registers {
    fn map(first: u64, length: usize) -> io::Result<Self> {
        let memory = OpenOptions::new().read(true).write(true).open("/dev/mem")?;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                memory.as_raw_fd(),
                first as libc::off_t,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { base: base.cast(), length, first })
    }

    fn touch(&self, random: &mut Random) {
        let width = 1usize << random.below(4);
        let offset = random.below(self.length / width) * width;
        let platform = self.first == RANGES[0].0;
        if platform && offset + width > ENDINGS.start && offset < ENDINGS.end {
            return;
        }
        let (value, write) = (random.next(), random.next() & 1 == 0);
        // SAFETY: offset and width lie within the mapping, aligned to the width; what the registers do to the machine
        // is what this workload is for.
        unsafe {
            let at = self.base.add(offset);
            match (width, write) {
                (1, true) => at.write_volatile(value as u8),
                (2, true) => at.cast::<u16>().write_volatile(value as u16),
                (4, true) => at.cast::<u32>().write_volatile(value as u32),
                (_, true) => at.cast::<u64>().write_volatile(value),
                (1, false) => drop_value(at.read_volatile().into()),
                (2, false) => drop_value(at.cast::<u16>().read_volatile().into()),
                (4, false) => drop_value(at.cast::<u32>().read_volatile().into()),
                (_, false) => drop_value(at.cast::<u64>().read_volatile()),
            }
        }
    }
}

fn drop_value(_: u64) {}

fn touch_port(random: &mut Random) {
    let port = random.next() as u16;
    let (value, kind) = (random.next() as u32, random.below(6));
    if port == RESET_PORT {
        return;
    }
    // SAFETY: the process has I/O privilege (`run`), and port accesses touch no memory of it.
    unsafe {
        match kind {
            0 => asm!("out dx, al", in("dx") port, in("al") value as u8, options(nomem, nostack)),
            1 => asm!("out dx, ax", in("dx") port, in("ax") value as u16, options(nomem, nostack)),
            2 => asm!("out dx, eax", in("dx") port, in("eax") value, options(nomem, nostack)),
            3 => asm!("in al, dx", in("dx") port, out("al") _, options(nomem, nostack)),
            4 => asm!("in ax, dx", in("dx") port, out("ax") _, options(nomem, nostack)),
            _ => asm!("in eax, dx", in("dx") port, out("eax") _, options(nomem, nostack)),
        }
    }
}

/// Makes random accesses for `time`, from `seed`, and returns how many.
pub fn run(seed: u64, time: Duration) -> io::Result<u64> {
    // SAFETY: iopl changes the privilege of this process only.
    if unsafe { libc::iopl(3) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let registers = RANGES
        .into_iter()
        .map(|(first, length)| Registers::map(first, length))
        .collect::<io::Result<Vec<_>>>()?;
    let mut random = Random(seed.max(1));
    let start = Instant::now();
    let mut count = 0;
    while start.elapsed() < time {
        for _ in 0..64 {
            match random.below(4) {
                0 => touch_port(&mut random),
                _ => registers[random.below(registers.len())].touch(&mut random),
            }
            count += 1;
        }
    }
    Ok(count)
}
