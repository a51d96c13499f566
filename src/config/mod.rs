//! The one description of a machine.
//!
//! The command line, the machine file (TOML) and the API all end in the types of this module, so that a machine can
//! be said in only one way and is checked in only one place. The steps, in order:
//!
//! 1. parse: [`Machine::load`] reads the machine file, [`MachineArgs`](crate::cli::MachineArgs) puts the command
//!    line over it;
//! 2. [`Machine::complete`] fills in what has a default that depends on the rest (device ids);
//! 3. [`Machine::validate`], a pure function, refuses what no host could build;
//! 4. [`Machine::check_host`] looks at the files and the memory of this host. It changes nothing.
//!
//! Defaults stand in [`Machine::default`] and nowhere else.

mod cpu;
mod dimm;
mod disk;
mod e820;
mod error;
mod file;
mod host;
mod image;
mod keyvalue;
mod pmem;
mod preset;
mod switch;
mod topology;
mod unflushed;
mod validate;
mod way;

use std::path::PathBuf;

use aconite_acpi::layout::{MAX_DIMMS, MAX_HOST_BRIDGES};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use self::cpu::{Cpu, CpuVendor, MachineChecks};
pub use self::dimm::{Ars, Dimms, Family, Labels, StateFlags};
pub use self::disk::{Disk, DiskKeys};
pub use self::e820::E820Type;
pub use self::error::{ConfigError, Warning, nearest};
pub use self::host::{Checked, CheckedPmem};
pub use self::image::{ImageKind, KernelImage};
pub use self::keyvalue::KeyValues;
pub use self::pmem::{Channel, INTERLEAVE, Place, Pmem, PmemKeys, PmemSource, Via};
pub use self::topology::{RangeKind, validate_bus};
pub use self::unflushed::Unflushed;
pub use self::validate::{MAX_CPUS, MAX_PORTS, MAX_UNITS, validate_insert};
use crate::units::{GIB, Size, TimeSpan};

/// Everything that is needed to build a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Machine {
    /// The kernel image: a bzImage or an ELF vmlinux for x86-64. There is no default.
    #[serde(skip_serializing_if = "is_empty_path")]
    pub kernel: PathBuf,
    /// An initial RAM disk, handed to the guest after the one that is packed for the agent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initrd: Option<PathBuf>,
    /// Words that are added to the end of the kernel's command line.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub cmdline: String,
    /// Number of vCPUs, 1 to 64.
    pub cpus: u32,
    /// RAM, a multiple of 2 MiB.
    pub memory: Size,
    /// Where KVM comes from.
    pub host: HostChoice,
    /// A Unix socket on which the API answers. Default: no API.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub api_socket: Option<PathBuf>,
    /// Directory of the kernel's modules (`…/lib/modules/VERSION`). Default: beside the kernel, then the host's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub modules: Option<PathBuf>,
    /// Programs of the host to pack for the guest, by name or path, with their libraries.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tools: Vec<String>,
    /// Further files of the host to pack for the guest.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<PackedFile>,
    /// Whether the guest agent is packed and started as PID 1.
    pub agent: bool,
    /// What runs in the guest, with its arguments. Default: the machine runs until it powers off.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub command: Vec<String>,
    /// When to give up: the machine is stopped and the exit status is 124.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout: Option<TimeSpan>,
    /// Directory for results, logs and tables of this run. Default: none is kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub run_dir: Option<PathBuf>,
    /// Directory for what outlives the machine. Default: nothing does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state: Option<PathBuf>,
    /// What the guest sees of its processors and clocks.
    pub cpu: Cpu,
    /// What may arrive while the machine runs.
    pub slots: Slots,
    /// Persistent memory devices that are there from the start.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub pmem: Vec<Pmem>,
    /// Disks.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub disk: Vec<Disk>,
}

impl Default for Machine {
    fn default() -> Self {
        Self {
            kernel: PathBuf::new(),
            initrd: None,
            cmdline: String::new(),
            cpus: 1,
            memory: Size(GIB),
            host: HostChoice::Auto,
            api_socket: None,
            modules: None,
            tools: Vec::new(),
            files: Vec::new(),
            agent: true,
            command: Vec::new(),
            timeout: None,
            run_dir: None,
            state: None,
            cpu: Cpu::default(),
            slots: Slots::default(),
            pmem: Vec::new(),
            disk: Vec::new(),
        }
    }
}

fn is_empty_path(path: &std::path::Path) -> bool {
    path.as_os_str().is_empty()
}

/// Where KVM comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum HostChoice {
    /// This host's KVM where it can run stock kernels, otherwise the software KVM host.
    #[default]
    Auto,
    /// This host's KVM, or an error.
    Kvm,
    /// The software KVM host.
    Nested,
}

/// What may arrive while the machine runs: ACPI tables are static, so it is declared at the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Slots {
    /// Free NFIT units, besides those of the devices that are there from the start.
    pub nfit: u32,
    /// Free PCI Express ports with a slot, besides those of the devices that are there from the start.
    pub pcie: u32,
    /// Free host bridges with a root bus each, besides those of the devices that are there from the start.
    pub bridge: u32,
    /// Whether the slots of PCI Express ports have an attention button, indicators and a power controller. Without them
    /// a device can only be pulled.
    pub button: bool,
    /// The largest device that fits into a free slot.
    pub size: Size,
    /// The largest number of DIMMs that what comes into a slot can have.
    pub dimms: u32,
}

impl Default for Slots {
    fn default() -> Self {
        Self { nfit: 0, pcie: 0, bridge: 0, button: true, size: Size(4 * GIB), dimms: 1 }
    }
}

impl Slots {
    const KEYS: [&str; 6] = ["nfit", "pcie", "bridge", "button", "size", "dimms"];

    /// Puts the value of `--slots nfit=N,pcie=N,bridge=N,button=on|off,size=SIZE,dimms=M` over these settings.
    ///
    /// # Errors
    /// Names the key, its value and what would be right.
    pub fn apply(&mut self, option: &str, text: &str) -> Result<(), ConfigError> {
        let mut list = KeyValues::parse(option, text)?;
        let counts = [
            ("nfit", "units", MAX_UNITS, &mut self.nfit),
            ("pcie", "ports", MAX_PORTS, &mut self.pcie),
            ("bridge", "host bridges", MAX_HOST_BRIDGES, &mut self.bridge),
            ("dimms", "DIMMs", MAX_DIMMS, &mut self.dimms),
        ];
        for (key, what, most, count) in counts {
            let wrong = |error| ConfigError {
                problem: format!("a number of {what} was expected"),
                remedy: format!("give {key}=4 or another number up to {most}"),
                ..error
            };
            if let Some(given) = list.take(key).map_err(wrong)? {
                *count = given;
            }
        }
        if let Some(button) = list.take_switch("button")? {
            self.button = button;
        }
        if let Some(size) = list.take("size")? {
            self.size = size;
        }
        list.finish(&Self::KEYS)
    }
}

/// A file of the host that is packed for the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PackedFile {
    /// The file on the host.
    pub source: PathBuf,
    /// Its absolute path in the guest.
    pub target: PathBuf,
}

impl PackedFile {
    /// Parses `SOURCE[:TARGET]`; without a target the file keeps its own absolute path.
    ///
    /// # Errors
    /// An empty or relative target, or an empty source.
    pub fn parse(option: &str, text: &str) -> Result<Self, ConfigError> {
        let (source, target) = match text.rsplit_once(':') {
            Some((source, target)) => (PathBuf::from(source), PathBuf::from(target)),
            None => {
                let source = PathBuf::from(text);
                let target = std::path::absolute(&source).unwrap_or_else(|_| source.clone());
                (source, target)
            }
        };
        if source.as_os_str().is_empty() || !target.is_absolute() {
            return Err(ConfigError::invalid(
                option,
                format_args!("{text:?}"),
                "it needs a file of the host and an absolute path in the guest",
                "write SOURCE:/TARGET, such as ./test.sh:/usr/bin/test.sh",
            ));
        }
        Ok(Self { source, target })
    }
}

impl Machine {
    /// The number of PCI Express ports: one for each device behind one, and the free ones.
    pub fn ports(&self) -> u32 {
        let ports = self.devices_behind_ports() + u64::from(self.slots.pcie);
        u32::try_from(ports).unwrap_or(u32::MAX)
    }

    /// The number of host bridges that come and go: one for each device behind one, and the free ones.
    pub fn host_bridges(&self) -> u32 {
        let bridges = self.devices_behind_bridges() + u64::from(self.slots.bridge);
        u32::try_from(bridges).unwrap_or(u32::MAX)
    }

    /// Devices that are there from the start and sit behind a port.
    fn devices_behind_ports(&self) -> u64 {
        let cards = self.pmem.iter().filter(|pmem| pmem.via == Via::Virtio).count();
        (self.disk.len() + cards) as u64 - self.devices_behind_bridges()
    }

    /// Devices that are there from the start and sit behind a host bridge of their own.
    fn devices_behind_bridges(&self) -> u64 {
        self.pmem.iter().filter(|pmem| pmem.behind_bridge()).count() as u64
    }

    /// Gives every device without an id the first free one of `p0`, `p1`, …, and every disk of `d0`, `d1`, …
    pub fn complete(&mut self) {
        for index in 0..self.pmem.len() {
            if self.pmem[index].id.is_empty() {
                let free = (0..).map(|n| format!("p{n}")).find(|id| self.pmem.iter().all(|p| p.id != *id));
                self.pmem[index].id = free.unwrap_or_default();
            }
        }
        for index in 0..self.disk.len() {
            if self.disk[index].id.is_empty() {
                let used = |id: &str| self.disk.iter().any(|disk| disk.id == id);
                let free = (0..).map(|n| format!("d{n}")).find(|id| !used(id));
                self.disk[index].id = free.unwrap_or_default();
            }
        }
    }
}

#[cfg(test)]
#[path = "config_test.rs"]
mod tests;
