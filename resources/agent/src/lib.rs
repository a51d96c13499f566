//! What the agent inside a machine and the monitor outside it agree on: the wire
//! [`protocol`], the small text files that the agent reads from its initramfs
//! ([`config`]), the lines that it writes on the console when it cannot speak, and
//! those that its workloads and their drivers exchange ([`workload`], [`crowd`]), where a process's memory
//! is ([`pagemap`], [`owners`]), and how a guest lets go of a memory device ([`mod@unit`]).
//!
//! The library holds bytes and text only, and touches nothing but /proc and /sys, so that the monitor can use it
//! without taking over anything that belongs to PID 1. The agent itself is the binary of
//! this package.
#![forbid(unsafe_code)]

pub mod config;
pub mod crowd;
pub mod owners;
pub mod pagemap;
pub mod protocol;
pub mod unit;
mod wire;
pub mod workload;
