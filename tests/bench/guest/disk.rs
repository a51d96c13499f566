//! Requests to a disk, past the guest's page cache. The driver's modules are beside the program, in the order in which
//! they are loaded.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::thread;
use std::time::{Duration, Instant};

const DEVICE: &str = "/dev/vda";
/// How often it is looked whether the device is there.
const LOOK: Duration = Duration::from_millis(10);
/// How long nothing happens before and after each load, so that exits can be counted from outside.
const QUIET: Duration = Duration::from_millis(60);
/// How often each load is carried out.
const TURNS: u64 = 4;
const SECTOR: u64 = 512;
/// Bytes of a random read.
const SMALL: usize = 4 << 10;
/// Bytes of a request one after the other.
const LARGE: usize = 128 << 10;
/// Those who read at the same time.
const READERS: u64 = 4;

/// A request's memory.
#[repr(align(4096))]
struct Buffer([u8; LARGE]);

/// A kind of request, many times.
#[derive(Clone, Copy)]
enum Load {
    /// Nothing: what counting costs.
    Nothing,
    /// Random reads, by so many at a time.
    Random { readers: u64 },
    /// Reads from the start on.
    Read,
    /// Writes from the start on.
    Write,
}

const LOADS: [(&str, Load); 5] = [
    ("nothing", Load::Nothing),
    ("random", Load::Random { readers: 1 }),
    ("random-by-four", Load::Random { readers: READERS }),
    ("read", Load::Read),
    ("write", Load::Write),
];

/// Carries all loads out, and says when each begins and ends, with its requests and the nanoseconds that they took.
pub fn run() -> io::Result<()> {
    prepare()?;
    let disk = File::options().read(true).write(true).custom_flags(libc::O_DIRECT).open(DEVICE)?;
    let sectors = fs::read_to_string("/sys/block/vda/size")?;
    let length = sectors.trim().parse::<u64>().map_err(io::Error::other)? * SECTOR;
    for turn in 0..TURNS {
        for (name, load) in LOADS {
            println!("disk-begin {name}");
            thread::sleep(QUIET);
            let (requests, time) = load.carry_out(&disk, length, turn)?;
            thread::sleep(QUIET);
            println!("disk-end {requests} {time}");
            thread::sleep(QUIET);
        }
    }
    println!("disk-done");
    Ok(())
}

impl Load {
    /// Pieces, and requests of each. A piece is so short that one of them is left alone by all else that the host does.
    fn pieces(self) -> (u64, u64) {
        match self {
            Load::Nothing => (1, 0),
            Load::Random { readers } => (40 / readers, 10 * readers),
            Load::Read | Load::Write => (16, 4),
        }
    }

    /// Returns the number of requests, and their nanoseconds if all pieces were as short as the shortest.
    fn carry_out(self, disk: &File, length: u64, turn: u64) -> io::Result<(u64, u64)> {
        let (pieces, requests) = self.pieces();
        let mut buffer = Box::new(Buffer([0x5a; LARGE]));
        let mut shortest = u64::MAX;
        for piece in 0..pieces {
            let first = piece * requests;
            let mut places = (first..first + requests).map(|at| at * LARGE as u64);
            let start = Instant::now();
            match self {
                Load::Nothing => {}
                Load::Random { readers } => {
                    let seed = (turn * pieces + piece) * READERS;
                    let reads = |reader| random(disk, length, requests / readers, seed + reader);
                    thread::scope(|scope| {
                        let others: Vec<_> =
                            (1..readers).map(|reader| scope.spawn(move || reads(reader))).collect();
                        let failed = |_| Err(io::Error::other("a reader panicked"));
                        reads(0)?;
                        others.into_iter().try_for_each(|other| other.join().unwrap_or_else(failed))
                    })?;
                }
                Load::Read => places.try_for_each(|at| disk.read_exact_at(&mut buffer.0, at))?,
                Load::Write => places.try_for_each(|at| disk.write_all_at(&buffer.0, at))?,
            }
            shortest = shortest.min(start.elapsed().as_nanos() as u64);
        }
        Ok((pieces * requests, pieces * shortest))
    }
}

/// Reads `count` blocks that only `seed` chooses.
fn random(disk: &File, length: u64, count: u64, seed: u64) -> io::Result<()> {
    let mut buffer = Box::new(Buffer([0; LARGE]));
    let blocks = length / SMALL as u64;
    let mut state = 0x9e37_79b9_7f4a_7c15u64 ^ (seed + 1);
    for _ in 0..count {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        disk.read_exact_at(&mut buffer.0[..SMALL], state % blocks * SMALL as u64)?;
    }
    Ok(())
}

/// Mounts what process 1 finds empty, loads the modules and waits for the disk.
fn prepare() -> io::Result<()> {
    for (kind, place) in [(c"devtmpfs", c"/dev"), (c"sysfs", c"/sys")] {
        fs::create_dir_all(place.to_str().map_err(io::Error::other)?)?;
        // SAFETY: all arguments are strings of ours that end with a zero.
        let mounted =
            unsafe { libc::mount(kind.as_ptr(), place.as_ptr(), kind.as_ptr(), 0, std::ptr::null()) };
        // The kernel may have mounted /dev by itself.
        if mounted < 0 && io::Error::last_os_error().raw_os_error() != Some(libc::EBUSY) {
            return Err(io::Error::last_os_error());
        }
    }
    for number in 0.. {
        let Ok(module) = File::open(format!("/{number}.ko")) else { break };
        // SAFETY: a file of ours that is open, no parameters, and no flags (finit_module(2)).
        if unsafe { libc::syscall(libc::SYS_finit_module, module.as_raw_fd(), c"".as_ptr(), 0) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    while !fs::exists(DEVICE)? {
        thread::sleep(LOOK);
    }
    Ok(())
}
