//! What is measured: the steps that the outside orders and the inside carries out, and what each yields.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

/// Who is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Contestant {
    /// This project's monitor.
    Aconite,
    /// QEMU's PC with PCI Express.
    Q35,
    /// QEMU's machine without legacy devices.
    Microvm,
}

impl Contestant {
    /// All of them, in the order in which they take turns.
    pub const ALL: [Contestant; 3] = [Contestant::Aconite, Contestant::Q35, Contestant::Microvm];
}

impl fmt::Display for Contestant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Contestant::Aconite => "aconite",
            Contestant::Q35 => "q35",
            Contestant::Microvm => "microvm",
        })
    }
}

/// The form of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Image {
    /// ELF, entered by PVH.
    Vmlinux,
    /// Compressed, unpacks itself in the guest.
    Bzimage,
}

/// How much the guest's kernel says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Console {
    /// `quiet`.
    Quiet,
    /// The whole log on the serial line.
    Log,
}

/// Where poisoned lines lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Layout {
    /// One after the other: 64 a page.
    Packed,
    /// One in every page.
    Paged,
    /// One in every block of 2 MiB.
    Scattered,
}

/// How a device goes and comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    /// QEMU's memory on a slot (pc-dimm), over ACPI.
    Dimm,
    /// A virtio device of QEMU's behind a PCI Express port, by its button.
    Card,
    /// The same behind a port over ACPI, as q35 has it by default.
    AcpiCard,
    /// An NVDIMM whose guest is asked over ACPI.
    Container,
    /// An NVDIMM that is taken away first; the guest is told over ACPI.
    Surprise,
    /// An NVDIMM whose driver the agent unbinds.
    Agent,
    /// Virtio-pmem behind a PCI Express port, by its button.
    Port,
    /// Virtio-pmem behind a host bridge, over ACPI.
    Bridge,
}

impl Way {
    /// All of them.
    pub const ALL: [Way; 8] = [
        Way::Dimm,
        Way::Card,
        Way::AcpiCard,
        Way::Container,
        Way::Surprise,
        Way::Agent,
        Way::Port,
        Way::Bridge,
    ];

    /// The way of QEMU's that is like this one of aconite's.
    pub fn peer(self) -> Option<Way> {
        match self {
            Way::Container => Some(Way::Dimm),
            Way::Port => Some(Way::Card),
            Way::Bridge => Some(Way::AcpiCard),
            Way::Dimm | Way::Card | Way::AcpiCard | Way::Surprise | Way::Agent => None,
        }
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Way::Dimm => "pc-dimm of q35",
            Way::Card => "virtio of q35, port",
            Way::AcpiCard => "virtio of q35, ACPI",
            Way::Container => "orderly, container",
            Way::Surprise => "surprise, container",
            Way::Agent => "orderly, agent",
            Way::Port => "virtio-pmem, port",
            Way::Bridge => "virtio-pmem, bridge",
        })
    }
}

/// How many DIMMs a machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Dimms {
    /// One, on a bus of its own.
    One,
    /// 64, on eight buses (`--preset nvdimm64`).
    Many,
}

impl Dimms {
    /// Both, in the order in which they take turns.
    pub const ALL: [Dimms; 2] = [Dimms::One, Dimms::Many];
}

/// One thing to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Step {
    /// What KVM and the system themselves cost.
    Floors,
    /// From exec to process 1.
    Boot {
        /// Who.
        contestant: Contestant,
        /// With which kernel.
        image: Image,
        /// With which console.
        console: Console,
        /// The turn, from 0.
        round: u32,
    },
    /// Where a boot's exits come from; its times are not used, being traced.
    Profile {
        /// Who.
        contestant: Contestant,
        /// With which console.
        console: Console,
        /// With a memory device.
        pmem: bool,
    },
    /// Round trips on the control socket.
    Control {
        /// Who.
        contestant: Contestant,
    },
    /// A memory device read beside RAM.
    Pmem {
        /// Lines that are poisoned elsewhere in it.
        poisons: u64,
        /// How they lie.
        layout: Layout,
    },
    /// Clean lines of a guarded page.
    Clean {
        /// Number of vCPUs; all but one are idle.
        cpus: u32,
    },
    /// A poisoned line that is loaded, and a machine check by request.
    Trap,
    /// Lines that are poisoned by request.
    Add {
        /// How many.
        poisons: u64,
        /// How they lie.
        layout: Layout,
    },
    /// A device that goes and comes.
    Cycles {
        /// How.
        way: Way,
    },
    /// Requests to a disk.
    Disk {
        /// Who.
        contestant: Contestant,
        /// The turn, from 0.
        round: u32,
    },
    /// A call of the firmware of NVDIMMs.
    Dsm,
    /// A scrub of a memory device.
    Scrub {
        /// GiB of the device.
        gib: u64,
        /// Lines that are poisoned in it, each an error of its own.
        poisons: u64,
    },
    /// From the first run of the processors to the agent.
    Dimms {
        /// With which DIMMs.
        dimms: Dimms,
        /// The turn, from 0.
        round: u32,
    },
}

/// What a step yields.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Measured {
    /// Nanoseconds by name.
    Floors(BTreeMap<String, f64>),
    /// A boot.
    Boot(Boot),
    /// A traced boot.
    Profile(Profile),
    /// Round trips.
    Control(Control),
    /// A memory device.
    Pmem(Pmem),
    /// Clean lines of a guarded page.
    Clean(Clean),
    /// A poisoned line.
    Trap(Trap),
    /// Lines that were poisoned.
    Add(Added),
    /// A device that goes and comes.
    Cycles(Cycles),
    /// Requests to a disk, by load.
    Disk(BTreeMap<String, Requests>),
    /// A call of the firmware of NVDIMMs.
    Dsm(Dsm),
    /// A scrub.
    Scrub(Scrub),
    /// Nanoseconds from the first run of the processors to the agent.
    Dimms(u64),
}

/// Requests to a disk: the shortest time of several turns, and the fewest exits.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Requests {
    /// Nanoseconds of a request.
    pub time: f64,
    /// Exits of a request.
    pub exits: f64,
    /// Exits of a request to the monitor.
    pub monitor_exits: f64,
}

/// A call of the firmware of NVDIMMs, by a process of the guest.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Dsm {
    /// Nanoseconds.
    pub time: f64,
    /// Exits.
    pub exits: f64,
}

/// A scrub, in nanoseconds of the guest.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Scrub {
    /// From the start until a process has all errors from the firmware.
    pub listed: u64,
    /// Errors that an answer of the firmware holds.
    pub answer: u64,
    /// From the start until the kernel lists so many, when there are no more.
    pub by_kernel: u64,
}

/// A device that goes and comes, in nanoseconds, the middle one of several cycles.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Cycles {
    /// From the request until the guest has let go of it and it is gone.
    pub unplug: u64,
    /// From the request until the guest can use it.
    pub plug: u64,
    /// What of both the monitor took for itself, if it says so.
    pub own: Option<u64>,
}

/// Clean lines of a guarded page.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Clean {
    /// Nanoseconds of a load.
    pub load: f64,
    /// The same in a page that is not guarded.
    pub plain: f64,
    /// Nanoseconds of `rep movsb` over a page up to its last line, which is poisoned.
    pub copy: f64,
    /// Exits of that.
    pub copy_exits: f64,
}

/// A poisoned line, in nanoseconds.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Trap {
    /// From before the load to the first instruction of the guest's handler.
    pub trap: f64,
    /// The request that clears the line.
    pub clear: f64,
    /// The first load after that.
    pub good: f64,
    /// From a request for a machine check to the first instruction of the guest's handler.
    pub latency: f64,
}

/// Lines that were poisoned.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Added {
    /// What the monitor said.
    pub said: String,
    /// Nanoseconds.
    pub time: u64,
    /// KiB that the monitor has grown by.
    pub memory: u64,
    /// Its maps afterwards.
    pub maps: u64,
}

/// A boot.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Boot {
    /// Nanoseconds from exec to process 1's line.
    pub to_init: u64,
    /// Bytes on the serial line.
    pub console_bytes: u64,
    /// KVM's counters of the machine.
    pub counters: BTreeMap<String, u64>,
    /// Memory of the monitor.
    pub memory: Memory,
}

/// Memory of a monitor at init, in KiB.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Memory {
    /// Its share of everything but the guest's memory (Pss).
    pub own: u64,
    /// What of that is private and written.
    pub private_dirty: u64,
    /// Its share of the guest's memory.
    pub guest: u64,
}

/// Where a boot's exits come from.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Profile {
    /// Nanoseconds from exec to the first entry into the guest.
    pub to_first_entry: u64,
    /// Bytes on the serial line.
    pub console_bytes: u64,
    /// Exits to the monitor, by KVM_EXIT number.
    pub user_exits: BTreeMap<String, u64>,
    /// Nanoseconds between exits to the monitor and the next entry, the tracing included.
    pub user_time: u64,
    /// Port accesses, by port and direction; those that KVM serves included.
    pub ports: BTreeMap<String, u64>,
    /// Accesses to devices in memory, by address and direction; those that KVM serves included.
    pub mmio: BTreeMap<String, u64>,
}

/// Round trips, in nanoseconds, the shortest of many.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Control {
    /// On a connection that stays.
    pub kept: u64,
    /// With a connection for each, if that is possible.
    pub connected: Option<u64>,
    /// Of one byte on a pair of sockets between two threads, measured at the same time.
    pub floor: u64,
}

/// A memory device, read beside RAM.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Pmem {
    /// What the monitor said when the lines were poisoned.
    pub poison: Option<String>,
    /// Nanoseconds that poisoning took.
    pub poison_time: u64,
    /// Maps of the monitor afterwards.
    pub maps: u64,
    /// Sequential readings.
    pub sequential: Reading,
    /// Random readings.
    pub random: Reading,
    /// The first touch of every page of the device.
    pub cold: Cold,
}

/// The same reading of RAM and of the device; the shortest times of several turns, the fewest exits.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Reading {
    /// Nanoseconds for RAM.
    pub ram: u64,
    /// Nanoseconds for the device.
    pub device: u64,
    /// Exits while RAM was read.
    pub ram_exits: u64,
    /// Exits while the device was read.
    pub device_exits: u64,
}

/// The first touch of a device.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Cold {
    /// Bytes.
    pub bytes: u64,
    /// Nested page faults.
    pub faults: u64,
    /// Pages of 2 MiB that the machine has now.
    pub pages_2m: u64,
}

/// What the inside is told.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Plan {
    /// The steps, in order.
    pub steps: Vec<Step>,
    /// Where the files are, in memory.
    pub dir: PathBuf,
    /// The kernel's modules.
    pub modules: PathBuf,
    /// How long a guest may take to reach user space, by the clock of level 1.
    pub boot_timeout: Duration,
}

/// What the inside says, a line of JSON each.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Line {
    /// A step begins.
    Begin(Step),
    /// It is done.
    Done(Step, Measured),
    /// It failed, in words.
    Failed(Step, String),
}
