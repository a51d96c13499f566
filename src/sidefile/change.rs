//! One change of what a device keeps, and its bytes in the journal.

use std::ops::Range;

use aconite_devices::nvdimm::{LABEL_AREA_MAX, Record};

use super::content::{Content, Reader};

/// A change of a [`Content`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Bytes were written to the label area.
    Labels {
        /// Size of the area: it begins as zeros.
        size: u64,
        /// Where in the area.
        offset: u64,
        /// What; it does not reach beyond the area.
        bytes: Vec<u8>,
    },
    /// The DIMM remembers something else.
    Dimm(Box<Record>),
    /// Lines were poisoned.
    Poisoned(Vec<Range<u64>>),
    /// Lines were cleaned.
    Cleaned(Vec<Range<u64>>),
}

const LABELS: u64 = 1;
const DIMM: u64 = 2;
const POISONED: u64 = 3;
const CLEANED: u64 = 4;

impl Change {
    /// Carries the change out.
    pub(super) fn apply(&self, content: &mut Content) {
        match self {
            Self::Labels { size, offset, bytes } => {
                let area = content.labels.get_or_insert_default();
                area.resize(*size as usize, 0);
                let start = *offset as usize;
                area[start..start + bytes.len()].copy_from_slice(bytes);
            }
            Self::Dimm(record) => content.dimm = Some((**record).clone()),
            Self::Poisoned(ranges) => ranges.iter().for_each(|range| content.poison.insert(range.clone())),
            Self::Cleaned(ranges) => ranges.iter().for_each(|range| content.poison.remove(range.clone())),
        }
    }

    /// The bytes of the change.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut encoded = Vec::new();
        let mut number = |n: u64| encoded.extend(n.to_le_bytes());
        match self {
            Self::Labels { size, offset, bytes } => {
                [LABELS, *size, *offset].into_iter().for_each(number);
                encoded.extend(bytes);
            }
            Self::Dimm(record) => {
                number(DIMM);
                encoded.extend(record.to_bytes());
            }
            Self::Poisoned(ranges) | Self::Cleaned(ranges) => {
                number(if matches!(self, Self::Poisoned(_)) { POISONED } else { CLEANED });
                ranges.iter().flat_map(|range| [range.start, range.end]).for_each(number);
            }
        }
        encoded
    }

    /// The change with these bytes; `None` if they are none.
    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let mut reader = Reader(bytes);
        Some(match reader.u64()? {
            LABELS => {
                let (size, offset, bytes) = (reader.u64()?, reader.u64()?, reader.0.to_vec());
                let end = offset.checked_add(bytes.len() as u64)?;
                let fits = size <= LABEL_AREA_MAX as u64 && end <= size;
                fits.then_some(Self::Labels { size, offset, bytes })?
            }
            DIMM => Self::Dimm(Box::new(Record::from_bytes(reader.0)?)),
            kind @ (POISONED | CLEANED) => {
                let mut ranges = Vec::new();
                while !reader.0.is_empty() {
                    ranges.push(reader.u64()?..reader.u64()?);
                }
                if kind == POISONED { Self::Poisoned(ranges) } else { Self::Cleaned(ranges) }
            }
            _ => return None,
        })
    }
}
