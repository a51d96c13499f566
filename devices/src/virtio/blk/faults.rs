//! Which requests of a disk do not go the straight way, and what becomes of them. Nothing here knows of queues or time:
//! see [`super::Blk`].

use std::ops::Range;
use std::time::Duration;

use super::request::{Operation, Request, Status};
use crate::virtio::faults;

/// What a request must be. What is not said is of no concern.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pattern {
    /// What it does.
    pub operation: Option<Operation>,
    /// Its data comes from or goes to persistent memory, at least in part.
    pub persistent: bool,
    /// It touches one of these sectors.
    pub sectors: Option<Range<u64>>,
    /// Its data comes from or goes to this guest-physical memory, at least in part.
    pub memory: Option<Range<u64>>,
}

impl Pattern {
    /// Whether `request` is of this kind; `persistent` says of guest memory, by address and length, whether it is.
    pub fn matches(&self, request: &Request, persistent: impl Fn(u64, u64) -> bool) -> bool {
        let overlap = |a: &Range<u64>, b: &Range<u64>| a.start < b.end && b.start < a.end;
        let memory = |range: &Range<u64>| {
            let touched = |address: u64, length: u64| address..address.saturating_add(length);
            request.memory().iter().any(|s| overlap(&touched(s.address, s.length.into()), range))
        };
        self.operation.is_none_or(|operation| operation == request.operation())
            && self.sectors.as_ref().is_none_or(|range| request.sectors().iter().any(|s| overlap(s, range)))
            && self.memory.as_ref().is_none_or(memory)
            && (!self.persistent || request.memory().iter().any(|s| persistent(s.address, s.length.into())))
    }
}

/// When the data of a request that is held moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Transfer {
    /// When it is released: until then neither guest memory nor the disk changes.
    Release,
    /// At once; only that it is done is not told.
    Submission,
}

/// In which order requests that have been held go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Order {
    /// As they came.
    Submission,
    /// The last one first.
    Reverse,
    /// As this number has it.
    Random(u64),
}

impl Order {
    /// Puts a list into this order.
    pub fn arrange<T>(self, list: &mut [T]) {
        match self {
            Self::Submission => {}
            Self::Reverse => list.reverse(),
            Self::Random(seed) => {
                // Fisher and Yates; the generator is SplitMix64.
                let mut state = seed;
                for last in (1..list.len()).rev() {
                    state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
                    let mut bits = state;
                    bits = (bits ^ bits >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
                    bits = (bits ^ bits >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
                    bits ^= bits >> 31;
                    list.swap(last, (bits % (last as u64 + 1)) as usize);
                }
            }
        }
    }
}

/// What is done to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// It waits until it is released.
    Hold(Transfer),
    /// It waits for a time.
    Delay(Duration, Transfer),
    /// It fails, and nothing is transferred.
    Fail(Status),
    /// Only its first bytes are transferred; it ends with this status.
    Tear {
        /// So many.
        bytes: u64,
        /// The status.
        status: Status,
    },
    /// It waits until there are several, which then go on one after the other in another order.
    Reorder {
        /// How many.
        window: usize,
        /// In which order.
        order: Order,
        /// How long the first one waits for the last: then those that there are go on.
        patience: Duration,
    },
}

/// A fault.
pub type Fault = faults::Fault<Pattern, Action>;
/// A fault of a disk.
pub type Armed = faults::Armed<Pattern, Action>;
/// The faults of a disk.
pub(super) type Faults = faults::Faults<Pattern, Action>;
