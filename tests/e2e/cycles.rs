//! Devices come and go at random under load, again and again, in one guest: the monitor holds as much as before, every id
//! and address is free again, and whatever the guest complains of is of a kind that is known.

use aconite_tests::kernel_log::complaints;
use aconite_tests::machine::PMEM;
use aconite_tests::{Machine, Run};
use serde_json::{Value, json};
use std::time::Duration;

const DEVICES: u64 = 4;
/// Bytes that the monitor's own memory may grow by, whatever the number of cycles: the history of events is bounded.
const GROWTH: u64 = 96 << 20;

/// What a guest may say when devices go under load, by kind.
const KINDS: [(&str, &[&str]); 3] = [
    (
        "requests that failed",
        &["I/O error", "Buffer I/O error", "lost async page write", "access beyond end of device"],
    ),
    ("scrubs that were cut short", &["ARS", "acpi_nfit_ars_rescan", "scrub"]),
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

/// One way of going, which ends with the device departed.
fn go(guest: &mut Machine, device: &str, way: u64) {
    let patience = "120s";
    let surprise = ["remove", device, "--surprise", "--timeout", patience, "--wait", patience];
    let operation = match way {
        0 => guest.ctl(&surprise),
        1 => {
            let gpa = guest.device(device)["gpa"].clone();
            // The container of the device is the one whose root device has its range.
            guest.ok("for c in /sys/devices/system/container/*/online; do echo 0 > $c; done");
            let operation =
                guest.ctl(&["remove", device, "--eject", "--timeout", patience, "--wait", patience]);
            guest.ok(
                "for c in /sys/devices/system/container/*/online; do echo 1 > $c 2>/dev/null; done; true",
            );
            assert_eq!(guest.device(device)["gpa"], gpa);
            operation
        }
        _ => guest.ctl(&[&surprise[..], &["--via", "agent"]].concat()),
    };
    assert_eq!(operation["state"], "done", "{operation}");
}

fn cycles(kernel: &str, count: u64, seed: u64) {
    let mut run = Run::kernel(kernel).size(2, "1G").tools(&["dd"]);
    for device in 0..DEVICES {
        run = run.pmem(&format!("size=64M,id=p{device}"));
    }
    let mut guest = run.shell();
    let all = format!("test $(ls /dev/pmem* | wc -l) = {DEVICES}");
    guest.until_ok(&all, PMEM);
    guest.type_in(
        b"(while :; do for d in /dev/pmem*; do \
          /usr/bin/dd if=$d of=/dev/null bs=64k count=4 iflag=direct && \
          /usr/bin/dd if=/dev/zero of=$d bs=64k count=4 oflag=direct conv=notrunc,nocreat && echo $d >> /tmp/done; \
          done; sleep 0.05; done) >/dev/null 2>&1 &\n",
    );
    let places: Vec<Value> = (0..DEVICES).map(|n| guest.device(&format!("p{n}"))["gpa"].clone()).collect();
    let mut state = seed;
    let mut base = Value::Null;
    for cycle in 0..count {
        let number = next(&mut state) % DEVICES;
        let device = format!("p{number}");
        go(&mut guest, &device, next(&mut state) % 3);
        assert_eq!(guest.device(&device)["state"], "departed", "cycle {cycle} of seed {seed}");
        let operation = guest.ctl(&["insert", "pmem", &format!("size=64M,id={device}"), "--wait", "120s"]);
        assert_eq!(operation["state"], "done", "{operation}");
        assert_eq!(guest.device(&device)["gpa"], places[number as usize]);
        guest.until_ok(&all, Duration::from_secs(60));
        // The first rounds fill buffers that stay.
        if cycle == count / 4 {
            base = held(&guest);
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
    assert_eq!(guest.ctl(&["info"])["free_slots"], json!(0));
    let transfers: u64 = guest.ok("wc -l < /tmp/done").trim().parse().unwrap();
    assert!(transfers >= 2 * count, "there was load: {transfers} transfers");
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

#[test]
fn devices_come_and_go_under_load() {
    cycles("6.12", 12, 1);
}

#[test]
#[ignore = "wide"]
fn devices_come_and_go_a_thousand_times() {
    cycles("6.12", 1000, 2);
}

#[test]
#[ignore = "wide"]
fn devices_come_and_go_under_load_on_6_1() {
    cycles("6.1", 50, 3);
}
