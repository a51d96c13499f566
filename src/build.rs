//! Builds the guest agent as a static program, so that the monitor carries it.
fn main() {}
