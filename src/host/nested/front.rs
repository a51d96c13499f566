//! The front end: the process that the user sees, while the same program with the same arguments runs in level 1.

use super::{KEEPER_COMMAND, Nested, NestedError, machine};
use crate::api::Socket;
use crate::guest::client::{Client, ClientError};
use crate::guest::process::Connection;
use crate::host::attach::{SIGNALS, attach};
use crate::host::sys::{self, Signals};
use aconite_agent::protocol::Exec;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How long to wait for level 1, which others may be using at the same time.
const START_TIMEOUT: Duration = Duration::from_secs(330);

/// How many times a keeper is started, or lost while it ends, before that counts as a failure.
const ATTEMPTS: usize = 4;

/// How long a connection to a socket in level 1 is tried: its program may just be starting.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Says in level 1 that this is level 1.
pub const INSIDE_VARIABLE: &str = "ACONITE_INSIDE_NESTED_HOST";

/// Variables whose value means the same in level 1.
fn is_passed(name: &str) -> bool {
    let exact = ["PATH", "HOME", "USER", "LOGNAME", "TERM", "COLORTERM", "NO_COLOR", "LANG", "TZ", "TMPDIR"];
    exact.contains(&name) || ["ACONITE_", "RUST_", "LC_"].iter().any(|prefix| name.starts_with(prefix))
}

/// What the program in level 1 is told to use in place of what the user named.
#[derive(Clone, Copy, Debug, Default)]
pub struct Inside<'a> {
    /// The API socket (`--api-socket`): front ends reach the one in level 1 at this path here.
    pub api_socket: Option<&'a Path>,
    /// The state directory (`--state`), without links in its path: it is written where it reaches this host.
    pub state: Option<&'a Path>,
}

/// Runs this program with these arguments in level 1; returns its exit status as a shell shows it.
///
/// `arguments` are without the name of the program.
///
/// # Errors
/// Level 1 cannot be started or is lost.
pub fn run(arguments: &[OsString], told: Inside<'_>) -> Result<u8, NestedError> {
    let nested = Nested::find()?;
    // Before any thread is started: all of them must have the signals blocked.
    let signals = Signals::block(&SIGNALS).map_err(NestedError::Local)?;
    let client = connect(&nested)?;
    let ended = Arc::new(AtomicBool::new(false));
    let mut arguments = arguments.to_vec();
    let mut _socket = None;
    if let Some(dir) = told.state {
        arguments = with_option(&arguments, "--state", machine::live_path(dir).as_os_str());
    }
    if let Some(path) = told.api_socket {
        let inside = Path::new(machine::SOCKET_DIR).join(format!("{}.sock", std::process::id()));
        arguments = with_option(&arguments, "--api-socket", inside.as_os_str());
        _socket = Some(forward(path, inside, client.clone(), ended.clone())?);
    }
    let result = attach(&client, command(&nested, &arguments)?, signals);
    ended.store(true, Ordering::Relaxed);
    Ok(u8::try_from(result?.shell_code() & 0xff).unwrap_or(u8::MAX))
}

/// `aconite __inside COMMAND...`: runs a command of the host inside. `arguments` begin with `__inside`.
///
/// # Errors
/// Level 1 cannot be started or is lost, or inside: the command cannot be started.
pub fn inside(arguments: &[OsString]) -> Result<u8, NestedError> {
    if !crate::host::is_inside() {
        return run(arguments, Inside::default());
    }
    let [_, program, rest @ ..] = arguments else { return Ok(2) };
    let source = Command::new(program).args(rest).exec();
    Err(NestedError::Command { program: program.clone(), source })
}

fn command(nested: &Nested, arguments: &[OsString]) -> Result<Exec, NestedError> {
    let program = std::env::current_exe().map_err(NestedError::Files)?;
    let cwd = std::env::current_dir().map_err(NestedError::Files)?;
    let mut argv = vec![machine::live_path(&program).into_os_string().into_vec()];
    argv.extend(arguments.iter().map(|argument| argument.as_bytes().to_vec()));
    let passed = std::env::vars_os().filter(|(name, _)| name.to_str().is_some_and(is_passed));
    let set = [
        (OsString::from("ACONITE_MATERIAL"), nested.material.root().as_os_str().to_owned()),
        (OsString::from(INSIDE_VARIABLE), OsString::from("1")),
    ];
    let env = passed
        .filter(|(name, _)| set.iter().all(|(other, _)| name != other))
        .chain(set.iter().cloned())
        .map(|(name, value)| [name.as_bytes(), b"=", value.as_bytes()].concat())
        .collect();
    let cwd = machine::live_path(&cwd).into_os_string().into_vec();
    Ok(Exec { argv, env, cwd, terminal: None })
}

/// `arguments` with the long option `name` set to `value`, in front of a `--`.
fn with_option(arguments: &[OsString], name: &str, value: &OsStr) -> Vec<OsString> {
    let end = arguments.iter().position(|a| a == "--").unwrap_or(arguments.len());
    let (options, rest) = arguments.split_at(end);
    let prefix = format!("{name}=");
    let mut result = Vec::with_capacity(arguments.len() + 1);
    let mut options = options.iter();
    while let Some(argument) = options.next() {
        if argument == name {
            options.next();
        } else if !argument.as_bytes().starts_with(prefix.as_bytes()) {
            result.push(argument.clone());
        }
    }
    // After the subcommand, which comes first.
    let mut option = OsString::from(prefix);
    option.push(value);
    result.insert(result.len().min(1), option);
    result.extend_from_slice(rest);
    result
}

/// Connects to the keeper, starting it if there is none.
fn connect(nested: &Nested) -> Result<Client, NestedError> {
    let deadline = Instant::now() + START_TIMEOUT;
    let mut keeper: Option<Child> = None;
    let mut attempts = 0;
    loop {
        if let Ok(stream) = UnixStream::connect(nested.place.socket()) {
            match Client::connect(stream, deadline.saturating_duration_since(Instant::now())) {
                Ok(client) => return Ok(client),
                Err(error @ ClientError::Lost(_)) => {
                    attempts += 1;
                    if let Ok(text) = fs::read_to_string(nested.place.failure()) {
                        return Err(NestedError::Failed(text));
                    }
                    if attempts >= ATTEMPTS {
                        return Err(error.into());
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
        let status = match &mut keeper {
            Some(child) => child.try_wait().map_err(NestedError::Spawn)?,
            None => None,
        };
        if let Some(status) = status.filter(|status| !status.success()) {
            let text = fs::read_to_string(nested.place.failure());
            return Err(NestedError::Failed(
                text.unwrap_or_else(|_| format!("the keeper ended with {status}")),
            ));
        }
        if keeper.is_none() || status.is_some() {
            if attempts >= ATTEMPTS || Instant::now() > deadline {
                return Err(NestedError::Failed("no keeper could be reached".into()));
            }
            attempts += 1;
            keeper = Some(start_keeper(nested)?);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn start_keeper(nested: &Nested) -> Result<Child, NestedError> {
    let program = std::env::current_exe().map_err(NestedError::Spawn)?;
    let mut command = Command::new(program);
    command.arg(KEEPER_COMMAND).env("ACONITE_MATERIAL", nested.material.root());
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    sys::detach(&mut command);
    command.spawn().map_err(NestedError::Spawn)
}

/// Passes the connections of a socket here to one in level 1; dropping the result removes the socket's file.
fn forward(
    path: &Path,
    inside: PathBuf,
    client: Client,
    ended: Arc<AtomicBool>,
) -> Result<Socket, NestedError> {
    let socket = Socket::bind(path)?;
    let listener = socket.listener.try_clone().map_err(NestedError::Local)?;
    listener.set_nonblocking(false).map_err(NestedError::Local)?;
    let accept = move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let (client, inside, ended) = (client.clone(), inside.clone(), ended.clone());
            let pass = move || {
                if let Some(connection) = reach(&client, &inside, &ended) {
                    // An error means that level 1 is lost, which the main thread reports.
                    let _ = connection.bridge(stream);
                }
            };
            // A thread that cannot be had closes the connection.
            let _ = std::thread::Builder::new().name("connection".into()).spawn(pass);
        }
    };
    std::thread::Builder::new().name("socket".into()).spawn(accept).map_err(NestedError::Local)?;
    Ok(socket)
}

fn reach(client: &Client, inside: &Path, ended: &AtomicBool) -> Option<Connection> {
    let deadline = Instant::now() + CONNECT_TIMEOUT;
    loop {
        match client.connect_socket(inside.as_os_str().as_bytes()) {
            Ok(connection) => return Some(connection),
            Err(_) if ended.load(Ordering::Relaxed) || Instant::now() > deadline => return None,
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<OsString> {
        text.split_whitespace().map(OsString::from).collect()
    }

    #[test]
    fn the_socket_option_is_replaced() {
        for (given, expected) in [
            ("run -k K --api-socket a.sock --cpus 2", "run --api-socket=/s -k K --cpus 2"),
            ("run --api-socket=a.sock", "run --api-socket=/s"),
            ("run m.toml -- sh --api-socket x", "run --api-socket=/s m.toml -- sh --api-socket x"),
        ] {
            assert_eq!(
                with_option(&words(given), "--api-socket", OsStr::new("/s")),
                words(expected),
                "{given}"
            );
        }
    }

    #[test]
    fn only_what_means_the_same_is_passed() {
        assert!(is_passed("ACONITE_LOG") && is_passed("LC_ALL") && is_passed("TERM"));
        assert!(
            !is_passed("LD_LIBRARY_PATH") && !is_passed("XDG_RUNTIME_DIR") && !is_passed("SSH_AUTH_SOCK")
        );
    }
}
