//! Units: what is in each slot, and who may ask.

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use aconite_acpi::layout::MAX_UNITS;
use aconite_acpi::platform::device_handle;
use aconite_acpi::platform::mailbox::OUTPUT_MAX;
use thiserror::Error;

use super::ars::{MAX_RECORDS, Scrub, output_size};
use super::dimm::Dimm;
use super::fault::{CallFault, Callee, Deed, PlannedFault};
use super::interleave::{Interleave, Place, Share};
use super::media::Media;
use crate::bus::lock;
use crate::clock::Clock;

/// Clear unit of a DIMM, unless configured otherwise: four lines of 64 bytes.
///
/// Linux wants a power of two and clears whole sectors of 512 bytes, so any value up to that serves it. 256 is what
/// DIMMs on the market report and what the kernel's own nfit_test uses. It is larger than a line of poison, so a
/// clear never leaves part of a line behind, and `ndctl inject-error`, which injects one clear unit a sector, gives
/// less than a sector.
pub const CLEAR_UNIT: u32 = 256;

/// Smallest clear unit: a line of poison.
const LINE: u32 = 64;

/// A range of addresses of a unit.
#[derive(Clone)]
pub struct UnitRange {
    /// First system-physical address.
    pub base: u64,
    /// Length in bytes.
    pub size: u64,
    /// Whether it is volatile memory.
    pub volatile: bool,
    /// The DIMMs behind it.
    pub interleave: Interleave,
    /// Time that a scrub of all of it takes; a part of it takes its share.
    pub scrub: Duration,
    /// The memory behind it.
    pub media: Arc<dyn Media>,
}

impl UnitRange {
    fn end(&self) -> u64 {
        self.base + self.size
    }

    /// The part of a range of addresses that lies in this one; empty if there is none.
    fn part(&self, range: &Range<u64>) -> Range<u64> {
        range.start.max(self.base)..range.end.min(self.end())
    }

    fn has(&self, dimm: u32) -> bool {
        self.interleave.shares.iter().any(|share| share.dimm == dimm)
    }
}

/// What a unit is made of.
#[derive(Clone)]
pub struct UnitConfig {
    /// Index of the unit, below [`MAX_UNITS`]. It fixes mailbox, registers, flush hints and device handles.
    pub slot: u32,
    /// What `_FIT` returns: NFIT sub-tables without the table's header.
    pub fit: Vec<u8>,
    /// Alignment of "clear uncorrectable error" in bytes: a power of two, at least 64.
    pub clear_unit: u32,
    /// Error records that one ARS status buffer holds, 1 to 168.
    pub ars_records: usize,
    /// The address ranges.
    pub ranges: Vec<UnitRange>,
    /// The DIMMs.
    pub dimms: Vec<Arc<Dimm>>,
    /// The time, for scrubs.
    pub clock: Clock,
}

impl UnitConfig {
    /// A unit with [`CLEAR_UNIT`] and the largest ARS buffer.
    pub fn new(slot: u32, fit: Vec<u8>, ranges: Vec<UnitRange>, dimms: Vec<Arc<Dimm>>, clock: Clock) -> Self {
        Self { slot, fit, clear_unit: CLEAR_UNIT, ars_records: MAX_RECORDS, ranges, dimms, clock }
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
    /// A range is on a DIMM that the unit does not have, or on lines that are no lines.
    #[error(
        "Range {base:#x} of unit {slot} is on DIMMs that the unit does not have, or on empty lines: name its DIMMs"
    )]
    Interleave {
        /// The slot.
        slot: u32,
        /// First address of the range.
        base: u64,
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
    /// Its ranges in the order of their addresses.
    config: UnitConfig,
    scrub: Mutex<Option<Scrub>>,
    faults: Mutex<Vec<PlannedFault>>,
}

impl Unit {
    /// Makes a unit, not yet in its slot.
    ///
    /// # Errors
    /// [`UnitError`] names the value that is wrong and what would be right.
    pub fn new(mut config: UnitConfig) -> Result<Self, UnitError> {
        let UnitConfig { slot, clear_unit, ars_records, .. } = config;
        if slot >= MAX_UNITS {
            return Err(UnitError::NoSlot(slot));
        }
        if !clear_unit.is_power_of_two() || clear_unit < LINE {
            return Err(UnitError::ClearUnit { slot, clear_unit });
        }
        for UnitRange { base, size, interleave, .. } in &config.ranges {
            let (base, size, step) = (*base, *size, u64::from(clear_unit));
            let whole = base.is_multiple_of(step) && size.is_multiple_of(step);
            if size == 0 || base.checked_add(size).is_none() || !whole {
                return Err(UnitError::Range { slot, base, size, clear_unit });
            }
            let known = |share: &Share| (share.dimm as usize) < config.dimms.len();
            if interleave.line == 0 || !interleave.shares.iter().all(known) {
                return Err(UnitError::Interleave { slot, base });
            }
        }
        if !(1..=MAX_RECORDS).contains(&ars_records) {
            return Err(UnitError::ArsRecords { slot, records: ars_records });
        }
        if config.fit.len() as u64 > OUTPUT_MAX {
            return Err(UnitError::Fit { slot, length: config.fit.len() });
        }
        config.ranges.sort_by_key(|range| range.base);
        Ok(Self { config, scrub: Mutex::new(None), faults: Mutex::new(Vec::new()) })
    }

    /// Index of the unit.
    pub fn slot(&self) -> u32 {
        self.config.slot
    }

    /// The DIMMs.
    pub fn dimms(&self) -> &[Arc<Dimm>] {
        &self.config.dimms
    }

    /// The DIMM with this number.
    pub(super) fn dimm(&self, number: u32) -> Option<&Dimm> {
        self.config.dimms.get(number as usize).map(|dimm| &**dimm)
    }

    pub(super) fn fit(&self) -> &[u8] {
        &self.config.fit
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

    /// The time by the unit's clock.
    pub(super) fn now(&self) -> Duration {
        (self.config.clock)()
    }

    /// Whether any scrub of it takes time.
    pub(super) fn scrubs_take_time(&self) -> bool {
        self.config.ranges.iter().any(|range| !range.scrub.is_zero())
    }

    /// How long a scrub takes of what [`Self::range`] has returned.
    pub(super) fn scrub_time(&self, range: &Range<u64>) -> Duration {
        let Some(of) = self.range_of(range.start) else { return Duration::ZERO };
        let share = of.scrub.as_nanos() * u128::from(range.end - range.start) / u128::from(of.size);
        Duration::from_nanos(u64::try_from(share).unwrap_or(u64::MAX))
    }

    /// How long the scrub goes on that is under way; zero if the OS is to be told of its end.
    pub fn scrub_left(&self) -> Option<Duration> {
        lock(&self.scrub).as_ref()?.left(self.now())
    }

    /// Whether a scrub is over of whose end the OS is to be told, by Notify 0x82 on the root device. Asked again, it
    /// is not.
    pub fn take_scrub_end(&self) -> bool {
        let now = self.now();
        lock(&self.scrub).as_mut().is_some_and(|scrub| scrub.take_end(now))
    }

    /// Plans a fault of its firmware.
    pub fn plan_fault(&self, fault: CallFault) {
        lock(&self.faults).push(PlannedFault::new(fault));
    }

    /// The faults that are planned or were.
    pub fn faults(&self) -> Vec<PlannedFault> {
        lock(&self.faults).clone()
    }

    /// Its firmware behaves from now on.
    pub fn forget_faults(&self) {
        lock(&self.faults).clear();
    }

    /// Counts a call, and returns what is to become of its answer.
    pub(super) fn meet_faults(&self, callee: Callee, function: u32) -> Vec<Deed> {
        let mut faults = lock(&self.faults);
        let met = faults
            .iter_mut()
            .filter_map(|planned| planned.meets(callee, function).then(|| planned.fault.deed.clone()));
        met.collect()
    }

    /// The last scrub.
    pub(super) fn scrub(&self) -> &Mutex<Option<Scrub>> {
        &self.scrub
    }

    fn range_of(&self, address: u64) -> Option<&UnitRange> {
        self.config.ranges.iter().find(|range| (range.base..range.end()).contains(&address))
    }

    /// `[address, address + length)` if it is not empty and lies inside one of the unit's ranges.
    pub(super) fn range(&self, address: u64, length: u64) -> Option<Range<u64>> {
        let end = address.checked_add(length)?;
        let inside = self.range_of(address).is_some_and(|range| end <= range.end());
        (inside && length > 0).then_some(address..end)
    }

    /// Whether an address is one of volatile memory.
    pub(super) fn volatile(&self, address: u64) -> bool {
        self.range_of(address).is_some_and(|range| range.volatile)
    }

    /// Where an address is, of which the length reaches to the end of its range at most. `None` if it is not the
    /// unit's, or nobody says which DIMM it is on.
    pub(super) fn place(&self, address: u64) -> Option<Place> {
        let range = self.range_of(address)?;
        let place = range.interleave.place(address - range.base)?;
        Some(Place { length: place.length.min(range.end() - address), ..place })
    }

    /// NFIT device handle of the DIMM behind an address; 0 if nobody says which it is.
    pub(super) fn handle_at(&self, address: u64) -> u32 {
        self.place(address).map_or(0, |place| device_handle(self.slot(), place.dimm))
    }

    /// The first `most` poisoned ranges in `range`, as [`Media::poisoned`]: those of the unit's own ranges.
    pub(super) fn poisoned(&self, range: Range<u64>, most: usize) -> Vec<Range<u64>> {
        let mut found = Vec::new();
        for of in &self.config.ranges {
            let part = of.part(&range);
            if !part.is_empty() && found.len() < most {
                found.extend(of.media.poisoned(part, most - found.len()));
            }
        }
        found
    }

    /// All poisoned ranges of the unit, the first `most`.
    pub(super) fn all_poisoned(&self, most: usize) -> Vec<Range<u64>> {
        self.poisoned(0..u64::MAX, most)
    }

    /// [`Media::clear`] for what [`Self::range`] has returned.
    pub(super) fn clear(&self, range: Range<u64>) -> u64 {
        self.range_of(range.start).map_or(0, |of| of.media.clear(of.part(&range)))
    }

    /// [`Media::poison`] for what [`Self::range`] has returned.
    pub(super) fn poison(&self, range: Range<u64>) -> bool {
        self.range_of(range.start).is_some_and(|of| of.media.poison(of.part(&range)))
    }

    /// Fills all that a DIMM holds with zeros. Poison stays. False if that did not succeed.
    pub(super) fn erase(&self, dimm: u32) -> bool {
        let mut parts = self.config.ranges.iter().filter(|range| range.has(dimm)).map(|range| {
            let parts = range.interleave.parts(dimm, range.size);
            range.media.erase(&mut parts.map(|part| range.base + part.start..range.base + part.end))
        });
        parts.all(|erased| erased)
    }

    /// Puts the ranges out of the guest's reach that a locked DIMM is behind, and the others within it.
    ///
    /// A line of a locked DIMM is between lines of others in an interleave set: the whole range goes with it.
    pub(super) fn settle_locks(&self) {
        for range in &self.config.ranges {
            let locked = range.interleave.shares.iter().any(|share| {
                let dimm = self.config.dimms.get(share.dimm as usize);
                dimm.is_some_and(|dimm| dimm.locked())
            });
            if !range.media.set_locked(locked) {
                tracing::error!(base = range.base, locked, "The lock of a DIMM does not reach its memory");
            }
        }
    }

    /// Makes durable what the guest has written to the ranges that a DIMM is behind.
    pub(super) fn flush(&self, dimm: u32) {
        self.config.ranges.iter().filter(|range| range.has(dimm)).for_each(|range| range.media.flush());
    }
}

impl fmt::Debug for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Unit")
            .field("slot", &self.slot())
            .field("ranges", &self.config.ranges.iter().map(|r| r.base..r.end()).collect::<Vec<_>>())
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

    /// Puts `unit` in the place of the one in its slot, which has become larger: scrub results and faults are those of
    /// before.
    ///
    /// # Errors
    /// [`UnitError::NoSlot`] if there is no unit in the slot.
    pub fn replace(&self, mut unit: Unit) -> Result<Arc<Unit>, UnitError> {
        let slot = unit.slot();
        let mut slots = lock(&self.slots);
        let Some(Some(place)) = slots.get_mut(slot as usize) else { return Err(UnitError::NoSlot(slot)) };
        unit.scrub = Mutex::new(lock(&place.scrub).take());
        unit.faults = Mutex::new(std::mem::take(&mut *lock(&place.faults)));
        *place = Arc::new(unit);
        Ok(place.clone())
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
#[path = "unit_test.rs"]
mod tests;
