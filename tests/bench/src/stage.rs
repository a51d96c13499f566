//! The files of a run, put together in one directory that is then copied into the memory of level 1.

use crate::kernel;
use aconite::guest::modules::{Module, ModuleTree};
use aconite::host::manifest;
use aconite::host::material::{FETCH_REMEDY, Material};
use anyhow::{Context, Result, bail};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The kernel of all guests.
const KERNEL: &str = "6.12";
/// What it needs for a disk.
const DISK_DRIVERS: [&str; 2] = ["virtio_pci", "virtio_blk"];

/// What was put together.
#[derive(Debug)]
pub struct Stage {
    /// Where.
    pub dir: PathBuf,
    /// The kernel's modules.
    pub modules: PathBuf,
    /// The kernel's release.
    pub release: String,
    /// Bytes of the monitor's program without symbols.
    pub stripped: u64,
    /// The material that is used inside as it is here.
    pub material: PathBuf,
}

impl Stage {
    /// Puts the files together in `dir`: the monitor `aconite`, the guest's program `guest`, and what was fetched.
    pub fn prepare(dir: &Path, aconite: &Path, guest: &Path) -> Result<Self> {
        let material =
            Material::find().with_context(|| format!("There is no kernel. Remedy: {FETCH_REMEDY}"))?;
        let kernel = material
            .kernel(KERNEL)
            .with_context(|| format!("There is no kernel {KERNEL}. Remedy: {FETCH_REMEDY}"))?;
        let image =
            fs::read(&kernel.image).with_context(|| format!("Cannot read {}", kernel.image.display()))?;
        write(&dir.join("vmlinux"), &kernel::unpack(&image)?)?;
        write(&dir.join("vmlinuz"), &image)?;
        let program = fs::read(guest).with_context(|| format!("Cannot read {}", guest.display()))?;
        write(&dir.join("initrd"), &initramfs(&program, &[]))?;
        let modules = ModuleTree::open(&kernel.modules)?;
        let mut drivers = Vec::new();
        DISK_DRIVERS.iter().try_for_each(|name| modules.add(name, &mut drivers))?;
        write(&dir.join("initrd-disk"), &initramfs(&program, &drivers))?;
        copy(guest, &dir.join("guest"))?;
        copy(&std::env::current_exe().context("Cannot find this program")?, &dir.join("bench"))?;
        let stripped = dir.join("aconite");
        strip(aconite, &stripped)?;
        // Only what QEMU needs: the copy inside is in memory.
        let (root, inside) = (fs::canonicalize(material.root())?, dir.join("material"));
        fs::create_dir(&inside)?;
        for name in [manifest::MANIFEST_FILE, manifest::QEMU] {
            symlink(root.join(name), inside.join(name))?;
        }
        Ok(Stage {
            dir: dir.to_owned(),
            modules: kernel.modules,
            release: kernel.release,
            stripped: fs::metadata(&stripped)?.len(),
            material: root,
        })
    }
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    fs::write(path, bytes).with_context(|| format!("Cannot write {}", path.display()))
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to)
        .map(drop)
        .with_context(|| format!("Cannot copy {} to {}", from.display(), to.display()))
}

fn strip(from: &Path, to: &Path) -> Result<()> {
    let status = Command::new("strip").arg("--strip-all").arg("-o").arg(to).arg(from).status();
    if !status.context("Cannot start strip. Remedy: install binutils")?.success() {
        bail!("Cannot strip {}", from.display());
    }
    Ok(())
}

/// An archive with one program, `/init`, and `modules` as `/0.ko` and so on
/// (Documentation/driver-api/early-userspace/buffer-format.rst). The kernel's own archive has /dev/console.
fn initramfs(program: &[u8], modules: &[Module]) -> Vec<u8> {
    let mut archive = Vec::new();
    let mut entry = |name: &str, mode: u32, data: &[u8]| {
        let fields = [0, mode, 0, 0, 1, 0, data.len() as u32, 0, 0, 0, 0, name.len() as u32 + 1, 0];
        archive.extend_from_slice(b"070701");
        fields.iter().for_each(|field| archive.extend_from_slice(format!("{field:08x}").as_bytes()));
        archive.extend_from_slice(name.as_bytes());
        archive.push(0);
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend_from_slice(data);
        archive.resize(archive.len().next_multiple_of(4), 0);
    };
    entry("init", 0o100_755, program);
    for (number, module) in modules.iter().enumerate() {
        entry(&format!("{number}.ko"), 0o100_644, &module.image);
    }
    entry("TRAILER!!!", 0, &[]);
    archive
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_archive_is_aligned_and_ends() {
        let archive = initramfs(b"program", &[]);
        assert_eq!(archive.len() % 4, 0);
        assert!(archive.starts_with(b"070701") && archive.windows(10).any(|name| name == b"TRAILER!!!"));
        assert_eq!(&archive[116..123], b"program", "110 bytes of header, 5 of name, padding");
    }
}
