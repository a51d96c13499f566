//! The threads that perform a device's requests, hear its driver's notifications, and call it when its time has come, so
//! that neither a vCPU nor the main loop waits for the host's storage. The devices themselves have no threads.
//!
//! The thread that hears a notification takes the requests out of the queue, performs the first of them and completes it:
//! a request that comes alone wakes one thread.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use aconite_devices::bus::{Effects, lock};
use aconite_devices::clock::Clock;
use aconite_devices::virtio::{Backend, QueueHandler, VirtioPci, Worked};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

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
    /// What idle workers wait for: the bell, and those of the queues. Each is edge-triggered and never read, so that every
    /// ring wakes one of them (epoll(7)).
    waiting: Epoll,
    /// Rung when there is something in the state to look at.
    bell: EventFd,
    clock: Clock,
}

struct State<J> {
    jobs: VecDeque<J>,
    /// When the device is to be called.
    call: Option<Duration>,
    /// Workers that will look here before they wait or perform anything: nobody need be woken for so many jobs.
    coming: usize,
    ended: bool,
}

/// What a worker does next.
enum Task<J> {
    Perform(J),
    Call,
    /// The driver has notified a queue.
    Look(u16),
}

/// What says that the bell was rung, where a number below says which queue's.
const BELL: u64 = 1 << 16;

impl<J> Workers<J> {
    /// Workers that are still to be started; `clock` is the device's.
    ///
    /// # Errors
    /// The host has no more descriptors.
    pub fn new(clock: Clock) -> io::Result<Self> {
        let state = State { jobs: VecDeque::new(), call: None, coming: 0, ended: false };
        let (waiting, bell) = (Epoll::new()?, EventFd::new(EFD_NONBLOCK)?);
        let shared = Shared { state: Mutex::new(state), waiting, bell, clock };
        shared.listen(&shared.bell, BELL)?;
        Ok(Self(Arc::new(shared)))
    }

    /// A bell that has a worker look into queue `queue` of the device whenever it is rung.
    ///
    /// # Errors
    /// The host has no more descriptors.
    pub fn bell(&self, queue: u16) -> io::Result<Arc<EventFd>> {
        let bell = EventFd::new(EFD_NONBLOCK)?;
        self.0.listen(&bell, u64::from(queue))?;
        Ok(Arc::new(bell))
    }
}

impl<J: Send> Backend<J> for Workers<J> {
    fn start(&mut self, job: J) {
        let mut state = self.0.lock();
        state.jobs.push_back(job);
        if state.jobs.len() > state.coming {
            drop(state);
            self.0.ring();
        }
    }

    fn call_at(&mut self, at: Duration) {
        let mut state = self.0.lock();
        state.call = Some(at);
        if state.coming == 0 {
            drop(state);
            self.0.ring();
        }
    }
}

impl<J> Shared<J> {
    fn lock(&self) -> MutexGuard<'_, State<J>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn listen(&self, bell: &EventFd, number: u64) -> io::Result<()> {
        let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, number);
        self.waiting.ctl(ControlOperation::Add, bell.as_raw_fd(), event)
    }

    fn ring(&self) {
        if let Err(error) = self.bell.write(1) {
            tracing::error!(%error, "a device's thread was not woken");
        }
    }

    /// One more worker will call [`Self::next`] before it waits or performs anything.
    fn announce(&self) {
        self.lock().coming += 1;
    }

    /// Waits for something to do; none at the end. Whoever calls this was announced.
    fn next(&self) -> Option<Task<J>> {
        let mut state = self.lock();
        state.coming -= 1;
        loop {
            if state.ended {
                // The next one, which passes it on.
                self.ring();
                return None;
            }
            let left = state.call.map(|at| at.saturating_sub((self.clock)()));
            if left == Some(Duration::ZERO) {
                state.call = None;
                state.coming += 1;
                return Some(Task::Call);
            }
            if let Some(job) = state.jobs.pop_front() {
                // Rings that come together are heard as one.
                if state.jobs.len() > state.coming || state.call.is_some() {
                    self.ring();
                }
                return Some(Task::Perform(job));
            }
            drop(state);
            let rung = self.wait(left);
            state = self.lock();
            if let Some(queue) = rung {
                state.coming += 1;
                return Some(Task::Look(queue));
            }
        }
    }

    /// Waits for a bell, at most for `left`; the queue whose bell it was, if it was one's.
    fn wait(&self, left: Option<Duration>) -> Option<u16> {
        // Not before the time has come.
        let timeout = left.map_or(-1, |left| i32::try_from(left.as_millis() + 1).unwrap_or(i32::MAX));
        let mut rung = [EpollEvent::default()];
        match self.waiting.wait(timeout, &mut rung) {
            Ok(1) => u16::try_from(rung[0].data()).ok(),
            Ok(_) => None,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => None,
            Err(error) => {
                tracing::error!(%error, "a device's thread cannot wait");
                None
            }
        }
    }
}

/// Workers at work. They end with this value: what they have begun is done, what waits is not.
pub struct Pool<J> {
    workers: Workers<J>,
    threads: Vec<JoinHandle<()>>,
}

impl<J: Send + 'static> Pool<J> {
    /// Starts `count` threads called `name` for a device, which do its jobs by `perform`, each by a clone of its own. What
    /// they leave to do in the machine goes to `send`.
    ///
    /// # Errors
    /// The host has no more threads.
    pub fn start<D: Worked<Job = J> + 'static>(
        name: &str,
        workers: Workers<J>,
        count: usize,
        function: &Arc<Mutex<VirtioPci<D>>>,
        perform: impl FnMut(&J) -> D::Done + Clone + Send + 'static,
        send: &Outbox,
    ) -> io::Result<Self> {
        let mut pool = Self { workers, threads: Vec::new() };
        for _ in 0..count {
            pool.workers.0.announce();
            let (shared, function) = (pool.workers.0.clone(), function.clone());
            let (mut perform, send) = (perform.clone(), send.clone());
            let work = move || {
                while let Some(task) = shared.next() {
                    let mut effects = Effects::new();
                    match task {
                        Task::Perform(job) => {
                            let done = perform(&job);
                            shared.announce();
                            lock(&function).finish(done, &mut effects);
                        }
                        Task::Call => lock(&function).tick(&mut effects),
                        Task::Look(queue) => lock(&function).process_queue(queue, &mut effects),
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
        self.workers.0.ring();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a device's thread panicked");
            }
        }
    }
}

#[cfg(test)]
#[path = "workers_test.rs"]
mod tests;
