//! What a single step would do beside the step.
//!
//! KVM steps by setting RFLAGS.TF, and some instructions show TF to the guest, lose the trap, or leave the guest.
//! [`crate::x86::step`] chooses the method by these classes.

use iced_x86::{Instruction, Mnemonic};

/// A reason to step an instruction with care.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StepHazard {
    /// None: the trap comes after the instruction, and TF shows nowhere.
    None,
    /// PUSHF stores TF.
    PushesFlags,
    /// POPF loads TF: the guest's own value must stay.
    PopsFlags,
    /// IRET loads TF with the rest of the flags, and may change mode and stack.
    ReturnsFromInterrupt,
    /// SYSCALL stores the flags in R11 and clears TF by SFMASK: no trap may come.
    SystemCall,
    /// SYSRET loads TF from R11.
    ReturnsFromSystemCall,
    /// SYSENTER keeps TF and goes to the kernel, where the trap surprises a guest that steps itself.
    SystemEnter,
    /// INT, INT3, INT1, INTO: the frame stores TF, and the gate clears it: no trap comes.
    SoftwareInterrupt,
    /// MOV SS and POP SS hold the trap back until after the next instruction, and so does STI on some processors
    /// (QEMU's among them).
    HoldsTrapBack,
    /// HLT and MWAIT: KVM moves past them, reports the step and halts (`kvm_emulate_halt`).
    Halts,
    /// Port input and output, and MSR accesses, may leave to the monitor and are finished by the next run.
    LeavesToMonitor,
    /// XBEGIN: the trap aborts the transaction.
    Transaction,
}

impl StepHazard {
    /// The class of an instruction.
    pub(super) fn of(instruction: &Instruction) -> Self {
        use Mnemonic::*;
        match instruction.mnemonic() {
            Pushf | Pushfd | Pushfq => Self::PushesFlags,
            Popf | Popfd | Popfq => Self::PopsFlags,
            Iret | Iretd | Iretq | Uiret => Self::ReturnsFromInterrupt,
            Syscall => Self::SystemCall,
            Sysret | Sysretq | Sysexit | Sysexitq => Self::ReturnsFromSystemCall,
            Sysenter => Self::SystemEnter,
            Int | Int1 | Int3 | Into => Self::SoftwareInterrupt,
            Mov | Pop if instruction.op0_register() == iced_x86::Register::SS => Self::HoldsTrapBack,
            Sti => Self::HoldsTrapBack,
            Hlt | Mwait | Mwaitx => Self::Halts,
            In | Out | Insb | Insw | Insd | Outsb | Outsw | Outsd | Rdmsr | Wrmsr => Self::LeavesToMonitor,
            Xbegin => Self::Transaction,
            _ => Self::None,
        }
    }
}
