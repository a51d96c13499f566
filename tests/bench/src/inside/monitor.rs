//! The contestants' command lines, and one of them while it runs.

use crate::plan::{Console, Contestant, Image, Plan};
use aconite::host::material::{Material, Qemu};
use anyhow::{Context, Result, bail};
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

/// RAM of the guests, in MiB.
pub const RAM_MIB: u64 = 512;
/// What process 1 of the guest says.
const MARKER: &[u8] = b"aconite-bench: init";
/// How a line begins by which the guest says that its work has failed.
const ERROR: &str = "disk-error";
/// What aconite puts on every kernel command line; QEMU is given the same.
const COMMON: &str = "console=ttyS0 panic=-1 printk.devkmsg=on";
/// How often the console is looked at. Waking for every byte would cost more than some of the contestants.
const LOOK: Duration = Duration::from_millis(4);
/// Room of the console's pipe: nobody ever waits for its reader.
const PIPE_SIZE: libc::c_int = 1 << 20;

/// Where QEMU takes what comes later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// A slot for memory, over ACPI.
    Memory,
    /// A PCI Express root port, `rp0`, with the hot-plug of PCI Express itself.
    Port,
    /// The same, over ACPI.
    AcpiPort,
}

/// What a machine is started with.
#[derive(Clone, Copy, Debug)]
pub struct Start<'a> {
    pub contestant: Contestant,
    pub image: Image,
    pub console: Console,
    /// A memory device of 1 GiB, for contestants that have them.
    pub pmem: bool,
    /// A place for what comes later, in QEMU.
    pub place: Option<Place>,
    /// The file of a disk, which the guest puts to work.
    pub disk: Option<&'a Path>,
    /// Where to listen for control.
    pub socket: Option<&'a Path>,
}

impl Start<'_> {
    /// A kernel by PVH that says nothing, and nothing besides.
    pub fn quiet(contestant: Contestant) -> Self {
        Self {
            contestant,
            image: Image::Vmlinux,
            console: Console::Quiet,
            pmem: false,
            place: None,
            disk: None,
            socket: None,
        }
    }
}

/// A monitor that runs. It is killed when this is dropped.
#[derive(Debug)]
pub struct Monitor {
    child: Child,
    output: ChildStdout,
    console: Vec<u8>,
    /// Bytes of the console before the line that was asked for last ended.
    heard: usize,
    errors: PathBuf,
    started: Duration,
    timeout: Duration,
}

impl Monitor {
    /// Starts a machine.
    pub fn start(plan: &Plan, start: &Start) -> Result<Self> {
        let mut command = command(plan, start)?;
        let errors = plan.dir.join("errors");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(File::create(&errors)?);
        let started = now();
        let mut child = command.spawn().with_context(|| format!("Cannot start {}", start.contestant))?;
        let output = child.stdout.take().context("The monitor has no standard output")?;
        // SAFETY: these calls only set flags and the size of a pipe of ours.
        let set = unsafe {
            libc::fcntl(output.as_raw_fd(), libc::F_SETPIPE_SZ, PIPE_SIZE);
            libc::fcntl(output.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK)
        };
        let timeout = plan.boot_timeout;
        let monitor = Monitor { child, output, console: Vec::new(), heard: 0, errors, started, timeout };
        if set < 0 {
            bail!("Cannot read the console without waiting: {}", std::io::Error::last_os_error());
        }
        Ok(monitor)
    }

    /// Process id of the monitor.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// When the monitor was started, on the monotonic clock.
    pub fn started(&self) -> Duration {
        self.started
    }

    /// Bytes on the serial line so far.
    pub fn console_bytes(&self) -> u64 {
        self.console.len() as u64
    }

    /// Waits until process 1 has spoken; returns how long that took from the start.
    pub fn wait_for_init(&mut self) -> Result<Duration> {
        let deadline = Instant::now() + self.timeout;
        loop {
            let before = self.console.len().saturating_sub(MARKER.len());
            let open = self.take_output()?;
            if self.console[before..].windows(MARKER.len()).any(|window| window == MARKER) {
                return Ok(now() - self.started);
            }
            if !open || Instant::now() > deadline {
                bail!(
                    "No user space after {:?}{}; console: {:?}; errors: {:?}",
                    now() - self.started,
                    if open { "" } else { ", the monitor has ended" },
                    self.last_words(),
                    std::fs::read_to_string(&self.errors).unwrap_or_default()
                );
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Waits for a line that starts with `word`, and returns what follows it.
    pub fn wait_for_line(&mut self, word: &str) -> Result<String> {
        let deadline = Instant::now() + self.timeout;
        loop {
            let open = self.take_output()?;
            while let Some(length) = self.console[self.heard..].iter().position(|byte| *byte == b'\n') {
                let line = String::from_utf8_lossy(&self.console[self.heard..][..length]).into_owned();
                self.heard += length + 1;
                if line.starts_with(ERROR) {
                    bail!("The guest says {line:?}");
                }
                if let Some(rest) = line.trim().strip_prefix(word) {
                    return Ok(rest.trim().to_owned());
                }
            }
            if !open || Instant::now() > deadline {
                bail!("The guest does not say {word:?}; console: {:?}", self.last_words());
            }
            std::thread::sleep(LOOK);
        }
    }

    /// The end of the console.
    fn last_words(&self) -> String {
        String::from_utf8_lossy(&self.console[self.console.len().saturating_sub(600)..]).into_owned()
    }

    /// Reads what is there; `false` at the end.
    fn take_output(&mut self) -> Result<bool> {
        let mut buffer = [0; 1 << 16];
        loop {
            match self.output.read(&mut buffer) {
                Ok(0) => return Ok(false),
                Ok(count) => self.console.extend_from_slice(&buffer[..count]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(true),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The monotonic clock, which tracing uses too.
pub fn now() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel writes to a structure of ours.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

fn command(plan: &Plan, start: &Start) -> Result<Command> {
    let own = match start.console {
        Console::Quiet => "quiet",
        Console::Log => "loglevel=7",
    };
    let kernel = plan.dir.join(match start.image {
        Image::Vmlinux => "vmlinux",
        Image::Bzimage => "vmlinuz",
    });
    let initrd = plan.dir.join(if start.disk.is_some() { "initrd-disk" } else { "initrd" });
    // The kernel makes process 1's environment of parameters that it does not know.
    let own = if start.disk.is_some() { format!("{own} disk=work") } else { own.to_owned() };
    if start.contestant == Contestant::Aconite {
        let mut command = Command::new(plan.dir.join("aconite"));
        command.args(["run", "--host=kvm", "--no-agent", "--cpus=1"]);
        command.arg(format!("--memory={RAM_MIB}M")).arg("--append").arg(own);
        if let Some(disk) = start.disk {
            command.arg(format!("--disk=file={},id=d0", disk.display()));
        }
        command.arg("--kernel").arg(kernel).arg("--initrd").arg(initrd);
        if start.pmem {
            command.args(["--pmem", "size=1G,id=p0"]);
        }
        if let Some(socket) = start.socket {
            command.arg("--api-socket").arg(socket);
        }
        return Ok(command);
    }
    let material = Material::at(plan.dir.join("material"));
    let qemu = Qemu::find(material.as_ref()).context("There is no QEMU")?;
    let mut command = qemu.command().context("There is no QEMU")?;
    command.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-cpu", "host"]);
    let slots = if start.place == Some(Place::Memory) { ",slots=1,maxmem=4G" } else { "" };
    command.args(["-smp", "1", "-m", &format!("{RAM_MIB}M{slots}"), "-serial", "stdio"]);
    let machine = match start.contestant {
        // As small as it gets: qboot enters the kernel at once; without PIC and PIT the kernel takes the timers that
        // KVM has; an RTC saves the kernel a second of polling.
        Contestant::Microvm => {
            command.args(["-bios", "qboot.rom"]);
            "microvm,accel=kvm,rtc=on,pit=off,pic=off,isa-serial=on,x-option-roms=off"
        }
        _ => "q35,accel=kvm,hpet=off,usb=off,vmport=off",
    };
    command.arg("-machine").arg(machine);
    command.arg("-kernel").arg(kernel).arg("-initrd").arg(initrd);
    // What comes is not taken into use, so that it can go again.
    let unused = if start.place == Some(Place::Memory) { " memhp_default_state=offline" } else { "" };
    command.arg("-append").arg(format!("{COMMON} {own}{unused}"));
    if let Some(Place::Port | Place::AcpiPort) = start.place {
        let acpi = if start.place == Some(Place::AcpiPort) { "on" } else { "off" };
        let acpi = format!("ICH9-LPC.acpi-pci-hotplug-with-bridge-support={acpi}");
        command.args(["-global", &acpi, "-device", "pcie-root-port,id=rp0,chassis=1"]);
    }
    if let Some(disk) = start.disk {
        // The same cache as aconite's: the host's pages, written back when the guest flushes; threads read and write.
        let file = format!("file={},if=none,id=d0,format=raw,cache=writeback,aio=threads", disk.display());
        command.args(["-drive", &file, "-device", "virtio-blk-pci,drive=d0"]);
    }
    if let Some(socket) = start.socket {
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", socket.display()));
    }
    Ok(command)
}
