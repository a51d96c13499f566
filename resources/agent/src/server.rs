//! Speaks the protocol over one descriptor: a single-threaded loop that waits for the
//! port, for signals and for the streams of all channels, and never for one of them alone.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::Path;

use aconite_agent::protocol::{
    Decoder, ExitStatus, Frame, Hello, MAX_CHANNELS, MAX_DATA, Message, Power, Role, SESSION, VERSION,
};

use crate::boot;
use crate::channel::{Channel, Part, Violation};
use crate::console::say;
use crate::sys::{self, Poll};

/// Bytes that wait for the port beyond which nothing more is read from anywhere.
const OUT_LIMIT: usize = 256 * 1024;
/// Bytes that notes may take in a `Hello`, so that it fits in a frame.
const NOTES_LIMIT: usize = 16 * 1024;
/// How often a port whose other side has gone is looked at, in milliseconds.
const RECONNECT: i32 = 20;

/// The server and everything that it serves.
pub struct Server {
    port: File,
    signals: OwnedFd,
    decoder: Decoder,
    out: VecDeque<u8>,
    channels: BTreeMap<u32, Channel>,
    hello: Hello,
    connected: bool,
    buffer: Vec<u8>,
}

/// What a wait was for.
enum Event {
    Port,
    Signals,
    Part(u32, Part),
}

impl Server {
    /// A server for the protocol on `port`.
    pub fn new(port: File, role: Role, kvm: bool, mut notes: Vec<String>) -> io::Result<Server> {
        sys::set_nonblocking(port.as_fd())?;
        let ending: &[libc::c_int] = &[libc::SIGCHLD, libc::SIGTERM, libc::SIGUSR1, libc::SIGUSR2];
        let signals = sys::signal_fd(if role == Role::Process { &ending[..1] } else { ending })?;
        let mut size = 0;
        notes.retain(|note| {
            size += note.len() + 4;
            size <= NOTES_LIMIT
        });
        let (release, kernel) = sys::uname();
        let hello = Hello { version: VERSION, nonce: 0, role, kvm, release, kernel, notes };
        let mut decoder = Decoder::new();
        decoder.resynchronize();
        let mut server = Server {
            port,
            signals,
            decoder,
            out: VecDeque::new(),
            channels: BTreeMap::new(),
            hello,
            connected: true,
            buffer: vec![0; MAX_DATA],
        };
        server.greet();
        Ok(server)
    }

    /// Serves until the other side is gone for good, which only the role `Process` knows.
    pub fn serve(&mut self) -> io::Result<()> {
        loop {
            for event in self.wait()? {
                match event {
                    Event::Port => self.receive()?,
                    Event::Signals => self.take_signals(),
                    Event::Part(channel, part) => self.advance(channel, part),
                }
            }
            self.settle();
            self.send()?;
            if !self.connected && self.hello.role == Role::Process {
                return Ok(());
            }
        }
    }

    fn room(&self) -> bool {
        self.out.len() < OUT_LIMIT
    }

    fn wait(&mut self) -> io::Result<Vec<Event>> {
        if !self.connected {
            self.look_for_host()?;
        }
        let room = self.room();
        let mut events = vec![Event::Signals];
        let mut polls = vec![Poll::new(self.signals.as_fd(), true, false)];
        if self.connected {
            events.push(Event::Port);
            polls.push(Poll::new(self.port.as_fd(), room, !self.out.is_empty()));
        }
        for (&number, channel) in &self.channels {
            channel.waits(room, &mut |part, poll| {
                events.push(Event::Part(number, part));
                polls.push(poll);
            });
        }
        sys::poll(&mut polls, if self.connected { -1 } else { RECONNECT })?;
        let ready = events.into_iter().zip(&polls).filter(|(event, poll)| match event {
            Event::Part(_, Part::Input) => poll.writable(),
            Event::Port => poll.hung_up() || room && poll.readable(),
            _ => poll.readable(),
        });
        Ok(ready.map(|(event, _)| event).collect())
    }

    /// A virtio console port says that it is hung up as long as nobody has it open outside.
    fn look_for_host(&mut self) -> io::Result<()> {
        let mut polls = [Poll::new(self.port.as_fd(), true, false)];
        sys::poll(&mut polls, 0)?;
        if !polls[0].hung_up() {
            self.connected = true;
            self.greet();
        }
        Ok(())
    }

    fn receive(&mut self) -> io::Result<()> {
        match self.port.read(&mut self.buffer) {
            Ok(0) => self.disconnect(),
            Ok(count) => {
                self.decoder.push(&self.buffer[..count]);
                loop {
                    match self.decoder.next() {
                        Ok(Some(frame)) => {
                            if self.handle(frame).is_err() {
                                self.break_off("A message that the protocol does not allow here");
                            }
                        }
                        Ok(None) => break,
                        Err(error) => self.break_off(&error.to_string()),
                    }
                }
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(error) if error.kind() == ErrorKind::ConnectionReset => self.disconnect(),
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn disconnect(&mut self) {
        self.connected = false;
        self.end_session();
        self.out.clear();
        self.decoder = Decoder::new();
        self.decoder.resynchronize();
    }

    /// Ends the session after an error of the host, and says `Hello` so that it hears of it.
    fn break_off(&mut self, reason: &str) {
        if self.hello.role != Role::Process {
            say(format_args!("The session is broken off: {reason}"));
        }
        self.end_session();
        self.decoder.resynchronize();
        self.greet();
    }

    fn end_session(&mut self) {
        self.hello.nonce = 0;
        self.channels.values_mut().for_each(Channel::close);
        self.channels.clear();
    }

    fn greet(&mut self) {
        self.say(SESSION, Message::Hello(self.hello.clone()));
    }

    fn say(&mut self, channel: u32, message: Message) {
        put(&mut self.out, channel, message);
    }

    fn handle(&mut self, frame: Frame) -> Result<(), Violation> {
        let number = frame.channel;
        match frame.message {
            Message::Hello(hello) if number == SESSION && hello.nonce != 0 => {
                if hello.nonce != self.hello.nonce {
                    self.end_session();
                    self.hello.nonce = hello.nonce;
                }
                self.greet();
                Ok(())
            }
            // Of a session that is over.
            _ if self.hello.nonce == 0 => Ok(()),
            _ if number == SESSION => Err(Violation),
            request @ (Message::Exec(_)
            | Message::Connect(_)
            | Message::Mount(_)
            | Message::Unmount(_)
            | Message::Power(_)) => self.open(number, request),
            message => {
                let out = &mut self.out;
                match self.channels.get_mut(&number) {
                    Some(channel) => channel.take(message, &mut |reply| put(out, number, reply)),
                    None => Ok(()),
                }
            }
        }
    }

    fn open(&mut self, number: u32, request: Message) -> Result<(), Violation> {
        if self.channels.contains_key(&number) {
            return Err(Violation);
        }
        let result = match request {
            Message::Exec(_) | Message::Connect(_) if self.channels.len() >= MAX_CHANNELS => {
                let error = io::Error::from_raw_os_error(libc::EMFILE);
                Err((error, format!("More than {MAX_CHANNELS} channels at a time")))
            }
            Message::Exec(exec) => Channel::exec(exec).map(Some),
            Message::Connect(path) => Channel::connect(&path).map(Some).map_err(|error| {
                (error, format!("Cannot connect to the socket {}", String::from_utf8_lossy(&path)))
            }),
            request => self.change_machine(request).map(|()| None),
        };
        let reply = match result {
            Ok(Some(channel)) => {
                let opened = Message::Opened(channel.pid());
                self.channels.insert(number, channel);
                opened
            }
            Ok(None) => Message::Exit(ExitStatus::Code(0)),
            Err((error, what)) => {
                let text = format!("{what}: {error}");
                Message::Failed { errno: error.raw_os_error().unwrap_or(0), text }
            }
        };
        self.say(number, reply);
        Ok(())
    }

    /// Requests that only PID 1 of a machine carries out.
    fn change_machine(&mut self, request: Message) -> Result<(), (io::Error, String)> {
        if self.hello.role == Role::Process {
            let error = io::Error::from_raw_os_error(libc::EPERM);
            return Err((error, "The agent is not process 1 of a machine".into()));
        }
        match request {
            Message::Mount(share) => boot::mount_share(&share).map_err(|error| {
                let path = String::from_utf8_lossy(&share.path);
                (error, format!("Cannot mount the 9p share `{}` on {path}", share.tag))
            }),
            Message::Unmount(path) => {
                let path = OsString::from_vec(path);
                let result = sys::unmount(Path::new(&path));
                result.map_err(|error| (error, format!("Cannot unmount {}", path.to_string_lossy())))
            }
            Message::Power(power) => Err((boot::end_machine(power), "Cannot end the machine".into())),
            _ => Err((io::Error::from_raw_os_error(libc::EINVAL), "Not a request".into())),
        }
    }

    /// Children that have ended; and, as PID 1, what programs such as poweroff(8) ask of it by signal.
    fn take_signals(&mut self) {
        while let Some(signal) = sys::next_signal(self.signals.as_fd()) {
            let power = match signal {
                libc::SIGTERM => Power::Reboot,
                libc::SIGUSR1 | libc::SIGUSR2 => Power::Off,
                _ => continue,
            };
            say(boot::end_machine(power));
        }
        while let Some((pid, status)) = sys::reap() {
            if let Some(channel) = self.channels.values_mut().find(|channel| channel.runs(pid)) {
                channel.reaped(status);
            }
        }
    }

    fn advance(&mut self, number: u32, part: Part) {
        let out = &mut self.out;
        if let Some(channel) = self.channels.get_mut(&number).filter(|_| out.len() < OUT_LIMIT) {
            channel.advance(part, &mut self.buffer, &mut |message| put(out, number, message));
        }
    }

    fn settle(&mut self) {
        let out = RefCell::new(&mut self.out);
        let buffer = &mut self.buffer;
        self.channels.retain(|&number, channel| {
            let room = || out.borrow().len() < OUT_LIMIT;
            let mut say = |message| put(&mut out.borrow_mut(), number, message);
            let Some(status) = channel.settle(buffer, &room, &mut say) else { return true };
            say(Message::Exit(status));
            false
        });
    }

    fn send(&mut self) -> io::Result<()> {
        while self.connected && !self.out.is_empty() {
            match self.port.write(self.out.as_slices().0) {
                Ok(count) => drop(self.out.drain(..count)),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset) => {
                    self.disconnect();
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Puts a message behind those that wait for the port.
fn put(out: &mut VecDeque<u8>, channel: u32, message: Message) {
    let mut bytes = Vec::new();
    // All that the agent says is bounded well below a frame.
    if (Frame { channel, message }).encode(&mut bytes).is_ok() {
        out.extend(bytes);
    }
}
