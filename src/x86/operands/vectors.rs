//! Gathers, scatters, and memory operands under a mask: only the enabled elements are accessed.
//!
//! Elements that a mask disables raise no fault (SDM volume 2, 2.7.9 "E4: fault suppression", VMASKMOV and
//! VPGATHER), so they are not listed. Neighbouring elements are joined into one access.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::super::walk::PhysRead;
use super::super::xstate::ExtendedState;
use super::{AccessKind, CodeSize, Context, Reason};

/// How the elements of a masked operand lie in memory.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Packing {
    /// Each element has its own place.
    InPlace,
    /// The enabled elements follow each other: compress and expand.
    Contiguous,
    /// One element serves all.
    Single,
}

impl<M: PhysRead> Context<'_, M> {
    /// Adds the accesses of a gather, a scatter or a masked operand; false for all other instructions.
    pub(super) fn vectors(&mut self) -> Result<bool, Reason> {
        if let Some(wide_index) = self.instruction.vsib() {
            self.indexed(if wide_index { 8 } else { 4 })?;
            return Ok(true);
        }
        if let Some(done) = self.vector_masked()? {
            return Ok(done);
        }
        self.opmask_masked()
    }

    fn extended(&self) -> Result<&ExtendedState, Reason> {
        self.state.extended.as_deref().ok_or(Reason::NeedsExtendedState)
    }

    /// VPGATHER and VPSCATTER: an address for each element of the index register.
    fn indexed(&mut self, index_size: usize) -> Result<(), Reason> {
        let instruction = self.instruction;
        let kind = match instruction.mnemonic() {
            Mnemonic::Vgatherpf0dps
            | Mnemonic::Vgatherpf0dpd
            | Mnemonic::Vgatherpf0qps
            | Mnemonic::Vgatherpf0qpd
            | Mnemonic::Vgatherpf1dps
            | Mnemonic::Vgatherpf1dpd
            | Mnemonic::Vgatherpf1qps
            | Mnemonic::Vgatherpf1qpd
            | Mnemonic::Vscatterpf0dps
            | Mnemonic::Vscatterpf0dpd
            | Mnemonic::Vscatterpf0qps
            | Mnemonic::Vscatterpf0qpd
            | Mnemonic::Vscatterpf1dps
            | Mnemonic::Vscatterpf1dpd
            | Mnemonic::Vscatterpf1qps
            | Mnemonic::Vscatterpf1qpd => return Ok(()),
            _ if instruction.op0_kind() == OpKind::Memory => AccessKind::Store,
            _ => AccessKind::Load,
        };
        let data =
            if kind == AccessKind::Store { instruction.op1_register() } else { instruction.op0_register() };
        let size = instruction.memory_size().element_size();
        let index = instruction.memory_index();
        if size == 0 || !index.is_vector_register() {
            return Err(Reason::NotModelled);
        }
        let elements = (data.size() / size).min(index.size() / index_size);
        let vector_mask = (!instruction.has_op_mask()).then(|| instruction.op2_register());
        let opmask = instruction.op_mask();
        let base = match instruction.memory_base() {
            Register::None => 0,
            register => self.state.general(register).ok_or(Reason::NotModelled)?,
        };
        let narrow = instruction.memory_base().size() == 4
            || (instruction.memory_base() == Register::None && instruction.memory_displ_size() == 4);
        let scale = i64::from(instruction.memory_index_scale());
        let extended = self.extended()?;
        let mut offsets = Vec::with_capacity(elements);
        for element in 0..elements {
            let enabled = match vector_mask {
                Some(mask) => extended.element(mask.number(), element, size).is_some_and(|value| value < 0),
                None => opmask_bit(extended, opmask, element),
            };
            if enabled {
                let value =
                    extended.element(index.number(), element, index_size).ok_or(Reason::NotModelled)?;
                let offset = base
                    .wrapping_add(value.wrapping_mul(scale) as u64)
                    .wrapping_add(instruction.memory_displacement64());
                offsets.push(if narrow { offset & 0xffff_ffff } else { offset });
            }
        }
        for offset in offsets {
            self.segmented(kind, instruction.memory_segment(), offset, size as u32);
        }
        Ok(())
    }

    /// The moves whose mask is the sign of each element of a vector register; `None` for all other instructions.
    fn vector_masked(&mut self) -> Result<Option<bool>, Reason> {
        let instruction = self.instruction;
        let (operand, mask, kind) = match instruction.mnemonic() {
            Mnemonic::Vmaskmovps | Mnemonic::Vmaskmovpd | Mnemonic::Vpmaskmovd | Mnemonic::Vpmaskmovq => {
                let kind = if instruction.op0_kind() == OpKind::Memory {
                    AccessKind::Store
                } else {
                    AccessKind::Load
                };
                let operand = self.memory_operand().ok_or(Reason::NotModelled)?;
                (operand, instruction.op1_register(), kind)
            }
            Mnemonic::Maskmovdqu | Mnemonic::Vmaskmovdqu => {
                let offset = match instruction.op0_kind() {
                    OpKind::MemorySegDI => self.state.regs.rdi & 0xffff,
                    OpKind::MemorySegEDI => self.state.regs.rdi & 0xffff_ffff,
                    _ => self.state.regs.rdi,
                };
                ((instruction.memory_segment(), offset), instruction.op2_register(), AccessKind::Store)
            }
            _ => return Ok(None),
        };
        let (size, count) = match instruction.memory_size().element_size() {
            size @ (4 | 8) if kind == AccessKind::Load || instruction.op0_kind() == OpKind::Memory => {
                (size, instruction.memory_size().size() / size)
            }
            _ => (1, 16),
        };
        let extended = self.extended()?;
        let enabled: Vec<bool> = (0..count)
            .map(|element| extended.element(mask.number(), element, size).is_some_and(|value| value < 0))
            .collect();
        self.enabled_runs(kind, operand, size as u64, &enabled);
        Ok(Some(true))
    }

    /// EVEX operands under k1 to k7; false if the instruction has no such mask or no memory operand.
    fn opmask_masked(&mut self) -> Result<bool, Reason> {
        let instruction = self.instruction;
        if !instruction.has_op_mask() {
            return Ok(false);
        }
        let Some(position) = instruction.op_kinds().position(|kind| kind == OpKind::Memory) else {
            return Ok(false);
        };
        let memory_size = instruction.memory_size();
        let (size, total) = (memory_size.element_size(), memory_size.size());
        let operand = self.memory_operand().ok_or(Reason::NotModelled)?;
        if size == 0 || total == 0 {
            return Err(Reason::NotModelled);
        }
        let kind = if position == 0 { AccessKind::Store } else { AccessKind::Load };
        let packing = packing(instruction);
        let extended = self.extended()?;
        let lanes = match packing {
            Packing::InPlace | Packing::Contiguous => total / size,
            Packing::Single => 64,
        };
        let enabled: Vec<bool> =
            (0..lanes.min(64)).map(|lane| opmask_bit(extended, instruction.op_mask(), lane)).collect();
        let any = enabled.iter().filter(|&&lane| lane).count();
        match packing {
            Packing::InPlace => self.enabled_runs(kind, operand, size as u64, &enabled),
            Packing::Contiguous if any > 0 => self.segmented(kind, operand.0, operand.1, (any * size) as u32),
            Packing::Single if any > 0 => self.segmented(kind, operand.0, operand.1, total as u32),
            _ => {}
        }
        Ok(true)
    }

    /// Adds one access for each run of enabled elements.
    fn enabled_runs(&mut self, kind: AccessKind, operand: (Register, u64), size: u64, enabled: &[bool]) {
        let narrow = self.instruction.code_size() != CodeSize::Code64;
        let mut element = 0;
        while element < enabled.len() {
            let run = enabled[element..].iter().take_while(|&&lane| lane).count();
            if run > 0 {
                let offset = operand.1.wrapping_add(element as u64 * size);
                let offset = if narrow { offset & 0xffff_ffff } else { offset };
                self.segmented(kind, operand.0, offset, (run as u64 * size) as u32);
            }
            element += run.max(1);
        }
    }
}

/// Bit `lane` of a mask register.
fn opmask_bit(extended: &ExtendedState, register: Register, lane: usize) -> bool {
    if register == Register::None {
        return true;
    }
    extended.masks.get(register.number()).is_some_and(|mask| lane < 64 && mask >> lane & 1 != 0)
}

/// How the masked operand lies in memory.
///
/// Only moves, blends and conversions are known to have one lane of the mask for each element in memory. Arithmetic
/// may regroup elements, and shuffles read all of the operand (SDM volume 2, 2.7.9, class E4NF), so theirs counts as
/// a whole.
fn packing(instruction: &Instruction) -> Packing {
    use Mnemonic::*;
    if instruction.is_broadcast() {
        return Packing::Single;
    }
    match instruction.mnemonic() {
        Vpcompressb | Vpcompressw | Vpcompressd | Vpcompressq | Vcompressps | Vcompresspd | Vpexpandb
        | Vpexpandw | Vpexpandd | Vpexpandq | Vexpandps | Vexpandpd => Packing::Contiguous,
        Vmovdqu8 | Vmovdqu16 | Vmovdqu32 | Vmovdqu64 | Vmovdqa32 | Vmovdqa64 | Vmovaps | Vmovapd
        | Vmovups | Vmovupd | Vmovss | Vmovsd | Vblendmps | Vblendmpd | Vpblendmb | Vpblendmw | Vpblendmd
        | Vpblendmq | Vpmovsxbw | Vpmovsxbd | Vpmovsxbq | Vpmovsxwd | Vpmovsxwq | Vpmovsxdq | Vpmovzxbw
        | Vpmovzxbd | Vpmovzxbq | Vpmovzxwd | Vpmovzxwq | Vpmovzxdq | Vpmovwb | Vpmovdb | Vpmovdw
        | Vpmovqb | Vpmovqw | Vpmovqd | Vpmovswb | Vpmovsdb | Vpmovsdw | Vpmovsqb | Vpmovsqw | Vpmovsqd
        | Vpmovuswb | Vpmovusdb | Vpmovusdw | Vpmovusqb | Vpmovusqw | Vpmovusqd => Packing::InPlace,
        _ => Packing::Single,
    }
}
