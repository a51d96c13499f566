//! Where the poison of a region is written down, so that it outlives the machine.

use std::fmt;
use std::io;

use super::PoisonMap;

/// Writes down the poison of one region.
///
/// A region calls it for every change of its poison, whoever makes it, before the change is acknowledged or takes
/// effect; calls never overlap.
pub trait PoisonKeeper: Send + Sync + fmt::Debug {
    /// From now on `poison` (by offset in the region) is what is poisoned. Returns when it will be found again whatever
    /// happens to the monitor.
    ///
    /// # Errors
    /// It cannot be written: the change is not made.
    fn keep(&self, poison: &PoisonMap) -> io::Result<()>;
}
