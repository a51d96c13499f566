//! Packs an initramfs from files of the host: the agent as PID 1, busybox, programs with their libraries,
//! and the modules that the kernel needs.
//!
//! It is not compressed: the monitor copies it into the guest's memory, and unpacking would cost the
//! guest more than copying.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use aconite_agent::config;
use aconite_agent::protocol::Share;
use aconite_agent::workload;
use thiserror::Error;

use super::AGENT;
use super::cpio::{Tree, TreeError};
use super::elf::{self, Kind};
use super::libraries::{Libraries, Root};
use super::modules::{self, Module, ModuleError, ModuleTree};

/// Where programs are looked for in a root other than the host's own, and in a guest.
const PROGRAM_DIRECTORIES: [&str; 6] =
    ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"];
/// The directories of a guest that are links, so that every usual path of a program or library leads to one place.
const LINKS: [(&str, &str); 6] = [
    ("/bin", "usr/bin"),
    ("/sbin", "usr/sbin"),
    ("/lib", "usr/lib"),
    ("/lib64", "usr/lib"),
    ("/usr/lib64", "lib"),
    ("/usr/lib/x86_64-linux-gnu", "."),
];
/// Small files that programs look for.
const FILES: [(&str, &str); 3] = [
    ("/etc/passwd", "root:x:0:0:root:/root:/bin/sh\n"),
    ("/etc/group", "root:x:0:\ntty:x:5:\n"),
    ("/etc/hosts", "127.0.0.1 localhost\n"),
];
/// What a program brings along if it is there: part of the program's name, a module, a file.
const COMPANIONS: [(&str, Option<&str>, Option<&str>); 6] = [
    ("dmsetup", Some("dm_mod"), None),
    ("dmsetup", Some("dm_mirror"), None),
    ("dmsetup", Some("dm_writecache"), None),
    ("xfs", Some("xfs"), None),
    ("ext4", None, Some("/etc/mke2fs.conf")),
    ("mke2fs", None, Some("/etc/mke2fs.conf")),
];
/// Interpreters of scripts that name interpreters.
const MOST_INTERPRETERS: usize = 4;

/// An initramfs that cannot be packed.
#[derive(Debug, Error)]
pub enum PackError {
    /// Modules cannot be had.
    #[error(transparent)]
    Modules(#[from] ModuleError),
    /// Two things would be at one path.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// There is no busybox.
    #[error(
        "There is no busybox for the guest in {}: install the package busybox-static, or get the guest material \
         (cargo xtask fetch)",
        looked.join(", ")
    )]
    NoBusybox {
        /// Roots in which it was looked for.
        looked: Vec<String>,
    },
    /// busybox does not say what it can do.
    #[error("`{} --list-full` does not list what busybox provides", .0.display())]
    Busybox(PathBuf),
    /// A program is not there.
    #[error("There is no program `{}` for the guest: name a file of this machine, or install it here", .0.display())]
    NoProgram(PathBuf),
    /// A program is of a kind that cannot run.
    #[error("{} is no program for x86-64 Linux", .0.display())]
    NotAProgram(PathBuf),
    /// A program lacks a library.
    #[error("{} needs the library {name}, which is not on this machine: install the package that has it", needed_by.display())]
    NoLibrary {
        /// The library.
        name: String,
        /// The program or library that needs it.
        needed_by: PathBuf,
    },
    /// A file cannot be read.
    #[error("Cannot read {} for the guest", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A module to pack.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModuleRequest {
    /// Its name.
    pub name: String,
    /// It is an error if the kernel does not have it; else it is left out then.
    pub needed: bool,
    /// The agent loads it at the start; else the kernel can ask for it by modprobe(8).
    pub load: bool,
}

impl ModuleRequest {
    fn list(needed: &[&str], wanted: &[&str], on_demand: &[&str]) -> Vec<ModuleRequest> {
        let request =
            |needed, load| move |name: &&str| ModuleRequest { name: (*name).to_owned(), needed, load };
        let needed = needed.iter().map(request(true, true));
        needed
            .chain(wanted.iter().map(request(false, true)))
            .chain(on_demand.iter().map(request(false, false)))
            .collect()
    }
}

/// What to pack.
#[derive(Clone, Debug)]
pub struct Contents {
    /// The kernel's directory of modules ([`modules::find`]); `None` for a kernel that has all it needs built in.
    pub modules: Option<PathBuf>,
    /// Modules, in the order in which they are loaded.
    pub module_requests: Vec<ModuleRequest>,
    /// Pack busybox and its applets.
    pub busybox: bool,
    /// Roots other than the host's own in which programs are looked for first.
    pub roots: Vec<PathBuf>,
    /// Programs to pack, by name or path. They win over busybox.
    pub programs: Vec<PathBuf>,
    /// The program of the command that will be run, by name or path: packed unless the guest has it anyway.
    pub command: Option<PathBuf>,
    /// Files to pack: where they are on the host, and where they go.
    pub files: Vec<(PathBuf, PathBuf)>,
    /// Shares for the agent to mount, in the first-level machine of the nested host.
    pub shares: Vec<Share>,
}

impl Contents {
    /// What a guest needs: the agent's port, NVDIMMs and what stands on them, the panic device.
    pub fn guest(modules: Option<PathBuf>) -> Contents {
        let module_requests = ModuleRequest::list(
            &["virtio_pci", "virtio_console", "nfit", "nd_pmem"],
            &[
                "pvpanic_mmio",
                "nd_btt",
                "dax_pmem",
                "device_dax",
                "virtio_pmem",
                "virtio_blk",
                "nd_e820",
                "dax_hmem",
            ],
            &["ext4", "kmem", "einj"],
        );
        Contents { busybox: true, module_requests, ..Contents::empty(modules) }
    }

    /// What the first-level machine of the nested host needs. The kernel command line must hold
    /// [`config::ROLE_HOST`].
    pub fn nested_host(modules: Option<PathBuf>, shares: Vec<Share>) -> Contents {
        let needed = ["virtio_pci", "virtio_console", "9pnet_virtio", "9p", "overlay", "kvm_amd"];
        Contents {
            module_requests: ModuleRequest::list(&needed, &[], &[]),
            shares,
            ..Contents::empty(modules)
        }
    }

    fn empty(modules: Option<PathBuf>) -> Contents {
        Contents {
            modules,
            module_requests: Vec::new(),
            busybox: false,
            roots: Vec::new(),
            programs: Vec::new(),
            command: None,
            files: Vec::new(),
            shares: Vec::new(),
        }
    }
}

/// A packed initramfs.
#[derive(Debug)]
pub struct Initramfs {
    /// The cpio archive.
    pub bytes: Vec<u8>,
    /// What to run in the guest for [`Contents::command`].
    pub command: Option<PathBuf>,
}

/// Packs an initramfs.
///
/// # Errors
/// Something that is needed is not on the host.
pub fn pack(contents: &Contents) -> Result<Initramfs, PackError> {
    let mut roots: Vec<Root> = contents.roots.iter().map(|path| Root::new(path)).collect();
    roots.push(Root::new(Path::new("/")));
    let mut packer = Packer {
        tree: Tree::default(),
        roots: &roots,
        libraries: Libraries::new(&roots),
        provided: BTreeSet::new(),
        wanted_modules: BTreeSet::new(),
    };
    packer.skeleton()?;
    if contents.busybox {
        packer.busybox()?;
    }
    for program in &contents.programs {
        packer.program(program, false)?;
    }
    let command = contents.command.as_ref().map(|command| packer.program(command, true)).transpose()?;
    for (file, inside) in &contents.files {
        let (mode, data) = read(file)?;
        packer.tree.file(inside, mode, data)?;
    }
    packer.link_applets()?;
    packer.put_libraries()?;
    if let Some(directory) = &contents.modules {
        packer.modules(directory, &contents.module_requests)?;
    }
    if !contents.shares.is_empty() {
        packer.tree.file(Path::new(config::SHARES_FILE), 0o644, config::format_shares(&contents.shares))?;
    }
    Ok(Initramfs { bytes: packer.tree.archive(), command })
}

fn read(path: &Path) -> Result<(u32, Vec<u8>), PackError> {
    let read = || Ok((fs::metadata(path)?.permissions().mode() & 0o7777, fs::read(path)?));
    read().map_err(|source| PackError::Read { path: path.into(), source })
}

struct Packer<'a> {
    tree: Tree,
    /// The host's own root comes last.
    roots: &'a [Root],
    libraries: Libraries<'a>,
    /// What the guest has without a program of the host, the agent and what busybox provides, as paths with the links
    /// of the tree followed.
    provided: BTreeSet<PathBuf>,
    wanted_modules: BTreeSet<&'static str>,
}

const BUSYBOX: &str = "/usr/bin/busybox";

impl<'a> Packer<'a> {
    fn skeleton(&mut self) -> Result<(), PackError> {
        for (link, target) in LINKS {
            self.tree.link(Path::new(link), Path::new(target))?;
        }
        for directory in
            ["/usr/bin", "/usr/sbin", "/root", "/mnt", "/var", "/proc", "/sys", "/dev", "/run", "/tmp"]
        {
            self.tree.directory(Path::new(directory))?;
        }
        self.tree.link(Path::new("/etc/mtab"), Path::new("/proc/self/mounts"))?;
        for (path, text) in FILES {
            self.tree.file(Path::new(path), 0o644, text.into())?;
        }
        self.tree.file(Path::new("/init"), 0o755, AGENT.to_vec())?;
        // The program of the workloads.
        let program = Path::new("/usr/bin").join(workload::PROGRAM);
        self.tree.link(&program, Path::new("/init"))?;
        self.provided.insert(program);
        Ok(())
    }

    fn busybox(&mut self) -> Result<(), PackError> {
        let Some((root, path)) = self.look_up(Path::new("busybox")) else {
            let looked = self.roots.iter().map(|root| root.path().display().to_string()).collect();
            return Err(PackError::NoBusybox { looked });
        };
        let file = root.outside(&path).unwrap_or_else(|| path.clone());
        let output = Command::new(&file).arg("--list-full").output();
        let listing = output.ok().filter(|output| output.status.success() && !output.stdout.is_empty());
        let listing = listing.ok_or(PackError::Busybox(file))?;
        for name in String::from_utf8_lossy(&listing.stdout).lines() {
            self.provided.insert(self.tree.resolve(&Path::new("/").join(name), true)?);
        }
        self.copy_program(root, &path, Path::new(BUSYBOX), 0)
    }

    /// Packs a program; returns what to call it in the guest.
    fn program(&mut self, program: &Path, provided_first: bool) -> Result<PathBuf, PackError> {
        if provided_first && self.is_provided(program)? {
            return Ok(program.into());
        }
        let (root, path) = self.look_up(program).ok_or_else(|| PackError::NoProgram(program.into()))?;
        self.copy_program(root, &path, &path, 0)?;
        Ok(path)
    }

    fn is_provided(&self, program: &Path) -> Result<bool, PackError> {
        if program.is_absolute() {
            return Ok(self.provided.contains(&self.tree.resolve(program, true)?));
        }
        let is_name = program.parent() == Some(Path::new(""));
        Ok(is_name && self.provided.iter().any(|applet| applet.file_name() == Some(program.as_os_str())))
    }

    /// The root that has a program, and its path there. A name is looked for in the usual directories, a path
    /// as it is; the host's own root comes last and is searched by `PATH` too.
    fn look_up(&self, program: &Path) -> Option<(&'a Root, PathBuf)> {
        let is_name = program.parent() == Some(Path::new(""));
        let runs = |root: &Root, path: &Path| {
            let file = root.outside(path)?;
            let metadata = fs::metadata(file).ok()?;
            (metadata.is_file() && metadata.permissions().mode() & 0o111 != 0).then_some(())
        };
        if !is_name && !program.is_absolute() {
            let path = fs::canonicalize(program).ok()?;
            let host = self.roots.last()?;
            return runs(host, &path).map(|()| (host, path));
        }
        for (index, root) in self.roots.iter().enumerate() {
            let is_host = index + 1 == self.roots.len();
            let mut directories: Vec<PathBuf> = PROGRAM_DIRECTORIES.iter().map(PathBuf::from).collect();
            if is_host {
                let variable: OsString = std::env::var_os("PATH").unwrap_or_default();
                let own = std::env::split_paths(&variable).filter(|path| path.is_absolute());
                directories.splice(0..0, own);
            }
            let candidates = if is_name {
                directories.iter().map(|directory| directory.join(program)).collect()
            } else if is_host {
                vec![program.to_path_buf()]
            } else {
                // As the user sees it, or as it is called inside the root.
                let inside = program.strip_prefix(root.path()).map(|path| Path::new("/").join(path));
                inside.into_iter().chain([program.to_path_buf()]).collect()
            };
            if let Some(path) = candidates.into_iter().find(|path| runs(root, path).is_some()) {
                return Some((root, path));
            }
        }
        None
    }

    /// Copies a program to `inside`, with what it takes to run it.
    fn copy_program(
        &mut self,
        root: &'a Root,
        path: &Path,
        inside: &Path,
        depth: usize,
    ) -> Result<(), PackError> {
        let inside = self.tree.resolve(inside, false)?;
        if self.tree.contains(&inside) {
            return Ok(());
        }
        let resolved = root.resolve(path).unwrap_or_else(|| path.into());
        let file = root.outside(&resolved).unwrap_or_else(|| path.into());
        let (mode, data) = read(&file)?;
        match elf::inspect(&data) {
            Kind::Elf(dynamic) => self.libraries.add(root, &resolved, dynamic).map_err(|missing| {
                PackError::NoLibrary { name: missing.name, needed_by: missing.needed_by }
            })?,
            Kind::Script(interpreter, argument) if depth < MOST_INTERPRETERS => {
                self.interpreter(&interpreter, argument.as_deref(), depth + 1)?;
            }
            Kind::Script(..) | Kind::Other | Kind::ForeignElf => return Err(PackError::NotAProgram(file)),
        }
        self.companions(root, path);
        self.tree.file(&inside, mode, data)?;
        Ok(())
    }

    fn interpreter(
        &mut self,
        interpreter: &str,
        argument: Option<&str>,
        depth: usize,
    ) -> Result<(), PackError> {
        let mut wanted = vec![PathBuf::from(interpreter)];
        if interpreter.ends_with("/env") {
            let words = argument.unwrap_or_default().split_whitespace();
            wanted.extend(
                words.map(PathBuf::from).find(|word| !word.as_os_str().as_encoded_bytes().starts_with(b"-")),
            );
        }
        for program in wanted {
            if !self.is_provided(&program)? {
                let (root, path) = self.look_up(&program).ok_or(PackError::NoProgram(program))?;
                self.copy_program(root, &path, &path, depth)?;
            }
        }
        Ok(())
    }

    fn companions(&mut self, root: &Root, path: &Path) {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        for (_, module, file) in COMPANIONS.iter().filter(|(part, ..)| name.contains(part)) {
            self.wanted_modules.extend(module);
            let found = file.and_then(|file| Some((file, read(&root.outside(Path::new(file))?).ok()?)));
            if let Some((file, (mode, data))) = found {
                // It is a help, and a guest does without.
                let _ = self.tree.file(Path::new(file), mode, data);
            }
        }
    }

    fn link_applets(&mut self) -> Result<(), PackError> {
        for applet in &self.provided {
            if !self.tree.contains(applet) {
                self.tree.link(applet, Path::new(BUSYBOX))?;
            }
        }
        Ok(())
    }

    fn put_libraries(&mut self) -> Result<(), PackError> {
        let libraries = std::mem::replace(&mut self.libraries, Libraries::new(self.roots));
        for library in libraries.into_found() {
            let (_, data) = read(&library.file)?;
            self.tree.file(&library.inside, 0o755, data)?;
        }
        Ok(())
    }

    fn modules(&mut self, directory: &Path, requests: &[ModuleRequest]) -> Result<(), PackError> {
        let kernel = ModuleTree::open(directory)?;
        let mut packed: Vec<Module> = Vec::new();
        for request in
            requests.iter().filter(|request| request.load && (request.needed || kernel.has(&request.name)))
        {
            kernel.add(&request.name, &mut packed)?;
        }
        let loaded = packed.len();
        let companions = self.wanted_modules.iter().copied();
        let on_demand = requests.iter().filter(|request| !request.load);
        for name in on_demand.map(|request| request.name.as_str()).chain(companions) {
            if kernel.has(name) {
                kernel.add(name, &mut packed)?;
            }
        }
        // A guest without modules needs no directory for them.
        let Some(release) = packed.first().map(|module| module.release.as_str()) else { return Ok(()) };
        let place = Path::new("/lib/modules").join(release);
        let mut list = Vec::new();
        for module in &packed[..loaded] {
            config::escape(place.join(&module.path).as_os_str().as_encoded_bytes(), &mut list);
            list.push(b'\n');
        }
        let (dependencies, aliases) = modules::index(&packed);
        for (name, text) in [("modules.dep", dependencies), ("modules.alias", aliases)] {
            self.tree.file(&place.join(name), 0o644, text.into())?;
        }
        for module in packed {
            self.tree.file(&place.join(&module.path), 0o644, module.image)?;
        }
        Ok(self.tree.file(Path::new(config::MODULES_FILE), 0o644, list)?)
    }
}

#[cfg(test)]
#[path = "initramfs_test.rs"]
mod tests;
