//! One instruction let through a guard, with nothing of it shown to the guest.
//!
//! The pages that the instruction needs are open only while it runs, and every other vCPU stands still meanwhile. If it
//! may raise an exception, the gates of the interrupt descriptor table are out of reach: what it raises is then held
//! by KVM as an event in flight, and is delivered when the step is over and its trap flag gone.

use std::sync::Arc;

use kvm_bindings::kvm_debugregs;
use vm_memory::{Bytes, VolatileMemory};

use super::TrapError;
use super::touch::{Pages, Touch, event_in_flight};
use crate::kvm::{KvmError, RunError, StopAt, Vcpu, VcpuExitKind};
use crate::memory::{AddressSpace, MapError, Region};
use crate::x86::bulk::RFLAGS_RF;
use crate::x86::step::StepPlan;

/// RFLAGS.TF: the guest steps itself.
pub(super) const RFLAGS_TF: u64 = 1 << 8;
/// DR7: the enabling bits of the four breakpoints.
pub(super) const DR7_ENABLED: u64 = 0xff;
/// The debug exception.
const DB_VECTOR: u8 = 1;

/// How a step ended.
pub(super) enum Stepped {
    /// The instruction, or one iteration of it, is done, or the event has reached its handler.
    Done,
    /// The instruction raised an exception, which KVM delivers next.
    Raised,
    /// Nothing happened.
    Stuck,
    /// The vCPU ended in an exit that has no answer.
    Ended(VcpuExitKind),
    /// The instruction waits for the answer to an exit; [`Step::finish`] follows.
    Asks(VcpuExitKind, Box<Step>),
}

/// A step that is under way.
#[derive(Debug)]
pub(super) struct Step {
    plan: StepPlan,
    rip: u64,
    /// TF and RF as the guest had them.
    own_flags: u64,
    delivering: bool,
    /// The instruction is about debug registers itself.
    owns_debug: bool,
    debug: kvm_debugregs,
    opened: Vec<(Arc<Region>, u64)>,
    /// Those of the opened pages that KVM needs to finish the instruction after an exit: its code and its page tables.
    /// The data is not among them, so that each further element of a repeated instruction is looked at.
    kept: Vec<(Arc<Region>, u64)>,
    hidden: Vec<(Arc<Region>, u64)>,
    stored_trap_flag: Option<u64>,
}

impl Step {
    /// Prepares a step over what `touch` says, with `pages` open.
    pub fn new(vcpu: &Vcpu, space: &AddressSpace, touch: &Touch, pages: &Pages) -> Result<Self, KvmError> {
        let plan = touch.plan(vcpu, space)?;
        let places = |pages: &Pages| -> Vec<_> {
            pages.iter().filter_map(|(gpa, page)| space.find(*gpa).map(|region| (region, *page))).collect()
        };
        let gates = if plan.may_raise { touch.gate_pages(space) } else { Pages::new() };
        Ok(Self {
            rip: touch.state.regs.rip,
            own_flags: touch.state.regs.rflags & (RFLAGS_TF | RFLAGS_RF),
            delivering: touch.delivery.is_some(),
            owns_debug: touch.running().is_some_and(|operands| operands.names_debug_register()),
            debug: vcpu.debug_registers()?,
            opened: places(pages),
            kept: places(&touch.code_and_tables(space)),
            hidden: places(&gates),
            stored_trap_flag: plan.stored_trap_flag.and_then(|linear| touch.stored_at(linear)),
            plan,
        })
    }

    /// Runs the vCPU over it.
    pub fn run(self, vcpu: &mut Vcpu, space: &AddressSpace) -> Result<Stepped, TrapError> {
        let method = self.plan.method;
        let stop = StopAt { trap: method.traps(), breakpoint: method.breakpoint() };
        if self.leads_to_itself() {
            change_flags(vcpu, |flags| flags | RFLAGS_RF)?;
        }
        let exit = self.with_pages(&self.opened, |step| vcpu.step(stop, &step.debug))?;
        self.settle(vcpu, space, exit)
    }

    /// Whether the breakpoint behind the instruction is on the instruction: an interrupt that came before an IRET returns
    /// to that IRET by the same one. Without RF the vCPU would stop before it, again and again.
    fn leads_to_itself(&self) -> bool {
        !self.delivering && self.plan.method.breakpoint() == Some(self.rip)
    }

    /// Goes on after the exit was served.
    pub fn finish(self, vcpu: &mut Vcpu, space: &AddressSpace) -> Result<Stepped, TrapError> {
        let exit = self.with_pages(&self.kept, |_| vcpu.finish())?;
        // The instruction is done where KVM asks for nothing more.
        let exit = if exit == VcpuExitKind::Interrupted { VcpuExitKind::Debug } else { exit };
        self.settle(vcpu, space, exit)
    }

    /// The instruction is taken back: the vCPU stands at it, with the trap flag that the guest had.
    pub fn give_up(self, vcpu: &mut Vcpu) -> Result<(), KvmError> {
        vcpu.end_step()?;
        self.restore_flags(vcpu)?;
        self.settle_debug(vcpu, false, 0)
    }

    /// Whatever happens, the pages are shut again.
    fn with_pages(
        &self,
        opened: &[(Arc<Region>, u64)],
        run: impl FnOnce(&Self) -> Result<VcpuExitKind, RunError>,
    ) -> Result<VcpuExitKind, TrapError> {
        let ready = || -> Result<(), MapError> {
            opened.iter().try_for_each(|(region, page)| region.open_page(*page))?;
            self.hidden.iter().try_for_each(|(region, page)| region.hide_page(*page))
        };
        let exit = match ready() {
            Ok(()) => run(self).map_err(TrapError::from),
            Err(error) => Err(error.into()),
        };
        for (region, page) in opened {
            region.shut_page(*page)?;
        }
        for (region, page) in &self.hidden {
            region.restore_page(*page)?;
        }
        exit
    }

    fn settle(self, vcpu: &mut Vcpu, space: &AddressSpace, exit: VcpuExitKind) -> Result<Stepped, TrapError> {
        use VcpuExitKind::{Debug, Fault, Interrupted, Io, Mmio, ReadMsr, WriteMsr};
        if let Io { .. } | Mmio { .. } | ReadMsr { .. } | WriteMsr { .. } = exit {
            return Ok(Stepped::Asks(exit, Box::new(self)));
        }
        let status = vcpu.debug_status();
        vcpu.end_step()?;
        let ended = match exit {
            Debug => Stepped::Done,
            Fault { .. } if !self.delivering && event_in_flight(&vcpu.events()?).is_some() => Stepped::Raised,
            Fault { .. } | Interrupted if vcpu.regs()?.rip != self.rip => Stepped::Done,
            Fault { .. } | Interrupted => Stepped::Stuck,
            other => Stepped::Ended(other),
        };
        let done = matches!(ended, Stepped::Done);
        if done {
            if self.plan.method.traps() && self.plan.trap_flag {
                change_flags(vcpu, |flags| flags | RFLAGS_TF)?;
            }
            self.hide_trap_flag(space);
        } else {
            self.restore_flags(vcpu)?;
        }
        self.settle_debug(vcpu, done, status)?;
        Ok(ended)
    }

    /// The instruction is not done: the guest has its own TF and RF again.
    fn restore_flags(&self, vcpu: &Vcpu) -> Result<(), KvmError> {
        if self.own_flags & RFLAGS_TF != 0 || self.leads_to_itself() {
            change_flags(vcpu, |flags| flags & !RFLAGS_RF | self.own_flags)?;
        }
        Ok(())
    }

    /// Takes TF out of the flags that the instruction stored.
    fn hide_trap_flag(&self, space: &AddressSpace) {
        let Some(gpa) = self.stored_trap_flag else { return };
        let Some(region) = space.find(gpa).filter(|region| region.writable() && !region.absent()) else {
            return;
        };
        let Ok(byte) = region.alias().get_slice((gpa - region.gpa()) as usize, 1) else { return };
        let stored: Result<u8, _> = byte.read_obj(0);
        if let Ok(flags) = stored {
            byte.copy_from(&[flags & !1]);
            region.wrote(gpa - region.gpa(), 1);
        }
    }

    /// Leaves DR6 as the guest knows it, and raises the #DB that the guest itself is owed.
    fn settle_debug(&self, vcpu: &Vcpu, done: bool, status: u64) -> Result<(), KvmError> {
        if self.owns_debug {
            return Ok(());
        }
        let mut debug = self.debug;
        let enabled =
            (0..4).filter(|slot| debug.dr7 & (3 << (2 * slot)) != 0).fold(0, |hits, slot| hits | 1 << slot);
        let hits = if done { status & enabled } else { 0 };
        let owed = self.plan.owed.filter(|_| done).or((hits != 0).then_some(0)).map(|bits| bits | hits);
        if let Some(bits) = owed {
            debug.dr6 |= bits;
        }
        if vcpu.debug_registers()?.dr6 != debug.dr6 {
            vcpu.set_debug_registers(&debug)?;
        }
        if owed.is_some() {
            let mut events = vcpu.events()?;
            if events.exception.injected == 0 {
                events.exception.injected = 1;
                events.exception.nr = DB_VECTOR;
                events.exception.has_error_code = 0;
                vcpu.set_events(&events)?;
            }
        }
        Ok(())
    }
}

fn change_flags(vcpu: &Vcpu, change: impl FnOnce(u64) -> u64) -> Result<(), KvmError> {
    let mut regs = vcpu.regs()?;
    regs.rflags = change(regs.rflags);
    vcpu.set_regs(&regs)
}
