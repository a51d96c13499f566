//! Stack and control transfer: the operand is the stack, or a pointer.

use super::{Form, LOAD, MODIFY, STORE};
use crate::case::Before;
use crate::layout::*;
use iced_x86::code_asm::*;
use kvm_bindings::kvm_regs;

/// The stack pointer is at the operand.
fn popped(regs: &mut kvm_regs, at: u64) {
    regs.rsp = at;
}

/// The stack pointer is behind the operand.
fn pushed(regs: &mut kvm_regs, at: u64) {
    regs.rsp = at + 8;
}

/// Targets behind an instruction of one or two bytes.
const AFTER_1: [u8; 8] = (CODE_VA + 1).to_le_bytes();
const AFTER_2: [u8; 8] = (CODE_VA + 2).to_le_bytes();
const AFTER_3: [u8; 8] = (CODE_VA + 3).to_le_bytes();

pub fn forms() -> Vec<Form> {
    vec![
        Form { name: "pop r", code: |a| a.pop(rax), regs: popped, ..LOAD },
        Form { name: "pop m", code: |a| a.pop(qword_ptr(rdi)), regs: popped, ..LOAD },
        Form { name: "leave", code: |a| a.leave(), regs: |regs, at| regs.rbp = at, ..LOAD },
        Form { name: "ret", code: |a| a.ret(), regs: popped, operand: &AFTER_1, ..LOAD },
        Form { name: "ret imm", code: |a| a.ret_1(24), regs: popped, operand: &AFTER_3, ..LOAD },
        Form {
            name: "popf",
            code: |a| a.popfq(),
            regs: popped,
            // CF, ZF and IOPL 3, which user code may not change and needs for its last port write.
            operand: &[0x43, 0x32, 0, 0, 0, 0, 0, 0],
            ..LOAD
        },
        Form { name: "push m", code: |a| a.push(qword_ptr(rsi)), ..LOAD },
        Form { name: "call m", code: |a| a.call(qword_ptr(rsi)), operand: &AFTER_2, ..LOAD },
        Form { name: "jmp m", code: |a| a.jmp(qword_ptr(rsi)), operand: &AFTER_2, ..LOAD },
        Form { name: "push r", code: |a| a.push(rax), regs: pushed, ..STORE },
        Form { name: "push imm", code: |a| a.push(-2), regs: pushed, ..STORE },
        Form { name: "pushf", code: |a| a.pushfq(), regs: pushed, ..STORE },
        Form { name: "pop m", note: "destination", code: |a| a.pop(qword_ptr(rsi)), ..STORE },
        Form {
            name: "call rel",
            code: |a| {
                let mut next = a.create_label();
                a.call(next)?;
                a.set_label(&mut next)?;
                a.nop()
            },
            regs: pushed,
            ..STORE
        },
        Form { name: "enter", note: "no nesting", code: |a| a.enter(16, 0), regs: pushed, ..STORE },
        Form {
            name: "enter",
            note: "nested, the outer frame",
            // It has stored the frame pointer by then, below the stack pointer.
            state: Before::PageFault,
            code: |a| a.enter(16, 2),
            regs: |regs, at| regs.rbp = at + 8,
            ..LOAD
        },
        Form {
            name: "push m",
            note: "onto itself",
            code: |a| a.push(qword_ptr(rsi)),
            regs: |regs, at| regs.rsp = at + 8,
            ..MODIFY
        },
    ]
}
