//! What a process prints, collected while it runs.

use std::io::Read;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

#[derive(Debug, Default)]
struct State {
    bytes: Vec<u8>,
    ended: bool,
}

/// A stream that a thread of its own reads to its end.
#[derive(Clone, Debug, Default)]
pub struct Collected {
    shared: Arc<(Mutex<State>, Condvar)>,
}

impl Collected {
    /// Begins to read.
    pub fn start(mut stream: impl Read + Send + 'static) -> Self {
        let collected = Self::default();
        let shared = collected.shared.clone();
        thread::spawn(move || {
            let mut buffer = [0; 16 << 10];
            loop {
                let read = stream.read(&mut buffer).unwrap_or(0);
                let mut state = shared.0.lock().unwrap_or_else(PoisonError::into_inner);
                state.bytes.extend_from_slice(&buffer[..read]);
                state.ended = read == 0;
                shared.1.notify_all();
                if state.ended {
                    return;
                }
            }
        });
        collected
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Everything up to now.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.state().bytes).into_owned()
    }

    /// Waits until the text from byte `from` on contains `needle`; the place after it. `None` when the stream
    /// has ended or the time is over.
    pub fn wait_for(&self, from: usize, needle: &str, limit: Duration) -> Option<usize> {
        let deadline = Instant::now() + limit;
        let mut state = self.state();
        let mut searched = from;
        loop {
            let found =
                state.bytes[searched..].windows(needle.len()).position(|window| window == needle.as_bytes());
            if let Some(at) = found {
                return Some(searched + at + needle.len());
            }
            searched = state.bytes.len().saturating_sub(needle.len()).max(from);
            let left = deadline.saturating_duration_since(Instant::now());
            if state.ended || left.is_zero() {
                return None;
            }
            state = self.shared.1.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits for the end of the stream, and returns all of it.
    pub fn to_end(&self, limit: Duration) -> String {
        let deadline = Instant::now() + limit;
        let mut state = self.state();
        while !state.ended {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            state = self.shared.1.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        String::from_utf8_lossy(&state.bytes).into_owned()
    }

    /// The text between two places.
    pub fn between(&self, from: usize, to: usize) -> String {
        String::from_utf8_lossy(&self.state().bytes[from..to]).into_owned()
    }

    /// How much there is.
    pub fn len(&self) -> usize {
        self.state().bytes.len()
    }
}
