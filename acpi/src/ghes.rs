//! The generic hardware error sources of this machine (ACPI 6.5, 18.3.2.8, "GHESv2"): what HEST says of them, and
//! where the device model puts records.
//!
//! Each source has a register that holds the address of its status block (a u64 in [`crate::layout::GHES_BASE`]),
//! the block itself, and a register by which an OS acknowledges that it has taken the record out of the block. The
//! last is a device register, not memory, so that the acknowledgement is heard at once.

use crate::layout::{GHES_BASE, GHES_REGISTERS, GHES_SIZE};

/// A source of errors. They differ in how the OS is told, and in what it may do then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Source {
    /// Corrected errors, told by an event of the platform: Notify 0x80 on the error device (PNP0C33).
    Corrected = 0,
    /// Uncorrected errors, told in the same way.
    Uncorrected = 1,
    /// Errors that cannot wait, told by NMI. An OS looks at them before it does anything else, and ends at fatal
    /// ones.
    Nmi = 2,
    /// Errors of which nobody is told: the OS looks every [`POLL_INTERVAL_MS`].
    Polled = 3,
}

/// Number of sources.
pub const SOURCES: usize = 4;
/// Milliseconds between two looks at the polled source.
pub const POLL_INTERVAL_MS: u32 = 1000;
/// Room for one status block.
pub const BLOCK_SIZE: u64 = 0x4000;
/// Distance between the address registers, and between the acknowledgement registers, of two sources.
pub const REGISTER_SIZE: u64 = 8;
/// Bit of an acknowledgement register that the OS sets.
pub const ACKNOWLEDGE: u64 = 1 << 0;

/// The blocks begin behind a page of address registers.
const BLOCKS: u64 = GHES_BASE + 0x1000;

const _: () = assert!(BLOCKS + SOURCES as u64 * BLOCK_SIZE <= GHES_BASE + GHES_SIZE);

impl Source {
    /// All sources, in the order of their numbers.
    pub const ALL: [Self; SOURCES] = [Self::Corrected, Self::Uncorrected, Self::Nmi, Self::Polled];

    /// Number of the source: its source id in HEST.
    pub const fn index(self) -> usize {
        self as usize
    }

    /// What the source is called.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Corrected => "corrected",
            Self::Uncorrected => "uncorrected",
            Self::Nmi => "nmi",
            Self::Polled => "polled",
        }
    }

    /// Guest-physical address of the u64 that holds the address of the status block.
    pub const fn address_register(self) -> u64 {
        GHES_BASE + self as u64 * REGISTER_SIZE
    }

    /// Guest-physical address of the status block.
    pub const fn block(self) -> u64 {
        BLOCKS + self as u64 * BLOCK_SIZE
    }

    /// Guest-physical address of the 64-bit acknowledgement register.
    pub const fn acknowledge_register(self) -> u64 {
        GHES_REGISTERS + self as u64 * REGISTER_SIZE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_of_two_sources_overlaps() {
        for (index, source) in Source::ALL.into_iter().enumerate() {
            assert_eq!(source.index(), index);
            assert!(source.address_register() + REGISTER_SIZE <= BLOCKS);
            assert!(source.block() + BLOCK_SIZE <= GHES_BASE + GHES_SIZE);
        }
        assert_eq!(Source::Polled.block(), 0x20_D000);
        assert_eq!(Source::Nmi.acknowledge_register(), 0xFE83_2010);
    }
}
