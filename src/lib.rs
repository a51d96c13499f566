//! A virtual machine monitor in which guest kernels meet broken memory.

pub mod api;
pub mod boot;
pub mod cli;
pub mod command;
pub mod config;
pub mod fault;
pub mod guest;
pub mod host;
pub mod kvm;
pub mod layout;
pub mod machine;
pub mod memory;
pub mod run;
pub mod units;
pub mod x86;
