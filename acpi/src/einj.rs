//! EINJ (ACPI 6.5, 18.6): how the OS makes the platform inject an error.
//!
//! The conversation, as Linux holds it (`__einj_error_inject` in drivers/acpi/apei): begin; fill in the
//! [`Parameters`], which are memory and no register; execute; wait while busy; look at the status; fetch the trigger
//! table and carry out its instructions, unless the user said notrigger; end.
//!
//! Injection only prepares the error. What makes it happen is the trigger, or whoever touches the place. The trigger
//! table of this platform has one instruction, a write of [`TRIGGER`]: a read of the bad memory by the OS itself, as
//! some platforms have it, is fatal to Linux, whose read is not one that it can recover from.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::apei::{Instruction, Register, table};
use crate::layout::{EINJ_BASE, EINJ_REGISTERS};
use crate::table::Table;

/// Offset of the 32-bit operation register: [`BEGIN`], [`EXECUTE`] or [`END`].
pub const OPERATION: u64 = 0x00;
/// Offset of the 32-bit register for an error type without parameters (SET_ERROR_TYPE).
pub const ERROR_TYPE: u64 = 0x08;
/// Offset of the 32-bit register with the [`types`] that can be injected.
pub const AVAILABLE: u64 = 0x10;
/// Offset of the 32-bit register that holds [`BUSY_NOW`] while an error is being injected.
pub const BUSY: u64 = 0x18;
/// Offset of the 32-bit register with the [`status`] of the last operation.
pub const STATUS: u64 = 0x20;
/// Offset of the 64-bit register with the address of the trigger table.
pub const TRIGGER_TABLE: u64 = 0x28;
/// Offset of the 64-bit register with the times that an operation takes, in microseconds: bits 31:0 as a rule, 63:32
/// at most.
pub const TIMINGS: u64 = 0x30;
/// Offset of the 32-bit register that makes an injected error happen: the number of the injection.
pub const TRIGGER: u64 = 0x38;

/// Value of [`OPERATION`]: BEGIN_INJECTION_OPERATION.
pub const BEGIN: u32 = 1;
/// Value of [`OPERATION`]: EXECUTE_OPERATION.
pub const EXECUTE: u32 = 2;
/// Value of [`OPERATION`]: END_OPERATION.
pub const END: u32 = 3;
/// Value of [`BUSY`].
pub const BUSY_NOW: u32 = 1;

/// Where the [`Parameters`] are.
pub const PARAMETERS: u64 = EINJ_BASE;
/// Where the trigger table is.
pub const TRIGGER_TABLE_BASE: u64 = EINJ_BASE + 0x1000;

/// Error types (ACPI 6.5, table 18.30), as far as this platform injects them.
pub mod types {
    /// Memory, corrected.
    pub const MEMORY_CORRECTABLE: u32 = 1 << 3;
    /// Memory, uncorrected but not fatal.
    pub const MEMORY_UNCORRECTABLE: u32 = 1 << 4;
    /// Memory, fatal.
    pub const MEMORY_FATAL: u32 = 1 << 5;
}

/// Command status (ACPI 6.5, table 18.29).
pub mod status {
    /// Done.
    pub const SUCCESS: u32 = 0;
    /// Something failed.
    pub const FAILURE: u32 = 1;
    /// Nothing can be injected there.
    pub const INVALID_ACCESS: u32 = 2;
}

/// Which [`Parameters`] are valid.
pub mod flags {
    /// [`super::Parameters::apic_id`].
    pub const APIC_ID: u32 = 1 << 0;
    /// [`super::Parameters::address`] and [`super::Parameters::mask`].
    pub const ADDRESS: u32 = 1 << 1;
}

/// SET_ERROR_TYPE_WITH_ADDRESS data structure, ACPI 6.5, table 18.31.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct Parameters {
    /// One of [`types`].
    pub error_type: U32,
    /// Offset of a vendor's structure: there is none.
    pub vendor_structure: U32,
    /// Of [`flags`].
    pub flags: U32,
    /// Local APIC ID of the processor.
    pub apic_id: U32,
    /// Guest-physical address.
    pub address: U64,
    /// Bits of the address that matter.
    pub mask: U64,
    /// PCI Express segment, bus, device and function.
    pub sbdf: U32,
}

const _: () = assert!(size_of::<Parameters>() == 36);

/// Actions (ACPI 6.5, table 18.25).
mod action {
    pub(super) const BEGIN: u8 = 0x0;
    pub(super) const GET_TRIGGER_TABLE: u8 = 0x1;
    pub(super) const SET_ERROR_TYPE: u8 = 0x2;
    pub(super) const GET_ERROR_TYPE: u8 = 0x3;
    pub(super) const END: u8 = 0x4;
    pub(super) const EXECUTE: u8 = 0x5;
    pub(super) const CHECK_BUSY: u8 = 0x6;
    pub(super) const GET_STATUS: u8 = 0x7;
    pub(super) const SET_ERROR_TYPE_WITH_ADDRESS: u8 = 0x8;
    pub(super) const GET_TIMINGS: u8 = 0x9;
    pub(super) const TRIGGER_ERROR: u8 = 0xFF;
}

/// EINJ of the one injection interface.
pub(crate) fn einj() -> Table {
    let bits32 = |offset| Register::bits32(EINJ_REGISTERS + offset);
    let bits64 = |offset| Register::bits64(EINJ_REGISTERS + offset);
    table(
        *b"EINJ",
        &[
            Instruction::command(action::BEGIN, bits32(OPERATION), BEGIN.into()),
            Instruction::read(action::GET_TRIGGER_TABLE, bits64(TRIGGER_TABLE)),
            Instruction::write(action::SET_ERROR_TYPE, bits32(ERROR_TYPE)),
            Instruction::read(action::GET_ERROR_TYPE, bits32(AVAILABLE)),
            Instruction::command(action::END, bits32(OPERATION), END.into()),
            Instruction::command(action::EXECUTE, bits32(OPERATION), EXECUTE.into()),
            Instruction::compare(action::CHECK_BUSY, bits32(BUSY), BUSY_NOW.into()),
            Instruction::read(action::GET_STATUS, bits32(STATUS)),
            Instruction::write(action::SET_ERROR_TYPE_WITH_ADDRESS, Register::bits32(PARAMETERS)),
            Instruction::read(action::GET_TIMINGS, bits64(TIMINGS)),
        ],
    )
}

/// Head of the trigger table, ACPI 6.5, table 18.33.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct TriggerHead {
    header_size: U32,
    revision: U32,
    table_size: U32,
    entries: U32,
}

const _: () = assert!(size_of::<TriggerHead>() == 16);

/// Bytes in [`trigger_table`].
pub const TRIGGER_TABLE_SIZE: usize = size_of::<TriggerHead>() + size_of::<Instruction>();

/// The trigger error action table (ACPI 6.5, 18.6.4) of an injection: its number goes to [`TRIGGER`].
pub fn trigger_table(injection: u32) -> [u8; TRIGGER_TABLE_SIZE] {
    let head = TriggerHead {
        header_size: U32::new(size_of::<TriggerHead>() as u32),
        revision: U32::new(1),
        table_size: U32::new(TRIGGER_TABLE_SIZE as u32),
        entries: U32::new(1),
    };
    let register = Register::bits32(EINJ_REGISTERS + TRIGGER);
    let instruction = Instruction::command(action::TRIGGER_ERROR, register, injection.into());
    let mut bytes = [0; TRIGGER_TABLE_SIZE];
    let (first, second) = bytes.split_at_mut(size_of::<TriggerHead>());
    first.copy_from_slice(head.as_bytes());
    second.copy_from_slice(instruction.as_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checksum;

    #[test]
    fn entries_are_where_an_os_reads_them() {
        let table = einj();
        let bytes = table.bytes();
        assert_eq!((&bytes[..4], checksum(bytes)), (b"EINJ".as_slice(), 0));
        assert_eq!(bytes[36..40], 48u32.to_le_bytes());
        assert_eq!(bytes[44..48], 10u32.to_le_bytes());
        assert_eq!(bytes.len(), 48 + 10 * 32);
        // EXECUTE_OPERATION: action, WRITE_REGISTER_VALUE, memory, 32 bits, offset 0, dword access, address.
        let execute = &bytes[48 + 5 * 32..][..32];
        assert_eq!(execute[..8], [5, 3, 0, 0, 0, 32, 0, 3]);
        assert_eq!(execute[8..16], 0xFE83_0000u64.to_le_bytes());
        assert_eq!(execute[16..24], 2u64.to_le_bytes());
        assert_eq!(execute[24..32], 0xFFFF_FFFFu64.to_le_bytes());
        // The address of the parameters is that of the register of SET_ERROR_TYPE_WITH_ADDRESS.
        let parameters = &bytes[48 + 8 * 32..][..32];
        assert_eq!(parameters[..2], [8, 2]);
        assert_eq!(parameters[8..16], PARAMETERS.to_le_bytes());
    }

    #[test]
    fn every_register_is_named_once_for_each_purpose() {
        let offsets = [OPERATION, ERROR_TYPE, AVAILABLE, BUSY, STATUS, TRIGGER_TABLE, TIMINGS, TRIGGER];
        assert!(offsets.windows(2).all(|pair| pair[0] + 8 == pair[1]));
        assert!(size_of::<Parameters>() as u64 <= TRIGGER_TABLE_BASE - PARAMETERS);
    }

    #[test]
    fn the_trigger_table_passes_the_checks_of_linux() {
        let bytes = trigger_table(7);
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
        assert_eq!((word(0), word(8) as usize, word(12)), (16, bytes.len(), 1));
        assert_eq!((word(8) - word(0)) / 32, word(12));
        assert_eq!(bytes[16..18], [0xFF, 3]);
        assert_eq!(bytes[24..32], (EINJ_REGISTERS + TRIGGER).to_le_bytes());
        assert_eq!(bytes[32..40], 7u64.to_le_bytes());
    }
}
