//! The protocol between the agent inside a guest and the monitor outside.

pub mod protocol;
