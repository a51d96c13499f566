//! The guest is told when an address range scrub has stopped.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use aconite_acpi::platform::{EventTarget, FirmwareEvent, notify};
use aconite_devices::platform::Platform;

use super::memory::MemoryDevices;

impl MemoryDevices {
    /// A scrub of a unit is under way.
    pub fn scrub_started(&mut self, unit: u32) {
        self.scrubbed.insert(unit);
    }

    /// When the next scrub stops.
    pub fn next_scrub_end(&self) -> Option<Instant> {
        let left = self.scrubbed.iter().filter_map(|&unit| self.units.get(unit)?.scrub_left()).min()?;
        Instant::now().checked_add(left)
    }

    /// Tells the guest of the scrubs that have stopped.
    pub fn announce_scrubs(&mut self, platform: &Mutex<Platform>) {
        for unit in std::mem::take(&mut self.scrubbed) {
            // A unit that has gone is not scrubbed any more.
            let Some(left) = self.units.get(unit).and_then(|there| there.scrub_left()) else { continue };
            if left > Duration::ZERO {
                self.scrubbed.insert(unit);
            } else if self.units.get(unit).is_some_and(|there| there.take_scrub_end()) {
                let target = EventTarget::Root(unit);
                self.announce(platform, FirmwareEvent { target, code: notify::ARS_STOPPED });
            }
        }
    }
}
