//! Tests of the command line: what clap accepts, and `ctl` against a server.

use std::path::Path;
use std::sync::Arc;

use clap::{CommandFactory, Parser};

use super::*;
use crate::api::Server;
use crate::api::fake::FakeMachine;
use crate::command::{Event, EventBus};

#[test]
fn the_definitions_are_sound() {
    Cli::command().debug_assert();
}

#[test]
fn a_run() {
    let cli = Cli::try_parse_from(
        "aconite run -k K --cpus 4 --memory 2G --pmem size=1G,id=p0 --pmem size=512M,id=p1 -- ndctl list -R"
            .split(' '),
    )
    .unwrap();
    let Action::Run(run) = cli.action else { panic!("run was expected") };
    let machine = run.machine.machine(&run.command).unwrap();
    assert_eq!((machine.cpus, machine.pmem.len()), (4, 2));
    assert_eq!(machine.command, ["ndctl", "list", "-R"]);
    assert!(Cli::try_parse_from(["aconite", "run", "--bogus"]).is_err());
    assert!(Cli::try_parse_from("aconite ctl -s x remove p0".split(' ')).is_err(), "a mode is needed");
}

/// Runs `aconite ctl -s PATH LINE`: what it prints, or exit status and error.
fn run_ctl(path: &Path, line: &str) -> Result<String, (u8, String)> {
    let words = ["aconite", "ctl", "-s", path.to_str().unwrap()];
    let cli = Cli::try_parse_from(words.into_iter().chain(line.split(' '))).unwrap_or_else(|e| panic!("{e}"));
    let Action::Ctl(args) = cli.action else { panic!("ctl was expected") };
    let mut output = Vec::new();
    match ctl(&args, &mut output) {
        Ok(()) => Ok(String::from_utf8(output).unwrap()),
        Err(error) => Err((error.exit_status(), error.to_string())),
    }
}

#[test]
fn everything_that_ctl_can_ask() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vm.sock");
    let bus = EventBus::new();
    let machine = Arc::new(FakeMachine::new(bus.clone()));
    let _server = Server::start(&path, machine.clone()).unwrap();
    let run = |line: &str| run_ctl(&path, line);

    bus.publish(Event::MachineStarted { vcpus: 2 });
    assert_eq!(
        run("memory").unwrap(),
        "ID  STATE    ADDRESS      SIZE  NODE  BUS  DIMMS  CHANNEL    POISONED  STALE  FILE\n\
         p0  present  0x140000000  1G    1     -    -      container  0         0      -\n"
    );
    assert!(run("info").unwrap().contains("kernel version: 6.12.95\nmemory: 1G\n"));
    assert!(run("memory p0").unwrap().contains("state: present\n"));
    assert_eq!(
        run("poison add p0 0x200040+64 0x1000").unwrap(),
        "armed: 0x1000+4096 0x200000+4096\ndevice: p0\ngranularity: 4K\n\
         guard: clean_guarded_pages=0, guarded_pages=1, method=protection\nrounded: yes\n"
    );
    assert_eq!(
        run("poison list p0").unwrap(),
        "bytes: 8K\ndevice: p0\ngranularity: 4K\n\
         guard: clean_guarded_pages=0, guarded_pages=1, method=protection\nranges: 0x1000+4096 0x200000+4096\n"
    );
    let json: serde_json::Value = serde_json::from_str(&run("--json poison list p0").unwrap()).unwrap();
    assert_eq!(json["bytes"], 8192);
    let cleared = run("poison clear p0 0x1000+64 0x200000+1").unwrap();
    assert!(
        cleared.contains("note: The media is good")
            && cleared.contains("cleared: 0x1000+4096 0x200000+4096\n")
    );
    let list = dir.path().join("list");
    std::fs::write(&list, "# two lines\n0x3000+64\n\n0x5000 0x7000+1 # and one\n").unwrap();
    let armed = run(&format!("poison add p0 --from {}", list.display())).unwrap();
    assert!(armed.starts_with("armed: 0x3000+4096 0x5000+4096 0x7000+4096\n"), "{armed}");
    let page = run("poison list p0 --from 0x4000 --limit 1").unwrap();
    assert!(page.contains("next: 0x7000\n") && page.contains("ranges: 0x5000+4096\n"), "{page}");
    let every = run("poison add p0 --every 64K --length 128 --within 0x10000+0x20000").unwrap();
    assert!(every.starts_with("armed: 0x10000+4096 0x20000+4096\n"), "{every}");
    let random = run("--json poison add p0 --count 80 --seed 7 --align page").unwrap();
    let random: serde_json::Value = serde_json::from_str(&random).unwrap();
    assert_eq!(
        random["armed"].as_array().unwrap().iter().map(|r| r["length"].as_u64().unwrap()).sum::<u64>(),
        80 * 4096
    );
    let many = run("poison list p0").unwrap();
    assert!(many.contains("and 21 more (--json shows all)"), "{many}");
    run("poison clear p0").unwrap();
    assert!(run("poison clear p0").unwrap().contains("cleared: none\n"));
    assert_eq!(run("notify p0 uncorrectable").unwrap(), "done\n");
    assert_eq!(run("pause").unwrap(), "done\n");
    assert_eq!(run("resume").unwrap(), "done\n");
    assert!(run("remove p0 --surprise").unwrap().contains("state: running\n"));
    assert!(run("remove p0 --surprise --wait 20").unwrap().contains("state: done\n"));
    assert!(run("insert pmem size=1G,id=p1,at=p0").unwrap().contains("device: p1\n"));
    assert!(run("operation 2 --wait").unwrap().contains("kind: remove\n"));
    let events = run("events --since 1").unwrap();
    let first = events.lines().next().unwrap();
    assert!(
        first.starts_with("     2 ")
            && first.ends_with(" poison_added bytes=8192 count=2 device=p0 ranges=0x1000+4096 0x200000+4096"),
        "{events}"
    );
    let line = run("--json events").unwrap();
    assert!(line.lines().next().unwrap().contains("\"event\":\"machine_started\""), "{line}");
    assert_eq!(run("quit").unwrap(), "done\n");
    assert!(machine.has_quit());
}

#[test]
fn failures_have_their_status_and_words() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vm.sock");
    let at = path.display();
    assert_eq!(
        run_ctl(&path, "info"),
        Err((2, format!("No machine answers on {at}: start one with --api-socket {at}")))
    );
    let _server = Server::start(&path, Arc::new(FakeMachine::new(EventBus::new()))).unwrap();
    let cases = [
        ("poison add --pid 7 --va 0x1000", 1, "There is no process 7; name another one"),
        ("memory p9", 1, "There is no device \"p9\"; name one of: p0"),
        ("poison add p0 0x40000000", 1, "The range 0x40000000+1 is not in p0; stay below 0x40000000"),
        (
            "poison add p0 here",
            2,
            "Wrong argument: \"here\" is not a number: write it in decimal or as 0x and hexadecimal digits, such as 0x200040",
        ),
        (
            "remove p0 --eject --wait",
            1,
            "Operation 1 on device p0 failed: The guest does not let go; try --surprise",
        ),
        ("insert pmem size=1G,id=p0", 1, "There is a device \"p0\" already; give another id="),
        (
            "insert pmem size=1G,idd=p0",
            2,
            "Wrong pmem \"idd\": there is no such key; did you mean \"id\"? Known: file, size, id, via, type, channel, node, readonly, range, at, bus, dimms, interleave, family, labels, flags, ars, ars_records, clear_unit, full_line_store, unflushed, lie",
        ),
        (
            "insert pmem size=1G,id=p2 --wait 50ms",
            1,
            "Operation 2 on device p2 still goes on after 50ms: ask with ctl operation 2 --wait",
        ),
        ("operation 99", 1, "There is no operation 99; give one that was begun"),
        (
            "operation 1 --wait soon",
            2,
            "Wrong argument: \"soon\" is not a time: write seconds or a number with ms, s, m or h, such as 90s or 5m",
        ),
    ];
    for (line, status, words) in cases {
        assert_eq!(run_ctl(&path, line), Err((status, words.to_owned())), "{line}");
    }

    let cli = Cli::try_parse_from(["aconite", "ctl", "--json", "-s", path.to_str().unwrap(), "memory", "p9"]);
    let Action::Ctl(args) = cli.unwrap().action else { panic!("ctl was expected") };
    let mut output = Vec::new();
    assert_eq!(ctl(&args, &mut output).unwrap_err().exit_status(), 1);
    let printed: serde_json::Value = serde_json::from_slice(&output).unwrap();
    assert_eq!(printed["error"]["code"], "no_such_device");
}
