//! The lock of a state directory: a file with the number of the process that holds it.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Write};
use std::path::Path;

use super::StateError;

/// The file that is locked. It stays: to remove it would leave two machines with a lock each.
const FILE: &str = "lock";
/// More than a process id has.
const MOST: u64 = 32;

/// A lock that is held. It goes with the value, and with the process.
#[derive(Debug)]
pub(super) struct Lock {
    file: File,
}

impl Lock {
    /// Takes the lock of `dir`, or says who has it.
    pub(super) fn take(dir: &Path) -> Result<Self, StateError> {
        let failed = |source| StateError::Directory { dir: dir.to_owned(), source };
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(dir.join(FILE))
            .map_err(failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut holder = String::new();
                let read = (&file).take(MOST).read_to_string(&mut holder);
                let holder = Some(holder.trim()).filter(|text| read.is_ok() && !text.is_empty());
                return Err(StateError::InUse {
                    dir: dir.to_owned(),
                    holder: holder.unwrap_or("(unknown)").to_owned(),
                });
            }
            Err(TryLockError::Error(source)) => return Err(failed(source)),
        }
        file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id())).map_err(failed)?;
        Ok(Self { file })
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // To close it is not enough: a child has a copy of the descriptor until it executes its program.
        if let Err(error) = self.file.unlock() {
            tracing::warn!(%error, "The lock of a state directory stays until this process ends");
        }
    }
}
