//! What of a machine lies where, and what its firmware says of it, before anything is made.

use std::ops::Range;

use aconite_acpi::{
    AddressRange, Description, HostBridges, MemoryRange, NvdimmUnit, Processor, UnitSlot, UnitWindow,
};

use super::arrival::Arrival;
use super::memory::Window;
use super::topology::{Member, Topology};
use crate::config::{self, CheckedPmem, Place, Via};
use crate::layout::{Layout, LayoutError, UnitRequest};

/// Proximity domain of processors and RAM.
const SYSTEM_NODE: u32 = 0;

/// What of a machine is placed where, before anything is made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// RAM.
    pub ram: Vec<Range<u64>>,
    /// Places of memory devices, then the free ones.
    pub windows: Vec<Window>,
    /// DIMMs that each NFIT unit has room for.
    pub dimms: Vec<u32>,
    /// The 64-bit PCI window of the host bridge that is always there.
    pub pci64: Range<u64>,
    /// Where the windows of those are that come and go.
    pub host_bridges: Range<u64>,
}

impl Plan {
    /// The plan of a machine whose devices have the sizes `pmem`.
    pub fn new(
        config: &config::Machine,
        pmem: &[CheckedPmem],
        address_bits: u8,
    ) -> Result<Self, LayoutError> {
        let mut requests: Vec<_> = config
            .pmem
            .iter()
            .zip(pmem)
            .map(|(device, checked)| UnitRequest {
                size: checked.size.bytes(),
                at: match device.at {
                    Some(Place::Address(address)) => Some(address.0),
                    _ => None,
                },
            })
            .collect();
        let free = UnitRequest { size: config.slots.size.bytes(), at: None };
        let slots = config.slots;
        requests.extend((0..slots.nfit + slots.pcie + slots.bridge).map(|_| free));
        let layout = Layout::plan(config.memory.bytes(), &requests, address_bits)?;
        let chosen = config.pmem.iter().map(|device| device.node);
        let mut next = 1 + chosen.clone().flatten().max().unwrap_or(SYSTEM_NODE);
        let mut nodes: Vec<_> = chosen.collect();
        nodes.resize(requests.len(), None);
        let mut units = config.units();
        let nfit = config.nfit_units();
        units.extend(nfit - slots.nfit..nfit);
        let cards = config.ports() + config.host_bridges();
        let free_cards = slots.pcie + slots.bridge;
        units.extend(nfit + cards - free_cards..nfit + cards);
        // Ports may be for anything: what memory may come behind the free ones shares a domain.
        let first_free_card = requests.len() - free_cards as usize;
        let mut of_free_cards = None;
        let windows: Vec<_> = layout
            .units
            .into_iter()
            .zip(nodes)
            .zip(units)
            .enumerate()
            .map(|(index, ((range, node), unit))| {
                let mut new = || {
                    next += 1;
                    next - 1
                };
                let node = match node {
                    Some(node) => node,
                    None if index >= first_free_card => *of_free_cards.get_or_insert_with(new),
                    None => new(),
                };
                let via = match unit {
                    unit if unit < nfit => Via::Nfit,
                    unit if unit < nfit + cards => Via::Virtio,
                    _ => Via::E820,
                };
                Window { range, node, unit: unit as usize, via }
            })
            .collect();
        let Range { start, end } = layout.pci64;
        let of_bridges = if config.host_bridges() > 0 { end - (end - start) / 4 } else { end };
        let (pci64, host_bridges) = (start..of_bridges, of_bridges..end);
        let mut plan = Self { ram: layout.ram, windows, dimms: Vec::new(), pci64, host_bridges };
        plan.dimms = plan
            .arrivals(config, pmem)
            .iter()
            .take(nfit as usize)
            .map(|arrivals| {
                let dimms = plan.topology(arrivals).map_or(0, |topology| topology.firmware.dimms.len());
                config.slots.dimms.max(dimms as u32)
            })
            .collect();
        Ok(plan)
    }

    /// What the E820 map says of memory devices.
    pub fn e820(&self, config: &config::Machine, pmem: &[CheckedPmem]) -> Vec<(Range<u64>, u32)> {
        let devices = config.pmem.iter().zip(pmem).zip(&self.windows);
        devices
            .filter(|((device, _), _)| device.via == Via::E820)
            .map(|((device, checked), window)| {
                let start = window.range.start;
                (start..start + checked.size.bytes(), device.e820.number())
            })
            .collect()
    }

    /// The devices that are there at boot, by unit; the units of free slots have none.
    pub fn arrivals<'a>(&self, config: &'a config::Machine, pmem: &[CheckedPmem]) -> Vec<Vec<Arrival<'a>>> {
        let units = self.windows.iter().map(|window| window.unit + 1).max().unwrap_or(0);
        let mut arrivals = vec![Vec::new(); units];
        for (window, (pmem, checked)) in config.pmem.iter().zip(pmem).enumerate() {
            arrivals[self.windows[window].unit].push(Arrival { pmem, checked: *checked, window });
        }
        arrivals
    }

    /// What is in each NFIT unit at boot.
    pub fn occupants(&self, config: &config::Machine, pmem: &[CheckedPmem]) -> Vec<Option<NvdimmUnit>> {
        let arrivals = self.arrivals(config, pmem);
        let units = arrivals.iter().take(self.dimms.len());
        units.map(|arrivals| self.topology(arrivals).map(|topology| topology.firmware)).collect()
    }

    /// The topology of the unit that arrives; none if nothing does.
    fn topology(&self, arrivals: &[Arrival<'_>]) -> Option<Topology> {
        let unit = self.windows[arrivals.first()?.window].unit;
        let members: Vec<_> = arrivals
            .iter()
            .map(|&Arrival { pmem, checked, window }| Member {
                pmem,
                size: checked.size.bytes(),
                window: &self.windows[window],
            })
            .collect();
        Some(Topology::of(unit as u32, &members))
    }

    /// The firmware's description of the machine.
    pub fn description(&self, config: &config::Machine, memory: &MemoryPlan) -> Description {
        let range = |r: &Range<u64>| AddressRange { base: r.start, size: r.end - r.start };
        Description {
            processors: (0..config.cpus)
                .map(|cpu| Processor { apic_id: cpu as u8, proximity: SYSTEM_NODE })
                .collect(),
            memory: self
                .ram
                .iter()
                .map(|r| MemoryRange { range: range(r), proximity: SYSTEM_NODE })
                .collect(),
            pci_window64: Some(range(&self.pci64)),
            host_bridges: Some(config.host_bridges())
                .filter(|count| *count > 0)
                .map(|count| HostBridges { count, windows: range(&self.host_bridges) }),
            pci_proximity: SYSTEM_NODE,
            units: self
                .dimms
                .iter()
                .zip(memory.occupants.iter().cloned())
                .enumerate()
                .map(|(unit, (&dimms, occupant))| UnitSlot {
                    windows: self
                        .windows
                        .iter()
                        .filter(|window| window.unit == unit)
                        .map(|window| UnitWindow { range: range(&window.range), proximity: window.node })
                        .collect(),
                    dimms,
                    occupant,
                })
                .collect(),
            arrivals: self
                .windows
                .iter()
                .filter(|window| window.via != Via::Nfit)
                .map(|window| MemoryRange { range: range(&window.range), proximity: window.node })
                .collect(),
            persistence: memory.persistence,
            pm_timer: config.cpu.pm_timer,
        }
    }
}

/// What the firmware tables say of memory devices.
#[derive(Clone, Debug)]
pub struct MemoryPlan {
    /// What is in each NFIT unit at boot.
    pub occupants: Vec<Option<NvdimmUnit>>,
    /// How far stores must get.
    pub persistence: aconite_acpi::Persistence,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Machine, Pmem, Slots};
    use crate::units::{GIB, Size};

    #[test]
    fn every_window_has_its_unit_and_way() {
        let pmem = ["", ",via=virtio", ",via=virtio,channel=bridge", ",via=e820"];
        let pmem = pmem.map(|keys| Pmem::parse("--pmem", &format!("size=1G{keys}")).unwrap());
        let disk = config::Disk::parse("--disk", "size=64M").unwrap();
        let slots = Slots { nfit: 1, pcie: 1, bridge: 1, size: Size(GIB), ..Slots::default() };
        let config = Machine { pmem: pmem.to_vec(), disk: vec![disk], slots, ..Machine::default() };
        let checked = vec![CheckedPmem { size: Size(GIB), create: false }; 4];
        let plan = Plan::new(&config, &checked, 40).unwrap();
        let (nfit, virtio) = (Via::Nfit, Via::Virtio);
        let ways: Vec<_> = plan.windows.iter().map(|window| window.via).collect();
        assert_eq!(ways, [nfit, virtio, virtio, Via::E820, nfit, virtio, virtio]);
        // NFIT units, then cards: of the two devices, of the disk (which has no window), and the free ones.
        let units: Vec<_> = plan.windows.iter().map(|window| window.unit).collect();
        assert_eq!(units, [0, 2, 3, 7, 1, 5, 6]);
        assert_eq!(plan.arrivals(&config, &checked).iter().flatten().count(), 4);
        assert_eq!(plan.pci64, 768 * GIB..960 * GIB);
        assert_eq!(plan.host_bridges, 960 * GIB..1024 * GIB);
        let config = Machine::default();
        assert_eq!(Plan::new(&config, &[], 40).unwrap().pci64, 768 * GIB..1024 * GIB);
    }
}
