//! What PID 1 does before anybody can talk to it: file systems, modules, the port;
//! and how it ends the machine.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use aconite_agent::config::{self, MODULES_FILE};
use aconite_agent::protocol::{PORT_NAME, Power, Share};

use crate::console::say;
use crate::sys;

/// How long the port may take to appear once the modules are loaded. Generous: emulated machines are slow.
const PORT_TIMEOUT: Duration = Duration::from_secs(20);
/// How long to wait for file systems to write back before the machine is ended anyway. A file
/// system whose device has been pulled may never finish.
const SYNC_TIMEOUT: Duration = Duration::from_secs(10);

/// Links in /dev that udev(7) makes elsewhere.
const DEVICE_LINKS: [(&str, &str); 4] = [
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
];

/// A file system that every machine has: type, directory, options, and whether the agent cannot do without.
const FILE_SYSTEMS: [(&str, &str, &str, bool); 8] = [
    ("proc", "/proc", "", true),
    ("sysfs", "/sys", "", true),
    ("devtmpfs", "/dev", "mode=755", true),
    ("devpts", "/dev/pts", "gid=5,mode=620,ptmxmode=666", false),
    ("tmpfs", "/dev/shm", "mode=1777", false),
    ("tmpfs", "/run", "mode=755", false),
    ("tmpfs", "/tmp", "mode=1777", false),
    ("debugfs", "/sys/kernel/debug", "", false),
];

/// Mounts what programs expect of a Linux system. Returns notes on what is missing.
///
/// # Errors
/// One of /proc, /sys and /dev could not be mounted, in words.
pub fn mount_file_systems() -> Result<Vec<String>, String> {
    let mut notes = Vec::new();
    for (kind, path, options, needed) in FILE_SYSTEMS {
        let _ = fs::create_dir_all(path);
        if let Err(error) = sys::mount(kind, Path::new(path), Some(kind), 0, options) {
            let text = format!("Cannot mount {kind} on {path}: {error}");
            if needed {
                return Err(text);
            }
            notes.push(text);
        }
    }
    for (target, link) in DEVICE_LINKS {
        if let Err(error) = std::os::unix::fs::symlink(target, link) {
            notes.push(format!("Cannot link {link}: {error}"));
        }
    }
    Ok(notes)
}

/// Loads the modules of [`MODULES_FILE`] in their order. Returns notes on those that did not load.
pub fn load_modules() -> Vec<String> {
    let text = match fs::read(MODULES_FILE) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Vec::new(),
        Err(error) => return vec![format!("Cannot read {MODULES_FILE}: {error}")],
    };
    let mut notes = Vec::new();
    for line in text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
        let mut fields = line.splitn(2, |byte| *byte == b' ');
        let path = fields.next().and_then(config::unescape).map(std::ffi::OsString::from_vec);
        let parameters = String::from_utf8_lossy(fields.next().unwrap_or_default());
        let Some(path) = path.map(PathBuf::from) else {
            notes.push(format!("{MODULES_FILE}: bad line {:?}", String::from_utf8_lossy(line)));
            continue;
        };
        let loaded = File::open(&path).and_then(|file| sys::load_module(file.as_fd(), &parameters));
        match loaded {
            Err(error) if error.raw_os_error() != Some(libc::EEXIST) => {
                notes.push(format!("Cannot load {}: {error}", path.display()));
            }
            _ => {}
        }
    }
    notes
}

/// Mounts a 9p share, making its directory where there is none.
pub fn mount_share(share: &Share) -> io::Result<()> {
    let path = PathBuf::from(std::ffi::OsString::from_vec(share.path.clone()));
    if !path.is_absolute() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the path is not absolute"));
    }
    fs::create_dir_all(&path)?;
    let (flags, data) = mount_options(&share.options);
    sys::mount(&share.tag, &path, Some("9p"), flags, &data)
}

/// Divides mount options into the flags of mount(2) and what the file system gets.
pub fn mount_options(options: &str) -> (libc::c_ulong, String) {
    let mut flags = 0;
    let mut data = Vec::new();
    for option in options.split(',').filter(|option| !option.is_empty()) {
        match option {
            "ro" => flags |= libc::MS_RDONLY,
            "rw" => flags &= !libc::MS_RDONLY,
            "nosuid" => flags |= libc::MS_NOSUID,
            "nodev" => flags |= libc::MS_NODEV,
            "noexec" => flags |= libc::MS_NOEXEC,
            "noatime" => flags |= libc::MS_NOATIME,
            other => data.push(other),
        }
    }
    (flags, data.join(","))
}

/// Waits for the virtio console port of the protocol and opens it; `None` when it does not appear.
pub fn open_port() -> Option<File> {
    let start = Instant::now();
    loop {
        if let Some(device) = find_port() {
            match OpenOptions::new().read(true).write(true).open(&device) {
                Ok(port) => return Some(port),
                Err(error) if start.elapsed() > PORT_TIMEOUT => {
                    say(format_args!("Cannot open {}: {error}", device.display()));
                }
                Err(_) => {}
            }
        }
        if start.elapsed() > PORT_TIMEOUT {
            return None;
        }
        thread::sleep(Duration::from_millis(5));
    }
}

fn find_port() -> Option<PathBuf> {
    let ports = fs::read_dir("/sys/class/virtio-ports").ok()?;
    for port in ports.flatten() {
        let name = fs::read_to_string(port.path().join("name")).unwrap_or_default();
        if name.trim_end() == PORT_NAME {
            return Some(Path::new("/dev").join(port.file_name()));
        }
    }
    None
}

/// Writes back what can be written back and ends the machine. Returns only if the kernel refuses.
pub fn end_machine(power: Power) -> io::Error {
    let (done, waiting) = mpsc::channel();
    thread::spawn(move || {
        sys::sync();
        let _ = done.send(());
    });
    if waiting.recv_timeout(SYNC_TIMEOUT).is_err() {
        say("File systems do not finish writing; the machine ends without them");
    }
    sys::reboot(match power {
        Power::Off => libc::RB_POWER_OFF,
        Power::Reboot => libc::RB_AUTOBOOT,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_divided() {
        assert_eq!(
            mount_options("ro,trans=virtio,nosuid,cache=loose"),
            (libc::MS_RDONLY | libc::MS_NOSUID, "trans=virtio,cache=loose".into())
        );
        assert_eq!(mount_options(""), (0, String::new()));
    }
}
