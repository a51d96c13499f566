//! What the tables are made from: a machine as plain values.

use std::fmt;

use crate::layout::{MAX_DIMMS, MAX_HOST_BRIDGES, MAX_UNITS};
use crate::{Error, NvdimmUnit, Persistence};

/// A range of guest-physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AddressRange {
    /// First address.
    pub base: u64,
    /// Number of bytes.
    pub size: u64,
}

impl AddressRange {
    /// First address behind the range, 2^64 - 1 if it would not fit.
    pub const fn end(self) -> u64 {
        self.base.saturating_add(self.size)
    }

    fn check(self, what: &'static str) -> Result<(), Error> {
        if self.size == 0 || self.base.checked_add(self.size).is_none() {
            return Err(Error::BadRange { what, range: self });
        }
        Ok(())
    }
}

impl fmt::Display for AddressRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}+{:#x}", self.base, self.size)
    }
}

/// A processor that is present at boot. Its ACPI UID is its place in [`Description::processors`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Processor {
    /// Local APIC ID, 0 to 254. The boot processor comes first.
    pub apic_id: u8,
    /// Proximity domain.
    pub proximity: u32,
}

/// A range of RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryRange {
    /// The addresses.
    pub range: AddressRange,
    /// Proximity domain.
    pub proximity: u32,
}

/// A place where an NFIT unit is or may arrive later. Its number is its place in [`Description::units`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnitSlot {
    /// Addresses set aside for the unit's ranges.
    pub windows: Vec<UnitWindow>,
    /// DIMMs that the unit can have, at most [`MAX_DIMMS`].
    pub dimms: u32,
    /// The unit that is there at boot.
    pub occupant: Option<NvdimmUnit>,
}

/// Addresses set aside for a range of a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnitWindow {
    /// The addresses; SRAT describes all of them.
    pub range: AddressRange,
    /// Proximity domain of whatever is in the window: its own, with no processor in it, unless chosen otherwise.
    pub proximity: u32,
}

/// PCI Express host bridges that come and go. Their root buses are fixed ([`crate::layout::host_bridge_bus`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostBridges {
    /// How many there can be, at most [`MAX_HOST_BRIDGES`].
    pub count: u32,
    /// Where their 64-bit windows are, of [`HOST_BRIDGE_WINDOW`](crate::layout::HOST_BRIDGE_WINDOW) bytes each. A bridge
    /// has another one each time it comes: Linux keeps that of a bridge that has gone (`pci_remove_root_bus` in
    /// drivers/pci/remove.c does not drop the last reference to what `pci_create_root_bus` has made).
    pub windows: AddressRange,
}

/// A machine, as far as its firmware tables say something about it. What is the same on every machine
/// ([`crate::layout`]) is not repeated here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// Processors, boot processor first.
    pub processors: Vec<Processor>,
    /// RAM, in any order.
    pub memory: Vec<MemoryRange>,
    /// 64-bit window of the PCI host bridge, if it has one. The 32-bit window is fixed.
    pub pci_window64: Option<AddressRange>,
    /// Further host bridges, which come and go.
    pub host_bridges: Option<HostBridges>,
    /// Proximity domain of the PCI host bridges.
    pub pci_proximity: u32,
    /// Slots for NFIT units, at most [`MAX_UNITS`].
    pub units: Vec<UnitSlot>,
    /// Addresses at which persistent memory is or may arrive that something else than these tables tells of. SRAT has
    /// their proximity domains.
    pub arrivals: Vec<MemoryRange>,
    /// How far stores to persistent memory must get to survive a loss of power.
    pub persistence: Persistence,
    /// Whether FADT names the PM timer at [`crate::layout::PM_TIMER_PORT`].
    pub pm_timer: bool,
}

impl Description {
    /// Number of proximity domains: one more than the highest one that is named.
    pub fn proximity_domains(&self) -> u32 {
        let processors = self.processors.iter().map(|processor| processor.proximity);
        let memory = self.memory.iter().map(|memory| memory.proximity);
        let units = self.windows().map(|window| window.proximity);
        let arrivals = self.arrivals.iter().map(|memory| memory.proximity);
        processors.chain(memory).chain(units).chain(arrivals).max().unwrap_or(0).max(self.pci_proximity) + 1
    }

    /// The windows of all units.
    pub(crate) fn windows(&self) -> impl Iterator<Item = &UnitWindow> {
        self.units.iter().flat_map(|unit| &unit.windows)
    }

    /// Finds what no table could express and what would make a guest misbehave in ways that are hard to
    /// trace back.
    pub fn check(&self) -> Result<(), Error> {
        if self.processors.is_empty() {
            return Err(Error::NoProcessors);
        }
        let mut seen = [false; 256];
        for processor in &self.processors {
            if processor.apic_id == u8::MAX {
                return Err(Error::ApicIdBroadcast(processor.apic_id));
            }
            if std::mem::replace(&mut seen[usize::from(processor.apic_id)], true) {
                return Err(Error::ApicIdTwice(processor.apic_id));
            }
        }
        if self.units.len() > MAX_UNITS as usize {
            return Err(Error::TooManyUnits(self.units.len()));
        }
        if let Some(bridges) = self.host_bridges.filter(|bridges| bridges.count > MAX_HOST_BRIDGES) {
            return Err(Error::TooManyHostBridges(bridges.count));
        }
        self.check_proximity()?;
        self.check_ranges()
    }

    fn check_proximity(&self) -> Result<(), Error> {
        let processors = self.processors.iter().map(|processor| processor.proximity);
        let memory = self.memory.iter().map(|memory| memory.proximity);
        let units = self.windows().map(|window| window.proximity);
        let memory = memory.chain(self.arrivals.iter().map(|memory| memory.proximity));
        match processors.chain(memory).chain(units).chain([self.pci_proximity]).find(|&domain| domain > 255) {
            Some(domain) => Err(Error::ProximityTooLarge(domain)),
            None => Ok(()),
        }
    }

    fn check_ranges(&self) -> Result<(), Error> {
        let mut ranges = Vec::new();
        for memory in &self.memory {
            memory.range.check("Memory range")?;
            ranges.push(memory.range);
        }
        for arrival in &self.arrivals {
            arrival.range.check("Slot")?;
            ranges.push(arrival.range);
        }
        for (slot, unit) in self.units.iter().enumerate() {
            if unit.dimms > MAX_DIMMS {
                return Err(Error::TooManyDimms { unit: slot, dimms: unit.dimms });
            }
            for window in &unit.windows {
                window.range.check("Slot")?;
                ranges.push(window.range);
            }
            if let Some(occupant) = &unit.occupant {
                check_occupant(slot, unit, occupant)?;
            }
        }
        let of_bridges = self.host_bridges.map(|bridges| bridges.windows);
        for window in self.pci_window64.into_iter().chain(of_bridges) {
            window.check("64-bit PCI window")?;
            ranges.push(window);
        }
        ranges.sort_by_key(|range| range.base);
        match ranges.windows(2).find(|pair| pair[0].end() > pair[1].base) {
            Some(pair) => Err(Error::Overlap { first: pair[0], second: pair[1] }),
            None => Ok(()),
        }
    }
}

fn check_occupant(slot: usize, unit: &UnitSlot, occupant: &NvdimmUnit) -> Result<(), Error> {
    if occupant.unit as usize != slot {
        return Err(Error::WrongUnit { slot, given: occupant.unit });
    }
    if occupant.dimms.len() > unit.dimms as usize {
        return Err(Error::MissingDimms { unit: slot, dimms: occupant.dimms.len(), room: unit.dimms });
    }
    for range in occupant.ranges.iter().map(|range| range.range) {
        range.check("Persistent memory range")?;
        let holds =
            |window: &UnitWindow| window.range.base <= range.base && range.end() <= window.range.end();
        if !unit.windows.iter().any(holds) {
            return Err(Error::OutsideSlot { unit: slot, range });
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "description_test.rs"]
mod tests;
