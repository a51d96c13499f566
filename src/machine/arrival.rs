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
use super::memory::{Device, MemoryDevices, MemoryError, persistence};
use super::pcie::{At, Card, CardKind};
use super::poison::guard_room;
use super::topology::{Member, Owner, Seat, Topology};
use super::virtio_pmem;
use crate::command::DeviceState;
use crate::config::{Ars, Channel, CheckedPmem, Pmem, PmemSource, Unflushed, Via};
use crate::kvm::Slot;
use crate::memory::backing::{self, BackingError};
use crate::memory::{Backing, Durable, PoisonPolicy, Region, RegionKind};
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
            [memory] if memory.pmem.via == Via::E820 => self.add_memory(unit, memory).map(|()| None),
            arrivals => self.add_unit(unit, arrivals).map(Some),
        }
    }

    /// Puts a card behind a port or a host bridge.
    fn add_card(&mut self, unit: usize, arrival: &Arrival<'_>, when: When) -> Result<(), NotAdded> {
        let prepared = self.prepare(arrival).map_err(|source| not_added(arrival, source))?;
        let slot = self.map_one(arrival, &prepared)?;
        let card = match self.plug_card(&prepared.region, At::of(arrival.pmem), when) {
            Ok(card) => card,
            Err(error) => {
                drop(slot);
                self.space.remove(prepared.region.gpa());
                return Err(not_added(arrival, error));
            }
        };
        let channel = arrival.pmem.channel.unwrap_or(self.default_channel(Via::Virtio));
        let device = Device::arrived(unit, arrival, prepared.region, slot, channel);
        self.devices.push(Device { card: Some(card), ..device });
        Ok(())
    }

    /// Puts memory where the E820 map says that it is.
    fn add_memory(&mut self, unit: usize, arrival: &Arrival<'_>) -> Result<(), NotAdded> {
        let prepared = self.prepare(arrival).map_err(|source| not_added(arrival, source))?;
        let slot = self.map_one(arrival, &prepared)?;
        self.devices.push(Device::arrived(unit, arrival, prepared.region, slot, Channel::None));
        Ok(())
    }

    /// Puts the device of a region into a free place.
    fn plug_card(&self, region: &Arc<Region>, at: At, when: When) -> Result<virtio_pmem::Card, MemoryError> {
        let mut pcie = lock(&self.pcie);
        let name = pcie.name_card();
        let mut made = virtio_pmem::Card::new(&self.cards, region, name, at)?;
        if let Some(send) = &self.send {
            made.start(send)?;
        }
        let card = Card::virtio(CardKind::Memory, region.name(), name, made.function.clone());
        match when {
            When::AtStart => pcie.install(card, at)?,
            When::Later => pcie.insert(card, at, None)?,
        }
        Ok(made)
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
        for (range, member) in topology.firmware.ranges.iter().zip(&topology.members) {
            let locked = range.shares.iter().any(|share| dimms[share.dimm as usize].locked());
            prepared[*member].region.set_locked(locked).map_err(|error| all(error.into()))?;
        }
        let parts: Vec<_> = arrivals
            .iter()
            .zip(&prepared)
            .map(|(arrival, prepared)| (arrival.pmem, &prepared.region))
            .collect();
        let model = self.model(&topology, &parts, &dimms).map_err(all)?;
        let slots = self.map(arrivals, &prepared)?;
        if let Err(error) = self.units.insert(model) {
            prepared.iter().for_each(|prepared| drop(self.space.remove(prepared.region.gpa())));
            return Err(not_added(&arrivals[0], error.into()));
        }
        let mut seats =
            (0..arrivals.len()).map(|member| topology.seats(member, &dimms)).collect::<Vec<_>>().into_iter();
        let channel = self.default_channel(Via::Nfit);
        for (member, ((arrival, prepared), slot)) in arrivals.iter().zip(prepared).zip(slots).enumerate() {
            let its = |(owner, _): &(&Owner, &Arc<Dimm>)| owner.member == member;
            let channel = arrival.pmem.channel.unwrap_or(channel);
            self.devices.push(Device {
                dimms: topology.owners.iter().zip(&dimms).filter(its).map(|(_, dimm)| dimm.clone()).collect(),
                seats: seats.next().unwrap_or_default(),
                ..Device::arrived(unit, arrival, prepared.region, slot, channel)
            });
        }
        Ok(topology.firmware)
    }

    /// Puts a device on a bus that is there. Its window belongs to the bus's unit already. After an error nothing has
    /// changed.
    ///
    /// What `_FIT` has said so far it says again, byte by byte, with more behind it: Linux takes a sub-table that has changed
    /// for one that was deleted (`acpi_nfit_init` in drivers/acpi/nfit/core.c).
    pub fn add_to_bus(&mut self, unit: usize, arrival: &Arrival<'_>) -> Result<(), NotAdded> {
        let refused = |source| not_added(arrival, source);
        let prepared = self.prepare(arrival).map_err(refused)?;
        let before: Vec<&Device> = self.of_unit(unit).collect();
        let members: Vec<_> = before
            .iter()
            .map(|device| Member {
                pmem: &device.pmem,
                size: device.region.len(),
                window: &self.windows[device.window],
            })
            .chain([Member {
                pmem: arrival.pmem,
                size: arrival.checked.size.bytes(),
                window: &self.windows[arrival.window],
            }])
            .collect();
        let topology = Topology::of(unit as u32, &members);
        let mut dimms = self.units.get(unit as u32).map(|unit| unit.dimms().to_vec()).unwrap_or_default();
        for Owner { number, .. } in &topology.owners[dimms.len()..] {
            let dimm = dimm::power_on(arrival.pmem, &prepared.kept, *number, monotonic_clock());
            dimms.push(dimm.map_err(|source| refused(source.into()))?);
        }
        let parts: Vec<_> = before
            .iter()
            .map(|device| (&device.pmem, &device.region))
            .chain([(arrival.pmem, &prepared.region)])
            .collect();
        let model = self.model(&topology, &parts, &dimms).map_err(refused)?;
        let seats = topology.seats(before.len(), &dimms);
        let locked = seats.iter().any(Seat::locked);
        prepared.region.set_locked(locked).map_err(|error| refused(error.into()))?;
        let known: Vec<_> = before.iter().flat_map(|device| &device.dimms).cloned().collect();
        let own = dimms.iter().filter(|dimm| !known.iter().any(|known| Arc::ptr_eq(known, dimm)));
        let own: Vec<_> = own.cloned().collect();
        let slot = self.map_one(arrival, &prepared)?;
        let channel = arrival.pmem.channel.unwrap_or(self.default_channel(Via::Nfit));
        if let Err(error) = self.units.replace(model) {
            self.space.remove(prepared.region.gpa());
            return Err(refused(error.into()));
        }
        let device = Device::arrived(unit, arrival, prepared.region, slot, channel);
        self.devices.push(Device { dimms: own, seats, ..device });
        Ok(())
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
        let backing = |file| Backing { file, offset: 0, writable: !pmem.readonly };
        let region = match pmem.unflushed {
            Unflushed::Keep => Region::new(&pmem.id, RegionKind::Pmem, base, size, backing(file))?,
            Unflushed::Drop => {
                let no_copy = |source| BackingError::Copy { name: pmem.id.clone(), size, source };
                let durable = Durable::new(file, size).map_err(no_copy)?;
                let working = backing(durable.working().map_err(no_copy)?);
                Region::new(&pmem.id, RegionKind::Pmem, base, size, working)?.with_durable(durable)
            }
        };
        let region = Arc::new(region);
        region.set_policy(PoisonPolicy { full_line_store: pmem.full_line_store, ..PoisonPolicy::default() });
        kept.restore_poison(&region, guard_room(&self.space, &region))?;
        Ok(Prepared { region, kept })
    }

    /// The model of the unit's firmware.
    fn model(
        &self,
        topology: &Topology,
        parts: &[(&Pmem, &Arc<Region>)],
        dimms: &[Arc<Dimm>],
    ) -> Result<Unit, MemoryError> {
        let firmware = &topology.firmware;
        let members = topology.members.iter().map(|member| parts[*member]);
        let ranges = firmware.ranges.iter().zip(members).map(|(range, (pmem, region))| nvdimm::UnitRange {
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
            scrub: pmem.ars.time,
            media: Arc::new(RegionMedia {
                region: region.clone(),
                space: self.space.clone(),
                baton: self.baton.clone(),
                events: self.events.clone(),
            }),
        });
        let persistence = persistence(parts.iter().map(|(pmem, _)| *pmem));
        let (fit, ranges) = (firmware.fit(persistence), ranges.collect());
        let ars = parts.iter().map(|(pmem, _)| pmem.ars).reduce(Ars::on_one_bus).unwrap_or_default();
        Ok(Unit::new(UnitConfig {
            clear_unit: ars.clear_unit,
            ars_records: ars.records,
            ..UnitConfig::new(firmware.unit, fit, ranges, dimms.to_vec(), monotonic_clock())
        })?)
    }

    /// Puts memory within the guest's reach: all of it, or none after an error.
    fn map(&self, arrivals: &[Arrival<'_>], prepared: &[Prepared]) -> Result<Vec<Slot>, NotAdded> {
        let mut slots = Vec::new();
        for (at, (arrival, one)) in arrivals.iter().zip(prepared).enumerate() {
            match self.map_one(arrival, one) {
                Ok(slot) => slots.push(slot),
                Err(error) => {
                    drop(slots);
                    prepared[..at].iter().for_each(|before| drop(self.space.remove(before.region.gpa())));
                    return Err(error);
                }
            }
        }
        Ok(slots)
    }

    /// Puts the memory of one device within the guest's reach.
    fn map_one(&self, arrival: &Arrival<'_>, prepared: &Prepared) -> Result<Slot, NotAdded> {
        let region = &prepared.region;
        self.space.insert(region.clone()).map_err(|error| not_added(arrival, error.into()))?;
        self.vm.map(region).map_err(|error| {
            self.space.remove(region.gpa());
            not_added(arrival, error.into())
        })
    }
}

impl Device {
    /// A device that has come within the guest's reach, on no DIMM and behind no port.
    fn arrived(
        unit: usize,
        arrival: &Arrival<'_>,
        region: Arc<Region>,
        slot: Slot,
        channel: Channel,
    ) -> Self {
        Self {
            id: arrival.pmem.id.clone(),
            pmem: arrival.pmem.clone(),
            unit,
            window: arrival.window,
            state: DeviceState::Present,
            region,
            dimms: Vec::new(),
            seats: Vec::new(),
            card: None,
            _slot: slot,
            channel,
            left_by: None,
        }
    }
}

fn not_added(arrival: &Arrival<'_>, source: MemoryError) -> NotAdded {
    NotAdded { id: arrival.pmem.id.clone(), source }
}

fn on_hugetlbfs(path: &Path) -> Result<bool, BackingError> {
    let page = backing::huge_page(path);
    page.map(|page| page.is_some()).map_err(|source| BackingError::Open { path: path.to_owned(), source })
}
