//! The way into a machine's main loop, and out of it to the agent in the guest.

use std::collections::VecDeque;
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use super::outcome::Cause;
use super::tell::GuestUnit;
use crate::api::Executor;
use crate::command::{
    Census, Command, Error, ErrorCode, EventBus, PoisonPlace, ProcessMemory, RemoveMode, Reply,
};
use crate::units::ByteRange;

/// A command, and where its reply goes.
type Asked = (Command, Sender<Result<Reply, Error>>);

/// What the main loop is to do.
#[derive(Debug, Default)]
pub(super) struct Requests {
    pub(super) commands: VecDeque<Asked>,
    pub(super) stop: Option<Cause>,
    pub(super) closed: bool,
}

/// The way into a machine's main loop, for any thread.
#[derive(Clone, Debug)]
pub struct Handle {
    requests: Arc<Mutex<Requests>>,
    pub(super) wake: Arc<EventFd>,
    events: EventBus,
    pub(super) agent: Arc<OnceLock<Arc<dyn GuestAgent>>>,
}

/// Whoever can look into the guest, and act in it.
pub trait GuestAgent: Send + Sync + std::fmt::Debug {
    /// The guest-physical addresses of `memory`, in order of virtual address. The guest may move it at any time.
    ///
    /// # Errors
    /// There is no such process, or the memory is not there; or nobody answers.
    fn look_up(&self, memory: ProcessMemory) -> Result<Vec<ByteRange>, Error>;

    /// Names the processes that have the mappings of the user's half, as far as it can.
    ///
    /// # Errors
    /// Nobody answers.
    fn name_owners(&self, census: &mut Census) -> Result<(), Error>;

    /// Makes the guest let go of a unit, in order or at once. Returns when it has, or with why it has not.
    ///
    /// # Errors
    /// The guest uses it still, or nobody answers.
    fn let_go(&self, unit: &GuestUnit, mode: RemoveMode) -> Result<(), Error>;

    /// Makes the guest use a unit that it had let go of by [`Self::let_go`].
    ///
    /// # Errors
    /// No driver takes it, or nobody answers.
    fn take_up(&self, unit: &GuestUnit) -> Result<(), Error>;
}

pub(super) fn no_agent() -> Error {
    Error::new(
        ErrorCode::WrongState,
        "The memory of processes is looked up by the agent, which does not answer (yet)",
        "wait for the event agent_ready, or start the machine with its agent, or name addresses of ram",
    )
}

impl Handle {
    /// The way into a main loop that waits for `wake`.
    pub(super) fn new(wake: Arc<EventFd>, events: EventBus) -> Self {
        Self { requests: Arc::default(), wake, events, agent: Arc::default() }
    }

    /// Ends the machine for `cause`, the first one counts.
    pub fn stop(&self, cause: Cause) {
        self.requests().stop.get_or_insert(cause);
        self.ring();
    }

    /// From now on `agent` is there.
    pub fn meet(&self, agent: Arc<dyn GuestAgent>) {
        // A machine has one agent, which is connected to once.
        let _ = self.agent.set(agent);
    }

    fn ring(&self) {
        if let Err(error) = self.wake.write(1) {
            tracing::error!(%error, "the main loop was not woken");
        }
    }

    pub(super) fn requests(&self) -> MutexGuard<'_, Requests> {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Executor for Handle {
    fn execute(&self, command: Command) -> Result<Reply, Error> {
        // Asked here and not in the main loop, which carries the answer.
        let command = match command {
            Command::PoisonPlace { place: PoisonPlace::Process(memory) } => {
                let agent = self.agent.get().ok_or_else(no_agent)?;
                Command::PoisonPlace { place: PoisonPlace::Addresses(agent.look_up(memory)?) }
            }
            command => command,
        };
        let (sender, receiver) = mpsc::channel();
        {
            let mut requests = self.requests();
            if requests.closed {
                return Err(Error::machine_gone());
            }
            requests.commands.push_back((command, sender));
        }
        self.ring();
        let mut reply = receiver.recv().unwrap_or_else(|_| Err(Error::machine_gone()));
        if let (Ok(Reply::Census(census)), Some(agent)) = (&mut reply, self.agent.get()) {
            // Without names it says as much.
            if let Err(error) = agent.name_owners(census) {
                tracing::warn!(%error, "the agent does not name the processes of a census");
            }
        }
        reply
    }

    fn events(&self) -> &EventBus {
        &self.events
    }
}
