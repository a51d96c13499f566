//! What the instruction at RIP touches, or the event that is being delivered before it.

use std::collections::BTreeSet;

use kvm_bindings::kvm_vcpu_events;

use crate::command::{Access, Direction};
use crate::kvm::{KvmError, Vcpu};
use crate::memory::{AddressSpace, PAGE_SIZE};
use crate::x86::operands::{
    self, AccessKind, Delivery, Operands, Reason, StepHazard, Unresolved, delivery_accesses,
};
use crate::x86::physical::{PhysicalAccess, PhysicalAccesses, physical_accesses, touched};
use crate::x86::state::CpuState;
use crate::x86::step::{StepPlan, SystemCallTargets, plan_step};
use crate::x86::walk::{CR4_PKE, PhysRead};
use crate::x86::xstate::{ExtendedState, XsaveLayout};

/// IA32_LSTAR, CSTAR and IA32_FMASK (AMD APM volume 2, 6.1.1).
const SYSTEM_CALL_MSRS: [u32; 3] = [0xc000_0082, 0xc000_0083, 0xc000_0084];

impl PhysRead for AddressSpace {
    fn read_u64(&self, gpa: u64) -> Option<u64> {
        Self::read_u64(self, gpa)
    }
}

/// Pages of regions: guest-physical address of the region, and the page's offset in it.
pub(super) type Pages = BTreeSet<(u64, u64)>;

/// What one instruction, or one delivery, touches.
pub(super) struct Touch {
    pub state: CpuState,
    /// The instruction at RIP.
    pub operands: Result<Operands, Unresolved>,
    /// The instruction after it, where a trap comes only then.
    pub next: Option<Operands>,
    /// The event that is delivered first: the instruction has not begun.
    pub delivery: Option<Delivery>,
    /// All of it, in order.
    pub accesses: PhysicalAccesses,
}

impl Touch {
    /// Of a stopped vCPU. The caller holds the baton.
    pub fn of(
        vcpu: &Vcpu,
        space: &AddressSpace,
        physical_bits: u8,
        xsave: &XsaveLayout,
    ) -> Result<Self, KvmError> {
        let mut state = CpuState { regs: vcpu.regs()?, sregs: vcpu.sregs()?, physical_bits, extended: None };
        let events = vcpu.events()?;
        let delivery = event_in_flight(&events);
        let (mut operands, mut accesses) = touched(&state, space);
        // With protection keys the rights to a page are in PKRU.
        if matches!(&operands, Err(error) if error.reason == Reason::NeedsExtendedState)
            || state.sregs.cr4 & CR4_PKE != 0
        {
            let (area, xcr0) = vcpu.xsave()?;
            state.extended = Some(Box::new(ExtendedState::from_xsave(&area, xsave.clone(), xcr0, 0)));
            (operands, accesses) = touched(&state, space);
        }
        if let Some(event) = delivery {
            let mut wanted = delivery_accesses(&state, space, event);
            // KVM reads a software interrupt again to find its end (svm_update_soft_interrupt_rip).
            let fetched = events.interrupt.soft != 0;
            let instruction = match &operands {
                Ok(operands) => &operands.accesses,
                Err(unresolved) => &unresolved.accesses,
            };
            wanted.extend(instruction.iter().filter(|a| fetched && a.kind == AccessKind::Fetch));
            accesses = physical_accesses(&state, space, &wanted);
            return Ok(Self { state, operands, next: None, delivery, accesses });
        }
        let next = operands.as_ref().ok().and_then(|first| next_instruction(&state, space, first));
        if let Some(next) = &next {
            let more = physical_accesses(&state, space, &next.accesses);
            accesses.ranges.extend(more.ranges);
            accesses.fault = accesses.fault.or(more.fault);
        }
        Ok(Self { state, operands, next, delivery, accesses })
    }

    /// How to let it through.
    pub fn plan(&self, vcpu: &Vcpu, space: &AddressSpace) -> Result<StepPlan, KvmError> {
        if let Some(event) = self.delivery {
            return Ok(StepPlan::delivery(&self.state, space, event.vector));
        }
        let Ok(operands) = &self.operands else { return Ok(StepPlan::unknown(&self.state)) };
        let mut targets = SystemCallTargets::default();
        if operands.hazard == StepHazard::SystemCall {
            let [lstar, cstar, fmask] = vcpu.msrs(SYSTEM_CALL_MSRS)?;
            targets = SystemCallTargets { lstar, cstar, fmask };
        }
        let mut plan = plan_step(&self.state, space, operands, targets);
        if let Some(next) = &self.next {
            plan = plan.and_then(plan_step(&self.state, space, next, targets));
        }
        plan.may_raise |= self.accesses.fault.is_some();
        Ok(plan)
    }

    /// The instruction, if it is about to run and its accesses are known.
    pub fn running(&self) -> Option<&Operands> {
        self.operands.as_ref().ok().filter(|_| self.delivery.is_none())
    }

    /// The guarded pages that are touched.
    pub fn guarded_pages(&self, space: &AddressSpace) -> Pages {
        self.guarded(space, |_| true)
    }

    /// Those of them that hold the instruction or page tables.
    pub fn code_and_tables(&self, space: &AddressSpace) -> Pages {
        self.guarded(space, |kind| matches!(kind, AccessKind::Fetch | AccessKind::Walk))
    }

    fn guarded(&self, space: &AddressSpace, of: impl Fn(AccessKind) -> bool) -> Pages {
        let mut pages = Pages::new();
        for page in self.pages(of) {
            if let Some(region) = space.find(page).filter(|r| r.guards(page - r.gpa())) {
                pages.insert((region.gpa(), page - region.gpa()));
            }
        }
        pages
    }

    /// The pages of the exception gates of the interrupt descriptor table, but for those that are touched themselves.
    pub fn gate_pages(&self, space: &AddressSpace) -> Pages {
        const VECTORS: u64 = 32;
        let size = match (self.state.protected_mode(), self.state.long_mode()) {
            (false, _) => 4,
            (true, false) => 8,
            (true, true) => 16,
        };
        let idt = &self.state.sregs.idt;
        let last = (VECTORS * size - 1).min(u64::from(idt.limit));
        let touched: BTreeSet<u64> = self.pages(|_| true).collect();
        let mut pages = Pages::new();
        for linear in [idt.base, idt.base.wrapping_add(last)] {
            let Ok(found) = self.state.paging().walk(space, linear).result else { continue };
            let page = found.gpa & !(PAGE_SIZE - 1);
            if let Some(region) = space.find(page).filter(|_| !touched.contains(&page)) {
                pages.insert((region.gpa(), page - region.gpa()));
            }
        }
        pages
    }

    /// Guest-physical address of a byte that the instruction stores, by its linear address.
    pub fn stored_at(&self, linear: u64) -> Option<u64> {
        self.accesses
            .ranges
            .iter()
            .filter(|range| range.kind == AccessKind::Store)
            .find(|range| linear.wrapping_sub(range.linear) < u64::from(range.size))
            .map(|range| range.gpa + linear.wrapping_sub(range.linear))
    }

    /// An access as events show it.
    pub fn describe(&self, vcpu: u32, gpa: u64, va: Option<u64>, bytes: u64, direction: Direction) -> Access {
        let code = match &self.operands {
            Ok(operands) => operands.bytes,
            Err(unresolved) => unresolved.bytes,
        };
        Access {
            vcpu,
            rip: self.state.regs.rip.into(),
            cr3: self.state.sregs.cr3.into(),
            cpl: self.state.privilege(),
            va: va.map(Into::into),
            gpa: gpa.into(),
            bytes,
            direction,
            instruction: self.operands.as_ref().ok().map(Operands::text),
            instruction_bytes: (!code.as_slice().is_empty()).then(|| code.to_string()),
        }
    }

    /// What is known, for a diagnosis.
    pub fn text(&self) -> String {
        let touched = self.accesses.ranges.iter().map(text).collect::<Vec<_>>().join(", ");
        let what = match (&self.operands, self.delivery) {
            (_, Some(event)) => format!("the delivery of vector {}", event.vector),
            (Ok(operands), None) => format!("{} ({})", operands.text(), operands.bytes),
            (Err(unresolved), None) => format!("{} ({})", unresolved.reason, unresolved.bytes),
        };
        format!("{what}; it touches {touched}")
    }

    /// Every page that is touched by accesses of the kinds `of`, by guest-physical address.
    fn pages<'a>(&'a self, of: impl Fn(AccessKind) -> bool + 'a) -> impl Iterator<Item = u64> + 'a {
        self.accesses.ranges.iter().filter(move |access| of(access.kind)).flat_map(|access| {
            let first = access.gpa & !(PAGE_SIZE - 1);
            let last = access.gpa.saturating_add(u64::from(access.size.max(1)) - 1);
            (first..=last).step_by(PAGE_SIZE as usize)
        })
    }
}

/// The instruction that runs before the trap of `first` comes, if that holds its trap back.
fn next_instruction(state: &CpuState, space: &AddressSpace, first: &Operands) -> Option<Operands> {
    if first.hazard != StepHazard::HoldsTrapBack {
        return None;
    }
    let mut after = state.clone();
    after.regs.rip = first.next_rip();
    after.regs.rsp = after.regs.rsp.wrapping_add_signed(first.stack_moves());
    operands::operands(&after, space).ok()
}

/// What KVM is delivering, or was when it met guarded memory.
pub(super) fn event_in_flight(events: &kvm_vcpu_events) -> Option<Delivery> {
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

pub(super) fn direction(kind: AccessKind) -> Option<Direction> {
    match kind {
        AccessKind::Walk => Some(Direction::Walk),
        AccessKind::Fetch => Some(Direction::Fetch),
        AccessKind::Load => Some(Direction::Read),
        AccessKind::ReadModifyWrite => Some(Direction::ReadWrite),
        AccessKind::Store | AccessKind::FullLineStore => Some(Direction::Write),
        AccessKind::CacheControl | AccessKind::Prefetch | AccessKind::Probe => None,
    }
}

fn text(range: &PhysicalAccess) -> String {
    format!("{:?} of {} bytes at {:#x}", range.kind, range.size, range.gpa)
}
