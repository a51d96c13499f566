//! What a side file holds at some moment, and its bytes.

use aconite_devices::nvdimm::Record;

use super::Damage;
use super::layout::ONE_DIMM;
use crate::memory::{LINE_SIZE, RangeSet};

/// What a device keeps beside its data.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Content {
    /// Poisoned bytes, as offsets in the device: whole lines.
    pub poison: RangeSet,
    /// What each of the device's own DIMMs keeps, by its number among them; there may be more DIMMs that keep nothing.
    pub dimms: Vec<DimmContent>,
}

/// What a DIMM keeps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DimmContent {
    /// The label area, once something has been written to it.
    pub labels: Option<Vec<u8>>,
    /// What the DIMM remembers, once that is something.
    pub record: Option<Record>,
}

/// Takes bytes off the front of a slice.
pub(super) struct Reader<'a>(pub(super) &'a [u8]);

impl<'a> Reader<'a> {
    pub(super) fn bytes(&mut self, length: u64) -> Option<&'a [u8]> {
        let length = usize::try_from(length).ok().filter(|length| *length <= self.0.len())?;
        let (bytes, rest) = self.0.split_at(length);
        self.0 = rest;
        Some(bytes)
    }

    pub(super) fn u64(&mut self) -> Option<u64> {
        Some(u64::from_le_bytes(self.bytes(8)?.try_into().ok()?))
    }

    /// Bytes behind their length + 1; 0 stands for none at all.
    fn optional(&mut self) -> Option<Option<Vec<u8>>> {
        match self.u64()? {
            0 => Some(None),
            length => Some(Some(self.bytes(length - 1)?.to_vec())),
        }
    }
}

fn put_optional(bytes: &mut Vec<u8>, part: Option<&[u8]>) {
    bytes.extend(part.map_or(0, |part| part.len() as u64 + 1).to_le_bytes());
    bytes.extend(part.unwrap_or_default());
}

impl Content {
    /// The bytes of the content.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend((self.dimms.len() as u64).to_le_bytes());
        for dimm in &self.dimms {
            put_optional(&mut bytes, dimm.labels.as_deref());
            put_optional(&mut bytes, dimm.record.as_ref().map(Record::to_bytes).as_deref());
        }
        bytes.extend((self.poison.count() as u64).to_le_bytes());
        for range in self.poison.iter() {
            bytes.extend(range.start.to_le_bytes());
            bytes.extend(range.end.to_le_bytes());
        }
        bytes
    }

    /// What the DIMM with this number keeps.
    pub fn dimm(&self, number: u32) -> DimmContent {
        self.dimms.get(number as usize).cloned().unwrap_or_default()
    }

    /// What the DIMM with this number keeps, to be changed.
    pub(super) fn dimm_mut(&mut self, number: u32) -> &mut DimmContent {
        let number = number as usize;
        if number >= self.dimms.len() {
            self.dimms.resize(number + 1, DimmContent::default());
        }
        &mut self.dimms[number]
    }

    /// The content with these bytes of a file of this version; `None` if they are none.
    pub(super) fn decode(bytes: &[u8], version: u32) -> Option<Self> {
        let mut reader = Reader(bytes);
        let count = if version == ONE_DIMM { 1 } else { reader.u64()? };
        let mut dimms = Vec::new();
        for _ in 0..count {
            let labels = reader.optional()?;
            let record = match reader.optional()? {
                None => None,
                Some(bytes) => Some(Record::from_bytes(&bytes)?),
            };
            dimms.push(DimmContent { labels, record });
        }
        let mut poison = RangeSet::default();
        for _ in 0..reader.u64()? {
            poison.insert(reader.u64()?..reader.u64()?);
        }
        reader.0.is_empty().then_some(Self { poison, dimms })
    }

    /// Whether a device of this size can have it.
    pub(super) fn check(&self, device_size: u64) -> Result<(), Damage> {
        let line = |n: u64| n.is_multiple_of(LINE_SIZE);
        match self.poison.iter().all(|range| range.end <= device_size && line(range.start) && line(range.end))
        {
            true => Ok(()),
            false => Err(Damage::Content("it has poison outside the device or in parts of a line")),
        }
    }
}
