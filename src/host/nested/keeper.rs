//! The keeper: the process that owns level 1 and shares it among front ends.
//!
//! One thread, one event loop. A front end speaks the agent's protocol with the keeper; its `Hello` is answered once
//! level 1 is ready. The keeper ends when no front end has been there for a while, and then leaves nothing behind.

use super::line::Line;
use super::place::Owned;
use super::router::{ClientId, GRACE, Route, Router};
use super::{machine, machine::Machine};
use crate::guest::client::Client as AgentClient;
use aconite_agent::protocol::{Exec, Frame, Hello, Message, Power, Role, SESSION, VERSION};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// How long level 1 may take to start; some 4 s when nothing else runs.
pub(super) const START_TIMEOUT: Duration = Duration::from_secs(300);

/// How long level 1 may take to write everything back and end.
const END_TIMEOUT: Duration = Duration::from_secs(15);

/// How long QEMU may take to end after it has closed its connections.
const QEMU_END: Duration = Duration::from_secs(2);

/// How often to look whether level 1 is ready.
const SETUP_POLL: Duration = Duration::from_millis(20);

/// Bytes that wait for level 1 beyond which clients are not read.
const AGENT_BACKLOG: usize = 1 << 20;

const AGENT: u64 = 0;
const LISTENER: u64 = 1;
const FIRST_CLIENT: ClientId = 2;

/// The client that prepares level 1, inside the keeper.
const SETUP: ClientId = FIRST_CLIENT;

/// Set when the keeper has been told to end.
static TERMINATED: AtomicBool = AtomicBool::new(false);

extern "C" fn on_terminate(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    TERMINATED.store(true, Ordering::Relaxed);
}

/// How setting level 1 up went, and what is to be remarked.
pub(super) type Setup = Result<String, String>;

struct Client {
    line: Line,
    /// A `Hello` that has not been answered yet.
    greeted: Option<u64>,
    interest: EventSet,
}

/// The event loop's state.
struct Keeper {
    log: File,
    epoll: Epoll,
    machine: Machine,
    agent: Line,
    agent_interest: EventSet,
    /// What the agent said of itself.
    hello: Option<Hello>,
    /// Level 1 is prepared, and clients are served.
    ready: bool,
    setup: Option<mpsc::Receiver<Setup>>,
    listener: Option<UnixListener>,
    clients: BTreeMap<ClientId, Client>,
    last_client: ClientId,
    router: Router,
    started: Instant,
}

/// What the keeper serves with.
pub struct Service<'a> {
    /// The place of this keeper.
    pub owned: &'a Owned,
    /// Where front ends connect.
    pub listener: UnixListener,
    /// Level 1, just started.
    pub machine: Machine,
    /// The connection to its agent.
    pub agent: UnixStream,
    /// How long to wait for front ends before ending.
    pub idle: Duration,
    /// Where the keeper writes what it has to say.
    pub log: File,
}

/// Serves until nobody has needed level 1 for a while.
///
/// # Errors
/// Level 1 did not start, or ended by itself; in words.
pub fn serve(service: Service) -> Result<(), String> {
    let words = |what: &'static str| move |error: io::Error| format!("{what}: {error}");
    let Service { owned, listener, machine, agent, idle, log } = service;
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
        vmm_sys_util::signal::register_signal_handler(signal, on_terminate)
            .map_err(|error| format!("Cannot handle signal {signal}: {error}"))?;
    }
    listener.set_nonblocking(true).map_err(words("Cannot listen for front ends"))?;
    let mut keeper = Keeper {
        log,
        epoll: Epoll::new().map_err(words("Cannot wait for events"))?,
        machine,
        agent: Line::new(agent, true).map_err(words("Cannot use the connection to the agent"))?,
        agent_interest: EventSet::empty(),
        hello: None,
        ready: false,
        setup: None,
        listener: Some(listener),
        clients: BTreeMap::new(),
        last_client: SETUP,
        router: Router::default(),
        started: Instant::now(),
    };
    // The report is written before the front ends lose their connection, which makes them read it.
    let result = keeper.start().map_err(words("Cannot wait for events"));
    let result = result.and_then(|()| keeper.run(owned, idle)).map_err(|text| owned.report_failure(&text));
    keeper.finish(owned, result.as_ref().err().map(String::as_str));
    result
}

impl Keeper {
    fn start(&mut self) -> io::Result<()> {
        self.agent_interest = EventSet::IN;
        self.control(ControlOperation::Add, AGENT, self.agent.stream().as_raw_fd(), EventSet::IN)?;
        if let Some(listener) = &self.listener {
            self.control(ControlOperation::Add, LISTENER, listener.as_raw_fd(), EventSet::IN)?;
        }
        let (ours, theirs) = UnixStream::pair()?;
        self.add_client(SETUP, ours)?;
        let (result, receiver) = mpsc::channel();
        self.setup = Some(receiver);
        std::thread::Builder::new().name("setup".into()).spawn(move || {
            // The receiver is there as long as the loop runs.
            let _ = result.send(prepare(theirs));
        })?;
        self.greet_agent();
        Ok(())
    }

    fn control(
        &self,
        operation: ControlOperation,
        token: u64,
        fd: i32,
        interest: EventSet,
    ) -> io::Result<()> {
        self.epoll.ctl(operation, fd, EpollEvent::new(interest, token))
    }

    fn add_client(&mut self, id: ClientId, stream: UnixStream) -> io::Result<()> {
        let line = Line::new(stream, false)?;
        self.control(ControlOperation::Add, id, line.stream().as_raw_fd(), EventSet::IN)?;
        self.clients.insert(id, Client { line, greeted: None, interest: EventSet::IN });
        Ok(())
    }

    fn greet_agent(&mut self) {
        let message = Message::Hello(greeting(Role::Host, u64::from(std::process::id()) + 1));
        self.send_agent(Frame { channel: SESSION, message });
    }

    fn run(&mut self, owned: &Owned, idle: Duration) -> Result<(), String> {
        let mut idle_since = Instant::now();
        loop {
            if TERMINATED.load(Ordering::Relaxed) {
                return Ok(());
            }
            let now = Instant::now();
            if !self.ready {
                self.check_setup(owned)?;
                if now - self.started > START_TIMEOUT {
                    return Err(format!("Level 1 was not ready after {} s", START_TIMEOUT.as_secs()));
                }
                idle_since = now;
            } else if !self.clients.is_empty() || !self.router.is_empty() {
                idle_since = now;
            } else if now - idle_since >= idle {
                return Ok(());
            }
            for route in self.router.expire(now) {
                self.go(route);
            }
            let idle_end = self.ready.then_some(idle_since + idle);
            let wake = [idle_end, self.router.next_deadline()].into_iter().flatten().min();
            let longest = if self.ready { Duration::from_secs(60) } else { SETUP_POLL };
            let wait = wake.map_or(longest, |at| at.saturating_duration_since(now).min(longest));
            self.turn(wait)?;
        }
    }

    /// Waits for events and handles them.
    fn turn(&mut self, wait: Duration) -> Result<(), String> {
        self.update_interests().map_err(|error| format!("Cannot wait for events: {error}"))?;
        let mut events = [EpollEvent::default(); 64];
        let milliseconds = i32::try_from(wait.as_millis() + 1).unwrap_or(i32::MAX);
        let count = match self.epoll.wait(milliseconds, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == ErrorKind::Interrupted => 0,
            Err(error) => return Err(format!("Cannot wait for events: {error}")),
        };
        for event in &events[..count] {
            match event.data() {
                AGENT => self.agent_event()?,
                LISTENER => self.accept(),
                client => self.client_event(client),
            }
        }
        Ok(())
    }

    fn update_interests(&mut self) -> io::Result<()> {
        let full = self.agent.waiting() > AGENT_BACKLOG;
        let wanted = interest(true, self.agent.waiting());
        if wanted != self.agent_interest {
            self.agent_interest = wanted;
            self.control(ControlOperation::Modify, AGENT, self.agent.stream().as_raw_fd(), wanted)?;
        }
        for (id, client) in &mut self.clients {
            let wanted = interest(!full, client.line.waiting());
            if wanted != client.interest {
                client.interest = wanted;
                let event = EpollEvent::new(wanted, *id);
                self.epoll.ctl(ControlOperation::Modify, client.line.stream().as_raw_fd(), event)?;
            }
        }
        Ok(())
    }

    fn agent_event(&mut self) -> Result<(), String> {
        let mut frames = Vec::new();
        let result = self.agent.read(&mut frames).and_then(|()| self.agent.write());
        for frame in frames {
            match frame.message {
                Message::Hello(hello) if hello.nonce == 0 => self.greet_agent(),
                Message::Hello(hello) => {
                    if hello.version != VERSION {
                        return Err(format!("The agent speaks protocol version {}", hello.version));
                    }
                    self.hello = Some(hello);
                    self.answer_greetings();
                }
                _ => {
                    if let Some(route) = self.router.from_agent(frame) {
                        self.go(route);
                    }
                }
            }
        }
        result.map_err(|error| match self.machine.ended_within(QEMU_END) {
            Ok(Some(status)) => format!("QEMU has ended ({status})"),
            _ => format!("The connection to level 1 is lost: {error}"),
        })
    }

    fn accept(&mut self) {
        while let Some(Ok((stream, _))) = self.listener.as_ref().map(UnixListener::accept) {
            self.last_client += 1;
            if let Err(error) = self.add_client(self.last_client, stream) {
                self.say(&format!("Cannot serve a front end: {error}"));
            }
        }
    }

    fn client_event(&mut self, id: ClientId) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        let mut frames = Vec::new();
        let result = client.line.read(&mut frames).and_then(|()| client.line.write());
        for frame in frames {
            if let Message::Hello(hello) = &frame.message {
                if let Some(client) = self.clients.get_mut(&id) {
                    client.greeted = Some(hello.nonce);
                }
                self.answer_greetings();
            } else if let Some(route) = self.router.from_client(id, frame) {
                self.go(route);
            }
        }
        if result.is_err() {
            self.drop_client(id);
        }
    }

    fn drop_client(&mut self, id: ClientId) {
        // Closing the socket takes it out of the epoll set.
        self.clients.remove(&id);
        for route in self.router.client_gone(id, Instant::now()) {
            self.go(route);
        }
    }

    /// Answers each `Hello` whose sender may begin: the setup first, the others when it is done.
    fn answer_greetings(&mut self) {
        let Some(hello) = &self.hello else { return };
        for (id, client) in &mut self.clients {
            if (self.ready || *id == SETUP)
                && let Some(nonce) = client.greeted.take()
            {
                let answer = Message::Hello(Hello { nonce, ..hello.clone() });
                send(&mut client.line, &Frame { channel: SESSION, message: answer });
            }
        }
    }

    fn check_setup(&mut self, owned: &Owned) -> Result<(), String> {
        let Some(result) = self.setup.as_ref().and_then(|setup| setup.try_recv().ok()) else { return Ok(()) };
        let remarks = result?;
        let hello = self.hello.as_ref().ok_or("The agent said no Hello")?;
        if !hello.kvm {
            return Err(format!("Level 1 has no usable KVM: {}", hello.notes.join("; ")));
        }
        // QEMU has read it.
        let _ = std::fs::remove_file(owned.place().image());
        self.say(&format!("Level 1 is ready after {:.1} s", self.started.elapsed().as_secs_f32()));
        for remark in remarks.lines().chain(hello.notes.iter().map(String::as_str)) {
            self.say(remark);
        }
        self.setup = None;
        self.ready = true;
        self.answer_greetings();
        Ok(())
    }

    fn say(&self, text: &str) {
        // A full disk loses the log and nothing else.
        let _ = writeln!(&self.log, "{text}");
    }

    fn send_agent(&mut self, frame: Frame) {
        send(&mut self.agent, &frame);
    }

    fn go(&mut self, route: Route) {
        match route {
            Route::Agent(frame) => self.send_agent(frame),
            Route::Client(id, frame) => {
                if let Some(client) = self.clients.get_mut(&id) {
                    send(&mut client.line, &frame);
                }
            }
        }
    }

    /// Ends level 1: new front ends find nobody, commands are told to end, file systems are written back.
    fn finish(&mut self, owned: &Owned, failure: Option<&str>) {
        self.listener = None;
        // Whoever comes now starts a keeper, which waits for this one to end.
        let _ = std::fs::remove_file(owned.place().socket());
        let clients: Vec<ClientId> = self.clients.keys().copied().collect();
        if let Some(reason) = failure {
            for route in self.router.agent_gone(&format!("The software KVM host has ended: {reason}")) {
                self.go(route);
            }
            for client in self.clients.values_mut() {
                // Who is gone needs no last words.
                let _ = client.line.write();
            }
            return;
        }
        for id in clients {
            self.drop_client(id);
        }
        let deadline = Instant::now() + GRACE + Duration::from_secs(1);
        while !self.router.is_empty() && Instant::now() < deadline {
            for route in self.router.expire(Instant::now()) {
                self.go(route);
            }
            if self.turn(Duration::from_millis(100)).is_err() {
                return;
            }
        }
        // A number that no channel has: those of commands that would not end count up from 1.
        self.send_agent(Frame { channel: u32::MAX, message: Message::Power(Power::Off) });
        let deadline = Instant::now() + END_TIMEOUT;
        // The connection ends with QEMU.
        while Instant::now() < deadline && self.turn(Duration::from_millis(100)).is_ok() {}
    }
}

fn interest(read: bool, waiting: usize) -> EventSet {
    let mut set = EventSet::empty();
    if read {
        set |= EventSet::IN;
    }
    if waiting > 0 {
        set |= EventSet::OUT;
    }
    set
}

/// Queues a frame and sends what goes at once. What fails shows at the next event of the line.
fn send(line: &mut Line, frame: &Frame) {
    // Every frame here has come in as one of the same size, or is a small one of ours.
    let _ = line.queue(frame);
    let _ = line.write();
}

fn greeting(role: Role, nonce: u64) -> Hello {
    Hello {
        version: VERSION,
        nonce,
        role,
        kvm: false,
        release: String::new(),
        kernel: String::new(),
        notes: Vec::new(),
    }
}

/// Sets level 1 up over a connection of its own.
fn prepare(stream: UnixStream) -> Setup {
    let agent = AgentClient::connect(stream, START_TIMEOUT)
        .map_err(|error| format!("Level 1 did not start: {error}"))?;
    set_up(&agent)
}

/// Mounts the live share and prepares a started level 1 for machines.
pub(super) fn set_up(agent: &AgentClient) -> Setup {
    let words = |what: &'static str| move |error| format!("{what}: {error}");
    agent.mount(machine::live_share()).map_err(words("Cannot mount the host's files"))?;
    let command = Exec {
        argv: ["sh", "-c", &machine::setup_script()].map(|arg| arg.as_bytes().to_vec()).into(),
        ..Exec::default()
    };
    let output =
        agent.exec(command).and_then(|process| process.output()).map_err(words("Cannot set level 1 up"))?;
    let errors = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        return Err(format!("Setting level 1 up failed: {}", errors.trim()));
    }
    Ok(errors.trim().to_owned())
}
