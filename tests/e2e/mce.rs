//! Machine checks on request: each class on each kind of processor, what the guest makes of it, and what is refused.
//!
//! Poison that is consumed is in the suite `outcomes`.

use aconite_tests::{Machine, Run};
use serde_json::Value;
use std::time::Duration;

/// How long a guest that polls its banks every second may take to find an error.
const POLLED: Duration = Duration::from_secs(30);
/// A status that says nothing but that there is one, corrected error: its machine check harms nobody.
const HARMLESS: &str = "0x8400000000000000";
/// The exit status of a process that SIGBUS has ended.
const SIGBUS: &str = "135";

/// A guest that looks for logged errors every second, kills early, and holds its kernel messages back for us.
fn guest(cpu: &str, vcpus: u32) -> Machine {
    let mut guest = Run::new().size(vcpus, "512M").args(["--cpu", cpu]).shell();
    guest.ok("echo 1 > /sys/devices/system/machinecheck/machinecheck0/check_interval");
    guest.ok("echo 1 > /proc/sys/vm/memory_failure_early_kill; dmesg -c > /dev/null");
    guest
}

/// Starts a process in the guest on one vCPU; its exit status goes to `/tmp/NAME.status`. Returns the guest-physical
/// address of a page of its stack.
fn victim(guest: &mut Machine, name: &str, vcpu: u32, body: &str) -> String {
    guest.ok(&format!("printf 'echo $$ > /tmp/{name}.pid\\n{body}\\n' > /tmp/{name}"));
    guest.type_in(
        format!(
            "(taskset {:x} sh /tmp/{name}; echo $? > /tmp/{name}.status) < /dev/null > /dev/null 2>&1 &\n",
            1 << vcpu
        )
        .as_bytes(),
    );
    guest.until_ok(&format!("test -s /tmp/{name}.pid"), POLLED);
    let place = guest.until_ok(
        &format!(
            "p=$(cat /tmp/{name}.pid); a=$(grep stack /proc/$p/maps); a=${{a#*-}}; a=0x${{a%% *}}; \
             aconite-agent pagemap $p $((a - 4096)) 1"
        ),
        POLLED,
    );
    place.split_whitespace().nth(1).expect("an address").to_owned()
}

/// Machine checks that each vCPU has taken, as Linux counts them.
fn taken(guest: &mut Machine) -> Vec<u64> {
    let line = guest.ok("grep MCE: /proc/interrupts");
    line.split_whitespace()
        .map_while(|word| word.strip_suffix(':').map_or(word, |_| "0").parse().ok())
        .skip(1)
        .collect()
}

fn mce(guest: &Machine, vcpu: u32, class: &str, address: &str) -> u64 {
    let before = guest.last_event();
    guest.ctl(&["mce", "--vcpu", &vcpu.to_string(), "--class", class, "--address", address]);
    before
}

fn registers(guest: &Machine, vcpu: u32, mcg_status: &str) -> u64 {
    let before = guest.last_event();
    let vcpu = vcpu.to_string();
    guest.ctl(&["mce", "--vcpu", &vcpu, "--bank", "1", "--status", HARMLESS, "--mcg-status", mcg_status]);
    before
}

/// What differs between kinds of processors.
struct Kind {
    cpu: &'static str,
    vcpus: u32,
    /// The event of an error that nobody has consumed.
    optional: &'static str,
    /// MCG_STATUS of a machine check that goes to one vCPU alone; none where there is no such thing.
    alone: Option<&'static str>,
    /// What the kernel panics with when the context is corrupt.
    fatal: &'static str,
}

/// One guest takes every class.
fn every_class(kind: &Kind) {
    let mut guest = guest(kind.cpu, kind.vcpus);
    let last = kind.vcpus - 1;
    assert_eq!(taken(&mut guest), vec![0; kind.vcpus as usize]);

    let before = mce(&guest, last, "corrected", "0x2345678");
    guest.event(before, "mce_logged", |event| event["vcpu"] == last && event["origin"] == "request");
    guest.until_ok("dmesg | grep 'Machine check events logged'", POLLED);

    // Nobody has consumed it: the process is told early, and its page is taken away.
    let page = victim(&mut guest, "early", 0, "exec sleep 1000");
    let before = mce(&guest, 0, "srao", &page);
    guest.event(before, kind.optional, |event| event["address"] == page.as_str());
    assert_eq!(guest.until_ok("grep . /tmp/early.status", POLLED), SIGBUS);
    guest.until_ok("dmesg | grep 'Sending SIGBUS to sleep:.*hardware memory corruption'", POLLED);

    // A vCPU that waits in HLT takes a machine check at once.
    if let Some(mcg_status) = kind.alone {
        let counts = taken(&mut guest);
        for _ in 0..3 {
            let before = registers(&guest, last, mcg_status);
            guest.event(before, "mce_delivered", |event| event["vcpu"] == last);
            guest.ok("sleep 0.2");
        }
        let mut expected = counts;
        expected[last as usize] += 3;
        assert_eq!(taken(&mut guest), expected);
    }

    // A process that runs is ended by what it is said to have consumed; with a broadcast every vCPU takes part.
    let page = victim(&mut guest, "busy", last, "while :; do :; done");
    let counts = taken(&mut guest);
    let before = guest.last_event();
    let vcpu = last.to_string();
    guest.ctl(&["mce", "--vcpu", &vcpu, "--class", "srar", "--address", &page, "--mode", "user"]);
    guest.event(before, "mce_delivered", |event| event["vcpu"] == last && event["origin"] == "request");
    assert_eq!(guest.until_ok("grep . /tmp/busy.status", POLLED), SIGBUS);
    let expected: Vec<u64> = (0..)
        .zip(&counts)
        .map(|(cpu, count)| count + u64::from(cpu == last || kind.alone.is_none()))
        .collect();
    assert_eq!(taken(&mut guest), expected);
    let told = guest
        .events_named(before, "mce_delivered")
        .iter()
        .filter(|event| event["origin"] == "broadcast")
        .count();
    assert_eq!(told as u32, if kind.alone.is_some() { 0 } else { last });
    assert!(guest.events_named(0, "mce_shutdown").is_empty());

    mce(&guest, 0, "fatal", "0x2345678");
    let ended = guest.wait(Duration::from_secs(60));
    ended.assert_ended(255, "panic");
    let console = ended.record.console();
    assert!(console.contains(kind.fatal), "{:?} is missing in: {console}", kind.fatal);
}

#[test]
fn every_class_on_smca() {
    every_class(&Kind {
        cpu: "mca=smca",
        vcpus: 2,
        optional: "mce_logged",
        alone: Some("0x3"),
        fatal: "Kernel panic - not syncing: Fatal local machine check",
    });
}

#[test]
#[ignore = "wide"]
fn every_class_on_legacy() {
    every_class(&Kind {
        cpu: "mca=legacy",
        vcpus: 1,
        optional: "mce_logged",
        alone: Some("0x3"),
        fatal: "Kernel panic - not syncing: Fatal local machine check",
    });
}

#[test]
#[ignore = "wide"]
fn every_class_on_intel() {
    every_class(&Kind {
        cpu: "mca=intel",
        vcpus: 4,
        optional: "mce_delivered",
        alone: Some("0xb"),
        fatal: "Kernel panic - not syncing: Fatal local machine check",
    });
}

#[test]
fn every_class_by_broadcast() {
    every_class(&Kind {
        cpu: "vendor=intel,lmce=off",
        vcpus: 4,
        optional: "mce_delivered",
        alone: None,
        fatal: "Kernel panic - not syncing: Fatal machine check",
    });
}

/// What makes no sense is refused by name; a machine check while one is being handled shuts the processor down.
#[test]
fn refusals_and_shutdown() {
    let mut guest = guest("vendor=amd", 1);
    let refused = |arguments: &[&str]| -> String {
        let mut line = vec!["mce"];
        line.extend(arguments);
        let error: Value = guest.ctl_refused(&line);
        format!(
            "{}: {}; {}",
            error["code"].as_str().unwrap(),
            error["message"].as_str().unwrap(),
            error["remedy"].as_str().unwrap()
        )
    };
    for (line, words) in [
        (
            "--vcpu 1 --class srar --address 0",
            "no_such_vcpu: There is no vCPU 1; the machine has 1, numbered from 0",
        ),
        (
            "--class srar --address 0x10000000000000",
            "bad_parameter: The address 0x10000000000000 is none of the guest's",
        ),
        ("--class srar --address 0 --granularity 7", "bad_parameter: The granularity 7 is none; give 6"),
        ("--class srar --address 0 --broadcast", "bad_parameter: A broadcast is asked for"),
        (
            "--bank 2 --status 0x8000000000000000",
            "bad_parameter: There is no machine-check bank 2; the guest has 2",
        ),
        ("--bank 1 --status 1", "bad_parameter: MCi_STATUS 0x1 says that the bank holds no error"),
        ("--bank 1 --status 0x8000000000000000 --mcg-status 8", "bad_parameter: MCG_STATUS 0x8 has bits"),
    ] {
        let arguments: Vec<&str> = line.split_whitespace().collect();
        let text = refused(&arguments);
        assert!(text.starts_with(words), "{line}: {text}");
    }
    assert_eq!(taken(&mut guest), [0], "nothing was raised");

    // Both wait for the vCPU while it stands still.
    guest.ctl(&["pause"]);
    registers(&guest, 0, "0x3");
    let before = registers(&guest, 0, "0x3");
    assert!(guest.events_named(before, "mce_delivered").is_empty());
    guest.ctl(&["resume"]);
    let ended = guest.wait(Duration::from_secs(60));
    assert!(ended.stderr.contains("A machine check came while MCG_STATUS.MCIP was set"), "{}", ended.stderr);
    let shutdown =
        ended.record.events().into_iter().find(|event| event["event"] == "mce_shutdown").expect("the event");
    assert_eq!(shutdown["vcpu"], 0);
    assert_eq!(ended.code(), Some(255));
    assert_eq!(ended.result()["cause"], "shutdown");
}
