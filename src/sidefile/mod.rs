//! The side file of a persistent memory file: what its DIMM keeps beside its data.
//!
//! `FILE.aconite` stands beside `FILE` and holds its poison, and the labels and the record of
//! each of its DIMMs. It is made when
//! there is first something to keep. It is a [`Content`] at some moment and a journal of the [`Change`]s since then
//! (`layout` has its shape): a change is appended and on the disk before it is acknowledged, and when the journal is
//! full a new file takes the place of the old one. Whoever kills the monitor, at whatever moment, leaves all
//! acknowledged changes and of the last one all or nothing.
//!
//! A file that is cut short, damaged, of another version or of a device of another size is refused by its name, and
//! stays as it is. The lock on the device's own file is that of its side file too.

mod change;
mod content;
mod layout;

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use thiserror::Error;

pub use self::change::Change;
pub use self::content::{Content, DimmContent};
use self::layout::{Head, Journal};
use crate::memory::RangeSet;

/// What a side file's name has behind that of its device's file.
const SUFFIX: &str = ".aconite";
/// What a file has behind that until it takes the place of the side file.
const TEMPORARY: &str = ".new";

/// What is wrong with a side file.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum Damage {
    /// It is something else.
    #[error("it does not begin like a side file")]
    Magic,
    /// It was written by a program that means something else by its bytes.
    #[error("it has version {found}, and this program reads versions 1 to {newest}")]
    Version {
        /// Its version.
        found: u32,
        /// The newest that is read.
        newest: u32,
    },
    /// It belongs to a device of another size.
    #[error("it belongs to a device of {found} bytes, and this one has {expected}")]
    DeviceSize {
        /// What it says.
        found: u64,
        /// The device.
        expected: u64,
    },
    /// It is shorter or longer than it says.
    #[error("it should have {expected} bytes and has {found}")]
    Length {
        /// What it has.
        found: u64,
        /// What it should have.
        expected: u64,
    },
    /// Its bytes are not those that were written.
    #[error("its checksum is wrong")]
    Checksum,
    /// Its bytes are sound and make no sense for the device.
    #[error("{0}")]
    Content(&'static str),
}

/// Why a side file cannot be used.
#[derive(Debug, Error)]
pub enum SideFileError {
    /// It is not what it should be.
    #[error(
        "Side file {path} is refused: {damage}. It is left as it is: move it away to start without the labels, poison and health in it"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        damage: Damage,
    },
    /// It is there, and the device's file is not.
    #[error(
        "Side file {path} is left over from another device: move it away, or bring the file back that it belongs to"
    )]
    LeftOver {
        /// The file.
        path: PathBuf,
    },
    /// It cannot be read or written.
    #[error("Side file {path} cannot be used: see to its permissions and the space there")]
    File {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
}

/// An open side file. Its device's file is locked by whoever has this.
#[derive(Debug)]
pub struct SideFile {
    path: PathBuf,
    device_size: u64,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    content: Content,
    /// The file and the end of its journal, once there is one.
    journal: Option<(File, Journal)>,
}

impl SideFile {
    /// The side file of the device file `device`.
    pub fn path_of(device: &Path) -> PathBuf {
        with_suffix(device, SUFFIX)
    }

    /// Opens the side file of `device`, which has `device_size` bytes. `new` says that the device's file has just been
    /// made: then there can be none.
    ///
    /// # Errors
    /// [`SideFileError`]; nothing has been changed.
    pub fn open(device: &Path, device_size: u64, new: bool) -> Result<Self, SideFileError> {
        let path = Self::path_of(device);
        let failed = |source| SideFileError::File { path: path.clone(), source };
        let opened = match OpenOptions::new().read(true).write(true).open(&path) {
            Ok(_) if new => return Err(SideFileError::LeftOver { path }),
            Ok(file) => Some(file),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(failed(error)),
        };
        // Of a killed monitor; nobody else writes it.
        match fs::remove_file(with_suffix(&path, TEMPORARY)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        let state = match opened {
            None => State { content: Content::default(), journal: None },
            Some(mut file) => {
                let (content, journal) = load(&mut file, device_size).map_err(|error| error.of(&path))?;
                State { content, journal: journal.map(|journal| (file, journal)) }
            }
        };
        Ok(Self { path, device_size, state: Mutex::new(state) })
    }

    /// What the side file of `device` holds, for a device that is only read: nothing of it can be changed.
    ///
    /// # Errors
    /// [`SideFileError`].
    pub fn read(device: &Path, device_size: u64) -> Result<Content, SideFileError> {
        let path = Self::path_of(device);
        match File::open(&path) {
            Ok(mut file) => {
                load(&mut file, device_size).map(|(content, _)| content).map_err(|error| error.of(&path))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Content::default()),
            Err(source) => Err(SideFileError::File { path, source }),
        }
    }

    /// What is kept.
    pub fn content(&self) -> Content {
        self.state().content.clone()
    }

    /// Keeps a change. It is on the disk when this returns.
    ///
    /// # Errors
    /// The change is not kept.
    pub fn keep(&self, change: &Change) -> io::Result<()> {
        let mut state = self.state();
        let State { content, journal } = &mut *state;
        if let Some((file, journal)) = journal
            && journal.append(file, change)?
        {
            change.apply(content);
            return Ok(());
        }
        let mut next = content.clone();
        change.apply(&mut next);
        state.journal = Some(self.replace(&next)?);
        state.content = next;
        Ok(())
    }

    /// Keeps what is poisoned from now on, by difference.
    ///
    /// # Errors
    /// The change is not kept.
    pub fn keep_poison(&self, poison: &RangeSet) -> io::Result<()> {
        let before = self.content().poison;
        let added: Vec<_> = poison.difference(&before).collect();
        let cleaned: Vec<_> = before.difference(poison).collect();
        for change in [Change::Poisoned(added), Change::Cleaned(cleaned)] {
            if !matches!(&change, Change::Poisoned(ranges) | Change::Cleaned(ranges) if ranges.is_empty()) {
                self.keep(&change)?;
            }
        }
        Ok(())
    }

    /// Puts a file with `content` and an empty journal in the place of the side file.
    fn replace(&self, content: &Content) -> io::Result<(File, Journal)> {
        let temporary = with_suffix(&self.path, TEMPORARY);
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&temporary)?;
        let (bytes, journal) = layout::seal(content, self.device_size);
        file.write_all_at(&bytes, 0)?;
        file.set_len(journal.file_length())?;
        file.sync_all()?;
        fs::rename(&temporary, &self.path)?;
        let directory = match self.path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        File::open(directory)?.sync_all()?;
        Ok((file, journal))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    name.into()
}

enum LoadError {
    Damage(Damage),
    Io(io::Error),
}

impl LoadError {
    fn of(self, path: &Path) -> SideFileError {
        let path = path.to_owned();
        match self {
            Self::Damage(damage) => SideFileError::Damaged { path, damage },
            Self::Io(source) => SideFileError::File { path, source },
        }
    }
}

impl From<Damage> for LoadError {
    fn from(damage: Damage) -> Self {
        Self::Damage(damage)
    }
}

impl From<io::Error> for LoadError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// The content of a file, and the end of its journal, if another change can be appended there.
fn load(file: &mut File, device_size: u64) -> Result<(Content, Option<Journal>), LoadError> {
    let length = file.metadata()?.len();
    let mut bytes = Vec::new();
    file.take(layout::MAX_LENGTH + 1).read_to_end(&mut bytes)?;
    let head = Head::read(&bytes, length)?;
    if head.device_size() != device_size {
        return Err(Damage::DeviceSize { found: head.device_size(), expected: device_size }.into());
    }
    let loaded = head.load(&bytes)?;
    loaded.0.check(device_size)?;
    Ok(loaded)
}

#[cfg(test)]
#[path = "crash_test.rs"]
mod crash_test;
#[cfg(test)]
#[path = "sidefile_test.rs"]
mod tests;
