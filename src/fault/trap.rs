//! A vCPU touched guarded memory: let the instruction through, raise a machine check, or report a stale
//! access.
//!
//! KVM only says that the instruction at RIP could not reach its memory. Which bytes it wants is worked out
//! from its operands and the guest's page tables, with the baton held, so that nothing moves meanwhile.

use std::collections::BTreeSet;
use std::sync::Arc;

use kvm_bindings::kvm_vcpu_events;
use thiserror::Error;

use super::copy::carry_out;
use super::deliver::{Delivered, Injection, Injector};
use super::stale::StaleLog;
use crate::command::{Access, Direction, Event, EventBus, MceOrigin, TrapDecision};
use crate::kvm::{Baton, KvmError, RunError, Step, Stopped, Vcpu, VcpuExitKind};
use crate::memory::{AddressSpace, MapError, PAGE_SIZE, Region};
use crate::x86::bulk::bulk;
use crate::x86::decide::{Consumed, Hit, intersects};
use crate::x86::mca::{ErrorClass, MachineError, McaState};
use crate::x86::operands::{self, AccessKind, Delivery, Operands, Reason, delivery_accesses};
use crate::x86::physical::{PhysicalAccess, PhysicalAccesses, physical_accesses};
use crate::x86::state::CpuState;
use crate::x86::walk::PhysRead;
use crate::x86::xstate::{ExtendedState, XsaveLayout};

/// Iterations of a string instruction that are stepped before other vCPUs get a turn.
const MOST_ITERATIONS: u32 = 512;
/// Traps at one RIP without any progress after which the vCPU is declared stuck.
const MOST_RETRIES: u32 = 100;

/// RFLAGS.TF: the guest steps itself.
const RFLAGS_TF: u64 = 1 << 8;

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

impl PhysRead for AddressSpace {
    fn read_u64(&self, gpa: u64) -> Option<u64> {
        Self::read_u64(self, gpa)
    }
}

/// Traps at one place, to notice a vCPU that makes no progress.
#[derive(Clone, Copy, Debug, Default)]
pub struct Progress {
    at: Option<(u64, u64)>,
    retries: u32,
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
    /// Accesses to departed memory.
    pub stale: Arc<StaleLog>,
    /// Physical address bits of the guest.
    pub physical_bits: u8,
    /// Layout of the XSAVE area of the guest.
    pub xsave: XsaveLayout,
    /// Who raises machine checks.
    pub injector: Injector,
}

/// What one instruction touches.
struct Touch {
    state: CpuState,
    operands: Option<Operands>,
    unresolved: Option<Reason>,
    accesses: PhysicalAccesses,
}

/// Guarded pages among the accesses: the region and the page's offset in it.
type Pages = BTreeSet<(u64, u64)>;

impl Traps {
    /// Serves a trap. The vCPU has left the baton. Returns an exit that a step ended in and that is still to be
    /// served.
    pub fn serve(
        &self,
        vcpu: &mut Vcpu,
        mca: &mut McaState,
        progress: &mut Progress,
    ) -> Result<Option<VcpuExitKind>, TrapError> {
        let _held = self.baton.take().map_err(TrapError::Stopped)?;
        // The instruction that is being repeated, and whether anything was done since the trap.
        let mut repeated = None;
        let mut moved = false;
        for _ in 0..MOST_ITERATIONS {
            let touch = self.touch(vcpu)?;
            let rip = touch.state.regs.rip;
            if repeated.is_some_and(|repeated| repeated != rip) {
                break;
            }
            let pages = self.guarded_pages(&touch.accesses);
            if pages.is_empty() {
                if moved {
                    break;
                }
                return self.note_retry(vcpu, &touch, progress).map(|()| None);
            }
            *progress = Progress::default();
            moved = true;
            let hit = intersects(&touch.accesses, |gpa, len| self.consumable_poison(gpa, len));
            match hit {
                Hit::Load(consumed) => {
                    return self.machine_check(vcpu, mca, &touch, consumed, Direction::Read);
                }
                Hit::Fetch(consumed) => {
                    return self.machine_check(vcpu, mca, &touch, consumed, Direction::Fetch);
                }
                Hit::Walk(consumed) => {
                    return self.machine_check(vcpu, mca, &touch, consumed, Direction::Walk);
                }
                Hit::None | Hit::StoreOnly { .. } => {}
            }
            if self.copy(vcpu, &touch)? {
                repeated = Some(rip);
                continue;
            }
            self.report_stale(vcpu.id(), &touch, None);
            if self.skip_store(vcpu, &touch, &pages)? {
                // Stores come in rows: the next instruction may be one too.
                continue;
            }
            if let Some(exit) = self.step(vcpu, &pages)? {
                return Ok(Some(exit));
            }
            if touch.operands.as_ref().is_none_or(|operands| operands.repeat.is_none()) {
                break;
            }
            repeated = Some(rip);
        }
        Ok(None)
    }

    /// Nothing that the vCPU touches is guarded: a guard may have gone meanwhile, so it tries again, but not for
    /// ever.
    fn note_retry(&self, vcpu: &Vcpu, touch: &Touch, progress: &mut Progress) -> Result<(), TrapError> {
        let place = (touch.state.regs.rip, touch.state.regs.rcx);
        if progress.at == Some(place) {
            progress.retries += 1;
        } else {
            *progress = Progress { at: Some(place), retries: 0 };
        }
        if progress.retries > MOST_RETRIES { Err(self.stuck(vcpu, touch)) } else { Ok(()) }
    }

    /// What the instruction at RIP touches, or the event that is being delivered before it.
    fn touch(&self, vcpu: &Vcpu) -> Result<Touch, TrapError> {
        let mut state = CpuState {
            regs: vcpu.regs()?,
            sregs: vcpu.sregs()?,
            physical_bits: self.physical_bits,
            extended: None,
        };
        let space = &*self.space;
        let mut listed = operands::operands(&state, space);
        if matches!(&listed, Err(error) if error.reason == Reason::NeedsExtendedState) {
            state.extended = Some(Box::new(self.extended(vcpu)?));
            listed = operands::operands(&state, space);
        }
        let (mut wanted, operands, unresolved) = match listed {
            Ok(operands) => (operands.accesses.clone(), Some(operands), None),
            Err(error) => (error.accesses, None, Some(error.reason)),
        };
        if let Some(event) = event_in_flight(&vcpu.events()?) {
            wanted.splice(0..0, delivery_accesses(&state, space, event));
        }
        let accesses = physical_accesses(&state, space, &wanted);
        Ok(Touch { state, operands, unresolved, accesses })
    }

    fn extended(&self, vcpu: &Vcpu) -> Result<ExtendedState, KvmError> {
        let (area, xcr0) = vcpu.xsave()?;
        Ok(ExtendedState::from_xsave(&area, self.xsave.clone(), xcr0, 0))
    }

    fn guarded_pages(&self, accesses: &PhysicalAccesses) -> Pages {
        let mut pages = Pages::new();
        for access in &accesses.ranges {
            let first = access.gpa & !(PAGE_SIZE - 1);
            let last = access.gpa.saturating_add(u64::from(access.size.max(1)) - 1);
            let mut page = first;
            while page <= last {
                if let Some(region) = self.space.find(page).filter(|r| r.guards(page - r.gpa())) {
                    pages.insert((region.gpa(), page - region.gpa()));
                }
                page += PAGE_SIZE;
            }
        }
        pages
    }

    /// Poison that an access to `gpa` can consume: a departed device has no lines any more.
    fn consumable_poison(&self, gpa: u64, len: u64) -> Option<u64> {
        match self.space.find(gpa) {
            Some(region) if region.departed() => None,
            _ => self.space.first_poison(gpa, len),
        }
    }

    /// Does the iterations of a repeated copy or fill that meet no poison, rather than step over each.
    fn copy(&self, vcpu: &Vcpu, touch: &Touch) -> Result<bool, TrapError> {
        let Some(operands) = &touch.operands else { return Ok(false) };
        let Some(repeat) = &operands.repeat else { return Ok(false) };
        if event_in_flight(&vcpu.events()?).is_some() {
            return Ok(false);
        }
        let run = bulk(&touch.state, &*self.space, repeat, |gpa, len| self.consumable_poison(gpa, len));
        let Some(run) = run.filter(|run| carry_out(&self.space, run)) else { return Ok(false) };
        self.report_stale(vcpu.id(), touch, Some(run.length()));
        let mut regs = touch.state.regs;
        run.advance(&mut regs, repeat, operands.next_rip());
        vcpu.set_regs(&regs)?;
        Ok(true)
    }

    /// A store into departed memory goes nowhere: an instruction that does nothing else is done by moving past it.
    fn skip_store(&self, vcpu: &Vcpu, touch: &Touch, pages: &Pages) -> Result<bool, TrapError> {
        let Some(operands) = &touch.operands else { return Ok(false) };
        let lost = touch.accesses.ranges.iter().all(|range| {
            range.kind != AccessKind::Store || self.space.find(range.gpa).is_some_and(|r| r.departed())
        });
        let only_there =
            pages.iter().all(|(gpa, _)| self.space.find(*gpa).is_some_and(|region| region.departed()));
        let fetched_there = touch.accesses.ranges.iter().any(|range| {
            range.kind != AccessKind::Store && self.space.find(range.gpa).is_some_and(|r| r.departed())
        });
        let plain = operands.only_stores()
            && touch.accesses.fault.is_none()
            && touch.state.regs.rflags & RFLAGS_TF == 0
            && event_in_flight(&vcpu.events()?).is_none();
        if !(plain && lost && only_there && !fetched_there) {
            return Ok(false);
        }
        let mut regs = touch.state.regs;
        regs.rip = operands.next_rip();
        vcpu.set_regs(&regs)?;
        Ok(true)
    }

    fn step(&self, vcpu: &mut Vcpu, pages: &Pages) -> Result<Option<VcpuExitKind>, TrapError> {
        let regions: Vec<(Arc<Region>, u64)> = pages
            .iter()
            .filter_map(|(gpa, page)| self.space.find(*gpa).map(|region| (region, *page)))
            .collect();
        let opened = regions.iter().try_for_each(|(region, page)| region.open_page(*page));
        let stepped = match opened {
            Ok(()) => vcpu.step().map_err(TrapError::from),
            Err(error) => Err(error.into()),
        };
        for (region, page) in &regions {
            region.shut_page(*page)?;
        }
        Ok(match stepped? {
            Step::Done | Step::Exit(VcpuExitKind::Interrupted) => None,
            Step::Exit(exit) => Some(exit),
        })
    }

    fn machine_check(
        &self,
        vcpu: &mut Vcpu,
        mca: &mut McaState,
        touch: &Touch,
        consumed: Consumed,
        direction: Direction,
    ) -> Result<Option<VcpuExitKind>, TrapError> {
        let Consumed { gpa, linear, bytes, .. } = consumed;
        let access = describe(vcpu.id(), touch, gpa, Some(linear), bytes, direction);
        if let Some(region) = self.space.find(consumed.gpa) {
            self.events.publish(Event::PoisonTrapped {
                device: region.name().to_owned(),
                offset: region.named_offset(consumed.gpa).into(),
                access,
                decision: TrapDecision::MachineCheck,
                reason: reason(direction).to_owned(),
            });
        }
        let class = match direction {
            Direction::Fetch => ErrorClass::Fetch,
            _ => ErrorClass::Load,
        };
        let error = MachineError::line(class, consumed.line);
        Ok(match self.injector.deliver(vcpu, mca, Injection::error(error, MceOrigin::Access))? {
            Delivered::MachineCheck | Delivered::Logged => None,
            Delivered::Shutdown(_) => Some(VcpuExitKind::Shutdown),
        })
    }

    /// Reports what the instruction touches of departed memory. `run` is the length of a run of iterations that is
    /// reported at once.
    fn report_stale(&self, vcpu: u32, touch: &Touch, run: Option<u64>) {
        for range in &touch.accesses.ranges {
            let Some(region) = self.space.find(range.gpa).filter(|r| r.departed()) else { continue };
            let Some(direction) = direction(range.kind) else { continue };
            let bytes = run.filter(|_| range.kind != AccessKind::Fetch).unwrap_or(u64::from(range.size));
            let access = describe(vcpu, touch, range.gpa, Some(range.linear), bytes, direction);
            if let Some(count) = self.stale.note(region.name(), &access) {
                self.events.publish(Event::StaleAccess {
                    device: region.name().to_owned(),
                    offset: region.named_offset(range.gpa).into(),
                    access,
                    count,
                });
            }
        }
    }

    fn stuck(&self, vcpu: &Vcpu, touch: &Touch) -> TrapError {
        let touched = touch.accesses.ranges.iter().map(text).collect::<Vec<_>>().join(", ");
        let mut diagnosis = match (&touch.operands, touch.unresolved) {
            (Some(operands), _) => format!("{} ({})", operands.text(), operands.bytes),
            (None, Some(reason)) => reason.to_string(),
            (None, None) => "its instruction is unknown".to_owned(),
        };
        diagnosis.push_str(&format!(
            "; it touches {touched}; none of it is guarded. Was a file of a memory device made shorter?"
        ));
        let rip = touch.state.regs.rip;
        self.events.publish(Event::VcpuStuck {
            vcpu: vcpu.id(),
            rip: rip.into(),
            diagnosis: diagnosis.clone(),
        });
        TrapError::Stuck { cpu: vcpu.id(), rip, diagnosis }
    }
}

/// What KVM was delivering when it met guarded memory.
fn event_in_flight(events: &kvm_vcpu_events) -> Option<Delivery> {
    const NMI: u8 = 2;
    let delivery = |vector, error_code| Some(Delivery { vector, error_code });
    if events.exception.injected != 0 {
        delivery(events.exception.nr, events.exception.has_error_code != 0)
    } else if events.nmi.injected != 0 {
        delivery(NMI, false)
    } else if events.interrupt.injected != 0 {
        delivery(events.interrupt.nr, false)
    } else {
        None
    }
}

fn direction(kind: AccessKind) -> Option<Direction> {
    match kind {
        AccessKind::Walk => Some(Direction::Walk),
        AccessKind::Fetch => Some(Direction::Fetch),
        AccessKind::Load => Some(Direction::Read),
        AccessKind::ReadModifyWrite => Some(Direction::ReadWrite),
        AccessKind::Store | AccessKind::FullLineStore => Some(Direction::Write),
        AccessKind::CacheControl | AccessKind::Prefetch | AccessKind::Probe => None,
    }
}

fn reason(direction: Direction) -> &'static str {
    match direction {
        Direction::Fetch => "an instruction is fetched from a poisoned line",
        Direction::Walk => "a page-table entry lies in a poisoned line",
        _ => "a poisoned line is loaded",
    }
}

fn text(range: &PhysicalAccess) -> String {
    format!("{:?} of {} bytes at {:#x}", range.kind, range.size, range.gpa)
}

fn describe(vcpu: u32, touch: &Touch, gpa: u64, va: Option<u64>, bytes: u64, direction: Direction) -> Access {
    Access {
        vcpu,
        rip: touch.state.regs.rip.into(),
        cr3: touch.state.sregs.cr3.into(),
        cpl: touch.state.privilege(),
        va: va.map(Into::into),
        gpa: gpa.into(),
        bytes,
        direction,
        instruction: touch.operands.as_ref().map(Operands::text),
    }
}
