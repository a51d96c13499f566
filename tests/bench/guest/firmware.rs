//! Calls of the firmware of an NVDIMM bus, by the ioctls that stock tools use (include/uapi/linux/ndctl.h).

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::thread;
use std::time::{Duration, Instant};

const BUS: &str = "/dev/ndctl0";
const SCRUB: &str = "/sys/bus/nd/devices/ndbus0/nfit/scrub";
const REGION: &str = "/sys/bus/nd/devices/region0";
/// How often it is looked whether something has happened.
const LOOK: Duration = Duration::from_millis(1);
/// `ND_ARS_PERSISTENT`.
const PERSISTENT: u16 = 2;
/// Status of a scrub whose list goes on behind a restart (ACPI 6.5, 9.20.7.6).
const STOPPED_EARLY: u32 = 3 << 16;

/// An ioctl of the bus: `_IOWR('N', number, T)`.
const fn number<T>(number: u64) -> u64 {
    3 << 30 | (size_of::<T>() as u64) << 16 | (b'N' as u64) << 8 | number
}

/// `struct nd_cmd_ars_cap`.
#[derive(Default)]
#[repr(C)]
struct Capabilities {
    address: u64,
    length: u64,
    status: u32,
    max_output: u32,
    clear_unit: u32,
    flags: u16,
    reserved: u16,
}
const CAPABILITIES: u64 = number::<Capabilities>(1);

/// `struct nd_cmd_ars_start`.
#[derive(Default)]
#[repr(C)]
struct Start {
    address: u64,
    length: u64,
    kind: u16,
    flags: u8,
    reserved: [u8; 5],
    status: u32,
    seconds: u32,
}
const START: u64 = number::<Start>(2);

/// `struct nd_cmd_ars_status` without its records.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Status {
    status: u32,
    /// Bytes that there is room for, then bytes of the answer.
    out_length: u32,
    address: u64,
    length: u64,
    restart_address: u64,
    restart_length: u64,
    kind: u16,
    flags: u16,
    records: u32,
}
const STATUS: u64 = number::<Status>(3);

/// What a scrub came to.
pub struct Scrubbed {
    pub nanoseconds: u64,
    /// Errors that were listed.
    pub records: u64,
}

/// The first bus, and the addresses of its first region.
pub struct Bus {
    file: File,
    address: u64,
    pub length: u64,
    /// The answer of a status.
    answer: Vec<Status>,
}

impl Bus {
    /// The bus, once the kernel has its region and has scrubbed it.
    pub fn open() -> io::Result<Self> {
        while fs::read_to_string(SCRUB).map_or(true, |scrub| scrub.trim() == "0" || scrub.contains('+')) {
            thread::sleep(LOOK);
        }
        let word = |name: &str| -> io::Result<String> {
            Ok(fs::read_to_string(format!("{REGION}/{name}"))?.trim().to_owned())
        };
        let resource = word("resource")?;
        let address = u64::from_str_radix(resource.trim_start_matches("0x"), 16).map_err(io::Error::other)?;
        let length = word("size")?.parse().map_err(io::Error::other)?;
        let file = File::options().read(true).write(true).open(BUS)?;
        let mut bus = Bus { file, address, length, answer: Vec::new() };
        let room = bus.capabilities()?.max_output as usize;
        bus.answer.resize(room.div_ceil(size_of::<Status>()), Status::default());
        Ok(bus)
    }

    /// What can be scrubbed.
    fn capabilities(&self) -> io::Result<Capabilities> {
        let mut asked =
            Capabilities { address: self.address, length: self.length, ..Capabilities::default() };
        // SAFETY: the kernel reads and writes one structure of this layout.
        unsafe { call(&self.file, CAPABILITIES, (&raw mut asked).cast()) }?;
        succeeded(asked.status & 0xffff)?;
        Ok(asked)
    }

    /// Asks what can be scrubbed, `count` times; returns nanoseconds.
    pub fn ask(&self, count: u64) -> io::Result<u64> {
        let start = Instant::now();
        for _ in 0..count {
            self.capabilities()?;
        }
        Ok(start.elapsed().as_nanos() as u64)
    }

    /// Scrubs the region, and goes on where an answer ends until all errors have been listed.
    pub fn scrub(&mut self) -> io::Result<Scrubbed> {
        let (mut address, mut length, mut records) = (self.address, self.length, 0);
        let start = Instant::now();
        loop {
            let mut asked = Start { address, length, kind: PERSISTENT, ..Start::default() };
            // SAFETY: the kernel reads and writes one structure of this layout.
            unsafe { call(&self.file, START, (&raw mut asked).cast()) }?;
            succeeded(asked.status)?;
            let status = self.status()?;
            records += u64::from(status.records);
            if status.status != STOPPED_EARLY {
                succeeded(status.status)?;
                return Ok(Scrubbed { nanoseconds: start.elapsed().as_nanos() as u64, records });
            }
            (address, length) = (status.restart_address, status.restart_length);
        }
    }

    fn status(&mut self) -> io::Result<Status> {
        let room = size_of_val(&self.answer[..]) as u32;
        self.answer[0] = Status { out_length: room, ..Status::default() };
        // SAFETY: the kernel writes as many bytes as it is told that there is room for.
        unsafe { call(&self.file, STATUS, self.answer.as_mut_ptr().cast()) }?;
        Ok(self.answer[0])
    }

    /// Has the kernel scrub; returns nanoseconds until it lists `count` bad blocks or runs of them.
    pub fn scrub_by_kernel(&self, count: usize) -> io::Result<u64> {
        let start = Instant::now();
        fs::write(SCRUB, "1")?;
        while fs::read_to_string(format!("{REGION}/badblocks"))?.lines().count() < count {
            thread::sleep(LOOK);
        }
        Ok(start.elapsed().as_nanos() as u64)
    }
}

/// An ioctl.
///
/// # Safety
/// `argument` is what the ioctl of this number takes.
unsafe fn call(file: &File, number: u64, argument: *mut libc::c_void) -> io::Result<()> {
    // SAFETY: the caller's promise.
    if unsafe { libc::ioctl(file.as_raw_fd(), number, argument) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// An error for a status that is not 0.
fn succeeded(status: u32) -> io::Result<()> {
    if status == 0 {
        Ok(())
    } else {
        Err(io::Error::other(format!("firmware answers with status {status:#x}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ioctls_are_those_of_the_kernel() {
        assert_eq!([CAPABILITIES, START, STATUS], [0xc020_4e01, 0xc020_4e02, 0xc030_4e03]);
    }
}
