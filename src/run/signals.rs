//! What signals do to a machine without a command.

use aconite_agent::protocol::Power;

use crate::guest::client::Client;
use crate::host::sys::Signals;
use crate::machine::{Cause, Handle};

/// Ends a machine that has no agent at the first signal.
pub fn stop_on_signal(signals: &Signals, handle: &Handle) {
    if let Some(signal) = next_end(signals) {
        handle.stop(Cause::Signal { signal });
    }
}

/// Asks the guest to power off at the first signal, and ends the machine at the second.
pub fn power_off_on_signal(signals: &Signals, client: &Client, handle: &Handle) {
    if next_end(signals).is_none() {
        return;
    }
    if client.power(Power::Off).is_err() {
        handle.stop(Cause::PowerOff);
    }
    stop_on_signal(signals, handle);
}

fn next_end(signals: &Signals) -> Option<i32> {
    loop {
        match signals.wait() {
            Ok(libc::SIGWINCH | libc::SIGUSR1 | libc::SIGUSR2) => {}
            Ok(signal) => return Some(signal),
            Err(_) => return None,
        }
    }
}
