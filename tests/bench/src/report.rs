//! From measurements to rows: value, target, and whether it is met.

mod disk;
mod nvdimm;

use crate::plan::{
    Boot, Console, Contestant, Control, Cycles, Image, Measured, Memory, Pmem, Profile, Step, Way,
};
use crate::stage::Stage;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt;

/// Ports of the serial line.
const SERIAL: std::ops::RangeInclusive<u64> = 0x3f8..=0x3ff;
/// Kinds of the event kvm_mmio (include/trace/events/kvm.h): a read that the monitor is to serve, and a write.
const MMIO_READ_UNSATISFIED: &str = "0";
const MMIO_WRITE: &str = "2";
/// Addresses that are counted together.
const REGIONS: [(std::ops::Range<u64>, &str); 4] = [
    (0xc000_0000..0xc000_8000, "host bridge"),
    (0xc000_8000..0xc010_0000, "other devices of bus 0"),
    (0xc010_0000..0xd000_0000, "other buses"),
    (0xfec0_0000..0xfef0_0000, "interrupt controllers (KVM)"),
];
/// Lines of the list of where exits come from.
const SOURCES: usize = 6;

/// What was measured with one clock.
#[derive(Debug, Serialize)]
pub struct Run {
    /// Its name.
    pub clock: &'static str,
    /// Steps and what they yielded.
    pub measured: Vec<(Step, Measured)>,
    /// Steps that failed, in words.
    pub failed: Vec<String>,
}

/// One line of the table.
#[derive(Debug, Serialize)]
pub struct Row {
    /// The row of the table of benchmarks.
    row: &'static str,
    /// The clock.
    clock: &'static str,
    /// What exactly.
    what: String,
    value: f64,
    unit: &'static str,
    /// The target; `None` for a figure that is only reported.
    target: Option<f64>,
    met: Option<bool>,
    note: String,
}

/// Everything.
#[derive(Debug, Serialize)]
pub struct Report {
    kernel: String,
    rows: Vec<Row>,
    runs: Vec<Run>,
}

/// How a value meets its target.
#[derive(Clone, Copy)]
enum Target {
    AtMost(f64),
    AtLeast(f64),
    None,
}

impl Report {
    /// Judges `runs`.
    pub fn new(stage: &Stage, runs: Vec<Run>) -> Self {
        let mut rows = Vec::new();
        for run in &runs {
            let mut judge = Judge { run, rows: &mut rows };
            judge.boot();
            judge.exits();
            judge.footprint(stage.stripped);
            judge.pmem();
            judge.poison();
            judge.control();
            judge.hotplug();
            judge.disk();
            judge.nvdimm();
        }
        Report { kernel: stage.release.clone(), rows, runs }
    }
}

struct Judge<'a> {
    run: &'a Run,
    rows: &'a mut Vec<Row>,
}

impl Judge<'_> {
    fn row(
        &mut self,
        row: &'static str,
        what: &str,
        value: f64,
        unit: &'static str,
        target: Target,
        note: String,
    ) {
        let (target, met) = match target {
            Target::AtMost(most) => (Some(most), Some(value <= most)),
            Target::AtLeast(least) => (Some(least), Some(value >= least)),
            Target::None => (None, None),
        };
        self.rows.push(Row {
            row,
            clock: self.run.clock,
            what: what.to_owned(),
            value,
            unit,
            target,
            met,
            note,
        });
    }

    fn boots(&self, who: Contestant, kernel: Image, log: Console) -> Vec<&Boot> {
        let wanted = |step: &Step| {
            matches!(step, Step::Boot { contestant, image, console, .. }
                if *contestant == who && *image == kernel && *console == log)
        };
        let found = self.run.measured.iter().filter(|(step, _)| wanted(step));
        found
            .filter_map(|(_, measured)| if let Measured::Boot(boot) = measured { Some(boot) } else { None })
            .collect()
    }

    fn to_init(&self, who: Contestant, image: Image, console: Console) -> Option<f64> {
        self.boots(who, image, console).iter().map(|boot| boot.to_init as f64).reduce(f64::min)
    }

    fn profile(&self, who: Contestant, log: Console, with_pmem: bool) -> Option<Profile> {
        self.run.measured.iter().find_map(|(step, measured)| match (step, measured) {
            (Step::Profile { contestant, console, pmem }, Measured::Profile(profile))
                if *contestant == who && *console == log && *pmem == with_pmem =>
            {
                Some(profile.clone())
            }
            _ => None,
        })
    }

    fn floor(&self, name: &str) -> Option<f64> {
        self.run.measured.iter().find_map(|(_, measured)| match measured {
            Measured::Floors(floors) => floors.get(name).copied(),
            _ => None,
        })
    }

    fn boot(&mut self) {
        for (what, image, console, target) in [
            ("with log", Image::Vmlinux, Console::Log, Target::AtMost(0.6)),
            ("quiet", Image::Vmlinux, Console::Quiet, Target::AtMost(0.6)),
            ("bzImage, quiet", Image::Bzimage, Console::Quiet, Target::None),
        ] {
            let of = |who| self.to_init(who, image, console);
            let qemu = [of(Contestant::Q35), of(Contestant::Microvm)];
            let Some((own, best)) = of(Contestant::Aconite).zip(qemu.into_iter().flatten().reduce(f64::min))
            else {
                continue;
            };
            let ms = |time: Option<f64>| time.map_or("-".into(), |ns| format!("{:.0}", ns / 1e6));
            let note = format!("{} ms; q35 {}, microvm {}", ms(Some(own)), ms(qemu[0]), ms(qemu[1]));
            self.row("boot", &format!("exec to init, {what}"), own / best, "of QEMU", target, note);
        }
        let Some(profile) = self.profile(Contestant::Aconite, Console::Quiet, false) else { return };
        let instructions = self.run.clock == "instruction";
        let target = if instructions { Target::AtMost(10.0) } else { Target::None };
        let others = [Contestant::Q35, Contestant::Microvm].map(|who| {
            let time = self.profile(who, Console::Quiet, false).map(|profile| profile.to_first_entry);
            format!("{who} {}", time.map_or("-".into(), |ns| format!("{:.1}", ns as f64 / 1e6)))
        });
        let value = profile.to_first_entry as f64 / 1e6;
        self.row("boot", "exec to first KVM_RUN", value, "ms", target, others.join(", "));
        for console in [Console::Quiet, Console::Log] {
            let Some(profile) = self.profile(Contestant::Aconite, console, false) else { continue };
            let exits: u64 = profile.user_exits.values().sum();
            let floor = self.floor("port exit").unwrap_or(0.0);
            let note = format!(
                "{exits} exits, {:.2} us each; a bare port exit is {:.2} us",
                profile.user_time as f64 / 1e3 / exits.max(1) as f64,
                floor / 1e3
            );
            let what = format!("in the monitor for exits, {console:?}").to_lowercase();
            self.row("boot", &what, profile.user_time as f64 / 1e6, "ms", Target::None, note);
        }
    }

    fn exits(&mut self) {
        for (what, with_pmem) in [("quiet", false), ("quiet, a memory device", true)] {
            let Some(profile) = self.profile(Contestant::Aconite, Console::Quiet, with_pmem) else {
                continue;
            };
            let total: u64 = profile.user_exits.values().sum();
            let others = [Contestant::Q35, Contestant::Microvm].map(|who| {
                let profile = self.profile(who, Console::Quiet, false);
                format!(
                    "{who} {}",
                    profile.map_or("-".into(), |p| p.user_exits.values().sum::<u64>().to_string())
                )
            });
            let note = format!("{}; {}", others.join(", "), sources(&profile));
            self.row("boot-exits", what, total as f64, "exits", Target::AtMost(350.0), note);
        }
        let Some(profile) = self.profile(Contestant::Aconite, Console::Log, false) else { return };
        let per_byte = |profile: &Profile| serial(profile) as f64 / profile.console_bytes.max(1) as f64;
        let others = [Contestant::Q35, Contestant::Microvm].map(|who| {
            let profile = self.profile(who, Console::Log, false);
            format!("{who} {}", profile.map_or("-".into(), |p| format!("{:.2}", per_byte(&p))))
        });
        let note = format!("{} bytes; {}", profile.console_bytes, others.join(", "));
        let target = Target::AtMost(1.0);
        self.row("boot-exits", "serial port exits a console byte", per_byte(&profile), "exits", target, note);
    }

    fn footprint(&mut self, stripped: u64) {
        let least = |who| -> Option<Memory> {
            let boots = self.boots(who, Image::Vmlinux, Console::Quiet);
            boots.iter().map(|boot| boot.memory).min_by_key(|memory| memory.own)
        };
        let mib = |kib: u64| kib as f64 / 1024.0;
        let Some(own) = least(Contestant::Aconite) else { return };
        let others = [Contestant::Q35, Contestant::Microvm]
            .map(|who| format!("{who} {}", least(who).map_or("-".into(), |m| format!("{:.1}", mib(m.own)))));
        let note = format!("private dirty {:.1}; {}", mib(own.private_dirty), others.join(", "));
        self.row(
            "footprint",
            "Pss without guest memory, at init",
            mib(own.own),
            "MiB",
            Target::AtMost(2.5),
            note,
        );
        let size = stripped as f64 / f64::from(1 << 20);
        self.row("footprint", "program, stripped", size, "MiB", Target::AtMost(3.0), String::new());
    }

    fn pmem(&mut self) {
        let found: Vec<(Step, Pmem)> = self
            .run
            .measured
            .iter()
            .filter_map(|(step, measured)| match measured {
                Measured::Pmem(pmem) => Some((*step, pmem.clone())),
                _ => None,
            })
            .collect();
        for (step, pmem) in found {
            let Step::Pmem { poisons, layout } = step else { continue };
            let what = if poisons == 0 {
                "0 poisons".into()
            } else {
                format!("{poisons} poisons, {layout:?}").to_lowercase()
            };
            for (order, reading) in [("sequential", pmem.sequential), ("random", pmem.random)] {
                let value = reading.ram as f64 / reading.device as f64;
                let note = format!(
                    "exits {}, for RAM {}; {} maps{}",
                    reading.device_exits,
                    reading.ram_exits,
                    pmem.maps,
                    if poisons == 0 {
                        String::new()
                    } else {
                        format!(
                            "; poisoned {} in {:.1} ms",
                            pmem.poison.as_deref().unwrap_or_default(),
                            pmem.poison_time as f64 / 1e6
                        )
                    }
                );
                self.row(
                    "pmem-armed",
                    &format!("{what}, {order}"),
                    value,
                    "of RAM",
                    Target::AtLeast(0.99),
                    note,
                );
            }
            if poisons == 0 {
                let faults = pmem.cold.faults as f64 * f64::from(1 << 30) / pmem.cold.bytes.max(1) as f64;
                let note = format!("{} in {} MiB", pmem.cold.faults, pmem.cold.bytes >> 20);
                self.row(
                    "pmem-cold",
                    "first touch of 1 GiB",
                    faults,
                    "NPT faults",
                    Target::AtMost(512.0),
                    note,
                );
            }
        }
    }

    fn poison(&mut self) {
        let measured = self.run.measured.clone();
        let us = |ns: f64| ns / 1e3;
        for (step, measured) in measured {
            match (step, measured) {
                (Step::Clean { cpus }, Measured::Clean(clean)) => {
                    let floor = self.floor("efault exit").unwrap_or(f64::NAN);
                    let note = format!(
                        "{:.1} us, a bare EFAULT exit {:.1} us, a load of a page without guard {:.3} us",
                        us(clean.load),
                        us(floor),
                        us(clean.plain)
                    );
                    let (ratio, most) = (clean.load / floor, Target::AtMost(5.0));
                    self.row("clean-access", &format!("load, {cpus} vCPUs"), ratio, "EFAULTs", most, note);
                    let note = format!("{:.1} us", us(clean.copy));
                    let what = format!("rep movsb up to poison, {cpus} vCPUs");
                    self.row("clean-access", &what, clean.copy_exits, "exits", Target::AtMost(20.0), note);
                }
                (Step::Trap, Measured::Trap(trap)) => {
                    let [exit, trip, port] = ["efault exit", "socket pair round trip", "port exit"]
                        .map(|name| self.floor(name).unwrap_or(f64::NAN));
                    let note = format!(
                        "{:.1} us, a bare EFAULT exit {:.1} us; the request that clears {:.1} us, the first good load {:.1} us",
                        us(trap.trap),
                        us(exit),
                        us(trap.clear),
                        us(trap.good)
                    );
                    let what = "load to the handler's first instruction";
                    self.row("poison-trap", what, trap.trap / exit, "EFAULTs", Target::AtMost(2.0), note);
                    let floor = trip + port;
                    let note = format!(
                        "{:.1} us; floor {:.1} us: a round trip between threads {:.1} us and the handler's port exit",
                        us(trap.latency),
                        us(floor),
                        us(trip)
                    );
                    let what = "request to the handler's first instruction";
                    self.row(
                        "fault-latency",
                        what,
                        trap.latency / floor,
                        "of floor",
                        Target::AtMost(2.0),
                        note,
                    );
                }
                (Step::Add { poisons, layout }, Measured::Add(added)) => {
                    let what = format!("{poisons} lines, {layout:?}").to_lowercase();
                    let seconds = added.time as f64 / 1e9;
                    let note = format!("{}; {} maps", added.said, added.maps);
                    self.row("poison-add", &what, seconds, "s", Target::AtMost(2.0), note);
                    let memory = added.memory as f64 / 1024.0;
                    self.row("poison-add", &what, memory, "MiB", Target::AtMost(32.0), String::new());
                }
                _ => {}
            }
        }
    }

    fn hotplug(&mut self) {
        let found: Vec<(Way, Cycles)> = self
            .run
            .measured
            .iter()
            .filter_map(|(step, measured)| match (step, measured) {
                (Step::Cycles { way }, Measured::Cycles(cycles)) => Some((*way, *cycles)),
                _ => None,
            })
            .collect();
        let whole = |cycles: &Cycles| (cycles.unplug + cycles.plug) as f64;
        let ms = |ns: u64| ns as f64 / 1e6;
        for &(way, cycles) in &found {
            let own =
                cycles.own.map_or(String::new(), |own| format!(", {:.1} of both in the monitor", ms(own)));
            let note = format!("unplug {:.0} ms, plug {:.0} ms{own}", ms(cycles.unplug), ms(cycles.plug));
            let (what, rate) = (way.to_string(), 1e9 / whole(&cycles));
            self.row("hotplug", &what, rate, "cycles/s", Target::None, note);
            let peer = found.iter().find(|(other, _)| way.peer() == Some(*other));
            if let Some((_, qemu)) = peer {
                let ratio = whole(&cycles) / whole(qemu);
                self.row("hotplug", &what, ratio, "of QEMU", Target::AtMost(1.0), String::new());
            }
        }
    }

    fn control(&mut self) {
        let of = |who| -> Option<Control> {
            self.run.measured.iter().find_map(|(step, measured)| match (step, measured) {
                (Step::Control { contestant }, Measured::Control(control)) if *contestant == who => {
                    Some(*control)
                }
                _ => None,
            })
        };
        let Some(own) = of(Contestant::Aconite) else { return };
        let ratio = |control: &Control| control.kept as f64 / control.floor as f64;
        let qemu = of(Contestant::Q35).map_or("-".into(), |control| format!("{:.1}", ratio(&control)));
        let once = own.connected.map_or(0.0, |once| once as f64 / own.floor as f64);
        let note = format!(
            "{:.1} us, floor {:.1} us; with a connection for each {once:.1}; QEMU's QMP {qemu}",
            own.kept as f64 / 1e3,
            own.floor as f64 / 1e3
        );
        self.row("control", "round trip", ratio(&own), "of floor", Target::AtMost(1.5), note);
    }
}

fn serial(profile: &Profile) -> u64 {
    let of_serial =
        |key: &str| key.split(' ').next()?.parse::<u64>().ok().filter(|port| SERIAL.contains(port));
    profile.ports.iter().filter(|(key, _)| of_serial(key).is_some()).map(|(_, count)| count).sum()
}

/// The ports and pages that are accessed most.
fn sources(profile: &Profile) -> String {
    let mut sums: BTreeMap<String, u64> = BTreeMap::new();
    for (key, count) in &profile.ports {
        let port = key.split(' ').next().and_then(|port| port.parse::<u64>().ok());
        *sums.entry(port.map_or(key.clone(), |port| format!("port {port:#x}"))).or_default() += count;
    }
    for (key, count) in &profile.mmio {
        let mut words = key.split(' ');
        let address = words.next().and_then(|text| u64::from_str_radix(text, 16).ok());
        // A read that the monitor serves is traced again when it has been.
        if let Some((address, MMIO_READ_UNSATISFIED | MMIO_WRITE)) = address.zip(words.next()) {
            let region = REGIONS.iter().find(|(range, _)| range.contains(&address));
            let name = region
                .map_or_else(|| format!("page {:#x}", address & !0xfff), |(_, name)| (*name).to_owned());
            *sums.entry(name).or_default() += count;
        }
    }
    let mut sums: Vec<(String, u64)> = sums.into_iter().collect();
    sums.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    sums.truncate(SOURCES);
    sums.iter().map(|(source, count)| format!("{source}: {count}")).collect::<Vec<_>>().join(", ")
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "Guest kernel {}", self.kernel)?;
        let mut clock = "";
        for row in &self.rows {
            if row.clock != clock {
                clock = row.clock;
                writeln!(f, "\n{clock} clock")?;
                writeln!(
                    f,
                    "{:<11} {:<44} {:>9} {:<10} {:>7} {:<4}",
                    "row", "what", "value", "", "target", "met"
                )?;
            }
            let met = match row.met {
                Some(true) => "yes",
                Some(false) => "NO",
                None => "",
            };
            let target = row.target.map(|target| target.to_string()).unwrap_or_default();
            writeln!(
                f,
                "{:<11} {:<44} {:>9.2} {:<10} {:>7} {:<4} {}",
                row.row, row.what, row.value, row.unit, target, met, row.note
            )?;
        }
        for run in &self.runs {
            for (_, measured) in &run.measured {
                if let Measured::Floors(floors) = measured {
                    let floors: Vec<String> =
                        floors.iter().map(|(name, ns)| format!("{name} {:.2}", ns / 1e3)).collect();
                    writeln!(f, "\nFloors, {} clock, us: {}", run.clock, floors.join(" · "))?;
                }
            }
            for failed in &run.failed {
                writeln!(f, "Not measured, {} clock: {failed}", run.clock)?;
            }
        }
        Ok(())
    }
}
