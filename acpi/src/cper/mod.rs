//! Error records as firmware hands them to an OS: generic error status blocks (ACPI 6.5, 18.3.2.7) made of sections
//! of the common platform error record (UEFI 2.10, appendix N).
//!
//! A section is typed until [`Section`] holds its bytes. Every field that a validation bit covers is an `Option`:
//! the bit says whether it is there, and a field that is not there is zero, so what is printed by an OS is what was
//! asked for and nothing else.

mod cxl;
mod firmware;
mod memory;
mod pcie;
mod processor;

pub use cxl::{
    CxlAgent, CxlComponent, CxlDram, CxlEvent, CxlEventHeader, CxlGeneralMedia, CxlHealth, CxlMedia,
    CxlMemoryModule, CxlPciDevice, CxlProtocolError,
};
pub use firmware::FirmwareError;
pub use memory::{MemoryError, MemoryError2};
pub use pcie::{PcieDevice, PcieError};
pub use processor::{ProcessorError, SmcaBank, X86ProcessorError};

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::Guid;

/// How bad an error is (ACPI 6.5, table 18.14; UEFI 2.10, N.2.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Severity {
    /// Uncorrected, and the system can go on.
    Recoverable = 0,
    /// Uncorrected, and the system cannot go on.
    Fatal = 1,
    /// Corrected.
    Corrected = 2,
    /// Nothing is wrong.
    Informational = 3,
}

impl Severity {
    /// Whether data or state is lost.
    pub const fn uncorrected(self) -> bool {
        matches!(self, Self::Recoverable | Self::Fatal)
    }
}

/// A section: what kind of error it describes, and the description.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// Section type.
    pub guid: Guid,
    /// Section body.
    pub body: Vec<u8>,
}

/// Flags of a section (UEFI 2.10, N.2.2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SectionFlags(u8);

impl SectionFlags {
    /// The section that the error is attributed to.
    pub const PRIMARY: Self = Self(1 << 0);
    /// The error was not contained.
    pub const CONTAINMENT_WARNING: Self = Self(1 << 1);
    /// The component was reset and must be set up again.
    pub const RESET: Self = Self(1 << 2);
    /// The component has had more corrected errors than it should. Linux takes the page out of use
    /// (`ghes_handle_memory_failure`: `MF_SOFT_OFFLINE`).
    pub const THRESHOLD_EXCEEDED: Self = Self(1 << 3);
    /// The component cannot be asked for more.
    pub const NOT_ACCESSIBLE: Self = Self(1 << 4);
    /// The error is there, but nothing has consumed it.
    pub const LATENT: Self = Self(1 << 5);
    /// The error came from elsewhere.
    pub const PROPAGATED: Self = Self(1 << 6);
    /// Other errors were lost.
    pub const OVERFLOW: Self = Self(1 << 7);

    /// No flag.
    pub const fn empty() -> Self {
        Self(0)
    }

    /// Both sets of flags.
    #[must_use]
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// Text that names a field-replaceable unit: at most [`FruText::LENGTH`] printable ASCII characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FruText([u8; Self::LENGTH]);

impl FruText {
    /// Room for the text.
    pub const LENGTH: usize = 20;

    /// The text; none if it is too long or not printable ASCII.
    pub fn new(text: &str) -> Option<Self> {
        let printable = text.bytes().all(|byte| byte == b' ' || byte.is_ascii_graphic());
        let mut bytes = [0; Self::LENGTH];
        bytes.get_mut(..text.len()).filter(|_| printable)?.copy_from_slice(text.as_bytes());
        Some(Self(bytes))
    }
}

/// When an error happened, in UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timestamp {
    /// Year, 0 to 9999.
    pub year: u16,
    /// Month, 1 to 12.
    pub month: u8,
    /// Day of the month, from 1.
    pub day: u8,
    /// Hour.
    pub hour: u8,
    /// Minute.
    pub minute: u8,
    /// Second.
    pub second: u8,
}

impl Timestamp {
    /// The time as 8 BCD bytes (UEFI 2.10, table N.1, Timestamp); byte 3 says that it is precise.
    fn bytes(self) -> [u8; 8] {
        const PRECISE: u8 = 1;
        let bcd = |number: u8| ((number / 10 % 10) << 4) | (number % 10);
        [
            bcd(self.second),
            bcd(self.minute),
            bcd(self.hour),
            PRECISE,
            bcd(self.day),
            bcd(self.month),
            bcd((self.year % 100) as u8),
            bcd((self.year / 100) as u8),
        ]
    }
}

/// A section with what an entry of a status block says about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The section.
    pub section: Section,
    /// How bad this part of the error is.
    pub severity: Severity,
    /// Flags.
    pub flags: SectionFlags,
    /// The field-replaceable unit, by number.
    pub fru_id: Option<Guid>,
    /// The field-replaceable unit, by name.
    pub fru_text: Option<FruText>,
    /// When it happened.
    pub timestamp: Option<Timestamp>,
}

impl Entry {
    /// An entry that says no more than it must.
    pub fn new(severity: Severity, section: Section) -> Self {
        Self {
            section,
            severity,
            flags: SectionFlags::empty(),
            fru_id: None,
            fru_text: None,
            timestamp: None,
        }
    }
}

/// Generic error status block (ACPI 6.5, table 18.13).
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct StatusBlock {
    block_status: U32,
    raw_data_offset: U32,
    raw_data_length: U32,
    data_length: U32,
    error_severity: U32,
}

const _: () = assert!(size_of::<StatusBlock>() == STATUS_BLOCK_SIZE);

/// Bytes of a status block before its first entry.
pub const STATUS_BLOCK_SIZE: usize = 20;
/// Bytes of an entry before its section.
pub const ENTRY_SIZE: usize = 72;

/// Generic error data entry, revision 3 (ACPI 6.5, table 18.14).
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct DataEntry {
    section_type: [u8; 16],
    error_severity: U32,
    revision: U16,
    validation: u8,
    flags: u8,
    error_data_length: U32,
    fru_id: [u8; 16],
    fru_text: [u8; FruText::LENGTH],
    timestamp: [u8; 8],
}

const _: () = assert!(size_of::<DataEntry>() == ENTRY_SIZE);

/// Revision of [`DataEntry`]: the major number in the high byte says that there is a timestamp.
const ENTRY_REVISION: u16 = 0x0300;
const VALID_FRU_ID: u8 = 1 << 0;
const VALID_FRU_TEXT: u8 = 1 << 1;
const VALID_TIMESTAMP: u8 = 1 << 2;

const STATUS_UNCORRECTED: u32 = 1 << 0;
const STATUS_CORRECTED: u32 = 1 << 1;
const STATUS_MULTIPLE_UNCORRECTED: u32 = 1 << 2;
const STATUS_MULTIPLE_CORRECTED: u32 = 1 << 3;
const STATUS_COUNT_SHIFT: u32 = 4;

/// The most entries that the count in the block's status can tell.
pub const MAX_ENTRIES: usize = 0x3FF;

/// A generic error status block with `entries`, which are at most [`MAX_ENTRIES`].
///
/// Linux looks at the block's severity to decide what to do at all and at each section's to decide what to do about
/// that section (`ghes_do_proc`), so they are given apart.
pub fn status_block(severity: Severity, entries: &[Entry]) -> Vec<u8> {
    let mut data = Vec::new();
    let (mut uncorrected, mut corrected) = (0, 0);
    for entry in entries {
        match entry.severity.uncorrected() {
            true => uncorrected += 1,
            false => corrected += 1,
        }
        append_entry(&mut data, entry);
    }
    let bit = |condition, bit| if condition { bit } else { 0 };
    let status = bit(uncorrected > 0, STATUS_UNCORRECTED)
        | bit(corrected > 0, STATUS_CORRECTED)
        | bit(uncorrected > 1, STATUS_MULTIPLE_UNCORRECTED)
        | bit(corrected > 1, STATUS_MULTIPLE_CORRECTED)
        | (entries.len().min(MAX_ENTRIES) as u32) << STATUS_COUNT_SHIFT;
    let block = StatusBlock {
        block_status: U32::new(status),
        raw_data_offset: U32::ZERO,
        raw_data_length: U32::ZERO,
        data_length: U32::new(data.len() as u32),
        error_severity: U32::new(severity as u32),
    };
    [block.as_bytes(), &data].concat()
}

fn append_entry(data: &mut Vec<u8>, entry: &Entry) {
    let mut validation = 0;
    let mut valid = |present, bit| validation |= if present { bit } else { 0 };
    valid(entry.fru_id.is_some(), VALID_FRU_ID);
    valid(entry.fru_text.is_some(), VALID_FRU_TEXT);
    valid(entry.timestamp.is_some(), VALID_TIMESTAMP);
    let head = DataEntry {
        section_type: entry.section.guid.bytes(),
        error_severity: U32::new(entry.severity as u32),
        revision: U16::new(ENTRY_REVISION),
        validation,
        flags: entry.flags.0,
        error_data_length: U32::new(entry.section.body.len() as u32),
        fru_id: entry.fru_id.unwrap_or_default().bytes(),
        fru_text: entry.fru_text.map_or([0; FruText::LENGTH], |text| text.0),
        timestamp: entry.timestamp.map_or([0; 8], Timestamp::bytes),
    };
    data.extend_from_slice(head.as_bytes());
    data.extend_from_slice(&entry.section.body);
}

/// Gathers validation bits while optional fields are unpacked.
#[derive(Default)]
struct Validation(u64);

impl Validation {
    /// The value, with its bit set if it is there; zero otherwise.
    fn take<T: Default>(&mut self, bit: u32, value: Option<T>) -> T {
        if value.is_some() {
            self.0 |= 1 << bit;
        }
        value.unwrap_or_default()
    }

    fn u16(&mut self, bit: u32, value: Option<u16>) -> U16 {
        U16::new(self.take(bit, value))
    }

    fn u32(&mut self, bit: u32, value: Option<u32>) -> U32 {
        U32::new(self.take(bit, value))
    }

    fn u64(&mut self, bit: u32, value: Option<u64>) -> U64 {
        U64::new(self.take(bit, value))
    }

    fn bits(self) -> U64 {
        U64::new(self.0)
    }
}

#[cfg(test)]
#[path = "cper_test.rs"]
mod tests;
