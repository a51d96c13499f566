//! Generic hardware error sources: firmware's side of the mailbox through which it tells an OS of errors.
//!
//! A record goes into its source's status block in guest memory; then the OS is notified, reads the block, clears its
//! status and writes the acknowledgement register (ACPI 6.5, 18.3.2.8). Until that write the block belongs to the
//! OS, so each source has one record outstanding at most and others wait in line.
//!
//! What the guest writes into blocks and address registers is never read here: the device knows where its blocks are,
//! and fills block and address register anew for each record. An acknowledgement counts while a record is
//! outstanding and is without effect otherwise. Nothing here notifies: what happened is kept for the caller, who is
//! told by [`Effect::ErrorSources`] to look.

use std::collections::VecDeque;

use aconite_acpi::cper::STATUS_BLOCK_SIZE;
use aconite_acpi::ghes::{ACKNOWLEDGE, BLOCK_SIZE, REGISTER_SIZE, SOURCES, Source};
use aconite_acpi::layout::APEI_REGISTERS_SIZE;
use thiserror::Error;

use crate::bus::{BusDevice, Effect, Effects};
use crate::dma::{Dma, DmaError};

/// Records that can wait at one source.
pub const MAX_WAITING: usize = 64;

/// Bytes of the block's status, which is written last.
const STATUS_SIZE: usize = 4;

/// Why a record was not taken.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum SubmitError {
    /// It does not fit into a status block.
    #[error(
        "A record of {length} bytes does not fit into the {BLOCK_SIZE} bytes of a status block: shorten it"
    )]
    TooLong {
        /// Its length.
        length: usize,
    },
    /// It is shorter than the head of a status block.
    #[error("A record of {length} bytes has no status block: it takes at least {STATUS_BLOCK_SIZE}")]
    TooShort {
        /// Its length.
        length: usize,
    },
    /// The guest does not acknowledge what it was told.
    #[error(
        "Error source {} has {MAX_WAITING} records waiting for the guest to acknowledge record {outstanding}: wait for it, or use another source",
        .source_of_errors.name()
    )]
    Full {
        /// The source.
        source_of_errors: Source,
        /// The record that the guest has not acknowledged.
        outstanding: u64,
    },
}

/// What happened to a record.
#[derive(Debug)]
pub enum Happened {
    /// It is in its status block: the OS is to be notified.
    Delivered {
        /// The record.
        record: u64,
        /// Its source.
        source: Source,
    },
    /// The OS has taken it.
    Acknowledged {
        /// The record.
        record: u64,
        /// Its source.
        source: Source,
    },
    /// It could not be written into the guest's memory, and is lost.
    Lost {
        /// The record.
        record: u64,
        /// Its source.
        source: Source,
        /// Why.
        error: DmaError,
    },
}

/// The sources of a machine, and their acknowledgement registers.
///
/// A register is 64 bits of storage, of which [`ACKNOWLEDGE`] is cleared whenever a record is put before the guest.
/// Accesses of any width and alignment are defined; what lies behind the last register reads as zero.
#[derive(Debug)]
pub struct ErrorSources {
    dma: Dma,
    sources: [State; SOURCES],
    next: u64,
    happened: Vec<Happened>,
}

#[derive(Debug, Default)]
struct State {
    register: u64,
    outstanding: Option<u64>,
    waiting: VecDeque<(u64, Vec<u8>)>,
}

impl ErrorSources {
    /// Size of the registers, in bytes.
    pub const SIZE: u64 = APEI_REGISTERS_SIZE;

    /// Sources with nothing to tell. Writes their address registers, and empty blocks, into the guest's memory.
    ///
    /// # Errors
    /// [`DmaError`] if there is no memory for them.
    pub fn new(dma: Dma) -> Result<Self, DmaError> {
        let view = dma.view();
        for source in Source::ALL {
            view.write(source.address_register(), &source.block().to_le_bytes())?;
            view.write(source.block(), &[0; STATUS_BLOCK_SIZE])?;
        }
        Ok(Self { dma, sources: Default::default(), next: 1, happened: Vec::new() })
    }

    /// Takes a status block to be put before the guest, and returns the number of the record. Whoever calls this
    /// looks into [`Self::take_happened`] afterwards.
    ///
    /// # Errors
    /// [`SubmitError`]; nothing is changed then.
    pub fn submit(&mut self, source: Source, block: Vec<u8>) -> Result<u64, SubmitError> {
        let length = block.len();
        if length < STATUS_BLOCK_SIZE {
            return Err(SubmitError::TooShort { length });
        }
        if length as u64 > BLOCK_SIZE {
            return Err(SubmitError::TooLong { length });
        }
        let state = &mut self.sources[source.index()];
        if let (Some(outstanding), MAX_WAITING..) = (state.outstanding, state.waiting.len()) {
            return Err(SubmitError::Full { source_of_errors: source, outstanding });
        }
        let record = self.next;
        self.next += 1;
        state.waiting.push_back((record, block));
        self.advance(source);
        Ok(record)
    }

    /// What happened since the last call, oldest first. At most two entries for each record.
    pub fn take_happened(&mut self) -> Vec<Happened> {
        std::mem::take(&mut self.happened)
    }

    /// The record that the guest has not acknowledged.
    pub fn outstanding(&self, source: Source) -> Option<u64> {
        self.sources[source.index()].outstanding
    }

    /// Number of records that wait behind the one outstanding.
    pub fn waiting(&self, source: Source) -> usize {
        self.sources[source.index()].waiting.len()
    }

    /// Puts the next record before the guest if the source is free.
    fn advance(&mut self, source: Source) {
        let state = &mut self.sources[source.index()];
        while state.outstanding.is_none()
            && let Some((record, block)) = state.waiting.pop_front()
        {
            match place(&self.dma, source, &block) {
                Ok(()) => {
                    state.outstanding = Some(record);
                    state.register &= !ACKNOWLEDGE;
                    self.happened.push(Happened::Delivered { record, source });
                }
                Err(error) => self.happened.push(Happened::Lost { record, source, error }),
            }
        }
    }

    fn acknowledge(&mut self, source: Source, effects: &mut Effects) {
        let Some(record) = self.sources[source.index()].outstanding.take() else {
            tracing::debug!(source = source.name(), "the guest acknowledged a record that it was not given");
            return;
        };
        self.happened.push(Happened::Acknowledged { record, source });
        self.advance(source);
        effects.push(Effect::ErrorSources);
    }
}

/// Writes a record into the status block of `source`, its status last: that is what the OS looks at first.
fn place(dma: &Dma, source: Source, block: &[u8]) -> Result<(), DmaError> {
    let view = dma.view();
    let (status, rest) = block.split_at(STATUS_SIZE);
    view.write(source.address_register(), &source.block().to_le_bytes())?;
    view.write(source.block() + STATUS_SIZE as u64, rest)?;
    view.write(source.block(), status)
}

/// The source whose register has the byte at `offset`, and which byte of it that is.
fn register_at(offset: u64) -> Option<(Source, u32)> {
    let source = *Source::ALL.get(usize::try_from(offset / REGISTER_SIZE).ok()?)?;
    Some((source, (offset % REGISTER_SIZE) as u32))
}

impl BusDevice for ErrorSources {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = register_at(at).map_or(0, |(source, index)| {
                self.sources[source.index()].register.to_le_bytes()[index as usize]
            });
        }
    }

    fn write(&mut self, offset: u64, data: &[u8], effects: &mut Effects) {
        for (at, &byte) in (offset..).zip(data) {
            let Some((source, index)) = register_at(at) else { continue };
            let register = &mut self.sources[source.index()].register;
            *register = *register & !(0xFF << (8 * index)) | u64::from(byte) << (8 * index);
            if index == 0 && u64::from(byte) & ACKNOWLEDGE != 0 {
                self.acknowledge(source, effects);
            }
        }
    }
}

#[cfg(test)]
#[path = "ghes_test.rs"]
mod tests;
