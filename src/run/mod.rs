//! `aconite run`: from a description to an exit status.

mod agent;
mod report;
mod signals;

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use aconite_agent::protocol::{Exec, ExitStatus, Power};
use thiserror::Error;

use self::agent::Agent;
use self::report::Report;
use crate::api::{Executor, Server, SocketError};
use crate::command::{Event, EventBus};
use crate::config::{Checked, ConfigError, Machine as Config, PmemSource, Warning};
use crate::guest::client::{Client, ClientError};
use crate::guest::initramfs::{self, Contents, PackError};
use crate::guest::kernel_image::{self, ImageError};
use crate::guest::modules;
use crate::host::attach::{SIGNALS, attach};
use crate::host::material::Material;
use crate::host::nested::front::Inside;
use crate::host::nested::{self, NestedError};
use crate::host::sys::{self, Signals};
use crate::host::{self, NoKvm, Where};
use crate::machine::{
    self, AgentPort, Cause, ConsoleLog, ConsoleSink, Handle, Identity, Machine, MachineError, Outcome, Spec,
};
use crate::memory::backing::{self, BackingError};
use crate::state::{Locking, State, StateError};

/// How long a guest may take to start its agent. It is generous: the host may be a software KVM.
const AGENT_TIMEOUT: Duration = Duration::from_secs(120);
/// How long a guest may take to power off when it is asked to.
const POWER_OFF_TIMEOUT: Duration = Duration::from_secs(30);
/// Console lines that are shown when a guest dies: a panic with its call trace and registers.
const TAIL_LINES: usize = 80;
/// What every guest's kernel command line begins with: the log on the serial line from warnings up, and a
/// reset at once after a panic.
const COMMAND_LINE: &str = "console=ttyS0 panic=-1 printk.devkmsg=on";
/// Log level of a guest that runs a command: warnings and worse.
const QUIET: &str = "loglevel=5";

/// Exit status of a command line that makes no sense.
pub const STATUS_USAGE: u8 = 2;
/// Exit status when the time is over, or the guest has not come as far as its agent.
pub const STATUS_TIMEOUT: u8 = 124;
/// Exit status when the monitor failed.
pub const STATUS_FAILED: u8 = 125;
/// Exit status when there is no such command.
pub const STATUS_NO_COMMAND: u8 = 127;
/// Exit status when the guest asked for a reset before its command had ended.
pub const STATUS_RESET: u8 = 254;
/// Exit status when the guest panicked.
pub const STATUS_PANIC: u8 = 255;

/// Why there was no run.
#[derive(Debug, Error)]
pub enum RunError {
    /// The description.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The command is not there.
    #[error(
        "The guest has no command {0:?}: name a program of this machine, or one that is packed with --file"
    )]
    NoCommand(PathBuf),
    /// The initial RAM disk.
    #[error("Cannot pack the guest's initial RAM disk")]
    Pack(#[source] PackError),
    /// The kernel's release.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A file of the run.
    #[error("Cannot use {path}")]
    File {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The machine.
    #[error("Cannot run the machine")]
    Machine(#[from] MachineError),
    /// There is no KVM to run on.
    #[error(transparent)]
    NoKvm(#[from] NoKvm),
    /// The software KVM host.
    #[error("Cannot run the machine in the software KVM host")]
    Nested(#[from] NestedError),
    /// A file of a memory device.
    #[error(transparent)]
    Backing(#[from] BackingError),
    /// What outlives machines.
    #[error(transparent)]
    State(#[from] StateError),
    /// The API.
    #[error(transparent)]
    Api(#[from] SocketError),
    /// Threads, signals, sockets.
    #[error("Cannot set up the monitor")]
    Setup(#[source] std::io::Error),
}

/// What the guest's command came to.
#[derive(Clone, Debug, Default)]
struct CommandEnd {
    status: Option<u8>,
    error: Option<String>,
}

impl RunError {
    /// The exit status: 2 if the user asked for something that cannot be, 127 if there is no such command, as of a
    /// shell.
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::Config(_) => STATUS_USAGE,
            Self::NoCommand(_) => STATUS_NO_COMMAND,
            _ => STATUS_FAILED,
        }
    }
}

/// Runs the machine where this host can run it, and returns the exit status. `arguments` are those of the
/// program, for the software KVM host.
pub fn run_anywhere(config: &Config, arguments: &[OsString]) -> Result<u8, RunError> {
    let mut warnings = config.validate()?;
    let checked = config.check_host()?;
    warnings.extend(checked.warnings.iter().cloned());
    if !host::is_inside() {
        for warning in Warning::merged(warnings) {
            eprintln!("aconite: warning: {warning}");
        }
    }
    let why = match host::choose(config.host)? {
        Where::Kvm => {
            let host = if host::is_inside() { "nested" } else { "kvm" };
            return run(config, &checked, host, arguments);
        }
        Where::Nested { why } => why,
    };
    if let Some(why) = why {
        eprintln!("aconite: {why}; running in the software KVM host");
    }
    // Locks taken inside exclude nobody outside: the real files are created, sized and locked here.
    let mut _files = Vec::new();
    let pmem = config.pmem.iter().map(|device| (&device.source, device.readonly)).zip(&checked.pmem);
    let disks = config.disk.iter().map(|disk| (&disk.source, disk.readonly)).zip(&checked.disk);
    for ((source, readonly), checked) in pmem.chain(disks) {
        if let PmemSource::File { path, .. } = source {
            _files.push(backing::open(path, checked.size.bytes(), !readonly, checked.create)?);
        }
    }
    let state = config.state.as_deref().map(|dir| State::open(dir, Locking::Here)).transpose()?;
    let inside = Inside { api_socket: config.api_socket.as_deref(), state: state.as_ref().map(State::dir) };
    Ok(nested::front::run(arguments, inside)?)
}

/// Writes the firmware tables that the machine would have, and returns the names of the files.
pub fn dump_tables(config: &Config, output: &Path) -> Result<Vec<String>, RunError> {
    config.validate()?;
    let checked = config.check_host()?;
    let tables = machine::tables(config, &checked.pmem).map_err(MachineError::from)?;
    report::write_tables(output, &tables).map_err(|source| file_error(output, source))
}

/// Runs the machine on this host's KVM, and returns the exit status. When its power comes back, this program is replaced
/// by a new one with the same `arguments`: whatever lived in memory is lost, as it is in a computer.
fn run(config: &Config, checked: &Checked, host: &str, arguments: &[OsString]) -> Result<u8, RunError> {
    sys::return_large_memory();
    let events = EventBus::new();
    // Inside the software KVM host, the front end outside holds the lock.
    let locking = if host::is_inside() { Locking::Elsewhere } else { Locking::Here };
    let state = config.state.as_deref().map(|dir| State::open(dir, locking)).transpose()?.map(Arc::new);
    let run_dir = config.run_dir.as_deref().map(prepare_run_dir).transpose()?;
    let console_file = run_dir.map(|dir| create(&dir.join("console.log"))).transpose()?;
    let events_file = run_dir.map(|dir| create(&dir.join("events.jsonl"))).transpose()?;
    let Guest { initrd, command } = guest(config, checked)?;
    // Blocked before any thread is started, so that all of them leave the signals to the one that waits.
    let signals = Signals::block(&SIGNALS).map_err(RunError::Setup)?;

    let with_command = config.agent && !config.command.is_empty();
    let console_log = ConsoleLog::default();
    let console = ConsoleSink::new(console_log.clone(), console_file, !with_command);
    let (ours, theirs) = UnixStream::pair().map_err(RunError::Setup)?;
    let agent = config.agent.then(|| AgentPort::new(theirs)).transpose().map_err(RunError::Setup)?;
    let command_line = command_line(config, with_command);
    let machine = Machine::new(
        Spec {
            config,
            pmem: &checked.pmem,
            disks: &checked.disk,
            kernel_release: checked.kernel.version.clone(),
            initrd: &initrd,
            command_line: &command_line,
            console,
            events: events.clone(),
            state: state.clone(),
        },
        Identity {
            kernel: config.kernel.display().to_string(),
            kernel_release: checked.kernel.version.clone(),
            host: host.to_owned(),
        },
        console_log.clone(),
        agent,
    )?;
    drop(initrd);
    let handle = machine.handle();
    let log =
        events_file.map(|file| report::log_events(&events, file)).transpose().map_err(RunError::Setup)?;
    let server = match &config.api_socket {
        Some(path) => Some(Server::start(path, Arc::new(handle.clone()))?),
        None => None,
    };
    if let Some(dir) = run_dir {
        report::write_tables(&dir.join("tables"), machine.tables())
            .map_err(|source| file_error(dir, source))?;
    }
    if let Some(limit) = config.timeout {
        let handle = handle.clone();
        spawn("timeout", move || {
            thread::sleep(limit.0);
            handle.stop(Cause::Timeout);
        })?;
    }
    let end = Arc::new(Mutex::new(CommandEnd::default()));
    if config.agent {
        let (handle, end) = (handle.clone(), end.clone());
        spawn("agent", move || talk(ours, &command, &handle, &end, signals))?;
    } else {
        let handle = handle.clone();
        spawn("signals", move || signals::stop_on_signal(&signals, &handle))?;
    }

    let outcome = machine.run().map_err(MachineError::from)?;
    events.close();
    drop(server);
    if let Some(log) = log {
        // The thread ends with the stream; a panic in it has been printed.
        let _ = log.join();
    }
    let end = end.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let status = status(&outcome, &end);
    explain(&outcome, &end, &console_log, with_command);
    if let Some(dir) = run_dir {
        Report::new(config, &outcome, status, end.status)
            .write(dir)
            .map_err(|source| file_error(dir, source))?;
    }
    match outcome.cause {
        Cause::PowerCycle => Err(RunError::Setup(again(arguments))),
        _ => Ok(status),
    }
}

/// Starts over. Returns only if that fails.
fn again(arguments: &[OsString]) -> std::io::Error {
    match std::env::current_exe() {
        Ok(program) => std::process::Command::new(program).args(arguments).exec(),
        Err(error) => error,
    }
}

/// The kernel command line of the machine.
pub fn command_line(config: &Config, quiet: bool) -> String {
    let mut line = COMMAND_LINE.to_owned();
    if quiet {
        line.push(' ');
        line.push_str(QUIET);
    }
    if !config.cmdline.is_empty() {
        line.push(' ');
        line.push_str(&config.cmdline);
    }
    line
}

/// What the guest starts from.
struct Guest {
    initrd: Vec<u8>,
    /// The command as it is called in the guest.
    command: Vec<String>,
}

/// The agent's initial RAM disk, and the user's after it.
fn guest(config: &Config, checked: &Checked) -> Result<Guest, RunError> {
    let mut guest = Guest { initrd: Vec::new(), command: config.command.clone() };
    if config.agent {
        let release = match &checked.kernel.version {
            Some(release) => release.clone(),
            None => kernel_image::release(&config.kernel)?,
        };
        let modules = modules::find(&config.kernel, &release, config.modules.as_deref())
            .map_err(|error| RunError::Pack(error.into()))?;
        let packed = initramfs::pack(&Contents {
            roots: Material::find()
                .and_then(|material| material.tools())
                .map(|tools| tools.dir)
                .into_iter()
                .collect(),
            programs: config.tools.iter().map(PathBuf::from).collect(),
            command: config.command.first().map(PathBuf::from),
            files: config.files.iter().map(|file| (file.source.clone(), file.target.clone())).collect(),
            ..Contents::guest(Some(modules))
        })
        .map_err(|error| match error {
            PackError::NoProgram(program) if config.command.first().map(Path::new) == Some(&program) => {
                RunError::NoCommand(program)
            }
            error => RunError::Pack(error),
        })?;
        guest.initrd = packed.bytes;
        if let (Some(first), Some(packed)) = (guest.command.first_mut(), packed.command) {
            *first = packed.to_string_lossy().into_owned();
        }
    }
    if let Some(path) = &config.initrd {
        let more = fs::read(path).map_err(|source| file_error(path, source))?;
        // The kernel skips zeroes between archives (init/initramfs.c).
        guest.initrd.resize(guest.initrd.len().next_multiple_of(4), 0);
        guest.initrd.extend(more);
    }
    Ok(guest)
}

/// The conversation with the agent; it ends the machine when the command has ended.
fn talk(stream: UnixStream, command: &[String], handle: &Handle, end: &Mutex<CommandEnd>, signals: Signals) {
    let note = |status, error: Option<ClientError>| {
        *end.lock().unwrap_or_else(PoisonError::into_inner) =
            CommandEnd { status, error: error.map(|error| error.to_string()) };
    };
    let client = match Client::connect(stream, AGENT_TIMEOUT) {
        Ok(client) => client,
        Err(error) => {
            note(None, Some(error));
            handle.stop(Cause::NoAgent);
            return;
        }
    };
    handle.meet(Arc::new(Agent::new(client.clone())));
    handle.events().publish(Event::AgentReady { kernel: client.hello().release.clone() });
    if command.is_empty() {
        signals::power_off_on_signal(&signals, &client, handle);
        return;
    }
    let exec = Exec {
        argv: command.iter().map(|word| word.as_bytes().to_vec()).collect(),
        env: Vec::new(),
        cwd: Vec::new(),
        terminal: None,
    };
    match attach(&client, exec, signals) {
        Ok(exit) => {
            let (status, signal) = match exit {
                ExitStatus::Code(code) => (Some(code), None),
                ExitStatus::Signal(signal) => (None, Some(signal)),
            };
            handle.events().publish(Event::CommandExited { status, signal });
            note(Some((exit.shell_code() & 0xff) as u8), None);
        }
        Err(error) => {
            let status = error.shell_code().map(|code| code as u8);
            note(status, Some(error));
        }
    }
    power_off(&client, handle);
}

/// Asks the guest to power off, and ends the machine if it does not.
fn power_off(client: &Client, handle: &Handle) {
    if client.power(Power::Off).is_ok() {
        thread::sleep(POWER_OFF_TIMEOUT);
    }
    handle.stop(Cause::PowerOff);
}

fn status(outcome: &Outcome, end: &CommandEnd) -> u8 {
    match &outcome.cause {
        Cause::Panic | Cause::TripleFault { .. } | Cause::Shutdown { .. } => STATUS_PANIC,
        Cause::Timeout | Cause::NoAgent => STATUS_TIMEOUT,
        Cause::Failed(_) => STATUS_FAILED,
        Cause::Signal { signal } => 128u8.wrapping_add(*signal as u8),
        Cause::Reset => end.status.unwrap_or(STATUS_RESET),
        Cause::PowerOff | Cause::Quit | Cause::PowerCut | Cause::PowerCycle => end.status.unwrap_or(0),
    }
}

/// Says on standard error what the exit status cannot.
fn explain(outcome: &Outcome, end: &CommandEnd, console: &ConsoleLog, with_command: bool) {
    let tail = || {
        for vcpu in &outcome.vcpus {
            eprintln!("aconite: {vcpu}");
        }
        if with_command {
            eprintln!("aconite: the console's last lines:\n{}", console.tail(TAIL_LINES));
        }
    };
    match &outcome.cause {
        Cause::PowerCut | Cause::PowerCycle => {}
        Cause::PowerOff | Cause::Quit => {
            if let Some(error) = &end.error {
                eprintln!("aconite: {error}");
            } else if with_command && end.status.is_none() {
                eprintln!("aconite: the guest ended ({}) before its command did", outcome.cause);
            }
        }
        Cause::Reset => {
            if end.status.is_none() {
                eprintln!("aconite: the guest asked for a reset");
            }
        }
        Cause::Panic => {
            eprintln!("aconite: the guest kernel panicked");
            tail();
        }
        Cause::Shutdown { vcpu, why } => {
            eprintln!("aconite: vCPU {vcpu} shut down: {why}");
            tail();
        }
        Cause::TripleFault { vcpu } => {
            eprintln!("aconite: vCPU {vcpu} shut down (triple fault)");
            tail();
        }
        Cause::Timeout => {
            eprintln!("aconite: the time given with --timeout is over");
            tail();
        }
        Cause::NoAgent => {
            eprintln!("aconite: {}", end.error.as_deref().unwrap_or("the guest's agent did not answer"));
            tail();
        }
        Cause::Signal { signal } => eprintln!("aconite: ended by signal {signal}"),
        Cause::Failed(what) => {
            eprintln!("aconite: {what}");
            tail();
        }
    }
}

fn prepare_run_dir(dir: &Path) -> Result<&Path, RunError> {
    fs::create_dir_all(dir).map_err(|source| file_error(dir, source))?;
    Ok(dir)
}

fn create(path: &Path) -> Result<File, RunError> {
    File::create(path).map_err(|source| file_error(path, source))
}

fn file_error(path: &Path, source: std::io::Error) -> RunError {
    RunError::File { path: path.to_owned(), source }
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<(), RunError> {
    thread::Builder::new().name(name.to_owned()).spawn(work).map(drop).map_err(RunError::Setup)
}
