//! The stream of events: one writer side that never waits, any number of readers.
//!
//! There is one bounded history, and a reader is a position in it. A reader that falls behind the oldest event that
//! is kept gets one [`Event::EventsLost`] with the number of those that it missed, and goes on from there. So memory
//! is bounded however many readers there are and however slow they are, and [`EventBus::publish`] takes one short
//! lock and never waits for a reader.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use aconite_devices::calendar::Calendar;

use super::{Event, Record};

/// Events that are kept for readers that come late or are slow.
pub const HISTORY: usize = 65536;

/// The stream of a machine's events. Clones are handles to the same stream.
#[derive(Debug, Clone)]
pub struct EventBus {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    start: Instant,
    capacity: usize,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    /// The last events; their numbers are consecutive and end at `last`.
    history: VecDeque<Arc<Record>>,
    /// Number of the last event, 0 before the first.
    last: u64,
    closed: bool,
}

impl Default for EventBus {
    fn default() -> Self {
        Self::new()
    }
}

impl EventBus {
    /// An empty stream that keeps the last [`HISTORY`] events.
    pub fn new() -> Self {
        Self::with_history(HISTORY)
    }

    /// An empty stream that keeps the last `capacity` events, at least one.
    pub fn with_history(capacity: usize) -> Self {
        let state = State { history: VecDeque::new(), last: 0, closed: false };
        Self {
            shared: Arc::new(Shared {
                start: Instant::now(),
                capacity: capacity.max(1),
                state: Mutex::new(state),
                changed: Condvar::new(),
            }),
        }
    }

    /// Appends an event and returns its number. Never waits for a reader. After [`EventBus::close`] it is dropped.
    pub fn publish(&self, event: Event) -> u64 {
        let mut state = self.lock();
        if state.closed {
            return state.last;
        }
        state.last += 1;
        let record = self.record(state.last, event);
        if state.history.len() == self.shared.capacity {
            state.history.pop_front();
        }
        state.history.push_back(Arc::new(record));
        let number = state.last;
        drop(state);
        self.shared.changed.notify_all();
        number
    }

    /// Number of the last event, 0 before the first.
    pub fn last(&self) -> u64 {
        self.lock().last
    }

    /// Nanoseconds since the stream was made.
    pub fn elapsed_ns(&self) -> u64 {
        u64::try_from(self.shared.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// A reader of all events after number `since`; 0 begins with the first.
    pub fn subscribe(&self, since: u64) -> Subscription {
        Subscription { bus: self.clone(), seen: since }
    }

    /// Ends the stream: readers get what is left, and then `None`.
    pub fn close(&self) {
        self.lock().closed = true;
        self.shared.changed.notify_all();
    }

    fn record(&self, seq: u64, event: Event) -> Record {
        Record { seq, host_ns: self.elapsed_ns(), time: rfc3339(SystemTime::now()), event }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a reader found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next {
    /// The next event, or the record of a gap.
    Record(Arc<Record>),
    /// Nothing new in the time that was given.
    Nothing,
    /// The stream has ended.
    Closed,
}

/// A reader's position in the stream.
#[derive(Debug)]
pub struct Subscription {
    bus: EventBus,
    /// Number of the last event that this reader has seen or been told of as lost.
    seen: u64,
}

impl Subscription {
    /// The next event, waiting for at most `timeout`.
    pub fn next(&mut self, timeout: Duration) -> Next {
        let deadline = Instant::now().checked_add(timeout);
        let bus = self.bus.clone();
        let mut state = bus.lock();
        loop {
            // A reader that asked for the future waits for it; one that asks beyond it by mistake sees what comes.
            if state.last > self.seen {
                let oldest = state.last - state.history.len() as u64 + 1;
                if self.seen + 1 < oldest {
                    let first = self.seen + 1;
                    self.seen = oldest - 1;
                    let lost = Event::EventsLost { count: oldest - first, first };
                    return Next::Record(Arc::new(bus.record(self.seen, lost)));
                }
                self.seen += 1;
                let index = (self.seen - oldest) as usize;
                return match state.history.get(index) {
                    Some(record) => Next::Record(record.clone()),
                    None => Next::Nothing,
                };
            }
            if state.closed {
                return Next::Closed;
            }
            let left = match deadline {
                Some(deadline) => deadline.saturating_duration_since(Instant::now()),
                None => timeout,
            };
            if left.is_zero() {
                return Next::Nothing;
            }
            state = bus.shared.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits up to `timeout` for an event that `wanted` accepts. `None` when it has not come or the stream has ended.
    pub fn wait_for(&mut self, timeout: Duration, wanted: impl Fn(&Event) -> bool) -> Option<Arc<Record>> {
        let start = Instant::now();
        loop {
            match self.next(timeout.saturating_sub(start.elapsed())) {
                Next::Record(record) if wanted(&record.event) => return Some(record),
                Next::Record(_) if start.elapsed() <= timeout => {}
                _ => return None,
            }
        }
    }
}

/// The time in UTC as RFC 3339 has it, with microseconds.
fn rfc3339(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let Calendar { year, month, day, hour, minute, second } = Calendar::from_epoch(since.as_secs() as i64);
    let micros = since.subsec_micros();
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{micros:06}Z")
}

#[cfg(test)]
#[path = "bus_test.rs"]
mod tests;
