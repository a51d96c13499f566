//! Processors and memory of the host, and what the software KVM host takes of them.

use std::fs;

const MIB: u64 = 1 << 20;

/// The least memory that the software KVM host runs with: its own system and one small machine.
const NESTED_LEAST: u64 = 1536 * MIB;

/// The most memory that it is given: QEMU gives memory back that is free inside, but its tables grow with the size.
const NESTED_MOST: u64 = 64 << 30;

/// What QEMU needs beside the memory of its machine: translated code (1 GiB at most) and itself.
const QEMU_OWN: u64 = 1280 * MIB;

/// What the host has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resources {
    /// Processors that this process may use.
    pub cpus: usize,
    /// Memory that can be had without swapping, in bytes; the limit of the control group counts.
    pub available: u64,
}

/// More memory is asked for than there is.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MemoryError {
    /// Too little for the software KVM host itself.
    #[error(
        "The software KVM host needs {} MiB of memory and this host has {} MiB available",
        (NESTED_LEAST + QEMU_OWN) / MIB,
        available / MIB
    )]
    Host {
        /// What the host has, in bytes.
        available: u64,
    },
}

impl Resources {
    /// Looks at this host.
    pub fn of_this_host() -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let mut available = available(&meminfo).unwrap_or(0);
        if let Some(room) = cgroup_room() {
            available = available.min(room);
        }
        Resources { cpus, available }
    }

    /// Memory for the software KVM host, in bytes: three quarters of what is available, in steps of 128 MiB.
    ///
    /// It is not taken at once: QEMU's memory is the host's only once it is touched, and what is freed inside goes
    /// back.
    pub fn nested_memory(&self) -> Result<u64, MemoryError> {
        let most = self.available.saturating_sub(QEMU_OWN);
        let size = (self.available / 4 * 3).min(most).min(NESTED_MOST) / (128 * MIB) * (128 * MIB);
        if size < NESTED_LEAST { Err(MemoryError::Host { available: self.available }) } else { Ok(size) }
    }
}

fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// What the memory limit of this process's control group (version 2) leaves; `None` without a limit.
fn cgroup_room() -> Option<u64> {
    let own = fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = own.lines().find_map(|line| line.strip_prefix("0::"))?;
    let dir = format!("/sys/fs/cgroup{path}");
    let number = |file: &str| fs::read_to_string(format!("{dir}/{file}")).ok()?.trim().parse::<u64>().ok();
    Some(number("memory.max")?.saturating_sub(number("memory.current")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo() {
        assert_eq!(available("MemTotal: 8 kB\nMemAvailable:   2048 kB\n"), Some(2 << 20));
        assert_eq!(available("MemTotal: 8 kB\n"), None);
    }

    #[test]
    fn nested_memory_is_part_of_what_is_there() {
        let of = |mib: u64| Resources { cpus: 2, available: mib * MIB }.nested_memory().map(|b| b / MIB);
        assert_eq!(of(24 * 1024), Ok(18 * 1024));
        assert_eq!(of(4096), Ok(2816), "QEMU needs room of its own");
        assert_eq!(of(2048), Err(MemoryError::Host { available: 2048 * MIB }));
        assert_eq!(of(1 << 20), Ok(64 * 1024));
    }
}
