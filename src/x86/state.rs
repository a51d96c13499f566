//! The registers of a stopped vCPU, as the instruction would read them.

use iced_x86::Register;
use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};

use super::walk::{CR0_PE, EFER_LMA, Paging};
use super::xstate::ExtendedState;

/// RFLAGS.AC: the supervisor may touch user pages under SMAP.
const RFLAGS_AC: u64 = 1 << 18;
/// RFLAGS.VM: virtual-8086 mode.
const RFLAGS_VM: u64 = 1 << 17;

/// A stopped vCPU.
#[derive(Clone, Debug, Default)]
pub struct CpuState {
    /// General registers, RIP and RFLAGS (KVM_GET_REGS).
    pub regs: kvm_regs,
    /// Segments, descriptor tables and control registers (KVM_GET_SREGS).
    pub sregs: kvm_sregs,
    /// Physical address bits that the guest's CPUID shows.
    pub physical_bits: u8,
    /// Vector and mask registers, and the layout of the XSAVE area. Only gathers, masked moves and XSAVE need them:
    /// without them those come out as [`super::operands::Reason::NeedsExtendedState`], and the caller asks again.
    pub extended: Option<Box<ExtendedState>>,
}

/// The width of the code being run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CodeWidth {
    /// Real mode, virtual-8086 mode, or a 16-bit code segment.
    Bits16,
    /// A 32-bit code segment.
    Bits32,
    /// 64-bit mode.
    Bits64,
}

impl CodeWidth {
    /// 16, 32 or 64.
    pub fn bits(self) -> u32 {
        match self {
            Self::Bits16 => 16,
            Self::Bits32 => 32,
            Self::Bits64 => 64,
        }
    }
}

impl CpuState {
    /// The registers that govern translation.
    pub fn paging(&self) -> Paging {
        Paging::new(&self.sregs, self.physical_bits)
    }

    /// Whether long mode is active (64-bit or compatibility code).
    pub fn long_mode(&self) -> bool {
        self.sregs.efer & EFER_LMA != 0
    }

    /// Whether the processor is in protected mode, where a selector names a descriptor.
    pub fn protected_mode(&self) -> bool {
        self.sregs.cr0 & CR0_PE != 0 && self.regs.rflags & RFLAGS_VM == 0
    }

    /// The width of the current code segment (SDM volume 3, 3.4.5).
    pub fn code_width(&self) -> CodeWidth {
        if self.long_mode() && self.sregs.cs.l != 0 {
            CodeWidth::Bits64
        } else if self.protected_mode() && self.sregs.cs.db != 0 {
            CodeWidth::Bits32
        } else {
            CodeWidth::Bits16
        }
    }

    /// The current privilege level: the DPL of SS, as KVM keeps it (SDM volume 3, 26.3.1.5).
    pub fn privilege(&self) -> u8 {
        self.sregs.ss.dpl & 3
    }

    /// EFLAGS.AC.
    pub fn alignment_check(&self) -> bool {
        self.regs.rflags & RFLAGS_AC != 0
    }

    /// The segment register, if `register` is one.
    pub fn segment(&self, register: Register) -> Option<&kvm_segment> {
        Some(match register {
            Register::CS => &self.sregs.cs,
            Register::DS => &self.sregs.ds,
            Register::ES => &self.sregs.es,
            Register::FS => &self.sregs.fs,
            Register::GS => &self.sregs.gs,
            Register::SS => &self.sregs.ss,
            _ => return None,
        })
    }

    /// The base that counts for an access through `register`: in 64-bit mode only FS and GS have one.
    pub fn segment_base(&self, register: Register) -> u64 {
        match register {
            Register::None => 0,
            Register::FS | Register::GS => self.segment(register).map_or(0, |segment| segment.base),
            _ if self.code_width() == CodeWidth::Bits64 => 0,
            _ => self.segment(register).map_or(0, |segment| segment.base),
        }
    }

    /// The value of a general register of any width; `None` for registers of other kinds.
    pub fn general(&self, register: Register) -> Option<u64> {
        let mut regs = self.regs;
        let whole = *whole(&mut regs, register)?;
        Some(match register {
            Register::AH | Register::CH | Register::DH | Register::BH => (whole >> 8) & 0xff,
            _ => match register.size() {
                1 => whole & 0xff,
                2 => whole & 0xffff,
                4 => whole & 0xffff_ffff,
                _ => whole,
            },
        })
    }

    /// Writes a general register of any width; others are left alone. 4 bytes clear the upper half, fewer keep the rest
    /// (SDM volume 1, 3.4.1.1).
    pub fn set_general(&mut self, register: Register, value: u64) {
        let Some(whole) = whole(&mut self.regs, register) else { return };
        let (mask, shift) = match register {
            Register::AH | Register::CH | Register::DH | Register::BH => (0xff00, 8),
            _ => match register.size() {
                1 => (0xff, 0),
                2 => (0xffff, 0),
                4 => return *whole = value & 0xffff_ffff,
                _ => (u64::MAX, 0),
            },
        };
        *whole = *whole & !mask | (value << shift) & mask;
    }
}

/// The general register that `register` is a part of.
fn whole(regs: &mut kvm_regs, register: Register) -> Option<&mut u64> {
    Some(match register.full_register() {
        Register::RAX => &mut regs.rax,
        Register::RCX => &mut regs.rcx,
        Register::RDX => &mut regs.rdx,
        Register::RBX => &mut regs.rbx,
        Register::RSP => &mut regs.rsp,
        Register::RBP => &mut regs.rbp,
        Register::RSI => &mut regs.rsi,
        Register::RDI => &mut regs.rdi,
        Register::R8 => &mut regs.r8,
        Register::R9 => &mut regs.r9,
        Register::R10 => &mut regs.r10,
        Register::R11 => &mut regs.r11,
        Register::R12 => &mut regs.r12,
        Register::R13 => &mut regs.r13,
        Register::R14 => &mut regs.r14,
        Register::R15 => &mut regs.r15,
        _ => return None,
    })
}
