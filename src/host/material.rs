//! Where kernels, QEMU and guest programs are.
//!
//! `cargo xtask fetch` puts them under `target/material`. They are looked for in `$ACONITE_MATERIAL`, then there, going
//! up from the executable and from the working directory; QEMU and guest programs are then looked for on the host.

use super::manifest::{self, Item, LIBRARIES, LOADER, MANIFEST_FILE, PROGRAM_DIRS};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// How to get what is missing.
pub const FETCH_REMEDY: &str = "cargo xtask fetch, or set ACONITE_MATERIAL to a directory that has it";

/// A directory of material.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Material {
    root: PathBuf,
}

/// A kernel that was fetched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// The name that it is asked for by: `6.12`.
    pub name: String,
    /// What `uname -r` prints in it.
    pub release: String,
    /// The bzImage.
    pub image: PathBuf,
    /// The directory of its modules: `.../lib/modules/RELEASE`.
    pub modules: PathBuf,
}

/// Programs that run with their own libraries and loader, independent of the host's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SystemRoot {
    /// The directory that takes the place of `/`.
    pub dir: PathBuf,
    /// Its record.
    pub item: Item,
}

impl Material {
    /// Finds the material of this process; `None` if nothing was fetched.
    pub fn find() -> Option<Self> {
        let exe = std::env::current_exe().ok();
        let cwd = std::env::current_dir().ok();
        Self::search(std::env::var_os("ACONITE_MATERIAL").as_deref(), exe.as_deref(), cwd.as_deref())
    }

    fn search(set: Option<&OsStr>, exe: Option<&Path>, cwd: Option<&Path>) -> Option<Self> {
        if let Some(dir) = set.filter(|dir| !dir.is_empty()) {
            return Self::at(PathBuf::from(dir));
        }
        let above = |start: Option<&Path>, below: &'static str| {
            start.into_iter().flat_map(Path::ancestors).map(move |dir| dir.join(below)).find_map(Self::at)
        };
        above(exe, "material")
            .or_else(|| above(exe, "target/material"))
            .or_else(|| above(cwd, "target/material"))
    }

    /// The material in `root`; `None` if there is none. Its paths are without links and `..`, so that every process
    /// names the same things alike: the software KVM host is found by them.
    pub fn at(root: PathBuf) -> Option<Self> {
        let root = std::fs::canonicalize(root).ok()?;
        root.join(MANIFEST_FILE).is_file().then_some(Material { root })
    }

    /// The directory itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The kernel called `name` (`6.12`, `7.x`).
    pub fn kernel(&self, name: &str) -> Option<Kernel> {
        if name.contains('/') {
            return None;
        }
        let item = manifest::read_item(&self.root, name)?;
        let dir = manifest::item_dir(&self.root, name);
        let image = dir.join("vmlinuz");
        image.is_file().then(|| Kernel {
            name: item.name,
            image,
            modules: dir.join("lib/modules").join(&item.version),
            release: item.version,
        })
    }

    /// Every kernel that is here, by name.
    pub fn kernels(&self) -> Vec<Kernel> {
        let Ok(entries) = std::fs::read_dir(self.root.join(manifest::KERNELS_DIR)) else { return Vec::new() };
        let mut names: Vec<String> = entries.filter_map(|e| e.ok()?.file_name().into_string().ok()).collect();
        names.sort();
        names.iter().filter_map(|name| self.kernel(name)).collect()
    }

    /// The programs for guests.
    pub fn tools(&self) -> Option<SystemRoot> {
        self.system_root(manifest::TOOLS)
    }

    /// QEMU.
    pub fn qemu(&self) -> Option<SystemRoot> {
        self.system_root(manifest::QEMU)
    }

    fn system_root(&self, name: &str) -> Option<SystemRoot> {
        let item = manifest::read_item(&self.root, name)?;
        Some(SystemRoot { dir: manifest::item_dir(&self.root, name), item })
    }
}

impl SystemRoot {
    /// The program called `name`.
    pub fn program(&self, name: &str) -> Option<PathBuf> {
        PROGRAM_DIRS.iter().map(|dir| self.dir.join(dir).join(name)).find(|path| path.is_file())
    }

    /// The directory of the libraries.
    pub fn libraries(&self) -> PathBuf {
        self.dir.join(LIBRARIES)
    }

    /// The dynamic loader.
    pub fn loader(&self) -> PathBuf {
        self.dir.join(LOADER)
    }

    /// A command that runs the program called `name` with the loader and libraries of this root. The program must be
    /// linked dynamically.
    pub fn command(&self, name: &str) -> Option<Command> {
        let program = self.program(name)?;
        let mut command = Command::new(self.loader());
        command.arg("--argv0").arg(name).arg("--library-path").arg(self.libraries()).arg(program);
        Some(command)
    }

    /// The version of the package called `name`, as Debian numbers it.
    pub fn package_version(&self, name: &str) -> Option<&str> {
        self.item.packages.iter().find(|package| package.name == name).map(|package| package.version.as_str())
    }
}

/// A QEMU that can carry the software KVM host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Qemu {
    source: Source,
    /// Its version: `10.0.13`.
    pub version: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Source {
    Fetched(SystemRoot),
    Host(PathBuf),
}

/// The name of QEMU's program.
const QEMU_PROGRAM: &str = "qemu-system-x86_64";

impl Qemu {
    /// The fetched QEMU, else the host's.
    pub fn find(material: Option<&Material>) -> Option<Self> {
        let sources = material.and_then(Material::qemu).map(Source::Fetched).into_iter();
        sources.chain(find_on_path(QEMU_PROGRAM).map(Source::Host)).find_map(|source| {
            let version = match &source {
                Source::Fetched(root) => first_number(root.package_version("qemu-system-x86")?)?,
                Source::Host(program) => {
                    let output = Command::new(program).arg("--version").stdin(Stdio::null()).output().ok()?;
                    first_number(&String::from_utf8_lossy(&output.stdout))?
                }
            };
            Some(Qemu { source, version })
        })
    }

    /// A command that starts it, without arguments of the caller.
    pub fn command(&self) -> Option<Command> {
        match &self.source {
            Source::Host(program) => Some(Command::new(program)),
            Source::Fetched(root) => {
                let mut command = root.command(QEMU_PROGRAM)?;
                command.env("QEMU_MODULE_DIR", root.libraries().join("qemu"));
                for data in ["usr/share/qemu", "usr/share/seabios"] {
                    command.arg("-L").arg(root.dir.join(data));
                }
                Some(command)
            }
        }
    }

    /// The program file.
    pub fn program(&self) -> Option<PathBuf> {
        match &self.source {
            Source::Host(program) => Some(program.clone()),
            Source::Fetched(root) => root.program(QEMU_PROGRAM),
        }
    }
}

/// The program called `name` on the host.
pub fn find_on_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    // Administration programs are not on every user's path.
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|path| path.is_file())
}

/// The first dotted number in `text`, past an epoch: `10.0.13` of `1:10.0.13+ds-0+deb13u1`.
pub fn first_number(text: &str) -> Option<String> {
    let text = match text.split_once(':') {
        Some((epoch, rest)) if !epoch.is_empty() && epoch.bytes().all(|b| b.is_ascii_digit()) => rest,
        _ => text,
    };
    // Not the digit of a name such as mke2fs.
    let bytes = text.as_bytes();
    let start = (0..bytes.len()).find(|&at| {
        let inside_word = at > 0 && bytes[at - 1].is_ascii_alphanumeric() && bytes[at - 1] != b'v';
        bytes[at].is_ascii_digit() && !inside_word
    })?;
    let number = &text[start..];
    let end = number.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(number.len());
    Some(number[..end].trim_end_matches('.').to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn put_item(root: &Path, name: &str, version: &str) -> PathBuf {
        let dir = manifest::item_dir(root, name);
        fs::create_dir_all(&dir).unwrap();
        let item = Item {
            name: name.into(),
            purpose: String::new(),
            suite: String::new(),
            version: version.into(),
            packages: vec![],
            tree_sha256: String::new(),
        };
        fs::write(dir.join(manifest::ITEM_FILE), serde_json::to_string(&item).unwrap()).unwrap();
        fs::write(root.join(MANIFEST_FILE), "{\"items\":[]}").unwrap();
        dir
    }

    #[test]
    fn the_variable_wins_over_the_places_above() {
        let dir = tempfile::tempdir().unwrap();
        let near = dir.path().join("w/target/material");
        put_item(&near, "qemu", "1");
        let exe = dir.path().join("w/target/debug/aconite");
        assert_eq!(Material::search(None, Some(&exe), None), Some(Material { root: near.clone() }));
        let cwd = dir.path().join("w/src");
        assert_eq!(
            Material::search(None, Some(Path::new("/bin/x")), Some(&cwd)),
            Some(Material { root: near })
        );
        assert_eq!(Material::search(Some(OsStr::new("/nonexistent")), Some(&exe), Some(&cwd)), None);
        assert_eq!(Material::search(None, Some(Path::new("/bin/x")), None), None);
    }

    #[test]
    fn kernels_are_found_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let kernel = put_item(dir.path(), "6.12", "6.12.9-test");
        let material = Material::at(dir.path().to_owned()).unwrap();
        assert_eq!(material.kernel("6.12"), None, "no image");
        fs::write(kernel.join("vmlinuz"), "").unwrap();
        let found = material.kernel("6.12").unwrap();
        assert_eq!(found.release, "6.12.9-test");
        assert_eq!(found.modules, kernel.join("lib/modules/6.12.9-test"));
        assert_eq!(material.kernels(), [found]);
        assert_eq!(material.kernel("../6.12"), None);
        assert_eq!(material.kernel("5.4"), None);
    }

    #[test]
    fn numbers_in_versions() {
        for (text, number) in [
            ("1:10.0.13+ds-0+deb13u1", "10.0.13"),
            ("QEMU emulator version 7.2.9 (Debian 1:7.2+dfsg-7)", "7.2.9"),
            ("81-1", "81"),
            ("v1.", "1"),
            ("mke2fs 1.47.0 (5-Feb-2023)", "1.47.0"),
            ("bookworm 12é3 4", "12"),
        ] {
            assert_eq!(first_number(text).as_deref(), Some(number), "{text}");
        }
        assert_eq!(first_number("none"), None);
    }
}
