//! Files that hold guest memory.

use std::ffi::CStr;
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd};
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::PAGE_SIZE;

/// Why a file cannot hold guest memory.
#[derive(Debug, Error)]
pub enum BackingError {
    /// Anonymous memory could not be had.
    #[error("Cannot make {size:#x} bytes of memory")]
    Anonymous {
        /// Bytes asked for.
        size: u64,
        /// The system's answer.
        source: io::Error,
    },
    /// There is no room for the copy that a guest works on, or the device cannot be read.
    #[error("Cannot make the copy of {name} that its guest works on, {size:#x} bytes of memory")]
    Copy {
        /// The device.
        name: String,
        /// Its bytes.
        size: u64,
        /// The system's answer.
        source: io::Error,
    },
    /// The file could not be opened, created or sized.
    #[error("Cannot open {path} for a memory device")]
    Open {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// It would lie on a hugetlbfs, whose pages do not divide its size.
    #[error(
        "{path} lies on a hugetlbfs with pages of {page:#x} bytes, which do not divide {size:#x}; choose another size, or a hugetlbfs with smaller pages"
    )]
    PageSize {
        /// The file.
        path: PathBuf,
        /// Bytes of the device.
        size: u64,
        /// Bytes of a page.
        page: u64,
    },
    /// The hugetlbfs that it lies on has not enough pages.
    #[error(
        "{path} needs {pages} huge pages of {page:#x} bytes, and not as many are free; raise vm.nr_hugepages, or put it on a tmpfs with huge=always"
    )]
    HugePages {
        /// The file.
        path: PathBuf,
        /// Pages that the device has.
        pages: u64,
        /// Bytes of a page.
        page: u64,
        /// The system's answer.
        source: io::Error,
    },
    /// Another process uses it.
    #[error("{path} is in use by another machine; end that one, or use a copy")]
    InUse {
        /// The file.
        path: PathBuf,
    },
}

/// `size` bytes of shared memory that exist as long as the file is open; `name` shows in /proc.
pub fn anonymous(name: &CStr, size: u64) -> Result<File, BackingError> {
    // SAFETY: the name is a valid C string; the flags are constants.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(BackingError::Anonymous { size, source: io::Error::last_os_error() });
    }
    // SAFETY: the descriptor was just made and nobody else owns it.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(size).map_err(|source| BackingError::Anonymous { size, source })?;
    Ok(file)
}

/// Opens `path` as `size` bytes of guest memory and locks it against other machines for as long as it is
/// open: shared if it is only read, exclusive otherwise. `create` makes a missing file, sparse.
pub fn open(path: &Path, size: u64, writable: bool, create: bool) -> Result<File, BackingError> {
    let failed = |source| BackingError::Open { path: path.to_owned(), source };
    let page = huge_page(path).map_err(failed)?;
    if let Some(page) = page.filter(|page| !size.is_multiple_of(*page)) {
        return Err(BackingError::PageSize { path: path.to_owned(), size, page });
    }
    let file = OpenOptions::new()
        .read(true)
        .write(writable)
        .create(create && writable)
        .open(path)
        .map_err(failed)?;
    lock(&file, writable).map_err(|source| match source.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => BackingError::InUse { path: path.to_owned() },
        _ => failed(source),
    })?;
    let length = file.metadata().map_err(failed)?.len();
    if create && length < size {
        file.set_len(size).map_err(failed)?;
    }
    if let Some(page) = page.filter(|_| writable) {
        // A page that is not there when a vCPU touches it ends in SIGBUS: all are made now, or none.
        allocate(&file, size).map_err(|source| BackingError::HugePages {
            path: path.to_owned(),
            pages: size / page,
            page,
            source,
        })?;
    }
    Ok(file)
}

/// Bytes of the pages of the hugetlbfs that `path` lies on, or would lie on; none on any other file system.
pub fn huge_page(path: &Path) -> io::Result<Option<u64>> {
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            File::open(path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new(".")))?
        }
        file => file?,
    };
    Ok(Some(smallest_page(&file)?).filter(|page| *page > PAGE_SIZE))
}

fn allocate(file: &File, size: u64) -> io::Result<()> {
    let size = libc::off_t::try_from(size).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: takes numbers and an open descriptor only.
    if unsafe { libc::fallocate(file.as_raw_fd(), 0, 0, size) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Takes the whole file's open-file-description lock, which ends with the last descriptor of this opening.
pub fn lock(file: &File, exclusive: bool) -> io::Result<()> {
    // SAFETY: all-zero is a valid `flock`: from the start, to the end, no process id.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = if exclusive { libc::F_WRLCK } else { libc::F_RDLCK } as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    // SAFETY: the descriptor is open and the structure outlives the call.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// The parts of `len` bytes of `file` from `offset` on that were ever written, in order; the rest reads as zeroes. A file
/// system that does not tell says that it is all of them.
pub fn data(file: &File, offset: u64, len: u64) -> Vec<Range<u64>> {
    let seek = |from: u64, whence| {
        // SAFETY: the descriptor is open. Its position is nobody's: all access is by maps or names its place.
        let at = unsafe { libc::lseek(file.as_raw_fd(), from as libc::off_t, whence) };
        u64::try_from(at).map_err(|_| io::Error::last_os_error())
    };
    let end = offset + len;
    let (mut found, mut at) = (Vec::new(), offset);
    while at < end {
        let start = match seek(at, libc::SEEK_DATA) {
            Ok(start) => start.min(end),
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) => break,
            Err(_) => at,
        };
        let stop = seek(start, libc::SEEK_HOLE).unwrap_or(end).clamp(start, end);
        if start < stop {
            found.push(start - offset..stop - offset);
        }
        at = stop.max(start + 1);
    }
    found
}

/// Bytes of the smallest page that a map of `file` can have: that of the processor, or of its hugetlbfs.
pub fn smallest_page(file: &File) -> io::Result<u64> {
    // SAFETY: all-zero is a valid `statfs`.
    let mut stat: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open and the structure outlives the call.
    if unsafe { libc::fstatfs(file.as_raw_fd(), &mut stat) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(if stat.f_type == libc::HUGETLBFS_MAGIC { stat.f_bsize as u64 } else { PAGE_SIZE })
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn a_writable_file_has_one_user_and_a_read_only_one_many() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p0");
        let first = open(&path, 8192, true, true).unwrap();
        assert_eq!(first.metadata().unwrap().len(), 8192);
        for writable in [true, false] {
            let error = open(&path, 8192, writable, false).unwrap_err();
            assert!(matches!(error, BackingError::InUse { .. }), "{error}");
        }
        drop(first);
        // A child that another test starts has the first one's descriptor, too, until it executes its program.
        let patience = Instant::now() + Duration::from_secs(10);
        let _one = loop {
            match open(&path, 8192, false, false) {
                Err(BackingError::InUse { .. }) if Instant::now() < patience => thread::yield_now(),
                opened => break opened.unwrap(),
            }
        };
        let _two = open(&path, 8192, false, false).unwrap();
        assert!(matches!(open(&path, 8192, true, false), Err(BackingError::InUse { .. })));
    }

    #[test]
    fn nothing_is_created_without_being_asked() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p0");
        assert!(matches!(open(&path, 8192, true, false), Err(BackingError::Open { .. })));
        assert!(!path.exists());
        assert_eq!(anonymous(c"ram", 1 << 40).unwrap().metadata().unwrap().len(), 1 << 40);
    }
}
