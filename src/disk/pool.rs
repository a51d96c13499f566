//! The threads that perform a disk's requests, and call it when its time has come.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use aconite_devices::bus::{Effects, lock};
use aconite_devices::clock::Clock;
use aconite_devices::virtio::VirtioPci;
use aconite_devices::virtio::blk::{Backend, Blk, Job, Storage};

/// A disk's function, which the machine and its workers share.
pub type Function = Arc<Mutex<VirtioPci<Blk>>>;

/// The way to a disk's workers: the disk's backend.
#[derive(Clone)]
pub struct Workers(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    clock: Clock,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    /// When the disk is to be called.
    call: Option<Duration>,
    ended: bool,
}

/// What a worker does next.
enum Task {
    Perform(Box<Job>),
    Call,
}

impl Workers {
    /// Workers that are still to be started; `clock` is the disk's.
    pub fn new(clock: Clock) -> Self {
        Self(Arc::new(Shared { state: Mutex::default(), changed: Condvar::new(), clock }))
    }
}

impl Backend for Workers {
    fn start(&mut self, job: Job) {
        self.0.lock().jobs.push_back(job);
        self.0.changed.notify_one();
    }

    fn call_at(&mut self, at: Duration) {
        self.0.lock().call = Some(at);
        self.0.changed.notify_one();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for something to do; none at the end.
    fn next(&self) -> Option<Task> {
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
                return Some(Task::Perform(Box::new(job)));
            }
            state = match left {
                Some(left) => {
                    self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
                }
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }

    fn work(&self, function: &Function, storage: &dyn Storage, send: &dyn Fn(Effects)) {
        while let Some(task) = self.next() {
            let mut effects = Effects::new();
            match task {
                Task::Perform(job) => {
                    let done = job.perform(storage);
                    lock(function).finish(done, &mut effects);
                }
                Task::Call => lock(function).tick(&mut effects),
            }
            send(effects);
        }
    }
}

/// Workers at work. They end with this value: what they have begun is done, what waits is not.
pub struct Pool {
    workers: Workers,
    storage: Arc<dyn Storage>,
    threads: Vec<JoinHandle<()>>,
}

impl Pool {
    /// Starts `count` threads for the disk `name`. What they leave to do in the machine goes to `send`.
    ///
    /// # Errors
    /// The host has no more threads.
    pub fn start(
        name: &str,
        workers: Workers,
        count: usize,
        function: &Function,
        storage: Arc<dyn Storage>,
        send: impl Fn(Effects) + Clone + Send + 'static,
    ) -> io::Result<Self> {
        let mut pool = Self { workers, storage, threads: Vec::new() };
        for _ in 0..count {
            let (shared, function) = (pool.workers.0.clone(), function.clone());
            let (storage, send) = (pool.storage.clone(), send.clone());
            let work = move || shared.work(&function, &*storage, &send);
            pool.threads.push(thread::Builder::new().name(format!("disk-{name}")).spawn(work)?);
        }
        Ok(pool)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.workers.0.lock().ended = true;
        self.workers.0.changed.notify_all();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a disk's thread panicked");
            }
        }
        if let Err(error) = self.storage.flush() {
            tracing::error!(%error, "a disk's data could not be written back");
        }
    }
}
