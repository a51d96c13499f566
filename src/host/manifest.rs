//! Where guest material lies below its root, and the records that say what it is.
//!
//! Material is what guests and the software KVM host are made of and what this project does not build: kernels,
//! QEMU, and the user programs of guests. `cargo xtask fetch` writes it and the monitor reads it, so both
//! compile this file.
//!
//! ```text
//! material/manifest.json              every item, for people and scripts
//! material/kernels/NAME/vmlinuz       bzImage, beside config and System.map
//! material/kernels/NAME/lib/modules/  the modules, as the distribution packs them
//! material/qemu/ material/tools/      small system roots: programs with their own libraries and loader
//! material/*/item.json                the record of one item
//! ```
//!
//! An item is renamed into place when it is complete, with its record inside: a directory that has a record is
//! whole.

use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// File name of an item's record, inside the item's directory.
pub const ITEM_FILE: &str = "item.json";

/// File name of the list of all items, in the root of the material.
pub const MANIFEST_FILE: &str = "manifest.json";

/// Directory of the kernels, below the root of the material.
pub const KERNELS_DIR: &str = "kernels";

/// Name of the kernel that guests get when none is named.
pub const DEFAULT_KERNEL: &str = "6.12";

/// Name of the kernel that the software KVM host itself runs.
pub const NESTED_KERNEL: &str = "6.12-plain";

/// Name of the item that holds QEMU.
pub const QEMU: &str = "qemu";

/// Name of the item that holds the programs for guests.
pub const TOOLS: &str = "tools";

/// The dynamic loader inside an item that is a system root.
pub const LOADER: &str = "usr/lib64/ld-linux-x86-64.so.2";

/// The library directory inside an item that is a system root.
pub const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";

/// The directories with programs inside an item that is a system root, in the order in which they are searched.
pub const PROGRAM_DIRS: [&str; 2] = ["usr/bin", "usr/sbin"];

/// The record of one item.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Item {
    /// The name the item is asked for by: `6.12`, `qemu`.
    pub name: String,
    /// What it is for, in one line.
    pub purpose: String,
    /// The release of the distribution that it came from: `trixie`.
    pub suite: String,
    /// Version: the kernel's release (`uname -r`), or the version of the first package.
    pub version: String,
    /// Every package in it.
    pub packages: Vec<Package>,
    /// SHA-256 over the unpacked tree (every path, kind and content), in hexadecimal.
    pub tree_sha256: String,
}

/// One package of the distribution, as it was downloaded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Package {
    /// Package name.
    pub name: String,
    /// Package version.
    pub version: String,
    /// SHA-256 of the package file, in hexadecimal. It was checked against the signed index.
    pub sha256: String,
    /// Size of the package file, in bytes.
    pub size: u64,
}

/// Every item that is there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The items, sorted by name.
    pub items: Vec<Item>,
}

/// The directory of the item `name` below `root`. Names that begin with a digit are kernels.
pub fn item_dir(root: &Path, name: &str) -> PathBuf {
    if name.starts_with(|c: char| c.is_ascii_digit()) {
        root.join(KERNELS_DIR).join(name)
    } else {
        root.join(name)
    }
}

/// Reads the record of the item `name`; `None` if the item is not there, or not complete.
pub fn read_item(root: &Path, name: &str) -> Option<Item> {
    let text = std::fs::read(item_dir(root, name).join(ITEM_FILE)).ok()?;
    let item: Item = serde_json::from_slice(&text).ok()?;
    (item.name == name).then_some(item)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_and_roots_lie_apart() {
        let root = Path::new("/m");
        assert_eq!(item_dir(root, "6.12-plain"), Path::new("/m/kernels/6.12-plain"));
        assert_eq!(item_dir(root, "7.x"), Path::new("/m/kernels/7.x"));
        assert_eq!(item_dir(root, "qemu"), Path::new("/m/qemu"));
    }

    #[test]
    fn a_directory_without_a_record_is_no_item() {
        assert_eq!(read_item(Path::new("/nonexistent"), "qemu"), None);
    }
}
