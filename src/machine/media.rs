//! The medium of a device: what the firmware's model asks of the memory behind it.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use aconite_devices::nvdimm::Media;
use vm_memory::VolatileMemory;
use vmm_sys_util::fallocate::{FallocateMode, fallocate};

use super::poison::{byte_range, guard_room};
use crate::command::{ClearedBy, Event, EventBus};
use crate::kvm::Baton;
use crate::memory::{AddressSpace, LINE_SIZE, Region, round_out};

/// The medium of a device, as its firmware sees it: the poison map of its region.
#[derive(Debug)]
pub struct RegionMedia {
    /// The memory.
    pub region: Arc<Region>,
    /// Where it lies.
    pub space: Arc<AddressSpace>,
    /// Stops the vCPUs while they must not run.
    pub baton: Arc<Baton>,
    /// Who is told of changes.
    pub events: EventBus,
}

impl RegionMedia {
    fn offsets(&self, range: &Range<u64>) -> Range<u64> {
        let gpa = self.region.gpa();
        range.start.saturating_sub(gpa)..range.end.saturating_sub(gpa).min(self.region.len())
    }
}

impl Media for RegionMedia {
    fn poisoned(&self, range: Range<u64>, most: usize) -> Vec<Range<u64>> {
        let gpa = self.region.gpa();
        self.region
            .poisoned(self.offsets(&range), most)
            .into_iter()
            .map(|r| gpa + r.start..gpa + r.end)
            .collect()
    }

    fn clear(&self, range: Range<u64>) -> u64 {
        let offsets = self.offsets(&range);
        match self.region.clean(std::slice::from_ref(&offsets)) {
            Ok(bad) => {
                if !bad.is_empty() {
                    let bad: Vec<_> = bad.into_iter().map(byte_range).collect();
                    self.events.publish(Event::poison_cleared(self.region.name(), &bad, ClearedBy::Guest));
                }
                offsets.end - offsets.start
            }
            Err(error) => {
                tracing::warn!(%error, device = self.region.name(), "poison could not be cleared");
                0
            }
        }
    }

    fn poison(&self, range: Range<u64>) -> bool {
        // The machine stops, and with it the guest that asked.
        let Ok(_held) = self.baton.take() else { return false };
        let lines = round_out(self.offsets(&range), LINE_SIZE);
        let limit = guard_room(&self.space, &self.region);
        match self.region.poison(std::slice::from_ref(&lines), limit) {
            Ok(_) => {
                self.events.publish(Event::poison_added(self.region.name(), &[byte_range(lines)]));
                true
            }
            Err(error) => {
                tracing::warn!(%error, device = self.region.name(), "an error could not be injected");
                false
            }
        }
    }

    fn erase(&self, parts: &mut dyn Iterator<Item = Range<u64>>) -> bool {
        if !self.region.writable() {
            return false;
        }
        for part in parts {
            if let Err(error) = erase(&self.region, self.offsets(&part)) {
                tracing::error!(%error, device = self.region.name(), "data could not be erased");
                return false;
            }
        }
        if let Err(error) = self.region.flush() {
            tracing::error!(%error, device = self.region.name(), "what was erased may come back");
            return false;
        }
        true
    }

    fn set_locked(&self, locked: bool) -> bool {
        if self.region.locked() == locked || self.region.departed() {
            return true;
        }
        // The machine stops, and with it the guest that asked.
        let Ok(_held) = self.baton.take() else { return false };
        match self.space.set_locked(&self.region, locked) {
            Ok(()) => {
                self.events.publish(Event::MemoryLock { device: self.region.name().to_owned(), locked });
                true
            }
            Err(error) => {
                tracing::error!(%error, device = self.region.name(), "a lock could not be changed");
                false
            }
        }
    }

    fn flush(&self) {
        if let Err(error) = self.region.flush() {
            tracing::error!(%error, device = self.region.name(), "data could not be written back");
            self.events.publish(Event::DeviceError {
                device: self.region.name().to_owned(),
                message: format!("Flush failed: {error}"),
            });
        }
    }
}

/// Bytes that are written at once.
const CHUNK: usize = 1 << 20;

/// Parts from this size on become holes in the file.
const HOLE: u64 = 1 << 20;

/// Fills a part of a region with zeros, by offset in it.
fn erase(region: &Region, part: Range<u64>) -> io::Result<()> {
    let length = part.end.saturating_sub(part.start);
    if let Some(backing) = region.alias().file_offset().filter(|_| length >= HOLE) {
        let start = backing.start() + part.start;
        if fallocate(backing.file(), FallocateMode::PunchHole, true, start, length).is_ok() {
            region.wrote(part.start, length);
            return Ok(());
        }
        // A file system without holes has zeros written.
    }
    write_zeros(region, part.clone())?;
    region.wrote(part.start, length);
    Ok(())
}

/// Writes zeros through the map that never traps.
fn write_zeros(region: &Region, part: Range<u64>) -> io::Result<()> {
    let zeros = vec![0u8; CHUNK.min((part.end - part.start) as usize)];
    let map = region.alias();
    for start in (part.start..part.end).step_by(CHUNK) {
        let length = zeros.len().min((part.end - start) as usize);
        let slice = map.get_slice(start as usize, length).map_err(io::Error::other)?;
        slice.copy_from(&zeros[..length]);
    }
    Ok(())
}
