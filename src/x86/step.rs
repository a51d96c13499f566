//! How to let one instruction through without the guest noticing.
//!
//! KVM steps with RFLAGS.TF (KVM_GUESTDBG_SINGLESTEP), which PUSHF stores, which SYSCALL, INT and exceptions clear
//! before the trap comes, and which KVM takes out of the flags again when stepping is turned off, the guest's own
//! included (arch/x86/kvm/x86.c, kvm_get_rflags and kvm_arch_vcpu_ioctl_set_guest_debug). Where the trap would be
//! lost, a breakpoint register at the instruction that comes next stops the vCPU instead (KVM_GUESTDBG_USE_HW_BP): no
//! flag is touched. What PUSHF stored is put right afterwards, with no vCPU running meanwhile.
//!
//! An instruction that may raise an exception is stepped with the guest's interrupt descriptor table out of reach:
//! the delivery stops before anything of it is seen, and goes on once the trap flag is the guest's own again.

use super::operands::{Context, Operands, StepHazard};
use super::state::{CodeWidth, CpuState};
use super::walk::PhysRead;

/// RFLAGS.TF.
const RFLAGS_TF: u64 = 1 << 8;
/// DR6.BS: a single step.
const DR6_BS: u64 = 1 << 14;
/// Vector of the general-protection exception.
const GENERAL_PROTECTION: u8 = 13;

/// How the vCPU is stopped after the instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepMethod {
    /// By the single-step trap. The instruction may leave to the monitor first, and is finished by the next run.
    Trap,
    /// By a breakpoint register on this linear address, without the single-step trap.
    BreakAt {
        /// Where the instruction leads.
        target: u64,
    },
    /// By whichever comes first: the flag that the instruction loads decides about the trap on some processors.
    TrapOrBreakAt {
        /// Where the instruction leads.
        target: u64,
    },
    /// By the limit of time alone: where it leads cannot be told.
    TimeLimit,
}

impl StepMethod {
    /// Whether the single-step trap is on.
    pub fn traps(self) -> bool {
        matches!(self, Self::Trap | Self::TrapOrBreakAt { .. })
    }

    /// The linear address of the breakpoint.
    pub fn breakpoint(self) -> Option<u64> {
        match self {
            Self::BreakAt { target } | Self::TrapOrBreakAt { target } => Some(target),
            Self::Trap | Self::TimeLimit => None,
        }
    }
}

/// What to do for one instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepPlan {
    /// How the vCPU is stopped.
    pub method: StepMethod,
    /// TF as the guest must find it once the instruction is done.
    pub trap_flag: bool,
    /// The bits of DR6 with which the guest is owed a #DB of its own after this instruction: it steps itself (BS), or
    /// asked for the exception (none).
    pub owed: Option<u64>,
    /// Linear address of the byte whose bit 0 is the trap flag that the instruction stores.
    pub stored_trap_flag: Option<u64>,
    /// The instruction may raise an exception.
    pub may_raise: bool,
}

/// The MSRs that SYSCALL and SYSENTER jump to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SystemCallTargets {
    /// IA32_LSTAR: SYSCALL in 64-bit mode.
    pub lstar: u64,
    /// CSTAR: SYSCALL in compatibility mode, on AMD.
    pub cstar: u64,
    /// IA32_FMASK: the flags that SYSCALL clears.
    pub fmask: u64,
}

/// Chooses how to step the instruction; `targets` counts only for SYSCALL.
pub fn plan_step(
    state: &CpuState,
    memory: &impl PhysRead,
    operands: &Operands,
    targets: SystemCallTargets,
) -> StepPlan {
    let own = state.regs.rflags & RFLAGS_TF != 0;
    let trap = StepPlan { may_raise: operands.may_raise(state), ..StepPlan::unknown(state) };
    match operands.hazard {
        StepHazard::None
        | StepHazard::LeavesToMonitor
        | StepHazard::Transaction
        | StepHazard::SystemEnter
        | StepHazard::HoldsTrapBack
        | StepHazard::Halts => trap,
        StepHazard::PushesFlags => {
            StepPlan { stored_trap_flag: operands.stored_trap_flag().filter(|_| !own), ..trap }
        }
        StepHazard::PopsFlags => {
            let flags = stack_word(state, memory, operands, 0);
            StepPlan { trap_flag: loaded(flags), ..trap }
        }
        StepHazard::ReturnsFromInterrupt => {
            let target = stack_word(state, memory, operands, 0);
            let flags = stack_word(state, memory, operands, 2);
            let method = target.map_or(StepMethod::Trap, |target| StepMethod::TrapOrBreakAt { target });
            StepPlan { trap_flag: loaded(flags), method, ..trap }
        }
        StepHazard::SystemCall => {
            let wide = state.code_width() == CodeWidth::Bits64;
            let target = if wide { targets.lstar } else { targets.cstar };
            let trap_flag = own && targets.fmask & RFLAGS_TF == 0;
            let owed = trap_flag.then_some(DR6_BS);
            StepPlan { method: StepMethod::BreakAt { target }, trap_flag, owed, ..trap }
        }
        StepHazard::ReturnsFromSystemCall => {
            // SYSRET takes RIP from RCX and the flags from R11; SYSEXIT takes RIP from RDX and keeps the flags.
            let sysret = operands.is_sysret();
            let target = if sysret { state.regs.rcx } else { state.regs.rdx };
            let trap_flag = if sysret { state.regs.r11 & RFLAGS_TF != 0 } else { own };
            // Unlike IRET, SYSRET traps at once where it loads TF (`do_syscall_64` in arch/x86/entry).
            let owed = if sysret { trap_flag.then_some(DR6_BS) } else { trap.owed };
            StepPlan { method: StepMethod::BreakAt { target }, trap_flag, owed, ..trap }
        }
        // KVM intercepts the exception of INT1 while it steps, and the guest gets it afterwards.
        StepHazard::SoftwareInterrupt if operands.is_int1() => StepPlan { owed: Some(0), ..trap },
        StepHazard::SoftwareInterrupt => {
            // INTO without overflow does nothing.
            let Some(vector) = operands.interrupt_vector(state) else { return trap };
            let Some(target) = handler(state, memory, vector) else { return trap };
            let method = StepMethod::BreakAt { target };
            StepPlan { method, trap_flag: false, owed: None, may_raise: false, ..trap }
        }
    }
}

impl StepPlan {
    /// The plan for an instruction of which nothing is known.
    pub fn unknown(state: &CpuState) -> Self {
        let own = state.regs.rflags & RFLAGS_TF != 0;
        Self {
            method: StepMethod::Trap,
            trap_flag: own,
            owed: own.then_some(DR6_BS),
            stored_trap_flag: None,
            may_raise: true,
        }
    }

    /// The plan for the delivery of an event: the vCPU stops at its handler. The trap flag goes to the handler's
    /// frame as it is. Where no handler can be found the guest is about to fault, and is stopped by the limit of time.
    pub fn delivery(state: &CpuState, memory: &impl PhysRead, vector: u8) -> Self {
        let method = handler(state, memory, vector)
            .map_or(StepMethod::TimeLimit, |target| StepMethod::BreakAt { target });
        Self { method, trap_flag: false, owed: None, stored_trap_flag: None, may_raise: false }
    }

    /// The plan for this instruction and the next one, which a held-back trap takes along.
    pub fn and_then(self, next: Self) -> Self {
        Self {
            method: next.method,
            trap_flag: next.trap_flag,
            owed: self.owed.or(next.owed),
            stored_trap_flag: next.stored_trap_flag,
            may_raise: self.may_raise || next.may_raise,
        }
    }
}

/// Whether a flags image has TF set.
fn loaded(flags: Option<u64>) -> bool {
    flags.is_some_and(|flags| flags & RFLAGS_TF != 0)
}

/// Word `index` of what the instruction pops.
fn stack_word(state: &CpuState, memory: &impl PhysRead, operands: &Operands, index: u64) -> Option<u64> {
    let context = Context::new(state, memory, operands.instruction());
    let size = operands.popped_word()?;
    let bytes = context.read::<8>(context.stack_pointer().wrapping_add(index * size));
    // The last word may end where the mapping ends.
    let word = match (bytes, size) {
        (Some(bytes), _) => u64::from_le_bytes(bytes),
        (None, 4) => {
            u64::from(u32::from_le_bytes(context.read(context.stack_pointer().wrapping_add(index * 4))?))
        }
        (None, 2) => {
            u64::from(u16::from_le_bytes(context.read(context.stack_pointer().wrapping_add(index * 2))?))
        }
        (None, _) => return None,
    };
    Some(match size {
        2 => word & 0xffff,
        4 => word & 0xffff_ffff,
        _ => word,
    })
}

/// Linear address of the handler that INT `vector` reaches: that of #GP where the gate's privilege forbids it.
fn handler(state: &CpuState, memory: &impl PhysRead, vector: u8) -> Option<u64> {
    let instruction = iced_x86::Instruction::default();
    let context = Context::new(state, memory, &instruction);
    if !state.protected_mode() {
        let pointer = context.read::<4>(state.sregs.idt.base.wrapping_add(4 * u64::from(vector)))?;
        let (offset, segment) = ([pointer[0], pointer[1]], [pointer[2], pointer[3]]);
        return Some(u64::from(u16::from_le_bytes(segment)) * 16 + u64::from(u16::from_le_bytes(offset)));
    }
    let gate = |vector: u8| {
        let size = if state.long_mode() { 16 } else { 8 };
        let at = state.sregs.idt.base.wrapping_add(size * u64::from(vector));
        let low = context.read::<8>(at)?;
        let high = if state.long_mode() { context.read::<4>(at.wrapping_add(8))? } else { [0; 4] };
        let offset = [low[0], low[1], low[6], low[7], high[0], high[1], high[2], high[3]];
        // Present, and an interrupt or trap gate.
        (low[5] & 0x8e == 0x8e).then_some((u64::from_le_bytes(offset), (low[5] >> 5) & 3))
    };
    match gate(vector) {
        Some((offset, level)) if level >= state.privilege() => Some(offset),
        _ => gate(GENERAL_PROTECTION).map(|(offset, _)| offset),
    }
}

#[cfg(test)]
#[path = "step_test.rs"]
mod tests;
