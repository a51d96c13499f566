//! Requests of a device that do not go the straight way: who meets which fault.
//!
//! A fault says what it is looking for and what it does, in the device's own words; the first one that a request meets
//! has it.

/// Most faults that a device has at a time.
pub const MAX_FAULTS: usize = 64;

/// A fault: `A` becomes of requests that are like `P`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault<P, A> {
    /// Which requests it is about.
    pub pattern: P,
    /// How many of them are let through first.
    pub skip: u64,
    /// How many are then taken; all, if nothing is said. A fault that has had its number is gone.
    pub count: Option<u64>,
    /// What becomes of them.
    pub action: A,
}

/// A fault of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Armed<P, A> {
    /// Its number, from 1 on.
    pub number: u64,
    /// What it was given as.
    pub fault: Fault<P, A>,
    /// How many requests it was about, up to now.
    pub seen: u64,
    /// How many of them it has had.
    pub taken: u64,
}

/// The faults of a device.
#[derive(Debug)]
pub(super) struct Faults<P, A> {
    armed: Vec<Armed<P, A>>,
    last: u64,
}

impl<P, A> Default for Faults<P, A> {
    fn default() -> Self {
        Self { armed: Vec::new(), last: 0 }
    }
}

impl<P, A: Copy> Faults<P, A> {
    /// Adds a fault behind those that there are; its number, or nothing if there are too many.
    pub(super) fn arm(&mut self, fault: Fault<P, A>) -> Option<u64> {
        if self.armed.len() >= MAX_FAULTS {
            return None;
        }
        self.last += 1;
        self.armed.push(Armed { number: self.last, fault, seen: 0, taken: 0 });
        Some(self.last)
    }

    /// Takes faults away for which `unwanted` says so; returns their numbers.
    pub(super) fn disarm(&mut self, mut unwanted: impl FnMut(&Armed<P, A>) -> bool) -> Vec<u64> {
        let gone = self.armed.extract_if(.., |armed| unwanted(armed));
        gone.map(|armed| armed.number).collect()
    }

    pub(super) fn armed(&self) -> &[Armed<P, A>] {
        &self.armed
    }

    /// What becomes of a request that is like the patterns for which `matches` says so: the number of the fault that it
    /// meets, and what that does.
    pub(super) fn meet(&mut self, matches: impl Fn(&P) -> bool) -> Option<(u64, A)> {
        let mut met = None;
        for (index, armed) in self.armed.iter_mut().enumerate() {
            if !matches(&armed.fault.pattern) {
                continue;
            }
            armed.seen += 1;
            if armed.seen > armed.fault.skip {
                armed.taken += 1;
                met = Some((index, armed.number, armed.fault.action));
                break;
            }
        }
        let (index, number, action) = met?;
        let armed = &self.armed[index];
        if armed.fault.count.is_some_and(|count| armed.taken >= count) {
            self.armed.remove(index);
        }
        Some((number, action))
    }
}
