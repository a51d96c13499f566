//! Letting go of an NVDIMM unit where its ACPI container cannot make the kernel do so (Linux from 7.0 on): the driver of
//! its root device is unbound, as an administrator would, and bound again when another unit has come.
//!
//! `aconite-agent unit release PATH START LENGTH…` takes memory of the ranges that the kernel uses as RAM offline first,
//! and gives up where that fails; `unit drop PATH START LENGTH…` unbinds at once; `unit bind PATH` binds. PATH is the
//! root device's name in the ACPI namespace, such as `\_SB_.NV00.NVDR`; START and LENGTH follow for each of its ranges.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::pagemap::number;

/// The name of the command.
pub const COMMAND: &str = "unit";
/// The word for an orderly release.
pub const RELEASE: &str = "release";
/// The word for a release of what is gone already.
pub const DROP: &str = "drop";
/// The word for taking a unit into use.
pub const BIND: &str = "bind";

const ACPI_DEVICES: &str = "/sys/bus/acpi/devices";
const MEMORY_BLOCKS: &str = "/sys/devices/system/memory";
/// `_HID` of a root device, with which its name in sysfs begins.
const ROOT_DEVICE: &str = "ACPI0012";

/// Carries out a command: the words after [`COMMAND`].
///
/// # Errors
/// Why not, in words with a remedy.
pub fn run(words: &[&str]) -> Result<(), String> {
    match *words {
        [word @ (RELEASE | DROP), path, ref ranges @ ..] if ranges.len().is_multiple_of(2) => {
            let ranges = ranges.chunks(2).map(|range| Ok((number(range[0])?, number(range[1])?)));
            let ranges = ranges.collect::<Result<Vec<_>, String>>()?;
            if word == RELEASE {
                ranges.iter().try_for_each(|&(start, length)| take_offline(start, length))?;
            }
            unbind(&root_device(path)?)?;
            let iomem = read("/proc/iomem")?;
            ranges.iter().try_for_each(|&(start, length)| still_used(&iomem, start, length))
        }
        [BIND, path] => bind(&root_device(path)?),
        _ => Err(format!("{words:?} is no command for a unit")),
    }
}

/// The root device's directory in sysfs.
fn root_device(path: &str) -> Result<PathBuf, String> {
    let entries =
        fs::read_dir(ACPI_DEVICES).map_err(|error| format!("Cannot read {ACPI_DEVICES}: {error}"))?;
    let is_it = |dir: &Path| {
        let name = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
        name.starts_with(ROOT_DEVICE)
            && fs::read_to_string(dir.join("path")).is_ok_and(|its| its.trim() == path)
    };
    entries
        .flatten()
        .map(|entry| entry.path())
        .find(|dir| is_it(dir))
        .ok_or_else(|| format!("The kernel has no device {path}: see {ACPI_DEVICES}"))
}

/// The directories of what a driver can be bound to: the platform device (from 7.0 on), and the ACPI device itself.
fn devices(root: &Path) -> impl Iterator<Item = PathBuf> {
    [root.join("physical_node"), root.to_owned()].into_iter().filter_map(|path| fs::canonicalize(path).ok())
}

fn has_driver(device: &Path) -> bool {
    device.join("driver").exists()
}

fn name_of(device: &Path) -> String {
    device.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Without a driver there is nothing that could hold on.
fn unbind(root: &Path) -> Result<(), String> {
    devices(root)
        .filter(|device| has_driver(device))
        .try_for_each(|device| write(&device.join("driver/unbind"), &name_of(&device)))
}

fn bind(root: &Path) -> Result<(), String> {
    for device in devices(root).filter(|device| !has_driver(device)) {
        // No driver may want the one or the other, which is no error yet.
        let _ = write(&device.join("subsystem/drivers_probe"), &name_of(&device));
    }
    if devices(root).any(|device| has_driver(&device)) {
        return Ok(());
    }
    Err(format!("No driver takes {}: load the module nfit", root.display()))
}

/// Takes the memory blocks of a range offline that the kernel uses as RAM.
fn take_offline(start: u64, length: u64) -> Result<(), String> {
    let size = Path::new(MEMORY_BLOCKS).join("block_size_bytes");
    // Without the file there is no memory that comes and goes.
    let Ok(size) = fs::read_to_string(size) else { return Ok(()) };
    let size = u64::from_str_radix(size.trim(), 16).ok().filter(|size| *size > 0);
    let size = size.ok_or("The size of memory blocks cannot be read")?;
    for block in start / size..start.saturating_add(length).div_ceil(size) {
        let state = Path::new(MEMORY_BLOCKS).join(format!("memory{block}/state"));
        if fs::read_to_string(&state).is_ok_and(|state| state.trim() != "offline") {
            write(&state, "offline").map_err(|why| {
                format!("Memory block {block} at {:#x} is in use: {why}; online it movable", block * size)
            })?;
        }
    }
    Ok(())
}

/// An error if the kernel has memory of a range in use, as `/proc/iomem` tells.
fn still_used(iomem: &str, start: u64, length: u64) -> Result<(), String> {
    let end = start.saturating_add(length);
    for line in iomem.lines() {
        let Some((range, name)) = line.split_once(" : ") else { continue };
        let Some((first, last)) = range.trim().split_once('-') else { continue };
        let hex = |digits| u64::from_str_radix(digits, 16).unwrap_or(0);
        let used = ["Persistent Memory", "System RAM", "dax"].iter().any(|kind| name.starts_with(kind));
        if used && hex(first) < end && hex(last) >= start {
            return Err(format!("The kernel still uses {} as {name}: see /proc/iomem", range.trim()));
        }
    }
    Ok(())
}

fn read(path: &str) -> Result<String, String> {
    fs::read_to_string(path).map_err(|error| format!("Cannot read {path}: {error}"))
}

fn write(path: &Path, text: &str) -> Result<(), String> {
    fs::write(path, text)
        .map_err(|error: io::Error| format!("Cannot write {text:?} to {}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const IOMEM: &str = "00001000-0009ffff : System RAM\n140000000-17fffffff : Persistent Memory\n  \
                         140000000-17fffffff : namespace0.0\n180000000-1bfffffff : dax1.0\n  \
                         180000000-1bfffffff : System RAM (kmem)\n";

    #[test]
    fn what_is_still_in_use_is_named() {
        let error = still_used(IOMEM, 0x1_4000_0000, 0x4000_0000).unwrap_err();
        assert_eq!(error, "The kernel still uses 140000000-17fffffff as Persistent Memory: see /proc/iomem");
        assert!(still_used(IOMEM, 0x1_8000_0000, 0x4000_0000).unwrap_err().contains("dax1.0"));
        assert_eq!(still_used(IOMEM, 0x1_c000_0000, 0x4000_0000), Ok(()));
    }

    #[test]
    fn wrong_words_are_refused() {
        assert!(run(&["release", "x"]).is_err());
        assert!(run(&["release", "\\_SB_", "zero", "1"]).unwrap_err().contains("no number"));
    }
}
