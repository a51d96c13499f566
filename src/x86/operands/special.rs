//! Instructions whose operands the decoder's tables do not describe fully.

use iced_x86::{Code, Mnemonic, OpKind, Register};

use super::super::walk::PhysRead;
use super::{AccessKind, Context, Reason};

/// Bytes of a cache line.
const LINE: u64 = 64;

impl<M: PhysRead> Context<'_, M> {
    /// Adds the accesses of an instruction that is described here; false for all others.
    pub(super) fn special(&mut self) -> Result<bool, Reason> {
        use Mnemonic::*;
        let instruction = self.instruction;
        match instruction.mnemonic() {
            Bt | Bts | Btr | Btc => return Ok(self.bit_string()),
            // SDM volume 2: these need a mapped, readable address and move no data.
            Clflush | Clflushopt | Clwb => self.named_byte(AccessKind::CacheControl)?,
            Cldemote | Prefetch | Prefetchnta | Prefetcht0 | Prefetcht1 | Prefetcht2 | Prefetchw
            | Prefetchwt1 | Prefetchit0 | Prefetchit1 => self.named_byte(AccessKind::Prefetch)?,
            Monitor | Monitorx => {
                let address = self.at_accumulator()?;
                self.linear(AccessKind::CacheControl, address, 1);
            }
            Umonitor => {
                let offset = self.state.general(instruction.op0_register()).ok_or(Reason::NotModelled)?;
                let address = self.linear_address(self.data_segment(), offset);
                self.linear(AccessKind::CacheControl, address, 1);
            }
            // APM volume 3: CLZERO clears the line that holds the address in rAX.
            Clzero => {
                let address = self.at_accumulator()? & !(LINE - 1);
                self.linear(AccessKind::FullLineStore, address, LINE as u32);
            }
            // SDM volume 2: 64 bytes from the memory operand to ES:register, in one piece.
            Movdir64b | Enqcmd | Enqcmds => {
                let (segment, offset) = self.memory_operand().ok_or(Reason::NotModelled)?;
                self.segmented(AccessKind::Load, segment, offset, LINE as u32);
                let target = self.state.general(instruction.op0_register()).ok_or(Reason::NotModelled)?;
                self.segmented(AccessKind::FullLineStore, Register::ES, target, LINE as u32);
            }
            Vmovntdq | Vmovntps | Vmovntpd if instruction.memory_size().size() == LINE as usize => {
                let (segment, offset) = self.memory_operand().ok_or(Reason::NotModelled)?;
                self.segmented(AccessKind::FullLineStore, segment, offset, LINE as u32);
            }
            // Virtual machines inside the guest are not offered: see `cpuid`.
            Vmrun | Vmload | Vmsave | Vmlaunch | Vmresume | Skinit => return Err(Reason::NotModelled),
            Int | Int1 | Int3 | Into => self.software_interrupt(),
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// DS, or the segment that a prefix names.
    fn data_segment(&self) -> Register {
        match self.instruction.segment_prefix() {
            Register::None => Register::DS,
            prefix => prefix,
        }
    }

    /// The linear address in rAX, for the instructions that take it from there.
    fn at_accumulator(&self) -> Result<u64, Reason> {
        let rax = self.state.regs.rax;
        let offset = match self.instruction.code() {
            Code::Monitorw | Code::Monitorxw | Code::Clzerow => rax & 0xffff,
            Code::Monitord | Code::Monitorxd | Code::Clzerod => rax & 0xffff_ffff,
            Code::Monitorq | Code::Monitorxq | Code::Clzeroq => rax,
            _ => return Err(Reason::NotModelled),
        };
        Ok(self.linear_address(self.data_segment(), offset))
    }

    /// The memory operand, as one byte that is named and not moved.
    fn named_byte(&mut self, kind: AccessKind) -> Result<(), Reason> {
        let (segment, offset) = self.memory_operand().ok_or(Reason::NotModelled)?;
        self.segmented(kind, segment, offset, 1);
        Ok(())
    }

    /// BT, BTS, BTR and BTC with the bit number in a register reach beyond the named operand
    /// (SDM volume 1, 3.1.1.9 "bit strings"): false if this form takes the bit from an immediate.
    fn bit_string(&mut self) -> bool {
        let instruction = self.instruction;
        if instruction.op0_kind() != OpKind::Memory || instruction.op1_kind() != OpKind::Register {
            return false;
        }
        let register = instruction.op1_register();
        let (Some(value), Some((segment, offset))) = (self.state.general(register), self.memory_operand())
        else {
            return false;
        };
        let bytes = register.size() as u32;
        let bit = match bytes {
            2 => i64::from(value as i16),
            4 => i64::from(value as i32),
            _ => value as i64,
        };
        let bits = i64::from(bytes * 8);
        let moved = offset.wrapping_add((bit.div_euclid(bits) * i64::from(bytes)) as u64);
        let width = if instruction.memory_base() == Register::None {
            instruction.memory_displ_size()
        } else {
            instruction.memory_base().size() as u32
        };
        let moved = match width {
            2 => moved & 0xffff,
            4 => moved & 0xffff_ffff,
            _ => moved,
        };
        let kind = if instruction.mnemonic() == Mnemonic::Bt {
            AccessKind::Load
        } else {
            AccessKind::ReadModifyWrite
        };
        self.segmented(kind, segment, moved, bytes);
        true
    }

    /// ENTER checks that its whole frame can be written (SDM volume 2, ENTER: the final value of the stack pointer).
    pub(super) fn enter_probe(&mut self) {
        let instruction = self.instruction;
        if instruction.mnemonic() != Mnemonic::Enter {
            return;
        }
        let word = u64::from(instruction.stack_pointer_increment().unsigned_abs());
        let rsp = self.state.regs.rsp.wrapping_sub(word);
        let rsp = match self.state.code_width().bits() {
            64 => rsp,
            32 => rsp & 0xffff_ffff,
            _ => rsp & 0xffff,
        };
        self.segmented(AccessKind::Probe, Register::SS, rsp, 1);
    }
}
