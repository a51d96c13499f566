//! The baton: who holds it is alone, with every other vCPU outside KVM_RUN.
//!
//! It is the innermost lock of the program. A holder never waits for the main loop, a device, DMA or an
//! event queue.
//!
//! It goes round: who asks first is first, and a vCPU that has stood outside for a while runs, for a while, before the
//! next holder stops it again, however fast one that steps through a guarded page asks for the baton again.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::Kick;

/// How long a kick may take before it is repeated.
const KICK_AGAIN: Duration = Duration::from_millis(5);

/// How long a vCPU may be kept outside by holders that follow each other.
const PATIENCE: Duration = Duration::from_millis(5);

/// How long a vCPU that was let in for that runs at least: on a slow host a kick would meet it before its first
/// instruction.
const SLICE: Duration = Duration::from_millis(1);

/// The machine is stopping; the vCPU thread ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stopped;

#[derive(Debug, Default)]
struct Gate {
    running: AtomicBool,
    kick: Mutex<Option<Kick>>,
}

impl Gate {
    /// Whether the vCPU runs.
    fn kick_if_running(&self) -> bool {
        let running = self.running.load(Ordering::SeqCst);
        if running && let Some(kick) = &*self.kick.lock().unwrap_or_else(PoisonError::into_inner) {
            // SAFETY: a thread takes its kick out, under this lock, before it ends.
            unsafe { kick.send() };
        }
        running
    }
}

#[derive(Debug, Default)]
struct State {
    held: bool,
    stopping: bool,
    /// How many have asked for the baton, and how many have given it back.
    asked: u64,
    served: u64,
    /// vCPUs that wait to enter, and since when the first of them does.
    outside: usize,
    since: Option<Instant>,
    /// Those of them that enter before there is another holder.
    admitted: usize,
    /// When the last of them did.
    let_in: Option<Instant>,
}

/// One per machine.
#[derive(Debug)]
pub struct Baton {
    gates: Vec<Gate>,
    /// Fast view of `State`: someone holds the baton or the machine stops.
    closed: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

impl Baton {
    /// A baton for `cpus` vCPUs.
    pub fn new(cpus: usize) -> Arc<Self> {
        Arc::new(Self {
            gates: (0..cpus).map(|_| Gate::default()).collect(),
            closed: AtomicBool::new(false),
            state: Mutex::default(),
            changed: Condvar::new(),
        })
    }

    /// Names the way to kick vCPU `cpu`; none once its thread is about to end.
    pub fn set_kick(&self, cpu: usize, kick: Option<Kick>) {
        *self.gates[cpu].kick.lock().unwrap_or_else(PoisonError::into_inner) = kick;
    }

    /// A vCPU is about to run: waits while somebody holds the baton, and returns how long it waited.
    pub fn enter(&self, cpu: usize) -> Result<Duration, Stopped> {
        self.gates[cpu].running.store(true, Ordering::SeqCst);
        if !self.closed.load(Ordering::SeqCst) {
            return Ok(Duration::ZERO);
        }
        self.leave(cpu);
        let begun = Instant::now();
        let mut state = self.state();
        state.outside += 1;
        state.since.get_or_insert(begun);
        while self.closed.load(Ordering::SeqCst) && !state.stopping {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.outside -= 1;
        if state.admitted > 0 {
            state.admitted -= 1;
            state.let_in = Some(Instant::now());
        }
        if state.outside == 0 {
            state.since = None;
        }
        self.changed.notify_all();
        if state.stopping {
            return Err(Stopped);
        }
        // Nobody closes it without the lock: it is in.
        self.gates[cpu].running.store(true, Ordering::SeqCst);
        Ok(begun.elapsed())
    }

    /// A vCPU is back from KVM_RUN.
    pub fn leave(&self, cpu: usize) {
        self.gates[cpu].running.store(false, Ordering::SeqCst);
        if self.closed.load(Ordering::SeqCst) {
            let _state = self.state();
            self.changed.notify_all();
        }
    }

    /// Takes the baton, and returns once no vCPU runs. A vCPU that takes it has left before.
    pub fn take(self: &Arc<Self>) -> Result<Held, Stopped> {
        let held = self.hold()?;
        held.stand_still();
        Ok(held)
    }

    /// Takes the baton while vCPUs run: no guard changes and no other takes it, until [`Held::stand_still`] or the end.
    pub fn hold(self: &Arc<Self>) -> Result<Held, Stopped> {
        let mut state = self.state();
        let turn = state.asked;
        state.asked += 1;
        while (state.held || state.served != turn || state.admitted > 0) && !state.stopping {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.stopping {
            return Err(Stopped);
        }
        state.held = true;
        Ok(Held { baton: self.clone() })
    }

    /// Lets every vCPU thread end at its next step outside KVM_RUN.
    pub fn stop(&self) {
        let mut state = self.state();
        state.stopping = true;
        self.closed.store(true, Ordering::SeqCst);
        self.changed.notify_all();
        drop(state);
        self.kick_running();
    }

    /// Gets vCPU `cpu` out of KVM_RUN, if it is there, or keeps it from entering; it comes back at once.
    pub fn kick(&self, cpu: usize) {
        if let Some(gate) = self.gates.get(cpu) {
            gate.kick_if_running();
        }
    }

    /// Whether [`Self::stop`] was called.
    pub fn stopping(&self) -> bool {
        self.state().stopping
    }

    fn wait_until_out(&self, mut state: MutexGuard<'_, State>) {
        while self.kick_running() {
            state = self.changed.wait_timeout(state, KICK_AGAIN).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn any_runs(&self) -> bool {
        self.gates.iter().any(|gate| gate.running.load(Ordering::SeqCst))
    }

    /// Kicks every vCPU that runs; whether there was one.
    fn kick_running(&self) -> bool {
        let mut any = false;
        for gate in &self.gates {
            any |= gate.kick_if_running();
        }
        any
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The baton is held until this is dropped.
#[derive(Debug)]
pub struct Held {
    baton: Arc<Baton>,
}

impl Held {
    /// Returns once no vCPU runs.
    pub fn stand_still(&self) {
        let mut state = self.baton.state();
        while let Some(left) = state.let_in.and_then(|since| SLICE.checked_sub(since.elapsed()))
            && self.baton.any_runs()
            && !state.stopping
        {
            state = self.baton.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        state.let_in = None;
        self.baton.closed.store(true, Ordering::SeqCst);
        self.baton.wait_until_out(state);
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut state = self.baton.state();
        state.held = false;
        state.served += 1;
        if !state.stopping {
            self.baton.closed.store(false, Ordering::SeqCst);
        }
        if state.since.is_some_and(|since| since.elapsed() >= PATIENCE) {
            state.admitted = state.outside;
        }
        self.baton.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;
    use std::thread;

    #[test]
    fn a_holder_alone_stops_nobody() {
        let baton = Baton::new(1);
        let held = baton.hold().unwrap();
        assert!(baton.enter(0).is_ok(), "a vCPU runs on");
        let other = thread::spawn({
            let baton = baton.clone();
            move || baton.hold().map(drop)
        });
        baton.leave(0);
        held.stand_still();
        assert!(!other.is_finished(), "there is one holder");
        drop(held);
        assert_eq!(other.join().unwrap(), Ok(()));
    }

    #[test]
    fn who_asks_first_is_first() {
        let baton = Baton::new(1);
        let held = baton.take().unwrap();
        let order = Mutex::new(Vec::new());
        thread::scope(|scope| {
            scope.spawn(|| {
                let _held = baton.take().unwrap();
                order.lock().unwrap().push("the other");
            });
            while baton.state().asked < 2 {
                thread::yield_now();
            }
            drop(held);
            let _held = baton.take().unwrap();
            order.lock().unwrap().push("the same again");
        });
        assert_eq!(*order.lock().unwrap(), ["the other", "the same again"]);
    }

    #[test]
    fn holders_that_follow_each_other_do_not_shut_a_vcpu_out() {
        let baton = Baton::new(1);
        let held = baton.take().unwrap();
        thread::scope(|scope| {
            let vcpu = scope.spawn(|| {
                baton.enter(0).unwrap();
                baton.leave(0);
            });
            while baton.state().outside == 0 {
                thread::yield_now();
            }
            thread::sleep(PATIENCE);
            drop(held);
            let again = baton.take().unwrap();
            assert_eq!(baton.state().outside, 0, "it was let in before");
            drop(again);
            vcpu.join().unwrap();
        });
    }

    #[test]
    fn who_was_let_in_is_not_stopped_at_once() {
        let baton = Baton::new(1);
        let held = baton.take().unwrap();
        thread::scope(|scope| {
            scope.spawn(|| {
                baton.enter(0).unwrap();
                while !baton.closed.load(Ordering::SeqCst) {
                    thread::yield_now();
                }
                baton.leave(0);
            });
            while baton.state().outside == 0 {
                thread::yield_now();
            }
            thread::sleep(PATIENCE);
            let begun = Instant::now();
            drop(held);
            drop(baton.take().unwrap());
            assert!(begun.elapsed() >= SLICE);
        });
    }

    #[test]
    fn a_holder_is_alone() {
        const CPUS: usize = 4;
        let baton = Baton::new(CPUS);
        let inside = AtomicU32::new(0);
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            for cpu in 0..CPUS {
                let (baton, inside, done) = (&baton, &inside, &done);
                scope.spawn(move || {
                    let mut turn = 0u32;
                    while baton.enter(cpu).is_ok() {
                        inside.fetch_add(1, Ordering::SeqCst);
                        thread::yield_now();
                        inside.fetch_sub(1, Ordering::SeqCst);
                        baton.leave(cpu);
                        turn += 1;
                        if turn.is_multiple_of(7) {
                            let Ok(_held) = baton.take() else { return };
                            assert_eq!(inside.load(Ordering::SeqCst), 0);
                        }
                        if done.load(Ordering::SeqCst) {
                            return;
                        }
                    }
                });
            }
            for _ in 0..200 {
                let held = baton.take().unwrap();
                assert_eq!(inside.load(Ordering::SeqCst), 0);
                thread::yield_now();
                assert_eq!(inside.load(Ordering::SeqCst), 0);
                drop(held);
            }
            done.store(true, Ordering::SeqCst);
        });
    }

    #[test]
    fn stopping_ends_those_who_wait() {
        let baton = Baton::new(1);
        let held = baton.take().unwrap();
        thread::scope(|scope| {
            let waiter = scope.spawn(|| baton.enter(0).map(|_| ()));
            let taker = scope.spawn(|| baton.take().map(|_| ()));
            baton.stop();
            assert_eq!(waiter.join().unwrap(), Err(Stopped));
            assert_eq!(taker.join().unwrap(), Err(Stopped));
        });
        drop(held);
        assert_eq!(baton.enter(0), Err(Stopped));
    }
}
