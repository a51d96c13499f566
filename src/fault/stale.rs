//! Accesses to departed memory, counted.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::command::{Access, Direction};

/// Distinct kinds of access that are told apart for one device; more are only counted together.
const MOST_KINDS: usize = 65_536;
/// Accesses of one kind that are reported one by one; then each time their number doubles.
const REPORTED_ONE_BY_ONE: u64 = 4;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Kind {
    rip: u64,
    cr3: u64,
    page: u64,
    direction: Direction,
}

#[derive(Debug, Default)]
struct Counts {
    total: u64,
    kinds: HashMap<Kind, u64>,
}

/// The accesses to departed memory of a machine, by device.
#[derive(Debug, Default)]
pub struct StaleLog {
    devices: Mutex<HashMap<String, Counts>>,
    /// vCPUs whose access is to pause the machine.
    pausing: Mutex<HashSet<u32>>,
    /// Fast view of `pausing`: there may be one.
    any_pausing: AtomicBool,
}

impl StaleLog {
    /// Counts an access, and returns the number of its kind (instruction, address space, page, direction)
    /// so far if it is to be reported.
    pub fn note(&self, device: &str, access: &Access) -> Option<u64> {
        let mut devices = self.devices.lock().unwrap_or_else(PoisonError::into_inner);
        if !devices.contains_key(device) {
            devices.insert(device.to_owned(), Counts::default());
        }
        let counts = devices.get_mut(device)?;
        counts.total += 1;
        let kind = Kind {
            rip: access.rip.0,
            cr3: access.cr3.0,
            page: access.gpa.0 >> 12,
            direction: access.direction,
        };
        let full = counts.kinds.len() >= MOST_KINDS;
        let count = match counts.kinds.get_mut(&kind) {
            Some(count) => count,
            None if full => return counts.total.is_power_of_two().then_some(counts.total),
            None => counts.kinds.entry(kind).or_default(),
        };
        *count += 1;
        (*count <= REPORTED_ONE_BY_ONE || count.is_power_of_two()).then_some(*count)
    }

    /// Remembers that the machine is to be paused for what `vcpu` has done.
    pub fn ask_for_pause(&self, vcpu: u32) {
        self.pausing.lock().unwrap_or_else(PoisonError::into_inner).insert(vcpu);
        self.any_pausing.store(true, Ordering::SeqCst);
    }

    /// Whether the machine is to be paused for what `vcpu` has done; asked once for each time.
    pub fn take_pause(&self, vcpu: u32) -> bool {
        if !self.any_pausing.load(Ordering::SeqCst) {
            return false;
        }
        let mut pausing = self.pausing.lock().unwrap_or_else(PoisonError::into_inner);
        let asked = pausing.remove(&vcpu);
        self.any_pausing.store(!pausing.is_empty(), Ordering::SeqCst);
        asked
    }

    /// Forgets a device: another one has its place or its id.
    pub fn forget(&self, device: &str) {
        self.devices.lock().unwrap_or_else(PoisonError::into_inner).remove(device);
    }

    /// All accesses to the memory of `device` since it departed.
    pub fn total(&self, device: &str) -> u64 {
        let devices = self.devices.lock().unwrap_or_else(PoisonError::into_inner);
        devices.get(device).map_or(0, |counts| counts.total)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn access(rip: u64, direction: Direction) -> Access {
        Access {
            vcpu: 0,
            rip: rip.into(),
            cr3: 0x1000.into(),
            cpl: 3,
            va: None,
            gpa: 0x1_0000_0000.into(),
            bytes: 8,
            direction,
            instruction: None,
            instruction_bytes: None,
        }
    }

    #[test]
    fn kinds_are_reported_at_first_and_counted_for_ever() {
        let log = StaleLog::default();
        let reports: Vec<_> =
            (0..20).filter_map(|_| log.note("p0", &access(0x10, Direction::Read))).collect();
        assert_eq!(reports, [1, 2, 3, 4, 8, 16]);
        assert_eq!(log.note("p0", &access(0x10, Direction::Write)), Some(1));
        assert_eq!(log.note("p0", &access(0x20, Direction::Read)), Some(1));
        assert_eq!((log.total("p0"), log.total("p1")), (22, 0));
    }

    #[test]
    fn a_pause_is_asked_for_once() {
        let log = StaleLog::default();
        assert!(!log.take_pause(1));
        log.ask_for_pause(1);
        log.ask_for_pause(3);
        assert!(log.take_pause(1) && !log.take_pause(1) && !log.take_pause(2) && log.take_pause(3));
    }

    #[test]
    fn memory_for_kinds_is_bounded_and_the_total_is_not() {
        let log = StaleLog::default();
        for rip in 0..(MOST_KINDS as u64 + 100) {
            log.note("p0", &access(rip, Direction::Read));
        }
        assert_eq!(log.total("p0"), MOST_KINDS as u64 + 100);
        assert_eq!(log.devices.lock().unwrap()["p0"].kinds.len(), MOST_KINDS);
    }
}
