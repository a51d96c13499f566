//! Level 1: the machine in QEMU whose Linux has the KVM.
//!
//! The host's file system is there twice. The root is the host's `/`, read-only and cached without ever looking
//! again, under an overlay in memory: programs and libraries start fast. The directories where users keep their
//! files, [`live_directories`], lie over it through a second share, whose files are looked at anew whenever they are
//! opened, can be written, and can be mapped shared; what is mapped there reaches the host with msync. So a program
//! in level 1 finds every file of the user under its own path.

use crate::host::material::{Kernel, Qemu};
use crate::host::resources::Resources;
use crate::host::sys;
use aconite_agent::config::{ROLE_HOST, ROOT_TAG, SHARE_OPTIONS};
use aconite_agent::protocol::{PORT_NAME, Share};
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// How often a QEMU that is about to end is asked whether it has.
const END_POLL: Duration = Duration::from_millis(10);

/// The processor of level 1. EPYC v1 lacks ERMS, without which Linux loses its recoverable copy. What is taken away
/// TCG does not have: it would only warn.
const CPU: &str = "EPYC,+svm,+npt,+erms,-fxsr-opt,-misalignsse,-osvw,-topoext,-nrip-save,-xsavec";

/// Kernel command line of level 1. Mitigations and watchdogs only cost time there: nothing in it is of another user,
/// and emulated time stands still when the host is busy.
const COMMAND_LINE: &str = "console=ttyS0 quiet panic=-1 mitigations=off nowatchdog audit=0 \
                            rcupdate.rcu_cpu_stall_suppress=1 random.trust_cpu=on";

/// Mount tag of the second share.
const LIVE_TAG: &str = "live";

/// Where the second share is mounted as a whole in level 1: the host's `/` as it is now.
pub const LIVE_ROOT: &str = "/run/aconite/host";

/// Where sockets of programs in level 1 are.
pub const SOCKET_DIR: &str = "/run/aconite/sockets";

/// Directories of level 1 that are not the host's: its own kernel's, and those served from the cached root.
const NOT_LIVE: [&str; 13] = [
    "bin",
    "boot",
    "dev",
    "lib",
    "lib32",
    "lib64",
    "libx32",
    "lost+found",
    "proc",
    "run",
    "sbin",
    "sys",
    "usr",
];

/// Directories below those that users keep files in nevertheless.
const LIVE_BELOW: [&str; 4] = ["dev/shm", "run/user", "usr/local", "usr/src"];

/// All that decides what level 1 is, beside the files it is made of: part of the key.
pub fn settings() -> String {
    format!("{CPU} {COMMAND_LINE} {SHARE_OPTIONS} {NOT_LIVE:?} {LIVE_BELOW:?} {}", env!("CARGO_PKG_VERSION"))
}

/// The directories of the host, relative to `root`, that level 1 sees through the second share.
pub fn live_directories(root: &Path) -> Vec<PathBuf> {
    let mut directories: Vec<PathBuf> = fs::read_dir(root)
        .into_iter()
        .flatten()
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let name = entry.file_name();
            let plain = entry.file_type().is_ok_and(|kind| kind.is_dir());
            (plain && !NOT_LIVE.iter().any(|not| name == *not)).then(|| PathBuf::from(name))
        })
        .collect();
    directories.extend(LIVE_BELOW.iter().map(PathBuf::from).filter(|dir| root.join(dir).is_dir()));
    directories.sort();
    directories
}

/// The path at which level 1 finds a file of the host as it is now.
pub fn live_path(path: &Path) -> PathBuf {
    let relative = path.strip_prefix("/").unwrap_or(path);
    let first = relative.components().next().map(|c| c.as_os_str().to_owned()).unwrap_or_default();
    if LIVE_BELOW.iter().any(|dir| relative.starts_with(dir)) || !NOT_LIVE.iter().any(|not| first == *not) {
        path.to_owned()
    } else {
        Path::new(LIVE_ROOT).join(relative)
    }
}

/// The second share, as the agent mounts it.
pub fn live_share() -> Share {
    Share { tag: LIVE_TAG.into(), path: LIVE_ROOT.into(), options: SHARE_OPTIONS.into() }
}

/// A shell script that prepares a started level 1 for machines.
pub fn setup_script() -> String {
    let directories = live_directories(Path::new("/"));
    let list = |line: &dyn Fn(&str) -> String| -> String {
        directories.iter().map(|dir| line(&dir.to_string_lossy())).collect()
    };
    let paths = list(&|dir| format!(" {}", quote(&format!("/{dir}"))));
    // One process for all mounts: each start of a program costs here.
    let table = list(&|dir| {
        let dir = fstab(dir);
        format!("{LIVE_ROOT}/{dir} /{dir} none bind 0 0\n")
    });
    let mut script = format!(
        "set -e\nmkdir -p {SOCKET_DIR}{paths}\nchmod 700 {SOCKET_DIR}\n\
         cat > /run/aconite/live <<'END-OF-LIST'\n{table}END-OF-LIST\n\
         mount --all --fstab /run/aconite/live\n"
    );
    // Huge pages for the memory of guests, where it is asked for; and no polling for interrupts, which under
    // emulation only takes time from the other processors.
    script += "echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled || :\n\
               echo 0 > /sys/module/kvm/parameters/halt_poll_ns || :\n";
    script
}

/// `text` as one word of a shell.
fn quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}

/// `text` as a field of fstab(5).
fn fstab(text: &str) -> String {
    text.replace('\\', "\\134").replace(' ', "\\040").replace('\t', "\\011").replace('\n', "\\012")
}

/// What drives the clock of level 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Clock {
    /// The host's time; a thread for each processor.
    #[default]
    Wall,
    /// Instructions: one nanosecond for each, of all levels together, on one processor. Idle time is skipped. What
    /// is measured with it repeats, however busy the host is.
    Instructions,
}

/// What level 1 is started from.
pub struct Parts<'a> {
    /// The emulator.
    pub qemu: &'a Qemu,
    /// The kernel.
    pub kernel: &'a Kernel,
    /// The initramfs with the agent.
    pub image: &'a Path,
    /// Where the console's output goes.
    pub console: &'a Path,
    /// Where QEMU's messages go.
    pub log: File,
    /// What drives its clock.
    pub clock: Clock,
}

/// A running QEMU. It dies with the thread that started it.
#[derive(Debug)]
pub struct Machine {
    child: Child,
}

impl Machine {
    /// Starts it; returns it with the connection to its agent.
    ///
    /// # Errors
    /// Too little memory, or QEMU cannot be started.
    pub fn start(parts: Parts) -> io::Result<(Self, UnixStream)> {
        let resources = Resources::of_this_host();
        let memory = resources.nested_memory().map_err(io::Error::other)?;
        let (ours, theirs) = UnixStream::pair()?;
        let mut command =
            parts.qemu.command().ok_or_else(|| io::Error::other("QEMU is not there any more"))?;
        arguments(&mut command, &parts, memory, resources.cpus);
        command.stdin(OwnedFd::from(theirs)).stdout(Stdio::from(parts.log.try_clone()?)).stderr(parts.log);
        sys::die_with_parent(&mut command);
        let child = command.spawn()?;
        Ok((Machine { child }, ours))
    }

    /// How QEMU ended, if it has or does so in time.
    pub fn ended_within(&mut self, limit: Duration) -> io::Result<Option<ExitStatus>> {
        let end = Instant::now() + limit;
        loop {
            let status = self.child.try_wait()?;
            if status.is_some() || Instant::now() >= end {
                return Ok(status);
            }
            thread::sleep(END_POLL);
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn arguments(command: &mut Command, parts: &Parts, memory: u64, cpus: usize) {
    match parts.clock {
        Clock::Wall => {
            // The first one runs no guests (`leave_first_processor` of the agent).
            command.args(["-accel", "tcg,thread=multi,tb-size=1024", "-smp", &(cpus + 1).to_string()]);
        }
        Clock::Instructions => {
            command.args(["-accel", "tcg,thread=single,tb-size=1024", "-smp", "1"]);
            command.args(["-icount", "shift=0,sleep=off"]);
        }
    }
    // QEMU takes a doubled comma for a comma.
    let escape = |path: &Path| path.to_string_lossy().replace(',', ",,");
    command
        .args([
            "-name",
            "aconite-host",
            "-nodefaults",
            "-no-user-config",
            "-machine",
            "q35,usb=off,vmport=off",
        ])
        .args(["-cpu", CPU, "-m", &format!("{}M", memory >> 20)])
        .args(["-display", "none", "-monitor", "none", "-no-reboot"])
        .arg("-kernel")
        .arg(&parts.kernel.image)
        .arg("-initrd")
        .arg(parts.image)
        .args(["-append", &format!("{COMMAND_LINE} {ROLE_HOST}")])
        .args([
            "-chardev",
            &format!("file,id=console,path={}", escape(parts.console)),
            "-serial",
            "chardev:console",
        ])
        // The connection to the agent is QEMU's standard input, a socket.
        .args(["-chardev", "socket,id=agent,fd=0", "-device", "virtio-serial-pci,max_ports=2"])
        .args(["-device", &format!("virtserialport,chardev=agent,name={PORT_NAME}")])
        .args(["-fsdev", "local,id=root,path=/,security_model=none,multidevs=remap,readonly=on"])
        .args(["-device", &format!("virtio-9p-pci,fsdev=root,mount_tag={ROOT_TAG}")])
        .args(["-fsdev", "local,id=live,path=/,security_model=none,multidevs=remap"])
        .args(["-device", &format!("virtio-9p-pci,fsdev=live,mount_tag={LIVE_TAG}")])
        // Memory that is free inside goes back to the host.
        .args(["-device", "virtio-balloon-pci,free-page-reporting=on"])
        .args(["-object", "rng-random,id=rng,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=rng"]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_files_are_live() {
        let dir = tempfile::tempdir().unwrap();
        for sub in ["home", "usr/local", "usr/share", "proc", "srv"] {
            fs::create_dir_all(dir.path().join(sub)).unwrap();
        }
        std::os::unix::fs::symlink("usr/lib", dir.path().join("lib64")).unwrap();
        std::os::unix::fs::symlink("home", dir.path().join("work")).unwrap();
        fs::write(dir.path().join("file"), "").unwrap();
        let expected: Vec<PathBuf> = ["home", "srv", "usr/local"].map(PathBuf::from).into();
        assert_eq!(live_directories(dir.path()), expected);
    }

    #[test]
    fn programs_are_run_as_they_are_now() {
        assert_eq!(live_path(Path::new("/home/u/aconite")), Path::new("/home/u/aconite"));
        assert_eq!(live_path(Path::new("/usr/local/bin/aconite")), Path::new("/usr/local/bin/aconite"));
        assert_eq!(live_path(Path::new("/usr/bin/aconite")), Path::new("/run/aconite/host/usr/bin/aconite"));
        assert_eq!(live_path(Path::new("/usr/localised/a")), Path::new("/run/aconite/host/usr/localised/a"));
    }

    #[test]
    fn the_setup_script_is_a_script() {
        let status = Command::new("sh").args(["-n", "-c", &setup_script()]).status().unwrap();
        assert!(status.success());
        assert_eq!(quote("it's"), "'it'\\''s'");
    }
}
