//! Operands of system instructions.

use super::{Form, LOAD, STORE};
use crate::image::IDT_LIMIT;
use crate::layout::*;
use iced_x86::code_asm::*;

/// A pseudo-descriptor: limit and base.
const fn pointer(limit: u16, base: u64) -> [u8; 10] {
    let (l, b) = (limit.to_le_bytes(), base.to_le_bytes());
    [l[0], l[1], b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]
}

/// A far pointer with an offset of 64 bits to the code behind an instruction of three bytes.
const FAR_TARGET: [u8; 10] = far(CODE_VA + 3, OTHER_CODE);
const FAR_DATA: [u8; 10] = far(0x1122_3344_5566_7788, OTHER_DATA);
const fn far(offset: u64, selector: u16) -> [u8; 10] {
    let (o, s) = (offset.to_le_bytes(), selector.to_le_bytes());
    [o[0], o[1], o[2], o[3], o[4], o[5], o[6], o[7], s[0], s[1]]
}
const TASK_SELECTOR: [u8; 2] = OTHER_TASK.to_le_bytes();
const DATA_SELECTOR: [u8; 2] = OTHER_DATA.to_le_bytes();
const NEW_GDT: [u8; 10] = pointer(0x67, GDT);
const NEW_IDT: [u8; 10] = pointer(IDT_LIMIT, IDT);

pub fn forms() -> Vec<Form> {
    const LOADED: Form = Form { privileged: true, size: 10, ..LOAD };
    const STORED: Form = Form { privileged: true, size: 10, ..STORE };
    const SELECTOR: Form = Form { privileged: true, size: 2, operand: &DATA_SELECTOR, ..LOAD };
    vec![
        Form { name: "lgdt m", code: |a| a.lgdt(ptr(rsi)), operand: &NEW_GDT, ..LOADED },
        Form { name: "lidt m", code: |a| a.lidt(ptr(rsi)), operand: &NEW_IDT, ..LOADED },
        Form { name: "sgdt m", code: |a| a.sgdt(ptr(rsi)), ..STORED },
        Form { name: "sidt m", code: |a| a.sidt(ptr(rsi)), ..STORED },
        Form { name: "lldt m", code: |a| a.lldt(word_ptr(rsi)), operand: &[0, 0], ..SELECTOR },
        Form { name: "ltr m", code: |a| a.ltr(word_ptr(rsi)), operand: &TASK_SELECTOR, ..SELECTOR },
        Form { name: "lmsw m", code: |a| a.lmsw(word_ptr(rsi)), operand: &[0x33, 0], ..SELECTOR },
        Form { name: "verr m", code: |a| a.verr(word_ptr(rsi)), ..SELECTOR },
        Form { name: "lar r, m", code: |a| a.lar(eax, dword_ptr(rsi)), ..SELECTOR },
        Form { name: "lsl r, m", code: |a| a.lsl(eax, dword_ptr(rsi)), ..SELECTOR },
        Form { name: "mov sreg, m", code: |a| a.mov(ds, word_ptr(rsi)), ..SELECTOR },
        Form {
            name: "lss r, m",
            code: |a| a.lss(eax, fword_ptr(rsi)),
            size: 6,
            operand: &[1, 2, 3, 4, 0x40, 0],
            ..SELECTOR
        },
        Form {
            name: "lfs r, m",
            code: |a| a.lfs(eax, fword_ptr(rsi)),
            size: 6,
            operand: &[1, 2, 3, 4, 0x40, 0],
            ..SELECTOR
        },
        Form { name: "jmp far m", code: |a| a.db(&[0x48, 0xff, 0x2e]), operand: &FAR_TARGET, ..LOADED },
        Form { name: "call far m", code: |a| a.db(&[0x48, 0xff, 0x1e]), operand: &FAR_TARGET, ..LOADED },
        Form {
            name: "lgs r, m",
            note: "64 bits",
            code: |a| a.db(&[0x48, 0x0f, 0xb5, 0x06]),
            operand: &FAR_DATA,
            ..LOADED
        },
        Form { name: "sldt m", size: 2, code: |a| a.sldt(word_ptr(rsi)), ..STORED },
        Form { name: "str m", size: 2, code: |a| a.str(word_ptr(rsi)), ..STORED },
        Form { name: "smsw m", size: 2, code: |a| a.smsw(word_ptr(rsi)), ..STORED },
        Form { name: "mov m, sreg", size: 2, code: |a| a.mov(word_ptr(rsi), ss), ..STORED },
    ]
}
