//! The threads that perform a device's requests, and call it when its time has come, so that neither a vCPU nor the main
//! loop waits for the host's storage. The devices themselves have no threads.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use aconite_devices::bus::{Effects, lock};
use aconite_devices::clock::Clock;
use aconite_devices::virtio::{Backend, VirtioPci, Worked};

/// Where goes what the threads of a device leave to do in the machine.
#[derive(Clone)]
pub struct Outbox(Arc<dyn Fn(Effects) + Send + Sync>);

impl Outbox {
    /// It goes to `send`.
    pub fn new(send: impl Fn(Effects) + Send + Sync + 'static) -> Self {
        Self(Arc::new(send))
    }
}

impl std::fmt::Debug for Outbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Outbox").finish_non_exhaustive()
    }
}

/// The way to the workers that perform jobs of this kind: a device's backend.
pub struct Workers<J>(Arc<Shared<J>>);

impl<J> Clone for Workers<J> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

struct Shared<J> {
    state: Mutex<State<J>>,
    changed: Condvar,
    clock: Clock,
}

struct State<J> {
    jobs: VecDeque<J>,
    /// When the device is to be called.
    call: Option<Duration>,
    ended: bool,
}

/// What a worker does next.
enum Task<J> {
    Perform(J),
    Call,
}

impl<J> Workers<J> {
    /// Workers that are still to be started; `clock` is the device's.
    pub fn new(clock: Clock) -> Self {
        let state = State { jobs: VecDeque::new(), call: None, ended: false };
        Self(Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new(), clock }))
    }
}

impl<J: Send> Backend<J> for Workers<J> {
    fn start(&mut self, job: J) {
        self.0.lock().jobs.push_back(job);
        self.0.changed.notify_one();
    }

    fn call_at(&mut self, at: Duration) {
        self.0.lock().call = Some(at);
        self.0.changed.notify_one();
    }
}

impl<J> Shared<J> {
    fn lock(&self) -> MutexGuard<'_, State<J>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for something to do; none at the end.
    fn next(&self) -> Option<Task<J>> {
        let mut state = self.lock();
        loop {
            if state.ended {
                return None;
            }
            let left = state.call.map(|at| at.saturating_sub((self.clock)()));
            if left == Some(Duration::ZERO) {
                state.call = None;
                return Some(Task::Call);
            }
            if let Some(job) = state.jobs.pop_front() {
                return Some(Task::Perform(job));
            }
            state = match left {
                Some(left) => {
                    self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
                }
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }
}

/// Workers at work. They end with this value: what they have begun is done, what waits is not.
pub struct Pool<J> {
    workers: Workers<J>,
    threads: Vec<JoinHandle<()>>,
}

impl<J: Send + 'static> Pool<J> {
    /// Starts `count` threads called `name` for a device, which do its jobs by `perform`. What they leave to do in the
    /// machine goes to `send`.
    ///
    /// # Errors
    /// The host has no more threads.
    pub fn start<D: Worked<Job = J> + 'static>(
        name: &str,
        workers: Workers<J>,
        count: usize,
        function: &Arc<Mutex<VirtioPci<D>>>,
        perform: impl Fn(&J) -> D::Done + Clone + Send + 'static,
        send: &Outbox,
    ) -> io::Result<Self> {
        let mut pool = Self { workers, threads: Vec::new() };
        for _ in 0..count {
            let (shared, function) = (pool.workers.0.clone(), function.clone());
            let (perform, send) = (perform.clone(), send.clone());
            let work = move || {
                while let Some(task) = shared.next() {
                    let mut effects = Effects::new();
                    match task {
                        Task::Perform(job) => {
                            let done = perform(&job);
                            lock(&function).finish(done, &mut effects);
                        }
                        Task::Call => lock(&function).tick(&mut effects),
                    }
                    (send.0)(effects);
                }
            };
            pool.threads.push(thread::Builder::new().name(name.to_owned()).spawn(work)?);
        }
        Ok(pool)
    }
}

impl<J> Drop for Pool<J> {
    fn drop(&mut self) {
        self.workers.0.lock().ended = true;
        self.workers.0.changed.notify_all();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a device's thread panicked");
            }
        }
    }
}
