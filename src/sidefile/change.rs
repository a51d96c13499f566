//! One change of what a device keeps, and its bytes in the journal.

use std::ops::Range;

use aconite_acpi::layout::MAX_DIMMS;
use aconite_devices::nvdimm::{LABEL_AREA_MAX, Record};

use super::content::{Content, Reader};
use super::layout::ONE_DIMM;

/// A change of a [`Content`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Bytes were written to the label area.
    Labels {
        /// The DIMM's number among the device's own.
        dimm: u32,
        /// Size of the area: it begins as zeros.
        size: u64,
        /// Where in the area.
        offset: u64,
        /// What; it does not reach beyond the area.
        bytes: Vec<u8>,
    },
    /// A DIMM remembers something else.
    Dimm {
        /// The DIMM's number among the device's own.
        dimm: u32,
        /// What it remembers.
        record: Box<Record>,
    },
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
            Self::Labels { dimm, size, offset, bytes } => {
                let area = content.dimm_mut(*dimm).labels.get_or_insert_default();
                area.resize(*size as usize, 0);
                let start = *offset as usize;
                area[start..start + bytes.len()].copy_from_slice(bytes);
            }
            Self::Dimm { dimm, record } => content.dimm_mut(*dimm).record = Some((**record).clone()),
            Self::Poisoned(ranges) => ranges.iter().for_each(|range| content.poison.insert(range.clone())),
            Self::Cleaned(ranges) => ranges.iter().for_each(|range| content.poison.remove(range.clone())),
        }
    }

    /// The bytes of the change.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut encoded = Vec::new();
        let mut number = |n: u64| encoded.extend(n.to_le_bytes());
        match self {
            Self::Labels { dimm, size, offset, bytes } => {
                [LABELS, (*dimm).into(), *size, *offset].into_iter().for_each(number);
                encoded.extend(bytes);
            }
            Self::Dimm { dimm, record } => {
                [DIMM, (*dimm).into()].into_iter().for_each(number);
                encoded.extend(record.to_bytes());
            }
            Self::Poisoned(ranges) | Self::Cleaned(ranges) => {
                number(if matches!(self, Self::Poisoned(_)) { POISONED } else { CLEANED });
                ranges.iter().flat_map(|range| [range.start, range.end]).for_each(number);
            }
        }
        encoded
    }

    /// The change with these bytes in a file of this version; `None` if they are none.
    pub(super) fn decode(bytes: &[u8], version: u32) -> Option<Self> {
        let mut reader = Reader(bytes);
        let dimm = |reader: &mut Reader<'_>| match version {
            ONE_DIMM => Some(0),
            _ => u32::try_from(reader.u64()?).ok().filter(|dimm| *dimm < MAX_DIMMS),
        };
        Some(match reader.u64()? {
            LABELS => {
                let dimm = dimm(&mut reader)?;
                let (size, offset, bytes) = (reader.u64()?, reader.u64()?, reader.0.to_vec());
                let end = offset.checked_add(bytes.len() as u64)?;
                let fits = size <= LABEL_AREA_MAX as u64 && end <= size;
                fits.then_some(Self::Labels { dimm, size, offset, bytes })?
            }
            DIMM => {
                let dimm = dimm(&mut reader)?;
                Self::Dimm { dimm, record: Box::new(Record::from_bytes(reader.0)?) }
            }
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
