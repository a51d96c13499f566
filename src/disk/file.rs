//! A file that holds a disk's bytes.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;

use aconite_devices::virtio::blk::Storage;
use vmm_sys_util::fallocate::{FallocateMode, fallocate};

/// Zeros that are written where a file system cannot make them in another way.
static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];

/// A file as a disk.
#[derive(Debug)]
pub struct FileStorage {
    file: File,
}

impl FileStorage {
    /// The disk whose bytes are those of `file`, from its start on.
    pub fn new(file: File) -> Self {
        Self { file }
    }

    /// Asks the file system; whether it can do that at all.
    fn allocate(&self, mode: FallocateMode, offset: u64, length: u64) -> io::Result<bool> {
        match fallocate(&self.file, mode, true, offset, length).map_err(io::Error::from) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::Unsupported => Ok(false),
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

impl Storage for FileStorage {
    /// What the file has lost at its end reads as zeros: someone else has cut it.
    fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        while done < data.len() {
            match self.file.read_at(&mut data[done..], offset + done as u64) {
                Ok(0) => {
                    data[done..].fill(0);
                    break;
                }
                Ok(count) => done += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, offset)
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn zero(&self, offset: u64, length: u64, unmap: bool) -> io::Result<()> {
        if unmap && self.allocate(FallocateMode::PunchHole, offset, length)? {
            return Ok(());
        }
        if self.allocate(FallocateMode::ZeroRange, offset, length)? {
            return Ok(());
        }
        let mut at = 0;
        while at < length {
            let now = length.saturating_sub(at).min(ZEROS.len() as u64);
            self.file.write_all_at(&ZEROS[..now as usize], offset + at)?;
            at += now;
        }
        Ok(())
    }

    /// A file system that cannot make holes keeps the bytes, as a disk may.
    fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        self.allocate(FallocateMode::PunchHole, offset, length).map(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn storage(bytes: &[u8]) -> FileStorage {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(bytes, 0).unwrap();
        FileStorage::new(file)
    }

    fn bytes(storage: &FileStorage, length: usize) -> Vec<u8> {
        let mut data = vec![1; length];
        storage.read(0, &mut data).unwrap();
        data
    }

    #[test]
    fn zeros_and_holes_change_nothing_else() {
        let disk = storage(&[7; 0x5000]);
        disk.zero(0x1000, 0x200, false).unwrap();
        disk.zero(0x2000, 0x1000, true).unwrap();
        disk.discard(0x4000, 0x1000).unwrap();
        let mut expected = vec![7; 0x5000];
        expected[0x1000..0x1200].fill(0);
        expected[0x2000..0x3000].fill(0);
        let read = bytes(&disk, 0x5000);
        assert_eq!(read[..0x4000], expected[..0x4000]);
        assert!(read[0x4000..].iter().all(|byte| *byte == 0) || read[0x4000..] == expected[0x4000..]);
    }

    #[test]
    fn a_file_that_was_cut_reads_as_zeros() {
        let disk = storage(&[7; 0x1000]);
        disk.file.set_len(0x300).unwrap();
        let read = bytes(&disk, 0x1000);
        assert!(read[..0x300].iter().all(|byte| *byte == 7) && read[0x300..].iter().all(|byte| *byte == 0));
    }
}
