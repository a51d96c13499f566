//! Which instructions can raise an exception although all their operands are reachable.
//!
//! A step must end cleanly when its instruction faults, which costs more than a step that cannot. The list of those
//! that cannot is short and holds what programs do with memory all day.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::Operands;
use crate::x86::state::CpuState;

/// CR0.AM: alignment is checked where EFLAGS.AC asks for it.
const CR0_AM: u64 = 1 << 18;

impl Operands {
    /// Whether the instruction may raise an exception of its own: any but a page fault of a listed access.
    pub fn may_raise(&self, state: &CpuState) -> bool {
        let aligned = state.privilege() == 3 && state.alignment_check() && state.sregs.cr0 & CR0_AM != 0;
        // Outside 64-bit mode segment limits are checked.
        aligned || state.code_width().bits() != 64 || !is_quiet(&self.instruction)
    }
}

fn is_quiet(instruction: &Instruction) -> bool {
    use Mnemonic::*;
    let general = |kind, register: Register| kind != OpKind::Register || register.is_gpr();
    let plain = (0..instruction.op_count())
        .all(|operand| general(instruction.op_kind(operand), instruction.op_register(operand)));
    plain
        && matches!(
            instruction.mnemonic(),
            Mov | Movzx
                | Movsx
                | Movsxd
                | Movbe
                | Movnti
                | Add
                | Adc
                | Sub
                | Sbb
                | And
                | Or
                | Xor
                | Not
                | Neg
                | Inc
                | Dec
                | Cmp
                | Test
                | Xchg
                | Xadd
                | Cmpxchg
                | Bt
                | Bts
                | Btr
                | Btc
                | Shl
                | Shr
                | Sar
                | Rol
                | Ror
                | Imul
                | Mul
                | Lea
                | Nop
                | Push
                | Pop
                | Movsb
                | Movsw
                | Movsd
                | Movsq
                | Stosb
                | Stosw
                | Stosd
                | Stosq
                | Lodsb
                | Lodsw
                | Lodsd
                | Lodsq
                | Cmpsb
                | Cmpsw
                | Cmpsd
                | Cmpsq
                | Scasb
                | Scasw
                | Scasd
                | Scasq
        )
}

#[cfg(test)]
mod tests {
    use super::super::harness::{guest, hex};
    use super::super::operands;

    fn may_raise(code: &str) -> bool {
        let (state, memory) = guest(&hex(code));
        operands(&state, &memory).unwrap().may_raise(&state)
    }

    #[test]
    fn what_only_moves_and_counts_raises_nothing_more() {
        for code in ["488b02", "488902", "f3a4", "f348ab", "f0480fc102", "50", "8f00", "e800000000"] {
            let expected = code.starts_with("e8");
            assert_eq!(may_raise(code), expected, "{code}");
        }
    }

    #[test]
    fn what_divides_checks_alignment_or_changes_mode_may() {
        // div, movaps, fld, mov ss, mov cr3, wrmsr, ud2, iretq, syscall, movsd xmm
        for code in ["48f732", "0f2802", "d902", "8ed0", "0f22d8", "0f30", "0f0b", "48cf", "0f05", "f20f1002"]
        {
            assert!(may_raise(code), "{code}");
        }
    }

    #[test]
    fn a_program_that_wants_alignment_checked_may_see_a_fault_anywhere() {
        let (mut state, memory) = guest(&hex("488b02"));
        state.sregs.ss.dpl = 3;
        state.sregs.cr0 |= super::CR0_AM;
        state.regs.rflags |= 1 << 18;
        assert!(operands(&state, &memory).unwrap().may_raise(&state));
    }
}
