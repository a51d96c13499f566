//! Devices go and come: what the machine does in each step of a removal, and where an arrival goes.

use std::collections::BTreeMap;
use std::ops::Range;

use aconite_acpi::platform::EventTarget;
use aconite_acpi::platform::hotplug::OsStatus;
use aconite_devices::bus::lock;

use super::arrival::{Arrival, NotAdded, When};
use super::chain;
use super::departing::{Departing, Farewell};
use super::memory::{Device, MemoryDevices, MemoryError, length, persistence};
use super::operations::Operations;
use super::pcie::At;
use super::removal::{Happening, Removal};
use super::tell::{Heard, Ways, code_of};
use crate::command::{
    CENSUS_LISTED_IN_EVENT, DeviceState, Error, ErrorCode, Event, EventBus, Operation, RemovalStep,
    RemoveMode,
};
use crate::config::{Channel, CheckedPmem, Place, Pmem, Via, validate_bus};
use crate::kvm::{Held, VcpuView};
use crate::memory::MapError;
use crate::memory::backing::BackingError;

impl MemoryDevices {
    /// Begins to take a device away.
    pub fn remove(
        &mut self,
        _held: &Held,
        ways: &Ways,
        id: &str,
        farewell: Farewell,
    ) -> Result<Operation, Error> {
        let device = self.leaving(id)?;
        let (unit, own_channel) = (device.unit, device.channel);
        let device_id = device.id.clone();
        if !self.overtakes(&unit, farewell.mode) {
            self.present(&device_id)?;
        }
        let device = self.find(&device_id)?;
        let channel = farewell.via.unwrap_or(own_channel);
        if channel == Channel::None {
            return Err(self.no_channel(device));
        }
        ways.check(channel)?;
        self.check_way(device, channel, farewell.mode)?;
        self.begin(ways, &unit, id, channel, farewell)
    }

    /// The device whose unit is to go: the one with this id, or any one on the bus with this name. Devices of a bus go
    /// together, since Linux cannot remove a part of what one root device has.
    fn leaving(&self, id: &str) -> Result<&Device, Error> {
        if let Some(device) = self.devices.iter().find(|d| d.pmem.bus.as_deref() == Some(id)) {
            return Ok(self.of_unit(device.unit).next().unwrap_or(device));
        }
        let device = self.find(id)?;
        let others: Vec<_> =
            self.of_unit(device.unit).filter(|d| d.id != id).map(|d| d.id.as_str()).collect();
        match &device.pmem.bus {
            Some(bus) if !others.is_empty() => Err(Error::new(
                ErrorCode::NotSupported,
                format!("{id} is on bus {bus} with {}: they can only be removed together", others.join(", ")),
                format!("remove the bus ({bus})"),
            )),
            _ => Ok(device),
        }
    }

    /// The devices of a unit that have not departed.
    pub(super) fn of_unit(&self, unit: usize) -> impl Iterator<Item = &Device> {
        self.devices.iter().filter(move |d| d.unit == unit && d.state != DeviceState::Departed)
    }

    /// The unit that is notified by `target`, and the channel that this is.
    fn notified(&self, target: EventTarget) -> Option<(usize, Channel)> {
        match target {
            EventTarget::Container(unit) => Some((unit as usize, Channel::Container)),
            EventTarget::HostBridge(bridge) => {
                let unit = self.unit_of_card(lock(&self.pcie).behind(bridge)?)?;
                Some((unit, Channel::Bridge))
            }
            EventTarget::Root(_) | EventTarget::Dimm { .. } | EventTarget::ErrorDevice => None,
        }
    }

    /// The guest has ejected a unit's container or a host bridge; the firmware has already let go of it.
    pub fn ejected(&mut self, _held: &Held, ways: &Ways, target: EventTarget) {
        if let Some((unit, channel)) = self.notified(target) {
            let how = "the guest evaluated _EJ0".to_owned();
            if !self.removals.contains_key(&unit) {
                self.begin_unasked(ways, &unit, channel, how.clone());
            }
            self.hear(ways, &unit, Happening::LetGo(how));
        }
        self.bridge_is_free(target);
    }

    /// The guest has said what it has come to with a notification of a unit's container or of a host bridge.
    pub fn os_said(&mut self, _held: &Held, ways: &Ways, target: EventTarget, status: OsStatus) {
        self.take_answer(ways, target, status);
        if status.status != OsStatus::EJECTING {
            self.bridge_is_free(target);
        }
    }

    /// The guest looks at host bridge `target` anew.
    fn bridge_is_free(&self, target: EventTarget) {
        if let EventTarget::HostBridge(bridge) = target {
            lock(&self.pcie).let_go_of_bridge(bridge);
        }
    }

    fn take_answer(&mut self, ways: &Ways, target: EventTarget, status: OsStatus) {
        let Some((unit, channel)) = self.notified(target) else { return };
        let Some(removal) = self.removals.get(&unit).filter(|r| r.channel == channel) else {
            return;
        };
        if status.event != u16::from(code_of(removal.mode)) {
            return;
        }
        let happening = match (status.status, removal.mode) {
            (OsStatus::EJECTING, _) => Happening::Working,
            (OsStatus::SUCCESS, RemoveMode::Surprise) => {
                Happening::LetGo("the guest has taken notice (_OST)".to_owned())
            }
            // _EJ0 has come before; without it nothing was let go of.
            (OsStatus::SUCCESS, RemoveMode::Eject) => {
                Happening::Refused("it says that it is done (_OST), but it did not evaluate _EJ0".to_owned())
            }
            _ => Happening::Refused(format!("{} (_OST {:#x})", status.words(), status.status)),
        };
        self.hear(ways, &unit, happening);
    }

    /// Something was heard by another thread.
    pub fn heard(&mut self, _held: &Held, ways: &Ways, heard: Heard) {
        match heard {
            // It may have been overtaken, or be overdue.
            Heard::Removal { operation, happening } => self.hear_of(ways, operation, happening),
            Heard::Inserted { operation, error } => self.operations.end(&self.events, operation, error),
        }
    }

    /// Whether a device can go by `channel`.
    fn check_way(&self, device: &Device, channel: Channel, mode: RemoveMode) -> Result<(), Error> {
        let id = &device.id;
        let wrong = |problem: String, remedy: &str| Err(Error::new(ErrorCode::NotSupported, problem, remedy));
        let at = At::of(&device.pmem);
        match (device.pmem.via, channel) {
            (Via::Nfit, Channel::Pcie | Channel::Bridge) => {
                wrong(format!("{id} is an NVDIMM, no PCI Express device"), "name via=container or via=agent")
            }
            (Via::E820, _) => Err(self.no_channel(device)),
            (Via::Virtio, channel) if channel != at.channel() => wrong(
                format!("{id} is a virtio-pmem device, and goes through its {}", at.name()),
                &format!("name via={}, or leave it out", at.channel().name()),
            ),
            (Via::Virtio, Channel::Pcie) => lock(&self.pcie).check_button(id, mode),
            _ => Ok(()),
        }
    }

    /// Puts a device into a free window, or in place of a departed one.
    ///
    /// Before the new device is within reach, the page tables of the guest are walked for mappings of the old one, and
    /// told of: later nobody can tell them from mappings of the new one. The old one's memslot goes first, with which KVM
    /// flushes every translation that processors still have of it (`kvm_arch_flush_shadow_memslot`).
    pub fn insert(
        &mut self,
        held: &Held,
        ways: &Ways,
        vcpus: &[VcpuView],
        pmem: &Pmem,
        checked: CheckedPmem,
    ) -> Result<Operation, Error> {
        let size = checked.size.bytes();
        let named = self.devices.iter().find(|d| d.id == pmem.id);
        let in_use = |device: &Device| {
            Error::new(
                ErrorCode::IdInUse,
                format!("The id {:?} is that of a {} device", pmem.id, device.state.name()),
                "choose another id",
            )
        };
        if let Some(device) = named.filter(|d| d.state != DeviceState::Departed) {
            return Err(in_use(device));
        }
        let window = self.place(pmem, size)?;
        let joined = self.joined_unit(pmem)?;
        let unit = joined.unwrap_or(self.windows[window].unit);
        if let Some(device) = named.filter(|d| d.window != window) {
            return Err(in_use(device));
        }
        if pmem.via == Via::Virtio {
            lock(&self.pcie).check_free(At::of(pmem))?;
        }
        // A driver that the agent has unbound comes back by the agent only.
        let unbound = self.devices.iter().any(|d| d.unit == unit && d.left_by == Some(Channel::Agent));
        let channel =
            if unbound { Channel::Agent } else { pmem.channel.unwrap_or(self.default_channel(pmem.via)) };
        ways.check(channel)?;
        let operation = self.operations.begin(Operation::new("insert", &pmem.id, channel));
        if let Some(old) = self.devices.iter().position(|d| d.window == window) {
            let old = self.devices.remove(old);
            self.clear_window(&old, operation.operation, &pmem.id);
            let (id, range) = (old.id.clone(), old.region.range());
            drop(old);
            self.tell_of_old_mappings(held, vcpus, &id, range, operation.operation);
        }
        let arrival = Arrival { pmem, checked, window };
        let own_unit = std::mem::replace(&mut self.windows[window].unit, unit);
        let added = match joined {
            Some(unit) => self.add_to_bus(unit, &arrival),
            None => self.add(unit, &[arrival], When::Later).map(drop),
        };
        if let Err(NotAdded { source: error, .. }) = added {
            self.windows[window].unit = own_unit;
            let code = match &error {
                MemoryError::Backing(BackingError::InUse { .. }) => ErrorCode::FileInUse,
                _ => ErrorCode::HostLimit,
            };
            let error = Error::new(code, chain(&error), "see the host's limits and the file's permissions");
            self.operations.finish(operation.operation, Some(error.clone()));
            return Err(error);
        }
        self.events.publish(Event::Inserted {
            device: pmem.id.clone(),
            operation: operation.operation,
            gpa: Some(self.windows[window].range.start.into()),
            size,
        });
        if joined.is_some() {
            ways.tell_joined(unit);
            self.operations.end(&self.events, operation.operation, None);
        } else if pmem.via == Via::Virtio {
            ways.tell_card_insertion(&pmem.id);
            self.operations.end(&self.events, operation.operation, None);
        } else if ways.tell_insertion(
            operation.operation,
            channel,
            unit,
            vec![self.windows[window].range.clone()],
        ) {
            self.operations.end(&self.events, operation.operation, None);
        }
        self.operations.get(operation.operation)
    }

    /// The unit of the bus that a device names, if devices are on it: the device joins them.
    fn joined_unit(&self, pmem: &Pmem) -> Result<Option<usize>, Error> {
        let Some(bus) = &pmem.bus else { return Ok(None) };
        let there =
            |device: &&Device| device.pmem.bus.as_ref() == Some(bus) && device.state != DeviceState::Departed;
        let Some(first) = self.devices.iter().find(there) else { return Ok(None) };
        let unit = first.unit;
        if first.state == DeviceState::Leaving {
            return Err(Error::new(
                ErrorCode::WrongDeviceState,
                format!("Bus {bus} is leaving"),
                "wait until it has departed, or name another bus",
            ));
        }
        let members: Vec<_> = self.of_unit(unit).map(|device| &device.pmem).chain([pmem]).collect();
        let dimms = validate_bus(&members)?;
        let room = self.dimms_of_unit.get(unit).copied().unwrap_or(0);
        if dimms > room {
            return Err(Error::new(
                ErrorCode::NoFreeSlot,
                format!("Bus {bus} would have {dimms} DIMMs, and has room for {room}"),
                format!(
                    "declare room when the machine starts (--slots dimms={dimms}), or name DIMMs that it has"
                ),
            ));
        }
        let (others, all) = (&members[..members.len() - 1], &members[..]);
        if persistence(others.iter().copied()) != persistence(all.iter().copied()) {
            return Err(Error::new(
                ErrorCode::NotSupported,
                format!("Bus {bus} has promised that what is written is durable once it has left the caches"),
                "leave unflushed=drop out, or name another bus",
            ));
        }
        Ok(Some(unit))
    }

    fn tell_of_old_mappings(
        &self,
        held: &Held,
        vcpus: &[VcpuView],
        id: &str,
        range: Range<u64>,
        operation: u64,
    ) {
        match self.census_of(held, vcpus, id, range, true) {
            Ok(mut census) => {
                census.shorten(CENSUS_LISTED_IN_EVENT);
                self.events.publish(Event::Census { operation, census: Box::new(census) });
            }
            Err(error) => tracing::error!(%error, device = id, "nobody knows who still maps it"),
        }
    }

    /// Forgets a departed device: its addresses are no longer guarded.
    fn clear_window(&mut self, old: &Device, operation: u64, by: &str) {
        self.space.remove(old.region.gpa());
        self.anonymous.remove(&old.id);
        self.stale.forget(&old.id);
        self.events.publish(Event::Removal {
            device: old.id.clone(),
            operation,
            step: RemovalStep::Replaced,
            mode: RemoveMode::Surprise,
            channel: old.channel,
            detail: Some(format!("by {by}")),
        });
    }

    /// A window in which nothing ever was, or else the one whose device has departed first.
    fn free_window(&self, pmem: &Pmem, size: u64) -> Option<usize> {
        let fits = |window: &usize| self.fits(*window, pmem, size).is_ok();
        let untouched = |window: &usize| self.devices.iter().all(|d| d.window != *window);
        let departed = self.devices.iter().filter(|d| d.state == DeviceState::Departed).map(|d| d.window);
        (0..self.windows.len()).filter(untouched).chain(departed).find(fits)
    }

    /// Whether a device can go into a window.
    fn fits(&self, window: usize, pmem: &Pmem, size: u64) -> Result<(), Error> {
        let at = &self.windows[window];
        if let Some(device) = self.of_unit(at.unit).next() {
            let (other, gpa) = (&device.id, device.region.gpa());
            return Err(match device.window == window {
                true => {
                    Error::new(ErrorCode::AddressInUse, format!("{other} is at {gpa:#x}"), "remove it first")
                }
                false => Error::new(
                    ErrorCode::AddressInUse,
                    format!("The slot at {:#x} is on the bus that {other} is on", at.range.start),
                    "remove the bus first, or insert the device into another slot",
                ),
            });
        }
        let room = length(at);
        if room < size {
            return Err(Error::new(
                ErrorCode::NoFreeSlot,
                format!("The slot at {:#x} holds {room:#x} bytes, not {size:#x}", at.range.start),
                "insert a smaller device, or declare larger slots",
            ));
        }
        if at.via != pmem.via {
            return Err(Error::new(
                ErrorCode::AddressInUse,
                format!(
                    "The slot at {:#x} is for devices with via={}, not via={}",
                    at.range.start,
                    at.via.name(),
                    pmem.via.name()
                ),
                "name another place or another id",
            ));
        }
        let dimms = pmem.dimms.count();
        let most = self.dimms_of_unit.get(at.unit).copied().unwrap_or(dimms);
        if dimms > most {
            return Err(Error::new(
                ErrorCode::NoFreeSlot,
                format!("The slot at {:#x} is for {most} DIMMs, not {dimms}", at.range.start),
                format!("declare slots for as many when the machine starts (--slots nfit=N,dimms={dimms})"),
            ));
        }
        Ok(())
    }

    /// The window in which `pmem` goes.
    fn place(&self, pmem: &Pmem, size: u64) -> Result<usize, Error> {
        let window = match &pmem.at {
            // An id keeps its address.
            None if self.devices.iter().any(|d| d.id == pmem.id) => self.find(&pmem.id)?.window,
            None => self.free_window(pmem, size).ok_or_else(|| {
                let dimms = pmem.dimms.count();
                let (what, slots) = match pmem.via {
                    Via::Nfit => (format!(" on {dimms} DIMMs"), "nfit=N,size=SIZE,dimms=M"),
                    Via::Virtio | Via::E820 => (String::new(), "pcie=N,size=SIZE"),
                };
                Error::new(
                    ErrorCode::NoFreeSlot,
                    format!("No free slot holds {size:#x} bytes{what}"),
                    format!("declare slots when the machine starts (--slots {slots}), or remove a device"),
                )
            })?,
            Some(Place::Device(id)) => self.find(id)?.window,
            Some(Place::Address(address)) => {
                self.windows.iter().position(|w| w.range.start == address.0).ok_or_else(|| {
                    Error::new(
                        ErrorCode::AddressInUse,
                        format!("No slot begins at {address}"),
                        format!(
                            "use one of {}",
                            self.windows
                                .iter()
                                .map(|w| format!("{:#x}", w.range.start))
                                .collect::<Vec<_>>()
                                .join(", ")
                        ),
                    )
                })?
            }
        };
        self.fits(window, pmem, size)?;
        Ok(window)
    }
}

impl Departing for MemoryDevices {
    /// A unit: its memory goes together.
    type Key = usize;

    fn removals(&mut self) -> &mut BTreeMap<usize, Removal> {
        &mut self.removals
    }

    fn operations(&self) -> &Operations {
        &self.operations
    }

    fn events(&self) -> &EventBus {
        &self.events
    }

    fn members(&self, unit: &usize) -> Vec<String> {
        self.of_unit(*unit).map(|device| device.id.clone()).collect()
    }

    fn take(&mut self, unit: &usize) -> Result<(), Error> {
        for device in self.of_unit(*unit) {
            self.space.depart(&device.region).map_err(host_limit)?;
            if let Some(card) = &device.card {
                // Before the link goes down, which resets what is behind it.
                card.depart();
                lock(&self.pcie).pull(&device.id);
            }
        }
        self.units.remove(*unit as u32);
        Ok(())
    }

    fn tell(&self, ways: &Ways, unit: &usize, removal: &Removal) {
        ways.tell_removal(removal, *unit, self.of_unit(*unit).map(|device| device.region.range()).collect());
    }

    fn note(&mut self, members: &[String], state: DeviceState, by: Option<Channel>) {
        for device in self.devices.iter_mut().filter(|d| members.contains(&d.id)) {
            device.state = state;
            device.left_by = by;
        }
    }
}

fn host_limit(error: MapError) -> Error {
    Error::new(ErrorCode::HostLimit, chain(&error), "raise vm.max_map_count of the host")
}
