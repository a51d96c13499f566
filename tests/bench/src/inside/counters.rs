//! Exact counters: of KVM for one machine, and of the monitor's memory.

use crate::plan::Memory;
use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

const KVM_DEBUG: &str = "/sys/kernel/debug/kvm";
/// The name of the file that is aconite's guest memory.
const RAM_FILE: &str = "memfd:aconite-ram";

/// KVM's counters of the machine that process `pid` has.
pub fn of_machine(pid: u32) -> Result<BTreeMap<String, u64>> {
    Ok(numbers(&machine(pid)?))
}

/// What KVM adds to the time-stamp counter for the first vCPU of that machine.
pub fn tsc_offset(pid: u32) -> Result<u64> {
    let path = machine(pid)?.join("vcpu0/tsc-offset");
    let text = fs::read_to_string(&path).with_context(|| format!("Cannot read {}", path.display()))?;
    Ok(text.trim().parse::<i64>().with_context(|| format!("{}: {text:?}", path.display()))?.cast_unsigned())
}

fn machine(pid: u32) -> Result<PathBuf> {
    let prefix = format!("{pid}-");
    let machine = fs::read_dir(KVM_DEBUG)
        .with_context(|| format!("Cannot read {KVM_DEBUG}"))?
        .flatten()
        .find(|entry| entry.file_name().to_string_lossy().starts_with(&prefix))
        .with_context(|| format!("Process {pid} has no machine"))?;
    Ok(machine.path())
}

fn numbers(dir: &Path) -> BTreeMap<String, u64> {
    let files = fs::read_dir(dir).into_iter().flatten().flatten();
    files
        .filter_map(|file| {
            let value = fs::read_to_string(file.path()).ok()?.trim().parse().ok()?;
            Some((file.file_name().into_string().ok()?, value))
        })
        .filter(|(_, value)| *value != 0)
        .collect()
}

/// Memory of process `pid`, whose guest has `ram` KiB.
pub fn memory(pid: u32, ram: u64) -> Result<Memory> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    Ok(sum(&text, ram))
}

/// Number of maps of process `pid`.
pub fn maps(pid: u32) -> Result<u64> {
    Ok(fs::read_to_string(format!("/proc/{pid}/maps"))?.lines().count() as u64)
}

fn sum(smaps: &str, ram: u64) -> Memory {
    let mut memory = Memory::default();
    let (mut named, mut size) = (false, 0);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let Some(key) = words.next() else { continue };
        if !key.ends_with(':') {
            named = line.contains(RAM_FILE);
            continue;
        }
        let Some(kib) = words.next().and_then(|word| word.parse::<u64>().ok()) else { continue };
        // QEMU's guest memory has no name, but nothing else has its size.
        let guest = named || size == ram;
        match key {
            "Size:" => size = kib,
            "Pss:" if guest => memory.guest += kib,
            "Pss:" => memory.own += kib,
            "Private_Dirty:" if !guest => memory.private_dirty += kib,
            _ => {}
        }
    }
    memory
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_memory_is_told_from_the_monitors_own() {
        let smaps = "\
7f00-7f10 rw-s 00000000 00:01 1 /memfd:aconite-ram (deleted)
Size:               1024 kB
Pss:                 300 kB
Private_Dirty:       300 kB
5500-5510 r-xp 00000000 00:01 2 /bin/monitor
Size:                 64 kB
Pss:                  40 kB
Private_Dirty:         0 kB
7f20-7f30 rw-p 00000000 00:00 0
Size:             524288 kB
Pss:                9000 kB
Private_Dirty:      9000 kB
7f40-7f50 rw-p 00000000 00:00 0 [heap]
Size:                128 kB
Pss:                  60 kB
Private_Dirty:        60 kB
";
        let memory = sum(smaps, 524_288);
        assert_eq!((memory.own, memory.private_dirty, memory.guest), (100, 60, 9300));
    }
}
