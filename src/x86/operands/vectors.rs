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
    /// Each lane of the mask has its own place, of so many bytes.
    InPlace(usize),
    /// The enabled elements follow each other: compress and expand.
    Contiguous,
    /// One element or block serves all lanes.
    Shared,
    /// The operand is read or written whatever the mask says.
    Whole,
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
        if size == 1 {
            // MASKMOVDQU translates its whole operand, even for a mask of zero (implementation-specific by the SDM;
            // AMD does).
            self.segmented(AccessKind::Probe, operand.0, operand.1, count as u32);
        }
        self.enabled_runs(kind, operand, size as u64, &enabled);
        if size > 1 && enabled.contains(&false) {
            // Some processors reach for the page of a disabled element all the same, without a fault of their own.
            self.segmented(AccessKind::Prefetch, operand.0, operand.1, (size * count) as u32);
        }
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
        let packing = packing(instruction, size);
        if packing == Packing::Whole {
            self.segmented(kind, operand.0, operand.1, total as u32);
            return Ok(true);
        }
        let lanes = match packing {
            Packing::InPlace(lane) => total / lane,
            Packing::Contiguous => total / size,
            Packing::Shared | Packing::Whole => self.vector_size() / size,
        };
        let extended = self.extended()?;
        let enabled: Vec<bool> =
            (0..lanes.min(64)).map(|lane| opmask_bit(extended, instruction.op_mask(), lane)).collect();
        let any = enabled.iter().filter(|&&lane| lane).count();
        match packing {
            Packing::InPlace(lane) => self.enabled_runs(kind, operand, lane as u64, &enabled),
            Packing::Contiguous if any > 0 => self.segmented(kind, operand.0, operand.1, (any * size) as u32),
            Packing::Shared if any > 0 => self.segmented(kind, operand.0, operand.1, total as u32),
            _ => {}
        }
        Ok(true)
    }

    /// Bytes of the widest vector register of the instruction.
    fn vector_size(&self) -> usize {
        let instruction = self.instruction;
        (0..instruction.op_count())
            .filter(|&operand| instruction.op_kind(operand) == OpKind::Register)
            .map(|operand| instruction.op_register(operand))
            .filter(|register| register.is_vector_register())
            .map(|register| register.size())
            .max()
            .unwrap_or(0)
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

/// How the masked operand lies in memory, for elements of `size` bytes.
///
/// Shuffles and the like read all of their operand whatever the mask says (SDM volume 2, 2.7.9, classes E4NF and
/// E6NF); all others access the enabled lanes only. Checked lane by lane against a Zen 4 processor.
fn packing(instruction: &Instruction, size: usize) -> Packing {
    use Mnemonic::*;
    if instruction.is_broadcast() {
        return Packing::Shared;
    }
    match instruction.mnemonic() {
        Vpcompressb | Vpcompressw | Vpcompressd | Vpcompressq | Vcompressps | Vcompresspd | Vpexpandb
        | Vpexpandw | Vpexpandd | Vpexpandq | Vexpandps | Vexpandpd => Packing::Contiguous,
        Vbroadcastss | Vbroadcastsd | Vbroadcastf32x2 | Vbroadcastf32x4 | Vbroadcastf32x8
        | Vbroadcastf64x2 | Vbroadcastf64x4 | Vbroadcasti32x2 | Vbroadcasti32x4 | Vbroadcasti32x8
        | Vbroadcasti64x2 | Vbroadcasti64x4 | Vpbroadcastb | Vpbroadcastw | Vpbroadcastd | Vpbroadcastq => {
            Packing::Shared
        }
        // A count for all lanes, in the last operand; with an immediate count the memory holds the lanes.
        Vpsllw | Vpslld | Vpsllq | Vpsrlw | Vpsrld | Vpsrlq | Vpsraw | Vpsrad | Vpsraq
            if instruction.op2_kind() == OpKind::Memory =>
        {
            Packing::Whole
        }
        Vpshufb | Vpshufd | Vpshufhw | Vpshuflw | Vshufps | Vshufpd | Vshuff32x4 | Vshuff64x2
        | Vshufi32x4 | Vshufi64x2 | Vpunpcklbw | Vpunpcklwd | Vpunpckldq | Vpunpcklqdq | Vpunpckhbw
        | Vpunpckhwd | Vpunpckhdq | Vpunpckhqdq | Vunpcklps | Vunpcklpd | Vunpckhps | Vunpckhpd
        | Vpermilps | Vpermilpd | Vpermb | Vpermw | Vpermd | Vpermq | Vpermps | Vpermpd | Vpermt2b
        | Vpermt2w | Vpermt2d | Vpermt2q | Vpermt2ps | Vpermt2pd | Vpermi2b | Vpermi2w | Vpermi2d
        | Vpermi2q | Vpermi2ps | Vpermi2pd | Valignd | Valignq | Vpalignr | Vpacksswb | Vpackssdw
        | Vpackuswb | Vpackusdw | Vinsertf32x4 | Vinsertf32x8 | Vinsertf64x2 | Vinsertf64x4
        | Vinserti32x4 | Vinserti32x8 | Vinserti64x2 | Vinserti64x4 | Vextractf32x4 | Vextractf32x8
        | Vextractf64x2 | Vextractf64x4 | Vextracti32x4 | Vextracti32x8 | Vextracti64x2 | Vextracti64x4
        | Vmovddup | Vmovshdup | Vmovsldup | Vpconflictd | Vpconflictq | Vpmaddwd | Vpmaddubsw
        | Vpmultishiftqb | Vdbpsadbw | Vgf2p8affineqb | Vgf2p8affineinvqb | V4fmaddps | V4fmaddss
        | V4fnmaddps | V4fnmaddss | Vp4dpwssd | Vp4dpwssds => Packing::Whole,
        // Several elements make one lane.
        Vpmuludq | Vpmuldq => Packing::InPlace(8),
        Vpdpbusd | Vpdpbusds | Vpdpwssd | Vpdpwssds | Vdpbf16ps => Packing::InPlace(4),
        Vpshufbitqmb => Packing::InPlace(1),
        _ => Packing::InPlace(size),
    }
}
