//! What can be wrong with a description.

use crate::AddressRange;
use crate::layout::{MAX_DIMMS, MAX_HOST_BRIDGES, MAX_UNITS, TABLES_SIZE};

/// A machine that tables cannot describe.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A machine without processors.
    #[error("Number of processors is 0: give the machine at least one")]
    NoProcessors,
    /// An APIC ID that does not name one processor.
    #[error("APIC ID {0} of a processor is the broadcast ID: use 0 to 254")]
    ApicIdBroadcast(u8),
    /// Two processors with one APIC ID.
    #[error("APIC ID {0} is given to two processors: give each its own")]
    ApicIdTwice(u8),
    /// More unit slots than there are mailboxes.
    #[error("{0} NFIT units are more than the {MAX_UNITS} that fit: declare fewer slots")]
    TooManyUnits(usize),
    /// More host bridges than there are registers.
    #[error("{0} host bridges are more than the {MAX_HOST_BRIDGES} that fit: declare fewer")]
    TooManyHostBridges(u32),
    /// A range that is empty or runs over the end of the 64-bit address space.
    #[error("{what} {range} is empty or wraps around: give it a size above 0 that ends below 2^64")]
    BadRange {
        /// What the range is of.
        what: &'static str,
        /// The range.
        range: AddressRange,
    },
    /// Two ranges of memory that share an address.
    #[error("{first} and {second} overlap: move one of them")]
    Overlap {
        /// The lower range.
        first: AddressRange,
        /// The range that begins inside it.
        second: AddressRange,
    },
    /// A range of a unit that is not inside one of its slot's windows.
    #[error("Range {range} of unit {unit} is outside the windows of its slot: place it inside one")]
    OutsideSlot {
        /// Number of the unit.
        unit: usize,
        /// The unit's range.
        range: AddressRange,
    },
    /// A slot for more DIMMs than there can be.
    #[error(
        "Slot {unit} has {dimms} DIMMs, and a unit has at most {MAX_DIMMS}: spread them over several units"
    )]
    TooManyDimms {
        /// Number of the unit.
        unit: usize,
        /// What was asked for.
        dimms: u32,
    },
    /// A unit with more DIMMs than its slot.
    #[error("Unit {unit} has {dimms} DIMMs, and its slot has {room}: give the slot as many")]
    MissingDimms {
        /// Number of the unit.
        unit: usize,
        /// DIMMs of the unit.
        dimms: usize,
        /// DIMMs of the slot.
        room: u32,
    },
    /// A unit that says it is another one.
    #[error("Unit {given} is in slot {slot}: a unit's number is that of its slot")]
    WrongUnit {
        /// The number of the slot.
        slot: usize,
        /// The number that the unit in it has.
        given: u32,
    },
    /// A proximity domain above 255. SLIT is a square with a byte per pair of domains: 64 KiB at this bound.
    #[error("Proximity domain {0} is above 255: number the domains from 0 without gaps")]
    ProximityTooLarge(u32),
    /// Tables that do not fit their range.
    #[error(
        "ACPI tables of {0} bytes are larger than the {TABLES_SIZE} reserved for them: declare fewer slots"
    )]
    TooLarge(u64),
}
