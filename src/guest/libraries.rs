//! Shared libraries of the programs that are packed.
//!
//! Programs may come from several roots: the host's own, and roots unpacked from packages of another
//! release. A guest has one set of libraries, so for each name the root with the newest C library
//! that has it wins: libraries of a newer system serve the programs of an older one, since the
//! C library and the names of libraries stand for compatibility in that direction.
//!
//! The usual directories of all distributions are one directory in a guest (links see to it), so that any
//! loader finds any library without a cache.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs;
use std::path::{Component, Path, PathBuf};

use super::elf::{self, Dynamic, Kind};

/// Where loaders look, in the order of Debian's; others have a part of it.
const DIRECTORIES: [&str; 6] =
    ["/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib64", "/usr/lib64", "/lib", "/usr/lib"];
/// The C library, whose version orders the roots.
const C_LIBRARY: &str = "libc.so.6";
/// What glibc loads to end a thread.
const UNWINDER: &str = "libgcc_s.so.1";

/// A directory that holds a system: programs and libraries under their usual paths.
#[derive(Debug)]
pub struct Root {
    path: PathBuf,
    directories: Vec<PathBuf>,
    version: (u32, u32),
}

impl Root {
    /// Looks at the system in this directory; `/` is the host's own.
    pub fn new(path: &Path) -> Root {
        let mut root = Root { path: path.into(), directories: Vec::new(), version: (0, 0) };
        root.configured(Path::new("/etc/ld.so.conf"), 0);
        root.directories.extend(DIRECTORIES.iter().map(PathBuf::from));
        let library = root.find(C_LIBRARY).and_then(|found| fs::read(root.outside(&found)?).ok());
        root.version = library.map(|bytes| newest_version(&bytes)).unwrap_or_default();
        root
    }

    /// Directories that ld.so.conf(5) names, with the files it includes.
    fn configured(&mut self, file: &Path, depth: usize) {
        let text = self.outside(file).and_then(|path| fs::read_to_string(path).ok()).unwrap_or_default();
        for line in text.lines().map(|line| line.split('#').next().unwrap_or_default().trim()) {
            if let Some(pattern) = line.strip_prefix("include").filter(|_| depth < 3) {
                let pattern = PathBuf::from(pattern.trim());
                let (Some(directory), Some(name)) = (pattern.parent(), pattern.file_name()) else { continue };
                let suffix = name.to_string_lossy().trim_start_matches('*').to_owned();
                let listing = self.outside(directory).and_then(|path| fs::read_dir(path).ok());
                let mut names: Vec<_> =
                    listing.into_iter().flatten().flatten().map(|e| e.file_name()).collect();
                names.sort();
                for name in names.iter().filter(|name| name.to_string_lossy().ends_with(&suffix)) {
                    self.configured(&directory.join(name), depth + 1);
                }
            } else if line.starts_with('/') {
                self.directories.push(line.into());
            }
        }
    }

    /// The directory that holds the system.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where a path of the system is outside it, with links resolved inside; `None` if it is not there.
    pub fn outside(&self, inside: &Path) -> Option<PathBuf> {
        let resolved = self.resolve(inside)?;
        Some(self.path.join(resolved.strip_prefix("/").ok()?))
    }

    /// The path with all links resolved inside the system; `None` if it is not there.
    pub fn resolve(&self, inside: &Path) -> Option<PathBuf> {
        let mut left: Vec<PathBuf> = Vec::new();
        let push = |left: &mut Vec<PathBuf>, path: &Path| {
            left.extend(path.components().rev().map(|part| PathBuf::from(part.as_os_str())));
        };
        push(&mut left, inside);
        let mut found = PathBuf::from("/");
        let mut links = 0;
        while let Some(part) = left.pop() {
            match part.components().next() {
                Some(Component::RootDir) => found = "/".into(),
                Some(Component::ParentDir) => drop(found.pop()),
                Some(Component::Normal(name)) => {
                    found.push(name);
                    let outside = self.path.join(found.strip_prefix("/").ok()?);
                    let kind = fs::symlink_metadata(&outside).ok()?.file_type();
                    if kind.is_symlink() {
                        links += 1;
                        if links > 40 {
                            return None;
                        }
                        push(&mut left, &fs::read_link(&outside).ok()?);
                        found.pop();
                    }
                }
                _ => {}
            }
        }
        Some(found)
    }

    /// A library by its name in the usual directories, as a path of the system.
    fn find(&self, name: &str) -> Option<PathBuf> {
        self.find_in(&self.directories, name)
    }

    fn find_in(&self, directories: &[PathBuf], name: &str) -> Option<PathBuf> {
        let usable = |path: &PathBuf| {
            let outside = self.outside(path).filter(|outside| outside.is_file())?;
            let mut start = [0; 20];
            let mut file = fs::File::open(outside).ok()?;
            std::io::Read::read_exact(&mut file, &mut start).ok()?;
            // Libraries for other machines may lie in the same directories.
            (start.starts_with(b"\x7fELF\x02\x01") && start[18] == 62).then_some(())
        };
        directories.iter().map(|directory| directory.join(name)).find(|path| usable(path).is_some())
    }
}

/// The newest version of its interface that a C library has, `GLIBC_x.y`.
fn newest_version(library: &[u8]) -> (u32, u32) {
    const START: &[u8] = b"GLIBC_2.";
    let found = library.windows(START.len() + 3).filter(|bytes| bytes.starts_with(START));
    let minor = found.filter_map(|bytes| {
        let digits: String =
            bytes[START.len()..].iter().take_while(|b| b.is_ascii_digit()).map(|b| char::from(*b)).collect();
        digits.parse().ok()
    });
    (2, minor.max().unwrap_or(0))
}

/// A library for a guest.
#[derive(Debug, PartialEq, Eq)]
pub struct Library {
    /// Where it goes in the guest.
    pub inside: PathBuf,
    /// The file, outside.
    pub file: PathBuf,
}

/// A library that is nowhere.
#[derive(Debug, PartialEq, Eq)]
pub struct MissingLibrary {
    /// Its name.
    pub name: String,
    /// Who needs it.
    pub needed_by: PathBuf,
}

/// Gathers the libraries of programs.
#[derive(Debug)]
pub struct Libraries<'a> {
    /// The newest first.
    roots: Vec<&'a Root>,
    found: BTreeMap<PathBuf, Library>,
    /// Names of loaders, which are there before any library and need not be found.
    loaders: BTreeSet<String>,
}

/// A program or library whose own libraries are still to be found.
struct Open<'a> {
    root: &'a Root,
    /// The path inside its root, with links resolved.
    path: PathBuf,
    dynamic: Dynamic,
    inherited: Vec<PathBuf>,
}

impl<'a> Libraries<'a> {
    /// For programs of these roots.
    pub fn new(roots: &'a [Root]) -> Libraries<'a> {
        let mut roots: Vec<_> = roots.iter().collect();
        roots.sort_by_key(|root| std::cmp::Reverse(root.version));
        Libraries { roots, found: BTreeMap::new(), loaders: BTreeSet::new() }
    }

    /// Adds the loader and all libraries of a program that lies at `path` inside `root`.
    ///
    /// # Errors
    /// A library is nowhere.
    pub fn add(&mut self, root: &'a Root, path: &Path, dynamic: Dynamic) -> Result<(), MissingLibrary> {
        if let Some(loader) = &dynamic.interpreter {
            let name = PathBuf::from(loader);
            let file = self
                .roots
                .iter()
                .chain([&root])
                .find_map(|root| root.outside(&name))
                .ok_or_else(|| MissingLibrary { name: loader.clone(), needed_by: path.into() })?;
            self.loaders.extend(name.file_name().map(|name| name.to_string_lossy().into_owned()));
            self.found.entry(name.clone()).or_insert(Library { inside: name, file });
        }
        let mut open = VecDeque::from([Open { root, path: path.into(), dynamic, inherited: Vec::new() }]);
        while let Some(object) = open.pop_front() {
            let own = object.search();
            let unwinder = object.dynamic.ends_threads.then(|| UNWINDER.to_owned());
            for name in object.dynamic.needed.iter().chain(unwinder.as_ref()) {
                if self.loaders.contains(name) {
                    continue;
                }
                match self.locate(&object, &own, name) {
                    Some((library, found)) => {
                        if !self.found.contains_key(&library.inside) {
                            self.found.insert(library.inside.clone(), library);
                            open.push_back(found);
                        }
                    }
                    None if name == UNWINDER => {}
                    None => {
                        return Err(MissingLibrary { name: name.clone(), needed_by: object.path.clone() });
                    }
                }
            }
        }
        Ok(())
    }

    fn locate(&self, object: &Open<'a>, own: &[PathBuf], name: &str) -> Option<(Library, Open<'a>)> {
        let private = object.root.find_in(own, name);
        let usual = Path::new("/usr/lib").join(name);
        let (root, path, inside) = match private {
            _ if name.contains('/') => (object.root, PathBuf::from(name), PathBuf::from(name)),
            Some(path) => (object.root, path.clone(), path),
            None => self.roots.iter().find_map(|root| Some((*root, root.find(name)?, usual.clone())))?,
        };
        let resolved = root.resolve(&path)?;
        let file = root.outside(&resolved)?;
        let Kind::Elf(dynamic) = elf::inspect(&fs::read(&file).ok()?) else { return None };
        let inherited =
            if object.dynamic.search_is_inherited { own.to_vec() } else { object.inherited.clone() };
        Some((Library { inside, file }, Open { root, path: resolved, dynamic, inherited }))
    }

    /// What has been gathered.
    pub fn into_found(self) -> impl Iterator<Item = Library> {
        self.found.into_values()
    }
}

impl Open<'_> {
    /// Directories that come before the usual ones, for what this object needs.
    fn search(&self) -> Vec<PathBuf> {
        let origin = self.path.parent().unwrap_or(Path::new("/")).to_string_lossy().into_owned();
        let own = self.dynamic.search.iter().filter(|entry| !entry.is_empty()).map(|entry| {
            let mut text = entry.clone();
            for (variable, value) in
                [("ORIGIN", origin.as_str()), ("LIB", "lib/x86_64-linux-gnu"), ("PLATFORM", "x86_64")]
            {
                text =
                    text.replace(&format!("${{{variable}}}"), value).replace(&format!("${variable}"), value);
            }
            PathBuf::from(text)
        });
        own.chain(self.inherited.iter().cloned()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    /// What ldd(1) says: names and files of libraries, with the loader under its path.
    fn ldd(program: &str) -> Vec<(String, PathBuf)> {
        let output = Command::new("ldd").arg(program).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let lines = text.lines().filter_map(|line| {
            let line = line.trim().split(" (").next()?;
            match line.split_once(" => ") {
                Some((name, path)) => Some((name.to_owned(), path.into())),
                None if line.starts_with('/') => Some((line.to_owned(), line.into())),
                None => None,
            }
        });
        lines.collect()
    }

    #[test]
    fn the_libraries_are_those_of_ldd() {
        let roots = [Root::new(Path::new("/"))];
        for program in ["/bin/sh", "/usr/bin/apt-get", "/bin/bash", "/usr/bin/dpkg"] {
            if !Path::new(program).exists() {
                continue;
            }
            let path = roots[0].resolve(Path::new(program)).unwrap();
            let Kind::Elf(dynamic) = elf::inspect(&fs::read(&path).unwrap()) else { panic!("{program}") };
            let mut libraries = Libraries::new(&roots);
            libraries.add(&roots[0], &path, dynamic).unwrap();
            let mut found: Vec<_> =
                libraries.into_found().map(|library| fs::canonicalize(library.file).unwrap()).collect();
            let mut expected: Vec<_> =
                ldd(program).into_iter().map(|(_, path)| fs::canonicalize(path).unwrap()).collect();
            // Loaded at run time, so ldd does not know of it.
            let unwinder = |path: &PathBuf| path.ends_with(UNWINDER);
            if !expected.iter().any(unwinder) {
                found.retain(|path| !unwinder(path));
            }
            found.sort();
            expected.sort();
            assert_eq!(found, expected, "{program}");
        }
    }

    #[test]
    fn a_missing_library_is_named() {
        let empty = tempfile::tempdir().unwrap();
        let roots = [Root::new(empty.path())];
        let dynamic = Dynamic { needed: vec!["libnothing.so.1".into()], ..Dynamic::default() };
        let error = Libraries::new(&roots).add(&roots[0], Path::new("/bin/x"), dynamic).unwrap_err();
        assert_eq!(error, MissingLibrary { name: "libnothing.so.1".into(), needed_by: "/bin/x".into() });
    }

    #[test]
    fn links_stay_inside_a_root() {
        let directory = tempfile::tempdir().unwrap();
        let root = Root::new(directory.path());
        fs::create_dir_all(directory.path().join("usr/bin")).unwrap();
        fs::write(directory.path().join("usr/bin/real"), "").unwrap();
        std::os::unix::fs::symlink("/usr/bin", directory.path().join("bin")).unwrap();
        std::os::unix::fs::symlink("../../../bin/real", directory.path().join("usr/bin/tool")).unwrap();
        std::os::unix::fs::symlink("circle", directory.path().join("circle")).unwrap();
        assert_eq!(root.resolve(Path::new("/bin/tool")).unwrap(), Path::new("/usr/bin/real"));
        assert_eq!(root.outside(Path::new("/bin/tool")).unwrap(), directory.path().join("usr/bin/real"));
        assert_eq!(root.resolve(Path::new("/circle")), None);
        assert_eq!(root.resolve(Path::new("/bin/none")), None);
    }

    #[test]
    fn versions_of_the_c_library_are_ordered() {
        assert_eq!(newest_version(b"..GLIBC_2.9\0GLIBC_2.36\0GLIBC_2.4\0..."), (2, 36));
        assert_eq!(newest_version(b""), (2, 0));
    }
}
