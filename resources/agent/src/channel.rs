//! One channel: a command with its streams, or a connection to a socket.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};

use aconite_agent::protocol::{Exec, ExitStatus, INITIAL_WINDOW, MAX_DATA, Message, Stream, WindowSize};

use crate::sys::{self, Poll};

/// What a terminal takes for the end of its input (VEOF, ^D).
const END_OF_INPUT: u8 = 4;
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The host has sent what the protocol does not allow on this channel.
#[derive(Debug)]
pub struct Violation;

/// An open channel.
pub struct Channel {
    process: Option<Process>,
    input: Input,
    outputs: Vec<Output>,
    closed: bool,
}

struct Process {
    /// Process id, and id of the group and session that it leads.
    pid: u32,
    status: Option<ExitStatus>,
    terminal: Option<File>,
}

/// Bytes on their way from the host to a process or socket.
struct Input {
    sink: Option<Sink>,
    buffer: VecDeque<u8>,
    /// What the host may still send.
    window: u32,
    /// Nothing more will come.
    ended: bool,
}

enum Sink {
    Pipe(File),
    Terminal(File),
    Socket(UnixStream),
}

/// Bytes on their way from a process or socket to the host.
struct Output {
    stream: Stream,
    source: File,
    credit: u32,
}

/// The parts of a channel that can be waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Where bytes from the host go.
    Input,
    /// A source of bytes for the host.
    Output(Stream),
}

impl Channel {
    /// Starts a command.
    ///
    /// # Errors
    /// The error of the operating system and what it was about, in words.
    pub fn exec(exec: Exec) -> Result<Channel, (io::Error, String)> {
        let mut words = exec.argv.into_iter().map(OsString::from_vec);
        let program = words.next().filter(|program| !program.is_empty()).ok_or_else(|| {
            (io::Error::from_raw_os_error(libc::EINVAL), "There is no program to run".to_string())
        })?;
        let mut command = Command::new(&program);
        command.args(words).env_clear().env("PATH", PATH).env("HOME", "/root").env("TERM", "linux");
        for variable in exec.env {
            let at = variable.iter().position(|byte| *byte == b'=').unwrap_or(variable.len());
            let (name, value) = variable.split_at(at);
            let value = value.strip_prefix(b"=").unwrap_or_default();
            command.env(OsString::from_vec(name.to_vec()), OsString::from_vec(value.to_vec()));
        }
        let cwd = if exec.cwd.is_empty() { "/".into() } else { OsString::from_vec(exec.cwd) };
        if let Err(error) = std::fs::read_dir(Path::new(&cwd)) {
            return Err((error, format!("Cannot start in the directory {}", cwd.to_string_lossy())));
        }
        command.current_dir(cwd);
        sys::lead_session(&mut command, exec.terminal.is_some());
        let started = match exec.terminal {
            Some(size) => Self::on_terminal(command, size),
            None => Self::on_pipes(command),
        };
        started.map_err(|error| (error, format!("Cannot run {}", program.to_string_lossy())))
    }

    fn on_pipes(mut command: Command) -> io::Result<Channel> {
        let (stdin, sink) = io::pipe()?;
        let (stdout_source, stdout) = io::pipe()?;
        let (stderr_source, stderr) = io::pipe()?;
        let sources =
            [(Stream::Stdout, OwnedFd::from(stdout_source)), (Stream::Stderr, stderr_source.into())];
        let sink = File::from(OwnedFd::from(sink));
        sys::set_nonblocking(sink.as_fd())?;
        let outputs = sources.into_iter().map(|(stream, fd)| Output::new(stream, fd.into()));
        let outputs = outputs.collect::<io::Result<Vec<_>>>()?;
        let child = command.stdin(stdin).stdout(stdout).stderr(stderr).spawn()?;
        let process = Process { pid: child.id(), status: None, terminal: None };
        Ok(Channel { process: Some(process), input: Input::new(Sink::Pipe(sink)), outputs, closed: false })
    }

    fn on_terminal(mut command: Command, size: WindowSize) -> io::Result<Channel> {
        let (master, slave) = sys::open_terminal(size)?;
        let terminal = File::from(master);
        let outputs = vec![Output::new(Stream::Stdout, terminal.try_clone()?)?];
        let input = Input::new(Sink::Terminal(terminal.try_clone()?));
        command.stdin(slave.try_clone()?).stdout(slave.try_clone()?).stderr(Stdio::from(slave));
        let child = command.spawn()?;
        let process = Process { pid: child.id(), status: None, terminal: Some(terminal) };
        Ok(Channel { process: Some(process), input, outputs, closed: false })
    }

    /// Connects to a Unix stream socket.
    pub fn connect(path: &[u8]) -> io::Result<Channel> {
        let socket = sys::connect(path)?;
        let source = File::from(OwnedFd::from(socket.try_clone()?));
        let outputs = vec![Output::new(Stream::Stdout, source)?];
        Ok(Channel { process: None, input: Input::new(Sink::Socket(socket)), outputs, closed: false })
    }

    /// Process id of the command; 0 for a connection.
    pub fn pid(&self) -> u32 {
        self.process.as_ref().map_or(0, |process| process.pid)
    }

    /// The command of this channel is this process, and has not ended.
    pub fn runs(&self, pid: u32) -> bool {
        self.process.as_ref().is_some_and(|process| process.pid == pid && process.status.is_none())
    }

    /// Adds what this channel waits for; sources only where there is room for what they send.
    pub fn waits(&self, room: bool, add: &mut dyn FnMut(Part, Poll)) {
        if let Some(sink) = self.input.sink.as_ref().filter(|_| !self.input.buffer.is_empty()) {
            add(Part::Input, Poll::new(sink.as_fd(), false, true));
        }
        for output in self.outputs.iter().filter(|output| room && output.credit > 0) {
            add(Part::Output(output.stream), Poll::new(output.source.as_fd(), true, false));
        }
    }

    /// Takes a message from the host for this channel.
    ///
    /// # Errors
    /// It breaks the protocol.
    pub fn take(&mut self, message: Message, say: &mut dyn FnMut(Message)) -> Result<(), Violation> {
        match message {
            Message::Data(Stream::Stdin, bytes) if !self.input.ended => self.input.take(&bytes, say),
            Message::Eof(Stream::Stdin) => {
                self.input.end(say);
                Ok(())
            }
            Message::Credit(stream, bytes) => {
                match self.outputs.iter_mut().find(|output| output.stream == stream) {
                    Some(output) => output.add_credit(bytes),
                    None => Ok(()),
                }
            }
            Message::Signal(signal) => {
                self.signal(signal);
                Ok(())
            }
            Message::Resize(size) => {
                if let Some(terminal) = self.process.as_ref().and_then(|p| p.terminal.as_ref()) {
                    // A size that the terminal does not take changes nothing; there is nobody to tell.
                    let _ = sys::resize_terminal(terminal.as_fd(), size);
                }
                Ok(())
            }
            Message::Close => {
                self.close();
                Ok(())
            }
            _ => Err(Violation),
        }
    }

    fn signal(&self, signal: i32) {
        let Some(process) = self.process.as_ref().filter(|process| process.status.is_none()) else { return };
        let foreground = process.terminal.as_ref().and_then(|t| sys::foreground_group(t.as_fd()));
        sys::kill_group(foreground.unwrap_or(process.pid), signal);
    }

    /// Ends the channel: kills the group of the process, closes the connection.
    pub fn close(&mut self) {
        if let Some(process) = self.process.as_ref().filter(|process| process.status.is_none()) {
            sys::kill_group(process.pid, libc::SIGKILL);
        }
        self.closed = true;
        self.input.sink = None;
        self.outputs.clear();
    }

    /// The process of this channel has ended.
    pub fn reaped(&mut self, status: ExitStatus) {
        if let Some(process) = &mut self.process {
            process.status = Some(status);
        }
    }

    /// Moves bytes at a part that can go on.
    pub fn advance(&mut self, part: Part, buffer: &mut [u8], say: &mut dyn FnMut(Message)) {
        match part {
            Part::Input => self.input.flush(say),
            Part::Output(stream) => {
                if let Some(at) = self.outputs.iter().position(|output| output.stream == stream) {
                    self.read(at, buffer, say);
                }
            }
        }
    }

    /// Reads one piece from a source; true when there may be more at once. A source that has ended is removed.
    fn read(&mut self, at: usize, buffer: &mut [u8], say: &mut dyn FnMut(Message)) -> bool {
        let Some(output) = self.outputs.get_mut(at) else { return false };
        let most = buffer.len().min(MAX_DATA).min(output.credit as usize);
        match output.source.read(&mut buffer[..most]) {
            _ if most == 0 => false,
            Ok(count @ 1..) => {
                output.credit -= count as u32;
                say(Message::Data(output.stream, buffer[..count].to_vec()));
                true
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => true,
            // What a process has written before its end is all there when the end is known.
            Err(error) if error.kind() == ErrorKind::WouldBlock && !self.has_exited() => false,
            _ => {
                say(Message::Eof(self.outputs.remove(at).stream));
                false
            }
        }
    }

    fn has_exited(&self) -> bool {
        self.process.as_ref().is_some_and(|process| process.status.is_some())
    }

    /// Sends the rest of a process that has exited, as far as there is `room`; says how the
    /// channel has ended if it has.
    pub fn settle(
        &mut self,
        buffer: &mut [u8],
        room: &dyn Fn() -> bool,
        say: &mut dyn FnMut(Message),
    ) -> Option<ExitStatus> {
        if self.has_exited() {
            let mut at = 0;
            while at < self.outputs.len() && room() {
                let before = self.outputs.len();
                if !self.read(at, buffer, say) && self.outputs.len() == before {
                    at += 1;
                }
            }
        }
        match &self.process {
            Some(process) => process.status.filter(|_| self.outputs.is_empty()),
            None if self.closed => Some(ExitStatus::Code(0)),
            None => (self.outputs.is_empty() && self.input.sink.is_none()).then_some(ExitStatus::Code(0)),
        }
    }
}

impl Input {
    fn new(sink: Sink) -> Input {
        Input { sink: Some(sink), buffer: VecDeque::new(), window: INITIAL_WINDOW, ended: false }
    }

    fn take(&mut self, bytes: &[u8], say: &mut dyn FnMut(Message)) -> Result<(), Violation> {
        self.window = self.window.checked_sub(bytes.len() as u32).ok_or(Violation)?;
        self.buffer.extend(bytes);
        self.flush(say);
        Ok(())
    }

    fn end(&mut self, say: &mut dyn FnMut(Message)) {
        if !self.ended {
            self.ended = true;
            if matches!(self.sink, Some(Sink::Terminal(_))) {
                self.buffer.push_back(END_OF_INPUT);
            }
            self.flush(say);
        }
    }

    /// Writes what can be written and returns its credit. What nobody reads any more is dropped.
    fn flush(&mut self, say: &mut dyn FnMut(Message)) {
        let mut done = 0;
        while let Some(sink) = self.sink.as_mut().filter(|_| !self.buffer.is_empty()) {
            match sink.write(self.buffer.as_slices().0) {
                Ok(count) => {
                    self.buffer.drain(..count);
                    done += count;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(_) => self.sink = None,
            }
        }
        if self.sink.is_none() {
            done += self.buffer.len();
            self.buffer.clear();
        }
        let finished = self.buffer.is_empty() && self.ended;
        if finished && let Some(Sink::Socket(socket)) = self.sink.take() {
            // Fails when the other side has closed already, which is as good.
            let _ = socket.shutdown(Shutdown::Write);
        }
        if done > 0 && !self.ended {
            self.window += done as u32;
            say(Message::Credit(Stream::Stdin, done as u32));
        }
    }
}

impl Sink {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        match self {
            Sink::Pipe(file) | Sink::Terminal(file) => file.as_fd(),
            Sink::Socket(socket) => socket.as_fd(),
        }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Sink::Pipe(file) | Sink::Terminal(file) => file.write(bytes),
            Sink::Socket(socket) => socket.write(bytes),
        }
    }
}

impl Output {
    fn new(stream: Stream, source: File) -> io::Result<Output> {
        sys::set_nonblocking(source.as_fd())?;
        Ok(Output { stream, source, credit: INITIAL_WINDOW })
    }

    fn add_credit(&mut self, bytes: u32) -> Result<(), Violation> {
        let credit = self.credit.checked_add(bytes).filter(|credit| *credit <= INITIAL_WINDOW);
        self.credit = credit.ok_or(Violation)?;
        Ok(())
    }
}
