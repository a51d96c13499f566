//! Devices come and go at random under load, again and again, in one guest: the monitor holds as much as before, every id
//! and address is free again, and whatever the guest complains of is of a kind that is known.

use aconite_tests::kernel_log::complaints;
use aconite_tests::machine::PMEM;
use aconite_tests::{Machine, Run};
use serde_json::{Value, json};
use std::time::Duration;

use crate::bridges;

/// Devices in a guest.
const DEVICES: u64 = 4;
/// Bytes that the monitor's own memory may grow by, whatever the number of cycles: the history of events is bounded.
const GROWTH: u64 = 96 << 20;
/// Says how many cycles the long runs have.
const CYCLES: &str = "ACONITE_CYCLES";

/// What a guest may say when devices go under load, by kind.
const KINDS: [(&str, &[&str]); 4] = [
    (
        "requests that failed",
        &["I/O error", "Buffer I/O error", "lost async page write", "access beyond end of device"],
    ),
    ("scrubs that were cut short", &["ARS", "acpi_nfit_ars_rescan", "scrub"]),
    (
        "slots at work",
        &["pciehp", "virtio_pci", "PCI bridge", "bridge window", "BAR ", "can't assign", "failed to assign"],
    ),
    ("namespaces without labels", &["nd_pmem", "unable to guarantee persistence", "nd namespace"]),
];

fn kind(line: &str) -> Option<&'static str> {
    KINDS.iter().find(|(_, texts)| texts.iter().any(|text| line.contains(text))).map(|(kind, _)| *kind)
}

/// The next of a fixed row of numbers.
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
    *state >> 33
}

fn held(guest: &Machine) -> Value {
    guest.ctl(&["info"])["monitor"].clone()
}

/// A kind of machine: what its four devices are, and what one of them does in a cycle.
struct Setting {
    /// Arguments of the machine.
    boot: fn(Run) -> Run,
    /// The block devices, as a shell has them.
    blocks: &'static str,
    /// Takes a device away in one of three ways; it is gone then.
    go: fn(&mut Machine, u64, u64),
    /// Puts it back into its place.
    come: fn(&mut Machine, u64),
}

/// How long a guest may take.
const PATIENCE: &str = "120s";

fn done(operation: &Value) {
    assert_eq!(operation["state"], "done", "{operation}");
}

/// Four NVDIMMs, which go by surprise, asked over their container, or by the agent.
const NVDIMMS: Setting = Setting {
    boot: |run| (0..DEVICES).fold(run, |run, device| run.pmem(&format!("size=64M,id=p{device}"))),
    blocks: "/dev/pmem*",
    go: |guest, number, way| {
        let device = &format!("p{number}");
        let surprise = ["remove", device, "--surprise", "--timeout", PATIENCE, "--wait", PATIENCE];
        match way {
            0 => done(&guest.ctl(&surprise)),
            1 => {
                let gpa = guest.device(device)["gpa"].clone();
                // The container of the device is the one whose root device has its range.
                guest.ok("for c in /sys/devices/system/container/*/online; do echo 0 > $c; done");
                done(&guest.ctl(&["remove", device, "--eject", "--timeout", PATIENCE, "--wait", PATIENCE]));
                guest.ok(
                    "for c in /sys/devices/system/container/*/online; do echo 1 > $c 2>/dev/null; done; true",
                );
                assert_eq!(guest.device(device)["gpa"], gpa);
            }
            _ => done(&guest.ctl(&[&surprise[..], &["--via", "agent"]].concat())),
        }
        assert_eq!(guest.device(device)["state"], "departed");
    },
    come: |guest, number| {
        let gpa = guest.device(&format!("p{number}"))["gpa"].clone();
        let device = format!("size=64M,id=p{number}");
        done(&guest.ctl(&["insert", "pmem", &device, "--wait", PATIENCE]));
        assert_eq!(guest.device(&format!("p{number}"))["gpa"], gpa);
    },
};

/// Two virtio-pmem devices and two disks behind ports. They are asked for by the button, or go by the administrator's
/// switch; by surprise they do not go, since no kernel gets over that (`virtio_pmem::a_card_that_is_pulled…`).
const CARDS: Setting = Setting {
    boot: |run| {
        let run = run.pmem("size=64M,id=p0,via=virtio").pmem("size=64M,id=p1,via=virtio");
        run.args(["--disk", "size=64M,id=d2", "--disk", "size=64M,id=d3"])
    },
    blocks: "/dev/pmem* /dev/vd?",
    go: |guest, number, way| {
        let device = &card(number);
        if way == 0 {
            done(&guest.ctl(&["remove", device, "--eject", "--timeout", PATIENCE, "--wait", PATIENCE]));
        } else {
            let before = guest.last_event();
            // It keeps the slot that it had at the start: all others are taken.
            guest.ok(&format!("echo 0 > /sys/bus/pci/slots/{}/power", number + 1));
            let gone = guest.event(before, "removal", |event| event["step"] == "departed");
            assert_eq!(gone["device"], **device);
        }
    },
    come: |guest, number| {
        let device = format!("size=64M,id={}", card(number));
        let inserted = match number {
            0 | 1 => guest.ctl(&["insert", "pmem", &format!("{device},via=virtio"), "--wait", PATIENCE]),
            _ => guest.ctl(&["insert", "disk", &device, "--wait", PATIENCE]),
        };
        done(&inserted);
    },
};

fn card(number: u64) -> String {
    format!("{}{number}", if number < 2 { 'p' } else { 'd' })
}

/// Four virtio-pmem devices behind host bridges. They are asked for, or go by the administrator's switch, or by surprise
/// once nobody uses them: no kernel gets over more (`bridges::a_bridge_that_vanishes…`).
const BRIDGES: Setting = Setting {
    boot: |run| {
        let pmem = |device| format!("size=64M,id=p{device},via=virtio,channel=bridge");
        (0..DEVICES).fold(run, |run, device| run.pmem(&pmem(device)))
    },
    blocks: "/dev/pmem*",
    go: |guest, number, way| {
        let device = &format!("p{number}");
        let patience = ["--timeout", PATIENCE, "--wait", PATIENCE];
        match way {
            0 => done(&guest.ctl(&[&["remove", device, "--eject"], &patience[..]].concat())),
            1 => {
                // Each keeps the bridge that it had at the start: all others are taken.
                let function = 0xff - number;
                guest.ok(&format!("echo 0000:{function:x}:00.0 > /sys/bus/pci/drivers/virtio-pci/unbind"));
                done(&guest.ctl(&[&["remove", device, "--surprise"], &patience[..]].concat()));
            }
            _ => {
                let before = guest.last_event();
                guest.ok(&bridges::eject(number));
                let gone = guest.event(before, "removal", |event| event["step"] == "departed");
                assert_eq!(gone["device"], **device);
            }
        }
        assert_eq!(guest.device(device)["state"], "departed");
    },
    come: |guest, number| {
        let device = format!("size=64M,id=p{number},via=virtio,channel=bridge");
        done(&guest.ctl(&["insert", "pmem", &device, "--wait", PATIENCE]));
    },
};

fn cycles(setting: &Setting, kernel: &str, count: u64, seed: u64) {
    let run = (setting.boot)(Run::kernel(kernel).size(2, "1G").tools(&["dd"]));
    let mut guest = run.shell();
    let blocks = setting.blocks;
    let all = format!("test $(ls {blocks} | wc -l) = {DEVICES}");
    guest.until_ok(&all, PMEM);
    let load = format!(
        "(while :; do for d in {blocks}; do \
          /usr/bin/dd if=$d of=/dev/null bs=64k count=4 iflag=direct && \
          /usr/bin/dd if=/dev/zero of=$d bs=64k count=4 oflag=direct conv=notrunc,nocreat && echo $d >> /tmp/done; \
          done; sleep 0.05; done) >/dev/null 2>&1 &\n"
    );
    guest.type_in(load.as_bytes());
    let mut state = seed;
    let mut base = Value::Null;
    for cycle in 0..count {
        let (number, way) = (next(&mut state) % DEVICES, next(&mut state) % 3);
        (setting.go)(&mut guest, number, way);
        (setting.come)(&mut guest, number);
        guest.until_ok(&all, Duration::from_secs(60));
        // The first rounds fill buffers that stay.
        if cycle == count / 4 {
            base = held(&guest);
        }
        if (cycle + 1).is_multiple_of(50) {
            eprintln!("{} cycles of seed {seed}", cycle + 1);
        }
    }
    let now = held(&guest);
    for what in ["open_files", "maps", "threads"] {
        let (first, last) = (base[what].as_u64().unwrap(), now[what].as_u64().unwrap());
        // Threads of requests come and go.
        assert!(last <= first + 4, "{what} grew from {first} to {last} in {count} cycles");
    }
    let grown = now["anonymous"].as_u64().unwrap().saturating_sub(base["anonymous"].as_u64().unwrap());
    assert!(grown <= GROWTH, "memory grew by {grown} bytes in {count} cycles");
    let info = guest.ctl(&["info"]);
    for free in ["free_slots", "free_ports", "free_bridges"] {
        assert_eq!(info[free], json!(0), "{free}");
    }
    let transfers: u64 = guest.ok("wc -l < /tmp/done").trim().parse().unwrap();
    assert!(transfers >= 2 * count, "there was load: {transfers} transfers");
    for census in guest.events_named(0, "census") {
        assert_eq!(census["user"]["entries"], 0, "no process has mapped anything: {census}");
    }
    let release = guest.ok("uname -r");
    let said = complaints(&release, &guest.ok("dmesg -r"));
    let unknown: Vec<&String> = said.iter().filter(|line| kind(line).is_none()).collect();
    assert!(unknown.is_empty(), "of no known kind: {unknown:#?}");
    eprintln!(
        "{count} cycles on {release}, seed {seed}: {} lines of known kinds; {base} to {now}",
        said.len()
    );
    guest.ctl(&["quit"]);
    guest.wait(Duration::from_secs(60));
}

/// The number of cycles of a long run.
fn many() -> u64 {
    std::env::var(CYCLES).map_or(1000, |count| count.parse().expect("a number of cycles"))
}

#[test]
fn under_load() {
    cycles(&NVDIMMS, "6.12", 12, 1);
}

#[test]
#[ignore = "wide"]
fn under_load_on_6_1() {
    cycles(&NVDIMMS, "6.1", 50, 3);
}

#[test]
#[ignore = "wide"]
fn over_ports() {
    cycles(&CARDS, "6.12", 12, 4);
}

#[test]
#[ignore = "wide"]
fn over_ports_on_6_1() {
    cycles(&CARDS, "6.1", 24, 5);
}

#[test]
#[ignore = "wide"]
fn over_ports_on_7() {
    cycles(&CARDS, "7.x", 24, 6);
}

#[test]
fn over_bridges_on_7() {
    cycles(&BRIDGES, "7.x", 12, 8);
}

#[test]
#[ignore = "wide"]
fn over_bridges() {
    cycles(&BRIDGES, "6.12", 50, 9);
}

#[test]
#[ignore = "wide"]
fn over_bridges_on_6_1() {
    cycles(&BRIDGES, "6.1", 50, 10);
}

#[test]
#[ignore = "long"]
fn a_thousand_over_bridges_on_7() {
    cycles(&BRIDGES, "7.x", many(), 11);
}

#[test]
#[ignore = "long"]
fn a_thousand() {
    cycles(&NVDIMMS, "6.12", many(), 2);
}

#[test]
#[ignore = "long"]
fn a_thousand_over_ports() {
    cycles(&CARDS, "6.12", many(), 7);
}
