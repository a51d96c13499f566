//! String instructions: one element, and what is left of a repetition.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::super::state::CpuState;
use super::super::walk::PhysRead;
use super::{AccessKind, Context};

/// RFLAGS.DF: string instructions count downwards.
const RFLAGS_DF: u64 = 1 << 10;

/// What a string instruction does with each element.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StringOperation {
    /// MOVS: copy from RSI to RDI.
    Move,
    /// STOS: store RAX at RDI.
    Store,
    /// LODS: load RAX from RSI.
    Load,
    /// CMPS: compare at RSI and RDI.
    Compare,
    /// SCAS: compare RAX with RDI.
    Scan,
    /// INS: from a port to RDI.
    Input,
    /// OUTS: from RSI to a port.
    Output,
}

/// A string instruction with a repeat prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Repeat {
    /// What it does with each element.
    pub operation: StringOperation,
    /// Iterations left: RCX within the address size.
    pub count: u64,
    /// Bytes of an element: 1, 2, 4 or 8.
    pub element: u8,
    /// RSI and RDI count downwards.
    pub backwards: bool,
    /// Bytes of the address registers and of the counter: 2, 4 or 8.
    pub address_size: u8,
    /// Linear address of the source element, for the operations that read at RSI.
    pub source: Option<u64>,
    /// Linear address of the destination element, for the operations that use RDI.
    pub destination: Option<u64>,
}

/// Bytes of the address registers that a string operand uses, and whether it goes through ES:RDI.
fn string_operand(kind: OpKind) -> Option<(u8, bool)> {
    Some(match kind {
        OpKind::MemorySegSI => (2, false),
        OpKind::MemorySegESI => (4, false),
        OpKind::MemorySegRSI => (8, false),
        OpKind::MemoryESDI => (2, true),
        OpKind::MemoryESEDI => (4, true),
        OpKind::MemoryESRDI => (8, true),
        _ => return None,
    })
}

/// The operation, if the instruction is one of the string instructions.
fn operation(instruction: &Instruction) -> Option<StringOperation> {
    use Mnemonic::*;
    if !instruction.is_string_instruction() {
        return None;
    }
    Some(match instruction.mnemonic() {
        Movsb | Movsw | Movsd | Movsq => StringOperation::Move,
        Stosb | Stosw | Stosd | Stosq => StringOperation::Store,
        Lodsb | Lodsw | Lodsd | Lodsq => StringOperation::Load,
        Cmpsb | Cmpsw | Cmpsd | Cmpsq => StringOperation::Compare,
        Scasb | Scasw | Scasd | Scasq => StringOperation::Scan,
        Insb | Insw | Insd => StringOperation::Input,
        Outsb | Outsw | Outsd => StringOperation::Output,
        _ => return None,
    })
}

/// Linear addresses of the elements at RSI and RDI, and the address size.
fn elements(state: &CpuState, instruction: &Instruction) -> (Option<u64>, Option<u64>, u8) {
    let (mut source, mut destination, mut address_size) = (None, None, 8);
    for operand in instruction.op_kinds() {
        let Some((width, through_es)) = string_operand(operand) else { continue };
        address_size = width;
        let (segment, register) = if through_es {
            (Register::ES, state.regs.rdi)
        } else {
            (instruction.memory_segment(), state.regs.rsi)
        };
        let sum = state.segment_base(segment).wrapping_add(register & mask(width));
        let linear = if state.code_width().bits() == 64 { sum } else { sum & 0xffff_ffff };
        if through_es {
            destination = Some(linear);
        } else {
            source = Some(linear);
        }
    }
    (source, destination, address_size)
}

/// The bits of a register of `bytes` bytes.
pub(in crate::x86) fn mask(bytes: u8) -> u64 {
    if bytes >= 8 { u64::MAX } else { (1 << (8 * u32::from(bytes))) - 1 }
}

/// The repetition, if the instruction has a repeat prefix.
pub(super) fn repeat(state: &CpuState, instruction: &Instruction) -> Option<Repeat> {
    let operation = operation(instruction)?;
    if !instruction.has_rep_prefix() && !instruction.has_repne_prefix() {
        return None;
    }
    let (source, destination, address_size) = elements(state, instruction);
    Some(Repeat {
        operation,
        count: state.regs.rcx & mask(address_size),
        element: instruction.memory_size().size() as u8,
        backwards: state.regs.rflags & RFLAGS_DF != 0,
        address_size,
        source,
        destination,
    })
}

impl<M: PhysRead> Context<'_, M> {
    /// Adds the accesses of one element; false if this is no string instruction.
    pub(super) fn strings(&mut self) -> bool {
        let Some(operation) = operation(self.instruction) else { return false };
        if repeat(self.state, self.instruction).is_some_and(|repeat| repeat.count == 0) {
            return true;
        }
        let size = self.instruction.memory_size().size() as u32;
        let (source, destination, _) = elements(self.state, self.instruction);
        if let Some(address) = source {
            self.linear(AccessKind::Load, address, size);
        }
        if let Some(address) = destination {
            let stores =
                matches!(operation, StringOperation::Move | StringOperation::Store | StringOperation::Input);
            self.linear(if stores { AccessKind::Store } else { AccessKind::Load }, address, size);
        }
        true
    }
}
