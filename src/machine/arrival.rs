//! Devices arrive: files are opened and mapped, poison of the last run is put back, DIMMs get power, and the unit shows
//! itself to the guest.

use std::path::Path;
use std::sync::Arc;

use aconite_acpi::NvdimmUnit;
use aconite_devices::bus::lock;
use aconite_devices::nvdimm::{self, Dimm, Interleave, Unit, UnitConfig};
use thiserror::Error;

use super::build::monotonic_clock;
use super::dimm::{self, Kept};
use super::media::RegionMedia;
use super::memory::{Device, MemoryDevices, MemoryError, PERSISTENCE};
use super::pcie::Card;
use super::poison::guard_room;
use super::topology::{Member, Owner, Topology};
use super::virtio_pmem::{self, Function};
use crate::command::MemoryState;
use crate::config::{Ars, CheckedPmem, Pmem, PmemSource, Via};
use crate::kvm::Slot;
use crate::memory::backing::{self, BackingError};
use crate::memory::{Backing, PoisonPolicy, Region, RegionKind};
use crate::sidefile::Content;

/// A device that is to arrive.
#[derive(Clone, Copy, Debug)]
pub struct Arrival<'a> {
    /// Its description.
    pub pmem: &'a Pmem,
    /// Its size.
    pub checked: CheckedPmem,
    /// Its window. Those of devices that arrive together belong to one unit.
    pub window: usize,
}

/// When devices arrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// Before the guest starts.
    AtStart,
    /// While the guest runs.
    Later,
}

/// A device could not be added, nor those that were to arrive with it.
#[derive(Debug, Error)]
#[error("Cannot add memory device {id}")]
pub struct NotAdded {
    /// The device.
    pub id: String,
    /// What went wrong.
    pub source: MemoryError,
}

/// A device with its memory, out of reach yet.
struct Prepared {
    region: Arc<Region>,
    kept: Kept,
}

impl MemoryDevices {
    /// Puts the devices of unit `unit` into their windows, and returns the firmware's description of it, if it has one.
    /// After an error none of them is there.
    pub fn add(
        &mut self,
        unit: usize,
        arrivals: &[Arrival<'_>],
        when: When,
    ) -> Result<Option<NvdimmUnit>, NotAdded> {
        match arrivals {
            [] => Ok(None),
            [card] if card.pmem.via == Via::Virtio => self.add_card(unit, card, when).map(|()| None),
            arrivals => self.add_unit(unit, arrivals).map(Some),
        }
    }

    /// Puts a card behind a port.
    fn add_card(&mut self, unit: usize, arrival: &Arrival<'_>, when: When) -> Result<(), NotAdded> {
        let prepared = self.prepare(arrival).map_err(|source| not_added(arrival, source))?;
        let slots = self.map(std::slice::from_ref(arrival), std::slice::from_ref(&prepared))?;
        let function = match self.plug_card(&prepared.region, when) {
            Ok(function) => function,
            Err(error) => {
                drop(slots);
                self.space.remove(prepared.region.gpa());
                return Err(not_added(arrival, error));
            }
        };
        let channel = arrival.pmem.channel.unwrap_or(self.default_channel(Via::Virtio));
        self.devices.extend(slots.into_iter().map(|slot| Device {
            id: arrival.pmem.id.clone(),
            pmem: arrival.pmem.clone(),
            unit,
            window: arrival.window,
            state: MemoryState::Present,
            region: prepared.region.clone(),
            dimms: Vec::new(),
            card: Some(function.clone()),
            _slot: slot,
            channel,
            left_by: None,
        }));
        Ok(())
    }

    /// Puts the device of a region into a free slot.
    fn plug_card(&self, region: &Arc<Region>, when: When) -> Result<Function, MemoryError> {
        let mut pcie = lock(&self.pcie);
        let name = pcie.name_card();
        let function = virtio_pmem::function(&self.cards, region, name)?;
        let card = Card::virtio(region.name(), name, function.0.clone());
        match when {
            When::AtStart => pcie.install(card)?,
            When::Later => pcie.insert(card)?,
        }
        Ok(function)
    }

    fn add_unit(&mut self, unit: usize, arrivals: &[Arrival<'_>]) -> Result<NvdimmUnit, NotAdded> {
        let mut prepared = Vec::new();
        for arrival in arrivals {
            prepared.push(self.prepare(arrival).map_err(|source| not_added(arrival, source))?);
        }
        let members: Vec<_> = arrivals
            .iter()
            .map(|arrival| Member {
                pmem: arrival.pmem,
                size: arrival.checked.size.bytes(),
                window: &self.windows[arrival.window],
            })
            .collect();
        let topology = Topology::of(unit as u32, &members);
        let mut dimms = Vec::new();
        for Owner { member, number, .. } in &topology.owners {
            let dimm =
                dimm::power_on(arrivals[*member].pmem, &prepared[*member].kept, *number, monotonic_clock());
            dimms.push(dimm.map_err(|source| not_added(&arrivals[*member], source.into()))?);
        }
        let all = |source: MemoryError| not_added(&arrivals[0], source);
        let model = self.model(&topology, arrivals, &prepared, &dimms).map_err(all)?;
        let slots = self.map(arrivals, &prepared)?;
        if let Err(error) = self.units.insert(model) {
            prepared.iter().for_each(|prepared| drop(self.space.remove(prepared.region.gpa())));
            return Err(not_added(&arrivals[0], error.into()));
        }
        for (member, ((arrival, prepared), slot)) in arrivals.iter().zip(prepared).zip(slots).enumerate() {
            let its = |(owner, _): &(&Owner, &Arc<Dimm>)| owner.member == member;
            self.devices.push(Device {
                id: arrival.pmem.id.clone(),
                pmem: arrival.pmem.clone(),
                unit,
                window: arrival.window,
                state: MemoryState::Present,
                region: prepared.region,
                dimms: topology.owners.iter().zip(&dimms).filter(its).map(|(_, dimm)| dimm.clone()).collect(),
                card: None,
                _slot: slot,
                channel: arrival.pmem.channel.unwrap_or(self.default_channel(Via::Nfit)),
                left_by: None,
            });
        }
        Ok(topology.firmware)
    }

    /// Opens a device's file, maps it and puts the poison of the last run back.
    fn prepare(&mut self, arrival: &Arrival<'_>) -> Result<Prepared, MemoryError> {
        let Arrival { pmem, checked, window } = *arrival;
        let (base, size) = (self.windows[window].range.start, checked.size.bytes());
        let file = match &pmem.source {
            PmemSource::Memory(_) => {
                if let Some(kept) = self.anonymous.get(&pmem.id) {
                    kept.try_clone().map_err(|source| BackingError::Anonymous { size, source })?
                } else {
                    let file = backing::anonymous(c"aconite-pmem", size)?;
                    let kept = file.try_clone().map_err(|source| BackingError::Anonymous { size, source })?;
                    self.anonymous.insert(pmem.id.clone(), kept);
                    file
                }
            }
            PmemSource::File { path, .. } => backing::open(path, size, !pmem.readonly, checked.create)?,
        };
        let kept = match &pmem.source {
            PmemSource::Memory(_) => Kept::Here(Content::default()),
            // There is no side file among files that consist of whole huge pages.
            PmemSource::File { path, .. } if on_hugetlbfs(path)? => Kept::Here(Content::default()),
            PmemSource::File { path, .. } => Kept::of_file(path, size, pmem.readonly, checked.create)?,
        };
        let backing = Backing { file, offset: 0, writable: !pmem.readonly };
        let region = Arc::new(Region::new(&pmem.id, RegionKind::Pmem, base, size, backing)?);
        region.set_policy(PoisonPolicy { full_line_store: pmem.full_line_store, ..PoisonPolicy::default() });
        kept.restore_poison(&region, guard_room(&self.space, &region))?;
        Ok(Prepared { region, kept })
    }

    /// The model of the unit's firmware.
    fn model(
        &self,
        topology: &Topology,
        arrivals: &[Arrival<'_>],
        prepared: &[Prepared],
        dimms: &[Arc<Dimm>],
    ) -> Result<Unit, MemoryError> {
        let firmware = &topology.firmware;
        let members = topology.members.iter().map(|member| (&arrivals[*member], &prepared[*member]));
        let ranges =
            firmware.ranges.iter().zip(members).map(|(range, (arrival, prepared))| nvdimm::UnitRange {
                base: range.range.base,
                size: range.range.size,
                volatile: range.kind.is_volatile(),
                interleave: Interleave {
                    line: range.line.into(),
                    shares: range
                        .shares
                        .iter()
                        .map(|share| nvdimm::Share { dimm: share.dimm, dimm_address: share.dimm_address })
                        .collect(),
                },
                scrub: arrival.pmem.ars.time,
                media: Arc::new(RegionMedia {
                    region: prepared.region.clone(),
                    space: self.space.clone(),
                    baton: self.baton.clone(),
                    events: self.events.clone(),
                }),
            });
        let (fit, ranges) = (firmware.fit(PERSISTENCE), ranges.collect());
        let ars = arrivals.iter().map(|arrival| arrival.pmem.ars).reduce(Ars::on_one_bus).unwrap_or_default();
        Ok(Unit::new(UnitConfig {
            clear_unit: ars.clear_unit,
            ars_records: ars.records,
            ..UnitConfig::new(firmware.unit, fit, ranges, dimms.to_vec(), monotonic_clock())
        })?)
    }

    /// Puts memory within the guest's reach: all of it, or none after an error.
    fn map(&self, arrivals: &[Arrival<'_>], prepared: &[Prepared]) -> Result<Vec<Slot>, NotAdded> {
        let mut slots = Vec::new();
        for (at, (arrival, Prepared { region, .. })) in arrivals.iter().zip(prepared).enumerate() {
            let mapped = self.space.insert(region.clone()).map_err(MemoryError::from).and_then(|()| {
                self.vm.map(region).map_err(|error| {
                    self.space.remove(region.gpa());
                    error.into()
                })
            });
            match mapped {
                Ok(slot) => slots.push(slot),
                Err(error) => {
                    drop(slots);
                    prepared[..at].iter().for_each(|before| drop(self.space.remove(before.region.gpa())));
                    return Err(not_added(arrival, error));
                }
            }
        }
        Ok(slots)
    }
}

fn not_added(arrival: &Arrival<'_>, source: MemoryError) -> NotAdded {
    NotAdded { id: arrival.pmem.id.clone(), source }
}

fn on_hugetlbfs(path: &Path) -> Result<bool, BackingError> {
    let page = backing::huge_page(path);
    page.map(|page| page.is_some()).map_err(|source| BackingError::Open { path: path.to_owned(), source })
}
