//! What the delivery of an interrupt or exception touches: the gate, the code segment, the task state, the stack.
//!
//! SDM volume 3, 6.12.1 (protected mode) and 6.14 (64-bit mode).

use iced_x86::{Instruction, Mnemonic};

use super::super::state::CpuState;
use super::super::walk::PhysRead;
use super::{Access, AccessKind, Context};

/// An event on its way to its handler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Delivery {
    /// Vector number.
    pub vector: u8,
    /// An error code is pushed.
    pub error_code: bool,
}

/// Adds an access to the list.
fn add(list: &mut Vec<Access>, kind: AccessKind, address: u64, size: u32) {
    list.push(Access { kind, address, size, implicit: true });
}

/// Lists what the delivery of an event touches, in the order in which the processor needs it.
///
/// The list ends where a table cannot be read, since the rest depends on what stands there. Task gates and
/// virtual-8086 frames are not listed beyond the gate.
pub fn delivery_accesses(state: &CpuState, memory: &impl PhysRead, event: Delivery) -> Vec<Access> {
    let instruction = Instruction::default();
    let context = Context::new(state, memory, &instruction);
    let mut list = Vec::new();
    let idt = state.sregs.idt.base;
    if !state.protected_mode() {
        // Real mode: a far pointer in the vector table, and IP, CS and FLAGS on the stack.
        add(&mut list, AccessKind::Load, idt.wrapping_add(4 * u64::from(event.vector)), 4);
        let sp = state.regs.rsp.wrapping_sub(6) & 0xffff;
        add(&mut list, AccessKind::Store, state.sregs.ss.base.wrapping_add(sp) & 0xffff_ffff, 6);
        return list;
    }
    let long = state.long_mode();
    let gate_size = if long { 16 } else { 8 };
    let at = idt.wrapping_add(gate_size * u64::from(event.vector));
    add(&mut list, AccessKind::Load, at, gate_size as u32);
    let Some(gate) = context.read::<8>(at) else { return list };
    let selector = u16::from_le_bytes([gate[2], gate[3]]);
    if !matches!(gate[5] & 0x1f, 0xe | 0xf) {
        return list;
    }
    let Some(at) = context.descriptor_address(selector) else { return list };
    add(&mut list, AccessKind::Load, at, 8);
    let Some(code) = context.read::<8>(at) else { return list };
    // A conforming segment keeps the current level.
    let conforming = code[5] & 0x1c == 0x1c;
    let level = if conforming { state.privilege() } else { (code[5] >> 5) & 3 };
    let inner = level < state.privilege();
    let words = 3 + u64::from(event.error_code);
    let task = state.sregs.tr.base;
    let (top, pushed) = if long {
        let stack_table = u64::from(gate[4] & 7);
        let slot = match (stack_table, inner) {
            (0, false) => None,
            (0, true) => Some(task.wrapping_add(4 + 8 * u64::from(level))),
            (table, _) => Some(task.wrapping_add(0x1c + 8 * table)),
        };
        let top = match slot {
            None => state.regs.rsp,
            Some(at) => {
                add(&mut list, AccessKind::Load, at, 8);
                let Some(stack) = context.read::<8>(at) else { return list };
                u64::from_le_bytes(stack)
            }
        };
        (top & !15, 8 * (words + 2))
    } else if inner {
        let at = task.wrapping_add(4 + 8 * u64::from(level));
        add(&mut list, AccessKind::Load, at, 8);
        let Some(stack) = context.read::<8>(at) else { return list };
        let esp = u32::from_le_bytes([stack[0], stack[1], stack[2], stack[3]]);
        let ss = u16::from_le_bytes([stack[4], stack[5]]);
        if let Some(at) = context.descriptor_address(ss) {
            add(&mut list, AccessKind::Load, at, 8);
        }
        (u64::from(esp), 4 * (words + 2))
    } else {
        (state.sregs.ss.base.wrapping_add(state.regs.rsp & 0xffff_ffff), 4 * words)
    };
    let bottom = top.wrapping_sub(pushed);
    add(&mut list, AccessKind::Store, if long { bottom } else { bottom & 0xffff_ffff }, pushed as u32);
    list
}

/// The vector of INT, INT1, INT3 or of an INTO that finds an overflow; `None` for everything else.
pub(super) fn vector(instruction: &Instruction, state: &CpuState) -> Option<u8> {
    const RFLAGS_OF: u64 = 1 << 11;
    match instruction.mnemonic() {
        Mnemonic::Int => Some(instruction.immediate8()),
        Mnemonic::Int1 => Some(1),
        Mnemonic::Int3 => Some(3),
        Mnemonic::Into if state.regs.rflags & RFLAGS_OF != 0 => Some(4),
        _ => None,
    }
}

impl<M: PhysRead> Context<'_, M> {
    /// INT, INT1, INT3 and INTO: the delivery is part of the instruction.
    pub(super) fn software_interrupt(&mut self) {
        if let Some(vector) = vector(self.instruction, self.state) {
            let event = Delivery { vector, error_code: false };
            self.accesses.extend(delivery_accesses(self.state, self.memory, event));
        }
    }
}
