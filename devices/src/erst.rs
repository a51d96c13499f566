//! The store for error records as the OS sees it: the registers behind ERST ([`aconite_acpi::erst`]).
//!
//! The device has all records in memory; a [`Keeper`] makes them last. An operation is carried out while its register
//! is written, so that the OS never sees the store busy: a record is kept when the write returns, and the OS that
//! writes it may have panicked and be about to reset the machine.

use std::collections::BTreeMap;

use aconite_acpi::erst::{
    BUSY, COUNT, NEXT_ID, NO_RECORD, OPERATION, RANGE_ATTRIBUTES, RANGE_BASE, RANGE_LENGTH, RECORD_ID,
    RECORD_OFFSET, STATUS, TIMINGS, operation, status,
};
use aconite_acpi::layout::{APEI_REGISTERS_SIZE, ERST_BASE, ERST_SIZE};

use crate::bus::{BusDevice, Effects};
use crate::dma::Dma;

/// Most records.
pub const MAX_RECORDS: usize = 256;
/// Most bytes of all records.
pub const MAX_BYTES: usize = 8 << 20;
/// Times that an operation takes: 10 ms, and 1 s at most.
const OPERATION_TIMES: u64 = (1000 << 32) | 10;

/// Error record header, UEFI 2.10, table N.1: bytes, signature, and where length and identifier are.
const HEADER_SIZE: usize = 128;
const SIGNATURE: &[u8; 4] = b"CPER";
const LENGTH_AT: usize = 20;
const ID_AT: usize = 96;

/// Why a record cannot be kept or forgotten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeepError {
    /// There is no room.
    NoSpace,
    /// The medium does not answer.
    Unavailable,
}

impl KeepError {
    const fn status(self) -> u32 {
        match self {
            Self::NoSpace => status::NOT_ENOUGH_SPACE,
            Self::Unavailable => status::HARDWARE_NOT_AVAILABLE,
        }
    }
}

/// What makes records outlive the machine.
pub trait Keeper: Send {
    /// Keeps a record, in the place of the one with the same identifier. It lasts when this returns.
    ///
    /// # Errors
    /// It is not kept; a former one is as it was.
    fn keep(&mut self, id: u64, record: &[u8]) -> Result<(), KeepError>;

    /// Forgets a record for good.
    ///
    /// # Errors
    /// It is as it was.
    fn forget(&mut self, id: u64) -> Result<(), KeepError>;
}

/// Keeps nothing: the records go with the machine.
#[derive(Clone, Copy, Debug, Default)]
pub struct Volatile;

impl Keeper for Volatile {
    fn keep(&mut self, _id: u64, _record: &[u8]) -> Result<(), KeepError> {
        Ok(())
    }

    fn forget(&mut self, _id: u64) -> Result<(), KeepError> {
        Ok(())
    }
}

/// What an operation does when it is executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operation {
    Write,
    Read,
    Clear,
    DummyWrite,
}

/// The registers.
///
/// A write acts on each register whose first byte it covers, with the bytes that it has; the others are zero. Bytes
/// that belong to no register read as zero.
pub struct Erst {
    dma: Dma,
    keeper: Box<dyn Keeper>,
    records: BTreeMap<u64, Vec<u8>>,
    begun: Option<Operation>,
    offset: u32,
    id: u64,
    /// What the last look for a next record has found.
    next: u64,
    status: u32,
}

/// The identifier of a record, if these bytes are one record and nothing else.
pub fn record_id(record: &[u8]) -> Option<u64> {
    let header = record.first_chunk::<HEADER_SIZE>()?;
    let length = u32::from_le_bytes(*header[LENGTH_AT..].first_chunk()?);
    let id = u64::from_le_bytes(*header[ID_AT..].first_chunk()?);
    let whole = header.starts_with(SIGNATURE) && length as usize == record.len();
    // The two that stand for no record.
    (whole && id != 0 && id != NO_RECORD).then_some(id)
}

impl Erst {
    /// Length of the registers in bytes.
    pub const SIZE: u64 = APEI_REGISTERS_SIZE;

    /// The store with the `records` that `keeper` has, by their identifiers, and the error log address range in the
    /// memory behind `dma`.
    pub fn new(dma: Dma, records: BTreeMap<u64, Vec<u8>>, keeper: Box<dyn Keeper>) -> Self {
        Self { dma, keeper, records, begun: None, offset: 0, id: 0, next: NO_RECORD, status: status::SUCCESS }
    }

    fn operate(&mut self, value: u32) {
        match value {
            operation::BEGIN_WRITE => self.begun = Some(Operation::Write),
            operation::BEGIN_READ => self.begun = Some(Operation::Read),
            operation::BEGIN_CLEAR => self.begun = Some(Operation::Clear),
            operation::BEGIN_DUMMY_WRITE => self.begun = Some(Operation::DummyWrite),
            operation::END => self.begun = None,
            operation::NEXT_ID => self.next = self.following(self.next),
            operation::EXECUTE => {
                let done = match self.begun {
                    Some(Operation::Write) => self.write_record(),
                    Some(Operation::Read) => self.read_record(),
                    Some(Operation::Clear) => self.clear_record(),
                    Some(Operation::DummyWrite) => Ok(()),
                    None => Err(status::FAILED),
                };
                self.status = done.err().unwrap_or(status::SUCCESS);
            }
            _ => {}
        }
    }

    /// The identifier after `id`, and the first one after the last.
    fn following(&self, id: u64) -> u64 {
        let after = id.checked_add(1).and_then(|from| self.records.range(from..).next());
        after.or_else(|| self.records.first_key_value()).map_or(NO_RECORD, |(id, _)| *id)
    }

    fn write_record(&mut self) -> Result<(), u32> {
        let room = ERST_SIZE.checked_sub(self.offset.into()).ok_or(status::FAILED)?;
        let (view, at) = (self.dma.view(), ERST_BASE + u64::from(self.offset));
        let memory_fails = |error| {
            tracing::debug!(%error, "The error record store cannot reach its memory");
            status::FAILED
        };
        let mut length = [0; 4];
        if room < HEADER_SIZE as u64 {
            return Err(status::FAILED);
        }
        view.read(at + LENGTH_AT as u64, &mut length).map_err(memory_fails)?;
        let length = u32::from_le_bytes(length);
        if u64::from(length) > room {
            return Err(status::FAILED);
        }
        let mut record = vec![0; length as usize];
        view.read(at, &mut record).map_err(memory_fails)?;
        let id = record_id(&record).ok_or(status::FAILED)?;
        let replaced = self.records.get(&id).map(Vec::len);
        let others = self.records.values().map(Vec::len).sum::<usize>() - replaced.unwrap_or(0);
        let full = replaced.is_none() && self.records.len() >= MAX_RECORDS;
        if full || others + record.len() > MAX_BYTES {
            return Err(status::NOT_ENOUGH_SPACE);
        }
        self.keeper.keep(id, &record).map_err(KeepError::status)?;
        self.records.insert(id, record);
        Ok(())
    }

    fn read_record(&self) -> Result<(), u32> {
        let record = self.record()?;
        let room = ERST_SIZE.saturating_sub(self.offset.into());
        if record.len() as u64 > room {
            return Err(status::FAILED);
        }
        self.dma.write(ERST_BASE + u64::from(self.offset), record).map_err(|error| {
            tracing::debug!(%error, "The error record store cannot reach its memory");
            status::FAILED
        })
    }

    fn clear_record(&mut self) -> Result<(), u32> {
        self.record()?;
        self.keeper.forget(self.id).map_err(KeepError::status)?;
        self.records.remove(&self.id);
        Ok(())
    }

    /// The record that is meant.
    fn record(&self) -> Result<&[u8], u32> {
        if self.records.is_empty() {
            return Err(status::STORE_EMPTY);
        }
        self.records.get(&self.id).map(Vec::as_slice).ok_or(status::RECORD_NOT_FOUND)
    }

    fn register(&self, register: u64) -> u64 {
        match register {
            RECORD_OFFSET => self.offset.into(),
            RECORD_ID => self.id,
            NEXT_ID => self.next,
            // Never: an operation is done when its register has been written.
            BUSY => 0,
            STATUS => self.status.into(),
            COUNT => self.records.len() as u64,
            RANGE_BASE => ERST_BASE,
            RANGE_LENGTH => ERST_SIZE,
            RANGE_ATTRIBUTES => 0,
            TIMINGS => OPERATION_TIMES,
            _ => 0,
        }
    }
}

impl BusDevice for Erst {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = self.register(at & !7).to_le_bytes()[(at & 7) as usize];
        }
    }

    fn write(&mut self, offset: u64, data: &[u8], _effects: &mut Effects) {
        for (index, at) in (offset..).take(data.len()).enumerate() {
            let mut value = [0; 8];
            for (byte, &written) in value.iter_mut().zip(&data[index..]) {
                *byte = written;
            }
            let value = u64::from_le_bytes(value);
            match at {
                OPERATION => self.operate(value as u32),
                RECORD_OFFSET => self.offset = value as u32,
                RECORD_ID => self.id = value,
                _ => {}
            }
        }
    }
}

#[cfg(test)]
#[path = "erst_test.rs"]
mod tests;
