//! Connects a command that an agent runs, in a guest or in the software KVM host, to this process's terminal,
//! streams and signals.

use std::fs::File;
use std::io::{self, IsTerminal};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread;

use aconite_agent::protocol::{Exec, ExitStatus, WindowSize};

use super::sys::{self, RawTerminal, Signals};
use crate::guest::client::{Client, ClientError};
use crate::guest::process::Control;

/// Signals that are passed on to the command. The rest is between this process and its kernel.
pub const SIGNALS: [i32; 7] =
    [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT, libc::SIGUSR1, libc::SIGUSR2, libc::SIGWINCH];

/// Runs `exec` with this process's standard streams, and with a terminal of its own if they are one. `signals`
/// are [`SIGNALS`], blocked before any thread was started.
///
/// # Errors
/// The command cannot be started, or the connection is lost.
pub fn attach(client: &Client, mut exec: Exec, signals: Signals) -> Result<ExitStatus, ClientError> {
    let local = |error| ClientError::Setup(Arc::new(error));
    let (stdin, stdout) = (io::stdin(), io::stdout());
    let on_terminal = stdin.is_terminal() && stdout.is_terminal() && sys::in_foreground(stdin.as_fd());
    exec.terminal = on_terminal.then(|| window(&stdout).unwrap_or(WindowSize { rows: 24, columns: 80 }));
    let process = client.exec(exec)?;
    let control = process.control();
    thread::Builder::new()
        .name("signals".into())
        .spawn(move || pass_signals(&signals, &control))
        .map_err(local)?;
    let raw = if on_terminal { Some(RawTerminal::enter(stdin.as_fd()).map_err(local)?) } else { None };
    // A lock on standard input would be held by a thread that never ends; reads go to the descriptor itself.
    let input = File::from(stdin.as_fd().try_clone_to_owned().map_err(local)?);
    let status = process.bridge(Some(Box::new(input)), stdout, io::stderr());
    drop(raw);
    status
}

fn window(terminal: &impl AsFd) -> Option<WindowSize> {
    sys::window_size(terminal.as_fd()).map(|(rows, columns)| WindowSize { rows, columns })
}

fn pass_signals(signals: &Signals, control: &Control) {
    while let Ok(signal) = signals.wait() {
        let sent = match (signal, window(&io::stdout())) {
            (libc::SIGWINCH, Some(size)) => control.resize(size),
            (libc::SIGWINCH, None) => Ok(()),
            _ => control.signal(signal),
        };
        if sent.is_err() {
            return;
        }
    }
}
