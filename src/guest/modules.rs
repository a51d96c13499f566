//! Kernel modules: which files a list of names comes to, in the order in which they are loaded.
//!
//! Everything is read from the modules themselves (section `.modinfo`: `depends`, `softdep`, `alias`)
//! and from `modules.builtin`, so a kernel works straight from its package, before anybody has
//! run depmod(8) over it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::elf;

/// How module files may be named, by compression.
const SUFFIXES: [&str; 4] = [".ko", ".ko.xz", ".ko.zst", ".ko.gz"];
/// Soft dependencies on an algorithm of the crypto API, and the modules that may provide it.
const ALGORITHMS: [(&str, &[&str]); 1] = [("crc32c", &["crc32c_generic", "crc32c_intel"])];

/// Modules that cannot be had.
#[derive(Debug, Error)]
pub enum ModuleError {
    /// There is no directory with the kernel's modules.
    #[error(
        "No modules for kernel {release} in {}: name their directory with --modules DIR, or boot without the agent \
         (--no-agent)",
        looked.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
    )]
    NoDirectory {
        /// The kernel's release.
        release: String,
        /// Where they were looked for.
        looked: Vec<PathBuf>,
    },
    /// A module is needed and the kernel does not have it.
    #[error(
        "The kernel has no module `{name}`, neither built in nor in {}{}: build the kernel with it, or name the right \
         directory with --modules DIR",
        directory.display(),
        needed_by.as_ref().map(|name| format!(" (needed by `{name}`)")).unwrap_or_default()
    )]
    Missing {
        /// The module.
        name: String,
        /// The directory of modules.
        directory: PathBuf,
        /// The module that depends on it, if it was not asked for.
        needed_by: Option<String>,
    },
    /// A file cannot be read or decompressed.
    #[error("Cannot read the modules: {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file is not a module.
    #[error("{} is not a kernel module for x86-64", .0.display())]
    NotAModule(PathBuf),
}

/// A directory of modules, `/lib/modules/RELEASE`.
#[derive(Debug)]
pub struct ModuleTree {
    directory: PathBuf,
    /// Files by the name of their module, relative to the directory.
    files: BTreeMap<String, PathBuf>,
    builtin: BTreeSet<String>,
}

/// A module to put into a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Module {
    /// Its name, with `_` for `-`.
    pub name: String,
    /// Its path below `/lib/modules/RELEASE`, ending in `.ko`.
    pub path: PathBuf,
    /// The decompressed file.
    pub image: Vec<u8>,
    /// Names of the modules that must be loaded before it.
    pub depends: Vec<String>,
    /// What the kernel asks for when it wants this module.
    pub aliases: Vec<String>,
    /// Release of the kernel that it was built for (the first word of `vermagic`); empty if it does not say.
    pub release: String,
}

/// The name of a module as the kernel writes it: `-` and `_` are the same.
pub fn normalize(name: &str) -> String {
    name.replace('-', "_")
}

fn is_module_directory(directory: &Path) -> bool {
    directory.join("modules.builtin").is_file() || directory.join("modules.order").is_file()
}

/// The modules of the kernel `image` of this `release`: in `named` if the user has named a directory,
/// else beside the image, as packages lay it out, else the host's own.
///
/// # Errors
/// They are in none of these places.
pub fn find(image: &Path, release: &str, named: Option<&Path>) -> Result<PathBuf, ModuleError> {
    let below =
        |root: &Path| [root.join("lib/modules").join(release), root.join("usr/lib/modules").join(release)];
    let mut looked = Vec::new();
    match named {
        Some(named) => {
            looked.extend([named.to_path_buf(), named.join(release)]);
            looked.extend(below(named));
        }
        None => {
            let image = fs::canonicalize(image).unwrap_or_else(|_| image.to_path_buf());
            for root in image.ancestors().skip(1).take(2) {
                looked.extend(below(root));
            }
            // Some distributions keep the image with its modules.
            looked.extend(image.parent().filter(|parent| parent.ends_with(release)).map(Path::to_path_buf));
            looked.extend(below(Path::new("/")));
        }
    }
    let found = looked.iter().find(|path| is_module_directory(path)).cloned();
    found.ok_or_else(|| ModuleError::NoDirectory { release: release.into(), looked })
}

impl ModuleTree {
    /// Lists the modules in a directory.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn open(directory: &Path) -> Result<ModuleTree, ModuleError> {
        let mut files = BTreeMap::new();
        let mut directories = vec![PathBuf::new()];
        while let Some(relative) = directories.pop() {
            let path = directory.join(&relative);
            let read = |source| ModuleError::Read { path: path.clone(), source };
            for entry in fs::read_dir(&path).map_err(read)? {
                let entry = entry.map_err(read)?;
                let relative = relative.join(entry.file_name());
                // `build` and `source` are links to somewhere else.
                if entry.file_type().map_err(read)?.is_dir() {
                    directories.push(relative);
                } else if let Some(name) = module_name(&relative) {
                    files.insert(name, relative);
                }
            }
        }
        let path = directory.join("modules.builtin");
        let builtin = match fs::read_to_string(&path) {
            Ok(text) => text.lines().filter_map(|line| module_name(Path::new(line))).collect(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => BTreeSet::new(),
            Err(source) => return Err(ModuleError::Read { path, source }),
        };
        Ok(ModuleTree { directory: directory.into(), files, builtin })
    }

    /// The kernel has this module, in itself or as a file.
    pub fn has(&self, name: &str) -> bool {
        let name = normalize(name);
        self.builtin.contains(&name) || self.files.contains_key(&name)
    }

    /// The files that `name` comes to, those that must be loaded first in front, without
    /// what is built in and what is in `modules` already, to which they are added.
    ///
    /// # Errors
    /// A module is missing or damaged.
    pub fn add(&self, name: &str, modules: &mut Vec<Module>) -> Result<(), ModuleError> {
        self.add_for(&normalize(name), None, modules, &mut BTreeSet::new())
    }

    fn add_for(
        &self,
        name: &str,
        needed_by: Option<&str>,
        modules: &mut Vec<Module>,
        on_the_way: &mut BTreeSet<String>,
    ) -> Result<(), ModuleError> {
        let there = self.builtin.contains(name) || modules.iter().any(|module| module.name == name);
        if there || !on_the_way.insert(name.to_owned()) {
            return Ok(());
        }
        let file = self.files.get(name).ok_or_else(|| ModuleError::Missing {
            name: name.into(),
            directory: self.directory.clone(),
            needed_by: needed_by.map(str::to_owned),
        })?;
        let image = self.read(file)?;
        let info = elf::section(&image, ".modinfo")
            .ok_or_else(|| ModuleError::NotAModule(self.directory.join(file)))?;
        let text = String::from_utf8_lossy(info);
        let values = |key: &str| -> Vec<String> {
            let pairs = text.split('\0').filter_map(|pair| pair.split_once('='));
            pairs.filter(|(this, _)| *this == key).map(|(_, value)| value.to_owned()).collect()
        };
        let listed = values("depends").join(",");
        let mut depends: Vec<String> =
            listed.split(',').filter(|name| !name.is_empty()).map(normalize).collect();
        let aliases = values("alias");
        let magic = values("vermagic").join("");
        let release = magic.split_whitespace().next().unwrap_or_default().to_owned();
        let soft = values("softdep");
        let (before, after) = soft_dependencies(&soft);
        for dependency in &depends {
            self.add_for(dependency, Some(name), modules, on_the_way)?;
        }
        for wanted in before.iter().flat_map(|wanted| self.providers(wanted)) {
            self.add_for(&wanted, Some(name), modules, on_the_way)?;
        }
        depends.retain(|dependency| !self.builtin.contains(dependency));
        modules.push(Module {
            name: name.into(),
            path: uncompressed_path(file),
            image,
            depends,
            aliases,
            release,
        });
        for wanted in after.iter().flat_map(|wanted| self.providers(wanted)) {
            self.add_for(&wanted, Some(name), modules, on_the_way)?;
        }
        Ok(())
    }

    /// The modules of this kernel that a soft dependency may mean. None is no error: it is a wish.
    fn providers(&self, name: &str) -> Vec<String> {
        let name = normalize(name);
        if self.files.contains_key(&name) {
            return vec![name];
        }
        // The alias of an algorithm has a prefix, and so have soft dependencies of 6.1.
        let wanted = name.strip_prefix("crypto_").unwrap_or(&name);
        let known = ALGORITHMS.iter().find(|(algorithm, _)| *algorithm == wanted);
        let known = known.map(|(_, modules)| *modules).unwrap_or_default();
        if known.iter().any(|module| self.builtin.contains(*module)) {
            return Vec::new();
        }
        let present = known.iter().find(|module| self.files.contains_key(**module));
        present.map(|module| module.to_string()).into_iter().collect()
    }

    fn read(&self, file: &Path) -> Result<Vec<u8>, ModuleError> {
        let path = self.directory.join(file);
        let read = || {
            let bytes = fs::read(&path)?;
            decompress(&path, bytes)
        };
        read().map_err(|source| ModuleError::Read { path: path.clone(), source })
    }
}

/// `modules.dep` and `modules.alias` for these modules, so that modprobe(8) finds them in the guest.
pub fn index(modules: &[Module]) -> (String, String) {
    let (mut dependencies, mut aliases) = (String::new(), String::new());
    let path = |name: &String| modules.iter().find(|module| module.name == *name).map(|module| &module.path);
    for module in modules {
        let _ = write!(dependencies, "{}:", module.path.display());
        // All that must be there, what is needed last in front.
        let mut all: Vec<&String> = Vec::new();
        let mut left: Vec<&String> = module.depends.iter().rev().collect();
        while let Some(name) = left.pop() {
            all.retain(|there| *there != name);
            all.push(name);
            let further = modules.iter().find(|module| module.name == *name);
            left.extend(further.into_iter().flat_map(|module| &module.depends));
        }
        for path in all.into_iter().filter_map(path) {
            let _ = write!(dependencies, " {}", path.display());
        }
        dependencies.push('\n');
        for alias in &module.aliases {
            let _ = writeln!(aliases, "alias {alias} {}", module.name);
        }
    }
    (dependencies, aliases)
}

fn module_name(path: &Path) -> Option<String> {
    let name = path.file_name()?.to_str()?;
    SUFFIXES.iter().find_map(|suffix| name.strip_suffix(suffix)).map(normalize)
}

fn uncompressed_path(path: &Path) -> PathBuf {
    let text = path.to_string_lossy();
    let stem = SUFFIXES.iter().find_map(|suffix| text.strip_suffix(suffix)).unwrap_or(&text);
    format!("{stem}.ko").into()
}

/// `pre: a b post: c` taken apart.
fn soft_dependencies(texts: &[String]) -> (Vec<String>, Vec<String>) {
    let (mut before, mut after) = (Vec::new(), Vec::new());
    for text in texts {
        let mut into = None;
        for word in text.split_whitespace() {
            match (word, &mut into) {
                ("pre:", _) => into = Some(false),
                ("post:", _) => into = Some(true),
                (name, Some(true)) => after.push(name.to_owned()),
                (name, Some(false)) => before.push(name.to_owned()),
                (_, None) => {}
            }
        }
    }
    (before, after)
}

fn decompress(path: &Path, bytes: Vec<u8>) -> io::Result<Vec<u8>> {
    let mut out = Vec::new();
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => lzma_rust2::XzReader::new(&bytes[..], true).read_to_end(&mut out)?,
        Some("zst") => ruzstd::decoding::StreamingDecoder::new(&bytes[..])
            .map_err(io::Error::other)?
            .read_to_end(&mut out)?,
        Some("gz") => flate2::read::GzDecoder::new(&bytes[..]).read_to_end(&mut out)?,
        _ => return Ok(bytes),
    };
    Ok(out)
}

#[cfg(test)]
#[path = "modules_test.rs"]
pub(super) mod tests;
