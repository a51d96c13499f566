//! A machine: builds, owns, boots and stops everything that a guest sees.
//!
//! Threads: one for each vCPU, and the caller's, which runs the main loop and alone changes the machine.
//! vCPU threads send what a device access leaves to do; the API and the command line send commands.

mod agent_port;
mod arrival;
mod bad_ram;
mod boot_errors;
mod build;
mod census;
mod commands;
mod console;
pub mod cpu;
mod departing;
mod dimm;
mod disk;
mod disk_plug;
mod dma;
mod doorbells;
mod errors;
mod firmware;
mod flush;
mod handle;
mod injection;
mod mce;
mod media;
mod memory;
mod named;
mod operations;
mod outcome;
mod pcie;
mod plan;
mod plug;
mod poison;
mod power;
mod records;
mod removal;
mod scrubs;
mod slot;
mod tell;
mod topology;
mod virtio_pmem;
mod wired;

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, Receiver};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime};

use aconite_devices::bus::{Effect, Effects, lock};
use aconite_devices::virtio::QueueHandler;
use thiserror::Error;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub use self::agent_port::AgentPort;
use self::build::Built;
pub use self::build::{BuildError, Spec, tables};
use self::console::LastWords;
pub use self::console::{ConsoleLog, ConsoleSink};
use self::cpu::{Cpu, CpuEnd, Left, Mailbox, Message};
use self::departing::Departing;
pub use self::handle::{GuestAgent, Handle};
pub use self::memory::MemoryError;
pub use self::outcome::{Cause, Exits, Outcome};
pub use self::tell::GuestUnit;
use self::tell::Ways;
use crate::command::{Event, EventBus, MachineState};
use crate::config;
use crate::fault::Progress;
use crate::kvm::{Held, Stopped};
use crate::memory::host_fault;
use crate::workers::Outbox;

/// How often firmware events that the guest has not fetched are announced again: an edge is lost while the
/// guest has the interrupt masked.
const ANNOUNCE_AGAIN: Duration = Duration::from_millis(200);

const TOKEN_WAKE: u64 = 0;
const TOKEN_AGENT: u64 = 1;

/// Why the main loop cannot run.
#[derive(Debug, Error)]
pub enum LoopError {
    /// Waiting is not possible.
    #[error("Cannot set up the main loop")]
    Setup(#[source] io::Error),
    /// A thread could not be started.
    #[error("Cannot start the threads of a device")]
    Workers(#[source] io::Error),
    /// A thread could not be started.
    #[error("Cannot start the thread of vCPU {cpu}")]
    Thread {
        /// The vCPU.
        cpu: usize,
        /// The system's answer.
        source: io::Error,
    },
}

/// What a machine says of itself beside its description.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The kernel's file.
    pub kernel: String,
    /// The kernel's release, where its image says.
    pub kernel_release: Option<String>,
    /// Where KVM comes from.
    pub host: String,
}

/// A machine that has been built.
pub struct Machine {
    built: Built,
    config: config::Machine,
    identity: Identity,
    events: EventBus,
    console_log: ConsoleLog,
    handle: Handle,
    messages: Receiver<Message>,
    mailbox: Mailbox,
    /// How the guest is told of what comes and goes.
    ways: Ways,
    agent: Option<AgentPort>,
    threads: Vec<JoinHandle<Left>>,
    /// The baton, while the machine is paused.
    paused: Option<Held>,
    state: MachineState,
    /// The guest has said that it panics, and may still be printing why.
    panic: Option<LastWords>,
}

impl Machine {
    /// Builds a machine. `agent` is the monitor's end of the agent's port.
    pub fn new(
        spec: Spec<'_>,
        identity: Identity,
        console_log: ConsoleLog,
        agent: Option<AgentPort>,
    ) -> Result<Self, MachineError> {
        let wake = Arc::new(EventFd::new(EFD_NONBLOCK).map_err(LoopError::Setup)?);
        let (sender, messages) = mpsc::channel();
        let events = spec.events.clone();
        let config = spec.config.clone();
        let built = build::build(spec)?;
        let handle = Handle::new(wake.clone(), events.clone());
        let mailbox = Mailbox::new(sender, wake);
        let ways = Ways {
            platform: built.platform.clone(),
            pcie: built.pcie.clone(),
            agent: handle.agent.clone(),
            mailbox: mailbox.clone(),
        };
        Ok(Self {
            built,
            config,
            identity,
            console_log,
            handle,
            events,
            messages,
            mailbox,
            ways,
            agent,
            threads: Vec::new(),
            paused: None,
            state: MachineState::Starting,
            panic: None,
        })
    }

    /// The way into the main loop.
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// The firmware tables.
    pub fn tables(&self) -> &aconite_acpi::Tables {
        &self.built.tables
    }

    /// Runs the guest until it ends or is ended.
    pub fn run(mut self) -> Result<Outcome, LoopError> {
        let start = Instant::now();
        let epoll = Epoll::new().map_err(LoopError::Setup)?;
        let watch = |fd, events, token| {
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events, token)).map_err(LoopError::Setup)
        };
        watch(self.handle.wake.as_raw_fd(), EventSet::IN, TOKEN_WAKE)?;
        if let Some(agent) = &self.agent {
            let both = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
            watch(agent.stream().as_raw_fd(), both, TOKEN_AGENT)?;
        }
        let _told = host_fault::tell(self.handle.wake.as_raw_fd());
        let mailbox = self.mailbox.clone();
        let send = Outbox::new(move |effects| mailbox.again_all(effects));
        self.built.disks.start(send.clone()).map_err(LoopError::Workers)?;
        self.built.memory.start(send).map_err(LoopError::Workers)?;
        self.start_vcpus()?;
        self.state = MachineState::Running;
        self.events.publish(Event::MachineStarted { vcpus: self.config.cpus });
        let records = self.built.boot_errors.shown();
        if records > 0 {
            self.events.publish(Event::BootErrorsShown { records });
            self.built.boot_errors.forget();
        }

        let mut ready = [EpollEvent::default(); 4];
        let cause = loop {
            let pending = lock(&self.built.platform).pending() > 0;
            let timeout = match &self.panic {
                Some(_) => LastWords::LOOK.as_millis() as i32,
                None if pending => ANNOUNCE_AGAIN.as_millis() as i32,
                None => self.until_deadline(),
            };
            match epoll.wait(timeout, &mut ready) {
                Ok(0) => lock(&self.built.platform).retrigger(),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(LoopError::Setup(error)),
            }
            // Nothing waits on this descriptor but the loop itself: an empty one is no error.
            let _ = self.handle.wake.read();
            if let Some(cause) = self.turn() {
                break cause;
            }
            if self.panic.as_mut().is_some_and(|words| words.are_said(&self.console_log)) {
                break Cause::Panic;
            }
        };
        Ok(self.stop(cause, start.elapsed()))
    }

    /// When a removal is overdue. A guest that is paused can do nothing about it.
    fn removal_deadline(&mut self) -> Option<Instant> {
        let deadlines = [self.built.memory.next_deadline(), self.built.disks.next_deadline()];
        deadlines.into_iter().flatten().min().filter(|_| self.state == MachineState::Running)
    }

    /// Milliseconds until a removal is overdue or a scrub stops, -1 if there is neither.
    fn until_deadline(&mut self) -> i32 {
        let deadline = self.removal_deadline().into_iter().chain(self.built.memory.next_scrub_end()).min();
        deadline.map_or(-1, |deadline| {
            let left = deadline.saturating_duration_since(Instant::now());
            i32::try_from(left.as_millis() + 1).unwrap_or(i32::MAX)
        })
    }

    fn start_vcpus(&mut self) -> Result<(), LoopError> {
        for (index, (vcpu, mca)) in self.built.vcpus.drain(..).enumerate() {
            let cpu = Cpu {
                vcpu,
                mca,
                baton: self.built.baton.clone(),
                ports: self.built.ports.clone(),
                mmio: self.built.mmio.clone(),
                injector: self.built.traps.injector.clone(),
                traps: self.built.traps.clone(),
                progress: Progress::default(),
                mailbox: self.mailbox.clone(),
            };
            let thread = thread::Builder::new()
                .name(format!("vcpu{index}"))
                .spawn(move || cpu.run())
                .map_err(|source| LoopError::Thread { cpu: index, source })?;
            self.threads.push(thread);
        }
        Ok(())
    }

    /// Does what is there to do; the cause if the machine is to end.
    fn turn(&mut self) -> Option<Cause> {
        if host_fault::pending() {
            self.stopped(|built, _, held| built.traps.serve_host_faults(held));
        }
        let mut cause = None;
        let mut effects = Effects::new();
        self.built.memory.announce_scrubs(&self.built.platform);
        if self.removal_deadline().is_some_and(|deadline| deadline <= Instant::now()) {
            self.stopped(|built, ways, _| {
                built.memory.overdue(ways);
                built.disks.overdue(ways);
            });
        }
        while let Ok(message) = self.messages.try_recv() {
            match message {
                Message::Effect(effect) => cause = cause.or(self.apply(effect, &mut effects)),
                Message::Heard(heard) => {
                    self.stopped(|built, ways, held| built.memory.heard(held, ways, heard))
                }
                Message::Pause(paused) => {
                    self.pause();
                    // The vCPU may have ended meanwhile.
                    let _ = paused.send(());
                }
                Message::Ended { cpu, end } => cause = cause.or(Some(self.cpu_ended(cpu, end))),
            }
        }
        if let Some(agent) = &mut self.agent {
            agent.pump(&self.built.console, &mut effects);
        }
        self.mailbox.again_all(effects);
        loop {
            let (next, stop) = {
                let mut requests = self.handle.requests();
                (requests.commands.pop_front(), requests.stop.take())
            };
            cause = cause.or(stop);
            let Some((command, reply)) = next else { break };
            let end = self.end_by(&command);
            // Whoever asked may have gone.
            let _ = reply.send(self.execute(command));
            cause = cause.or(end);
        }
        cause
    }

    fn apply(&mut self, effect: Effect, effects: &mut Effects) -> Option<Cause> {
        match effect {
            Effect::PowerOff => Some(Cause::PowerOff),
            // A kernel that panics without its driver for pvpanic resets the machine at once.
            Effect::Reset if self.panic.is_some() || self.console_log.panicked() => Some(Cause::Panic),
            Effect::Reset => Some(Cause::Reset),
            Effect::Panicked => {
                self.panic.get_or_insert_with(|| LastWords::new(&self.console_log));
                None
            }
            Effect::CrashLoaded => {
                self.events.publish(Event::CrashLoaded);
                None
            }
            Effect::QueueNotify { device: wired::CONSOLE, queue } => {
                lock(&self.built.console).process_queue(queue, effects);
                None
            }
            Effect::QueueNotify { device, queue } => {
                // What a card that has gone was asked for last is nobody's.
                let queues = lock(&self.built.pcie).queues(device);
                if let Some(queues) = queues {
                    lock(&*queues).process_queue(queue, effects);
                }
                None
            }
            Effect::Slot { port, change } => {
                self.stopped(|built, ways, held| built.slot_changed(held, ways, port, change));
                None
            }
            Effect::Notify(event) => {
                self.built.memory.announce(&self.built.platform, event);
                None
            }
            Effect::ScrubStarted { unit } => {
                self.built.memory.scrub_started(unit);
                None
            }
            Effect::FirmwareFault { unit, callee, function, status } => {
                self.built.memory.firmware_failed(unit, callee, function, status);
                None
            }
            Effect::Stall { time } => {
                tracing::warn!(?time, "a stall of no processor");
                None
            }
            Effect::ErrorSources => {
                self.built.errors.proceed();
                None
            }
            Effect::Ejected(target) => {
                self.stopped(|built, ways, held| built.memory.ejected(held, ways, target));
                None
            }
            Effect::OsStatus { target, status } => {
                self.stopped(|built, ways, held| built.memory.os_said(held, ways, target, status));
                None
            }
            Effect::InjectError(injection) => {
                self.stopped(|built, _, held| built.injections.inject(held, &built.memory, injection));
                None
            }
            Effect::TriggerError(injection) => {
                self.built.injections.trigger(&self.built.memory, injection);
                None
            }
        }
    }

    /// Does what the guest has asked for and no vCPU may see half done; nothing if the machine stops.
    fn stopped(&mut self, work: impl FnOnce(&mut Built, &Ways, &Held)) {
        // A paused machine holds the baton already.
        match self.paused.take().map_or_else(|| self.built.baton.take(), Ok) {
            Ok(held) => {
                work(&mut self.built, &self.ways, &held);
                self.paused = Some(held).filter(|_| self.state == MachineState::Paused);
            }
            Err(Stopped) => tracing::debug!("what the guest asked for came as the machine stopped"),
        }
    }

    /// Pauses the machine if it runs.
    fn pause(&mut self) {
        if self.state == MachineState::Running
            && let Ok(held) = self.built.baton.take()
        {
            self.paused = Some(held);
            self.state = MachineState::Paused;
            self.publish(Event::Paused);
        }
    }

    fn cpu_ended(&self, cpu: u32, end: CpuEnd) -> Cause {
        match end {
            CpuEnd::TripleFault | CpuEnd::MachineCheck(_)
                if self.panic.is_some() || self.console_log.panicked() =>
            {
                Cause::Panic
            }
            CpuEnd::TripleFault => Cause::TripleFault { vcpu: cpu },
            CpuEnd::MachineCheck(why) => Cause::Shutdown { vcpu: cpu, why: why.to_string() },
            CpuEnd::InternalError { suberror, rip } => Cause::Failed(format!(
                "KVM could not emulate an instruction of vCPU {cpu} at {rip:#x} (KVM_EXIT_INTERNAL_ERROR, suberror {suberror})"
            )),
            CpuEnd::Unexpected(exit) => {
                Cause::Failed(format!("vCPU {cpu} stopped with an unexpected exit: {exit:?}"))
            }
            CpuEnd::Trap(error) => Cause::Failed(chain(&error)),
            CpuEnd::Run(error) => Cause::Failed(chain(&error)),
        }
    }

    fn publish(&self, event: Event) {
        self.events.publish(event);
    }

    /// Stops everything and sums up.
    fn stop(mut self, cause: Cause, ran: Duration) -> Outcome {
        self.built.baton.stop();
        let (mut left, mut vcpus) = (Vec::new(), Vec::new());
        for thread in self.threads.drain(..) {
            match thread.join() {
                Ok(Left { vcpu, mca, report }) => {
                    left.push((vcpu, mca));
                    vcpus.extend(report);
                }
                Err(_) => tracing::error!("a vCPU thread panicked"),
            }
        }
        self.built.disks.stop();
        self.built.memory.stop();
        if cause != Cause::PowerOff {
            self.built.boot_errors.keep_machine_checks(&left, SystemTime::now());
        }
        self.state = MachineState::Stopped;
        self.paused = None;
        match &cause {
            Cause::PowerOff => self.publish(Event::PoweredOff),
            Cause::Reset => self.publish(Event::Reset { cause: "guest".to_owned() }),
            Cause::Shutdown { .. } => self.publish(Event::Reset { cause: "machine_check".to_owned() }),
            Cause::TripleFault { .. } => {
                self.publish(Event::Reset { cause: "triple_fault".to_owned() });
            }
            Cause::Panic => self.publish(Event::GuestPanicked),
            _ => {}
        }
        if !cause.is_power_cut() {
            self.built.memory.power_off();
        }
        for region in self.built.traps.space.regions() {
            if let Err(error) = region.flush() {
                tracing::error!(%error, device = region.name(), "data could not be written back");
            }
        }
        self.events.publish(Event::MachineStopped { cause: cause.to_string() });
        let mut requests = self.handle.requests();
        requests.closed = true;
        // Dropping the senders tells those who wait that the machine is gone.
        requests.commands.clear();
        drop(requests);
        let counts = &self.built.counts;
        Outcome {
            cause,
            ran,
            memory: self.built.memory.list(),
            exits: Exits {
                io: counts.io.load(Ordering::Relaxed),
                mmio: counts.mmio.load(Ordering::Relaxed),
                msr: counts.msr.load(Ordering::Relaxed),
                fault: counts.fault.load(Ordering::Relaxed),
                step: counts.step.load(Ordering::Relaxed),
                other: counts.other.load(Ordering::Relaxed),
            },
            console_bytes: self.console_log.bytes(),
            vcpus,
        }
    }
}

/// Why there is no machine.
#[derive(Debug, Error)]
pub enum MachineError {
    /// It could not be built.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// It could not run.
    #[error(transparent)]
    Loop(#[from] LoopError),
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(next) = source {
        text.push_str(": ");
        text.push_str(&next.to_string());
        source = next.source();
    }
    text
}
