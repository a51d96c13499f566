//! What a kernel image says of itself.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use thiserror::Error;

/// An image whose release is not known.
#[derive(Debug, Error)]
pub enum ImageError {
    /// The file cannot be read.
    #[error("Cannot read the kernel image {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is neither of the two formats, or does not name its release.
    #[error("{} is no Linux kernel image for x86 (bzImage or vmlinux): name one with -k", .0.display())]
    NotAKernel(PathBuf),
}

/// Longest text of a version that is looked at.
const MOST: usize = 256;

/// The release of the kernel, as `uname -r` would print it, such as `6.12.30-cloud-amd64`.
///
/// A bzImage has it where the 16-bit word at offset 0x20E leads, less 0x200
/// (Documentation/arch/x86/boot.rst, `kernel_version`); a vmlinux in its banner, `Linux version ...`.
///
/// # Errors
/// The file cannot be read, or is not a kernel.
pub fn release(path: &Path) -> Result<String, ImageError> {
    let read = |source| ImageError::Read { path: path.into(), source };
    let file = File::open(path).map_err(read)?;
    let mut start = [0; 4];
    let _ = read_at(&file, &mut start, 0).map_err(read)?;
    let text = if start == *b"\x7fELF" {
        banner(BufReader::with_capacity(1 << 20, file)).map_err(read)?
    } else {
        let mut header = [0; 0x210];
        let complete = read_at(&file, &mut header, 0).map_err(read)? == header.len();
        let offset = u64::from(u16::from_le_bytes([header[0x20E], header[0x20F]]));
        if !complete || header[0x202..0x206] != *b"HdrS" || offset == 0 {
            return Err(ImageError::NotAKernel(path.into()));
        }
        let mut text = vec![0; MOST];
        let count = read_at(&file, &mut text, offset + 0x200).map_err(read)?;
        text.truncate(count);
        text
    };
    first_word(&text).ok_or_else(|| ImageError::NotAKernel(path.into()))
}

/// As many bytes as there are.
fn read_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        match file.read_at(&mut buffer[done..], offset + done as u64)? {
            0 => break,
            count => done += count,
        }
    }
    Ok(done)
}

/// What follows `Linux version ` in a file; empty if nothing does.
fn banner(mut reader: impl Read) -> io::Result<Vec<u8>> {
    const START: &[u8] = b"Linux version ";
    let mut window = Vec::new();
    let mut piece = vec![0; 1 << 20];
    loop {
        let count = reader.read(&mut piece)?;
        window.extend_from_slice(&piece[..count]);
        let found = window.windows(START.len()).enumerate().filter(|(_, bytes)| *bytes == START);
        for (at, _) in found {
            let text = &window[at + START.len()..];
            if text.len() < MOST && count > 0 {
                continue;
            }
            // Format strings of the kernel look alike, but go on with a `%`.
            if text.first().is_some_and(u8::is_ascii_digit) {
                return Ok(text[..text.len().min(MOST)].to_vec());
            }
        }
        if count == 0 {
            return Ok(Vec::new());
        }
        window.drain(..window.len().saturating_sub(MOST + START.len()));
    }
}

fn first_word(text: &[u8]) -> Option<String> {
    let word = text.split(|byte| *byte == 0 || byte.is_ascii_whitespace()).next()?;
    let word = std::str::from_utf8(word).ok()?;
    word.starts_with(|c: char| c.is_ascii_digit()).then(|| word.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(bytes: &[u8]) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        file
    }

    #[test]
    fn a_bzimage_names_its_release() {
        let mut bytes = vec![0; 0x1000];
        bytes[0x202..0x206].copy_from_slice(b"HdrS");
        bytes[0x20E..0x210].copy_from_slice(&0x400u16.to_le_bytes());
        let text = b"6.12.30-cloud-amd64 (builder) #1 SMP\0";
        bytes[0x600..0x600 + text.len()].copy_from_slice(text);
        assert_eq!(release(image(&bytes).path()).unwrap(), "6.12.30-cloud-amd64");
        bytes.truncate(0x100);
        assert!(matches!(release(image(&bytes).path()), Err(ImageError::NotAKernel(_))));
    }

    #[test]
    fn a_vmlinux_has_a_banner() {
        let mut bytes = b"\x7fELF".to_vec();
        bytes.resize((1 << 20) - 5, 0);
        bytes.extend_from_slice(b"Linux version %s\0 Linux version 7.1.0-rc3 (me)\0");
        bytes.resize(3 << 20, 0);
        assert_eq!(release(image(&bytes).path()).unwrap(), "7.1.0-rc3");
        assert!(matches!(release(image(b"\x7fELF").path()), Err(ImageError::NotAKernel(_))));
    }

    #[test]
    fn what_is_no_kernel_is_refused() {
        assert!(matches!(release(image(b"").path()), Err(ImageError::NotAKernel(_))));
        assert!(matches!(release(Path::new("/no/such")), Err(ImageError::Read { .. })));
        assert!(matches!(release(Path::new("/")), Err(ImageError::Read { .. })));
    }
}
