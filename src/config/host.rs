//! What this host says to the description: files and memory. Nothing is changed here.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use super::dimm::Labels;
use super::disk::check_size as check_disk_size;
use super::error::{ConfigError, Warning};
use super::image::{self, KernelImage};
use super::topology::check_shares;
use super::validate::{check_size, refuse_overlaps, same_file};
use super::{Disk, Machine, Place, Pmem, PmemSource, Unflushed};
use crate::memory::backing::huge_page;
use crate::units::{Address, Size};

/// What was learnt about the host's files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checked {
    /// The kernel file.
    pub kernel: KernelImage,
    /// The devices, in the order of the description.
    pub pmem: Vec<CheckedPmem>,
    /// The disks, in the order of the description.
    pub disk: Vec<CheckedPmem>,
    /// What is odd, but accepted.
    pub warnings: Vec<Warning>,
}

/// A device whose size is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CheckedPmem {
    /// Size of the device.
    pub size: Size,
    /// Whether its file is missing and has to be created, sparse and of that size.
    pub create: bool,
}

impl Machine {
    /// Looks at every file that the description names, and at the host's memory.
    ///
    /// # Errors
    /// The first thing that would keep the machine from being built.
    pub fn check_host(&self) -> Result<Checked, ConfigError> {
        let kernel = image::inspect(&self.kernel)?;
        if let Some(initrd) = &self.initrd
            && regular_file("--initrd", initrd)?.len() == 0
        {
            return Err(ConfigError::invalid(
                "--initrd",
                initrd.display(),
                "it is empty",
                "name a cpio archive, or leave it out",
            ));
        }
        if let Some(modules) = &self.modules {
            directory("--modules", modules, "name the directory …/lib/modules/VERSION")?;
        }
        for file in &self.files {
            regular_file("--file", &file.source)?;
        }
        if let Some(socket) = &self.api_socket {
            let parent = match socket.parent() {
                Some(parent) if !parent.as_os_str().is_empty() => parent,
                _ => Path::new("."),
            };
            directory("--api-socket", parent, "make this directory first, or choose another")?;
        }
        self.check_memory(host_memory())?;

        let mut checked = Checked { kernel, pmem: Vec::new(), disk: Vec::new(), warnings: Vec::new() };
        let mut seen: Vec<(String, (u64, u64))> = Vec::new();
        for pmem in &self.pmem {
            let option = format!("--pmem {}", pmem.id);
            let (device, inode) = pmem.check_file(&option, &mut checked.warnings)?;
            self.refuse_shared(&option, &pmem.id, &pmem.source, inode, &mut seen)?;
            checked.pmem.push(device);
        }
        for disk in &self.disk {
            let (device, inode) = disk.check_file()?;
            self.refuse_shared(&disk.option(), &disk.id, &disk.source, inode, &mut seen)?;
            checked.disk.push(device);
        }
        let placed: Vec<(String, u64, u64)> = self
            .pmem
            .iter()
            .zip(&checked.pmem)
            .filter_map(|(pmem, device)| match pmem.at {
                Some(Place::Address(Address(start))) => Some((pmem.id.clone(), start, device.size.bytes())),
                _ => None,
            })
            .collect();
        refuse_overlaps(&placed)?;
        Ok(checked)
    }

    /// Refuses a file that has another use; `seen` are those that have been looked at.
    fn refuse_shared(
        &self,
        option: &str,
        id: &str,
        source: &PmemSource,
        inode: Option<(u64, u64)>,
        seen: &mut Vec<(String, (u64, u64))>,
    ) -> Result<(), ConfigError> {
        let (Some(inode), PmemSource::File { path, .. }) = (inode, source) else { return Ok(()) };
        if let Some((other, _)) = seen.iter().find(|(_, known)| *known == inode) {
            return Err(same_file(option, &path.display().to_string(), other));
        }
        let is = |other: &Path| fs::metadata(other).is_ok_and(|m| (m.dev(), m.ino()) == inode);
        if is(&self.kernel) || self.initrd.as_deref().is_some_and(is) {
            return Err(ConfigError::invalid(
                format_args!("{option}: file"),
                path.display(),
                "it is the kernel or its initial RAM disk too",
                "give the device a file of its own",
            ));
        }
        seen.push((id.to_owned(), inode));
        Ok(())
    }

    fn check_memory(&self, host: Option<u64>) -> Result<(), ConfigError> {
        match host {
            Some(host) if self.memory.bytes() > host => Err(ConfigError::invalid(
                "--memory",
                self.memory,
                format_args!("this host has {} MiB", host >> 20),
                "give less",
            )),
            _ => Ok(()),
        }
    }
}

impl Pmem {
    /// Looks at the file of one device, as [`Machine::check_host`] does for all. Used when inserting, too.
    ///
    /// # Errors
    /// The file cannot be used as it is.
    pub fn check_host(&self) -> Result<(CheckedPmem, Vec<Warning>), ConfigError> {
        let mut warnings = Vec::new();
        let (checked, _) = self.check_file(&format!("pmem {}", self.id), &mut warnings)?;
        Ok((checked, warnings))
    }

    fn check_file(
        &self,
        option: &str,
        warnings: &mut Vec<Warning>,
    ) -> Result<(CheckedPmem, Option<(u64, u64)>), ConfigError> {
        if let Labels::File(path) = &self.labels {
            regular_file(&format!("{option}: labels"), path)?;
        }
        if let PmemSource::File { path, .. } = &self.source
            && matches!(huge_page(path), Ok(Some(_)))
        {
            if self.unflushed == Unflushed::Drop {
                return Err(ConfigError::invalid(
                    format_args!("{option}: unflushed"),
                    self.unflushed.name(),
                    format_args!(
                        "{} lies on a hugetlbfs, to which no single pages can be written",
                        path.display()
                    ),
                    "leave it out, or put the file on another file system",
                ));
            }
            let message = "it lies on a hugetlbfs, which holds nothing but pages: labels, poison and health of the device end with the machine";
            warnings.push(Warning { thing: format!("{option}: file"), message: message.to_owned() });
        }
        let (checked, inode) =
            check_source(option, &self.source, self.readonly, |size| check_size(option, size, warnings))?;
        check_shares(option, checked.size, self.dimms.count())?;
        Ok((checked, inode))
    }
}

impl Disk {
    /// Looks at the file of one disk, as [`Machine::check_host`] does for all. Used when inserting, too.
    ///
    /// # Errors
    /// The file cannot be used as it is.
    pub fn check_host(&self) -> Result<CheckedPmem, ConfigError> {
        self.check_file().map(|(checked, _)| checked)
    }

    fn check_file(&self) -> Result<(CheckedPmem, Option<(u64, u64)>), ConfigError> {
        let option = self.option();
        check_source(&option, &self.source, self.readonly, |size| check_disk_size(&option, size))
    }
}

/// Looks at what holds a device's bytes; `fits` refuses a size that is a file's length. Device and number of the file,
/// if it exists.
fn check_source(
    option: &str,
    source: &PmemSource,
    readonly: bool,
    fits: impl FnOnce(Size) -> Result<(), ConfigError>,
) -> Result<(CheckedPmem, Option<(u64, u64)>), ConfigError> {
    let (path, size) = match source {
        PmemSource::Memory(size) => return Ok((CheckedPmem { size: *size, create: false }, None)),
        PmemSource::File { path, size } => (path, *size),
    };
    let thing = format!("{option}: file");
    let metadata = match fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return match size {
                Some(size) if !readonly => {
                    let parent = match path.parent() {
                        Some(parent) if !parent.as_os_str().is_empty() => parent,
                        _ => Path::new("."),
                    };
                    directory(&thing, parent, "make this directory first, or choose another file")?;
                    Ok((CheckedPmem { size, create: true }, None))
                }
                Some(_) => Err(ConfigError::invalid(
                    thing,
                    path.display(),
                    "there is no such file, and a read-only one cannot be created",
                    "name a file that exists, or leave readonly=on out",
                )),
                None => Err(ConfigError::invalid(
                    thing,
                    path.display(),
                    "there is no such file",
                    "name one that exists, or give size=SIZE too and it is created",
                )),
            };
        }
        Err(error) => {
            return Err(ConfigError::invalid(thing, path.display(), error, "name a file that can be opened"));
        }
    };
    refuse_odd_file(&thing, path, &metadata)?;
    open_as_used(path, readonly).map_err(|error| {
        let remedy = if readonly {
            "make it readable, or name another"
        } else {
            "make it writable, or give readonly=on"
        };
        ConfigError::invalid(&thing, path.display(), error, remedy)
    })?;
    let length = metadata.len();
    let size = match size {
        Some(size) if size.bytes() > length => {
            return Err(ConfigError::invalid(
                thing,
                path.display(),
                format_args!("it has {} ({length} bytes), less than size={size}", Size(length)),
                format_args!("give size={} or lengthen it: truncate -s {size} FILE", Size(length)),
            ));
        }
        Some(size) => size,
        None => {
            fits(Size(length)).map_err(|error| ConfigError {
                thing,
                value: path.display().to_string(),
                problem: format!("its length is {length} bytes, and {}", error.problem),
                remedy: match error.remedy.strip_prefix("give ") {
                    Some(size) => format!("lengthen it: truncate -s {size} FILE"),
                    None => error.remedy,
                },
                ..error
            })?;
            Size(length)
        }
    };
    Ok((CheckedPmem { size, create: false }, Some((metadata.dev(), metadata.ino()))))
}

fn open_as_used(path: &Path, readonly: bool) -> io::Result<File> {
    OpenOptions::new().read(true).write(!readonly).open(path)
}

fn refuse_odd_file(option: &str, path: &Path, metadata: &Metadata) -> Result<(), ConfigError> {
    let kind = metadata.file_type();
    let what = if kind.is_dir() {
        "it is a directory"
    } else if kind.is_file() {
        return Ok(());
    } else if kind.is_block_device() || kind.is_char_device() {
        "it is a device"
    } else {
        "it is a pipe or a socket"
    };
    Err(ConfigError::invalid(option, path.display(), what, "name a regular file"))
}

fn regular_file(option: &str, path: &Path) -> Result<Metadata, ConfigError> {
    let wrong = |error: io::Error| {
        ConfigError::invalid(option, path.display(), error, "name a file that can be read")
    };
    let metadata = fs::metadata(path).map_err(wrong)?;
    refuse_odd_file(option, path, &metadata)?;
    File::open(path).map_err(wrong)?;
    Ok(metadata)
}

fn directory(option: &str, path: &Path, remedy: &str) -> Result<(), ConfigError> {
    match fs::metadata(path) {
        Ok(metadata) if metadata.is_dir() => Ok(()),
        Ok(_) => Err(ConfigError::invalid(option, path.display(), "it is no directory", remedy)),
        Err(error) => Err(ConfigError::invalid(option, path.display(), error, remedy)),
    }
}

/// The host's RAM in bytes, from `/proc/meminfo`; `None` if that cannot be read.
fn host_memory() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}
