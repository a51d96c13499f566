//! ACPI tables and AML of a machine, as bytes. No I/O, no guest memory, no unsafe.
//!
//! Two modules are shared with the device models and the monitor: [`layout`] says where things are in
//! guest-physical memory, [`platform`] says what the registers mean that AML touches. A register that AML
//! reads and a device model answers is described once, here, so the two cannot drift apart.
#![forbid(unsafe_code)]

pub mod layout;
pub mod platform;
