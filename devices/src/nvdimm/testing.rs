//! A unit over memory whose poison a test sets.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::dimm::{Dimm, DimmConfig, Family, Forgetful, Record};
use super::interleave::Interleave;
use super::media::Media;
use super::unit::{Unit, UnitConfig, UnitRange};
use crate::clock::Clock;

/// First address of the test unit.
pub(super) const BASE: u64 = 0x1_4000_0000;
/// Length of the test unit.
pub(super) const SIZE: u64 = 16 << 20;
/// Bytes in a line.
pub(super) const LINE: u64 = 64;

#[derive(Default)]
struct State {
    /// Poisoned lines by their first address.
    lines: BTreeSet<u64>,
    /// Most bytes that one clear manages.
    clear_at_most: Option<u64>,
    flushes: usize,
    erased: Vec<Range<u64>>,
    locked: bool,
}

/// Memory with lines of poison.
#[derive(Clone, Default)]
pub(super) struct Memory(Arc<Mutex<State>>);

impl Memory {
    pub(super) fn poison(&self, range: Range<u64>) {
        let first = range.start - range.start % LINE;
        self.0.lock().unwrap().lines.extend((first..range.end).step_by(LINE as usize));
    }

    pub(super) fn clear_at_most(&self, bytes: u64) {
        self.0.lock().unwrap().clear_at_most = Some(bytes);
    }

    pub(super) fn is_clean(&self) -> bool {
        self.poison_total() == 0
    }

    pub(super) fn poison_total(&self) -> u64 {
        self.0.lock().unwrap().lines.len() as u64 * LINE
    }

    pub(super) fn erased(&self) -> Vec<Range<u64>> {
        self.0.lock().unwrap().erased.clone()
    }

    pub(super) fn locked(&self) -> bool {
        self.0.lock().unwrap().locked
    }

    pub(super) fn flushes(&self) -> usize {
        self.0.lock().unwrap().flushes
    }
}

impl Media for Memory {
    fn poisoned(&self, range: Range<u64>, most: usize) -> Vec<Range<u64>> {
        let state = self.0.lock().unwrap();
        let mut found: Vec<Range<u64>> = Vec::new();
        for &line in state.lines.range(range.start.saturating_sub(LINE - 1)..range.end) {
            let part = line.max(range.start)..(line + LINE).min(range.end);
            let full = found.len() == most;
            match found.last_mut() {
                Some(last) if last.end == part.start => last.end = part.end,
                _ if full => break,
                _ => found.push(part),
            }
        }
        found
    }

    fn clear(&self, range: Range<u64>) -> u64 {
        let mut state = self.0.lock().unwrap();
        let length = (range.end - range.start).min(state.clear_at_most.unwrap_or(u64::MAX));
        let end = range.start + length;
        state.lines.retain(|&line| line < range.start || line + LINE > end);
        length
    }

    fn poison(&self, range: Range<u64>) -> bool {
        Self::poison(self, range);
        true
    }

    fn erase(&self, parts: &mut dyn Iterator<Item = Range<u64>>) -> bool {
        self.0.lock().unwrap().erased.extend(parts);
        true
    }

    fn set_locked(&self, locked: bool) -> bool {
        self.0.lock().unwrap().locked = locked;
        true
    }

    fn flush(&self) {
        self.0.lock().unwrap().flushes += 1;
    }
}

/// A DIMM without functions and without labels.
pub(super) fn bare_dimm() -> Arc<Dimm> {
    Arc::new(Dimm::new(dimm_config(Family::None, None)).unwrap())
}

/// A new DIMM of a family, which keeps nothing, and for which time stands still.
pub(super) fn dimm_config(family: Family, labels: Option<Vec<u8>>) -> DimmConfig {
    DimmConfig { family, labels, record: Record::default(), keeper: Arc::new(Forgetful), clock: still() }
}

/// A clock that stands still.
pub(super) fn still() -> Clock {
    Arc::new(|| Duration::ZERO)
}

/// The test unit's range over `memory`.
pub(super) fn range(memory: &Memory) -> UnitRange {
    let media = Arc::new(memory.clone());
    let (interleave, scrub) = (Interleave::none(), Duration::ZERO);
    UnitRange { base: BASE, size: SIZE, volatile: false, interleave, scrub, media }
}

/// A unit in slot 3 over `memory`, with what `change` makes of its configuration.
pub(super) fn unit_with(memory: &Memory, change: impl FnOnce(&mut UnitConfig)) -> Unit {
    let mut config = UnitConfig::new(3, vec![0xF1; 100], vec![range(memory)], vec![bare_dimm()], still());
    change(&mut config);
    Unit::new(config).unwrap()
}

/// The test unit with its memory.
pub(super) fn unit() -> (Unit, Memory) {
    let memory = Memory::default();
    (unit_with(&memory, |_| {}), memory)
}

/// Bytes from hexadecimal digits; white space is for the reader.
pub(super) fn bytes(hex: &str) -> Vec<u8> {
    let digits: Vec<u8> = hex.chars().filter_map(|c| c.to_digit(16)).map(|digit| digit as u8).collect();
    digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect()
}
