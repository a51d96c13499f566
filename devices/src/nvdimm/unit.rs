//! Units: what is in each slot, and who may ask.

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use aconite_acpi::layout::MAX_UNITS;
use aconite_acpi::platform::device_handle;
use aconite_acpi::platform::mailbox::OUTPUT_MAX;
use thiserror::Error;

use super::ars::{MAX_RECORDS, Scrub, output_size};
use super::dimm::Dimm;
use super::media::Media;
use crate::bus::lock;

/// Clear unit of a DIMM, unless configured otherwise: four lines of 64 bytes.
///
/// Linux wants a power of two and clears whole sectors of 512 bytes, so any value up to that serves it. 256 is what
/// DIMMs on the market report and what the kernel's own nfit_test uses. It is larger than a line of poison, so a
/// clear never leaves part of a line behind, and `ndctl inject-error`, which injects one clear unit a sector, gives
/// less than a sector.
pub const CLEAR_UNIT: u32 = 256;

/// Smallest clear unit: a line of poison.
const LINE: u32 = 64;

/// What a unit is made of.
#[derive(Clone)]
pub struct UnitConfig {
    /// Index of the unit, below [`MAX_UNITS`]. It fixes mailbox, registers, flush hint and device handle.
    pub slot: u32,
    /// First system-physical address.
    pub base: u64,
    /// Length in bytes.
    pub size: u64,
    /// Address in the DIMM at which the range begins ("DPA", NFIT region mapping).
    pub dpa_base: u64,
    /// What `_FIT` returns: NFIT sub-tables without the table's header.
    pub fit: Vec<u8>,
    /// Alignment of "clear uncorrectable error" in bytes: a power of two, at least 64.
    pub clear_unit: u32,
    /// Error records that one ARS status buffer holds, 1 to 168.
    pub ars_records: usize,
    /// The memory behind the unit.
    pub media: Arc<dyn Media>,
    /// The DIMM.
    pub dimm: Arc<Dimm>,
}

impl UnitConfig {
    /// A unit over `[base, base + size)` with [`CLEAR_UNIT`], the largest ARS buffer, and a DIMM that it fills.
    pub fn new(
        slot: u32,
        base: u64,
        size: u64,
        fit: Vec<u8>,
        media: Arc<dyn Media>,
        dimm: Arc<Dimm>,
    ) -> Self {
        let (clear_unit, ars_records) = (CLEAR_UNIT, MAX_RECORDS);
        Self { slot, base, size, dpa_base: 0, fit, clear_unit, ars_records, media, dimm }
    }
}

/// Why a unit could not be made or inserted.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum UnitError {
    /// There is no such slot.
    #[error("Unit slot {0} does not exist: use one below {MAX_UNITS}")]
    NoSlot(u32),
    /// Another unit is in the slot.
    #[error("Unit slot {0} is taken: remove the unit in it first, or use another slot")]
    Taken(u32),
    /// The address range is empty, wraps, or is not made of whole clear units.
    #[error(
        "Range {base:#x}+{size:#x} of unit {slot} does not fit: give a start and a length that are multiples of \
         {clear_unit}, above zero and inside the address space"
    )]
    Range {
        /// The slot.
        slot: u32,
        /// First address.
        base: u64,
        /// Length in bytes.
        size: u64,
        /// The clear unit in bytes.
        clear_unit: u32,
    },
    /// The clear unit is not one that Linux takes.
    #[error("Clear unit {clear_unit} of unit {slot} is not usable: give a power of two from 64 on")]
    ClearUnit {
        /// The slot.
        slot: u32,
        /// The value.
        clear_unit: u32,
    },
    /// The ARS buffer has no size that fits the mailbox.
    #[error("ARS buffer of {records} records of unit {slot} does not fit: give 1 to {MAX_RECORDS}")]
    ArsRecords {
        /// The slot.
        slot: u32,
        /// The value.
        records: usize,
    },
    /// `_FIT` is longer than the mailbox.
    #[error("_FIT of unit {slot} has {length} bytes: give at most {OUTPUT_MAX}")]
    Fit {
        /// The slot.
        slot: u32,
        /// Length in bytes.
        length: usize,
    },
}

/// One removable unit while it is there. Its scrub results live and go with it.
pub struct Unit {
    config: UnitConfig,
    scrub: Mutex<Option<Scrub>>,
}

impl Unit {
    /// Makes a unit, not yet in its slot.
    ///
    /// # Errors
    /// [`UnitError`] names the value that is wrong and what would be right.
    pub fn new(config: UnitConfig) -> Result<Self, UnitError> {
        let UnitConfig { slot, base, size, clear_unit, ars_records, .. } = config;
        if slot >= MAX_UNITS {
            return Err(UnitError::NoSlot(slot));
        }
        if !clear_unit.is_power_of_two() || clear_unit < LINE {
            return Err(UnitError::ClearUnit { slot, clear_unit });
        }
        let step = u64::from(clear_unit);
        let whole = base.is_multiple_of(step) && size.is_multiple_of(step);
        if size == 0 || base.checked_add(size).is_none() || !whole {
            return Err(UnitError::Range { slot, base, size, clear_unit });
        }
        if !(1..=MAX_RECORDS).contains(&ars_records) {
            return Err(UnitError::ArsRecords { slot, records: ars_records });
        }
        if config.fit.len() as u64 > OUTPUT_MAX {
            return Err(UnitError::Fit { slot, length: config.fit.len() });
        }
        Ok(Self { config, scrub: Mutex::new(None) })
    }

    /// Index of the unit.
    pub fn slot(&self) -> u32 {
        self.config.slot
    }

    /// First system-physical address.
    pub fn base(&self) -> u64 {
        self.config.base
    }

    /// Length in bytes.
    pub fn size(&self) -> u64 {
        self.config.size
    }

    /// NFIT device handle of the unit's DIMM.
    pub fn handle(&self) -> u32 {
        device_handle(self.config.slot)
    }

    /// The memory behind the unit.
    pub fn media(&self) -> &Arc<dyn Media> {
        &self.config.media
    }

    /// The DIMM.
    pub fn dimm(&self) -> &Dimm {
        &self.config.dimm
    }

    pub(super) fn fit(&self) -> &[u8] {
        &self.config.fit
    }

    pub(super) fn dpa_base(&self) -> u64 {
        self.config.dpa_base
    }

    pub(super) fn clear_unit(&self) -> u32 {
        self.config.clear_unit
    }

    /// Most bytes of an ARS status.
    pub(super) fn ars_output_size(&self) -> usize {
        output_size(self.ars_records())
    }

    pub(super) fn ars_records(&self) -> usize {
        self.config.ars_records
    }

    /// The last scrub.
    pub(super) fn scrub(&self) -> &Mutex<Option<Scrub>> {
        &self.scrub
    }

    /// `[address, address + length)` if it is not empty and lies inside the unit.
    pub(super) fn range(&self, address: u64, length: u64) -> Option<Range<u64>> {
        let end = address.checked_add(length)?;
        let inside = address >= self.base() && end <= self.base() + self.size();
        (inside && length > 0).then_some(address..end)
    }
}

impl fmt::Debug for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Unit")
            .field("slot", &self.slot())
            .field("base", &self.base())
            .field("size", &self.size())
            .finish_non_exhaustive()
    }
}

/// All slots of a machine, shared by the register block, the flush hints and the monitor.
///
/// Who looks a unit up keeps it alive until done with it: a call that is under way when the unit is removed ends
/// with the unit's old memory, and the next one finds the slot empty.
#[derive(Debug)]
pub struct UnitTable {
    slots: Mutex<Vec<Option<Arc<Unit>>>>,
}

impl UnitTable {
    /// A table of [`MAX_UNITS`] empty slots.
    pub fn new() -> Self {
        Self { slots: Mutex::new(vec![None; MAX_UNITS as usize]) }
    }

    /// Puts `unit` into its slot. The guest sees it once it looks at the unit's `_STA`.
    ///
    /// # Errors
    /// [`UnitError::Taken`] if there is a unit in the slot already.
    pub fn insert(&self, unit: Unit) -> Result<Arc<Unit>, UnitError> {
        let slot = unit.slot();
        match lock(&self.slots).get_mut(slot as usize) {
            Some(place @ None) => Ok(place.insert(Arc::new(unit)).clone()),
            Some(Some(_)) => Err(UnitError::Taken(slot)),
            None => Err(UnitError::NoSlot(slot)),
        }
    }

    /// Takes the unit out of `slot`: its `_STA` is 0 from now on. `None` if the slot is empty.
    pub fn remove(&self, slot: u32) -> Option<Arc<Unit>> {
        lock(&self.slots).get_mut(slot as usize)?.take()
    }

    /// The unit in `slot`.
    pub fn get(&self, slot: u32) -> Option<Arc<Unit>> {
        lock(&self.slots).get(slot as usize)?.clone()
    }
}

impl Default for UnitTable {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use aconite_acpi::{DimmFlags, Persistence, PmemUnit};

    use super::super::testing::{BASE, Memory, SIZE, bare_dimm, unit, unit_with};
    use super::*;

    fn config() -> UnitConfig {
        UnitConfig::new(3, BASE, SIZE, vec![1, 2, 3], Arc::new(Memory::default()), bare_dimm())
    }

    #[test]
    fn wrong_values_are_refused_by_name() {
        let refused = |change: fn(&mut UnitConfig)| {
            let mut config = config();
            change(&mut config);
            Unit::new(config).unwrap_err()
        };
        assert_eq!(refused(|c| c.slot = 64), UnitError::NoSlot(64));
        for clear_unit in [0, 32, 96, 255] {
            let mut config = config();
            config.clear_unit = clear_unit;
            assert_eq!(Unit::new(config).unwrap_err(), UnitError::ClearUnit { slot: 3, clear_unit });
        }
        assert!(matches!(refused(|c| c.size = 0), UnitError::Range { .. }));
        assert!(matches!(refused(|c| c.size = 0x180), UnitError::Range { .. }));
        assert!(matches!(refused(|c| c.base += 64), UnitError::Range { .. }));
        assert!(matches!(refused(|c| c.base = u64::MAX - 0xFFF), UnitError::Range { .. }));
        assert!(matches!(refused(|c| c.ars_records = 0), UnitError::ArsRecords { .. }));
        assert!(matches!(refused(|c| c.ars_records = MAX_RECORDS + 1), UnitError::ArsRecords { .. }));
        assert!(matches!(refused(|c| c.fit = vec![0; 0xFF9]), UnitError::Fit { length: 0xFF9, .. }));
        assert_eq!(
            refused(|c| c.fit = vec![0; 5000]).to_string(),
            "_FIT of unit 3 has 5000 bytes: give at most 4088"
        );
    }

    #[test]
    fn a_slot_holds_one_unit_at_a_time() {
        let table = UnitTable::new();
        assert!(table.get(3).is_none());
        table.insert(unit().0).unwrap();
        assert_eq!(table.insert(unit().0).unwrap_err(), UnitError::Taken(3));
        assert_eq!(table.get(3).unwrap().handle(), 0x301);
        assert!(table.remove(3).is_some());
        assert!(table.remove(3).is_none());
        assert!(table.get(3).is_none());
        table.insert(unit().0).unwrap();
        assert!(table.get(64).is_none() && table.remove(u32::MAX).is_none());
    }

    #[test]
    fn fit_and_unit_name_the_same_dimm_and_range() {
        let range = aconite_acpi::AddressRange { base: BASE, size: SIZE };
        let flags = DimmFlags::empty();
        let pmem = PmemUnit { unit: 3, range, proximity: 1, serial: 7, flags, flush_hint: true };
        let fit = pmem.fit(Persistence::MemoryController);
        let unit = unit_with(&Memory::default(), |config| config.fit = fit);
        let fit = unit.fit();
        // SPA range at 0 (56 bytes), region map behind it; Linux `struct acpi_nfit_system_address` and
        // `acpi_nfit_memory_map`.
        assert_eq!(fit[32..40], unit.base().to_le_bytes());
        assert_eq!(fit[40..48], unit.size().to_le_bytes());
        assert_eq!(fit[56 + 4..56 + 8], unit.handle().to_le_bytes());
        assert_eq!(fit[56 + 32..56 + 40], unit.dpa_base().to_le_bytes());
    }

    #[test]
    fn ranges_inside_the_unit_are_told_from_others() {
        let memory = Memory::default();
        let unit = unit_with(&memory, |_| {});
        assert_eq!(unit.range(BASE, SIZE), Some(BASE..BASE + SIZE));
        assert_eq!(unit.range(BASE + SIZE - 1, 1), Some(BASE + SIZE - 1..BASE + SIZE));
        for (address, length) in [(BASE, 0), (BASE - 1, 2), (BASE, SIZE + 1), (u64::MAX, 1), (BASE, u64::MAX)]
        {
            assert_eq!(unit.range(address, length), None, "{address:#x}+{length:#x}");
        }
    }
}
