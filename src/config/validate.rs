//! What no host could build, found without looking at one.
//!
//! Alignment follows what Linux does with a persistent memory range:
//! - `nvdimm_namespace_common_probe()` (drivers/nvdimm/namespace_devs.c) refuses a namespace whose start or end is
//!   no multiple of `memremap_compat_align()`, 2 MiB on x86 ("misaligned, unable to map"): such sizes are refused;
//! - `ndctl create-namespace` works in units of the region's `align`, 16 MiB; dax/kmem uses only whole memory blocks
//!   of 128 MiB; `mkfs.xfs` refuses less than 300 MiB: such sizes are warned of, since tests may want them.

use aconite_acpi::layout::{MAX_DIMMS, MAX_HOST_BRIDGES};

use super::error::{ConfigError, Warning};
use super::topology::validate_set;
use super::unflushed::validate_unflushed;
use super::way::validate_way;
use super::{Machine, Place, Pmem, PmemSource, Via};
use crate::units::{Address, MIB, Size};

/// The largest number of vCPUs.
pub const MAX_CPUS: u32 = 64;
/// The largest number of NFIT units, of devices and free slots together.
pub const MAX_UNITS: u32 = 64;
/// The largest number of PCI Express ports, of devices and free ones together: the devices that are left on the root
/// bus beside the host bridge and the console.
pub const MAX_PORTS: u32 = 30;

/// The smallest RAM: the kernel is loaded at 16 MiB and needs room to unpack.
const MIN_MEMORY: u64 = 64 * MIB;
/// RAM and devices come in units that the largest part of them can be mapped with.
pub(super) const GRAIN: u64 = 2 * MIB;
/// Ids stand in ACPI names, events and file names: they stay short.
const MAX_ID: usize = 32;
/// The largest proximity domain: the SLIT is a square with a byte for each pair of domains.
const MAX_NODE: u32 = 255;
/// `sizeof(sockaddr_un.sun_path)` without the final zero.
const MAX_SOCKET_PATH: usize = 107;
/// The kernel's `COMMAND_LINE_SIZE` on x86 without the final zero.
const MAX_CMDLINE: usize = 2047;

impl Machine {
    /// Refuses what no host could build. Looks at no file.
    ///
    /// # Errors
    /// The first mistake, by option.
    pub fn validate(&self) -> Result<Vec<Warning>, ConfigError> {
        let mut warnings = Vec::new();
        if self.kernel.as_os_str().is_empty() {
            return Err(ConfigError::invalid(
                "--kernel",
                "",
                "no kernel is named",
                "give -k with a bzImage or an x86-64 vmlinux",
            ));
        }
        if !(1..=MAX_CPUS).contains(&self.cpus) {
            return Err(ConfigError::invalid(
                "--cpus",
                self.cpus,
                "a machine has at least one vCPU and at most 64",
                "give --cpus 1 to 64",
            ));
        }
        self.cpu.validate()?;
        self.validate_memory()?;
        self.validate_words()?;
        self.validate_slots()?;
        for (index, pmem) in self.pmem.iter().enumerate() {
            let option = if pmem.id.is_empty() { "--pmem".into() } else { format!("--pmem {}", pmem.id) };
            validate_device(&option, pmem, &mut warnings)?;
            if let Some(Place::Device(id)) = &pmem.at {
                return Err(ConfigError::invalid(
                    format_args!("{option}: at"),
                    id,
                    "no device has departed before the machine starts",
                    "give a guest-physical address such as at=0x240000000, or leave it out",
                ));
            }
            for other in &self.pmem[..index] {
                distinct(&option, pmem, other)?;
            }
        }
        self.validate_buses()?;
        self.validate_disks()?;
        let placed: Vec<(String, u64, u64)> = self
            .pmem
            .iter()
            .filter_map(|pmem| match (&pmem.at, &pmem.source) {
                (
                    Some(Place::Address(Address(start))),
                    PmemSource::Memory(size) | PmemSource::File { size: Some(size), .. },
                ) => Some((pmem.id.clone(), *start, size.bytes())),
                _ => None,
            })
            .collect();
        refuse_overlaps(&placed)?;
        Ok(warnings)
    }

    fn validate_memory(&self) -> Result<(), ConfigError> {
        let bytes = self.memory.bytes();
        if bytes < MIN_MEMORY {
            return Err(ConfigError::invalid(
                "--memory",
                self.memory,
                format_args!("Linux needs at least {}", Size(MIN_MEMORY)),
                "give --memory 512M or more",
            ));
        }
        if !bytes.is_multiple_of(GRAIN) {
            return Err(ConfigError::invalid(
                "--memory",
                self.memory,
                "it is no multiple of 2M",
                format_args!("give --memory {}", Size(round_up(bytes, GRAIN))),
            ));
        }
        Ok(())
    }

    fn validate_words(&self) -> Result<(), ConfigError> {
        if self.cmdline.len() > MAX_CMDLINE || self.cmdline.contains(['\n', '\0']) {
            return Err(ConfigError::invalid(
                "--append",
                format_args!("of {} bytes", self.cmdline.len()),
                format_args!("the kernel takes one line of at most {MAX_CMDLINE} bytes"),
                "shorten it",
            ));
        }
        if let Some(path) = &self.api_socket
            && path.as_os_str().len() > MAX_SOCKET_PATH
        {
            return Err(ConfigError::invalid(
                "--api-socket",
                path.display(),
                format_args!("a socket's path has at most {MAX_SOCKET_PATH} bytes"),
                "use a shorter path, such as one relative to the working directory",
            ));
        }
        if !self.agent && !self.command.is_empty() {
            return Err(ConfigError::invalid(
                "command",
                format_args!("{:?}", self.command.join(" ")),
                "nothing in the guest can run it without the agent",
                "leave --no-agent or the command out",
            ));
        }
        if self.timeout.is_some_and(|timeout| timeout.0.is_zero()) {
            return Err(ConfigError::invalid(
                "--timeout",
                "0s",
                "the machine would end before it begins",
                "give a time such as 90s, or leave it out",
            ));
        }
        Ok(())
    }

    fn validate_disks(&self) -> Result<(), ConfigError> {
        for (index, disk) in self.disk.iter().enumerate() {
            let option = disk.option();
            if !disk.id.is_empty() {
                validate_id("--disk", "id", "d0", &disk.id)?;
            }
            disk.validate()?;
            if let Some(at) = &disk.at {
                return Err(ConfigError::invalid(
                    format_args!("{option}: at"),
                    at,
                    "no disk has departed before the machine starts",
                    "leave it out: at= is for ctl insert disk",
                ));
            }
            let pmem = self.pmem.iter().map(|pmem| (&pmem.id, &pmem.source));
            for (id, source) in pmem.chain(self.disk[..index].iter().map(|disk| (&disk.id, &disk.source))) {
                if !disk.id.is_empty() && disk.id == *id {
                    return Err(duplicate_id("--disk", id));
                }
                if let (PmemSource::File { path, .. }, PmemSource::File { path: same, .. }) =
                    (&disk.source, source)
                    && path == same
                {
                    return Err(same_file(&option, &path.display().to_string(), id));
                }
            }
        }
        Ok(())
    }

    fn validate_slots(&self) -> Result<(), ConfigError> {
        let units = self.nfit_units();
        let own = units - self.slots.nfit;
        if units > MAX_UNITS {
            return Err(ConfigError::invalid(
                "--slots",
                format_args!("nfit={} with {} devices", self.slots.nfit, self.pmem.len()),
                format_args!("a machine has at most {MAX_UNITS} NFIT units"),
                format_args!("give --slots nfit={} or fewer devices", MAX_UNITS.saturating_sub(own)),
            ));
        }
        if !(1..=MAX_DIMMS).contains(&self.slots.dimms) {
            return Err(ConfigError::invalid(
                "--slots",
                format_args!("dimms={}", self.slots.dimms),
                format_args!("a slot has 1 to {MAX_DIMMS} DIMMs"),
                "give dimms=4 or another number of them",
            ));
        }
        let (ports, bridges) = (self.devices_behind_ports(), self.devices_behind_bridges());
        let places = [
            ("pcie", self.slots.pcie, ports, "ports", MAX_PORTS, "PCI Express ports"),
            (
                "bridge",
                self.slots.bridge,
                bridges,
                "host bridges",
                MAX_HOST_BRIDGES,
                "host bridges that come and go",
            ),
        ];
        for (key, free, devices, behind, most, what) in places {
            // As wide as it takes for any number that was given.
            if devices + u64::from(free) > u64::from(most) {
                let left = u64::from(most).saturating_sub(devices);
                return Err(ConfigError::invalid(
                    "--slots",
                    format_args!("{key}={free} with {devices} devices behind {behind}"),
                    format_args!("a machine has at most {most} {what}"),
                    format_args!("give --slots {key}={left} or fewer devices"),
                ));
            }
        }
        let size = self.slots.size;
        if size.bytes() == 0 || !size.bytes().is_multiple_of(GRAIN) {
            return Err(ConfigError::invalid(
                "--slots",
                format_args!("size={size}"),
                "a slot's size is a multiple of 2M",
                format_args!("give size={}", Size(round_up(size.bytes().max(1), GRAIN))),
            ));
        }
        Ok(())
    }
}

/// Checks a device that is inserted into a running machine, against the ids that are in use.
///
/// # Errors
/// As for a device of the command line.
pub fn validate_insert(pmem: &Pmem, ids_in_use: &[&str]) -> Result<Vec<Warning>, ConfigError> {
    let mut warnings = Vec::new();
    let option = if pmem.id.is_empty() { "pmem".to_owned() } else { format!("pmem {}", pmem.id) };
    if pmem.via == Via::E820 {
        return Err(ConfigError::invalid(
            format_args!("{option}: via"),
            pmem.via.name(),
            "the E820 map is read once, when the guest starts",
            "give via=nfit or via=virtio, or declare the device when the machine starts",
        ));
    }
    validate_device(&option, pmem, &mut warnings)?;
    if ids_in_use.contains(&pmem.id.as_str()) {
        return Err(duplicate_id("--pmem", &pmem.id));
    }
    Ok(warnings)
}

fn duplicate_id(option: &str, id: &str) -> ConfigError {
    ConfigError::invalid(option, format_args!("id={id}"), "two devices have this id", "give each its own id=")
}

fn distinct(option: &str, pmem: &Pmem, other: &Pmem) -> Result<(), ConfigError> {
    if !pmem.id.is_empty() && pmem.id == other.id {
        return Err(duplicate_id("--pmem", &pmem.id));
    }
    match (&pmem.source, &other.source) {
        (PmemSource::File { path, .. }, PmemSource::File { path: same, .. }) if path == same => {
            Err(same_file(option, &path.display().to_string(), &other.id))
        }
        _ => Ok(()),
    }
}

/// The error for a file that two devices would share.
pub(super) fn same_file(option: &str, path: &str, other: &str) -> ConfigError {
    ConfigError::invalid(
        format_args!("{option}: file"),
        path,
        format_args!("it is the file of device {other} too"),
        "give each device its own file",
    )
}

/// Refuses a name that is none; `like` is one.
pub(super) fn validate_id(option: &str, key: &str, like: &str, name: &str) -> Result<(), ConfigError> {
    let good = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    if name.len() > MAX_ID
        || !name.starts_with(|c: char| c.is_ascii_alphabetic())
        || !name.chars().all(good)
        || name == "ram"
    {
        return Err(ConfigError::invalid(
            option,
            format_args!("{key}={name}"),
            "an id is a letter and then letters, digits, - or _, at most 32, and not \"ram\"",
            format_args!("give {key}={like} or the like"),
        ));
    }
    Ok(())
}

fn validate_device(option: &str, pmem: &Pmem, warnings: &mut Vec<Warning>) -> Result<(), ConfigError> {
    let id = Some(&pmem.id).filter(|id| !id.is_empty());
    for (key, name, example) in [("id", id, "p0"), ("bus", pmem.bus.as_ref(), "b0")] {
        if let Some(name) = name {
            validate_id("--pmem", key, example, name)?;
        }
    }
    validate_way(option, pmem)?;
    validate_set(option, pmem)?;
    validate_unflushed(option, pmem)?;
    if let PmemSource::Memory(size) | PmemSource::File { size: Some(size), .. } = &pmem.source {
        check_size(option, *size, warnings)?;
    }
    if let Some(node) = pmem.node.filter(|node| *node > MAX_NODE) {
        return Err(ConfigError::invalid(
            format_args!("{option}: node"),
            node,
            format_args!("a proximity domain is at most {MAX_NODE}"),
            "give a smaller number, or leave it out for a domain of its own",
        ));
    }
    if let Some(Place::Address(at)) = pmem.at
        && at.0 % GRAIN != 0
    {
        return Err(ConfigError::invalid(
            format_args!("{option}: at"),
            at,
            "Linux maps persistent memory only at multiples of 2M",
            format_args!("give at={}", Address(round_up(at.0, GRAIN))),
        ));
    }
    Ok(())
}

/// Refuses a size that Linux would refuse, and warns of one that some of its users would.
pub(super) fn check_size(option: &str, size: Size, warnings: &mut Vec<Warning>) -> Result<(), ConfigError> {
    let bytes = size.bytes();
    if bytes == 0 || !bytes.is_multiple_of(GRAIN) {
        return Err(ConfigError::invalid(
            format_args!("{option}: size"),
            size,
            "Linux maps persistent memory only in multiples of 2M",
            format_args!("give {}", Size(round_up(bytes.max(1), GRAIN))),
        ));
    }
    let mut warn = |message: String| warnings.push(Warning { thing: option.to_owned(), message });
    if bytes < 300 * MIB {
        warn(format!("a device of {size} is too small for mkfs.xfs, which wants 300M; ext4 takes it"));
    }
    if !bytes.is_multiple_of(16 * MIB) {
        warn(format!("{size} is no multiple of 16M: ndctl leaves the last part unused"));
    } else if !bytes.is_multiple_of(128 * MIB) {
        warn(format!("{size} is no multiple of 128M: as system RAM (dax/kmem) the last part stays unused"));
    }
    Ok(())
}

/// Refuses devices whose chosen addresses overlap; each is (id, first address, bytes).
pub(super) fn refuse_overlaps(placed: &[(String, u64, u64)]) -> Result<(), ConfigError> {
    for (index, (id, start, size)) in placed.iter().enumerate() {
        let Some(end) = start.checked_add(*size) else {
            return Err(ConfigError::invalid(
                format_args!("--pmem {id}: at"),
                Address(*start),
                format_args!("{} from there goes past the last address", Size(*size)),
                "give a lower address, or leave at= out",
            ));
        };
        for (other, other_start, other_size) in &placed[..index] {
            let other_end = other_start.saturating_add(*other_size);
            if *start < other_end && *other_start < end {
                return Err(ConfigError::invalid(
                    format_args!("--pmem {id}: at"),
                    Address(*start),
                    format_args!(
                        "it would overlap device {other} at {} to {}",
                        Address(*other_start),
                        Address(other_end)
                    ),
                    format_args!("give at={} or leave it out", Address(other_end)),
                ));
            }
        }
    }
    Ok(())
}

/// Rounds up to a multiple of a power of two; the largest multiple if there is none above.
fn round_up(bytes: u64, unit: u64) -> u64 {
    bytes.checked_next_multiple_of(unit).unwrap_or(u64::MAX - (unit - 1))
}
