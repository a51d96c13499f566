//! Exits of a boot, counted by the kernel's own tracing of KVM (Documentation/trace/histogram.rst).

use crate::plan::Profile;
use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

const ROOT: &str = "/sys/kernel/debug/tracing";
/// An event of tracing's own making: the time from an exit to the monitor to the next entry.
const SYNTHETIC: &str = "aconite_bench_away";

/// Event and trigger, in the order in which they are set.
const TRIGGERS: [(&str, &str); 6] = [
    ("kvm/kvm_userspace_exit", "hist:keys=reason"),
    ("kvm/kvm_pio", "hist:keys=port,rw:size=4096"),
    ("kvm/kvm_mmio", "hist:keys=gpa.hex,type:size=32768"),
    ("kvm/kvm_userspace_exit", "hist:keys=common_pid:left=common_timestamp"),
    (
        "kvm/kvm_entry",
        "hist:keys=common_pid:away=common_timestamp-$left:\
         onmatch(kvm.kvm_userspace_exit).trace(aconite_bench_away,$away)",
    ),
    // The first entry is recorded, and no other.
    ("kvm/kvm_entry", "traceoff:1"),
];
const SYNTHETIC_TRIGGER: (&str, &str) = ("synthetic/aconite_bench_away", "hist:keys=common_pid:vals=away");

/// Tracing, while it is on.
#[derive(Debug)]
pub struct Trace;

impl Trace {
    /// Switches tracing on.
    pub fn start() -> Result<Self> {
        let trace = Trace;
        write("tracing_on", "0")?;
        fs::write(path("trace"), "").context("Cannot empty the trace")?;
        write("trace_clock", "mono")?;
        write("synthetic_events", &format!("{SYNTHETIC} u64 away"))?;
        for (event, trigger) in TRIGGERS.iter().chain([&SYNTHETIC_TRIGGER]) {
            write(&format!("events/{event}/trigger"), trigger)?;
        }
        write("events/kvm/kvm_entry/enable", "1")?;
        write("tracing_on", "1")?;
        Ok(trace)
    }

    /// What was counted since the start for a monitor that was started at `started`.
    pub fn read(self, started: Duration) -> Result<Profile> {
        let histograms = |event: &str| read(&format!("events/{event}/hist"));
        let exits = histograms("kvm/kvm_userspace_exit")?;
        let first = first_time(&read("trace")?).context("No entry into the guest was traced")?;
        Ok(Profile {
            to_first_entry: first.saturating_sub(started).as_nanos() as u64,
            user_exits: counts(&exits, "reason"),
            user_time: values(&histograms("synthetic/aconite_bench_away")?, "away"),
            ports: counts(&histograms("kvm/kvm_pio")?, "port"),
            mmio: counts(&histograms("kvm/kvm_mmio")?, "gpa"),
            ..Profile::default()
        })
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        // What is left behind only slows this level 1 down, which ends soon.
        let _ = write("tracing_on", "0");
        let _ = write("events/kvm/kvm_entry/enable", "0");
        for (event, trigger) in [&SYNTHETIC_TRIGGER].into_iter().chain(TRIGGERS.iter().rev()) {
            let _ = write(&format!("events/{event}/trigger"), &format!("!{trigger}"));
        }
        let _ = write("synthetic_events", &format!("!{SYNTHETIC}"));
    }
}

fn path(name: &str) -> PathBuf {
    PathBuf::from(ROOT).join(name)
}

/// Writes without truncating, which would remove what lines before have set.
fn write(name: &str, text: &str) -> Result<()> {
    let file = fs::OpenOptions::new().append(true).open(path(name));
    file.and_then(|mut file| file.write_all(text.as_bytes()))
        .with_context(|| format!("Cannot write {text:?} to {}", path(name).display()))
}

fn read(name: &str) -> Result<String> {
    fs::read_to_string(path(name)).with_context(|| format!("Cannot read {}", path(name).display()))
}

/// The time of the first event: `... 12.345678: kvm_entry: ...`.
fn first_time(trace: &str) -> Option<Duration> {
    let line = trace.lines().find(|line| line.contains(": kvm_entry: "))?;
    let seconds = line.split(": kvm_entry: ").next()?.split_whitespace().last()?;
    let (whole, micros) = seconds.split_once('.')?;
    Some(Duration::from_secs(whole.parse().ok()?) + Duration::from_micros(micros.parse().ok()?))
}

/// Hits by key, of the histograms whose keys begin with `first`: `{ port: 1016, rw: 1 } hitcount: 7`.
fn counts(text: &str, first: &str) -> BTreeMap<String, u64> {
    let start = format!("{{ {first}:");
    let mut counts = BTreeMap::new();
    for line in text.lines().map(str::trim).filter(|line| line.starts_with(&start)) {
        let Some((key, rest)) = line.trim_start_matches("{ ").split_once('}') else { continue };
        let hits =
            rest.split("hitcount:").nth(1).and_then(|rest| rest.split_whitespace().next()?.parse().ok());
        let key: Vec<&str> =
            key.split(',').filter_map(|part| part.split_once(": ")).map(|(_, v)| v.trim()).collect();
        *counts.entry(key.join(" ")).or_default() += hits.unwrap_or(0);
    }
    counts
}

/// The sum of a value over all keys: `{ ... } hitcount: 7 away: 1234`.
fn values(text: &str, name: &str) -> u64 {
    let name = format!("{name}:");
    text.lines()
        .filter(|line| line.trim_start().starts_with('{'))
        .filter_map(|line| line.split(&name).last()?.split_whitespace().next()?.parse::<u64>().ok())
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn histograms_are_read() {
        let text = "\
# event histogram
{ port:       1016, rw:          1 } hitcount:      20000
{ port:        112, rw:          0 } hitcount:          3
{ reason:          2 } hitcount:          9  away:        100
";
        assert_eq!(
            counts(text, "port"),
            BTreeMap::from([("1016 1".to_owned(), 20_000), ("112 0".to_owned(), 3)])
        );
        assert_eq!(counts(text, "reason"), BTreeMap::from([("2".to_owned(), 9)]));
        assert_eq!(
            values("{ common_pid: 7 } hitcount: 2 away: 40\n{ common_pid: 8 } hitcount: 1 away: 2\n", "away"),
            42
        );
    }

    #[test]
    fn the_first_entry_has_a_time() {
        let text =
            "# tracer: nop\n  vcpu0-321   [000] d....    12.000345: kvm_entry: vcpu 0, rip 0x1000000\n";
        assert_eq!(first_time(text), Some(Duration::from_micros(12_000_345)));
    }
}
