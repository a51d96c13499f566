//! The label area of a DIMM: bytes outside its address range, in which the OS keeps what the range is divided into.

use thiserror::Error;

use super::keeper::NotKept;

/// Size of a label area unless chosen otherwise, in bytes: that of DIMMs on the market.
pub const LABEL_AREA_SIZE: usize = 128 << 10;
/// Largest label area in bytes. Linux reads no more than its index, so any size would do; this bounds what a side file
/// holds.
pub const LABEL_AREA_MAX: usize = 4 << 20;
/// Most bytes that one transfer carries: a multiple of a label that fits into the mailbox with every header.
pub const TRANSFER: u32 = 0xF00;

/// Why a transfer did not take place.
#[derive(Debug, Error)]
pub(in super::super) enum LabelError {
    /// The DIMM has no label area.
    #[error("There is no label area")]
    NoArea,
    /// The bytes are not in the area, or more than [`TRANSFER`].
    #[error("The bytes are not in the label area or too many")]
    OutOfRange,
    /// The DIMM is locked.
    #[error("The label area is locked")]
    Locked,
    /// The bytes could not be kept.
    #[error(transparent)]
    NotKept(#[from] NotKept),
}

/// The bytes that `[offset, offset + length)` names in an area of `size` bytes.
pub(super) fn range(size: usize, offset: u64, length: u64) -> Result<std::ops::Range<usize>, LabelError> {
    let end = offset.checked_add(length).ok_or(LabelError::OutOfRange)?;
    if length > u64::from(TRANSFER) || end > size as u64 {
        return Err(LabelError::OutOfRange);
    }
    // Both are at most `size`.
    Ok(offset as usize..end as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transfers_stay_in_the_area() {
        assert_eq!(range(1024, 0, 1024).unwrap(), 0..1024);
        assert_eq!(range(1024, 1024, 0).unwrap(), 1024..1024);
        for (offset, length) in [(0, 1025), (1024, 1), (1025, 0), (u64::MAX, 1), (1, u64::MAX)] {
            assert!(matches!(range(1024, offset, length), Err(LabelError::OutOfRange)), "{offset}+{length}");
        }
        assert!(range(1 << 20, 0, TRANSFER.into()).is_ok());
        assert!(range(1 << 20, 0, u64::from(TRANSFER) + 1).is_err());
    }
}
