//! The medium of a unit: what the firmware's model asks of the memory behind it.

use std::ops::Range;
use std::sync::Arc;

use aconite_devices::nvdimm::Media;

use super::poison::byte_range;
use crate::command::{ClearedBy, Event, EventBus};
use crate::memory::Region;

/// The medium of a unit, as its firmware sees it: the poison map of its region.
#[derive(Debug)]
pub struct RegionMedia {
    region: Arc<Region>,
    events: EventBus,
}

impl RegionMedia {
    /// The medium behind `region`.
    pub fn new(region: Arc<Region>, events: EventBus) -> Self {
        Self { region, events }
    }

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
                    self.events.publish(Event::PoisonCleared {
                        device: self.region.name().to_owned(),
                        ranges: bad.into_iter().map(byte_range).collect(),
                        by: ClearedBy::Guest,
                    });
                }
                offsets.end - offsets.start
            }
            Err(error) => {
                tracing::warn!(%error, device = self.region.name(), "poison could not be cleared");
                0
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
