//! Flush hint pages: a write makes data durable.
//!
//! Linux maps the page of each flush hint address in the NFIT and writes to it for a flush request, after a store
//! fence (`generic_nvdimm_flush` in drivers/nvdimm/region_devs.c). What was written before counts as durable when
//! the write has been carried out.

use std::sync::Arc;

use aconite_acpi::layout::FLUSH_HINT_STEP;

use super::unit::UnitTable;
use crate::bus::{BusDevice, Effects};

/// The flush hint page of one slot, with an address for each DIMM, [`FLUSH_HINT_STEP`] bytes apart.
///
/// Every write to one, at any offset and of any width, is one flush of all that the DIMM is behind. Reads give zero.
/// Each slot has a device of its own, so that a flush that takes long keeps nobody waiting but other flushes of its unit.
pub struct FlushHint {
    units: Arc<UnitTable>,
    slot: u32,
}

impl FlushHint {
    /// The hint page of `slot`.
    pub fn new(units: Arc<UnitTable>, slot: u32) -> Self {
        Self { units, slot }
    }
}

impl BusDevice for FlushHint {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, _data: &[u8], _effects: &mut Effects) {
        match self.units.get(self.slot) {
            // A page holds fewer than 2^32 of them.
            Some(unit) => unit.flush((offset / FLUSH_HINT_STEP) as u32),
            None => tracing::debug!(slot = self.slot, "Flush of a unit that is not there"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::unit;
    use super::*;

    #[test]
    fn a_write_flushes_the_unit_that_is_there() {
        let (unit, memory) = unit();
        let table = Arc::new(UnitTable::new());
        let mut hint = FlushHint::new(table.clone(), unit.slot());
        let mut effects = Effects::new();
        hint.write(0, &1u64.to_le_bytes(), &mut effects);
        assert_eq!(memory.flushes(), 0);
        table.insert(unit).unwrap();
        hint.write(0, &1u64.to_le_bytes(), &mut effects);
        hint.write(63, &[0], &mut effects);
        assert_eq!(memory.flushes(), 2);
        hint.write(64, &[0], &mut effects);
        hint.write(0xFFF, &[0], &mut effects);
        assert_eq!(memory.flushes(), 2, "there is no second DIMM");
        table.remove(3);
        hint.write(0, &[1], &mut effects);
        assert_eq!(memory.flushes(), 2);
        let mut data = [0xEE; 8];
        hint.read(8, &mut data);
        assert_eq!((data, effects.is_empty()), ([0; 8], true));
    }
}
