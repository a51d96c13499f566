//! How to let one instruction through without the guest noticing.
//!
//! KVM steps with RFLAGS.TF (KVM_GUESTDBG_SINGLESTEP), which PUSHF stores, which SYSCALL, INT and exceptions clear
//! before the trap comes, and which KVM takes out of the flags again when stepping is turned off, the guest's own
//! included (arch/x86/kvm/x86.c, kvm_get_rflags and kvm_arch_vcpu_ioctl_set_guest_debug). Where TF would show or be
//! lost, the stepper stops the vCPU with a breakpoint register at the instruction that comes next instead
//! (KVM_GUESTDBG_USE_HW_BP): no flag is touched.

use super::operands::{Context, Operands, StepHazard};
use super::state::{CodeWidth, CpuState};
use super::walk::PhysRead;

/// RFLAGS.TF.
const RFLAGS_TF: u64 = 1 << 8;
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
    /// By the single-step trap, which comes after the next instruction as well: list that one's accesses too before
    /// the page is opened.
    TrapAfterTwo,
    /// Not run: the monitor moves RIP to the next instruction and halts the vCPU.
    Halt,
    /// Not run: the monitor injects #UD, which is all that the instruction does.
    InvalidOpcode,
    /// There is no way to stop it: it enters another context.
    NotSupported,
}

/// What to do for one instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepPlan {
    /// How the vCPU is stopped.
    pub method: StepMethod,
    /// TF as the guest must find it afterwards: written back once stepping by trap is off.
    pub trap_flag: bool,
    /// The guest steps itself, and is owed its own #DB (with DR6.BS) after this instruction.
    pub owes_debug: bool,
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

/// Chooses how to step the instruction.
///
/// The plan holds for an instruction that completes. One whose access list ends in a guest fault is not stepped at
/// all, and a step is bounded by a timer for the faults that cannot be foreseen.
pub fn plan_step(
    state: &CpuState,
    memory: &impl PhysRead,
    operands: &Operands,
    targets: SystemCallTargets,
) -> StepPlan {
    let own = state.regs.rflags & RFLAGS_TF != 0;
    let next = linear_code(state, operands.next_rip());
    let kept = |method| StepPlan { method, trap_flag: own, owes_debug: own };
    match operands.hazard {
        StepHazard::None
        | StepHazard::LeavesToMonitor
        | StepHazard::Transaction
        | StepHazard::SystemEnter => kept(StepMethod::Trap),
        StepHazard::LoadsStackSegment => kept(StepMethod::TrapAfterTwo),
        StepHazard::PushesFlags => kept(StepMethod::BreakAt { target: next }),
        StepHazard::PopsFlags => {
            let flags = stack_word(state, memory, operands, 0);
            StepPlan { trap_flag: loaded(flags), ..kept(StepMethod::BreakAt { target: next }) }
        }
        StepHazard::ReturnsFromInterrupt => {
            let target = stack_word(state, memory, operands, 0);
            let flags = stack_word(state, memory, operands, 2);
            let method = target.map_or(StepMethod::Trap, |target| StepMethod::BreakAt { target });
            StepPlan { trap_flag: loaded(flags), ..kept(method) }
        }
        StepHazard::SystemCall => {
            let wide = state.code_width() == CodeWidth::Bits64;
            let target = if wide { targets.lstar } else { targets.cstar };
            let trap_flag = own && targets.fmask & RFLAGS_TF == 0;
            StepPlan { method: StepMethod::BreakAt { target }, trap_flag, owes_debug: trap_flag }
        }
        StepHazard::ReturnsFromSystemCall => {
            // SYSRET takes RIP from RCX and the flags from R11; SYSEXIT takes RIP from RDX and keeps the flags.
            let sysret = operands.is_sysret();
            let target = if sysret { state.regs.rcx } else { state.regs.rdx };
            let trap_flag = if sysret { state.regs.r11 & RFLAGS_TF != 0 } else { own };
            StepPlan { trap_flag, ..kept(StepMethod::BreakAt { target }) }
        }
        StepHazard::SoftwareInterrupt => {
            let method = match operands.interrupt_vector(state) {
                // INTO without overflow does nothing.
                None => return kept(StepMethod::BreakAt { target: next }),
                Some(vector) => handler(state, memory, vector)
                    .map_or(StepMethod::NotSupported, |target| StepMethod::BreakAt { target }),
            };
            StepPlan { method, trap_flag: false, owes_debug: false }
        }
        StepHazard::Halts => kept(StepMethod::Halt),
        StepHazard::Faults => {
            StepPlan { method: StepMethod::InvalidOpcode, trap_flag: own, owes_debug: false }
        }
        StepHazard::SwitchesContext => kept(StepMethod::NotSupported),
    }
}

/// The linear address of an instruction pointer.
fn linear_code(state: &CpuState, rip: u64) -> u64 {
    if state.code_width() == CodeWidth::Bits64 {
        rip
    } else {
        state.sregs.cs.base.wrapping_add(rip) & 0xffff_ffff
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
