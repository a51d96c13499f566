//! The map of a file that KVM sees, page by page protected where the guest must trap.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

use thiserror::Error;

/// Bytes in the smallest page, the unit of protection.
pub const PAGE_SIZE: u64 = 4096;

/// Bytes in a large page, which a processor maps by one entry if the file's pages allow.
pub const LARGE: u64 = 2 << 20;

/// Advice that puts guard marks into page tables, and takes them away (include/uapi/asm-generic/mman-common.h).
const MADV_GUARD_INSTALL: i32 = 102;
const MADV_GUARD_REMOVE: i32 = 103;

/// What went wrong with a map.
#[derive(Debug, Error)]
pub enum MapError {
    /// Address space for the map could not be had.
    #[error("Cannot reserve {len:#x} bytes of address space")]
    Reserve {
        /// Bytes asked for.
        len: u64,
        /// The system's answer.
        source: io::Error,
    },
    /// The file could not be mapped.
    #[error("Cannot map {len:#x} bytes of a file at offset {offset:#x}")]
    Map {
        /// Bytes asked for.
        len: u64,
        /// Offset in the file.
        offset: u64,
        /// The system's answer.
        source: io::Error,
    },
    /// Pages could not be marked as guards, or their marks not be taken away.
    #[error("Cannot change the guard marks of pages {start:#x} to {end:#x}")]
    Mark {
        /// First byte, as an offset in the map.
        start: u64,
        /// End, as an offset in the map.
        end: u64,
        /// The system's answer.
        source: io::Error,
    },
    /// The protection of pages could not be changed.
    #[error("Cannot change the protection of pages {start:#x} to {end:#x}; vm.max_map_count may be too low")]
    Protect {
        /// First byte, as an offset in the map.
        start: u64,
        /// End, as an offset in the map.
        end: u64,
        /// The system's answer.
        source: io::Error,
    },
}

/// A shared map of a part of a file at an address aligned like the guest's, unmapped on drop.
///
/// Nothing in the monitor reads or writes through it, but for the ones that fill a page of departed
/// memory: it exists for KVM.
#[derive(Debug)]
pub struct GuestMap {
    base: NonNull<u8>,
    len: usize,
    prot: i32,
    /// The protection of what is mapped, where no guard is.
    open_prot: i32,
    /// What is mapped, and from where on; none once it has vanished.
    file: Option<(File, u64)>,
}

// SAFETY: the pointer is only used for system calls on the range it owns, and for `fill`, which needs
// `&mut self` or the exclusion its documentation demands.
unsafe impl Send for GuestMap {}
// SAFETY: as above.
unsafe impl Sync for GuestMap {}

impl GuestMap {
    /// Maps `len` bytes of `file` from `offset`, shared, so that host address and `gpa` are congruent
    /// modulo the largest page size (1 GiB, or less for a smaller map) and huge pages can be used.
    ///
    /// `len` and `offset` are multiples of [`PAGE_SIZE`].
    pub fn new(file: &File, offset: u64, len: u64, gpa: u64, writable: bool) -> Result<Self, MapError> {
        let align = largest_alignment(len);
        let reserve_len = len + align;
        // SAFETY: a fresh anonymous reservation, at an address of the kernel's choice.
        let reserved = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                reserve_len as usize,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if reserved == libc::MAP_FAILED {
            return Err(MapError::Reserve { len: reserve_len, source: io::Error::last_os_error() });
        }
        let start = reserved as u64;
        let skip = (gpa % align + align - start % align) % align;
        let base = start + skip;
        let prot = if writable { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
        // SAFETY: the target lies wholly in the reservation made above, which nobody else knows.
        let mapped = unsafe {
            libc::mmap(
                base as *mut libc::c_void,
                len as usize,
                prot,
                libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                offset as libc::off_t,
            )
        };
        let source = io::Error::last_os_error();
        let tail = base + len;
        for (at, size) in [(start, skip), (tail, start + reserve_len - tail)] {
            if size > 0 {
                // SAFETY: these are the unused ends of our own reservation.
                unsafe { libc::munmap(at as *mut libc::c_void, size as usize) };
            }
        }
        let Some(base) = NonNull::new(mapped.cast::<u8>()).filter(|_| mapped != libc::MAP_FAILED) else {
            // SAFETY: the middle of our own reservation, still anonymous.
            unsafe { libc::munmap(base as *mut libc::c_void, len as usize) };
            return Err(MapError::Map { len, offset, source });
        };
        let kept = file.try_clone().map_err(|source| MapError::Map { len, offset, source })?;
        let map = Self { base, len: len as usize, prot, open_prot: prot, file: Some((kept, offset)) };
        map.advise_all(0..len);
        Ok(map)
    }

    /// Host address of the first byte.
    pub fn host_address(&self) -> u64 {
        self.base.as_ptr() as u64
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len as u64
    }

    /// Whether the map has no bytes; it never has none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Makes every access to `pages` fail with EFAULT in KVM_RUN. `pages` is page aligned.
    pub fn shut(&self, pages: Range<u64>) -> Result<(), MapError> {
        self.protect(pages, libc::PROT_NONE)
    }

    /// Undoes [`Self::shut`].
    pub fn open(&self, pages: Range<u64>) -> Result<(), MapError> {
        self.protect(pages, self.prot)
    }

    /// Makes every access to `pages` fail with EFAULT in KVM_RUN, by marks in the page tables instead of protection.
    ///
    /// The host must be Linux 6.15 or newer, and the file none of hugetlbfs (`madvise_guard_install` in mm/madvise.c).
    pub fn mark(&self, pages: Range<u64>) -> Result<(), MapError> {
        self.madvise(pages.clone(), MADV_GUARD_INSTALL).map_err(|source| MapError::Mark {
            start: pages.start,
            end: pages.end,
            source,
        })
    }

    /// Undoes [`Self::mark`].
    pub fn unmark(&self, pages: Range<u64>) -> Result<(), MapError> {
        self.madvise(pages.clone(), MADV_GUARD_REMOVE).map_err(|source| MapError::Mark {
            start: pages.start,
            end: pages.end,
            source,
        })
    }

    /// Maps `blocks`, whole blocks of [`LARGE`] bytes in which no page is shut or marked, anew, so that the next touch
    /// can map them large: a small page in a block leaves a page table behind that keeps it from that. Whoever touches
    /// a block meanwhile waits; KVM's own mappings of it go too.
    pub fn renew(&self, blocks: Range<u64>) -> Result<(), MapError> {
        self.check(&blocks);
        let Some((file, offset)) = &self.file else { return Ok(()) };
        let len = blocks.end - blocks.start;
        let offset = offset + blocks.start;
        // SAFETY: replaces a part of our own range by what it was mapped from.
        let mapped = unsafe {
            libc::mmap(
                self.base.as_ptr().add(blocks.start as usize).cast(),
                len as usize,
                self.prot,
                libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                offset as libc::off_t,
            )
        };
        if mapped == libc::MAP_FAILED {
            return Err(MapError::Map { len, offset, source: io::Error::last_os_error() });
        }
        // With the same advice as before it merges with its neighbours.
        self.advise_all(blocks);
        Ok(())
    }

    /// Puts inaccessible anonymous memory in place of the file: what the map held is out of reach for good.
    pub fn vanish(&mut self) -> Result<(), MapError> {
        self.cover()?;
        self.file = None;
        Ok(())
    }

    /// Maps the file again that [`Self::cover`] has put out of reach. Nothing of it is shut or marked.
    pub fn uncover(&mut self) -> Result<(), MapError> {
        self.prot = self.open_prot;
        self.renew(0..self.len())
    }

    /// Puts inaccessible anonymous memory in place of the file: what the map held is out of reach.
    pub fn cover(&mut self) -> Result<(), MapError> {
        // SAFETY: replaces exactly our own range.
        let mapped = unsafe {
            libc::mmap(
                self.base.as_ptr().cast(),
                self.len,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if mapped == libc::MAP_FAILED {
            let source = io::Error::last_os_error();
            return Err(MapError::Map { len: self.len as u64, offset: 0, source });
        }
        self.prot = libc::PROT_READ | libc::PROT_WRITE;
        Ok(())
    }

    /// Opens a page of a vanished or covered map and fills it with ones, as a bus answers for an absent device.
    ///
    /// The caller has stopped every vCPU, so nobody else touches the page.
    pub fn fill_with_ones(&self, page: u64) -> Result<(), MapError> {
        self.open(page..page + PAGE_SIZE)?;
        // SAFETY: the page lies in our range (`protect` checked it), is now writable anonymous memory,
        // and no vCPU runs.
        unsafe { self.base.as_ptr().add(page as usize).write_bytes(0xff, PAGE_SIZE as usize) };
        Ok(())
    }

    /// Shuts a page opened by [`Self::fill_with_ones`] and drops its content.
    pub fn forget(&self, page: u64) -> Result<(), MapError> {
        self.shut(page..page + PAGE_SIZE)?;
        // Advice that is not taken leaves ones in a page that is to be filled with them anyway.
        let _ = self.madvise(page..page + PAGE_SIZE, libc::MADV_DONTNEED);
        Ok(())
    }

    fn check(&self, pages: &Range<u64>) {
        assert!(
            pages.start <= pages.end && pages.end <= self.len as u64 && pages.start.is_multiple_of(PAGE_SIZE),
            "pages {pages:x?} of a map of {:#x} bytes",
            self.len
        );
    }

    fn protect(&self, pages: Range<u64>, prot: i32) -> Result<(), MapError> {
        self.check(&pages);
        // SAFETY: the range was just checked to lie in our own map.
        let result = unsafe {
            libc::mprotect(
                self.base.as_ptr().add(pages.start as usize).cast(),
                (pages.end - pages.start) as usize,
                prot,
            )
        };
        if result != 0 {
            let source = io::Error::last_os_error();
            return Err(MapError::Protect { start: pages.start, end: pages.end, source });
        }
        Ok(())
    }

    fn madvise(&self, pages: Range<u64>, advice: i32) -> io::Result<()> {
        self.check(&pages);
        let len = (pages.end - pages.start) as usize;
        // SAFETY: the range was just checked to lie in our own map, through which nothing in the monitor reads.
        let result =
            unsafe { libc::madvise(self.base.as_ptr().add(pages.start as usize).cast(), len, advice) };
        if result != 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// A refusal changes nothing but speed or the size of a dump.
    fn advise_all(&self, range: Range<u64>) {
        for advice in [libc::MADV_HUGEPAGE, libc::MADV_DONTDUMP] {
            let _ = self.madvise(range.clone(), advice);
        }
    }
}

impl Drop for GuestMap {
    fn drop(&mut self) {
        // SAFETY: our own range, unmapped once.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// The largest x86 page size of which `len` holds at least one.
fn largest_alignment(len: u64) -> u64 {
    [1 << 30, 2 << 20].into_iter().find(|size| len >= *size).unwrap_or(PAGE_SIZE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    fn file(len: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(len).unwrap();
        file
    }

    #[test]
    fn host_and_guest_address_are_congruent() {
        for (len, gpa, align) in
            [(4 << 20, 0x1_4020_0000, 2 << 20), (1 << 30, 5 << 30, 1 << 30), (8192, 0x3000, 4096)]
        {
            let map = GuestMap::new(&file(len), 0, len, gpa, true).unwrap();
            assert_eq!(map.host_address() % align, gpa % align);
            assert_eq!(map.len(), len);
        }
    }

    #[test]
    fn a_shut_page_faults_for_the_kernel_and_an_open_one_does_not() {
        let backing = file(16384);
        let map = GuestMap::new(&backing, 0, 16384, 0, true).unwrap();
        let sink = file(0);
        let touch = |page: u64| {
            // SAFETY: write(2) reports EFAULT for memory it cannot read; nothing is dereferenced here.
            let n = unsafe {
                libc::pwrite(sink.as_raw_fd(), (map.host_address() + page) as *const libc::c_void, 1, 0)
            };
            if n == 1 { Ok(()) } else { Err(io::Error::last_os_error().raw_os_error()) }
        };
        map.shut(4096..8192).unwrap();
        assert_eq!([touch(0), touch(4096), touch(8192)], [Ok(()), Err(Some(libc::EFAULT)), Ok(())]);
        map.open(4096..8192).unwrap();
        assert_eq!(touch(4096), Ok(()));
    }

    #[test]
    fn a_vanished_map_holds_ones_and_never_the_file() {
        let backing = file(8192);
        backing.write_at(b"secret", 4096).unwrap();
        let mut map = GuestMap::new(&backing, 0, 8192, 0, true).unwrap();
        map.vanish().unwrap();
        map.fill_with_ones(4096).unwrap();
        let sink = file(0);
        // SAFETY: as above.
        let n = unsafe {
            libc::pwrite(sink.as_raw_fd(), (map.host_address() + 4096) as *const libc::c_void, 6, 0)
        };
        assert_eq!(n, 6);
        let mut seen = [0; 6];
        sink.read_at(&mut seen, 0).unwrap();
        assert_eq!(seen, [0xff; 6]);
        map.forget(4096).unwrap();
        let mut kept = [0; 6];
        backing.read_at(&mut kept, 4096).unwrap();
        assert_eq!(&kept, b"secret");
    }

    #[test]
    fn a_covered_map_comes_back() {
        let backing = file(8192);
        backing.write_at(b"secret", 4096).unwrap();
        let mut map = GuestMap::new(&backing, 0, 8192, 0, true).unwrap();
        let sink = file(0);
        let seen = |map: &GuestMap| {
            // SAFETY: as above.
            let n = unsafe {
                libc::pwrite(sink.as_raw_fd(), (map.host_address() + 4096) as *const libc::c_void, 6, 0)
            };
            let mut seen = [0; 6];
            sink.read_at(&mut seen, 0).unwrap();
            (n == 6).then_some(seen)
        };
        map.cover().unwrap();
        assert_eq!(seen(&map), None);
        map.fill_with_ones(4096).unwrap();
        assert_eq!(seen(&map), Some([0xff; 6]));
        map.uncover().unwrap();
        assert_eq!(seen(&map).as_ref(), Some(b"secret"));
    }
}
