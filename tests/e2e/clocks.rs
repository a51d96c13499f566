//! Clocks with the hypervisor bit hidden: without kvmclock a guest lives by its TSC.

use aconite_tests::{Machine, Run, kernel_log};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How long clocks are compared.
const SPAN: Duration = Duration::from_secs(15);
/// By how much a guest's clock may be wrong, of the time that passed.
const TOLERANCE: f64 = 0.01;

/// Seconds since the guest's boot, and the moments of the host between which it said so.
fn uptime(guest: &mut Machine) -> (f64, Instant, Instant) {
    let before = Instant::now();
    let text = guest.ok("cat /proc/uptime");
    (text.split(' ').next().unwrap().parse().unwrap(), before, Instant::now())
}

/// The guest's clock runs as fast as the host's.
fn runs_right(guest: &mut Machine) {
    let (first, a, b) = uptime(guest);
    thread::sleep(SPAN);
    let (second, c, d) = uptime(guest);
    let (least, most) =
        ((c - b).as_secs_f64() * (1.0 - TOLERANCE), (d - a).as_secs_f64() * (1.0 + TOLERANCE));
    let passed = second - first;
    assert!(
        passed > least && passed < most,
        "{passed:.2} s passed in the guest, {least:.2} to {most:.2} s here"
    );
    let inside: u64 = guest.ok("date +%s").parse().unwrap();
    let outside = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    assert!(inside.abs_diff(outside) <= 3, "it is {outside}, and in the guest {inside}");
}

fn hidden(kernel: &str, cpus: u32, pm_timer: &str) {
    let clocks = format!("hypervisor=off,pm_timer={pm_timer}");
    let mut guest = Run::kernel(kernel).size(cpus, "1G").args(["--cpu", &clocks]).shell();
    assert_eq!(guest.ok("grep -c '^flags.* hypervisor' /proc/cpuinfo; true"), "0");
    assert_eq!(guest.ok("nproc"), cpus.to_string());
    runs_right(&mut guest);
    let log = guest.ok("dmesg -r");
    let megahertz = kernel_log::number(&log, "tsc: Detected ").expect("the frequency of the TSC");
    let refined = kernel_log::number(&log, "tsc: Refined TSC clocksource calibration: ");
    if let Some(refined) = refined {
        assert!((refined - megahertz).abs() < megahertz * TOLERANCE, "{megahertz} MHz, refined to {refined}");
    }
    let source = guest.ok("cat /sys/devices/system/clocksource/clocksource0/current_clocksource");
    println!(
        "{kernel} {cpus} vCPUs pm_timer={pm_timer}: {megahertz} MHz, refined {refined:?}, clock source {source}"
    );
    assert!(source.starts_with("tsc"), "the clock source is {source}");
    let complaints = kernel_log::complaints(&guest.ok("uname -r"), &log);
    assert!(complaints.is_empty(), "{kernel} complains:\n{}", complaints.join("\n"));
    guest.finish("exit 0").assert_ended(0, "power_off");
}

#[test]
fn kvmclock_is_the_default() {
    let mut guest = Run::new().size(2, "512M").shell();
    let source = guest.ok("cat /sys/devices/system/clocksource/clocksource0/current_clocksource");
    assert_eq!(source, "kvm-clock");
    runs_right(&mut guest);

    // A pause is over when it is said to be, and draws no complaint.
    guest.ctl(&["pause"]);
    thread::sleep(SPAN);
    assert_eq!(guest.ctl(&["info"])["state"], "paused");
    guest.ctl(&["resume"]);
    assert_eq!(guest.ok("echo still here"), "still here");
    let complaints = kernel_log::complaints(&guest.ok("uname -r"), &guest.ok("dmesg -r"));
    assert!(complaints.is_empty(), "complaints after a pause:\n{}", complaints.join("\n"));
    guest.finish("exit 0").assert_ended(0, "power_off");
}

#[test]
fn hidden_on_6_12() {
    hidden("6.12", 4, "on");
}

#[test]
fn hidden_on_6_1() {
    hidden("6.1", 4, "off");
}

#[test]
#[ignore = "wide: every kernel with 1 and 4 processors, with and without the PM timer"]
fn hidden_everywhere() {
    for kernel in ["6.1", "6.12", "7.x"] {
        for cpus in [1, 4] {
            for pm_timer in ["on", "off"] {
                hidden(kernel, cpus, pm_timer);
            }
        }
    }
}
