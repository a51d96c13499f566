//! A vCPU touched guarded memory: let the instruction through, raise a machine check, or report a stale
//! access.
//!
//! KVM only says that the instruction at RIP could not reach its memory. Which bytes it wants is worked out
//! from its operands and the guest's page tables, with the baton held, so that nothing moves meanwhile.

use std::sync::Arc;

use thiserror::Error;

use super::copy::{carry_out, move_one};
use super::deliver::{Delivered, Injection, Injector};
use super::host_memory::shortened;
use super::stale::StaleLog;
use super::step::{DR7_ENABLED, RFLAGS_TF, Step, Stepped};
use super::stores::Combining;
use super::touch::{Pages, Touch, direction};
use crate::command::{Access, Direction, Event, EventBus, MceOrigin, TrapDecision};
use crate::kvm::{Baton, KvmError, RunError, Stopped, Vcpu, VcpuExitKind};
use crate::memory::{
    AddressSpace, Consume, LINE_SIZE, MapError, PAGE_SIZE, Region, ReportedAddress, StaleAnswer,
};
use crate::x86::bulk::{RFLAGS_RF, bulk};
use crate::x86::decide::{Consumed, Hit, intersects};
use crate::x86::mca::{ErrorClass, MachineError, McaState};
use crate::x86::moves::plain_move;
use crate::x86::operands::{AccessKind, Operands};
use crate::x86::physical::PhysicalAccess;
use crate::x86::state::CpuState;
use crate::x86::walk::PhysRead;
use crate::x86::xstate::XsaveLayout;

/// Iterations of a string instruction that are stepped before other vCPUs get a turn.
const MOST_ITERATIONS: u32 = 512;
/// Traps at one RIP without any progress after which the vCPU is declared stuck.
const MOST_RETRIES: u32 = 100;

/// The machine-check exception.
const MC_VECTOR: u64 = 18;
/// Offset of the interrupt stack table in a task state (SDM volume 3, figure 9-11).
const TSS_STACKS: u64 = 0x24;
/// Bytes of a handler's stack, or more: Linux has pages that are not mapped between two (`struct cea_exception_stacks` in
/// arch/x86/include/asm/cpu_entry_area.h).
const MOST_STACK: u64 = 0x2000;

/// Diagnoses of a vCPU that does not get on.
const NOT_GUARDED: &str = "none of it is guarded";
const NOT_DONE: &str = "with its guarded pages open it still does not run";

/// Why a trap could not be served.
#[derive(Debug, Error)]
pub enum TrapError {
    /// The machine is stopping.
    #[error("The machine is stopping")]
    Stopped(Stopped),
    /// A vCPU traps again and again and nothing that it touches is guarded.
    #[error("vCPU {cpu} cannot get past {rip:#x}: {diagnosis}")]
    Stuck {
        /// The vCPU.
        cpu: u32,
        /// Where it stands.
        rip: u64,
        /// What is known.
        diagnosis: String,
    },
    /// The host refused to change a guard.
    #[error(transparent)]
    Map(#[from] MapError),
    /// KVM refused something.
    #[error(transparent)]
    Run(#[from] RunError),
}

impl From<KvmError> for TrapError {
    fn from(error: KvmError) -> Self {
        Self::Run(error.into())
    }
}

/// How one vCPU gets on with its traps.
#[derive(Debug, Default)]
pub struct Progress {
    /// RIP and RCX of the last trap that led nowhere.
    at: Option<(u64, u64)>,
    retries: u32,
    /// RIP and line of poison that was consumed last and ignored.
    ignored: Option<(u64, u64)>,
    /// What non-temporal stores have written of a line.
    combining: Combining,
    /// A step whose instruction waits for the answer to an exit.
    unfinished: Option<Box<Step>>,
}

impl Progress {
    /// Whether [`Traps::finish`] must follow once the exit that a trap ended in was served.
    pub fn unfinished(&self) -> bool {
        self.unfinished.is_some()
    }

    /// The step that is under way, which is given up.
    pub(super) fn take_step(&mut self) -> Option<Box<Step>> {
        self.unfinished.take()
    }

    fn moved(&mut self) {
        self.at = None;
        self.retries = 0;
    }
}

/// Serves the traps of all vCPUs of a machine.
#[derive(Debug)]
pub struct Traps {
    /// Guest memory.
    pub space: Arc<AddressSpace>,
    /// The baton.
    pub baton: Arc<Baton>,
    /// The event stream.
    pub events: EventBus,
    /// Accesses to memory that has departed or is locked.
    pub stale: Arc<StaleLog>,
    /// Physical address bits of the guest.
    pub physical_bits: u8,
    /// Layout of the XSAVE area of the guest.
    pub xsave: XsaveLayout,
    /// Who raises machine checks.
    pub injector: Injector,
}

impl Traps {
    /// Serves a trap; KVM may have named an address in the page that was wanted. The vCPU has left the baton. Returns an
    /// exit that a step ended in and that is still to be served; see [`Progress::unfinished`].
    pub fn serve(
        &self,
        vcpu: &mut Vcpu,
        mca: &mut McaState,
        progress: &mut Progress,
        wanted: Option<u64>,
    ) -> Result<Option<VcpuExitKind>, TrapError> {
        let held = self.baton.hold().map_err(TrapError::Stopped)?;
        if self.move_plainly(vcpu, progress)? {
            return Ok(None);
        }
        held.stand_still();
        // The instruction that is being repeated, and whether anything was done since the trap.
        let mut repeated = None;
        let mut moved = false;
        for _ in 0..MOST_ITERATIONS {
            let touch = Touch::of(vcpu, &self.space, self.physical_bits, &self.xsave)?;
            let rip = touch.state.regs.rip;
            if repeated.is_some_and(|repeated| repeated != rip) {
                break;
            }
            let mut pages = touch.guarded_pages(&self.space);
            if !moved {
                pages.extend(wanted.and_then(|gpa| self.guarded_page(gpa)));
            }
            if pages.is_empty() {
                if moved {
                    break;
                }
                return self.note_retry(vcpu, &touch, progress, NOT_GUARDED).map(|()| None);
            }
            moved = true;
            let hit = intersects(&touch.accesses, |gpa, len| self.consumable_poison(gpa, len));
            if !matches!(hit, Hit::StoreOnly { .. }) {
                progress.combining = Combining::default();
            }
            if let Some((consumed, direction)) = consumed(&hit) {
                progress.moved();
                match self.machine_check(vcpu, mca, &touch, consumed, direction)? {
                    Delivered::MachineCheck => return Ok(None),
                    Delivered::Shutdown(_) => return Ok(Some(VcpuExitKind::Shutdown)),
                    // The guest wants to hear nothing of it: it gets what the memory holds.
                    Delivered::Logged => {}
                }
            } else if self.copy(vcpu, &touch)? {
                progress.moved();
                repeated = Some(rip);
                continue;
            }
            self.report_stale(vcpu.id(), &touch, None);
            if self.skip_store(vcpu, &touch, &pages)? {
                progress.moved();
                // Stores come in rows: the next instruction may be one too.
                continue;
            }
            self.report_unlisted(vcpu.id(), &touch, &pages);
            self.report_ignored(vcpu.id(), &touch, progress);
            let step = Step::new(vcpu, &self.space, &touch, &pages)?;
            match step.run(vcpu, &self.space)? {
                Stepped::Done => {
                    progress.moved();
                    self.stored(&touch, &hit, progress);
                }
                Stepped::Raised => {
                    progress.moved();
                    break;
                }
                Stepped::Stuck => {
                    return self.note_retry(vcpu, &touch, progress, NOT_DONE).map(|()| None);
                }
                Stepped::Ended(exit) => return Ok(Some(exit)),
                Stepped::Asks(exit, step) => {
                    progress.unfinished = Some(step);
                    return Ok(Some(exit));
                }
            }
            if touch.running().is_none_or(|operands| operands.repeat.is_none()) {
                break;
            }
            repeated = Some(rip);
        }
        Ok(None)
    }

    /// Finishes the instruction whose exit was served. Returns as [`Self::serve`] does.
    pub fn finish(
        &self,
        vcpu: &mut Vcpu,
        progress: &mut Progress,
    ) -> Result<Option<VcpuExitKind>, TrapError> {
        let Some(step) = progress.unfinished.take() else { return Ok(None) };
        let _held = self.baton.take().map_err(TrapError::Stopped)?;
        progress.moved();
        Ok(match step.finish(vcpu, &self.space)? {
            Stepped::Done | Stepped::Raised | Stepped::Stuck => None,
            Stepped::Ended(exit) => Some(exit),
            Stepped::Asks(exit, step) => {
                progress.unfinished = Some(step);
                Some(exit)
            }
        })
    }

    /// Whether the vCPU stands on the stack that the gate of machine checks names in the interrupt stack table; none if
    /// there is no such stack (SDM volume 3, 7.14.5).
    pub fn on_machine_check_stack(&self, vcpu: &Vcpu) -> Result<Option<bool>, KvmError> {
        let state = CpuState {
            regs: vcpu.regs()?,
            sregs: vcpu.sregs()?,
            physical_bits: self.physical_bits,
            extended: None,
        };
        Ok(machine_check_stack(&state, &*self.space).map(|top| {
            state.privilege() != 3 && (1..=MOST_STACK).contains(&top.wrapping_sub(state.regs.rsp))
        }))
    }

    /// The vCPU did not get on: a guard may have gone meanwhile, so it tries again, but not for ever.
    fn note_retry(
        &self,
        vcpu: &Vcpu,
        touch: &Touch,
        progress: &mut Progress,
        why: &str,
    ) -> Result<(), TrapError> {
        let place = (touch.state.regs.rip, touch.state.regs.rcx);
        if progress.at == Some(place) {
            progress.retries += 1;
        } else {
            progress.at = Some(place);
            progress.retries = 0;
        }
        if progress.retries > MOST_RETRIES { Err(self.stuck(vcpu, touch, why)) } else { Ok(()) }
    }

    /// The page of `gpa`, if it is guarded.
    fn guarded_page(&self, gpa: u64) -> Option<(u64, u64)> {
        let page = gpa & !(PAGE_SIZE - 1);
        let region = self.space.find(page).filter(|r| r.guards(page - r.gpa()))?;
        Some((region.gpa(), page - region.gpa()))
    }

    /// Poison that an access to `gpa` can consume. Of a device that has departed or is locked, all is poison, or nothing.
    pub(super) fn consumable_poison(&self, gpa: u64, len: u64) -> Option<u64> {
        match self.space.find(gpa) {
            Some(region) if region.absent() => departed_line(&region, gpa),
            Some(region) if region.policy().consume == Consume::Log => None,
            _ => self.space.first_poison(gpa, len),
        }
    }

    /// Poison that is there, consumed with or without consequences.
    fn present_poison(&self, gpa: u64, len: u64) -> Option<u64> {
        match self.space.find(gpa).filter(|region| region.absent()) {
            Some(region) => departed_line(&region, gpa),
            None => self.space.first_poison(gpa, len),
        }
    }

    /// Does an aligned move between a register and clean memory, of which most accesses to a guarded page are. Other vCPUs
    /// run meanwhile: what the instruction does in one piece is done in one piece.
    fn move_plainly(&self, vcpu: &Vcpu, progress: &mut Progress) -> Result<bool, TrapError> {
        let touch = Touch::of(vcpu, &self.space, self.physical_bits, &self.xsave)?;
        let Some(found) = touch.running().and_then(|run| plain_move(&touch.state, run, &touch.accesses))
        else {
            return Ok(false);
        };
        let hit = intersects(&touch.accesses, |gpa, len| self.present_poison(gpa, len));
        let departed = |range: &PhysicalAccess| self.space.find(range.gpa).is_none_or(|r| r.absent());
        let left = !matches!(hit, Hit::None | Hit::StoreOnly { .. })
            || touch.accesses.ranges.iter().any(departed)
            || touch.guarded_pages(&self.space).is_empty()
            || watches_data(vcpu)?;
        let Some(loaded) = (!left).then(|| move_one(&self.space, &found)).flatten() else { return Ok(false) };
        vcpu.set_regs(&found.finish(&touch.state, loaded))?;
        progress.moved();
        self.stored(&touch, &hit, progress);
        if !matches!(hit, Hit::StoreOnly { .. }) {
            progress.combining = Combining::default();
        }
        Ok(true)
    }

    /// Does the iterations of a repeated copy or fill that meet no poison, rather than step over each.
    fn copy(&self, vcpu: &Vcpu, touch: &Touch) -> Result<bool, TrapError> {
        let Some(operands) = touch.running() else { return Ok(false) };
        let Some(repeat) = &operands.repeat else { return Ok(false) };
        if watches_data(vcpu)? {
            return Ok(false);
        }
        let run = bulk(&touch.state, &*self.space, repeat, |gpa, len| self.present_poison(gpa, len));
        let Some(run) = run.filter(|run| carry_out(&self.space, run)) else { return Ok(false) };
        self.report_stale(vcpu.id(), touch, Some(run.length()));
        let mut regs = touch.state.regs;
        run.advance(&mut regs, repeat, operands.next_rip());
        vcpu.set_regs(&regs)?;
        Ok(true)
    }

    /// A store into memory that has departed or is locked goes nowhere: an instruction that does nothing else is done by moving past it.
    fn skip_store(&self, vcpu: &Vcpu, touch: &Touch, pages: &Pages) -> Result<bool, TrapError> {
        let Some(operands) = touch.running() else { return Ok(false) };
        let lost = touch.accesses.ranges.iter().all(|range| {
            range.kind != AccessKind::Store || self.space.find(range.gpa).is_some_and(|r| r.absent())
        });
        let only_there =
            pages.iter().all(|(gpa, _)| self.space.find(*gpa).is_some_and(|region| region.absent()));
        let fetched_there = touch.accesses.ranges.iter().any(|range| {
            range.kind != AccessKind::Store && self.space.find(range.gpa).is_some_and(|r| r.absent())
        });
        let plain = operands.only_stores()
            && touch.accesses.fault.is_none()
            && touch.state.regs.rflags & RFLAGS_TF == 0;
        if !(plain && lost && only_there && !fetched_there) || watches_data(vcpu)? {
            return Ok(false);
        }
        let mut regs = touch.state.regs;
        regs.rip = operands.next_rip();
        regs.rflags &= !RFLAGS_RF;
        vcpu.set_regs(&regs)?;
        Ok(true)
    }

    /// An instruction consumes poison: reports it, and raises the machine check or, if the guest has switched that
    /// off, logs the error.
    pub(super) fn machine_check(
        &self,
        vcpu: &mut Vcpu,
        mca: &mut McaState,
        touch: &Touch,
        consumed: Consumed,
        direction: Direction,
    ) -> Result<Delivered, TrapError> {
        let Consumed { gpa, linear, bytes, .. } = consumed;
        let access = touch.describe(vcpu.id(), gpa, Some(linear), bytes, direction);
        let class = match direction {
            Direction::Fetch => ErrorClass::Fetch,
            _ => ErrorClass::Load,
        };
        let region = self.space.find(consumed.gpa);
        let error = match region.as_ref().map(|region| region.policy().address) {
            Some(ReportedAddress::Page) => MachineError::page(class, consumed.line),
            _ => MachineError::line(class, consumed.line),
        };
        let (decision, reason) = match mca.signals(&error) {
            true => (TrapDecision::MachineCheck, reason(direction)),
            false => (TrapDecision::Proceed, "the guest has switched the reporting of errors off"),
        };
        if let Some(region) = region.as_ref().filter(|region| region.absent()) {
            // What does not end in a machine check is reported when it is let through.
            if decision == TrapDecision::MachineCheck {
                self.note_stale(region, access);
            }
        } else if let Some(region) = region {
            self.events.publish(Event::PoisonTrapped {
                device: region.name().to_owned(),
                offset: region.named_offset(consumed.gpa).into(),
                access,
                decision,
                reason: reason.to_owned(),
            });
        }
        Ok(self.injector.deliver(vcpu, mca, Injection::error(error, MceOrigin::Access))?)
    }

    /// Reports what the instruction touches of memory that has departed or is locked. `run` is the length of a run of iterations that is
    /// reported at once.
    fn report_stale(&self, vcpu: u32, touch: &Touch, run: Option<u64>) {
        for range in &touch.accesses.ranges {
            let Some(region) = self.space.find(range.gpa).filter(|r| r.absent()) else { continue };
            let Some(direction) = direction(range.kind) else { continue };
            let bytes = run.filter(|_| range.kind != AccessKind::Fetch).unwrap_or(u64::from(range.size));
            let access = touch.describe(vcpu, range.gpa, Some(range.linear), bytes, direction);
            self.note_stale(&region, access);
        }
    }

    /// Counts an access to a region where nothing answers, and tells of it if it is worth an event.
    pub(super) fn note_stale(&self, region: &Region, access: Access) {
        if region.stale_answer() == StaleAnswer::Pause {
            self.stale.ask_for_pause(access.vcpu);
        }
        if let Some(count) = self.stale.note(region.name(), &access) {
            let device = region.name().to_owned();
            let offset = region.named_offset(access.gpa.0).into();
            self.events.publish(match region.locked() {
                true => Event::LockedAccess { device, offset, access, count },
                false => Event::StaleAccess { device, offset, access, count },
            });
        }
    }

    /// A poisoned line is consumed of a device whose policy is to raise nothing: the instruction gets what is there.
    /// Each line is told once for a run of one instruction.
    fn report_ignored(&self, vcpu: u32, touch: &Touch, progress: &mut Progress) {
        let ignored = |gpa, len| {
            let region = self.space.find(gpa).filter(|region| !region.absent())?;
            let log = region.policy().consume == Consume::Log;
            log.then(|| self.space.first_poison(gpa, len)).flatten()
        };
        let hit = intersects(&touch.accesses, ignored);
        let Some((Consumed { line, gpa, linear, bytes }, direction)) = consumed(&hit) else {
            progress.ignored = None;
            return;
        };
        let place = Some((touch.state.regs.rip, line));
        if progress.ignored == place {
            return;
        }
        progress.ignored = place;
        let Some(region) = self.space.find(gpa) else { return };
        self.events.publish(Event::PoisonTrapped {
            device: region.name().to_owned(),
            offset: region.named_offset(gpa).into(),
            access: touch.describe(vcpu, gpa, Some(linear), bytes, direction),
            decision: TrapDecision::Proceed,
            reason: "the policy of the device is to log what consumes its poison".to_owned(),
        });
    }

    /// The instruction has stored: lines that are full now may be good again.
    fn stored(&self, touch: &Touch, hit: &Hit, progress: &mut Progress) {
        if let Hit::StoreOnly { whole, .. } = hit {
            self.filled(whole);
            let non_temporal = touch.running().is_some_and(Operands::is_non_temporal_store);
            let full = progress.combining.add(&touch.accesses.ranges, non_temporal);
            self.filled(full.as_slice());
        }
    }

    /// The accesses of an instruction are not known, but that it reaches a guarded page is: it is let through, since a
    /// machine check that hardware might not raise would be worse than one that is missed.
    fn report_unlisted(&self, vcpu: u32, touch: &Touch, pages: &Pages) {
        let (Err(unresolved), None) = (&touch.operands, touch.delivery) else { return };
        let Some(&(gpa, page)) = pages.iter().next() else { return };
        let Some(region) = self.space.find(gpa).filter(|region| !region.absent()) else { return };
        self.events.publish(Event::PoisonTrapped {
            device: region.name().to_owned(),
            offset: region.named_offset(gpa + page).into(),
            access: touch.describe(vcpu, gpa + page, None, PAGE_SIZE, Direction::Fetch),
            decision: TrapDecision::Proceed,
            reason: format!("the accesses of the instruction are not known: {}", unresolved.reason),
        });
    }

    fn stuck(&self, vcpu: &Vcpu, touch: &Touch, why: &str) -> TrapError {
        let mut diagnosis = format!("{}; {why}", touch.text());
        if let Some(region) = self.space.regions().iter().find(|region| region.missing() > 0) {
            diagnosis.push_str(&format!(". {}", shortened(region)));
        }
        let rip = touch.state.regs.rip;
        self.events.publish(Event::VcpuStuck {
            vcpu: vcpu.id(),
            rip: rip.into(),
            diagnosis: diagnosis.clone(),
        });
        TrapError::Stuck { cpu: vcpu.id(), rip, diagnosis }
    }
}

/// Top of the stack of the handler of machine checks.
fn machine_check_stack(state: &CpuState, memory: &impl PhysRead) -> Option<u64> {
    if !state.long_mode() || !state.protected_mode() {
        return None;
    }
    let word = |linear| memory.read_u64(state.paging().walk(memory, linear).result.ok()?.gpa);
    let gate = word(state.sregs.idt.base.wrapping_add(16 * MC_VECTOR))?;
    let slot = (gate >> 32 & 7).checked_sub(1)?;
    word(state.sregs.tr.base.wrapping_add(TSS_STACKS + 8 * slot))
}

/// Whether the guest has breakpoints set, which only the processor can honour.
fn watches_data(vcpu: &Vcpu) -> Result<bool, KvmError> {
    Ok(vcpu.debug_registers()?.dr7 & DR7_ENABLED != 0)
}

/// The line at `gpa` of a departed region, if it answers with a machine check.
fn departed_line(region: &Region, gpa: u64) -> Option<u64> {
    (region.stale_answer() == StaleAnswer::MachineCheck).then_some(gpa & !(LINE_SIZE - 1))
}

/// What is consumed, and how.
fn consumed(hit: &Hit) -> Option<(Consumed, Direction)> {
    match *hit {
        Hit::Load(consumed) => Some((consumed, Direction::Read)),
        Hit::Fetch(consumed) => Some((consumed, Direction::Fetch)),
        Hit::Walk(consumed) => Some((consumed, Direction::Walk)),
        Hit::None | Hit::StoreOnly { .. } => None,
    }
}

fn reason(direction: Direction) -> &'static str {
    match direction {
        Direction::Fetch => "an instruction is fetched from a poisoned line",
        Direction::Walk => "a page-table entry lies in a poisoned line",
        _ => "a poisoned line is loaded",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where the tables are.
    const IDT: u64 = 0x1000;
    const TSS: u64 = 0x2000;

    struct Memory(Vec<u8>);

    impl PhysRead for Memory {
        fn read_u64(&self, gpa: u64) -> Option<u64> {
            let bytes = self.0.get(gpa as usize..gpa as usize + 8)?;
            Some(u64::from_le_bytes(bytes.try_into().ok()?))
        }
    }

    #[test]
    fn the_stack_of_machine_checks_is_found_by_its_gate() {
        let mut memory = Memory(vec![0; 0x3000]);
        let mut state = CpuState { physical_bits: 36, ..Default::default() };
        (state.sregs.cr0, state.sregs.efer) = (1, 1 << 10);
        (state.sregs.idt.base, state.sregs.tr.base) = (IDT, TSS);
        assert_eq!(machine_check_stack(&state, &memory), None, "the gate names none");
        let gate = (IDT + 16 * 18) as usize;
        memory.0[gate + 4] = 3;
        let slot = (TSS + 0x24 + 16) as usize;
        memory.0[slot..slot + 8].copy_from_slice(&0xffff_fe38_e63c_2000u64.to_le_bytes());
        assert_eq!(machine_check_stack(&state, &memory), Some(0xffff_fe38_e63c_2000));
        state.sregs.tr.base = 0x10_0000;
        assert_eq!(machine_check_stack(&state, &memory), None, "the task state is nowhere");
    }
}
