//! ERST (ACPI 6.5, 18.5): a store for error records that outlives a crash. Linux keeps its last log there (pstore).
//!
//! The conversation, as Linux holds it (`__erst_write_to_storage` and its neighbours in drivers/acpi/apei/erst.c):
//! begin an operation; say at which offset of the error log address range the record is, or which record is meant;
//! execute; wait while busy; look at the status; end.

use crate::apei::{Instruction, Register, table};
use crate::layout::ERST_REGISTERS;
use crate::table::Table;

/// Offset of the 32-bit operation register: a value of [`operation`].
pub const OPERATION: u64 = 0x00;
/// Offset of the 32-bit register for the offset of a record in the error log address range.
pub const RECORD_OFFSET: u64 = 0x08;
/// Offset of the 64-bit register for the identifier of the record that is meant.
pub const RECORD_ID: u64 = 0x10;
/// Offset of the 64-bit register with the identifier that [`operation::NEXT_ID`] has found; [`NO_RECORD`] if there is
/// no record.
pub const NEXT_ID: u64 = 0x18;
/// Offset of the 32-bit register that holds [`BUSY_NOW`] while an operation is executed.
pub const BUSY: u64 = 0x20;
/// Offset of the 32-bit register with the [`status`] of the last operation.
pub const STATUS: u64 = 0x28;
/// Offset of the 32-bit register with the number of records.
pub const COUNT: u64 = 0x30;
/// Offset of the 64-bit register with the address of the error log address range.
pub const RANGE_BASE: u64 = 0x38;
/// Offset of the 64-bit register with the length of the error log address range in bytes.
pub const RANGE_LENGTH: u64 = 0x40;
/// Offset of the 32-bit register with the attributes of the error log address range: 0, it is memory.
pub const RANGE_ATTRIBUTES: u64 = 0x48;
/// Offset of the 64-bit register with the times that an operation takes, in milliseconds: bits 31:0 as a rule, 63:32
/// at most.
pub const TIMINGS: u64 = 0x50;

/// Value of [`BUSY`].
pub const BUSY_NOW: u32 = 1;
/// Value of [`NEXT_ID`] if there is no record.
pub const NO_RECORD: u64 = u64::MAX;

/// Values of [`OPERATION`].
pub mod operation {
    /// BEGIN_WRITE_OPERATION.
    pub const BEGIN_WRITE: u32 = 1;
    /// BEGIN_READ_OPERATION.
    pub const BEGIN_READ: u32 = 2;
    /// BEGIN_CLEAR_OPERATION.
    pub const BEGIN_CLEAR: u32 = 3;
    /// BEGIN_DUMMY_WRITE_OPERATION: all but the write.
    pub const BEGIN_DUMMY_WRITE: u32 = 4;
    /// END_OPERATION.
    pub const END: u32 = 5;
    /// EXECUTE_OPERATION.
    pub const EXECUTE: u32 = 6;
    /// The first part of GET_RECORD_IDENTIFIER: go on to the next record.
    pub const NEXT_ID: u32 = 7;
}

/// Command status (ACPI 6.5, table 18.20).
pub mod status {
    /// Done.
    pub const SUCCESS: u32 = 0;
    /// The store is full.
    pub const NOT_ENOUGH_SPACE: u32 = 1;
    /// The store cannot be reached.
    pub const HARDWARE_NOT_AVAILABLE: u32 = 2;
    /// What was asked for makes no sense, or failed.
    pub const FAILED: u32 = 3;
    /// There is no record at all.
    pub const STORE_EMPTY: u32 = 4;
    /// There is no such record.
    pub const RECORD_NOT_FOUND: u32 = 5;
}

/// Actions (ACPI 6.5, table 18.17).
mod action {
    pub(super) const BEGIN_WRITE: u8 = 0x0;
    pub(super) const BEGIN_READ: u8 = 0x1;
    pub(super) const BEGIN_CLEAR: u8 = 0x2;
    pub(super) const END: u8 = 0x3;
    pub(super) const SET_RECORD_OFFSET: u8 = 0x4;
    pub(super) const EXECUTE: u8 = 0x5;
    pub(super) const CHECK_BUSY: u8 = 0x6;
    pub(super) const GET_STATUS: u8 = 0x7;
    pub(super) const GET_RECORD_ID: u8 = 0x8;
    pub(super) const SET_RECORD_ID: u8 = 0x9;
    pub(super) const GET_COUNT: u8 = 0xA;
    pub(super) const BEGIN_DUMMY_WRITE: u8 = 0xB;
    pub(super) const GET_RANGE: u8 = 0xD;
    pub(super) const GET_RANGE_LENGTH: u8 = 0xE;
    pub(super) const GET_RANGE_ATTRIBUTES: u8 = 0xF;
    pub(super) const GET_TIMINGS: u8 = 0x10;
}

/// ERST of the one store.
pub(crate) fn erst() -> Table {
    let bits32 = |offset| Register::bits32(ERST_REGISTERS + offset);
    let bits64 = |offset| Register::bits64(ERST_REGISTERS + offset);
    let operate = |action, operation: u32| Instruction::command(action, bits32(OPERATION), operation.into());
    table(
        *b"ERST",
        &[
            operate(action::BEGIN_WRITE, operation::BEGIN_WRITE),
            operate(action::BEGIN_READ, operation::BEGIN_READ),
            operate(action::BEGIN_CLEAR, operation::BEGIN_CLEAR),
            operate(action::END, operation::END),
            Instruction::write(action::SET_RECORD_OFFSET, bits32(RECORD_OFFSET)),
            operate(action::EXECUTE, operation::EXECUTE),
            Instruction::compare(action::CHECK_BUSY, bits32(BUSY), BUSY_NOW.into()),
            Instruction::read(action::GET_STATUS, bits32(STATUS)),
            operate(action::GET_RECORD_ID, operation::NEXT_ID),
            Instruction::read(action::GET_RECORD_ID, bits64(NEXT_ID)),
            Instruction::write(action::SET_RECORD_ID, bits64(RECORD_ID)),
            Instruction::read(action::GET_COUNT, bits32(COUNT)),
            operate(action::BEGIN_DUMMY_WRITE, operation::BEGIN_DUMMY_WRITE),
            Instruction::read(action::GET_RANGE, bits64(RANGE_BASE)),
            Instruction::read(action::GET_RANGE_LENGTH, bits64(RANGE_LENGTH)),
            Instruction::read(action::GET_RANGE_ATTRIBUTES, bits32(RANGE_ATTRIBUTES)),
            Instruction::read(action::GET_TIMINGS, bits64(TIMINGS)),
        ],
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checksum;

    #[test]
    fn entries_are_where_an_os_reads_them() {
        let table = erst();
        let bytes = table.bytes();
        assert_eq!((&bytes[..4], checksum(bytes)), (b"ERST".as_slice(), 0));
        assert_eq!(bytes[36..40], 48u32.to_le_bytes());
        assert_eq!(bytes[44..48], 17u32.to_le_bytes());
        assert_eq!(bytes.len(), 48 + 17 * 32);
        // SET_RECORD_IDENTIFIER: action, WRITE_REGISTER, memory, 64 bits, offset 0, qword access, address.
        let set = &bytes[48 + 10 * 32..][..32];
        assert_eq!(set[..8], [9, 2, 0, 0, 0, 64, 0, 4]);
        assert_eq!(set[8..16], 0xFE83_1010u64.to_le_bytes());
        assert_eq!(set[24..32], u64::MAX.to_le_bytes());
        // GET_RECORD_IDENTIFIER has two instructions, in this order.
        let get: Vec<u8> =
            bytes[48..].chunks(32).filter(|entry| entry[0] == 8).map(|entry| entry[1]).collect();
        assert_eq!(get, [3, 0]);
    }

    #[test]
    fn every_action_of_linux_is_there() {
        let table = erst();
        let actions: Vec<u8> = table.bytes()[48..].chunks(32).map(|entry| entry[0]).collect();
        for action in (0..=0xB).chain(0xD..=0x10) {
            assert!(actions.contains(&action), "{action:#x}");
        }
    }
}
