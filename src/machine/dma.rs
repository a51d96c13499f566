//! What devices must know of poison and departures, and what the machine tells of them.

use std::fmt;
use std::sync::Arc;

use aconite_devices::dma::{LateAccess, PoisonView, PoisonedAccess};

use crate::command::{Direction, Event, EventBus};
use crate::memory::{AddressSpace, LINE_SIZE, host_fault};

/// The poison of a machine, as its devices see it.
pub struct DevicePoison {
    space: Arc<AddressSpace>,
    events: EventBus,
}

impl DevicePoison {
    /// The poison in `space`; what meets it is told on `events`.
    pub fn new(space: Arc<AddressSpace>, events: EventBus) -> Self {
        Self { space, events }
    }

    /// The first line of a range that lies on memory of the host which has just gone bad, and is no poison yet.
    fn lost(&self, gpa: u64, len: u64) -> Option<u64> {
        let end = gpa.saturating_add(len);
        self.space.regions().iter().find_map(|region| {
            let (start, stop) = (gpa.max(region.gpa()), end.min(region.range().end));
            let host = |at: u64| region.alias().as_ptr() as u64 + (at - region.gpa());
            (start < stop && host_fault::noted(&(host(start)..host(stop))))
                .then_some(start & !(LINE_SIZE - 1))
        })
    }
}

impl PoisonView for DevicePoison {
    fn poisoned(&self, gpa: u64, len: u64) -> Option<u64> {
        self.space.first_poison(gpa, len).or_else(|| self.lost(gpa, len))
    }

    fn held(&self, gpa: u64, len: u64, transfer: &mut dyn FnMut()) {
        self.space.while_poison_holds(gpa, len, transfer);
    }

    fn losses(&self) -> u64 {
        host_fault::generation()
    }

    fn met(&self, access: &PoisonedAccess<'_>) {
        let device = self.space.find(access.line).map_or_else(String::new, |region| region.name().to_owned());
        self.events.publish(Event::DmaPoisoned {
            by: access.by.to_owned(),
            device,
            gpa: access.gpa.into(),
            bytes: access.len,
            line: access.line.into(),
            direction: if access.write { Direction::Write } else { Direction::Read },
        });
    }

    fn generation(&self) -> u64 {
        self.space.generation()
    }

    fn gone(&self, gpa: u64, len: u64, generation: u64) -> bool {
        self.space.gone(gpa, len, generation).is_some()
    }

    fn late(&self, access: &LateAccess<'_>) {
        let met = self.space.gone(access.gpa, access.len, access.generation);
        let device = met.map_or_else(String::new, |region| region.name().to_owned());
        self.events.publish(Event::StaleDma {
            by: access.by.to_owned(),
            device,
            gpa: access.gpa.into(),
            bytes: access.len,
            direction: if access.write { Direction::Write } else { Direction::Read },
        });
    }
}

impl fmt::Debug for DevicePoison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DevicePoison").finish_non_exhaustive()
    }
}
