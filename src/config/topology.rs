//! What is behind devices, and with whom they share it: buses, DIMMs, interleave sets.

use std::collections::{BTreeMap, BTreeSet};

use aconite_acpi::RangeType;
use aconite_acpi::layout::MAX_DIMMS;

use super::error::ConfigError;
use super::validate::GRAIN;
use super::{Dimms, Labels, Machine, Pmem, PmemSource, StateFlags, Via};
use crate::units::{MIB, Size};

/// What firmware says a device's range is, and the word for it in options.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RangeKind(pub RangeType);

const KINDS: [(&str, RangeType); 6] = [
    ("pmem", RangeType::Persistent),
    ("volatile", RangeType::Volatile),
    ("vdisk", RangeType::VolatileDisk),
    ("vcd", RangeType::VolatileCd),
    ("pdisk", RangeType::PersistentDisk),
    ("pcd", RangeType::PersistentCd),
];

impl Default for RangeKind {
    fn default() -> Self {
        Self(RangeType::Persistent)
    }
}

impl RangeKind {
    /// The word for it.
    pub fn name(self) -> &'static str {
        KINDS.iter().find(|(_, kind)| *kind == self.0).map_or("", |(name, _)| name)
    }

    /// The kind with this name.
    pub fn from_name(name: &str) -> Option<Self> {
        KINDS.iter().find(|(known, _)| *known == name).map(|(_, kind)| Self(*kind))
    }

    /// All names.
    pub fn names() -> String {
        KINDS.map(|(name, _)| name).join(", ")
    }
}

/// The largest interleave set.
const MAX_WAYS: u32 = 16;
/// Lines of an interleave set: from a line of poison to what any sector fits into.
const LINES: std::ops::RangeInclusive<u64> = 64..=MIB;

impl Machine {
    /// Number of the unit of each device. NFIT units come first, those of free slots included: the devices of a bus are
    /// one. Devices behind ports and host bridges follow, each a unit of its own, with free ports and bridges behind them,
    /// and then those of the E820 map.
    pub fn units(&self) -> Vec<u32> {
        let mut buses = BTreeMap::new();
        let mut next = 0u32;
        let mut cards = self.nfit_units();
        let mut in_e820 = cards.saturating_add(self.ports()).saturating_add(self.host_bridges());
        self.pmem
            .iter()
            .map(|pmem| {
                let counter = match pmem.via {
                    Via::Nfit => &mut next,
                    Via::Virtio => &mut cards,
                    Via::E820 => &mut in_e820,
                };
                let mut new = || {
                    *counter = counter.saturating_add(1);
                    *counter - 1
                };
                match &pmem.bus {
                    Some(bus) => *buses.entry(bus).or_insert_with(new),
                    None => new(),
                }
            })
            .collect()
    }

    /// The number of NFIT units: those of the devices, and the free ones.
    pub fn nfit_units(&self) -> u32 {
        let devices = self.pmem.iter().filter(|pmem| pmem.via == Via::Nfit);
        let buses: BTreeSet<_> = devices.clone().filter_map(|pmem| pmem.bus.as_ref()).collect();
        let alone = devices.filter(|pmem| pmem.bus.is_none()).count();
        self.slots.nfit.saturating_add((buses.len() + alone) as u32)
    }

    /// Refuses what the devices of a bus cannot be together.
    pub(super) fn validate_buses(&self) -> Result<(), ConfigError> {
        for pmem in &self.pmem {
            let Some(bus) = &pmem.bus else { continue };
            if self.pmem.iter().any(|other| other.id == *bus) {
                return Err(ConfigError::invalid(
                    format_args!("--pmem {}: bus", pmem.id),
                    bus,
                    "a device has this id",
                    "give the bus a name of its own",
                ));
            }
        }
        let units = self.units();
        for unit in units.iter().copied().collect::<BTreeSet<_>>() {
            let members: Vec<_> =
                self.pmem.iter().zip(&units).filter(|(_, of)| **of == unit).map(|(pmem, _)| pmem).collect();
            validate_bus(&members)?;
        }
        Ok(())
    }
}

/// Refuses what the devices of one bus cannot be together; the number of their DIMMs.
///
/// # Errors
/// DIMMs that are not the same behind all that name them, or too many of them.
pub fn validate_bus(members: &[&Pmem]) -> Result<u32, ConfigError> {
    let mut first: BTreeMap<&str, &Pmem> = BTreeMap::new();
    let mut count = 0;
    for pmem in members {
        match &pmem.dimms {
            Dimms::Own(own) => count += own,
            Dimms::Named(names) => {
                for name in names {
                    let before = first.entry(name).or_insert_with(|| {
                        count += 1;
                        pmem
                    });
                    let alike = |other: &Pmem| {
                        (pmem.family, pmem.flags, &pmem.labels) == (other.family, other.flags, &other.labels)
                    };
                    if !alike(before) {
                        return Err(ConfigError::invalid(
                            format_args!("--pmem {}: dimms", pmem.id),
                            name,
                            format_args!(
                                "family, labels and flags of this DIMM are not those that it has behind device {}",
                                before.id
                            ),
                            "give both devices the same family=, labels= and flags=",
                        ));
                    }
                }
            }
        }
    }
    match members.last() {
        Some(pmem) if count > MAX_DIMMS => Err(ConfigError::invalid(
            format_args!("--pmem {}: bus", pmem.id),
            pmem.bus.as_deref().unwrap_or_default(),
            format_args!("it would have {count} DIMMs, and a bus has at most {MAX_DIMMS}"),
            "put some of the devices on another bus",
        )),
        _ => Ok(count),
    }
}

/// Refuses an interleave set that there cannot be.
pub(super) fn validate_set(option: &str, pmem: &Pmem) -> Result<(), ConfigError> {
    let count = pmem.dimms.count();
    if pmem.range != RangeKind::default() {
        validate_without_dimm(option, pmem)?;
    }
    if !(1..=MAX_WAYS).contains(&count) {
        return Err(ConfigError::invalid(
            format_args!("{option}: dimms"),
            &pmem.dimms,
            format_args!("a device is on 1 to {MAX_WAYS} DIMMs"),
            "give dimms=4 or another number of them",
        ));
    }
    if let Dimms::Named(names) = &pmem.dimms {
        let good = |name: &String| {
            name.starts_with(|c: char| c.is_ascii_alphabetic())
                && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-')
        };
        let twice = |(at, name): (usize, &String)| names[..at].contains(name);
        if !names.iter().all(good) || names.iter().enumerate().any(twice) {
            return Err(ConfigError::invalid(
                format_args!("{option}: dimms"),
                &pmem.dimms,
                "it is neither a number nor names of different DIMMs, a letter and then letters, digits, - or _",
                "give dimms=2 or dimms=d0+d1",
            ));
        }
    }
    if let Some(line) = pmem.interleave {
        if !line.bytes().is_power_of_two() || !LINES.contains(&line.bytes()) {
            return Err(ConfigError::invalid(
                format_args!("{option}: interleave"),
                line,
                "a line is a power of two from 64 to 1M",
                "give interleave=256 or interleave=4K",
            ));
        }
        if count == 1 {
            return Err(ConfigError::invalid(
                format_args!("{option}: interleave"),
                line,
                "nothing is interleaved on one DIMM",
                "give dimms=2 or more too, or leave it out",
            ));
        }
    }
    if let PmemSource::Memory(size) | PmemSource::File { size: Some(size), .. } = &pmem.source {
        check_shares(option, *size, count)?;
    }
    Ok(())
}

/// Refuses what a range cannot have that is not persistent memory: Linux makes no region of a volatile one whose DIMMs
/// are named, and has no use for those of disks.
fn validate_without_dimm(option: &str, pmem: &Pmem) -> Result<(), ConfigError> {
    let kind = pmem.range.name();
    let refused = |key: &str, value: &dyn std::fmt::Display, problem: &str| {
        Err(ConfigError::invalid(
            format_args!("{option}: {key}"),
            value,
            problem,
            format_args!("leave {key}= or range={kind} out"),
        ))
    };
    if let PmemSource::File { path, .. } = &pmem.source
        && pmem.range.0.is_volatile()
    {
        return refused("file", &path.display(), "what is in a volatile range does not outlive the machine");
    }
    let no_dimm = "firmware names no DIMM behind a range of this kind";
    if pmem.dimms != Dimms::default() {
        return refused("dimms", &pmem.dimms, no_dimm);
    }
    if pmem.labels != Labels::default() {
        return refused("labels", &"", no_dimm);
    }
    if pmem.flags != StateFlags::default() {
        return refused("flags", &pmem.flags, no_dimm);
    }
    if pmem.readonly {
        return refused(
            "readonly",
            &"on",
            "it is a DIMM's flag that makes Linux only read, and there is none",
        );
    }
    Ok(())
}

/// Refuses a size that cannot be shared out evenly.
pub(super) fn check_shares(option: &str, size: Size, dimms: u32) -> Result<(), ConfigError> {
    let unit = GRAIN * u64::from(dimms);
    // One DIMM takes whatever size a device can have.
    if dimms == 1 || size.bytes().is_multiple_of(unit) {
        return Ok(());
    }
    Err(ConfigError::invalid(
        format_args!("{option}: size"),
        size,
        format_args!("it is no multiple of {} for each of its {dimms} DIMMs", Size(GRAIN)),
        format_args!("give {}", Size(size.bytes().div_ceil(unit).saturating_mul(unit))),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::GIB;

    fn machine(pmem: &[&str]) -> Machine {
        let pmem = pmem.iter().map(|text| Pmem::parse("--pmem", text).unwrap()).collect();
        let mut machine = Machine { kernel: "k".into(), pmem, ..Machine::default() };
        machine.complete();
        machine
    }

    fn mistake(pmem: &[&str]) -> String {
        match pmem.iter().try_for_each(|text| Pmem::parse("--pmem p0", text).map(drop)) {
            Err(error) => error.to_string(),
            Ok(()) => machine(pmem).validate().unwrap_err().to_string(),
        }
    }

    #[test]
    fn devices_of_a_bus_are_one_unit() {
        let machine = machine(&["size=1G,bus=b", "size=1G", "size=1G,bus=b,dimms=2", "size=1G,bus=c"]);
        assert_eq!(machine.units(), [0, 1, 0, 2]);
        machine.validate().unwrap();
    }

    #[test]
    fn sets_are_read_and_written() {
        let pmem = Pmem::parse("--pmem", "size=1G,dimms=a+b,interleave=256,bus=x").unwrap();
        assert_eq!(pmem.dimms, Dimms::Named(vec!["a".into(), "b".into()]));
        assert_eq!((pmem.interleave, pmem.bus.as_deref()), (Some(Size(256)), Some("x")));
        let json = serde_json::to_value(&pmem).unwrap();
        assert_eq!((&json["dimms"], &json["bus"]), (&"a+b".into(), &"x".into()));
        assert_eq!(serde_json::from_value::<Pmem>(json).unwrap(), pmem);
        let four = Pmem { dimms: Dimms::Own(4), ..Pmem::memory("p0", Size(GIB)) };
        assert_eq!(serde_json::to_value(&four).unwrap()["dimms"], 4);
    }

    #[test]
    fn mistakes_are_named_with_their_remedy() {
        for (pmem, message) in [
            (
                &["size=1G,dimms=17"][..],
                "Wrong --pmem p0: dimms 17: a device is on 1 to 16 DIMMs; give dimms=4",
            ),
            (&["size=1G,dimms=0"], "dimms 0: a device is on 1 to 16 DIMMs"),
            (&["size=1G,dimms=a+a"], "dimms a+a: it is neither a number nor names of different DIMMs"),
            (&["size=1G,dimms=a+"], "dimms a+: it is neither a number nor names"),
            (
                &["size=1G,dimms=2,interleave=100"],
                "interleave 100: a line is a power of two from 64 to 1M; give interleave=256",
            ),
            (&["size=1G,dimms=2,interleave=2M"], "interleave 2M: a line is a power of two"),
            (&["size=1G,interleave=4K"], "interleave 4K: nothing is interleaved on one DIMM; give dimms=2"),
            (&["size=1G,dimms=3"], "size 1G: it is no multiple of 2M for each of its 3 DIMMs; give 1026M"),
            (
                &["size=1G,bus=p1", "size=1G"],
                "Wrong --pmem p0: bus p1: a device has this id; give the bus a name",
            ),
            (
                &["size=1G,bus=b,dimms=16", "size=1G,bus=b,dimms=16", "size=1G,bus=b"],
                "--pmem p2: bus b: it would have 33 DIMMs, and a bus has at most 32",
            ),
            (
                &["size=1G,bus=b,dimms=d+e", "size=1G,bus=b,dimms=e,family=msft"],
                "--pmem p1: dimms e: family, labels and flags of this DIMM are not those that it has behind device p0",
            ),
        ] {
            let found = mistake(pmem);
            assert!(found.contains(message), "{found}");
        }
    }
}
