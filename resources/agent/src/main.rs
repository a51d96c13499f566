//! The agent inside a machine of aconite: PID 1 of a guest, PID 1 of the first-level
//! machine of the nested host, or, for tests, an ordinary process. In a guest it is also
//! the program of the named workloads.
//!
//! `boot` and `nested_root` set the machine up, `server` speaks the protocol over one
//! descriptor, `channel` is one command or connection of it, `sys` holds the system calls; `workload_map`
//! is the workload of that name, `workload_mapping` its memory, `workload_probe` the accesses to it,
//! with `workload_ring` what it has pinned; `workload_garbage` and `workload_crowd` are others. `dsm` calls the firmware of
//! an NVDIMM.

mod boot;
mod channel;
mod console;
mod dsm;
mod nested_root;
mod server;
mod sys;
mod workload_crowd;
mod workload_garbage;
mod workload_map;
mod workload_mapping;
mod workload_probe;
mod workload_ring;

use std::fs::{self, File};
use std::io;
use std::os::fd::RawFd;
use std::process::ExitCode;
use std::time::Duration;

use aconite_agent::config::{CONSOLE_FATAL, CONSOLE_NO_PORT, ROLE_HOST};
use aconite_agent::crowd::{self, Kind};
use aconite_agent::protocol::{Power, Role};
use aconite_agent::{owners, pagemap, unit, workload};

use crate::server::Server;

const USAGE: &str = "Usage: aconite-agent [host] as process 1 of a machine, or aconite-agent --fd NUMBER, \
                     or aconite-agent workload map, or aconite-agent workload garbage SEED SECONDS, \
                     or aconite-agent workload crowd FILE NUMBER KIND, \
                     or aconite-agent pagemap PID ADDRESS [LENGTH], or aconite-agent owners VA:GPA..., or aconite-agent unit release|drop|bind PATH \
                     [START LENGTH], or aconite-agent dsm DEVICE FAMILY FUNCTION LENGTH [INPUT]";

fn main() -> ExitCode {
    let arguments: Vec<String> =
        std::env::args_os().skip(1).map(|a| a.to_string_lossy().into_owned()).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        ["--fd", number] => match number.parse() {
            Ok(fd) => serve_process(fd),
            Err(_) => usage(),
        },
        [pagemap::COMMAND, pid, address] => print_pagemap(pid, address, "1"),
        [pagemap::COMMAND, pid, address, length] => print_pagemap(pid, address, length),
        [owners::COMMAND, ref pages @ ..] => print_owners(pages),
        [unit::COMMAND, ref words @ ..] => match unit::run(words) {
            Ok(()) => ExitCode::SUCCESS,
            Err(why) => {
                eprintln!("{why}");
                ExitCode::FAILURE
            }
        },
        [dsm::COMMAND, ref words @ ..] => match dsm::run(words) {
            Ok(output) => {
                println!("{output}");
                ExitCode::SUCCESS
            }
            Err(why) => {
                eprintln!("{why}");
                ExitCode::FAILURE
            }
        },
        ["workload", workload::MAP] => ended(workload::MAP, workload_map::run()),
        ["workload", workload::GARBAGE, seed, seconds] => match (seed.parse(), seconds.parse()) {
            (Ok(seed), Ok(seconds)) => match workload_garbage::run(seed, Duration::from_secs(seconds)) {
                Ok(count) => {
                    console::line(format_args!("{count} accesses"));
                    ExitCode::SUCCESS
                }
                Err(error) => ended(workload::GARBAGE, Err(error)),
            },
            _ => usage(),
        },
        ["workload", crowd::CROWD, file, number, kind] => match (number.parse(), Kind::parse(kind)) {
            (Ok(number), Some(kind)) => ended(crowd::CROWD, workload_crowd::run(file.as_ref(), number, kind)),
            _ => usage(),
        },
        // The kernel passes on words of its command line that it does not know.
        _ if std::process::id() == 1 => serve_machine(words.contains(&"host")),
        _ => usage(),
    }
}

fn usage() -> ExitCode {
    console::line(USAGE);
    ExitCode::from(2)
}

/// How a workload ended.
fn ended(name: &str, result: io::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            console::say(format_args!("The workload {name} ends: {error}"));
            ExitCode::FAILURE
        }
    }
}

/// Prints where memory of a process is, or on standard error why it cannot be said.
fn print_pagemap(pid: &str, address: &str, length: &str) -> ExitCode {
    let numbers = || {
        let pid = pid.parse().map_err(|_| format!("{pid:?} is no process: give its number"))?;
        Ok((pid, pagemap::number(address)?, pagemap::number(length)?))
    };
    match numbers().and_then(|(pid, address, length)| pagemap::look_up(pid, address, length)) {
        Ok(pieces) => {
            pieces.iter().for_each(|piece| println!("{piece}"));
            ExitCode::SUCCESS
        }
        Err(why) => {
            eprintln!("{why}");
            ExitCode::FAILURE
        }
    }
}

/// Prints which processes have pages, or on standard error why it cannot be said.
fn print_owners(pages: &[&str]) -> ExitCode {
    match pages.iter().map(|text| owners::page(text)).collect::<Result<Vec<_>, _>>() {
        Ok(pages) => {
            owners::owners(&pages).iter().for_each(|owner| println!("{owner}"));
            ExitCode::SUCCESS
        }
        Err(why) => {
            eprintln!("{why}");
            ExitCode::FAILURE
        }
    }
}

/// Serves as an ordinary process over a descriptor that the parent has passed on, until it is closed.
fn serve_process(fd: RawFd) -> ExitCode {
    let served = sys::inherited(fd).and_then(|fd| {
        sys::raise_file_limit();
        Server::new(File::from(fd), Role::Process, false, Vec::new())?.serve()
    });
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            console::say(format_args!("Cannot serve on descriptor {fd}: {error}"));
            ExitCode::FAILURE
        }
    }
}

/// Serves as PID 1. Whatever goes wrong ends the machine with a line on the console: if PID 1 just
/// ended, the kernel would panic, and a panic must mean one of the guest's own.
fn serve_machine(nested_host: bool) -> ExitCode {
    std::panic::set_hook(Box::new(|panic| fatal(&panic.to_string())));
    match set_up(nested_host).and_then(|mut server| server.serve().map_err(|error| error.to_string())) {
        Ok(()) => fatal("The port is gone"),
        Err(text) => fatal(&text),
    }
    ExitCode::FAILURE
}

fn set_up(nested_host: bool) -> Result<Server, String> {
    let mut notes = boot::mount_file_systems()?;
    let command_line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let nested_host = nested_host || command_line.split_whitespace().any(|word| word == ROLE_HOST);
    sys::raise_file_limit();
    if nested_host {
        notes.extend(nested_root::leave_first_processor().err());
        notes.extend(nested_root::settle_clock().err());
    }
    notes.extend(boot::load_modules());
    let mut kvm = false;
    if nested_host {
        notes.extend(nested_root::enter()?);
        match nested_root::check_kvm() {
            Ok(()) => kvm = true,
            Err(note) => notes.push(note),
        }
    }
    notes.iter().for_each(console::say);
    let Some(port) = boot::open_port() else {
        console::line(CONSOLE_NO_PORT);
        return Err(boot::end_machine(Power::Off).to_string());
    };
    let role = if nested_host { Role::NestedHost } else { Role::Guest };
    Server::new(port, role, kvm, notes).map_err(|error| format!("Cannot serve: {error}"))
}

/// Says why, and ends the machine; if even that fails, waits for somebody to do so.
fn fatal(text: &str) {
    console::line(format_args!("{CONSOLE_FATAL}{text}"));
    console::say(boot::end_machine(Power::Off));
    loop {
        std::thread::park();
    }
}
