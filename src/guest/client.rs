//! Talks to the agent: one connection, any number of commands at a time, from any thread.
//!
//! Two threads belong to a connection. The reader hands what arrives to the channel it is for
//! and never waits for anybody; the writer sends what has been queued. So a guest that has
//! stopped reading holds up those that send data, but nobody who signals or hangs up.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use aconite_agent::protocol::{
    Decoder, Exec, ExitStatus, Frame, Hello, Message, Power, ProtocolError, Role, SESSION, Share, Stream,
    VERSION,
};
use thiserror::Error;

use super::process::{Channel, Connection, Process};

/// Bytes that wait to be sent beyond which those who send data wait too.
const QUEUE_LIMIT: usize = 256 * 1024;
/// How long the end of a connection waits for what has been queued to be sent.
const LAST_WORDS: Duration = Duration::from_secs(1);
const READ_SIZE: usize = 64 * 1024;

/// Why the agent did not do what was asked.
#[derive(Clone, Debug, Error)]
pub enum ClientError {
    /// Nothing was heard from the agent.
    #[error("The agent did not answer within {0:?}: see the console for what the machine does instead")]
    Silent(Duration),
    /// The agent is of another build.
    #[error(
        "The agent speaks protocol version {0} and this program version {VERSION}: pack the initramfs with this program"
    )]
    Version(u32),
    /// The connection is over.
    #[error("The connection to the agent is lost: {0}")]
    Lost(Arc<str>),
    /// The agent could not carry out a request. The text names what and why.
    #[error("{text}")]
    Failed {
        /// Number of the guest's error, 0 if it was something else.
        errno: i32,
        /// What went wrong in the guest.
        text: String,
    },
    /// The request is nothing that the protocol can carry.
    #[error("The request cannot be sent to the agent")]
    Request(#[from] ProtocolError),
    /// A descriptor or thread for the connection could not be had.
    #[error("Cannot set up the connection to the agent")]
    Setup(#[source] Arc<io::Error>),
}

impl ClientError {
    /// The exit status that a shell has for a command that could not be started: 127 if it is not
    /// there, 126 if it cannot be run; `None` for errors that are not about the command.
    pub fn shell_code(&self) -> Option<i32> {
        match self {
            ClientError::Failed { errno: libc::ENOENT, .. } => Some(127),
            ClientError::Failed { .. } => Some(126),
            _ => None,
        }
    }
}

/// A connection to an agent. Clones are the same connection; it ends when the last one and
/// the last of its processes and connections are dropped.
#[derive(Clone, Debug)]
pub struct Client {
    link: Arc<Link>,
    _end: Arc<EndOfLink>,
    hello: Arc<Hello>,
}

/// The wire with its queue, and the channels on it.
pub(super) struct Link {
    queue: Mutex<Queue>,
    queue_changed: Condvar,
    state: Mutex<State>,
    state_changed: Condvar,
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link").finish_non_exhaustive()
    }
}

#[derive(Default)]
struct Queue {
    bytes: VecDeque<u8>,
    /// The writer has bytes in hand.
    writing: bool,
    ended: bool,
}

struct State {
    nonce: u64,
    hello: Option<Hello>,
    channels: HashMap<u32, Arc<Channel>>,
    last_channel: u32,
    lost: Option<Arc<str>>,
}

/// Ends the wire when nobody uses it any more.
pub(super) struct EndOfLink {
    link: Arc<Link>,
    close: Box<dyn Fn() + Send + Sync>,
}

impl std::fmt::Debug for EndOfLink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EndOfLink").finish_non_exhaustive()
    }
}

impl Drop for EndOfLink {
    fn drop(&mut self) {
        self.link.wait_for_writer(LAST_WORDS);
        self.link.lose("it was closed here");
        (self.close)();
    }
}

/// Locks. What a panicking thread has left behind is still consistent: no lock is held over calls that may panic.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Client {
    /// Meets the agent at the other end of a socket, waiting at most `timeout` for it.
    ///
    /// # Errors
    /// The agent does not answer, or is of another build.
    pub fn connect(stream: UnixStream, timeout: Duration) -> Result<Client, ClientError> {
        let setup = |error| ClientError::Setup(Arc::new(error));
        let reader = stream.try_clone().map_err(setup)?;
        let writer = stream.try_clone().map_err(setup)?;
        // Fails only when the other side has shut down already.
        Client::over(reader, writer, move || drop(stream.shutdown(Shutdown::Both)), timeout)
    }

    /// Meets the agent over any pair of byte streams. `close` must end reads and writes that wait.
    ///
    /// # Errors
    /// The agent does not answer, or is of another build.
    pub fn over(
        reader: impl Read + Send + 'static,
        writer: impl Write + Send + 'static,
        close: impl Fn() + Send + Sync + 'static,
        timeout: Duration,
    ) -> Result<Client, ClientError> {
        // Any number will do that another session has not chosen.
        let nonce = RandomState::new().hash_one(Instant::now()) | 1;
        let state = State { nonce, hello: None, channels: HashMap::new(), last_channel: 0, lost: None };
        let link = Arc::new(Link {
            queue: Mutex::default(),
            queue_changed: Condvar::new(),
            state: Mutex::new(state),
            state_changed: Condvar::new(),
        });
        let end = Arc::new(EndOfLink { link: link.clone(), close: Box::new(close) });
        let (read_link, write_link) = (link.clone(), link.clone());
        let spawn = |name: &str, work: Box<dyn FnOnce() + Send>| {
            let thread = thread::Builder::new().name(name.into()).spawn(work);
            thread.map(drop).map_err(|error| ClientError::Setup(Arc::new(error)))
        };
        spawn("agent-read", Box::new(move || read_link.read_all(reader)))?;
        spawn("agent-write", Box::new(move || write_link.write_all(writer)))?;
        link.send(SESSION, link.greeting(nonce))?;
        let hello = link.wait_for_hello(timeout)?;
        if hello.version != VERSION {
            return Err(ClientError::Version(hello.version));
        }
        Ok(Client { link, _end: end, hello: Arc::new(hello) })
    }

    /// What the agent said of itself and its machine.
    pub fn hello(&self) -> &Hello {
        &self.hello
    }

    /// Runs a command; returns when it has been started.
    ///
    /// # Errors
    /// The command cannot be started ([`ClientError::Failed`]), or the connection is lost.
    pub fn exec(&self, command: Exec) -> Result<Process, ClientError> {
        let (channel, pid) = self.open(Message::Exec(command))?;
        Ok(Process::new(channel, pid))
    }

    /// Connects to a Unix stream socket of the machine.
    ///
    /// # Errors
    /// Nobody listens there, or the connection to the agent is lost.
    pub fn connect_socket(&self, path: &[u8]) -> Result<Connection, ClientError> {
        let (channel, _) = self.open(Message::Connect(path.to_vec()))?;
        Ok(Connection::new(channel))
    }

    /// Mounts a 9p share.
    ///
    /// # Errors
    /// The machine cannot mount it, or the connection is lost.
    pub fn mount(&self, share: Share) -> Result<(), ClientError> {
        self.request(Message::Mount(share))
    }

    /// Unmounts what is at `path`.
    ///
    /// # Errors
    /// It is in use or not mounted, or the connection is lost.
    pub fn unmount(&self, path: &[u8]) -> Result<(), ClientError> {
        self.request(Message::Unmount(path.to_vec()))
    }

    /// Asks for the end of the machine after a sync. Does not wait for it: the machine cannot
    /// say that it is gone.
    ///
    /// # Errors
    /// The connection is lost already.
    pub fn power(&self, power: Power) -> Result<(), ClientError> {
        let number = self.link.new_channel()?.number();
        self.link.send(number, Message::Power(power))
    }

    /// The connection is over, and why.
    pub fn lost(&self) -> Option<ClientError> {
        lock(&self.link.state).lost.clone().map(ClientError::Lost)
    }

    fn open(&self, request: Message) -> Result<(OpenChannel, u32), ClientError> {
        let channel = self.link.new_channel()?;
        let open = OpenChannel { link: self.link.clone(), _end: self._end.clone(), channel };
        if let Err(error) = self.link.send(open.channel.number(), request) {
            self.link.forget(open.channel.number());
            return Err(error);
        }
        let pid = open.channel.wait_opened()?;
        Ok((open, pid))
    }

    fn request(&self, request: Message) -> Result<(), ClientError> {
        let channel = self.link.new_channel()?;
        if let Err(error) = self.link.send(channel.number(), request) {
            self.link.forget(channel.number());
            return Err(error);
        }
        channel.wait(None).map(drop)
    }
}

/// A channel and the wire that it is on.
#[derive(Clone, Debug)]
pub(super) struct OpenChannel {
    link: Arc<Link>,
    _end: Arc<EndOfLink>,
    pub(super) channel: Arc<Channel>,
}

impl OpenChannel {
    pub(super) fn send(&self, message: Message) -> Result<(), ClientError> {
        self.link.send(self.channel.number(), message)
    }

    /// Sends data when the queue has room for it.
    pub(super) fn send_data(&self, stream: Stream, bytes: &[u8]) -> Result<(), ClientError> {
        self.link.wait_for_room();
        self.send(Message::Data(stream, bytes.to_vec()))
    }
}

impl Link {
    fn greeting(&self, nonce: u64) -> Message {
        let (release, kernel) = (String::new(), String::new());
        let version = VERSION;
        Message::Hello(Hello {
            version,
            nonce,
            role: Role::Host,
            kvm: false,
            release,
            kernel,
            notes: Vec::new(),
        })
    }

    fn wait_for_hello(&self, timeout: Duration) -> Result<Hello, ClientError> {
        let waiting = |state: &mut State| state.hello.is_none() && state.lost.is_none();
        let state = self.state_changed.wait_timeout_while(lock(&self.state), timeout, waiting);
        let (state, _) = state.unwrap_or_else(PoisonError::into_inner);
        match (&state.hello, &state.lost) {
            (Some(hello), _) => Ok(hello.clone()),
            (None, Some(reason)) => Err(ClientError::Lost(reason.clone())),
            (None, None) => Err(ClientError::Silent(timeout)),
        }
    }

    fn new_channel(&self) -> Result<Arc<Channel>, ClientError> {
        let mut state = lock(&self.state);
        if let Some(reason) = &state.lost {
            return Err(ClientError::Lost(reason.clone()));
        }
        let number = loop {
            state.last_channel = state.last_channel.checked_add(1).unwrap_or(SESSION + 1);
            if !state.channels.contains_key(&state.last_channel) {
                break state.last_channel;
            }
        };
        let channel = Arc::new(Channel::new(number));
        state.channels.insert(number, channel.clone());
        Ok(channel)
    }

    fn forget(&self, number: u32) {
        lock(&self.state).channels.remove(&number);
    }

    fn send(&self, channel: u32, message: Message) -> Result<(), ClientError> {
        let mut bytes = Vec::new();
        Frame { channel, message }.encode(&mut bytes)?;
        let mut queue = lock(&self.queue);
        if queue.ended {
            drop(queue);
            return Err(self.reason());
        }
        queue.bytes.extend(bytes);
        self.queue_changed.notify_all();
        Ok(())
    }

    fn wait_for_room(&self) {
        let full = |queue: &mut Queue| queue.bytes.len() > QUEUE_LIMIT && !queue.ended;
        drop(self.queue_changed.wait_while(lock(&self.queue), full));
    }

    fn reason(&self) -> ClientError {
        let reason = lock(&self.state).lost.clone();
        ClientError::Lost(reason.unwrap_or_else(|| "it is ending".into()))
    }

    fn write_all(&self, mut writer: impl Write) {
        loop {
            let empty = |queue: &mut Queue| queue.bytes.is_empty() && !queue.ended;
            let queue = self.queue_changed.wait_while(lock(&self.queue), empty);
            let mut queue = queue.unwrap_or_else(PoisonError::into_inner);
            let bytes = std::mem::take(&mut queue.bytes);
            if bytes.is_empty() {
                return;
            }
            queue.writing = true;
            self.queue_changed.notify_all();
            drop(queue);
            let (head, tail) = bytes.as_slices();
            let written = writer.write_all(head).and_then(|()| writer.write_all(tail));
            if let Err(error) = written.and_then(|()| writer.flush()) {
                self.lose(&error.to_string());
            }
            lock(&self.queue).writing = false;
            self.queue_changed.notify_all();
        }
    }

    fn wait_for_writer(&self, timeout: Duration) {
        let busy = |queue: &mut Queue| (queue.writing || !queue.bytes.is_empty()) && !queue.ended;
        drop(self.queue_changed.wait_timeout_while(lock(&self.queue), timeout, busy));
    }

    fn read_all(&self, mut reader: impl Read) {
        let mut decoder = Decoder::new();
        decoder.resynchronize();
        let mut buffer = vec![0; READ_SIZE];
        loop {
            match reader.read(&mut buffer) {
                Ok(0) => return self.lose("the machine has closed it"),
                Ok(count) => decoder.push(&buffer[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return self.lose(&error.to_string()),
            }
            loop {
                match decoder.next() {
                    Ok(None) => break,
                    Ok(Some(frame)) => {
                        if let Err(reason) = self.handle(frame) {
                            return self.lose(&reason);
                        }
                    }
                    Err(error) => {
                        return self.lose(&format!("the agent sends what is not the protocol: {error}"));
                    }
                }
            }
        }
    }

    /// Takes a frame from the agent. An error ends the connection.
    fn handle(&self, frame: Frame) -> Result<(), String> {
        let mut state = lock(&self.state);
        if let Message::Hello(hello) = frame.message {
            let nonce = state.nonce;
            if hello.nonce == nonce {
                state.hello.get_or_insert(hello);
                self.state_changed.notify_all();
            } else if hello.nonce == 0 && state.hello.is_some() {
                return Err("the agent has broken it off".into());
            } else if hello.nonce == 0 {
                // It has just started: what was sent before may have gone to nobody.
                drop(state);
                let _ = self.send(SESSION, self.greeting(nonce));
            }
            return Ok(());
        }
        let Some(channel) = state.channels.get(&frame.channel).cloned() else { return Ok(()) };
        if matches!(frame.message, Message::Exit(_) | Message::Failed { .. }) {
            state.channels.remove(&frame.channel);
        }
        drop(state);
        match channel.take(frame.message) {
            Ok(None) => Ok(()),
            Ok(Some(reply)) => self.send(frame.channel, reply).map_err(|error| error.to_string()),
            Err(message) => Err(format!("the agent sends what it must not: {message}")),
        }
    }

    /// Ends the connection for all who use it.
    fn lose(&self, reason: &str) {
        let mut state = lock(&self.state);
        let reason = state.lost.get_or_insert_with(|| reason.into()).clone();
        let channels = std::mem::take(&mut state.channels);
        drop(state);
        self.state_changed.notify_all();
        for channel in channels.into_values() {
            channel.end(Err(ClientError::Lost(reason.clone())));
        }
        lock(&self.queue).ended = true;
        self.queue_changed.notify_all();
    }
}

/// How a channel has ended.
pub(super) type End = Result<ExitStatus, ClientError>;

#[cfg(test)]
#[path = "client_test.rs"]
mod tests;
