//! Where a DIMM keeps what must outlive a power cycle.

use std::fmt;

use thiserror::Error;

use super::record::Record;

/// What was to be kept could not be.
#[derive(Debug, Error)]
#[error("The state of the DIMM could not be kept")]
pub struct NotKept(#[from] pub std::io::Error);

/// Memory of a DIMM that needs no power, beside the data: each call returns once the change is kept.
///
/// Calls come from a vCPU thread with the DIMM's lock held, one at a time for each DIMM.
pub trait Keeper: Send + Sync + fmt::Debug {
    /// Keeps `bytes` at `offset` of the label area.
    ///
    /// # Errors
    /// If the change is not kept; the area is as it was before.
    fn labels(&self, offset: u64, bytes: &[u8]) -> Result<(), NotKept>;

    /// Keeps everything else.
    ///
    /// # Errors
    /// If the change is not kept; the record is the one before.
    fn record(&self, record: &Record) -> Result<(), NotKept>;
}

/// Keeps nothing: the state lives as long as the [`Dimm`](super::Dimm).
#[derive(Clone, Copy, Debug, Default)]
pub struct Forgetful;

impl Keeper for Forgetful {
    fn labels(&self, _offset: u64, _bytes: &[u8]) -> Result<(), NotKept> {
        Ok(())
    }

    fn record(&self, _record: &Record) -> Result<(), NotKept> {
        Ok(())
    }
}
