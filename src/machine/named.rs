//! Devices by their ids, of which each device of a machine has one of its own, whatever it is.

use super::build::Built;
use super::departing::Farewell;
use super::tell::Ways;
use crate::command::{Error, ErrorCode, Operation};
use crate::config;
use crate::kvm::Held;

impl Built {
    /// Takes a device away, whatever it is.
    pub fn remove(
        &mut self,
        held: &Held,
        ways: &Ways,
        id: &str,
        farewell: Farewell,
    ) -> Result<Operation, Error> {
        if self.disks.has(id) {
            return self.disks.remove(held, ways, id, farewell);
        }
        if self.memory.names().all(|name| name != id) {
            let known: Vec<_> = self.memory.names().chain(self.disks.names()).collect();
            return Err(Error::no_such_device(id, &known));
        }
        self.memory.remove(held, ways, id, farewell)
    }

    /// Puts a memory device into a free slot.
    pub fn insert(&mut self, held: &Held, ways: &Ways, pmem: &config::Pmem) -> Result<Operation, Error> {
        let mut pmem = pmem.clone();
        if pmem.id.is_empty() {
            pmem.id = self.memory.free_id();
        }
        config::validate_insert(&pmem, &[])?;
        refuse_id(&pmem.id, self.disks.names())?;
        let (checked, _) = pmem.check_host()?;
        self.memory.insert(held, ways, &self.views, &pmem, checked)
    }

    /// Puts a disk into a free slot.
    pub fn insert_disk(&mut self, disk: &config::Disk) -> Result<Operation, Error> {
        let mut disk = disk.clone();
        if disk.id.is_empty() {
            disk.id = self.disks.free_id();
        }
        disk.validate_insert()?;
        refuse_id(&disk.id, self.disks.names().chain(self.memory.names()))?;
        let checked = disk.check_host()?;
        self.disks.insert(&disk, checked)
    }
}

fn refuse_id<'a>(id: &str, mut names: impl Iterator<Item = &'a str>) -> Result<(), Error> {
    if names.all(|name| name != id) {
        return Ok(());
    }
    let message = format!("The id {id:?} is that of another device");
    Err(Error::new(ErrorCode::IdInUse, message, "choose another id"))
}
