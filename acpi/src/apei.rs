//! Action tables of the platform error interfaces (ACPI 6.5, 18.5.1 and 18.6.1): EINJ and ERST say for each action
//! of the OS which registers to read and write. They are small programs, and the registers are ours to choose.
//!
//! Linux refuses a register whose width does not fit its access size, and claims every one that is named
//! (`apei_check_gar`, `collect_res_callback` in drivers/acpi/apei/apei-base.c).

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::table::{GenericAddress, HEADER_SIZE, Table};

/// Instructions that EINJ and ERST share (ACPI 6.5, tables 18.18 and 18.28).
const READ_REGISTER: u8 = 0;
const READ_REGISTER_VALUE: u8 = 1;
const WRITE_REGISTER: u8 = 2;
const WRITE_REGISTER_VALUE: u8 = 3;

/// Instruction entry, ACPI 6.5, tables 18.17 and 18.27.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Instruction {
    action: u8,
    instruction: u8,
    flags: u8,
    reserved: u8,
    register: GenericAddress,
    value: U64,
    mask: U64,
}

const _: () = assert!(size_of::<Instruction>() == 32);

/// A register in memory.
#[derive(Clone, Copy)]
pub(crate) struct Register {
    address: GenericAddress,
    mask: u64,
}

impl Register {
    /// Of 32 bits.
    pub(crate) const fn bits32(address: u64) -> Self {
        Self { address: GenericAddress::memory32(address), mask: u32::MAX as u64 }
    }

    /// Of 64 bits.
    pub(crate) const fn bits64(address: u64) -> Self {
        Self { address: GenericAddress::memory64(address), mask: u64::MAX }
    }
}

impl Instruction {
    const fn new(action: u8, instruction: u8, register: Register, value: u64) -> Self {
        let Register { address, mask } = register;
        let (value, mask) = (U64::new(value), U64::new(mask));
        Self { action, instruction, flags: 0, reserved: 0, register: address, value, mask }
    }

    /// The action's result is what the register holds.
    pub(crate) const fn read(action: u8, register: Register) -> Self {
        Self::new(action, READ_REGISTER, register, 0)
    }

    /// The action's result is whether the register holds `value`.
    pub(crate) const fn compare(action: u8, register: Register, value: u64) -> Self {
        Self::new(action, READ_REGISTER_VALUE, register, value)
    }

    /// The OS's input goes to the register.
    pub(crate) const fn write(action: u8, register: Register) -> Self {
        Self::new(action, WRITE_REGISTER, register, 0)
    }

    /// `value` goes to the register.
    pub(crate) const fn command(action: u8, register: Register, value: u64) -> Self {
        Self::new(action, WRITE_REGISTER_VALUE, register, value)
    }
}

/// What stands between the header of the table and the instructions: ACPI 6.5, tables 18.16 and 18.26 without the
/// table's header.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Head {
    header_size: U32,
    reserved: U32,
    entries: U32,
}

const _: () = assert!(size_of::<Head>() == 12);

/// An action table.
pub(crate) fn table(signature: [u8; 4], instructions: &[Instruction]) -> Table {
    let head = Head {
        // Linux takes the size with and without the table's header (`erst_check_table`, `einj_check_table`).
        header_size: U32::new((HEADER_SIZE + size_of::<Head>()) as u32),
        reserved: U32::ZERO,
        entries: U32::new(instructions.len() as u32),
    };
    Table::new(signature, 1, &[head.as_bytes(), instructions.as_bytes()].concat())
}
