//! XSAVE areas: the parts that the requested components occupy.
//!
//! SDM volume 1, 13.7 (XSAVE), 13.8 (XRSTOR), 13.9 (XSAVEOPT), 13.10 (XSAVEC), 13.11 (XSAVES), 13.12 (XRSTORS).
//! Stores that the init and modified optimisations may leave out are listed: a store consumes no poison.

use iced_x86::Mnemonic;

use super::super::walk::PhysRead;
use super::super::xstate::{EXTENDED_OFFSET, ExtendedState, LEGACY_SIZE};
use super::{AccessKind, Context, Reason};

/// State components of the legacy region.
const X87: u64 = 1 << 0;
const SSE: u64 = 1 << 1;
/// AVX: its instructions use MXCSR as well.
const AVX: u64 = 1 << 2;
/// XCOMP_BV bit 63: the area is compacted.
const COMPACTED: u64 = 1 << 63;

impl<M: PhysRead> Context<'_, M> {
    /// Adds the accesses of the XSAVE family; false for all other instructions.
    pub(super) fn xsave(&mut self) -> Result<bool, Reason> {
        use Mnemonic::*;
        let mnemonic = self.instruction.mnemonic();
        let (restores, supervisor, compacts) = match mnemonic {
            Xsave | Xsave64 | Xsaveopt | Xsaveopt64 => (false, false, false),
            Xsavec | Xsavec64 => (false, false, true),
            Xsaves | Xsaves64 => (false, true, true),
            Xrstor | Xrstor64 => (true, false, false),
            Xrstors | Xrstors64 => (true, true, true),
            _ => return Ok(false),
        };
        let (segment, offset) = self.memory_operand().ok_or(Reason::NotModelled)?;
        let base = self.linear_address(segment, offset);
        let Some(extended) = self.state.extended.as_deref() else { return Err(Reason::NeedsExtendedState) };
        let enabled = extended.xcr0 | if supervisor { extended.xss } else { 0 };
        let requested = (self.state.regs.rax & 0xffff_ffff | self.state.regs.rdx << 32) & enabled;
        if restores {
            self.restore(base, requested, compacts, extended);
        } else {
            self.save(base, requested, compacts, extended);
        }
        Ok(true)
    }

    fn save(&mut self, base: u64, requested: u64, compacts: bool, extended: &ExtendedState) {
        // The fixed part must be writable, whatever is requested.
        self.linear(AccessKind::Probe, base, EXTENDED_OFFSET);
        self.legacy(AccessKind::Store, base, requested, requested);
        // XSAVE keeps the XSTATE_BV bits that were not requested; XSAVEC and XSAVES write both masks anew.
        let header = base.wrapping_add(u64::from(LEGACY_SIZE));
        if compacts {
            self.linear(AccessKind::Store, header, 16);
            self.parts(AccessKind::Store, base, extended.layout.compacted(requested));
        } else {
            self.linear(AccessKind::ReadModifyWrite, header, 8);
            self.parts(AccessKind::Store, base, extended.layout.standard(requested));
        }
    }

    fn restore(&mut self, base: u64, requested: u64, supervisor: bool, extended: &ExtendedState) {
        let header = base.wrapping_add(u64::from(LEGACY_SIZE));
        // The fixed part must be mapped, whatever is present.
        self.linear(AccessKind::CacheControl, base, EXTENDED_OFFSET);
        self.linear(AccessKind::Load, header, EXTENDED_OFFSET - LEGACY_SIZE);
        // Components whose XSTATE_BV bit is clear are initialised without being read. An unreadable header faults.
        let masks = self.read::<16>(header).unwrap_or([0xff; 16]);
        let word =
            |at: usize| masks[at..at + 8].iter().rev().fold(0, |sum, &byte| sum << 8 | u64::from(byte));
        let (present, format) = (word(0), word(8));
        let loaded = requested & present;
        if format & COMPACTED != 0 {
            self.legacy(AccessKind::Load, base, loaded, loaded);
            let parts = extended.layout.compacted(format & !COMPACTED);
            self.parts(AccessKind::Load, base, parts.filter(|&(index, ..)| loaded & (1 << index) != 0));
        } else if !supervisor {
            // In the standard format MXCSR is loaded for SSE or AVX even from a cleared component.
            self.legacy(AccessKind::Load, base, loaded, requested);
            self.parts(AccessKind::Load, base, extended.layout.standard(loaded));
        }
    }

    /// The legacy region (SDM volume 1, 13.4.1): x87 state, MXCSR with its mask, XMM registers.
    fn legacy(&mut self, kind: AccessKind, base: u64, components: u64, mxcsr: u64) {
        if components & X87 != 0 {
            self.linear(kind, base, 24);
        }
        if mxcsr & (SSE | AVX) != 0 {
            self.linear(kind, base.wrapping_add(24), 8);
        }
        if components & X87 != 0 {
            self.linear(kind, base.wrapping_add(32), 128);
        }
        if components & SSE != 0 {
            let registers = if self.state.code_width().bits() == 64 { 16 } else { 8 };
            self.linear(kind, base.wrapping_add(160), 16 * registers);
        }
    }

    fn parts(&mut self, kind: AccessKind, base: u64, parts: impl Iterator<Item = (usize, u32, u32)>) {
        for (_, offset, size) in parts {
            self.linear(kind, base.wrapping_add(u64::from(offset)), size);
        }
    }
}
