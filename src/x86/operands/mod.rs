//! Every memory access of one instruction, or of one iteration of a repeated string instruction.
//!
//! iced-x86 decodes and names the operands. What it leaves open is added here: repeated strings (one element at the
//! current RSI and RDI), bit strings indexed by a register, gathers and masked moves (one access for each enabled
//! element), XSAVE areas, descriptor tables, and the instructions that name a line and move no data.
//!
//! The list is in the order in which a fault or a machine check is looked for: the instruction's bytes, what it
//! reads, then what it writes. Processors promise no order among the operands of one instruction; reads come first
//! because the value of a store depends on them.

mod delivery;
mod descriptors;
mod fetch;
mod hazard;
mod plain;
mod raises;
mod special;
mod strings;
mod vectors;
mod xsave;

use iced_x86::{
    Code, CodeSize, Decoder, DecoderError, DecoderOptions, Formatter, Instruction, InstructionInfoFactory,
    InstructionInfoOptions, IntelFormatter, Mnemonic, OpAccess, Register, UsedMemory,
};
use thiserror::Error;

pub use self::delivery::{Delivery, delivery_accesses};
pub use self::hazard::StepHazard;
pub(super) use self::strings::mask;
pub use self::strings::{Repeat, StringOperation};
use super::state::{CodeWidth, CpuState};
use super::walk::{NotTranslated, PhysRead};

/// What an access does to memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum AccessKind {
    /// The processor reads a page-table entry to translate another access.
    Walk,
    /// The bytes of the instruction.
    Fetch,
    /// Data is read.
    Load,
    /// Data is read and written, or may be.
    ReadModifyWrite,
    /// The address is translated as for a load, but no data moves: CLFLUSH, CLWB, MONITOR, the fixed part of an
    /// XSAVE area that XRSTOR does not load.
    CacheControl,
    /// A hint that neither faults nor moves data.
    Prefetch,
    /// Data is written, or may be.
    Store,
    /// A whole aligned line of 64 bytes is written without being read: MOVDIR64B, CLZERO, a 64-byte non-temporal
    /// store.
    FullLineStore,
    /// The address is translated as for a store, but nothing is written: the end of an ENTER frame, the elements that
    /// MASKMOVDQU leaves out, the fixed part of an XSAVE area.
    Probe,
}

impl AccessKind {
    /// Whether the page must permit writing.
    pub fn writes(self) -> bool {
        matches!(self, Self::ReadModifyWrite | Self::Store | Self::FullLineStore | Self::Probe)
    }

    /// Whether data from memory enters the processor: only then is poison consumed.
    pub fn reads(self) -> bool {
        matches!(self, Self::Walk | Self::Fetch | Self::Load | Self::ReadModifyWrite)
    }
}

/// One access, by linear address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// What it does.
    pub kind: AccessKind,
    /// Linear address of the first byte.
    pub address: u64,
    /// Bytes.
    pub size: u32,
    /// The processor makes it in supervisor mode whatever the CPL: descriptor tables and task state
    /// (SDM volume 3, 5.6 "implicit supervisor-mode accesses").
    pub implicit: bool,
}

/// The bytes of an instruction.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct InstructionBytes {
    bytes: [u8; 15],
    length: u8,
}

impl InstructionBytes {
    fn new(bytes: &[u8]) -> Self {
        let mut new = Self::default();
        let length = bytes.len().min(new.bytes.len());
        new.bytes[..length].copy_from_slice(&bytes[..length]);
        new.length = length as u8;
        new
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        &self.bytes[..usize::from(self.length).min(self.bytes.len())]
    }
}

impl std::fmt::Debug for InstructionBytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self}")
    }
}

impl std::fmt::Display for InstructionBytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.as_slice().iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// An instruction and what it touches.
#[derive(Clone, Debug)]
pub struct Operands {
    instruction: Instruction,
    /// The instruction's bytes.
    pub bytes: InstructionBytes,
    /// The accesses, in the order described in the module documentation. Those of a repeated string instruction
    /// whose count is zero are the fetch alone.
    pub accesses: Vec<Access>,
    /// The repeated string instruction this is, if it is one.
    pub repeat: Option<Repeat>,
    /// What a single step over it would do beside the step.
    pub hazard: StepHazard,
}

impl Operands {
    /// The instruction in Intel syntax, for events and reports.
    pub fn text(&self) -> String {
        let mut text = String::new();
        IntelFormatter::new().format(&self.instruction, &mut text);
        text
    }

    /// Instruction pointer of the next instruction in program order.
    pub fn next_rip(&self) -> u64 {
        self.instruction.next_ip()
    }

    pub(super) fn instruction(&self) -> &Instruction {
        &self.instruction
    }

    /// Bytes of each word that POPF or IRET pops.
    pub(super) fn popped_word(&self) -> Option<u64> {
        Some(match self.instruction.code() {
            Code::Popfw | Code::Iretw => 2,
            Code::Popfd | Code::Iretd => 4,
            Code::Popfq | Code::Iretq | Code::Uiret => 8,
            _ => return None,
        })
    }

    /// Linear address of the byte of a PUSHF image that holds TF.
    pub(super) fn stored_trap_flag(&self) -> Option<u64> {
        let image = self.accesses.iter().find(|access| access.kind == AccessKind::Store)?;
        // TF is bit 8.
        (self.hazard == StepHazard::PushesFlags).then(|| image.address.wrapping_add(1))
    }

    /// Whether this is INT1, whose exception does not go through the gate of a software interrupt in KVM.
    pub(super) fn is_int1(&self) -> bool {
        self.instruction.mnemonic() == Mnemonic::Int1
    }

    /// Whether the instruction stores past the caches (MOVNTI, MOVNTDQ and the like).
    pub fn is_non_temporal_store(&self) -> bool {
        use Mnemonic::*;
        matches!(
            self.instruction.mnemonic(),
            Movnti
                | Movntq
                | Movntdq
                | Movntps
                | Movntpd
                | Movntss
                | Movntsd
                | Vmovntdq
                | Vmovntps
                | Vmovntpd
        )
    }

    /// Whether the instruction reads or writes a debug register.
    pub fn names_debug_register(&self) -> bool {
        (0..self.instruction.op_count()).any(|operand| self.instruction.op_register(operand).is_dr())
    }

    /// How far the instruction moves the stack pointer, in bytes.
    pub fn stack_moves(&self) -> i64 {
        i64::from(self.instruction.stack_pointer_increment())
    }

    /// Whether this is SYSRET, in either width.
    pub(super) fn is_sysret(&self) -> bool {
        matches!(self.instruction.mnemonic(), Mnemonic::Sysret | Mnemonic::Sysretq)
    }

    /// The vector of INT, INT1, INT3 or of an INTO that finds an overflow.
    pub(super) fn interrupt_vector(&self, state: &CpuState) -> Option<u8> {
        delivery::vector(&self.instruction, state)
    }
}

/// Why the accesses of the instruction at RIP are not known.
#[derive(Clone, Debug, Error)]
#[error("Cannot list the accesses of the instruction at {rip:#x} (bytes {bytes})")]
pub struct Unresolved {
    /// RIP.
    pub rip: u64,
    /// What could be read of the instruction.
    pub bytes: InstructionBytes,
    /// The part of the access list that is certain: the fetch of the bytes that were read, at least of the first.
    pub accesses: Vec<Access>,
    /// The reason.
    #[source]
    pub reason: Reason,
}

/// The reasons in [`Unresolved`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Reason {
    /// The page of the instruction is not mapped: the guest itself will fault.
    #[error("Linear address {linear:#x} of the instruction is not translated")]
    FetchNotTranslated {
        /// Linear address of the missing byte.
        linear: u64,
        /// Why the walk ended.
        #[source]
        why: NotTranslated,
    },
    /// The page of the instruction forbids fetching: the guest itself will fault.
    #[error("The page at {linear:#x} does not permit instruction fetches")]
    FetchForbidden {
        /// Linear address of the first forbidden byte.
        linear: u64,
    },
    /// The page of the instruction is mapped to an address that holds no memory of the monitor's.
    #[error("There is no memory at guest-physical {gpa:#x} to fetch the instruction from")]
    NoCode {
        /// Guest-physical address of the missing byte.
        gpa: u64,
    },
    /// The bytes are no instruction.
    #[error("The bytes are no valid instruction")]
    Undecodable,
    /// The instruction's accesses depend on vector or mask registers; ask again with [`CpuState::extended`] set.
    #[error("The vector and mask registers are needed to list the accesses")]
    NeedsExtendedState,
    /// The instruction is decoded, but what it touches is not modelled.
    #[error("The memory operands of this instruction are not modelled")]
    NotModelled,
}

/// Lists the accesses of the instruction at RIP.
///
/// `memory` is read through the guest's page tables for the instruction bytes, and for the values that name further
/// accesses (a selector on the stack, the header of an XSAVE area).
///
/// # Errors
///
/// [`Unresolved`] with the reason, and with the part of the list that is certain.
pub fn operands(state: &CpuState, memory: &impl PhysRead) -> Result<Operands, Unresolved> {
    let fetched = fetch::fetch(state, memory);
    let rip = state.regs.rip;
    let code = fetched.bytes.as_slice();
    let mut decoder = Decoder::with_ip(state.code_width().bits(), code, rip, DecoderOptions::NONE);
    let instruction = decoder.decode();
    let unresolved = |reason, length: usize| Unresolved {
        rip,
        bytes: InstructionBytes::new(&code[..length.min(code.len())]),
        accesses: vec![Access {
            kind: AccessKind::Fetch,
            address: fetched.address,
            size: length.max(1) as u32,
            implicit: false,
        }],
        reason,
    };
    if instruction.is_invalid() {
        let reason = match (decoder.last_error(), fetched.end) {
            (DecoderError::NoMoreBytes, Some(end)) => end,
            _ => Reason::Undecodable,
        };
        return Err(unresolved(reason, code.len()));
    }
    let mut context = Context::new(state, memory, &instruction);
    context.linear(AccessKind::Fetch, fetched.address, instruction.len() as u32);
    let repeat = strings::repeat(state, &instruction);
    context.enumerate().map_err(|reason| unresolved(reason, instruction.len()))?;
    let mut accesses = context.accesses;
    accesses.sort_by_key(|access| access.kind.writes() && access.kind != AccessKind::ReadModifyWrite);
    Ok(Operands {
        bytes: InstructionBytes::new(&code[..instruction.len().min(code.len())]),
        accesses,
        repeat,
        hazard: StepHazard::of(&instruction),
        instruction,
    })
}

/// The instruction being listed.
pub(super) struct Context<'a, M> {
    state: &'a CpuState,
    memory: &'a M,
    instruction: &'a Instruction,
    accesses: Vec<Access>,
}

impl<'a, M: PhysRead> Context<'a, M> {
    pub(super) fn new(state: &'a CpuState, memory: &'a M, instruction: &'a Instruction) -> Self {
        Self { state, memory, instruction, accesses: Vec::new() }
    }

    fn enumerate(&mut self) -> Result<(), Reason> {
        if self.strings() || self.special()? || self.xsave()? || self.vectors()? {
            return Ok(());
        }
        let mut factory = InstructionInfoFactory::new();
        let info = factory.info_options(self.instruction, InstructionInfoOptions::NO_REGISTER_USAGE);
        for used in info.used_memory() {
            let Some(kind) = kind_of(used.access()) else { continue };
            let size = used.memory_size().size() as u32;
            if size == 0 {
                return Err(Reason::NotModelled);
            }
            let offset = self.offset(used).ok_or(Reason::NotModelled)?;
            self.segmented(kind, used.segment(), offset, size);
        }
        self.enter_probe();
        self.descriptors();
        Ok(())
    }

    /// Adds an access through a segment.
    fn segmented(&mut self, kind: AccessKind, segment: Register, offset: u64, size: u32) {
        let address = self.linear_address(segment, offset);
        self.linear(kind, address, size);
    }

    /// Adds an access by linear address.
    fn linear(&mut self, kind: AccessKind, address: u64, size: u32) {
        self.accesses.push(Access { kind, address, size, implicit: false });
    }

    /// Adds an access to a descriptor table or task state segment.
    fn implicit(&mut self, kind: AccessKind, address: u64, size: u32) {
        self.accesses.push(Access { kind, address, size, implicit: true });
    }

    /// Segment base and offset together; outside 64-bit mode a linear address has 32 bits.
    fn linear_address(&self, segment: Register, offset: u64) -> u64 {
        let sum = self.state.segment_base(segment).wrapping_add(offset);
        if self.state.code_width() == CodeWidth::Bits64 { sum } else { sum & 0xffff_ffff }
    }

    /// The offset of an operand within its segment; `None` when it needs a vector register.
    fn offset(&self, used: &UsedMemory) -> Option<u64> {
        let mut offset = used.displacement();
        if used.base() != Register::None {
            offset = offset.wrapping_add(self.state.general(used.base())?);
        }
        if used.index() != Register::None {
            let index = self.state.general(used.index())?;
            offset = offset.wrapping_add(index.wrapping_mul(u64::from(used.scale())));
        }
        Some(match used.address_size() {
            CodeSize::Code16 => offset & 0xffff,
            CodeSize::Code32 => offset & 0xffff_ffff,
            _ => offset,
        })
    }

    /// Segment and offset of the instruction's ModRM memory operand, if it has one without a vector index.
    fn memory_operand(&self) -> Option<(Register, u64)> {
        let instruction = self.instruction;
        let base = instruction.memory_base();
        let mut offset = instruction.memory_displacement64();
        let mut width = instruction.memory_displ_size();
        // For RIP and EIP the decoder has already added the base.
        if !matches!(base, Register::None | Register::RIP | Register::EIP) {
            offset = offset.wrapping_add(self.state.general(base)?);
            width = base.size() as u32;
        }
        let index = instruction.memory_index();
        if index != Register::None {
            let value = self.state.general(index)?;
            offset = offset.wrapping_add(value.wrapping_mul(u64::from(instruction.memory_index_scale())));
            width = index.size() as u32;
        }
        if base == Register::EIP {
            width = 4;
        }
        let offset = match width {
            2 => offset & 0xffff,
            4 => offset & 0xffff_ffff,
            _ => offset,
        };
        Some((instruction.memory_segment(), offset))
    }

    /// Reads guest memory through the page tables; `None` where a byte is not mapped.
    pub(super) fn read<const N: usize>(&self, address: u64) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        let paging = self.state.paging();
        let mut done = 0;
        while done < N {
            let linear = address.wrapping_add(done as u64);
            let gpa = paging.walk(self.memory, linear).result.ok()?.gpa;
            let take = (N - done).min(4096 - (linear & 4095) as usize);
            if self.memory.read_bytes(gpa, &mut bytes[done..done + take]) != take {
                return None;
            }
            done += take;
        }
        Some(bytes)
    }
}

/// What an operand's access means for memory; `None` for operands that are not accessed.
fn kind_of(access: OpAccess) -> Option<AccessKind> {
    match access {
        OpAccess::Read | OpAccess::CondRead => Some(AccessKind::Load),
        OpAccess::Write | OpAccess::CondWrite => Some(AccessKind::Store),
        OpAccess::ReadWrite | OpAccess::ReadCondWrite => Some(AccessKind::ReadModifyWrite),
        OpAccess::None | OpAccess::NoMemAccess => None,
    }
}

#[cfg(test)]
pub(super) mod harness;

#[cfg(test)]
#[path = "operands_test.rs"]
mod tests;

#[cfg(test)]
#[path = "forms_test.rs"]
mod forms;
