//! Descriptor tables: loading a segment register, a task register or a far pointer reads the GDT or the LDT.

use iced_x86::{Mnemonic, OpKind, Register};

use super::super::walk::PhysRead;
use super::{AccessKind, Context};

/// Selector bit 2: the descriptor is in the LDT.
const TABLE_INDICATOR: u16 = 1 << 2;
/// Access byte of a descriptor: not a system descriptor.
const NOT_SYSTEM: u8 = 1 << 4;
/// System descriptor type of a call gate (32-bit or 64-bit).
const CALL_GATE: u8 = 0xc;

impl<M: PhysRead> Context<'_, M> {
    /// Adds the descriptors that the instruction loads.
    pub(super) fn descriptors(&mut self) {
        use Mnemonic::*;
        if !self.state.protected_mode() {
            return;
        }
        let instruction = self.instruction;
        let stack = self.stack_pointer();
        match instruction.mnemonic() {
            Mov if instruction.op0_register().is_segment_register() => {
                if let Some(selector) = self.selector_operand(1) {
                    self.descriptor(selector, 8);
                }
            }
            Pop if instruction.op0_register().is_segment_register() => {
                if let Some(selector) = self.selector_at(stack) {
                    self.descriptor(selector, 8);
                }
            }
            Lds | Les | Lfs | Lgs | Lss => {
                if let Some(selector) = self.far_selector() {
                    self.descriptor(selector, 8);
                }
            }
            Verr | Verw => {
                if let Some(selector) = self.selector_operand(0) {
                    self.descriptor(selector, 8);
                }
            }
            Lar | Lsl => {
                if let Some(selector) = self.selector_operand(1) {
                    self.descriptor(selector, 8);
                }
            }
            Lldt => {
                if let Some(selector) = self.selector_operand(0) {
                    self.descriptor(selector, if self.state.long_mode() { 16 } else { 8 });
                }
            }
            // The task register's descriptor is marked busy.
            Ltr => {
                if let Some(address) =
                    self.selector_operand(0).and_then(|selector| self.descriptor_address(selector))
                {
                    let size = if self.state.long_mode() { 16 } else { 8 };
                    self.implicit(AccessKind::ReadModifyWrite, address, size);
                }
            }
            Call | Jmp if far(instruction) => {
                if let Some(selector) = self.far_selector() {
                    self.far_target(selector);
                }
            }
            Retf => self.far_return(stack),
            Iret | Iretd | Iretq => self.interrupt_return(stack),
            _ => {}
        }
    }

    /// The descriptor of a far jump or call; through a call gate also the gate's code segment.
    fn far_target(&mut self, selector: u16) {
        let Some(address) = self.descriptor_address(selector) else { return };
        let access = self.read::<8>(address).map_or(NOT_SYSTEM, |descriptor| descriptor[5]);
        if access & NOT_SYSTEM != 0 || access & 0xf != CALL_GATE {
            self.implicit(AccessKind::Load, address, 8);
            return;
        }
        self.implicit(AccessKind::Load, address, if self.state.long_mode() { 16 } else { 8 });
        if let Some(gate) = self.read::<8>(address) {
            self.descriptor(u16::from_le_bytes([gate[2], gate[3]]), 8);
        }
    }

    /// RETF: CS, and to an outer level the stack pointer and SS that lie above it.
    fn far_return(&mut self, stack: u64) {
        let word = self.return_word();
        let Some(selector) = self.selector_at(stack.wrapping_add(word)) else { return };
        self.descriptor(selector, 8);
        if selector & 3 > u16::from(self.state.privilege()) {
            let parameters = match self.instruction.op0_kind() {
                OpKind::Immediate16 if self.instruction.op_count() == 1 => {
                    u64::from(self.instruction.immediate16())
                }
                _ => 0,
            };
            self.outer_stack(stack.wrapping_add(2 * word + parameters), word, true);
        }
    }

    /// IRET: CS, and SS where the stack is switched; 64-bit mode always pops all five words.
    fn interrupt_return(&mut self, stack: u64) {
        let word = self.return_word();
        let Some(selector) = self.selector_at(stack.wrapping_add(word)) else { return };
        self.descriptor(selector, 8);
        if self.state.code_width().bits() == 64 {
            self.outer_stack(stack.wrapping_add(3 * word), word, false);
        } else if selector & 3 > u16::from(self.state.privilege()) {
            self.outer_stack(stack.wrapping_add(3 * word), word, true);
        }
    }

    /// The stack pointer and SS at `address`, and the descriptor of that SS.
    fn outer_stack(&mut self, address: u64, word: u64, list_words: bool) {
        if list_words {
            self.linear(AccessKind::Load, address, 2 * word as u32);
        }
        if let Some(selector) = self.selector_at(address.wrapping_add(word)) {
            self.descriptor(selector, 8);
        }
    }

    /// Bytes of each word that RETF and IRET pop.
    fn return_word(&self) -> u64 {
        use iced_x86::Code;
        match self.instruction.code() {
            Code::Iretw | Code::Retfw | Code::Retfw_imm16 => 2,
            Code::Iretd | Code::Retfd | Code::Retfd_imm16 => 4,
            _ => 8,
        }
    }

    /// Linear address of the top of the stack.
    pub(in crate::x86) fn stack_pointer(&self) -> u64 {
        let rsp = match self.state.code_width().bits() {
            64 => self.state.regs.rsp,
            32 => self.state.regs.rsp & 0xffff_ffff,
            _ => self.state.regs.rsp & 0xffff,
        };
        self.linear_address(Register::SS, rsp)
    }

    /// The selector in operand `position`, a register or a word of memory.
    fn selector_operand(&self, position: u32) -> Option<u16> {
        if self.instruction.op_kind(position) == OpKind::Register {
            return self.state.general(self.instruction.op_register(position)).map(|value| value as u16);
        }
        let (segment, offset) = self.memory_operand()?;
        self.selector_at(self.linear_address(segment, offset))
    }

    /// The selector of a far pointer: in the instruction, or in the last two bytes of the memory operand.
    fn far_selector(&self) -> Option<u16> {
        match self.instruction.op0_kind() {
            OpKind::FarBranch16 | OpKind::FarBranch32 => return Some(self.instruction.far_branch_selector()),
            _ => {}
        }
        let (segment, offset) = self.memory_operand()?;
        let size = self.instruction.memory_size().size() as u64;
        self.selector_at(self.linear_address(segment, offset.wrapping_add(size.checked_sub(2)?)))
    }

    fn selector_at(&self, address: u64) -> Option<u16> {
        self.read::<2>(address).map(u16::from_le_bytes)
    }

    /// Linear address of a selector's descriptor; `None` for the null selector.
    pub(super) fn descriptor_address(&self, selector: u16) -> Option<u64> {
        if selector & !3 == 0 {
            return None;
        }
        let sregs = &self.state.sregs;
        let table = if selector & TABLE_INDICATOR != 0 { sregs.ldt.base } else { sregs.gdt.base };
        Some(table.wrapping_add(u64::from(selector & !7)))
    }

    /// Adds the load of a selector's descriptor.
    pub(super) fn descriptor(&mut self, selector: u16, size: u32) {
        if let Some(address) = self.descriptor_address(selector) {
            self.implicit(AccessKind::Load, address, size);
        }
    }
}

/// Whether a CALL or JMP loads CS.
fn far(instruction: &iced_x86::Instruction) -> bool {
    instruction.is_call_far()
        || instruction.is_call_far_indirect()
        || instruction.is_jmp_far()
        || instruction.is_jmp_far_indirect()
}
