//! Lines on the console of the machine, for what cannot be said over the port.

use std::fmt::Display;
use std::io::Write;

use aconite_agent::config::CONSOLE_PREFIX;

/// Writes a line with the agent's prefix.
pub fn say(text: impl Display) {
    line(format_args!("{CONSOLE_PREFIX}{text}"));
}

/// Writes a line as it is. A console that does not take it is no reason to stop.
pub fn line(text: impl Display) {
    let _ = writeln!(std::io::stderr(), "{text}");
}
