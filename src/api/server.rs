//! The server: a thread that accepts, and one thread for each connection, of which there are only so many.

use std::io;
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::http::{ReadError, RequestReader, Response};
use super::request;
use super::routes::Action;
use super::socket::{Socket, SocketError};
use super::{Executor, Limits, openapi, stream};
use crate::command::{Command, Error, ErrorCode, Event, Next, Operation, OperationState, Reply};
use crate::units::TimeSpan;

/// How long the last replies and events may take when the server stops.
const FAREWELL: Duration = Duration::from_secs(2);
/// How often a waiting connection looks whether its client is still there.
pub(super) const LOOK: Duration = Duration::from_millis(250);

/// A running server. Dropping it lets replies and event streams end, and removes the socket.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
    stop: EventFd,
    accepting: Option<JoinHandle<()>>,
}

/// What the threads share.
pub(super) struct Shared {
    pub(super) executor: Arc<dyn Executor>,
    pub(super) limits: Limits,
    stopping: AtomicBool,
    connections: Mutex<Connections>,
    changed: Condvar,
}

/// The open connections, by number, so that they can be ended from outside.
#[derive(Debug, Default)]
struct Connections {
    next: u64,
    open: Vec<(u64, UnixStream)>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("limits", &self.limits).finish_non_exhaustive()
    }
}

impl Server {
    /// Answers requests on the socket `path` until it is dropped.
    ///
    /// # Errors
    /// The socket or the thread cannot be made.
    pub fn start(path: &Path, executor: Arc<dyn Executor>) -> Result<Self, SocketError> {
        Self::start_with(path, executor, Limits::default())
    }

    /// The same, with other limits.
    ///
    /// # Errors
    /// The socket or the thread cannot be made.
    pub fn start_with(path: &Path, executor: Arc<dyn Executor>, limits: Limits) -> Result<Self, SocketError> {
        let socket = Socket::bind(path)?;
        let system = |source| SocketError::System { path: path.to_owned(), source };
        let stop = EventFd::new(EFD_NONBLOCK).map_err(system)?;
        let epoll = Epoll::new().map_err(system)?;
        for fd in [socket.listener.as_raw_fd(), stop.as_raw_fd()] {
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, fd as u64)).map_err(system)?;
        }
        let shared = Arc::new(Shared {
            executor,
            limits,
            stopping: AtomicBool::new(false),
            connections: Mutex::default(),
            changed: Condvar::new(),
        });
        let accepting = thread::Builder::new()
            .name("api".to_owned())
            .spawn({
                let shared = shared.clone();
                move || accept_all(&shared, &socket, &epoll)
            })
            .map_err(system)?;
        Ok(Self { shared, stop, accepting: Some(accepting) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::Release);
        if let Err(error) = self.stop.write(1) {
            tracing::warn!(%error, "The API thread cannot be told to stop");
        } else if let Some(thread) = self.accepting.take()
            && thread.join().is_err()
        {
            tracing::warn!("The API thread has panicked");
        }
        let mut connections = self.shared.lock();
        for (_, stream) in &connections.open {
            // An idle connection wakes up and ends; one that is at work can still send its reply.
            let _ = stream.shutdown(Shutdown::Read);
        }
        let deadline = Instant::now() + FAREWELL;
        while !connections.open.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            connections =
                self.shared.changed.wait_timeout(connections, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        for (_, stream) in &connections.open {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

fn accept_all(shared: &Arc<Shared>, socket: &Socket, epoll: &Epoll) {
    let mut ready = [EpollEvent::default(); 2];
    while !shared.stopping() {
        match epoll.wait(-1, &mut ready) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => {
                tracing::error!(%error, "The API socket cannot be waited for; the API ends");
                return;
            }
        }
        loop {
            match socket.listener.accept() {
                Ok((stream, _)) => admit(shared, stream),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    // Out of file descriptors, most likely: the client waits in the backlog, and so do we.
                    tracing::warn!(%error, "An API connection cannot be accepted");
                    thread::sleep(Duration::from_millis(100));
                    break;
                }
            }
        }
    }
}

/// Starts a thread for the connection, or tells the client why not.
fn admit(shared: &Arc<Shared>, stream: UnixStream) {
    let refuse = |stream: &UnixStream, error: Error| {
        let _ = stream.set_write_timeout(Some(Duration::from_millis(100)));
        let _ = Response::error(shared.executor.events().last(), &error).write(stream, true);
    };
    if let Err(error) = stream.set_nonblocking(false) {
        tracing::warn!(%error, "An API connection cannot be used");
        return;
    }
    let Some(guard) = shared.register(&stream) else {
        let message =
            format!("{} connections are open, and the server takes no more", shared.limits.connections);
        refuse(&stream, Error::new(ErrorCode::TooManyConnections, message, "close one, or try again later"));
        return;
    };
    let spawned = thread::Builder::new().name("api-connection".to_owned()).spawn(move || {
        let guard = guard;
        serve(&guard.shared, &stream);
    });
    if let Err(error) = spawned {
        // The stream went with the closure that could not be started.
        tracing::warn!(%error, "An API connection has no thread");
    }
}

/// Takes the connection off the list when its thread ends, however it ends.
struct Guard {
    shared: Arc<Shared>,
    number: u64,
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.shared.lock().open.retain(|(number, _)| *number != self.number);
        self.shared.changed.notify_all();
    }
}

impl Shared {
    pub(super) fn stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    fn lock(&self) -> MutexGuard<'_, Connections> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn register(self: &Arc<Self>, stream: &UnixStream) -> Option<Guard> {
        let mut connections = self.lock();
        if connections.open.len() >= self.limits.connections {
            return None;
        }
        let handle = stream.try_clone().ok()?;
        connections.next += 1;
        let number = connections.next;
        connections.open.push((number, handle));
        Some(Guard { shared: self.clone(), number })
    }
}

/// Answers the requests of one connection, one after the other.
fn serve(shared: &Shared, stream: &UnixStream) {
    let mut reader = RequestReader::new(stream, shared.limits);
    if stream.set_write_timeout(Some(shared.limits.reply)).is_err() {
        return;
    }
    loop {
        let message = match reader.read() {
            Ok(message) => message,
            Err(ReadError::Closed) => return,
            Err(ReadError::Refused(error)) => {
                let response = Response::error(shared.executor.events().last(), &error);
                let _ = response.write(stream, true);
                // The client may still be sending: it should read the reply before it sees the connection end.
                let _ = stream.shutdown(Shutdown::Write);
                return;
            }
        };
        let seq = shared.executor.events().last();
        let close = !message.keep_alive || shared.stopping();
        let response = match request::resolve(&message.method, &message.path, &message.query, &message.body) {
            Err(refusal) => Response { allow: refusal.allow, ..Response::error(seq, &refusal.error) },
            Ok((_, Action::Stream { since, follow })) => {
                if !stream::send(shared, stream, &message, seq, since, follow) || close {
                    return;
                }
                continue;
            }
            Ok((route, action)) => match answer(shared, stream, action, seq) {
                Ok(body) => Response { status: route.status, body, seq, allow: None },
                Err(error) => Response::error(seq, &error),
            },
        };
        if response.for_method(&message.method).write(stream, close).is_err() || close {
            return;
        }
    }
}

/// Carries out what is no stream.
fn answer(shared: &Shared, stream: &UnixStream, action: Action, seq: u64) -> Result<Vec<u8>, Error> {
    let reply = match action {
        Action::Execute(command) => shared.executor.execute(command)?,
        Action::Wait { operation, patience } => Reply::Operation(wait(shared, stream, operation, patience)?),
        Action::Document => return Ok(openapi::text().into_bytes()),
        // Streams are sent by the caller.
        Action::Stream { .. } => Reply::Done,
    };
    let mut text = request::reply_text(&reply, seq)?;
    text.push(b'\n');
    Ok(text)
}

/// Asks for the operation, and again each time that it may have ended, until it has or patience is over.
fn wait(
    shared: &Shared,
    stream: &UnixStream,
    operation: u64,
    patience: TimeSpan,
) -> Result<Operation, Error> {
    let deadline = Instant::now() + patience.0.min(shared.limits.wait);
    let bus = shared.executor.events();
    let mut events = bus.subscribe(bus.last());
    let hangup = stream::Hangup::watch(stream);
    loop {
        let state = match shared.executor.execute(Command::ShowOperation { operation })? {
            Reply::Operation(state) => state,
            other => {
                let message = format!("The machine answered a question for an operation with {other:?}");
                return Err(Error::new(ErrorCode::Internal, message, "report this as a bug"));
            }
        };
        if state.state != OperationState::Running {
            return Ok(state);
        }
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || shared.stopping() || hangup.happened() {
                return Ok(state);
            }
            match events.next(left.min(LOOK)) {
                Next::Record(record) => match record.event {
                    Event::OperationFinished { operation: number, .. } if number == operation => break,
                    Event::EventsLost { .. } => break,
                    _ => {}
                },
                Next::Nothing => {}
                Next::Closed => return Ok(state),
            }
        }
    }
}
