//! What a vCPU thread does: run, serve the exit, run again.

use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use aconite_devices::bus::{Bus, Effect, Effects};
use vmm_sys_util::eventfd::EventFd;

use super::tell::Heard;
use crate::fault::{Injector, Progress, TrapError, Traps, Turn};
use crate::kvm::{Baton, CpuReport, Kick, RunError, Stopped, Vcpu, VcpuExitKind};
use crate::memory::host_fault;
use crate::x86::mca::{McaState, ShutdownCause};

/// A pause that the guest's watchdogs could notice.
const NOTICED_PAUSE: Duration = Duration::from_secs(1);

/// How often a thread that waits for the main loop looks whether the machine is ending.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// What a vCPU thread tells the main loop.
#[derive(Debug)]
pub enum Message {
    /// A device access left something to do.
    Effect(Effect),
    /// Something was heard of the guest.
    Heard(Heard),
    /// The machine is to be paused; the vCPU waits for the answer that it is.
    Pause(Sender<()>),
    /// The vCPU cannot go on; the machine stops.
    Ended {
        /// The vCPU.
        cpu: u32,
        /// Why.
        end: CpuEnd,
    },
}

/// Why a vCPU cannot go on.
#[derive(Debug)]
pub enum CpuEnd {
    /// A triple fault.
    TripleFault,
    /// A machine check that it could not take.
    MachineCheck(ShutdownCause),
    /// KVM's emulator met something it does not know.
    InternalError {
        /// KVM_INTERNAL_ERROR_*.
        suberror: u32,
        /// Where.
        rip: u64,
    },
    /// An exit without meaning here.
    Unexpected(VcpuExitKind),
    /// A trap without progress or an error in serving it.
    Trap(TrapError),
    /// KVM_RUN failed.
    Run(RunError),
}

/// The way from vCPU threads to the main loop.
#[derive(Clone, Debug)]
pub struct Mailbox {
    sender: Sender<Message>,
    wake: Arc<EventFd>,
}

impl Mailbox {
    /// Messages go to `sender`; `wake` is written after each.
    pub fn new(sender: Sender<Message>, wake: Arc<EventFd>) -> Self {
        Self { sender, wake }
    }

    /// An effect that comes up in the main loop itself is applied in its next turn.
    pub fn again(&self, effect: Effect) {
        self.send(Message::Effect(effect));
    }

    /// All effects that came up elsewhere than in a vCPU.
    pub fn again_all(&self, effects: Effects) {
        for effect in effects {
            self.again(effect);
        }
    }

    /// Sends a message.
    pub fn send(&self, message: Message) {
        if self.sender.send(message).is_ok()
            && let Err(error) = self.wake.write(1)
        {
            tracing::error!(%error, "the main loop was not woken");
        }
    }
}

/// What is left of a vCPU when its thread ends.
#[derive(Debug)]
pub struct Left {
    /// Its number.
    pub vcpu: u32,
    /// Its machine-check registers.
    pub mca: McaState,
    /// What it was doing, if KVM says.
    pub report: Option<CpuReport>,
}

/// One vCPU with all it needs.
pub struct Cpu {
    /// The vCPU.
    pub vcpu: Vcpu,
    /// Its machine-check registers.
    pub mca: McaState,
    /// The baton of the machine.
    pub baton: Arc<Baton>,
    /// Devices behind ports.
    pub ports: Arc<Bus>,
    /// Devices in memory.
    pub mmio: Arc<Bus>,
    /// What waits for this vCPU.
    pub injector: Injector,
    /// Who serves accesses to guarded memory.
    pub traps: Arc<Traps>,
    /// How traps go on.
    pub progress: Progress,
    /// The main loop.
    pub mailbox: Mailbox,
}

impl Cpu {
    /// Runs until the machine stops.
    pub fn run(mut self) -> Left {
        let id = self.vcpu.id() as usize;
        match self.vcpu.on_this_thread() {
            Ok(kick) => self.baton.set_kick(id, Some(kick)),
            Err(error) => {
                let end = CpuEnd::Run(RunError::Thread { cpu: self.vcpu.id(), source: error });
                self.end(end);
                return Left { vcpu: self.vcpu.id(), mca: self.mca, report: None };
            }
        }
        while let Ok(waited) = self.baton.enter(id) {
            if host_fault::pending() {
                self.baton.leave(id);
                let Ok(held) = self.baton.take() else { break };
                self.traps.serve_host_faults(&held);
                continue;
            }
            if waited >= NOTICED_PAUSE {
                self.vcpu.was_paused();
            }
            let exit = self.go(id);
            self.baton.leave(id);
            let end = match exit {
                Ok(exit) => self.serve(exit),
                Err(error) => Some(CpuEnd::Run(error)),
            };
            if let Some(end) = end {
                self.end(end);
                break;
            }
        }
        self.baton.set_kick(id, None);
        Kick::forget_this_thread();
        let report = CpuReport::of(&self.vcpu)
            .inspect_err(|error| tracing::debug!(%error, vcpu = id, "nothing is known of its end"));
        Left { vcpu: self.vcpu.id(), mca: self.mca, report: report.ok() }
    }

    /// Runs the guest; before that, delivers what waits for this vCPU at the next boundary of instructions.
    fn go(&mut self, id: usize) -> Result<VcpuExitKind, RunError> {
        while self.injector.waiting(self.vcpu.id()) {
            if self.vcpu.unfinished() {
                return self.vcpu.finish();
            }
            self.baton.leave(id);
            let on_stack = || self.traps.on_machine_check_stack(&self.vcpu);
            let turn = self.injector.deliver_waiting(&self.vcpu, &mut self.mca, on_stack)?;
            if turn == Turn::Shutdown {
                return Ok(VcpuExitKind::Shutdown);
            }
            if self.baton.enter(id).is_err() {
                return Ok(VcpuExitKind::Interrupted);
            }
            if turn == Turn::Later {
                break;
            }
        }
        self.vcpu.run()
    }

    fn end(&self, end: CpuEnd) {
        self.baton.stop();
        self.mailbox.send(Message::Ended { cpu: self.vcpu.id(), end });
    }

    /// Pauses the machine if an access was to do so, and returns when it is paused.
    fn pause_if_asked(&self) {
        if !self.traps.stale.take_pause(self.vcpu.id()) {
            return;
        }
        let (sender, receiver) = mpsc::channel();
        self.mailbox.send(Message::Pause(sender));
        // The main loop may be waiting for this thread to end.
        while !self.baton.stopping() && receiver.recv_timeout(LOOK_AGAIN) == Err(RecvTimeoutError::Timeout) {}
    }

    /// Serves a trap, and the exits of the instruction that it lets through.
    fn trap(&mut self, wanted: Option<u64>) -> Option<CpuEnd> {
        let mut served = self.traps.serve(&mut self.vcpu, &mut self.mca, &mut self.progress, wanted);
        loop {
            match served {
                Ok(None) | Err(TrapError::Stopped(Stopped)) => return None,
                Ok(Some(exit)) => {
                    let end = self.serve(exit);
                    if end.is_some() || !self.progress.unfinished() {
                        return end;
                    }
                }
                Err(error) => return Some(CpuEnd::Trap(error)),
            }
            served = self.traps.finish(&mut self.vcpu, &mut self.progress);
        }
    }

    fn serve(&mut self, exit: VcpuExitKind) -> Option<CpuEnd> {
        let mut effects = Effects::new();
        match exit {
            VcpuExitKind::Io { port, size, write } => {
                let ports = self.ports.clone();
                for data in self.vcpu.io_data().chunks_mut(size.max(1)) {
                    if write {
                        ports.write(u64::from(port), data, &mut effects);
                    } else {
                        ports.read(u64::from(port), data);
                    }
                }
            }
            VcpuExitKind::Mmio { gpa, write } if self.traps.holds(gpa) => {
                let Self { vcpu, mca, progress, .. } = self;
                return match self.traps.serve_emulated(vcpu, mca, progress, gpa, write) {
                    Ok(None) | Err(TrapError::Stopped(Stopped)) => None,
                    Ok(Some(exit)) => self.serve(exit),
                    Err(error) => Some(CpuEnd::Trap(error)),
                };
            }
            VcpuExitKind::Mmio { gpa, write } => {
                let mmio = self.mmio.clone();
                let data = self.vcpu.mmio_data();
                if write {
                    mmio.write(gpa, data, &mut effects);
                } else {
                    mmio.read(gpa, data);
                }
            }
            VcpuExitKind::ReadMsr { index } => {
                let value = self.mca.rdmsr(index).ok();
                self.vcpu.finish_msr(value);
            }
            VcpuExitKind::WriteMsr { index, value } => {
                let done = self.mca.wrmsr(index, value);
                self.vcpu.finish_msr(done.ok().map(|()| 0));
            }
            VcpuExitKind::Fault { gpa } => {
                let end = self.trap(gpa);
                self.pause_if_asked();
                return end;
            }
            VcpuExitKind::Interrupted | VcpuExitKind::Debug | VcpuExitKind::Halt => {}
            VcpuExitKind::Shutdown => {
                return Some(self.mca.shut_down().map_or(CpuEnd::TripleFault, CpuEnd::MachineCheck));
            }
            VcpuExitKind::InternalError { suberror } => {
                let rip = self.vcpu.regs().map_or(0, |regs| regs.rip);
                return Some(CpuEnd::InternalError { suberror, rip });
            }
            exit => return Some(CpuEnd::Unexpected(exit)),
        }
        for effect in effects {
            if matches!(effect, Effect::PowerOff | Effect::Reset) {
                self.baton.stop();
            }
            match effect {
                Effect::Stall { time } => self.stand_still(time),
                effect => self.mailbox.send(Message::Effect(effect)),
            }
        }
        None
    }

    /// Does not run the guest for a time, as if firmware had the processor.
    fn stand_still(&self, time: Duration) {
        let start = Instant::now();
        while !self.baton.stopping() {
            let left = time.saturating_sub(start.elapsed());
            if left.is_zero() {
                break;
            }
            thread::sleep(left.min(LOOK_AGAIN));
        }
    }
}
