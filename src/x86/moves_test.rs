use super::*;
use crate::x86::physical::touched;
use crate::x86::walk::PhysRead;

/// Where the operand is.
const DATA: u64 = 0x2000;

/// Code at 0.
struct Memory(Vec<u8>);

impl PhysRead for Memory {
    fn read_u64(&self, gpa: u64) -> Option<u64> {
        let mut bytes = [0; 8];
        for (byte, value) in bytes.iter_mut().zip(self.0.iter().skip(gpa as usize)) {
            *byte = *value;
        }
        Some(u64::from_le_bytes(bytes))
    }
}

/// Flat protected mode without paging, RBX at the operand.
fn state(bits: u32) -> CpuState {
    let mut state = CpuState { physical_bits: 36, ..Default::default() };
    state.sregs.cr0 = 1;
    if bits == 64 {
        // Long mode as the decoder sees it, with linear addresses that are physical ones.
        (state.sregs.efer, state.sregs.cs.l) = (1 << 10, 1);
    } else {
        state.sregs.cs.db = 1;
    }
    state.regs.rbx = DATA;
    state.regs.rax = 0x1122_3344_5566_7788;
    state.regs.rcx = 0xffff_ffff_ffff_ffff;
    state
}

fn found(state: &CpuState, code: &[u8]) -> Option<Move> {
    let (operands, accesses) = touched(state, &Memory(code.to_vec()));
    plain_move(state, &operands.expect("an instruction"), &accesses)
}

/// What a load of `value` leaves.
fn loaded(bits: u32, code: &[u8], value: u64) -> kvm_regs {
    let state = state(bits);
    let found = found(&state, code).expect("a move");
    assert!(matches!(found.direction, Direction::Load { .. }) && found.gpa == DATA);
    let regs = found.finish(&state, value);
    assert_eq!(regs.rip, code.len() as u64);
    regs
}

#[test]
fn loads_fill_registers_as_the_processor_does() {
    const VALUE: u64 = 0x8182_8384_8586_8788;
    assert_eq!(loaded(32, &[0x8b, 0x0b], VALUE).rcx, 0x8586_8788, "mov ecx, [ebx] clears the upper half");
    assert_eq!(loaded(32, &[0x66, 0x8b, 0x0b], VALUE).rcx, 0xffff_ffff_ffff_8788, "mov cx, [ebx]");
    assert_eq!(loaded(32, &[0x8a, 0x0b], VALUE).rcx, 0xffff_ffff_ffff_ff88, "mov cl, [ebx]");
    assert_eq!(loaded(32, &[0x8a, 0x2b], VALUE).rcx, 0xffff_ffff_ffff_88ff, "mov ch, [ebx]");
    assert_eq!(loaded(32, &[0x0f, 0xb6, 0x0b], VALUE).rcx, 0x88, "movzx ecx, byte [ebx]");
    assert_eq!(loaded(32, &[0x0f, 0xbf, 0x0b], VALUE).rcx, 0xffff_8788, "movsx ecx, word [ebx]");
    assert_eq!(
        loaded(32, &[0x66, 0x0f, 0xbe, 0x0b], VALUE).rcx,
        0xffff_ffff_ffff_ff88,
        "movsx cx, byte [ebx]"
    );
    assert_eq!(loaded(32, &[0xa1, 0, 0x20, 0, 0], VALUE).rax, 0x8586_8788, "mov eax, [0x2000]");
}

#[test]
fn stores_take_what_the_instruction_names() {
    let stored = |code: &[u8]| match found(&state(32), code).expect("a move") {
        Move { direction: Direction::Store(value), size, gpa: DATA, .. } => (value, size),
        other => panic!("{other:?}"),
    };
    assert_eq!(stored(&[0x89, 0x03]), (0x5566_7788, 4), "mov [ebx], eax");
    assert_eq!(stored(&[0x88, 0x23]), (0x77, 1), "mov [ebx], ah");
    assert_eq!(stored(&[0xc6, 0x03, 0x9a]).0 & 0xff, 0x9a, "mov byte [ebx], imm8");
    assert_eq!(stored(&[0xc7, 0x03, 1, 2, 3, 0x84]).0 & 0xffff_ffff, 0x8403_0201, "mov dword [ebx], imm32");
}

#[test]
fn everything_else_is_left_to_the_processor() {
    let plain = |state: &CpuState, code: &[u8]| found(state, code).is_some();
    let usual = state(32);
    for (code, what) in [
        (&[0x03, 0x03][..], "add eax, [ebx]"),
        (&[0x87, 0x03], "xchg [ebx], eax"),
        (&[0xf3, 0xa4], "rep movsb"),
        (&[0x0f, 0x10, 0x03], "movups xmm0, [ebx]"),
        (&[0x8c, 0x1b], "mov [ebx], ds"),
        (&[0x50], "push eax"),
        (&[0x8b, 0x43, 0x01], "mov eax, [ebx+1], not aligned"),
        (&[0x90], "nop"),
    ] {
        assert!(!plain(&usual, code), "{what}");
    }
    let mut stepping = usual.clone();
    stepping.regs.rflags |= RFLAGS_TF;
    assert!(!plain(&stepping, &[0x8b, 0x03]), "the guest steps itself");
    let mut resumed = usual;
    resumed.regs.rflags |= RFLAGS_RF;
    let load = found(&resumed, &[0x8b, 0x03]).expect("a move");
    assert_eq!(load.finish(&resumed, 1).rflags & RFLAGS_RF, 0, "the instruction is done");
}
