//! Poison of memory devices, on request: added, listed, and replaced by good media.

use std::ops::Range;

use super::chain;
use super::memory::{Device, MemoryDevices};
use crate::command::{ClearedBy, Error, ErrorCode, Event, PoisonAdded, PoisonCleared, PoisonState};
use crate::kvm::Held;
use crate::memory::{GuardError, LINE_SIZE, Region, round_out};
use crate::units::ByteRange;

/// Most poisoned ranges in one answer.
pub const MOST_RANGES: usize = 100_000;
/// Maps that are left for everything but guards.
const SPARE_MAPS: usize = 1000;

impl MemoryDevices {
    /// Poisons `ranges` of a device, all or none.
    pub fn poison(&self, _held: &Held, id: &str, ranges: &[ByteRange]) -> Result<PoisonAdded, Error> {
        let device = self.present(id)?;
        let region = &device.region;
        let wanted: Vec<_> = ranges.iter().map(|r| within(device, r)).collect::<Result<_, _>>()?;
        let limit = guard_limit();
        let before: Vec<_> = wanted
            .iter()
            .map(|range| region.poisoned(round_out(range.clone(), LINE_SIZE), usize::MAX))
            .collect();
        let mut armed = Vec::new();
        for (index, range) in wanted.iter().enumerate() {
            match region.poison(range.clone(), limit) {
                Ok(lines) => armed.push(ByteRange::new(lines.start, lines.end - lines.start)),
                Err(error) => {
                    for (undone, kept) in wanted[..index].iter().zip(&before) {
                        undo(region, undone, kept, limit);
                    }
                    return Err(guard_error(error));
                }
            }
        }
        self.events.publish(Event::PoisonAdded { device: id.to_owned(), ranges: armed.clone() });
        Ok(PoisonAdded {
            device: id.to_owned(),
            requested: ranges.to_vec(),
            rounded: armed != ranges,
            armed,
            granularity: LINE_SIZE,
        })
    }

    /// The poison of a device.
    pub fn poison_list(&self, id: &str) -> Result<PoisonState, Error> {
        let device = self.find(id)?;
        let region = &device.region;
        Ok(PoisonState {
            device: id.to_owned(),
            ranges: region.poisoned(0..region.len(), MOST_RANGES).into_iter().map(byte_range).collect(),
            granularity: LINE_SIZE,
            bytes: region.poisoned_lines() * LINE_SIZE,
        })
    }

    /// Replaces the media under `ranges` (all of the device if none) by good one.
    pub fn poison_clear(
        &self,
        _held: &Held,
        id: &str,
        ranges: Option<&[ByteRange]>,
    ) -> Result<PoisonCleared, Error> {
        let device = self.present(id)?;
        let region = &device.region;
        let whole = [ByteRange::new(0, region.len())];
        let ranges = ranges.unwrap_or(&whole);
        let wanted: Vec<_> = ranges.iter().map(|r| within(device, r)).collect::<Result<_, _>>()?;
        let mut cleared = Vec::new();
        for range in wanted {
            let lines = round_out(range, LINE_SIZE);
            cleared.extend(region.poisoned(lines.clone(), MOST_RANGES).into_iter().map(byte_range));
            region.clean(lines).map_err(guard_error)?;
        }
        if !cleared.is_empty() {
            self.events.publish(Event::PoisonCleared {
                device: id.to_owned(),
                ranges: cleared.clone(),
                by: ClearedBy::Request,
            });
        }
        Ok(PoisonCleared {
            device: id.to_owned(),
            requested: ranges.to_vec(),
            cleared,
            granularity: LINE_SIZE,
            note: PoisonCleared::GUEST_KEEPS_ITS_LIST.to_owned(),
        })
    }
}

/// Puts the poison of `range` back to what it was.
fn undo(region: &Region, range: &Range<u64>, before: &[Range<u64>], limit: usize) {
    let result = region
        .clean(round_out(range.clone(), LINE_SIZE))
        .and_then(|_| before.iter().try_for_each(|kept| region.poison(kept.clone(), limit).map(|_| ())));
    if let Err(error) = result {
        tracing::error!(%error, device = region.name(), "poison could not be taken back");
    }
}

fn within(device: &Device, range: &ByteRange) -> Result<Range<u64>, Error> {
    let len = device.region.len();
    match range.end() {
        Some(end) if range.length > 0 && end <= len => Ok(range.offset.0..end),
        _ => Err(Error::new(
            ErrorCode::OutsideDevice,
            format!("The range {range} is not in {}, which has {len:#x} bytes", device.id),
            "name bytes from 0 to its size, at least one",
        )),
    }
}

/// A range as requests and events name it.
pub fn byte_range(range: Range<u64>) -> ByteRange {
    ByteRange::new(range.start, range.end - range.start)
}

fn guard_error(error: GuardError) -> Error {
    let code = match &error {
        GuardError::OutOfRange { .. } => ErrorCode::OutsideDevice,
        GuardError::Departed { .. } => ErrorCode::WrongDeviceState,
        GuardError::TooScattered { .. } | GuardError::Map(_) => ErrorCode::HostLimit,
    };
    Error::new(code, chain(&error), "poison fewer or adjacent lines, or raise vm.max_map_count")
}

/// Separate runs of guarded pages that this host allows: each may split a map in three.
fn guard_limit() -> usize {
    let maps = std::fs::read_to_string("/proc/sys/vm/max_map_count")
        .ok()
        .and_then(|text| text.trim().parse::<usize>().ok())
        .unwrap_or(65_530);
    maps.saturating_sub(SPARE_MAPS) / 2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guard_limit_leaves_maps_for_the_rest() {
        assert!(guard_limit() > 1000);
    }
}
