//! What a machine answers to each command.

use aconite_devices::bus::{Effects, lock};

use super::departing::Farewell;
use super::handle::no_agent;
use super::pcie::At;
use super::{Cause, Machine, mce};
use crate::command::{
    Command, Error, Event, MachineInfo, MachineState, MceQueued, MceRequest, PoisonPlace, Reply,
};
use crate::host::usage::Usage;
use crate::kvm::{Held, Stopped};

impl Machine {
    /// The cause for which a command ends the machine.
    pub(super) fn end_by(&self, command: &Command) -> Option<Cause> {
        match command {
            Command::Quit => Some(Cause::Quit),
            Command::PowerCut(cut) => {
                let cause = if cut.again { Cause::PowerCycle } else { Cause::PowerCut };
                command.allowed_in(self.state).ok().map(|()| cause)
            }
            _ => None,
        }
    }

    /// Carries a command out.
    pub(super) fn execute(&mut self, command: Command) -> Result<Reply, Error> {
        command.allowed_in(self.state)?;
        if let Some(reply) = self.answer(&command) {
            return reply;
        }
        // A paused machine holds the baton already.
        let paused = self.paused.take();
        let held = match paused {
            Some(held) => held,
            None => self.built.baton.take().map_err(|Stopped| Error::machine_gone())?,
        };
        let reply = self.change(&held, command);
        match self.state {
            MachineState::Paused => self.paused = Some(held),
            _ => drop(held),
        }
        reply
    }

    /// What the machine is, and what is free in it.
    fn info(&self) -> MachineInfo {
        let [free_ports, free_bridges] = {
            let pcie = lock(&self.built.pcie);
            [At::Port, At::HostBridge].map(|at| pcie.free_places(at) as u32)
        };
        MachineInfo {
            state: self.state,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            kernel: self.identity.kernel.clone(),
            kernel_version: self.identity.kernel_release.clone(),
            vcpus: self.config.cpus,
            memory: self.config.memory.bytes(),
            memory_poisoned: self.built.memory.poisoned_ram(),
            host: self.identity.host.clone(),
            agent: self.agent.is_some(),
            free_slots: self.built.memory.free_windows() as u32,
            free_ports,
            free_bridges,
            monitor: Usage::now(),
            uptime_ns: self.events.elapsed_ns(),
        }
    }

    /// Commands that leave the vCPUs running.
    fn answer(&self, command: &Command) -> Option<Result<Reply, Error>> {
        let memory = &self.built.memory;
        Some(match command {
            Command::MachineInfo => Ok(Reply::Machine(self.info())),
            Command::ListMemory => Ok(Reply::MemoryList(memory.list())),
            Command::ShowMemory { device } => memory.show(device).map(Reply::Memory),
            Command::PoisonList { device, from, limit } => {
                memory.poison_list(device, *from, *limit).map(Reply::PoisonList)
            }
            Command::PoisonPolicy { device, change } => {
                memory.poison_policy(device, *change).map(Reply::PoisonPolicy)
            }
            Command::Stale { device, answer } => memory.stale(device, *answer).map(Reply::Stale),
            Command::Firmware { device, change } => memory.firmware(device, change).map(Reply::Firmware),
            Command::Notify { device, kind } => {
                memory.notify(&self.built.platform, device, *kind).map(|()| Reply::Done)
            }
            Command::RaiseMce { vcpu, request } => self.raise_mce(*vcpu, request),
            Command::Cper { request } => self.built.errors.submit(request).map(Reply::Cper),
            Command::Disk(command) => {
                let mut effects = Effects::new();
                let reply = self.built.disks.execute(command, &mut effects).map(Reply::Disk);
                self.mailbox.again_all(effects);
                reply
            }
            Command::Flush { device, change } => {
                let mut effects = Effects::new();
                let reply = memory.flushes(device, change, &mut effects).map(Reply::Flush);
                self.mailbox.again_all(effects);
                reply
            }
            Command::ShowOperation { operation } => {
                self.built.operations.get(*operation).map(Reply::Operation)
            }
            Command::Quit => Ok(Reply::Done),
            Command::PoisonAdd { .. }
            | Command::PoisonPlace { .. }
            | Command::PoisonClear { .. }
            | Command::Remove { .. }
            | Command::Insert { .. }
            | Command::InsertDisk { .. }
            | Command::Census { .. }
            | Command::PowerCut(_)
            | Command::Pause
            | Command::Resume => return None,
        })
    }

    /// Commands for which no vCPU may run.
    fn change(&mut self, held: &Held, command: Command) -> Result<Reply, Error> {
        let memory = &mut self.built.memory;
        match command {
            Command::PoisonAdd { device, what } => memory.poison(held, &device, what).map(Reply::PoisonAdded),
            Command::PoisonPlace { place: PoisonPlace::Addresses(addresses) } => {
                memory.poison_addresses(held, &addresses).map(Reply::PoisonPlaced)
            }
            Command::PoisonPlace { place: PoisonPlace::Process(_) } => Err(no_agent()),
            Command::PoisonClear { device, ranges } => {
                memory.poison_clear(held, &device, ranges.as_deref()).map(Reply::PoisonCleared)
            }
            Command::Remove { device, mode, via, timeout } => {
                let farewell = Farewell { mode, via, patience: timeout.map(|timeout| timeout.0) };
                self.built.remove(held, &self.ways, &device, farewell).map(Reply::Operation)
            }
            Command::Insert { pmem } => self.built.insert(held, &self.ways, &pmem).map(Reply::Operation),
            Command::InsertDisk { disk } => self.built.insert_disk(&disk).map(Reply::Operation),
            Command::Census { device } => {
                memory.census(held, &self.built.views, &device).map(|census| Reply::Census(Box::new(census)))
            }
            Command::PowerCut(cut) => {
                // No vCPU runs any more.
                self.state = MachineState::Paused;
                memory.cut(held, cut).map(Reply::PowerLoss)
            }
            Command::Pause => {
                self.state = MachineState::Paused;
                self.publish(Event::Paused);
                Ok(Reply::Done)
            }
            Command::Resume => {
                self.state = MachineState::Running;
                self.publish(Event::Resumed);
                Ok(Reply::Done)
            }
            other => self.answer(&other).unwrap_or_else(|| Err(Error::machine_gone())),
        }
    }

    /// Puts a machine check before a vCPU, which takes it when it runs next.
    fn raise_mce(&self, vcpu: u32, request: &MceRequest) -> Result<Reply, Error> {
        let traps = &self.built.traps;
        let injection = mce::injection(request, traps.injector.config(), traps.physical_bits)?;
        let vcpu = traps.injector.raise(Some(vcpu), injection).map_err(mce::refused)?;
        Ok(Reply::MceQueued(MceQueued { vcpu }))
    }
}
