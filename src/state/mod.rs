//! What outlives a machine: one directory of small documents.
//!
//! A machine that is started with `--state DIR` keeps there what a computer keeps when its power goes: the store of
//! error records, the errors of the last run, the bad lines of its RAM. One machine at a time owns the directory.
//! Each document is a file that is replaced as a whole (`document` has its shape), so that whoever kills the
//! monitor, at whatever moment, leaves the old one or the new one. A document that is damaged, or was written by
//! another version, is refused by its name and stays as it is: it may be the only trace of what happened.

mod document;
mod lock;

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use thiserror::Error;

pub use self::document::{Damage, Format};
use self::lock::Lock;

/// Most bytes of one document.
pub const MAX_DOCUMENT: u64 = 256 << 20;
/// Begins and ends the name of a file that is not yet a document.
const TEMPORARY: (&str, &str) = (".", ".new");

/// Why the state of machines cannot be kept or read.
#[derive(Debug, Error)]
pub enum StateError {
    /// Another machine uses the directory.
    #[error(
        "State directory {dir} belongs to the machine of process {holder}: stop it, or choose another directory"
    )]
    InUse {
        /// The directory.
        dir: PathBuf,
        /// The process, as far as it is known.
        holder: String,
    },
    /// The directory cannot be made, locked or listed.
    #[error("State directory {dir} cannot be used: choose one that can be written")]
    Directory {
        /// The directory.
        dir: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// A document cannot be read, written or removed.
    #[error("State file {path} cannot be used: see to its permissions and the space there")]
    File {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// A document is not what it should be.
    #[error("State file {path} is refused: {damage}. It is left as it is: move it away to start without it")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        damage: Damage,
    },
    /// The name is not one for a document.
    #[error("{name:?} cannot be the name of a state file: use a-z, 0-9 and -, with an extension")]
    Name {
        /// The name.
        name: String,
    },
}

/// Who locks the directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Locking {
    /// This process.
    Here,
    /// A process on the other side of a share has locked it for this one: locks do not cross a share.
    Elsewhere,
}

/// An open state directory. The lock goes with the value.
#[derive(Debug)]
pub struct State {
    dir: PathBuf,
    handle: File,
    /// Documents that were read or written through this value, and so are known to be whole.
    known: Mutex<BTreeSet<String>>,
    _lock: Option<Lock>,
}

impl State {
    /// Opens `dir`, which is made if it is not there (mode 0700), and clears away what killed machines left half
    /// written.
    ///
    /// # Errors
    /// [`StateError::InUse`] names the process that has it; [`StateError::Directory`].
    pub fn open(dir: &Path, locking: Locking) -> Result<Self, StateError> {
        let failed = |source| StateError::Directory { dir: dir.to_owned(), source };
        DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failed)?;
        let dir = dir.canonicalize().map_err(failed)?;
        let lock = match locking {
            Locking::Here => Some(Lock::take(&dir)?),
            Locking::Elsewhere => None,
        };
        let handle = File::open(&dir).map_err(failed)?;
        let state = Self { dir, handle, known: Mutex::default(), _lock: lock };
        for name in state.entries()?.iter().filter(|name| is_temporary(name)) {
            state.unlink(name)?;
        }
        Ok(state)
    }

    /// The directory, with no links in its path.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Names of the documents that begin with `prefix`, sorted.
    ///
    /// # Errors
    /// [`StateError::Directory`].
    pub fn names(&self, prefix: &str) -> Result<Vec<String>, StateError> {
        let mut names = self.entries()?;
        names.retain(|name| name.starts_with(prefix) && is_name(name));
        names.sort();
        Ok(names)
    }

    /// The content of a document; `None` if there is no such file.
    ///
    /// # Errors
    /// [`StateError::Damaged`] if the file is cut short, changed, or of another format; [`StateError::File`].
    pub fn read(&self, name: &str, format: Format) -> Result<Option<Vec<u8>>, StateError> {
        let path = self.path(name)?;
        let failed = |source| StateError::File { path: path.clone(), source };
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(failed(source)),
        };
        let mut bytes = Vec::new();
        let most = MAX_DOCUMENT + document::MAX_HEADER;
        file.take(most).read_to_end(&mut bytes).map_err(failed)?;
        let content = document::open(bytes, format)
            .map_err(|damage| StateError::Damaged { path: path.clone(), damage })?;
        self.known().insert(name.to_owned());
        Ok(Some(content))
    }

    /// Puts a document in the place of the one with this name. When this returns, it is on the disk; if it never
    /// returns, the old one or the new one is.
    ///
    /// # Errors
    /// [`StateError::Damaged`] if what is there is no document of this format: it is not replaced.
    /// [`StateError::File`].
    pub fn write(&self, name: &str, format: Format, content: &[u8]) -> Result<(), StateError> {
        let path = self.path(name)?;
        if !self.known().contains(name) {
            self.read(name, format)?;
        }
        let failed = |source| StateError::File { path: path.clone(), source };
        let sealed =
            document::seal(content, format).map_err(|_| failed(io::ErrorKind::FileTooLarge.into()))?;
        let temporary = self.dir.join(format!("{}{name}{}", TEMPORARY.0, TEMPORARY.1));
        let written = File::create(&temporary).and_then(|mut file| {
            file.write_all(&sealed)?;
            file.sync_all()
        });
        written.and_then(|()| fs::rename(&temporary, &path)).map_err(failed)?;
        self.known().insert(name.to_owned());
        self.handle.sync_all().map_err(failed)
    }

    /// Removes a document, for good when this returns. One that is not there is no error.
    ///
    /// # Errors
    /// [`StateError::File`].
    pub fn remove(&self, name: &str) -> Result<(), StateError> {
        let path = self.path(name)?;
        self.unlink(name)?;
        self.handle.sync_all().map_err(|source| StateError::File { path, source })
    }

    /// The refusal of a document that is whole, but whose content its reader cannot use.
    pub fn foreign(&self, name: &str) -> StateError {
        StateError::Damaged { path: self.dir.join(name), damage: Damage::Content }
    }

    fn unlink(&self, name: &str) -> Result<(), StateError> {
        let path = self.dir.join(name);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(StateError::File { path, source: error })
            }
            _ => Ok(()),
        }
    }

    fn entries(&self) -> Result<Vec<String>, StateError> {
        let failed = |source| StateError::Directory { dir: self.dir.clone(), source };
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(failed)? {
            // A name that is no UTF-8 is nobody's here.
            names.extend(entry.map_err(failed)?.file_name().into_string());
        }
        Ok(names)
    }

    fn path(&self, name: &str) -> Result<PathBuf, StateError> {
        if is_name(name) { Ok(self.dir.join(name)) } else { Err(StateError::Name { name: name.to_owned() }) }
    }

    fn known(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn is_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let word = |part: &str| !part.is_empty() && part.chars().all(plain);
    name.split_once('.').is_some_and(|(stem, extension)| word(stem) && word(extension))
}

fn is_temporary(name: &str) -> bool {
    let stem = name.strip_prefix(TEMPORARY.0).and_then(|rest| rest.strip_suffix(TEMPORARY.1));
    stem.is_some_and(is_name)
}

#[cfg(test)]
#[path = "state_test.rs"]
mod tests;
