//! The files of one keeper, and the key that they are named by.
//!
//! They lie in a directory of the user's own, `$XDG_RUNTIME_DIR/aconite` or `/tmp/aconite-UID`, and are gone when the
//! keeper is.

use crate::host::material::{Kernel, Qemu};
use crate::host::sys;
use sha2::{Digest, Sha256};
use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

/// What the software KVM host is made of; whoever finds a keeper with the same key can use it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key(String);

impl Key {
    /// The key of these parts.
    ///
    /// # Errors
    /// The file of QEMU or the kernel cannot be looked at.
    pub fn new(qemu: &Qemu, kernel: &Kernel, agent: &[u8], settings: &str) -> io::Result<Self> {
        let mut hash = Sha256::new();
        for part in qemu.program().as_deref().into_iter().chain([kernel.image.as_path()]) {
            let meta = fs::metadata(part)?;
            hash.update(format!("{part:?} {} {} {}\n", meta.len(), meta.mtime(), meta.mtime_nsec()));
        }
        hash.update(Sha256::digest(agent));
        hash.update(settings);
        Ok(Key(hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect()))
    }
}

/// The paths of one keeper.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    dir: PathBuf,
    key: Key,
}

impl Place {
    /// The place of the keeper with this key; makes the directory.
    ///
    /// # Errors
    /// The directory cannot be made, or belongs to somebody else.
    pub fn new(key: Key) -> io::Result<Self> {
        let dir = match std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from) {
            Some(dir) if dir.is_absolute() && dir.is_dir() => dir.join("aconite"),
            _ => PathBuf::from(format!("/tmp/aconite-{}", sys::user())),
        };
        Self::inside(dir, key)
    }

    fn inside(dir: PathBuf, key: Key) -> io::Result<Self> {
        match fs::DirBuilder::new().mode(0o700).create(&dir) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        let meta = fs::symlink_metadata(&dir)?;
        if !meta.is_dir() || meta.uid() != sys::user() || meta.mode() & 0o077 != 0 {
            let text = format!(
                "{} is not a directory of this user alone (mode 700). Remedy: remove it",
                dir.display()
            );
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
        }
        Ok(Place { dir, key })
    }

    /// Where the keeper listens.
    pub fn socket(&self) -> PathBuf {
        self.file("sock")
    }

    /// What the keeper and QEMU have to say.
    pub fn log(&self) -> PathBuf {
        self.file("log")
    }

    /// The last words of a keeper that failed. It stays until the next one starts.
    pub fn failure(&self) -> PathBuf {
        self.file("failed")
    }

    /// The console of level 1.
    pub fn console(&self) -> PathBuf {
        self.file("console")
    }

    /// The image that level 1 starts from, until it has.
    pub fn image(&self) -> PathBuf {
        self.file("img")
    }

    fn file(&self, suffix: &str) -> PathBuf {
        self.dir.join(format!("{}.{suffix}", self.key.0))
    }

    /// Becomes the keeper of this place; `None` if there is one.
    pub fn try_own(&self) -> io::Result<Option<Owned>> {
        let path = self.file("lock");
        loop {
            let file = match File::options().create(true).truncate(false).write(true).open(&path) {
                Ok(file) => file,
                // The last owner of the directory has just removed it.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    prepare(&self.dir)?;
                    continue;
                }
                Err(error) => return Err(error),
            };
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Ok(None),
                Err(TryLockError::Error(error)) => return Err(error),
            }
            // The last owner may have removed the file between our open and our lock.
            if is_at(&file, &path) {
                return Ok(Some(Owned { place: self.clone(), lock: file }));
            }
        }
    }
}

/// Makes the directory, if it is not there, and refuses one that somebody else has made.
fn prepare(dir: &Path) -> io::Result<()> {
    match fs::DirBuilder::new().mode(0o700).create(dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let meta = match fs::symlink_metadata(dir) {
        // Removed again meanwhile: whoever opens a file in it will see.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        meta => meta?,
    };
    if !meta.is_dir() || meta.uid() != sys::user() || meta.mode() & 0o077 != 0 {
        let text =
            format!("{} is not a directory of this user alone (mode 700). Remedy: remove it", dir.display());
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
    }
    Ok(())
}

fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::metadata(path)) {
        (Ok(ours), Ok(there)) => (ours.dev(), ours.ino()) == (there.dev(), there.ino()),
        _ => false,
    }
}

/// A place and the lock on it; dropping it removes every file of the place.
#[derive(Debug)]
pub struct Owned {
    place: Place,
    lock: File,
}

impl Owned {
    /// The place.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// Removes the report of a keeper before.
    pub fn forget_failure(&self) {
        // There is none after a start that went well.
        let _ = fs::remove_file(self.place.failure());
    }

    /// Writes down why this keeper fails, with the ends of its logs, for the front ends; returns what was written.
    pub fn report_failure(&self, text: &str) -> String {
        let read = |path: PathBuf| fs::read(path).unwrap_or_default();
        let log = last_lines(&String::from_utf8_lossy(&read(self.place.log())));
        let console = last_lines(&String::from_utf8_lossy(&read(self.place.console())));
        let text = format!("{text}\n{log}{console}").trim_end().to_owned();
        // The front ends say less then.
        let _ = fs::write(self.place.failure(), &text);
        text
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        let place = &self.place;
        for file in [place.socket(), place.console(), place.image(), place.log(), place.file("lock")] {
            // What is not there need not be removed.
            let _ = fs::remove_file(file);
        }
        let _ = self.lock.unlock();
        // Fails while other keepers use the directory.
        let _ = fs::remove_dir(&place.dir);
    }
}

/// The end of a text, enough to see what was going on.
pub(super) fn last_lines(text: &str) -> String {
    const COUNT: usize = 15;
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(COUNT)..].iter().map(|line| format!("{line}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_owner_and_nothing_left() {
        let dir = tempfile::tempdir().unwrap();
        let place = Place::inside(dir.path().join("run"), Key("k".into())).unwrap();
        let owned = place.try_own().unwrap().unwrap();
        assert!(place.try_own().unwrap().is_none());
        fs::write(owned.place().log(), "x").unwrap();
        drop(owned);
        assert!(!dir.path().join("run").exists());
    }

    #[test]
    fn a_directory_that_was_removed_is_made_again() {
        let dir = tempfile::tempdir().unwrap();
        let place = Place::inside(dir.path().join("run"), Key("k".into())).unwrap();
        fs::remove_dir(dir.path().join("run")).unwrap();
        assert!(place.try_own().unwrap().is_some());
    }

    #[test]
    fn a_failure_is_told_with_the_ends_of_the_logs() {
        let dir = tempfile::tempdir().unwrap();
        let place = Place::inside(dir.path().join("run"), Key("k".into())).unwrap();
        let owned = place.try_own().unwrap().unwrap();
        fs::write(place.log(), (0..100).map(|n| format!("line {n}\n")).collect::<String>()).unwrap();
        let text = owned.report_failure("It broke");
        assert!(text.starts_with("It broke\nline 85\n") && text.ends_with("line 99"), "{text}");
        drop(owned);
        assert_eq!(fs::read_to_string(place.failure()).unwrap(), text, "the report stays");
    }

    #[test]
    fn a_directory_that_others_can_write_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let error = Place::inside(dir.path().to_owned(), Key("k".into())).unwrap_err();
        assert!(error.to_string().contains("mode 700"), "{error}");
    }
}
