//! Plain moves that the monitor does itself.
//!
//! Most accesses to the clean lines of a guarded page are an aligned MOV between memory and a general register. A
//! processor makes it in one piece, and so can the monitor: it costs the exit and no step.

use iced_x86::{Mnemonic, OpKind, Register};
use kvm_bindings::kvm_regs;

use super::bulk::RFLAGS_RF;
use super::operands::{AccessKind, Operands};
use super::physical::PhysicalAccesses;
use super::state::CpuState;

/// RFLAGS.TF: the guest steps itself.
const RFLAGS_TF: u64 = 1 << 8;

/// An aligned load into a general register, or an aligned store, of 1, 2, 4 or 8 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Move {
    /// Guest-physical address.
    pub gpa: u64,
    /// Bytes.
    pub size: u32,
    /// Where it goes.
    pub direction: Direction,
    next_rip: u64,
}

/// Where a [`Move`] goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Into a register, with the sign of the value if that is asked for.
    Load {
        /// The register, of any width.
        to: Register,
        /// MOVSX and MOVSXD.
        signed: bool,
    },
    /// To memory: the low [`Move::size`] bytes.
    Store(u64),
}

impl Move {
    /// A move by an instruction of which nothing more is known.
    #[cfg(test)]
    pub fn new(gpa: u64, size: u32, direction: Direction) -> Self {
        Self { gpa, size, direction, next_rip: 0 }
    }

    /// Moves `state` past the instruction; `loaded` is what a load found.
    pub fn finish(&self, state: &CpuState, loaded: u64) -> kvm_regs {
        let mut state = state.clone();
        if let Direction::Load { to, signed } = self.direction {
            let unused = 64 - 8 * self.size.clamp(1, 8);
            let value = if signed {
                ((loaded << unused) as i64 >> unused) as u64
            } else {
                loaded << unused >> unused
            };
            state.set_general(to, value);
        }
        state.regs.rip = self.next_rip;
        state.regs.rflags &= !RFLAGS_RF;
        state.regs
    }
}

/// The move that the instruction is, if it is one, and nothing but the move is left to do: no fault, no accessed or dirty
/// bit to be set, no trap of the guest's own. Breakpoint registers are not looked at.
pub fn plain_move(state: &CpuState, operands: &Operands, accesses: &PhysicalAccesses) -> Option<Move> {
    let instruction = operands.instruction();
    let signed = match instruction.mnemonic() {
        Mnemonic::Mov | Mnemonic::Movzx => false,
        Mnemonic::Movsx | Mnemonic::Movsxd => true,
        _ => return None,
    };
    let left = accesses.fault.is_some() || accesses.ranges.iter().any(|range| range.marks_entry);
    if left || state.regs.rflags & RFLAGS_TF != 0 {
        return None;
    }
    let mut data =
        accesses.ranges.iter().filter(|range| !matches!(range.kind, AccessKind::Walk | AccessKind::Fetch));
    let (range, None) = (data.next()?, data.next()) else { return None };
    let whole = range.size == instruction.memory_size().size() as u32 && matches!(range.size, 1 | 2 | 4 | 8);
    if !whole || range.gpa % u64::from(range.size) != 0 {
        return None;
    }
    let direction = match (range.kind, instruction.op0_kind(), instruction.op1_kind()) {
        (AccessKind::Load, OpKind::Register, OpKind::Memory) => {
            let to = instruction.op0_register();
            state.general(to)?;
            Direction::Load { to, signed }
        }
        (AccessKind::Store, OpKind::Memory, OpKind::Register) => {
            Direction::Store(state.general(instruction.op1_register())?)
        }
        (AccessKind::Store, OpKind::Memory, _) => Direction::Store(instruction.try_immediate(1).ok()?),
        _ => return None,
    };
    Some(Move { gpa: range.gpa, size: range.size, direction, next_rip: operands.next_rip() })
}

#[cfg(test)]
#[path = "moves_test.rs"]
mod tests;
