//! Devices go and come: what the machine does in each step of a removal, and where an arrival goes.

use std::ops::Range;
use std::time::{Duration, Instant};

use aconite_acpi::platform::notify;
use aconite_acpi::platform::unit::OsStatus;
use aconite_devices::bus::{Effects, lock};
use aconite_devices::pci::SlotKind;
use aconite_devices::virtio::QueueHandler;

use super::arrival::{Arrival, NotAdded, When};
use super::chain;
use super::memory::{Device, MemoryDevices, MemoryError, length, persistence, state_name};
use super::removal::{Action, Happening, PATIENCE, Removal, unasked};
use super::tell::{Heard, Ways};
use crate::command::{
    CENSUS_LISTED_IN_EVENT, Error, ErrorCode, Event, MemoryState, Operation, OperationState, RemovalStep,
    RemoveMode,
};
use crate::config::{Channel, CheckedPmem, Place, Pmem, Via, validate_bus};
use crate::kvm::{Held, VcpuView};
use crate::memory::MapError;
use crate::memory::backing::BackingError;

/// A request to take a device away.
#[derive(Clone, Copy, Debug)]
pub struct Farewell {
    /// Whether the guest is asked.
    pub mode: RemoveMode,
    /// By which channel; `None` is the device's own.
    pub via: Option<Channel>,
    /// How long the guest may take; `None` is [`PATIENCE`].
    pub patience: Option<Duration>,
}

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
        let unit = device.unit;
        let overtakes = farewell.mode == RemoveMode::Surprise
            && self.removals.get(&unit).is_some_and(|removal| removal.mode == RemoveMode::Eject);
        if !overtakes {
            self.present(&device.id)?;
        }
        let channel = farewell.via.unwrap_or(device.channel);
        if channel == Channel::None {
            return Err(self.no_channel(device));
        }
        ways.check(channel)?;
        self.check_way(device, channel, farewell.mode)?;
        if farewell.mode == RemoveMode::Surprise {
            self.take_memory(unit).map_err(host_limit)?;
        }
        if overtakes {
            self.hear(ways, unit, Happening::Overtaken);
        }
        let mut operation = operation("remove", id, channel);
        operation.mode = Some(farewell.mode);
        let operation = self.operations.begin(operation);
        let patience = farewell.patience.unwrap_or(PATIENCE);
        let (removal, actions) =
            Removal::begin(id, operation.operation, farewell.mode, channel, patience, Instant::now());
        self.removals.insert(unit, removal.clone());
        self.carry_out(ways, unit, Some(&removal), actions);
        self.operations.get(operation.operation)
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
        self.devices.iter().filter(move |d| d.unit == unit && d.state != MemoryState::Departed)
    }

    /// The guest has ejected unit `unit`; its firmware has already let go of it.
    pub fn ejected(&mut self, _held: &Held, ways: &Ways, unit: u32) {
        let unit = unit as usize;
        let how = "the guest evaluated _EJ0".to_owned();
        if self.removals.contains_key(&unit) {
            self.hear(ways, unit, Happening::LetGo(how));
        } else if self.devices.iter().any(|d| d.unit == unit && d.state == MemoryState::Present) {
            self.carry_out(ways, unit, None, unasked(how));
        }
    }

    /// The guest has said what it has come to with a notification of a unit's container.
    pub fn os_said(&mut self, _held: &Held, ways: &Ways, unit: u32, status: OsStatus) {
        let unit = unit as usize;
        let Some(removal) = self.removals.get(&unit).filter(|r| r.channel == Channel::Container) else {
            return;
        };
        let asked = match removal.mode {
            RemoveMode::Eject => notify::EJECT_REQUEST,
            RemoveMode::Surprise => notify::DEVICE_CHECK,
        };
        if status.event != u16::from(asked) {
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
        self.hear(ways, unit, happening);
    }

    /// Something was heard by another thread.
    pub fn heard(&mut self, _held: &Held, ways: &Ways, heard: Heard) {
        match heard {
            Heard::Removal { operation, happening } => {
                let its = |(_, removal): &(&usize, &Removal)| removal.operation == operation;
                // It may have been overtaken, or be overdue.
                if let Some((&unit, _)) = self.removals.iter().find(its) {
                    self.hear(ways, unit, happening);
                }
            }
            Heard::Inserted { operation, error } => self.end(operation, error),
        }
    }

    /// When the next removal is overdue.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.removals.values().map(|removal| removal.deadline).min()
    }

    /// Ends the removals that are overdue.
    pub fn overdue(&mut self, _held: &Held, ways: &Ways) {
        let now = Instant::now();
        let late: Vec<usize> = self
            .removals
            .iter()
            .filter(|(_, removal)| removal.deadline <= now)
            .map(|(unit, _)| *unit)
            .collect();
        for unit in late {
            self.hear(ways, unit, Happening::Overdue);
        }
    }

    /// Something is heard of the removal of what is in `unit`.
    pub(super) fn hear(&mut self, ways: &Ways, unit: usize, happening: Happening) {
        let Some(mut removal) = self.removals.remove(&unit) else { return };
        let actions = removal.on(happening);
        let ends = matches!(actions.last(), Some(Action::End(_)));
        if !ends {
            self.removals.insert(unit, removal.clone());
        }
        self.carry_out(ways, unit, Some(&removal), actions);
    }

    /// Does what a step of a removal consists of.
    pub(super) fn carry_out(
        &mut self,
        ways: &Ways,
        unit: usize,
        removal: Option<&Removal>,
        actions: Vec<Action>,
    ) {
        let ids: Vec<_> = self.of_unit(unit).map(|device| (device.id.clone(), device.channel)).collect();
        let ranges: Vec<_> = self.of_unit(unit).map(|device| device.region.range()).collect();
        for action in actions {
            match action {
                Action::Step(step, detail) => {
                    for (id, own_channel) in &ids {
                        self.events.publish(Event::Removal {
                            device: id.clone(),
                            operation: removal.map_or(0, |removal| removal.operation),
                            step,
                            mode: removal.map_or(RemoveMode::Eject, |removal| removal.mode),
                            channel: removal.map_or(*own_channel, |removal| removal.channel),
                            detail: detail.clone(),
                        });
                    }
                }
                Action::TakeMemory => {
                    if let Err(error) = self.take_memory(unit) {
                        tracing::error!(%error, unit, "memory that the guest has given back stays within reach");
                        for device in
                            self.devices.iter_mut().filter(|d| ids.iter().any(|(id, _)| *id == d.id))
                        {
                            device.state = MemoryState::Present;
                        }
                        self.end_removal(removal, Some(host_limit(error)));
                        return;
                    }
                }
                Action::TellGuest => {
                    if let Some(removal) = removal {
                        ways.tell_removal(removal, unit, ranges.clone());
                    }
                }
                Action::State(state) => {
                    for device in self.devices.iter_mut().filter(|d| ids.iter().any(|(id, _)| *id == d.id)) {
                        device.state = state;
                        device.left_by = removal.map(|removal| removal.channel);
                    }
                }
                Action::End(error) => self.end_removal(removal, error),
            }
        }
    }

    /// Whether a device can go by `channel`.
    fn check_way(&self, device: &Device, channel: Channel, mode: RemoveMode) -> Result<(), Error> {
        let id = &device.id;
        let wrong = |problem: String, remedy: &str| Err(Error::new(ErrorCode::NotSupported, problem, remedy));
        match (device.pmem.via, channel) {
            (Via::Nfit, Channel::Pcie) => {
                wrong(format!("{id} is an NVDIMM, behind no port"), "name via=container or via=agent")
            }
            (Via::E820, _) => Err(self.no_channel(device)),
            (Via::Virtio, Channel::Container | Channel::Agent) => wrong(
                format!("{id} is a virtio-pmem device, and goes through its PCI Express port"),
                "name via=pcie, or leave it out",
            ),
            (Via::Virtio, _) if mode == RemoveMode::Eject && lock(&self.pcie).kind() == SlotKind::Plain => {
                wrong(
                    format!("The slot of {id} has no button by which the guest could be asked"),
                    "pull it (surprise), or start the machine with --slots button=on",
                )
            }
            _ => Ok(()),
        }
    }

    /// Puts a unit's memory out of everybody's reach, with whatever it is reached by. No vCPU runs: nobody sees in which
    /// order.
    fn take_memory(&self, unit: usize) -> Result<(), MapError> {
        for device in self.of_unit(unit) {
            // What was asked of a card before is done.
            if let Some(card) = &device.card {
                lock(&card.0).process_queue(0, &mut Effects::new());
            }
            self.space.depart(&device.region)?;
            if device.card.is_some() {
                lock(&self.pcie).pull(&device.id);
            }
        }
        self.units.remove(unit as u32);
        Ok(())
    }

    fn end_removal(&mut self, removal: Option<&Removal>, error: Option<Error>) {
        if let Some(removal) = removal {
            self.end(removal.operation, error);
        }
    }

    fn end(&mut self, operation: u64, error: Option<Error>) {
        self.operations.finish(operation, error.clone());
        self.events.publish(Event::OperationFinished { operation, error });
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
                format!("The id {:?} is that of a {} device", pmem.id, state_name(device.state)),
                "choose another id",
            )
        };
        if let Some(device) = named.filter(|d| d.state != MemoryState::Departed) {
            return Err(in_use(device));
        }
        let window = self.place(pmem, size)?;
        let joined = self.joined_unit(pmem)?;
        let unit = joined.unwrap_or(self.windows[window].unit);
        if let Some(device) = named.filter(|d| d.window != window) {
            return Err(in_use(device));
        }
        if pmem.via == Via::Virtio && lock(&self.pcie).free_slots() == 0 {
            return Err(Error::new(
                ErrorCode::NoFreeSlot,
                "No PCI Express port is free".to_owned(),
                "declare ports when the machine starts (--slots pcie=N), or remove a device",
            ));
        }
        // A driver that the agent has unbound comes back by the agent only.
        let unbound = self.devices.iter().any(|d| d.unit == unit && d.left_by == Some(Channel::Agent));
        let channel =
            if unbound { Channel::Agent } else { pmem.channel.unwrap_or(self.default_channel(pmem.via)) };
        ways.check(channel)?;
        let operation = self.operations.begin(operation("insert", &pmem.id, channel));
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
            gpa: self.windows[window].range.start.into(),
            size,
        });
        if joined.is_some() {
            ways.tell_joined(unit);
            self.end(operation.operation, None);
        } else if ways.tell_insertion(
            operation.operation,
            channel,
            unit,
            vec![self.windows[window].range.clone()],
        ) {
            self.end(operation.operation, None);
        }
        self.operations.get(operation.operation)
    }

    /// The unit of the bus that a device names, if devices are on it: the device joins them.
    fn joined_unit(&self, pmem: &Pmem) -> Result<Option<usize>, Error> {
        let Some(bus) = &pmem.bus else { return Ok(None) };
        let there =
            |device: &&Device| device.pmem.bus.as_ref() == Some(bus) && device.state != MemoryState::Departed;
        let Some(first) = self.devices.iter().find(there) else { return Ok(None) };
        let unit = first.unit;
        if first.state == MemoryState::Leaving {
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
        match self.census_of(held, vcpus, id, range) {
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
        let departed = self.devices.iter().filter(|d| d.state == MemoryState::Departed).map(|d| d.window);
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

fn operation(kind: &str, device: &str, channel: Channel) -> Operation {
    Operation {
        operation: 0,
        kind: kind.to_owned(),
        device: device.to_owned(),
        state: OperationState::Running,
        mode: None,
        channel: Some(channel),
        error: None,
    }
}

fn host_limit(error: MapError) -> Error {
    Error::new(ErrorCode::HostLimit, chain(&error), "raise vm.max_map_count of the host")
}
