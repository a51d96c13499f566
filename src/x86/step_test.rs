//! Each corner of stepping by name.

use super::*;
use crate::x86::operands::harness::{CODE, Memory, guest, hex};
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

fn quiet(method: StepMethod) -> StepPlan {
    StepPlan { method, trap_flag: false, owes_debug: false }
}

fn at(target: u64) -> StepMethod {
    StepMethod::BreakAt { target }
}

#[test]
fn ordinary_instructions_trap() {
    for code in ["488b02", "f3a4", "ff12", "eb10", "0f30", "ec"] {
        assert_eq!(plan(code, |_, _| {}), quiet(StepMethod::Trap), "{code}");
    }
}

#[test]
fn a_guest_that_steps_itself_keeps_its_flag_and_gets_its_trap() {
    let expected = StepPlan { method: StepMethod::Trap, trap_flag: true, owes_debug: true };
    assert_eq!(plan("488b02", own), expected);
}

#[test]
fn pushf_never_sees_the_flag() {
    assert_eq!(plan("9c", |_, _| {}), quiet(at(CODE + 1)));
    assert_eq!(plan("9c", own), StepPlan { method: at(CODE + 1), trap_flag: true, owes_debug: true });
}

#[test]
fn popf_leaves_the_flag_that_it_loads() {
    assert_eq!(plan("9d", |_, _| {}), quiet(at(CODE + 1)));
    let sets = |_: &mut CpuState, memory: &mut Memory| memory.put(0x2_0000, &0x302u64.to_le_bytes());
    assert_eq!(plan("9d", sets), StepPlan { method: at(CODE + 1), trap_flag: true, owes_debug: false });
    let clears = |state: &mut CpuState, memory: &mut Memory| {
        own(state, memory);
        memory.put(0x2_0000, &2u64.to_le_bytes());
    };
    assert_eq!(plan("9d", clears), StepPlan { method: at(CODE + 1), trap_flag: false, owes_debug: true });
}

#[test]
fn iret_stops_where_it_returns_to() {
    let frame = |flags: u64| {
        move |_: &mut CpuState, memory: &mut Memory| {
            memory.put(0x2_0000, &0x7fff_1234_5678u64.to_le_bytes());
            memory.put(0x2_0010, &flags.to_le_bytes());
        }
    };
    assert_eq!(plan("48cf", frame(2)), quiet(at(0x7fff_1234_5678)));
    assert!(plan("48cf", frame(0x102)).trap_flag);
}

#[test]
fn syscall_stops_at_the_entry_and_r11_stays_clean() {
    assert_eq!(plan("0f05", |_, _| {}), quiet(at(TARGETS.lstar)));
    assert_eq!(plan("0f05", own), quiet(at(TARGETS.lstar)), "the mask clears the flag, and no trap is owed");
    let compatibility = |state: &mut CpuState, _: &mut Memory| (state.sregs.cs.l, state.sregs.cs.db) = (0, 1);
    assert_eq!(plan("0f05", compatibility).method, at(TARGETS.cstar));
}

#[test]
fn sysret_and_sysexit_stop_in_the_program() {
    let registers = |state: &mut CpuState, _: &mut Memory| {
        (state.regs.rcx, state.regs.rdx, state.regs.r11) = (0x40_0000, 0x50_0000, 0x302);
    };
    assert_eq!(
        plan("480f07", registers),
        StepPlan { method: at(0x40_0000), trap_flag: true, owes_debug: false }
    );
    assert_eq!(plan("480f35", registers), quiet(at(0x50_0000)));
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
    assert_eq!(plan("cd80", none).method, StepMethod::NotSupported);
}

#[test]
fn mov_ss_takes_the_next_instruction_along() {
    assert_eq!(plan("8ed0", |_, _| {}), quiet(StepMethod::TrapAfterTwo));
    assert_eq!(plan("8ed8", |_, _| {}), quiet(StepMethod::Trap));
}

#[test]
fn halts_and_invalid_opcodes_are_not_run() {
    assert_eq!(plan("f4", |_, _| {}), quiet(StepMethod::Halt));
    assert_eq!(plan("0f0b", |_, _| {}), quiet(StepMethod::InvalidOpcode));
    assert!(!plan("0f0b", own).owes_debug, "a fault is no completed instruction");
}

#[test]
fn a_frame_at_the_end_of_memory_is_read_as_far_as_it_goes() {
    let end = |state: &mut CpuState, memory: &mut Memory| {
        state.sregs.cs.l = 0;
        state.sregs.cs.db = 1;
        state.regs.rsp = (1 << 30) - 12;
        memory.put(state.regs.rsp, &hex("785634120010000002030000"));
    };
    assert_eq!(plan("cf", end), StepPlan { method: at(0x1234_5678), trap_flag: true, owes_debug: false });
}
