//! `cargo xtask fetch`: guest material from Debian's packages.
//!
//! Each item is downloaded and unpacked in a directory of its own and renamed into place with its record inside, so
//! that a run that was killed leaves nothing that looks whole. Once an item is there, with all that the catalog names for
//! it, nothing is asked of the network.

mod apt;
mod catalog;
mod tree;

use crate::manifest::{self, ITEM_FILE, Item, MANIFEST_FILE, Manifest, Package, item_dir, read_item};
use anyhow::{Context, Result, bail, ensure};
use apt::{Apt, Download};
use catalog::{CATALOG, Entry, Kind, left_out};
use indicatif::{ProgressBar, ProgressStyle};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry as Slot;
use std::fs;
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// Arguments of `cargo xtask fetch`.
#[derive(Default, clap::Args)]
pub struct Arguments {
    /// What to get (see --list); without a name, what tests and the demo need
    names: Vec<String>,
    /// Get everything that there is
    #[arg(long, conflicts_with = "names")]
    all: bool,
    /// List what can be had and what is there
    #[arg(long)]
    list: bool,
    /// Compare what is there with its record, offline
    #[arg(long)]
    verify: bool,
    /// Get it again, although it is there
    #[arg(long)]
    force: bool,
}

/// Gets what tests and the demo need, and the items `names`, if there are any. An item that lacks what the catalog has
/// come to name since it was fetched will do where the network is not there.
pub fn provide(names: &[&str]) -> Result<()> {
    let root = material_root();
    let needed = CATALOG.iter().filter(|entry| entry.default || names.contains(&entry.name));
    let names = needed.clone().map(|entry| entry.name.to_owned()).collect();
    match run(&Arguments { names, ..Arguments::default() }) {
        Err(error) if needed.clone().all(|entry| read_item(&root, entry.name).is_some()) => {
            eprintln!("fetch: {error:#}. What is there is used as it is");
            Ok(())
        }
        result => result,
    }
}

/// The root of the material: `target/material` of the workspace, or `$ACONITE_MATERIAL`.
pub fn material_root() -> PathBuf {
    match std::env::var_os("ACONITE_MATERIAL") {
        Some(dir) if !dir.is_empty() => PathBuf::from(dir),
        _ => Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/material"),
    }
}

/// Runs the command.
pub fn run(arguments: &Arguments) -> Result<()> {
    let root = material_root();
    fs::create_dir_all(&root).with_context(|| format!("Cannot create {}", root.display()))?;
    let root = root.canonicalize().with_context(|| format!("Cannot resolve {}", root.display()))?;
    let chosen = choose(arguments)?;
    if arguments.list {
        list(&root);
        return Ok(());
    }
    if arguments.verify {
        return verify(&root, &chosen, !arguments.names.is_empty());
    }
    let missing = |entry: &&Entry| {
        arguments.force || !read_item(&root, entry.name).is_some_and(|item| is_complete(&entry.kind, &item))
    };
    let work = root.join("incomplete");
    if !chosen.iter().any(missing) && !work.exists() {
        return Ok(());
    }
    let _lock = lock(&root)?;
    // Another run may have got it while this one waited.
    let wanted: Vec<&Entry> = chosen.into_iter().filter(missing).collect();
    // Of a run that was killed.
    remove(&work)?;
    if wanted.is_empty() {
        return Ok(());
    }
    fs::create_dir_all(&work).with_context(|| format!("Cannot create {}", work.display()))?;
    let mut releases = BTreeMap::new();
    for entry in wanted {
        get(&root, &work, entry, &mut releases)
            .with_context(|| format!("Cannot get {} ({})", entry.name, entry.purpose))?;
        write_manifest(&root)?;
    }
    remove(&work)
}

/// Whether an item has all that the catalog names for it.
fn is_complete(kind: &Kind, item: &Item) -> bool {
    match kind {
        Kind::Kernel { .. } => true,
        Kind::Root { packages, .. } => {
            packages.iter().all(|package| item.packages.iter().any(|had| had.name == *package))
        }
    }
}

fn choose(arguments: &Arguments) -> Result<Vec<&'static Entry>> {
    if arguments.names.is_empty() {
        return Ok(CATALOG.iter().filter(|entry| arguments.all || arguments.list || entry.default).collect());
    }
    arguments
        .names
        .iter()
        .map(|name| {
            CATALOG.iter().find(|entry| entry.name == name).with_context(|| {
                let names: Vec<_> = CATALOG.iter().map(|entry| entry.name).collect();
                format!("No item is called {name:?}. There are: {}", names.join(", "))
            })
        })
        .collect()
}

fn list(root: &Path) {
    println!("{:<12} {:<28} for", "name", "here");
    for entry in CATALOG {
        let here = read_item(root, entry.name).map_or_else(|| "-".to_owned(), |item| item.version);
        println!("{:<12} {here:<28} {}", entry.name, entry.purpose);
    }
}

fn verify(root: &Path, chosen: &[&Entry], named: bool) -> Result<()> {
    let mut damaged = Vec::new();
    for entry in CATALOG {
        if named && !chosen.iter().any(|c| c.name == entry.name) {
            continue;
        }
        match read_item(root, entry.name) {
            None if chosen.iter().any(|c| c.name == entry.name) => {
                damaged.push(format!("{} is missing", entry.name))
            }
            None => {}
            Some(item) if tree::digest(&item_dir(root, entry.name))? == item.tree_sha256 => {
                println!("{}: {} is as recorded", entry.name, item.version);
            }
            Some(_) => damaged.push(format!("{} differs from its record", entry.name)),
        }
    }
    ensure!(damaged.is_empty(), "{}. Remedy: cargo xtask fetch --force NAME", damaged.join("; "));
    Ok(())
}

/// Only one run changes the material at a time; the lock goes with its process.
fn lock(root: &Path) -> Result<fs::File> {
    let path = root.join("lock");
    let file = fs::File::create(&path).with_context(|| format!("Cannot create {}", path.display()))?;
    if let Err(fs::TryLockError::WouldBlock) = file.try_lock() {
        eprintln!("fetch: another run is fetching, waiting for it");
        file.lock().with_context(|| format!("Cannot lock {}", path.display()))?;
    }
    Ok(file)
}

fn get(root: &Path, work: &Path, entry: &Entry, releases: &mut BTreeMap<&'static str, Apt>) -> Result<()> {
    eprintln!("fetch: {}: {}, from Debian {}", entry.name, entry.purpose, entry.suite);
    let bar = progress("reading the package list");
    let apt = match releases.entry(entry.suite) {
        Slot::Occupied(known) => &*known.into_mut(),
        Slot::Vacant(new) => {
            let apt = Apt::new(&work.join("apt"), entry.suite)?;
            apt.update()?;
            &*new.insert(apt)
        }
    };
    let packages: &[&str] = match &entry.kind {
        Kind::Kernel { package, .. } => &[*package],
        Kind::Root { packages, .. } => packages,
    };
    let list: Vec<Download> =
        apt.closure(packages)?.into_iter().filter(|d| !left_out(&entry.kind, &d.name)).collect();
    bar.finish_and_clear();

    let debs = work.join("debs");
    remove(&debs)?;
    fs::create_dir_all(&debs).with_context(|| format!("Cannot create {}", debs.display()))?;
    download(apt, &list, &debs)?;

    let tree = work.join("tree");
    remove(&tree)?;
    let bar = progress("unpacking");
    unpack(&list, &debs, &tree)?;
    let version = match &entry.kind {
        Kind::Kernel { release, .. } => arrange_kernel(&tree, release)?,
        Kind::Root { packages, programs } => {
            check_programs(&tree, programs)?;
            list.iter().find(|d| d.name == packages[0]).map(|d| d.version.clone()).unwrap_or_default()
        }
    };
    bar.set_message("recording");
    let item = Item {
        name: entry.name.to_owned(),
        purpose: entry.purpose.to_owned(),
        suite: entry.suite.to_owned(),
        version,
        packages: list
            .into_iter()
            .map(|d| Package { name: d.name, version: d.version, sha256: d.sha256, size: d.size })
            .collect(),
        tree_sha256: tree::digest(&tree)?,
    };
    write_json(&tree.join(ITEM_FILE), &item)?;
    let place = item_dir(root, entry.name);
    if let Some(parent) = place.parent() {
        fs::create_dir_all(parent).with_context(|| format!("Cannot create {}", parent.display()))?;
    }
    put(&tree, &place, &work.join("old"))?;
    bar.finish_and_clear();
    eprintln!("fetch: {}: {} is in {}", entry.name, item.version, place.display());
    Ok(())
}

fn download(apt: &Apt, list: &[Download], debs: &Path) -> Result<()> {
    let total: u64 = list.iter().map(|d| d.size).sum();
    let bar = ProgressBar::new(total);
    if let Ok(style) =
        ProgressStyle::with_template("  downloading {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}")
    {
        bar.set_style(style);
    }
    let mut child = apt.download(list, debs)?;
    while child.try_wait().context("Cannot wait for apt-get")?.is_none() {
        bar.set_position(tree::size(debs));
        std::thread::sleep(Duration::from_millis(100));
    }
    bar.finish_and_clear();
    let output = child.wait_with_output().context("Cannot wait for apt-get")?;
    ensure!(
        output.status.success(),
        "apt-get download failed: {}. Remedy: check the network and the space left under target/",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}

/// Unpacks packages over one another, after their checksums, and drops what nobody reads at run time.
fn unpack(list: &[Download], debs: &Path, tree: &Path) -> Result<()> {
    fs::DirBuilder::new()
        .mode(0o755)
        .create(tree)
        .with_context(|| format!("Cannot create {}", tree.display()))?;
    // Debian's merged layout, so that packages with either kind of path unpack to one place.
    for dir in ["bin", "sbin", "lib", "lib64"] {
        fs::create_dir_all(tree.join("usr").join(dir))
            .context("Cannot create the directories of a system root")?;
        symlink(format!("usr/{dir}"), tree.join(dir))
            .context("Cannot link the directories of a system root")?;
    }
    let mut files: Vec<PathBuf> = fs::read_dir(debs)
        .with_context(|| format!("Cannot read {}", debs.display()))?
        .filter_map(|entry| entry.ok().map(|e| e.path()))
        .filter(|path| path.extension().is_some_and(|e| e == "deb"))
        .collect();
    files.sort();
    ensure!(files.len() == list.len(), "{} packages were asked for and {} arrived", list.len(), files.len());
    for file in &files {
        let digest = tree::file_digest(file)?;
        ensure!(
            list.iter().any(|d| d.sha256 == digest),
            "{} has SHA-256 {digest}, which the index does not name",
            file.display()
        );
        unpack_one(file, tree).with_context(|| format!("Cannot unpack {}", file.display()))?;
    }
    for dir in ["doc", "man", "info", "locale", "lintian", "bug", "bash-completion", "icons", "applications"]
    {
        remove(&tree.join("usr/share").join(dir))?;
    }
    Ok(())
}

/// Unpacks one package. A path through a link, such as `lib`, stays behind the link: `dpkg-deb --extract` alone would
/// replace the link.
fn unpack_one(file: &Path, tree: &Path) -> Result<()> {
    let mut source = Command::new("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(file)
        .stdout(Stdio::piped())
        .spawn()
        .context("Cannot start dpkg-deb. Remedy: run this on Debian or one of its derivatives")?;
    let archive = source.stdout.take().context("dpkg-deb has no output")?;
    let unpacked = Command::new("tar")
        .args(["--extract", "--keep-directory-symlink", "--no-same-owner", "--directory"])
        .arg(tree)
        .stdin(archive)
        .status()
        .context("Cannot start tar")?;
    let read = source.wait().context("Cannot wait for dpkg-deb")?;
    ensure!(read.success() && unpacked.success(), "dpkg-deb: {read}; tar: {unpacked}");
    Ok(())
}

/// Gives a kernel's files names without its release; returns the release.
fn arrange_kernel(tree: &Path, expected: &str) -> Result<String> {
    let modules = tree.join("usr/lib/modules");
    let release = fs::read_dir(&modules)
        .with_context(|| format!("Cannot read {}", modules.display()))?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .next()
        .context("The packages hold no modules")?;
    ensure!(
        release.starts_with(expected),
        "The newest kernel of this suite is {release}, which does not begin with {expected}"
    );
    let mut images = 0;
    for dir in ["boot", "usr/lib/modules/REL"] {
        let dir = tree.join(dir.replace("REL", &release));
        for to in ["vmlinuz", "config", "System.map"] {
            for from in [dir.join(format!("{to}-{release}")), dir.join(to)] {
                if from.is_file() && !from.is_symlink() {
                    images += usize::from(to == "vmlinuz");
                    fs::rename(&from, tree.join(to))
                        .with_context(|| format!("Cannot move {}", from.display()))?;
                }
            }
        }
    }
    ensure!(images == 1, "The packages hold {images} kernel images instead of one");
    // Only lib/modules/RELEASE stays, as a real directory.
    fs::remove_file(tree.join("lib")).context("Cannot remove the link to usr/lib")?;
    for link in ["bin", "sbin", "lib64"] {
        fs::remove_file(tree.join(link)).with_context(|| format!("Cannot remove the link {link}"))?;
    }
    fs::create_dir(tree.join("lib")).context("Cannot create lib")?;
    fs::rename(&modules, tree.join("lib/modules")).context("Cannot move the modules")?;
    remove(&tree.join("usr"))?;
    remove(&tree.join("boot"))?;
    Ok(release)
}

/// Asks the root's own loader whether each program finds all its libraries there.
fn check_programs(tree: &Path, programs: &[&str]) -> Result<()> {
    let loader = tree.join(manifest::LOADER);
    for program in programs {
        let Some(path) =
            manifest::PROGRAM_DIRS.iter().map(|dir| tree.join(dir).join(program)).find(|p| p.exists())
        else {
            bail!("The packages hold no program {program}");
        };
        let output = Command::new(&loader)
            .arg("--library-path")
            .arg(tree.join(manifest::LIBRARIES))
            .arg("--list")
            .arg(&path)
            .output()
            .with_context(|| format!("Cannot start {}", loader.display()))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let outside =
            text.lines().find(|line| line.contains("=>") && !line.contains(&*tree.to_string_lossy()));
        if let Some(line) = outside {
            bail!("{program} lacks a library: {}", line.trim());
        }
        ensure!(
            output.status.success(),
            "{program} cannot be loaded: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}

/// Moves a tree to its place. What was there goes by way of `old`, so that it is never seen in parts.
fn put(tree: &Path, place: &Path, old: &Path) -> Result<()> {
    match fs::rename(place, old) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("Cannot move {} away", place.display()));
        }
        _ => {}
    }
    fs::rename(tree, place).with_context(|| format!("Cannot move the item to {}", place.display()))?;
    remove(old)
}

fn write_manifest(root: &Path) -> Result<()> {
    let mut items: Vec<Item> = CATALOG.iter().filter_map(|entry| read_item(root, entry.name)).collect();
    items.sort_by(|a, b| a.name.cmp(&b.name));
    let temporary = root.join(format!("{MANIFEST_FILE}.new"));
    write_json(&temporary, &Manifest { items })?;
    fs::rename(&temporary, root.join(MANIFEST_FILE)).context("Cannot replace the manifest")
}

fn write_json(path: &Path, value: &impl serde::Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value).context("Cannot write JSON")?;
    fs::write(path, text + "\n").with_context(|| format!("Cannot write {}", path.display()))
}

/// Removes a directory, if it is there.
fn remove(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("Cannot remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}

fn progress(message: &'static str) -> ProgressBar {
    let bar = ProgressBar::new_spinner().with_message(message);
    bar.enable_steady_tick(Duration::from_millis(120));
    bar
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_item_is_complete_with_all_packages_of_the_catalog() {
        let package = |name: &str| Package {
            name: name.to_owned(),
            version: String::new(),
            sha256: String::new(),
            size: 0,
        };
        let item = Item {
            name: "tools".to_owned(),
            purpose: String::new(),
            suite: String::new(),
            version: String::new(),
            packages: vec![package("libc6"), package("ndctl")],
            tree_sha256: String::new(),
        };
        let root = |packages| Kind::Root { packages, programs: &[] };
        assert!(is_complete(&root(&["ndctl"]), &item));
        assert!(!is_complete(&root(&["ndctl", "dmsetup"]), &item));
        assert!(is_complete(&Kind::Kernel { package: "linux-image-amd64", release: "6.1." }, &item));
    }

    #[test]
    fn a_tree_takes_the_place_of_another() {
        let dir = std::env::temp_dir().join(format!("xtask-put-{}", std::process::id()));
        let (tree, place, old) = (dir.join("tree"), dir.join("place"), dir.join("old"));
        for file in ["first", "second"] {
            fs::create_dir_all(&tree).unwrap();
            fs::write(tree.join(file), file).unwrap();
            put(&tree, &place, &old).unwrap();
            let names: Vec<_> =
                fs::read_dir(&place).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            assert_eq!(names, [file]);
            assert!(!tree.exists() && !old.exists());
        }
        // Material that is shared is not touched where it is.
        let shared = dir.join("shared");
        fs::rename(&place, &shared).unwrap();
        symlink(&shared, &place).unwrap();
        fs::create_dir_all(&tree).unwrap();
        put(&tree, &place, &old).unwrap();
        assert!(!place.is_symlink() && !place.join("second").exists() && shared.join("second").exists());
        fs::remove_dir_all(dir).unwrap();
    }
}
