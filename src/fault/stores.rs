//! Stores that fill a poisoned line.
//!
//! One instruction may do it (MOVDIR64B, CLZERO, a store of 64 bytes past the caches), and so may several non-temporal
//! stores in a row, which the processor combines before memory sees them. Every store to a guarded page traps, so the
//! stores of a vCPU to a line are known; if anything else traps between them they do not count as combined.

use super::trap::Traps;
use crate::command::{ClearedBy, Event};
use crate::memory::{FullLineStore, LINE_SIZE};
use crate::units::ByteRange;
use crate::x86::operands::AccessKind;
use crate::x86::physical::PhysicalAccess;

/// The bytes of one line that a vCPU's non-temporal stores have written, and nothing else since.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Combining {
    line: u64,
    /// A bit for each byte.
    written: u64,
}

impl Combining {
    /// Adds the stores of one instruction, or forgets all if it is of another kind. Returns a line that is full now.
    pub fn add(&mut self, stores: &[PhysicalAccess], non_temporal: bool) -> Option<u64> {
        let stores = || stores.iter().filter(|range| range.kind == AccessKind::Store);
        if !non_temporal || stores().count() == 0 {
            *self = Self::default();
            return None;
        }
        for store in stores() {
            let line = store.gpa & !(LINE_SIZE - 1);
            let offset = store.gpa - line;
            let end = offset + u64::from(store.size);
            if end > LINE_SIZE {
                *self = Self::default();
                return None;
            }
            if self.line != line {
                *self = Self { line, written: 0 };
            }
            let below = |bytes: u64| if bytes >= 64 { u64::MAX } else { (1 << bytes) - 1 };
            self.written |= below(end) & !below(offset);
        }
        if self.written != u64::MAX {
            return None;
        }
        let line = self.line;
        *self = Self::default();
        Some(line)
    }
}

impl Traps {
    /// Lines that a store has filled are good again where the device says so.
    pub(super) fn filled(&self, lines: &[u64]) {
        for line in lines {
            let Some(region) = self.space.find(*line).filter(|region| !region.absent()) else { continue };
            if region.policy().full_line_store == FullLineStore::Keep {
                continue;
            }
            let offset = line - region.gpa();
            let lines = offset..offset + LINE_SIZE;
            match region.clean(std::slice::from_ref(&lines)) {
                Ok(cleared) if cleared.is_empty() => {}
                Ok(_) => {
                    let line = [ByteRange::new(region.named_offset(*line), LINE_SIZE)];
                    self.events.publish(Event::poison_cleared(region.name(), &line, ClearedBy::Store));
                }
                Err(error) => tracing::warn!(%error, device = region.name(), "a line stays poisoned"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store(gpa: u64, size: u32) -> [PhysicalAccess; 1] {
        [PhysicalAccess { kind: AccessKind::Store, linear: gpa, gpa, size, marks_entry: false }]
    }

    #[test]
    fn eight_stores_in_any_order_fill_a_line() {
        let mut combining = Combining::default();
        for word in [3, 1, 0, 2, 7, 6, 5] {
            assert_eq!(combining.add(&store(0x1040 + 8 * word, 8), true), None);
        }
        assert_eq!(combining.add(&store(0x1040 + 8 * 4, 8), true), Some(0x1040));
        assert_eq!(combining, Combining::default());
    }

    #[test]
    fn what_comes_between_keeps_them_apart() {
        let mut combining = Combining::default();
        assert_eq!(combining.add(&store(0x1040, 32), true), None);
        assert_eq!(combining.add(&store(0x1080, 8), false), None);
        assert_eq!(combining.add(&store(0x1060, 32), true), None);
        assert_eq!(combining.add(&store(0x1040, 16), true), None);
        assert_eq!(combining.add(&store(0x2040, 16), true), None, "another line");
        assert_eq!(combining.add(&store(0x1050, 16), true), None);
        assert_eq!(combining.add(&store(0x1078, 16), true), None, "across two lines");
    }
}
