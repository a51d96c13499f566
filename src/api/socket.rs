//! The socket file: a stale one is replaced, a live one and anything else is left alone.

use std::fs::{self, File, Permissions, TryLockError};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Another process answers there.
    #[error("API socket {path} belongs to a machine that runs: stop it, or choose another path")]
    Live {
        /// The path.
        path: PathBuf,
    },
    /// Something else is there.
    #[error(
        "API socket {path} cannot be made, because a file that is no socket is there: choose another path"
    )]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The system refuses.
    #[error("API socket {path} cannot be made: choose a path in a directory that can be written")]
    System {
        /// The path.
        path: PathBuf,
        /// What it says.
        source: io::Error,
    },
}

/// The listening socket; its file goes with it.
#[derive(Debug)]
pub struct Socket {
    /// The listener, which does not block.
    pub listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the file, to remove no other's.
    identity: (u64, u64),
}

impl Socket {
    /// Listens on `path`, for this user only (mode 0600).
    ///
    /// The directory is locked meanwhile, so that of two processes that find the same stale file one wins.
    ///
    /// # Errors
    /// See [`SocketError`].
    pub fn bind(path: &Path) -> Result<Self, SocketError> {
        let system = |source| SocketError::System { path: path.to_owned(), source };
        let directory = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let lock = File::open(directory).map_err(system)?;
        lock_for(&lock, Duration::from_secs(2)).map_err(system)?;
        match fs::symlink_metadata(path) {
            Ok(metadata) if !metadata.file_type().is_socket() => {
                return Err(SocketError::NotASocket { path: path.to_owned() });
            }
            Ok(_) => match UnixStream::connect(path) {
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    fs::remove_file(path).map_err(system)?;
                }
                Err(error) => return Err(system(error)),
                Ok(_) => return Err(SocketError::Live { path: path.to_owned() }),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(system(error)),
        }
        let listener = UnixListener::bind(path).map_err(system)?;
        fs::set_permissions(path, Permissions::from_mode(0o600)).map_err(system)?;
        listener.set_nonblocking(true).map_err(system)?;
        let metadata = fs::symlink_metadata(path).map_err(system)?;
        Ok(Self { listener, path: path.to_owned(), identity: (metadata.dev(), metadata.ino()) })
    }
}

/// Locks `file`, waiting for at most `patience`: others may lock such a directory for reasons of their own.
fn lock_for(file: &File, patience: Duration) -> io::Result<()> {
    let deadline = Instant::now() + patience;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(()),
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                thread::sleep(Duration::from_millis(10));
            }
            Err(error) => return Err(error.into()),
        }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path).is_ok_and(|m| (m.dev(), m.ino()) == self.identity);
        if ours && let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "The API socket cannot be removed");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stale_files_are_replaced_and_live_ones_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm.sock");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "a dropped listener leaves its file: that is the stale one");
        // A child that another test starts listens, too, until it executes its program.
        let patience = Instant::now() + Duration::from_secs(10);
        while UnixStream::connect(&path).is_ok() && Instant::now() < patience {
            thread::yield_now();
        }
        let socket = Socket::bind(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(
            Socket::bind(&path).unwrap_err().to_string(),
            format!(
                "API socket {} belongs to a machine that runs: stop it, or choose another path",
                path.display()
            )
        );
        drop(socket);
        assert!(!path.exists());
        fs::write(&path, "x").unwrap();
        assert!(matches!(Socket::bind(&path), Err(SocketError::NotASocket { .. })));
        assert_eq!(fs::read(&path).unwrap(), b"x");
        assert!(matches!(Socket::bind(&dir.path().join("a/b")), Err(SocketError::System { .. })));
    }

    #[test]
    fn the_file_of_another_is_not_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm.sock");
        let socket = Socket::bind(&path).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, "mine").unwrap();
        drop(socket);
        assert!(path.exists());
    }
}
