//! What the NVDIMM models ask of the memory behind a range of a unit.

use std::ops::Range;

/// The memory behind a range of a unit as its firmware sees it. Addresses are system-physical, in bytes.
///
/// Calls come from a vCPU thread that has left the guest, with the lock of [`super::Units`] or of a
/// [`super::FlushHint`] held. A call may arrive for a unit that is being removed at this moment.
pub trait Media: Send + Sync {
    /// The first `most` poisoned ranges in `range`: ascending, apart from each other, and cut to `range`.
    ///
    /// To go on after a full answer, ask again from the end of the last range.
    fn poisoned(&self, range: Range<u64>, most: usize) -> Vec<Range<u64>>;

    /// Takes the poison out of `range`, and tells for how many bytes from its start that succeeded.
    ///
    /// Bytes that were never poisoned count as cleared: the length of `range` means that all of it is good now.
    fn clear(&self, range: Range<u64>) -> u64;

    /// Poisons every line that `range` touches; false if that did not succeed, and then nothing is poisoned.
    fn poison(&self, range: Range<u64>) -> bool;

    /// Fills parts of the memory with zeros. Poison stays. False if that did not succeed.
    fn erase(&self, parts: &mut dyn Iterator<Item = Range<u64>>) -> bool;

    /// Puts the memory out of the guest's reach, or within it again. False if that did not succeed.
    fn set_locked(&self, locked: bool) -> bool;

    /// Makes all that the guest has written so far durable.
    fn flush(&self);
}
