//! Disks go and come: what a removal consists of for a disk, and into which slot an arrival goes.
//!
//! A disk that was pulled does no DMA. What the guest waits for at that moment, held or being performed, is told of
//! request by request (`disk_released`, how `depart`); it never ends, and nothing of it lands anywhere. A guest that is
//! asked lets go when all its requests have ended: one that is held holds the removal.

use std::collections::BTreeMap;

use aconite_devices::bus::lock;

use super::chain;
use super::departing::{Departing, Farewell};
use super::disk::{DiskError, Disks};
use super::operations::Operations;
use super::pcie::{At, CardKind};
use super::removal::Removal;
use super::tell::Ways;
use crate::command::{DeviceState, Error, ErrorCode, Event, EventBus, Operation, RemovalStep, RemoveMode};
use crate::config::{self, Channel, CheckedPmem};
use crate::kvm::Held;
use crate::memory::backing::BackingError;

impl Disks {
    /// Begins to take a disk away.
    pub fn remove(
        &mut self,
        _held: &Held,
        ways: &Ways,
        id: &str,
        farewell: Farewell,
    ) -> Result<Operation, Error> {
        let state = self.find(id)?.state;
        let key = id.to_owned();
        if state != DeviceState::Present && !self.overtakes(&key, farewell.mode) {
            return Err(Error::new(
                ErrorCode::WrongDeviceState,
                format!("{id} is {}", state.name()),
                "wait for the end of the operation that takes it away",
            ));
        }
        if let Some(channel) = farewell.via.filter(|channel| *channel != Channel::Pcie) {
            return Err(Error::new(
                ErrorCode::NotSupported,
                format!("{id} is a disk, and goes through its PCI Express port, not by {}", channel.name()),
                "name via=pcie, or leave it out",
            ));
        }
        lock(&self.around.pcie).check_button(id, farewell.mode)?;
        self.begin(ways, &key, id, Channel::Pcie, farewell)
    }

    /// Puts a disk into a free slot, or into that of a disk that has departed.
    pub fn insert(&mut self, disk: &config::Disk, checked: CheckedPmem) -> Result<Operation, Error> {
        let place = self.place(disk)?;
        let operation = self.around.operations.begin(Operation::new("insert", &disk.id, Channel::Pcie));
        let number = operation.operation;
        if let Err(error) = self.add(disk, checked, place) {
            let code = match &error {
                DiskError::Backing(BackingError::InUse { .. }) => ErrorCode::FileInUse,
                _ => ErrorCode::HostLimit,
            };
            let error = Error::new(code, chain(&error), "see the host's limits and the file's permissions");
            self.around.operations.finish(number, Some(error.clone()));
            return Err(error);
        }
        if let Some(before) = &disk.at {
            self.around.events.publish(Event::Removal {
                device: before.clone(),
                operation: number,
                step: RemovalStep::Replaced,
                mode: RemoveMode::Surprise,
                channel: Channel::Pcie,
                detail: Some(format!("by {}", disk.id)),
            });
        }
        self.around.events.publish(Event::Inserted {
            device: disk.id.clone(),
            operation: number,
            gpa: None,
            size: checked.size.bytes(),
        });
        self.around.operations.end(&self.around.events, number, None);
        self.around.operations.get(number)
    }

    /// The place of the slot that a disk names; none if any will do.
    fn place(&self, disk: &config::Disk) -> Result<Option<usize>, Error> {
        let pcie = lock(&self.around.pcie);
        let Some(at) = &disk.at else {
            return pcie.check_free(At::Port).map(|()| None);
        };
        let place = pcie.place_of(CardKind::Disk, at).ok_or_else(|| {
            Error::new(
                ErrorCode::NoSuchDevice,
                format!("{at:?} is no disk that was the last one in its slot"),
                "name another disk that has departed, or leave at= out",
            )
        })?;
        if pcie.free(place) {
            return Ok(Some(place));
        }
        Err(match self.has(at) {
            true => Error::new(ErrorCode::AddressInUse, format!("{at} is in its slot"), "remove it first"),
            false => Error::new(
                ErrorCode::AddressInUse,
                format!("The guest has not let go of {at}: its slot takes no other card"),
                "leave at= out, or see the guest's kernel log for what it waits for",
            ),
        })
    }

    /// The first of d0, d1, … that no disk has.
    pub fn free_id(&self) -> String {
        (0..=self.list.len()).map(|n| format!("d{n}")).find(|id| !self.has(id)).unwrap_or_default()
    }
}

impl Departing for Disks {
    /// A disk's id.
    type Key = String;

    fn removals(&mut self) -> &mut BTreeMap<String, Removal> {
        &mut self.removals
    }

    fn operations(&self) -> &Operations {
        &self.around.operations
    }

    fn events(&self) -> &EventBus {
        &self.around.events
    }

    fn members(&self, id: &String) -> Vec<String> {
        if self.has(id) { vec![id.clone()] } else { Vec::new() }
    }

    fn take(&mut self, id: &String) -> Result<(), Error> {
        if let Some(disk) = self.list.iter().find(|disk| disk.config.id == *id) {
            // Before the link goes down, which resets what is behind it.
            disk.depart();
            lock(&self.around.pcie).pull(id);
        }
        Ok(())
    }

    fn tell(&self, ways: &Ways, _id: &String, removal: &Removal) {
        ways.tell_card_removal(removal);
    }

    fn note(&mut self, members: &[String], state: DeviceState, _by: Option<Channel>) {
        if state == DeviceState::Departed {
            self.list.retain(|disk| !members.contains(&disk.config.id));
        }
        for disk in self.list.iter_mut().filter(|disk| members.contains(&disk.config.id)) {
            disk.state = state;
        }
    }
}
