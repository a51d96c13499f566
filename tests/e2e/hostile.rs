//! A guest that writes garbage to every port and register it can reach changes nothing for the monitor.

use aconite_tests::Run;
use std::time::Duration;

/// Seconds of garbage.
const SECONDS: u64 = 8;

/// The guest may lose its devices, its agent and its life; the monitor answers all the same and ends when told to.
fn survives(seed: u64) {
    let run = Run::new().size(2, "1G").pmem("size=256M,id=p0").args(["--append", "iomem=relaxed"]);
    let command = ["aconite-agent", "workload", "garbage", &seed.to_string(), &SECONDS.to_string()];
    let machine = run.booted(&command);
    machine.booted();
    let runs = || machine.record().result().is_none();
    std::thread::sleep(Duration::from_secs(SECONDS / 2));
    if runs() {
        assert_eq!(machine.ctl(&["info"])["vcpus"], 2, "in the middle of it");
    }
    // The agent ends the machine, unless its console is lost.
    for _ in 0..2 * SECONDS {
        std::thread::sleep(Duration::from_secs(1));
        if !runs() {
            break;
        }
    }
    if runs() {
        assert!(machine.ctl(&["memory"]).to_string().contains("p0"));
        machine.ctl(&["quit"]);
    }
    let ended = machine.wait(Duration::from_secs(60));
    let cause = ended.result()["cause"].clone();
    let defined = ["quit", "power_off", "reset", "panic", "triple_fault"];
    assert!(defined.iter().any(|known| cause == *known), "{cause}: {}", ended.stderr);
    assert!(!ended.stderr.contains("panicked at"), "{}", ended.stderr);
}

#[test]
fn garbage_on_every_port_and_register() {
    survives(1);
}

#[test]
#[ignore = "wide: ten seeds"]
fn more_garbage() {
    (2..12).for_each(survives);
}
