//! What a kernel file is, and whether all of it is there.
//!
//! Only as much is read as tells a good file from a wrong or truncated one before anything is started; loading is
//! the monitor's. Formats: Documentation/arch/x86/boot.rst ("The Real-Mode Kernel Header") and the ELF-64 header.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::error::ConfigError;

/// The format of a kernel file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageKind {
    /// A bzImage with the 64-bit entry.
    BzImage,
    /// An x86-64 ELF executable.
    Elf,
}

/// A kernel file that was looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelImage {
    /// Its format.
    pub kind: ImageKind,
    /// The version that a bzImage carries, such as `6.12.95+deb13-cloud-amd64`: the first word of its text.
    pub version: Option<String>,
}

/// `boot_flag`, the last two bytes of the first sector.
const BOOT_FLAG: u16 = 0xAA55;
/// Offset of `setup_sects`; the header's other offsets are from the boot protocol too.
const SETUP_SECTS: usize = 0x1F1;
const SYSSIZE: usize = 0x1F4;
const BOOT_FLAG_AT: usize = 0x1FE;
const MAGIC_AT: usize = 0x202;
const PROTOCOL: usize = 0x206;
const KERNEL_VERSION: usize = 0x20E;
const XLOADFLAGS: usize = 0x236;
/// `XLF_KERNEL_64`: the image has the 64-bit entry point at 0x200.
const XLF_KERNEL_64: u16 = 1;
/// The first protocol with `xloadflags`.
const MIN_PROTOCOL: u16 = 0x020C;
/// `EM_X86_64`.
const EM_X86_64: u16 = 62;

/// Looks at the kernel file `path`.
///
/// # Errors
/// Names the file, what it is instead, and what would be right.
pub fn inspect(path: &Path) -> Result<KernelImage, ConfigError> {
    let wrong = |problem: &dyn std::fmt::Display, remedy: &str| {
        ConfigError::invalid("--kernel", path.display(), problem, remedy)
    };
    let file = File::open(path).map_err(|error| wrong(&error, "name a kernel file that can be read"))?;
    let metadata = file.metadata().map_err(|error| wrong(&error, "name a kernel file that can be read"))?;
    if metadata.is_dir() {
        return Err(wrong(&"it is a directory", "name the kernel file in it, such as vmlinuz"));
    }
    let mut head = [0; 0x268];
    let length =
        read_head(&file, &mut head).map_err(|error| wrong(&error, "name a kernel file that can be read"))?;
    let head = &head[..length];
    if head.starts_with(b"\x7fELF") {
        return inspect_elf(&file, head, metadata.len()).map_err(|problem| {
            wrong(&problem, "name a whole x86-64 vmlinux or bzImage, copied or downloaded once more")
        });
    }
    let u16_at = |at: usize| head.get(at..at + 2).map(|b| u16::from_le_bytes([b[0], b[1]]));
    if u16_at(BOOT_FLAG_AT) != Some(BOOT_FLAG) || head.get(MAGIC_AT..MAGIC_AT + 4) != Some(b"HdrS") {
        return Err(wrong(
            &format_args!("its {} bytes are neither a bzImage nor an ELF file", metadata.len()),
            "name a bzImage (vmlinuz) or an x86-64 vmlinux",
        ));
    }
    let protocol = u16_at(PROTOCOL).unwrap_or(0);
    let flags = u16_at(XLOADFLAGS).unwrap_or(0);
    if protocol < MIN_PROTOCOL || flags & XLF_KERNEL_64 == 0 {
        return Err(wrong(
            &format_args!(
                "this bzImage (boot protocol {}.{:02}) has no 64-bit entry",
                protocol >> 8,
                protocol & 0xFF
            ),
            "name an x86-64 kernel of version 3.8 or later",
        ));
    }
    let setup_sectors = match head[SETUP_SECTS] {
        0 => 4,
        sectors => u64::from(sectors),
    };
    let paragraphs =
        head.get(SYSSIZE..SYSSIZE + 4).map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    let needed = (setup_sectors + 1) * 512 + u64::from(paragraphs) * 16;
    if metadata.len() < needed {
        return Err(wrong(
            &format_args!("it is truncated: {} bytes of {needed}", metadata.len()),
            "copy or download the kernel once more",
        ));
    }
    let version = match u16_at(KERNEL_VERSION) {
        None | Some(0) => None,
        Some(offset) => read_version(&file, 0x200 + u64::from(offset)),
    };
    Ok(KernelImage { kind: ImageKind::BzImage, version })
}

fn read_head(file: &File, head: &mut [u8]) -> io::Result<usize> {
    let mut length = 0;
    while length < head.len() {
        match file.read_at(&mut head[length..], length as u64) {
            Ok(0) => break,
            Ok(count) => length += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(length)
}

fn read_version(file: &File, offset: u64) -> Option<String> {
    let mut text = [0; 128];
    let length = file.read_at(&mut text, offset).ok()?;
    let text = text[..length].split(|byte| *byte == 0 || byte.is_ascii_whitespace()).next()?;
    if text.is_empty() { None } else { String::from_utf8(text.to_vec()).ok() }
}

/// Checks class, machine and that every loadable segment lies inside the file.
fn inspect_elf(file: &File, head: &[u8], file_length: u64) -> Result<KernelImage, String> {
    let truncated = || format!("it is truncated: only {file_length} bytes are there");
    if head.len() < 64 {
        return Err(truncated());
    }
    let u16_at = |at: usize| u16::from_le_bytes([head[at], head[at + 1]]);
    if head[4] != 2 || head[5] != 1 || u16_at(18) != EM_X86_64 {
        return Err("it is an ELF file, but not for x86-64".to_owned());
    }
    let table = u64::from_le_bytes(head[32..40].try_into().map_err(|_| truncated())?);
    let (entry_size, entries) = (u16_at(54), u16_at(56));
    if entries == 0 || entry_size < 56 {
        return Err("it is an ELF file without program headers: no executable".to_owned());
    }
    for index in 0..u64::from(entries) {
        let mut header = [0; 56];
        let at = table.checked_add(index * u64::from(entry_size)).ok_or_else(truncated)?;
        file.read_exact_at(&mut header, at).map_err(|_| truncated())?;
        let u64_at = |at: usize| header[at..at + 8].iter().rev().fold(0, |sum, b| sum << 8 | u64::from(*b));
        let load = header[..4] == 1_u32.to_le_bytes();
        if load && u64_at(8).checked_add(u64_at(32)).is_none_or(|end| end > file_length) {
            return Err(truncated());
        }
    }
    Ok(KernelImage { kind: ImageKind::Elf, version: None })
}
