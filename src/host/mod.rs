//! The host: which KVM is here, where guest material lives, and the software KVM host for machines without one.
//!
//! Everything that depends on the machine Aconite runs on is in this module; nothing else in the program asks.

pub mod doctor;
pub mod manifest;
pub mod material;
pub mod probe;
pub mod resources;
