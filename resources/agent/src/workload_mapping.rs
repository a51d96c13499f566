//! Mapped memory of the workload `map`, and what can be done to it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::ptr;

use aconite_agent::pagemap;
use aconite_agent::workload::{Signal, Source, WORD, pattern_bytes};

use crate::workload_probe::{self as probe, Access};

const LINE: u64 = 64;
/// FUTEX_WAIT | FUTEX_PRIVATE_FLAG (include/uapi/linux/futex.h).
const FUTEX_WAIT_PRIVATE: u64 = 128;
/// What a pipe holds (pipe(7)).
const PIPE: u64 = 1 << 16;

/// Memory to be read and written. It stays mapped until [`Mapping::undo`] or the process's end.
pub struct Mapping {
    address: *mut u8,
    length: u64,
}

impl Mapping {
    /// Maps what `source` names.
    pub fn new(source: &Source) -> io::Result<Self> {
        let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        match source {
            Source::File(path) => {
                let file = OpenOptions::new().read(true).write(true).open(path)?;
                Self::map(length(path, &file)?, libc::MAP_SHARED, file.as_raw_fd())
            }
            Source::Anonymous(length) => Self::map(*length, private, -1)?.filled(),
            Source::Huge(length) => Self::map(*length, private | libc::MAP_HUGETLB, -1)?.filled(),
        }
    }

    /// Maps a file so that stores go to copies of its pages.
    pub fn private(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        Self::map(length(path, &file)?, libc::MAP_PRIVATE, file.as_raw_fd())
    }

    fn map(length: u64, flags: libc::c_int, fd: libc::c_int) -> io::Result<Self> {
        let size = usize::try_from(length).map_err(io::Error::other)?;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let address = unsafe { libc::mmap(ptr::null_mut(), size, access, flags, fd, 0) };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Mapping { address: address.cast(), length })
    }

    fn filled(self) -> io::Result<Self> {
        match self.fill(0, self.length) {
            Some(Ok(())) => Ok(self),
            _ => Err(io::Error::other("new memory cannot be filled")),
        }
    }

    /// Unmaps the memory.
    pub fn undo(self) -> io::Result<()> {
        // SAFETY: the area is that of `new`, nobody else knows of it, and it is not used after this.
        let result = unsafe { libc::munmap(self.address.cast(), self.length as usize) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Bytes that are mapped.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Its address.
    pub fn address(&self) -> u64 {
        self.address as u64
    }

    /// The guest-physical address of a byte. `None` when there is no such byte.
    pub fn physical(&self, offset: u64) -> Option<io::Result<u64>> {
        let address = self.area(offset, 1, 1)? as u64;
        let pieces = pagemap::look_up(std::process::id(), address, 1).map_err(io::Error::other);
        Some(pieces.map(|pieces| pieces[0].gpa))
    }

    /// Loads the word at `offset`; returns it and the address of the instruction. `None` when there is no such word.
    pub fn load(&self, offset: u64) -> Option<Result<(u64, u64), Signal>> {
        self.word(Access::Load, offset, 0)
    }

    /// Stores `word` at `offset`. `None` when there is no such word.
    pub fn store(&self, offset: u64, word: u64) -> Option<Result<(), Signal>> {
        Some(self.word(Access::Store, offset, word)?.map(drop))
    }

    /// Adds `word` to that at `offset`; returns what it was and the address of the instruction. `None` when there is no
    /// such word.
    pub fn add(&self, offset: u64, word: u64) -> Option<Result<(u64, u64), Signal>> {
        self.word(Access::Add, offset, word)
    }

    fn word(&self, access: Access, offset: u64, word: u64) -> Option<Result<(u64, u64), Signal>> {
        let mut word = word.to_le_bytes();
        let address = self.area(offset, WORD, WORD)?;
        // SAFETY: the word is within the mapping, which is there as long as `self`, and nothing else in this process
        // holds a reference into it; signals are caught.
        let rip = unsafe { probe::touch(access, address, &mut word) };
        Some(rip.map(|rip| (u64::from_le_bytes(word), rip)))
    }

    /// Stores the pattern over a part. `None` when there is no such part.
    pub fn fill(&self, offset: u64, length: u64) -> Option<Result<(), Signal>> {
        self.area(offset, length, WORD)?;
        for at in (offset..offset + length).step_by(WORD as usize) {
            if let Err(signal) = self.store(at, aconite_agent::workload::pattern(at))? {
                return Some(Err(signal));
            }
        }
        Some(Ok(()))
    }

    /// Copies a part out of the mapping by one instruction. `None` when there is no such part.
    pub fn copy(&self, offset: u64, length: u64) -> Option<Result<Vec<u8>, Signal>> {
        let address = self.area(offset, length, 1)?;
        let mut bytes = vec![0; length as usize];
        // SAFETY: as for words; the copy is as long as the buffer.
        Some(unsafe { probe::touch(Access::Copy, address, &mut bytes) }.map(|_| bytes))
    }

    /// Stores the pattern over a line by one instruction, which the processor must have. `None` when there is no such
    /// line.
    pub fn line(&self, offset: u64) -> Option<Result<(), Signal>> {
        let address = self.area(offset, LINE, LINE)?;
        let mut bytes = pattern_bytes(offset, LINE as usize);
        // SAFETY: as for words; both are 64 bytes.
        Some(unsafe { probe::touch(Access::Line, address, &mut bytes) }.map(drop))
    }

    /// Makes the mapping executable and calls the code at `offset`, if that is a `ret`. `None` when there is no such
    /// byte.
    pub fn execute(&self, offset: u64) -> Option<io::Result<Result<(), Signal>>> {
        let address = self.area(offset, 1, 1)?;
        let access = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
        // SAFETY: the area is that of `new`.
        if unsafe { libc::mprotect(self.address.cast(), self.length as usize, access) } < 0 {
            return Some(Err(io::Error::last_os_error()));
        }
        // SAFETY: what is called is what the driver stored there: it says that it returns.
        Some(Ok(unsafe { probe::touch(Access::Execute, address, &mut []) }.map(drop)))
    }

    /// Lets the kernel load a part: write(2) into a pipe. `None` when there is no such part, or no pipe holds it.
    pub fn send(&self, offset: u64, length: u64) -> Option<io::Result<(i64, Option<Signal>)>> {
        let address = self.area(offset, length, 1).filter(|_| length <= PIPE)? as u64;
        Some(io::pipe().map(|(_source, sink)| {
            let words = [libc::SYS_write as u64, sink.as_raw_fd() as u64, address, length, 0, 0];
            // SAFETY: the kernel only reads, within the mapping.
            unsafe { probe::call(words) }
        }))
    }

    /// Lets the kernel pin a part for a pipe, and drop it: vmsplice(2). `None` when there is no such part, or no pipe holds
    /// it.
    pub fn splice(&self, offset: u64, length: u64) -> Option<io::Result<(i64, Option<Signal>)>> {
        let address = self.area(offset, length, 1).filter(|_| length <= PIPE)?;
        let part = libc::iovec { iov_base: address.cast(), iov_len: length as usize };
        Some(io::pipe().map(|(_source, sink)| {
            let words = [libc::SYS_vmsplice as u64, sink.as_raw_fd() as u64, &raw const part as u64, 1, 0, 0];
            // SAFETY: the kernel only reads, the description of the part and within the mapping.
            unsafe { probe::call(words) }
        }))
    }

    /// Lets the kernel store the pattern over a part: pread(2) from a file in memory. `None` when there is no such part.
    pub fn receive(&self, offset: u64, length: u64) -> Option<io::Result<(i64, Option<Signal>)>> {
        let address = self.area(offset, length, 1)? as u64;
        let file = || {
            // SAFETY: the name ends with a zero byte; the new descriptor is owned at once.
            let mut file = unsafe {
                match libc::memfd_create(c"pattern".as_ptr(), libc::MFD_CLOEXEC) {
                    fd @ 0.. => File::from_raw_fd(fd),
                    _ => return Err(io::Error::last_os_error()),
                }
            };
            file.write_all(&pattern_bytes(offset, length as usize))?;
            io::Result::Ok(file)
        };
        Some(file().map(|file| {
            let words = [libc::SYS_pread64 as u64, file.as_raw_fd() as u64, address, length, 0, 0];
            // SAFETY: the kernel writes within the mapping, into which nothing in this process holds a reference.
            unsafe { probe::call(words) }
        }))
    }

    /// Lets a device move a part from `path` at `at`, or to it if `put`: pread(2) or pwrite(2) with O_DIRECT. `None` when
    /// there is no such part.
    pub fn direct(
        &self,
        path: &Path,
        at: u64,
        offset: u64,
        length: u64,
        put: bool,
    ) -> Option<io::Result<(i64, Option<Signal>)>> {
        let address = self.area(offset, length, 1)? as u64;
        let file = OpenOptions::new().read(!put).write(put).custom_flags(libc::O_DIRECT).open(path);
        Some(file.map(|file| {
            let number = if put { libc::SYS_pwrite64 } else { libc::SYS_pread64 };
            let words = [number as u64, file.as_raw_fd() as u64, address, length, at, 0];
            // SAFETY: the kernel reads or writes within the mapping, into which nothing in this process holds a
            // reference.
            unsafe { probe::call(words) }
        }))
    }

    /// The address of a part. `None` when there is no such part.
    pub fn part(&self, offset: u64, length: u64) -> Option<*mut u8> {
        self.area(offset, length, 1)
    }

    /// Lets the kernel load half the word at `offset`: futex(2) with a value that is not there, so that it does not wait.
    /// `None` when there is no such word.
    pub fn futex(&self, offset: u64) -> Option<(i64, Option<Signal>)> {
        let address = self.area(offset, WORD, WORD)? as u64;
        let words = [libc::SYS_futex as u64, address, FUTEX_WAIT_PRIVATE, u32::MAX.into(), 0, 0];
        // SAFETY: the kernel only reads, within the mapping.
        Some(unsafe { probe::call(words) })
    }

    fn area(&self, offset: u64, length: u64, align: u64) -> Option<*mut u8> {
        let end = offset.checked_add(length)?;
        let fits = offset.is_multiple_of(align) && length.is_multiple_of(align) && end <= self.length;
        fits.then(|| self.address.wrapping_add(offset as usize))
    }
}

/// Bytes of a file, or of a DAX device, whose size stands in sysfs (Documentation/ABI/testing/sysfs-bus-dax).
fn length(path: &Path, file: &File) -> io::Result<u64> {
    let metadata = file.metadata()?;
    if !metadata.file_type().is_char_device() {
        return Ok(metadata.len());
    }
    let (major, minor) = (libc::major(metadata.rdev()), libc::minor(metadata.rdev()));
    let size = fs::read_to_string(format!("/sys/dev/char/{major}:{minor}/size"))?;
    size.trim().parse().map_err(|_| io::Error::other(format!("{} is no DAX device", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use aconite_agent::workload::pattern;
    use std::os::unix::fs::FileExt;

    fn file(name: &str, length: u64) -> (std::path::PathBuf, File) {
        let path = std::env::temp_dir().join(format!("aconite-{name}-{}", std::process::id()));
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
        file.set_len(length).unwrap();
        (path, file)
    }

    #[test]
    fn accesses_outlive_their_signals() {
        let _turn = probe::TURNS.lock().unwrap();
        probe::catch_signals().unwrap();
        let (path, file) = file("mapping", 8192);
        file.write_all_at(&7u64.to_le_bytes(), 0).unwrap();
        let mapping = Mapping::new(&Source::File(path.clone())).unwrap();
        fs::remove_file(&path).unwrap();
        let (word, rip) = mapping.load(0).unwrap().unwrap();
        assert_eq!(word, 7);
        mapping.store(8, 9).unwrap().unwrap();
        assert_eq!(mapping.load(8).unwrap().unwrap().0, 9);
        // Behind the end of the file there is no page.
        file.set_len(0).unwrap();
        let signal = mapping.load(4096).unwrap().unwrap_err();
        let (number, code) = (libc::SIGBUS, libc::BUS_ADRERR);
        assert_eq!(signal, Signal { number, code, address: mapping.address() + 4096, lsb: 0, rip });
        let signals = [
            mapping.store(4104, 1).unwrap().unwrap_err(),
            mapping.add(4104, 1).unwrap().unwrap_err(),
            mapping.copy(4104, 8).unwrap().unwrap_err(),
            mapping.execute(4104).unwrap().unwrap().unwrap_err(),
        ];
        for signal in signals {
            assert_eq!((signal.number, signal.address), (libc::SIGBUS, mapping.address() + 4104));
            assert_ne!(signal.rip, rip);
        }
        assert_eq!(signals[3].rip, mapping.address() + 4104);
        assert_eq!(mapping.send(4096, 8).unwrap().unwrap(), (-i64::from(libc::EFAULT), None));
        assert_eq!(mapping.receive(4096, 8).unwrap().unwrap(), (-i64::from(libc::EFAULT), None));
        assert_eq!(mapping.splice(4096, 8).unwrap().unwrap(), (-i64::from(libc::EFAULT), None));
        assert!(
            mapping.load(8192).is_none() && mapping.load(4).is_none() && mapping.load(u64::MAX).is_none()
        );
    }

    #[test]
    fn own_memory_has_the_pattern() {
        probe::catch_signals().unwrap();
        let mapping = Mapping::new(&Source::Anonymous(8192)).unwrap();
        assert_eq!(mapping.load(4096).unwrap().unwrap().0, pattern(4096));
        assert_eq!(mapping.add(4096, 1).unwrap().unwrap().0, pattern(4096));
        assert_eq!(mapping.load(4096).unwrap().unwrap().0, pattern(4096) + 1);
        assert_eq!(mapping.receive(4096, 64).unwrap().unwrap(), (64, None));
        assert_eq!(mapping.copy(4090, 20).unwrap().unwrap(), pattern_bytes(4090, 20));
        assert_eq!(mapping.send(0, 4096).unwrap().unwrap(), (4096, None));
        assert_eq!(mapping.splice(0, 8192).unwrap().unwrap(), (8192, None));
        assert_eq!(mapping.futex(8), Some((-i64::from(libc::EAGAIN), None)));
        mapping.store(64, 0xc3).unwrap().unwrap();
        mapping.execute(64).unwrap().unwrap().unwrap();
        assert!(mapping.fill(4096, 8192).is_none() && mapping.line(32).is_none());
        assert!(probe::notice().is_none());
        mapping.undo().unwrap();
    }
}
