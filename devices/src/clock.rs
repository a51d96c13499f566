//! Time as devices see it: a function that the caller gives.
//!
//! A device never asks the host what time it is. The monitor decides whether guest time runs on or stands still
//! while the machine is paused, and hands every device a clock that behaves so.

use std::sync::Arc;
use std::time::Duration;

/// A clock: the time since its epoch.
///
/// For [`crate::rtc::Rtc`] the epoch is 1970-01-01 00:00:00 UTC; for [`crate::pm_timer::PmTimer`] it is any fixed
/// moment, and the clock must not run backwards.
pub type Clock = Arc<dyn Fn() -> Duration + Send + Sync>;

#[cfg(test)]
pub(crate) mod testing {
    //! A clock that stands still until a test moves it.

    use std::sync::Mutex;

    use super::*;

    /// Handle of a clock that a test moves.
    #[derive(Clone, Default)]
    pub(crate) struct Hand(Arc<Mutex<Duration>>);

    impl Hand {
        pub(crate) fn at(seconds: u64) -> Self {
            let hand = Self::default();
            hand.advance(Duration::from_secs(seconds));
            hand
        }

        pub(crate) fn advance(&self, by: Duration) {
            *self.0.lock().unwrap() += by;
        }

        pub(crate) fn set(&self, to: Duration) {
            *self.0.lock().unwrap() = to;
        }

        pub(crate) fn clock(&self) -> Clock {
            let now = self.0.clone();
            Arc::new(move || *now.lock().unwrap())
        }
    }
}
