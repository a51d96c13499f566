//! A command or a connection in the machine, as its user outside sees it.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use aconite_agent::protocol::{ExitStatus, INITIAL_WINDOW, MAX_DATA, Message, Stream, WindowSize};

use super::client::{ClientError, End, OpenChannel, lock};

/// Credit is returned in pieces of at least this size, so that it costs little.
const CREDIT_PIECE: u32 = INITIAL_WINDOW / 4;

/// What both sides of a channel know of it.
#[derive(Debug)]
pub(super) struct Channel {
    number: u32,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    opened: Option<u32>,
    /// Bytes that may still be sent.
    credit: u32,
    stdout: Incoming,
    stderr: Incoming,
    end: Option<End>,
}

/// A stream from the machine.
#[derive(Debug, Default)]
struct Incoming {
    bytes: VecDeque<u8>,
    /// Bytes that the agent may not send again until they are credited.
    taken: u32,
    ended: bool,
    /// Nobody wants it any more.
    dropped: bool,
}

impl Channel {
    pub(super) fn new(number: u32) -> Channel {
        let (stdout, stderr) = (Incoming::default(), Incoming::default());
        let state = State { opened: None, credit: INITIAL_WINDOW, stdout, stderr, end: None };
        Channel { number, state: Mutex::new(state), changed: Condvar::new() }
    }

    pub(super) fn number(&self) -> u32 {
        self.number
    }

    /// Takes a message from the agent and may have one to send back; an error names what breaks the protocol.
    pub(super) fn take(&self, message: Message) -> Result<Option<Message>, &'static str> {
        let mut state = lock(&self.state);
        let mut reply = None;
        match message {
            Message::Opened(pid) => state.opened = Some(pid),
            Message::Data(stream, bytes) => {
                let incoming = state.incoming(stream).ok_or("data on the input")?;
                if incoming.taken + incoming.bytes.len() as u32 + bytes.len() as u32 > INITIAL_WINDOW {
                    return Err("data beyond its credit");
                }
                if incoming.dropped {
                    reply =
                        incoming.consumed(bytes.len() as u32).map(|credit| Message::Credit(stream, credit));
                } else {
                    incoming.bytes.extend(bytes);
                }
            }
            Message::Eof(stream) => state.incoming(stream).ok_or("the end of the input")?.ended = true,
            Message::Credit(Stream::Stdin, bytes) => {
                let credit = state.credit.checked_add(bytes).filter(|credit| *credit <= INITIAL_WINDOW);
                state.credit = credit.ok_or("more credit than it was sent data")?;
            }
            Message::Exit(status) => state.end = Some(Ok(status)),
            Message::Failed { errno, text } => state.end = Some(Err(ClientError::Failed { errno, text })),
            _ => return Err("a message of the host's"),
        }
        self.changed.notify_all();
        Ok(reply)
    }

    pub(super) fn end(&self, end: End) {
        lock(&self.state).end.get_or_insert(end);
        self.changed.notify_all();
    }

    pub(super) fn wait_opened(&self) -> Result<u32, ClientError> {
        let state = self.wait_while(None, |state| state.opened.is_none() && state.end.is_none());
        match (&state.end, state.opened) {
            (Some(Err(error)), None) => Err(error.clone()),
            (_, pid) => Ok(pid.unwrap_or_default()),
        }
    }

    /// Waits for the end, at most as long as is said; `None` when it has not come by then.
    pub(super) fn wait(&self, timeout: Option<Duration>) -> Result<Option<ExitStatus>, ClientError> {
        self.wait_while(timeout, |state| state.end.is_none()).end.clone().transpose()
    }

    fn wait_while(
        &self,
        timeout: Option<Duration>,
        condition: impl Fn(&State) -> bool,
    ) -> MutexGuard<'_, State> {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let mut state = lock(&self.state);
        while condition(&state) {
            state = match deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())) {
                Some(Duration::ZERO) => return state,
                Some(left) => {
                    self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
                }
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
        state
    }
}

impl State {
    fn incoming(&mut self, stream: Stream) -> Option<&mut Incoming> {
        match stream {
            Stream::Stdin => None,
            Stream::Stdout => Some(&mut self.stdout),
            Stream::Stderr => Some(&mut self.stderr),
        }
    }
}

impl Incoming {
    /// Notes bytes that have been passed on; the credit to return if it is worth a message.
    fn consumed(&mut self, count: u32) -> Option<u32> {
        self.taken += count;
        (self.taken >= CREDIT_PIECE).then(|| std::mem::take(&mut self.taken))
    }
}

/// Bytes to the machine. Dropping it ends the stream.
#[derive(Debug)]
pub struct Sender {
    open: OpenChannel,
}

impl Write for Sender {
    /// Waits until the machine takes some of the bytes. [`io::ErrorKind::BrokenPipe`] when the channel has ended.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.is_empty() {
            return Ok(0);
        }
        let mut state = self.open.channel.wait_while(None, |state| state.credit == 0 && state.end.is_none());
        if state.end.is_some() {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let count = bytes.len().min(state.credit as usize).min(MAX_DATA);
        state.credit -= count as u32;
        drop(state);
        let sent = self.open.send_data(Stream::Stdin, &bytes[..count]);
        sent.map(|()| count).map_err(|error| io::Error::new(io::ErrorKind::BrokenPipe, error))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        // Nobody is there to be told when the connection is lost.
        let _ = self.open.send(Message::Eof(Stream::Stdin));
    }
}

/// Bytes from the machine. What comes after it has been dropped is thrown away.
#[derive(Debug)]
pub struct Receiver {
    open: OpenChannel,
    stream: Stream,
}

impl Read for Receiver {
    /// Waits for bytes; 0 at the end of the stream. An error when the connection is lost.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let stream = self.stream;
        let waiting = |state: &State| {
            let incoming = if stream == Stream::Stderr { &state.stderr } else { &state.stdout };
            incoming.bytes.is_empty() && !incoming.ended && state.end.is_none()
        };
        let mut state = self.open.channel.wait_while(None, waiting);
        let lost = match &state.end {
            Some(Err(error)) => Some(error.clone()),
            _ => None,
        };
        let Some(incoming) = state.incoming(stream) else { return Ok(0) };
        let count = incoming.bytes.read(buffer)?;
        let credit = incoming.consumed(count as u32);
        drop(state);
        if let Some(credit) = credit {
            // When the connection is lost the next read says so.
            let _ = self.open.send(Message::Credit(stream, credit));
        }
        match lost {
            Some(error) if count == 0 => Err(io::Error::new(io::ErrorKind::ConnectionAborted, error)),
            _ => Ok(count),
        }
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        let mut state = lock(&self.open.channel.state);
        let Some(incoming) = state.incoming(self.stream) else { return };
        incoming.dropped = true;
        let left = std::mem::take(&mut incoming.bytes).len() as u32;
        let credit = incoming.consumed(left);
        drop(state);
        if let Some(credit) = credit {
            let _ = self.open.send(Message::Credit(self.stream, credit));
        }
    }
}

/// Ends a channel when its owner has gone.
#[derive(Debug)]
struct CloseOnDrop(OpenChannel);

impl Drop for CloseOnDrop {
    fn drop(&mut self) {
        if lock(&self.0.channel.state).end.is_none() {
            let _ = self.0.send(Message::Close);
        }
    }
}

/// A command that has been started. Dropping it kills the command if it still runs.
///
/// Its output must be read, or its receivers dropped: with a full window (256 KiB) the command waits.
#[derive(Debug)]
pub struct Process {
    pid: u32,
    stdin: Option<Sender>,
    stdout: Option<Receiver>,
    stderr: Option<Receiver>,
    open: CloseOnDrop,
}

/// What a command was, all told.
#[derive(Debug)]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// All that it wrote to its standard output.
    pub stdout: Vec<u8>,
    /// All that it wrote to its standard error.
    pub stderr: Vec<u8>,
}

/// Steers a command from wherever signals and sizes come in. Does not keep it alive.
#[derive(Clone, Debug)]
pub struct Control {
    open: OpenChannel,
}

impl Control {
    /// Sends a signal, by its Linux number, to the process group of the command, or to the
    /// foreground group of its terminal.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn signal(&self, signal: i32) -> Result<(), ClientError> {
        self.open.send(Message::Signal(signal))
    }

    /// Gives the terminal of the command a new size.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn resize(&self, size: WindowSize) -> Result<(), ClientError> {
        self.open.send(Message::Resize(size))
    }
}

impl Process {
    pub(super) fn new(open: OpenChannel, pid: u32) -> Process {
        let receiver = |stream| Some(Receiver { open: open.clone(), stream });
        Process {
            pid,
            stdin: Some(Sender { open: open.clone() }),
            stdout: receiver(Stream::Stdout),
            stderr: receiver(Stream::Stderr),
            open: CloseOnDrop(open),
        }
    }

    /// Process id in the machine.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// The standard input, once.
    pub fn take_stdin(&mut self) -> Option<Sender> {
        self.stdin.take()
    }

    /// The standard output, or all output of a terminal, once.
    pub fn take_stdout(&mut self) -> Option<Receiver> {
        self.stdout.take()
    }

    /// The standard error, once.
    pub fn take_stderr(&mut self) -> Option<Receiver> {
        self.stderr.take()
    }

    /// A handle for signals and sizes.
    pub fn control(&self) -> Control {
        Control { open: self.open.0.clone() }
    }

    /// Waits for the end of the command.
    ///
    /// # Errors
    /// The connection is lost first.
    pub fn wait(&self) -> Result<ExitStatus, ClientError> {
        loop {
            if let Some(status) = self.open.0.channel.wait(None)? {
                return Ok(status);
            }
        }
    }

    /// Waits for the end of the command for some time; `None` when it goes on.
    ///
    /// # Errors
    /// The connection is lost first.
    pub fn wait_timeout(&self, timeout: Duration) -> Result<Option<ExitStatus>, ClientError> {
        self.open.0.channel.wait(Some(timeout))
    }

    /// Passes the streams through until the command has ended, and all that it wrote has been written.
    ///
    /// A local output that breaks is the end of the command by SIGPIPE, as it would be in a local pipe.
    /// `stdin` is read by a thread that goes on until it ends or the command has; `None` is an empty input.
    ///
    /// # Errors
    /// The connection is lost first.
    pub fn bridge(
        mut self,
        stdin: Option<Box<dyn Read + Send>>,
        mut stdout: impl Write,
        mut stderr: impl Write + Send,
    ) -> Result<ExitStatus, ClientError> {
        let sender = self.stdin.take();
        if let (Some(mut local), Some(mut sender)) = (stdin, sender) {
            // Not joined: it may wait for a terminal. Errors mean that one of the sides has ended.
            thread::spawn(move || drop(io::copy(&mut local, &mut sender)));
        }
        let control = self.control();
        let (output, errors) = (self.stdout.take(), self.stderr.take());
        thread::scope(|scope| {
            let control = &control;
            if let Some(errors) = errors {
                scope.spawn(move || pass(errors, &mut stderr, control));
            }
            if let Some(output) = output {
                pass(output, &mut stdout, control);
            }
        });
        self.wait()
    }

    /// Lets the command run to its end without input and keeps what it writes.
    ///
    /// # Errors
    /// The connection is lost first.
    pub fn output(self) -> Result<Output, ClientError> {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let status = self.bridge(None, &mut stdout, &mut stderr)?;
        Ok(Output { status, stdout, stderr })
    }
}

/// Writes each piece that comes in at once; ends the command when nobody takes it.
fn pass(mut from: Receiver, to: &mut dyn Write, control: &Control) {
    let mut buffer = vec![0; MAX_DATA];
    // An error of the connection is what waiting for the end will tell.
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        if to.write_all(&buffer[..count]).and_then(|()| to.flush()).is_err() {
            let _ = control.signal(libc::SIGPIPE);
            return;
        }
    }
}

/// A connection to a socket in the machine. Dropping both halves closes it.
#[derive(Debug)]
pub struct Connection {
    /// Bytes to the socket; dropping it shuts the socket down for writing.
    pub sender: Sender,
    /// Bytes from the socket.
    pub receiver: Receiver,
    open: CloseOnDrop,
}

impl Connection {
    pub(super) fn new(open: OpenChannel) -> Connection {
        let receiver = Receiver { open: open.clone(), stream: Stream::Stdout };
        Connection { sender: Sender { open: open.clone() }, receiver, open: CloseOnDrop(open) }
    }

    /// Passes bytes between the connection and a local socket until both directions have ended.
    ///
    /// # Errors
    /// The connection to the agent is lost first.
    pub fn bridge(self, local: std::os::unix::net::UnixStream) -> Result<(), ClientError> {
        let Connection { mut sender, mut receiver, open } = self;
        thread::scope(|scope| {
            scope.spawn(|| {
                // An end of either side ends the copy, and with it this direction.
                let _ = io::copy(&mut &local, &mut sender);
                drop(sender);
            });
            let _ = io::copy(&mut receiver, &mut &local);
            let _ = local.shutdown(std::net::Shutdown::Write);
        });
        drop(receiver);
        open.0.channel.wait(Some(Duration::ZERO)).map(drop)
    }
}
