//! The machine that the tests of operands and of stepping run on.

use std::collections::HashMap;

use kvm_bindings::kvm_segment;

use super::*;
use crate::x86::xstate::{ExtendedState, XsaveLayout};

pub(in crate::x86) const CODE: u64 = 0x10_0000;

/// Guest memory by byte; what was never written reads as zero.
#[derive(Clone, Default)]
pub(in crate::x86) struct Memory {
    bytes: HashMap<u64, u8>,
}

impl Memory {
    pub(in crate::x86) fn put(&mut self, gpa: u64, bytes: &[u8]) {
        self.bytes.extend(bytes.iter().enumerate().map(|(offset, &byte)| (gpa + offset as u64, byte)));
    }
}

impl PhysRead for Memory {
    fn read_u64(&self, gpa: u64) -> Option<u64> {
        let byte = |at: u64| u64::from(self.bytes.get(&at).copied().unwrap_or(0));
        (gpa < 1 << 30).then(|| (0..8).rev().fold(0, |word, offset| word << 8 | byte(gpa + offset)))
    }
}

pub(in crate::x86) fn hex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
}

fn dwords(values: [i32; 16]) -> [u8; 64] {
    values.map(i32::to_le_bytes).concat().try_into().unwrap()
}

fn qwords(values: [i64; 8]) -> [u8; 64] {
    values.map(i64::to_le_bytes).concat().try_into().unwrap()
}

fn extended() -> ExtendedState {
    let leaf = |index, size, offset, flags| kvm_bindings::kvm_cpuid_entry2 {
        function: 0xd,
        index,
        eax: size,
        ebx: offset,
        ecx: flags,
        ..Default::default()
    };
    let layout = XsaveLayout::from_cpuid(&[
        leaf(2, 256, 576, 0),
        leaf(5, 64, 1088, 0),
        leaf(9, 8, 2688, 0),
        leaf(11, 16, 0, 1),
    ]);
    let mut extended =
        ExtendedState { xcr0: 7, xss: 0x800, layout, vectors: [[0; 64]; 32], masks: [0; 8], pkru: 0 };
    extended.vectors[1] = dwords([0, 1, 2, -1, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]);
    extended.vectors[2] = dwords([-1, 0, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    extended.vectors[3] = qwords([5, 7, 1, 2, 0, 0, 0, 0]);
    extended.vectors[4] = qwords([-1, 0, 0, i64::MIN, 0, 0, 0, 0]);
    extended.masks[1] = 0b1011;
    extended
}

/// 64-bit code at CODE with an identity map of the first GiB, in user-accessible 1 GiB pages.
pub(in crate::x86) fn guest(code: &[u8]) -> (CpuState, Memory) {
    let mut memory = Memory::default();
    memory.put(0x1000, &0x2007u64.to_le_bytes());
    memory.put(0x2000, &0xe7u64.to_le_bytes());
    memory.put(CODE, code);
    // Selectors, descriptors and gates for the far transfers.
    memory.put(0x5_3000, &[0x10, 0]);
    memory.put(0x5_3004, &[0x20, 0]);
    memory.put(0x5_4000, &[0x18, 0]);
    memory.put(0x2_0008, &[0x33, 0]);
    memory.put(0x2_0020, &[0x2b, 0]);
    memory.put(0x9_0010, &hex("ffff0000009baf00"));
    memory.put(0x9_0030, &hex("ffff0000009baf00"));
    memory.put(0x9_1000 + 16 * 0x80, &hex("0000300000ee0000"));
    memory.put(0x9_1000 + 16 * 3, &hex("0000300001ee0000"));
    memory.put(0x9_2024, &0x3_0000u64.to_le_bytes());
    // An XSAVE header for XRSTOR: AVX present, SSE and x87 in their initial state.
    memory.put(0x6_0200, &4u64.to_le_bytes());
    let mut state =
        CpuState { physical_bits: 40, extended: Some(Box::new(extended())), ..Default::default() };
    state.sregs.cr0 = 0x8005_0033;
    state.sregs.cr3 = 0x1000;
    state.sregs.cr4 = 0x20;
    state.sregs.efer = 0xd01;
    state.sregs.cs = kvm_segment { l: 1, present: 1, s: 1, type_: 11, ..Default::default() };
    state.sregs.fs.base = 0x7_0000;
    state.sregs.gs.base = 0x8_0000;
    state.sregs.gdt.base = 0x9_0000;
    state.sregs.idt.base = 0x9_1000;
    state.sregs.tr.base = 0x9_2000;
    let regs = &mut state.regs;
    (regs.rax, regs.rcx, regs.rdx, regs.rbx) = (0x1_0010, 2, 0x1_2000, 0x1_1000);
    (regs.rsp, regs.rbp, regs.rsi, regs.rdi) = (0x2_0000, 0x2_1000, 0x3_0000, 0x4_0000);
    (regs.r8, regs.r9, regs.r10, regs.r11) = (0x5_1000, 0x5_2000, 0x5_3000, 0x5_4000);
    (regs.r12, regs.r13, regs.r14, regs.r15) = (-1i64 as u64, 33, 0x1_ffef, 0x6_0000);
    (regs.rip, regs.rflags) = (CODE, 2);
    (state, memory)
}
