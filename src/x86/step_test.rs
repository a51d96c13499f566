//! Each corner of stepping by name.

use super::*;
use crate::x86::operands::harness::{Memory, guest, hex};
use crate::x86::operands::operands;

const TARGETS: SystemCallTargets =
    SystemCallTargets { lstar: 0xffff_8000_0000_0000, cstar: 0x1234, fmask: 0x4_7700 };

fn plan(code: &str, adjust: impl FnOnce(&mut CpuState, &mut Memory)) -> StepPlan {
    let (mut state, mut memory) = guest(&hex(code));
    adjust(&mut state, &mut memory);
    plan_step(&state, &memory, &operands(&state, &memory).unwrap(), TARGETS)
}

fn own(state: &mut CpuState, _: &mut Memory) {
    state.regs.rflags |= 1 << 8;
}

/// A plan for an instruction that raises nothing.
fn quiet(method: StepMethod) -> StepPlan {
    StepPlan { method, trap_flag: false, owed: None, stored_trap_flag: None, may_raise: false }
}

/// A plan for one that may raise an exception.
fn wary(method: StepMethod) -> StepPlan {
    StepPlan { may_raise: true, ..quiet(method) }
}

fn at(target: u64) -> StepMethod {
    StepMethod::BreakAt { target }
}

#[test]
fn ordinary_instructions_trap() {
    for code in ["488b02", "f3a4"] {
        assert_eq!(plan(code, |_, _| {}), quiet(StepMethod::Trap), "{code}");
    }
    for code in ["ff12", "eb10", "0f30", "ec", "48f732", "0f2802"] {
        assert_eq!(plan(code, |_, _| {}), wary(StepMethod::Trap), "{code}");
    }
}

#[test]
fn a_guest_that_steps_itself_keeps_its_flag_and_gets_its_trap() {
    let expected = StepPlan { trap_flag: true, owed: Some(1 << 14), ..quiet(StepMethod::Trap) };
    assert_eq!(plan("488b02", own), expected);
}

#[test]
fn pushf_stores_the_guests_own_flag() {
    let image = StepPlan { stored_trap_flag: Some(0x1_fff9), ..wary(StepMethod::Trap) };
    assert_eq!(plan("9c", |_, _| {}), image, "the second byte of the image on the stack is put right");
    let stepped = StepPlan { trap_flag: true, owed: Some(1 << 14), ..wary(StepMethod::Trap) };
    assert_eq!(plan("9c", own), stepped, "the guest's own flag is stored as it is");
}

#[test]
fn popf_leaves_the_flag_that_it_loads() {
    assert_eq!(plan("9d", |_, _| {}), wary(StepMethod::Trap));
    let sets = |_: &mut CpuState, memory: &mut Memory| memory.put(0x2_0000, &0x302u64.to_le_bytes());
    assert_eq!(plan("9d", sets), StepPlan { trap_flag: true, ..wary(StepMethod::Trap) });
    let clears = |state: &mut CpuState, memory: &mut Memory| {
        own(state, memory);
        memory.put(0x2_0000, &2u64.to_le_bytes());
    };
    assert_eq!(plan("9d", clears), StepPlan { owed: Some(1 << 14), ..wary(StepMethod::Trap) });
}

#[test]
fn iret_stops_where_it_returns_to() {
    let frame = |flags: u64| {
        move |_: &mut CpuState, memory: &mut Memory| {
            memory.put(0x2_0000, &0x7fff_1234_5678u64.to_le_bytes());
            memory.put(0x2_0010, &flags.to_le_bytes());
        }
    };
    let there = StepMethod::TrapOrBreakAt { target: 0x7fff_1234_5678 };
    assert_eq!(plan("48cf", frame(2)), wary(there));
    assert!(plan("48cf", frame(0x102)).trap_flag);
}

#[test]
fn syscall_stops_at_the_entry_and_r11_stays_clean() {
    assert_eq!(plan("0f05", |_, _| {}), wary(at(TARGETS.lstar)));
    assert_eq!(plan("0f05", own), wary(at(TARGETS.lstar)), "the mask clears the flag, and no trap is owed");
    let compatibility = |state: &mut CpuState, _: &mut Memory| (state.sregs.cs.l, state.sregs.cs.db) = (0, 1);
    assert_eq!(plan("0f05", compatibility).method, at(TARGETS.cstar));
}

#[test]
fn sysret_and_sysexit_stop_in_the_program() {
    let registers = |state: &mut CpuState, _: &mut Memory| {
        (state.regs.rcx, state.regs.rdx, state.regs.r11) = (0x40_0000, 0x50_0000, 0x302);
    };
    let traps = StepPlan { trap_flag: true, owed: Some(1 << 14), ..wary(at(0x40_0000)) };
    assert_eq!(plan("480f07", registers), traps, "SYSRET traps at once where it loads the flag");
    assert_eq!(plan("480f35", registers), wary(at(0x50_0000)));
}

#[test]
fn software_interrupts_stop_in_the_handler() {
    let gate = |_: &mut CpuState, memory: &mut Memory| {
        memory.put(0x9_1000 + 16 * 0x80, &hex("7856300000ee3412ffffffff00000000"));
    };
    assert_eq!(plan("cd80", gate), quiet(at(0xffff_ffff_1234_5678)));
    assert_eq!(
        plan("cd80", |state, memory| {
            own(state, memory);
            gate(state, memory);
        }),
        quiet(at(0xffff_ffff_1234_5678)),
        "INT clears the flag and cancels the trap"
    );
    let forbidden = |state: &mut CpuState, memory: &mut Memory| {
        state.sregs.ss.dpl = 3;
        memory.put(0x9_1000 + 16 * 3, &hex("00003000008e0000"));
        memory.put(0x9_1000 + 16 * 13, &hex("45233000008e0100ffffffff00000000"));
    };
    assert_eq!(plan("cc", forbidden), quiet(at(0xffff_ffff_0001_2345)), "the gate's privilege makes it #GP");
    let none = |_: &mut CpuState, memory: &mut Memory| memory.put(0x9_1000 + 16 * 0x80, &[0; 16]);
    assert_eq!(plan("cd80", none), wary(StepMethod::Trap), "without a handler it faults");
}

#[test]
fn int1_owes_the_exception_that_is_intercepted() {
    assert_eq!(plan("f1", |_, _| {}), StepPlan { owed: Some(0), ..wary(StepMethod::Trap) });
}

#[test]
fn a_delivery_stops_in_its_handler() {
    let (state, mut memory) = guest(&hex("90"));
    memory.put(0x9_1000 + 16 * 14, &hex("78563000008e3412ffffffff00000000"));
    assert_eq!(StepPlan::delivery(&state, &memory, 14), quiet(at(0xffff_ffff_1234_5678)));
    assert_eq!(StepPlan::delivery(&state, &memory, 0x55), quiet(StepMethod::TimeLimit));
}

#[test]
fn mov_ss_and_sti_take_the_next_instruction_along() {
    let next = plan("9c", |_, _| {});
    for code in ["8ed0", "fb"] {
        let both = plan(code, |_, _| {}).and_then(next);
        assert_eq!((both.method, both.may_raise), (StepMethod::Trap, true), "{code}");
        assert_eq!(both.stored_trap_flag, next.stored_trap_flag, "{code}");
    }
}

#[test]
fn halts_and_invalid_opcodes_are_left_to_the_processor() {
    assert_eq!(plan("f4", |_, _| {}), wary(StepMethod::Trap));
    assert_eq!(plan("0f0b", |_, _| {}), wary(StepMethod::Trap));
}

#[test]
fn a_frame_at_the_end_of_memory_is_read_as_far_as_it_goes() {
    let end = |state: &mut CpuState, memory: &mut Memory| {
        state.sregs.cs.l = 0;
        state.sregs.cs.db = 1;
        state.regs.rsp = (1 << 30) - 12;
        memory.put(state.regs.rsp, &hex("785634120010000002030000"));
    };
    let there = StepMethod::TrapOrBreakAt { target: 0x1234_5678 };
    assert_eq!(plan("cf", end), StepPlan { trap_flag: true, ..wary(there) });
}
