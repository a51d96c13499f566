//! A virtual machine monitor in which guest kernels meet broken memory.
//!
//! Aconite boots stock x86-64 Linux kernels on KVM, gives them persistent memory, and breaks it on command: a
//! poisoned line raises a machine check at the very instruction that loads it, a device departs under a mounted file
//! system, and whatever still reaches for it is reported.
//!
//! # The machine
//!
//! ```text
//!   aconite run ──► run ──► host::choose ──► KVM is usable here ──► machine
//!                                   └──────► it is not: host::nested runs the same command line inside a software
//!                                            KVM host, and nothing else in the program knows
//!
//!   thread main      machine::Machine: builds, owns and changes everything; commands come from the API
//!   thread vcpuN     machine::cpu: KVM_RUN, then serve the exit: port, device register, MSR, or guarded memory
//!   thread api       api::Server: HTTP and JSON on a Unix socket; one more thread for each connection
//!   thread disk-ID   workers: performs the requests of a disk, several for each; pmem-ID, flushes of a virtio-pmem device
//!   thread agent     run: the conversation with PID 1 of the guest, over a virtio console port
//! ```
//!
//! A guest is described once ([`config::Machine`]), laid out ([`layout`]), told about itself in ACPI tables
//! (`aconite_acpi`), and wired to device models (`aconite_devices`) that know neither KVM nor threads.
//!
//! # A trap
//!
//! Every region of guest memory has two maps of one file ([`memory`]): the guest's, in which a page that holds
//! poison is protected, and the monitor's, which never traps. A touch makes KVM_RUN fail with EFAULT, with RIP at
//! the instruction. The vCPU takes the [`kvm::Baton`], which stops all others, and [`fault`] works out what the
//! instruction touches ([`x86`]): a poisoned line that is loaded, fetched or walked becomes a machine check, whose
//! registers the monitor owns ([`x86::mca`]); everything else in the page is let through, by single step or by doing
//! a repeated copy itself. Memory of a departed device reads as ones, swallows stores, and is reported.
//!
//! # Modules
//!
//! | module | what it knows |
//! |---|---|
//! | [`config`], [`units`], [`cli`] | the description of a machine, from command line, TOML file or API |
//! | [`run`] | from a description to an exit status, a run directory and a report |
//! | [`machine`] | how all parts make one machine; the only place that knows them all |
//! | [`command`], [`api`] | all that can be asked of a machine and all that it tells; the server and its client |
//! | [`memory`], [`fault`], [`x86`] | maps, poison and guards; traps; instructions, page tables, CPUID, machine checks |
//! | [`kvm`] | the only module that calls KVM |
//! | [`disk`], [`workers`] | where a disk's bytes are; the threads that perform requests of devices |
//! | [`boot`], [`layout`] | kernel loading and start state; guest-physical addresses |
//! | [`state`] | what outlives a machine: a directory of small documents |
//! | [`guest`] | what is packed for a guest, and the protocol with its agent |
//! | [`host`] | which KVM is here, what is missing, and the software KVM host |
//!
//! Unsafe code is confined to `memory` (maps), `kvm`, `host::sys` (terminals and signals) and the agent.

pub mod api;
pub mod boot;
pub mod cli;
pub mod command;
pub mod config;
pub mod disk;
pub mod fault;
pub mod guest;
pub mod host;
pub mod kvm;
pub mod layout;
pub mod machine;
pub mod memory;
pub mod run;
pub mod sidefile;
pub mod state;
pub mod units;
pub mod workers;
pub mod x86;
