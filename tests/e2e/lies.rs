//! NFITs that contradict the specification, each other or the machine (`--preset nfit_lies`): each is told by a bus of its
//! own, beside an honest one, which must not suffer.
//!
//! Expected, by reading `drivers/acpi/nfit/core.c` before the first run: what the kernel makes of each bus. Two were
//! expected to end otherwise: `hint-count` to be refused, `beyond-addresses` to leave a region without a block device.
//!
//! Findings: `add_table` checks no sub-table's length against the end of the buffer (`cut-short`), and `add_flush` copies
//! as many hints as a sub-table claims, whatever its length (`hint-count`): both read what lies behind the buffer of
//! `_FIT`. With 65535 hints, 512 KiB, 6.12 panicked in `memcpy_orig` under `acpi_nfit_init` in about one boot of ten: the
//! buffer was at the end of RAM. A bus that is refused leaves its freed description on a list
//! ([`a_refused_bus_corrupts_a_list_on_6_1`]).

use aconite_tests::Run;
use aconite_tests::machine::PMEM;
use std::collections::BTreeMap;

/// What a guest's kernel makes of a bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bus {
    /// The driver refuses it.
    Refused,
    /// It is there with this many DIMMs, regions and block devices.
    Has(usize, usize, usize),
    /// Refused, or there with a region and no block device: whether "Persistent Memory" can be put into what
    /// `/proc/iomem` has of RAM depends on where KASLR has put the kernel.
    NoDisk,
}

use Bus::{Has, NoDisk, Refused};

impl Bus {
    fn allows(self, found: Self) -> bool {
        self == found || self == NoDisk && [Refused, Has(1, 1, 0)].contains(&found)
    }
}

/// In the order of the preset: unit 0 is honest.
const EXPECTED: [(&str, Bus); 20] = [
    ("honest", Has(1, 1, 1)),
    // ACPICA warns, and what `_FIT` says counts.
    ("checksum", Has(1, 1, 1)),
    // `add_table`: a wrong length in a type that it knows ends the parse with ENOMEM.
    ("range-length", Refused),
    ("map-length", Refused),
    ("control-length", Refused),
    // The region's driver fails at the first address that is none ("failed to request 0x0000000000000000 + 4096").
    ("hint-count", Has(1, 1, 0)),
    // `add_table` stops there without an error.
    ("zero-length", Has(0, 0, 0)),
    // Skipped.
    ("unknown-type", Has(1, 1, 1)),
    // `add_table` looks at no sub-table's length against the end: it reads what lies behind the buffer.
    ("cut-short", Has(1, 1, 1)),
    // `__nfit_mem_init`: "SPA missing DCR", ENODEV.
    ("no-control", Refused),
    // A range without a DIMM is a region all the same.
    ("no-map", Has(0, 1, 1)),
    // `nfit_mem_init` goes by ranges: a DIMM behind none that exists is nobody's.
    ("no-range", Has(0, 0, 0)),
    // Both are regions; the second driver finds the addresses taken.
    ("overlap", Has(1, 2, 1)),
    ("same-index", Has(1, 2, 1)),
    // "detected invalid spa index", and no DIMM goes with it.
    ("index-zero", Has(0, 0, 0)),
    // Ignored with its DIMM.
    ("unknown-guid", Has(0, 0, 0)),
    // "no ACPI.NFIT device with _ADR": without its DIMM the region fails, and with it the probe.
    ("unknown-handle", Refused),
    // `nd_region_create`: "mapping is not aligned".
    ("unaligned", Refused),
    ("over-ram", NoDisk),
    // "failed to insert pmem resource to iomem", EBUSY.
    ("beyond-addresses", Refused),
];

/// A line for each bus: the root device's number, DIMMs, regions, block devices.
const BUSES: &str = "cd /sys/bus/nd/devices; for b in ndbus*; do d=$(readlink -f $b); \
     echo $(echo $d | grep -o 'ACPI0012:[0-9a-f]*' | tail -1 | cut -d: -f2) $(ls -d $d/nmem* 2>/dev/null | wc -l) \
     $(ls -d $d/region* 2>/dev/null | wc -l) $(ls -d $d/region*/namespace*/block/* 2>/dev/null | wc -l); done";

fn lies(kernel: &str, exceptions: &[(&str, Bus)]) {
    let run = Run::kernel(kernel).size(2, "1G").args(["--preset", "nfit_lies"]).tools(&["ndctl"]);
    let mut guest = run.shell();
    // The last one is refused, too; probes come one behind the other.
    guest.until_ok("dmesg | grep -q 'ACPI0012:13.*fail'", PMEM);
    guest.until_ok("test $(ls /dev/pmem* | wc -l) -ge 6", PMEM);
    let text = guest.ok(BUSES);
    let buses: BTreeMap<usize, Bus> = text
        .lines()
        .map(|line| {
            let mut words = line.split(' ');
            let unit = usize::from_str_radix(words.next().unwrap(), 16).unwrap();
            let mut number = || words.next().unwrap().parse().unwrap();
            (unit, Has(number(), number(), number()))
        })
        .collect();
    let expected = |name: &str, bus: Bus| {
        exceptions.iter().find(|(known, _)| *known == name).map_or(bus, |(_, other)| *other)
    };
    let differences: Vec<_> = EXPECTED
        .iter()
        .enumerate()
        .filter_map(|(unit, &(name, bus))| {
            let found = buses.get(&unit).copied().unwrap_or(Refused);
            (!expected(name, bus).allows(found))
                .then(|| format!("{name}: {found:?}, not {:?}", expected(name, bus)))
        })
        .collect();
    assert!(
        differences.is_empty(),
        "{differences:#?}\n{}",
        guest.ok("dmesg | grep -iE 'nfit|nd_|pmem' | tail -60")
    );
    // The honest bus works.
    guest.ok("ndctl list -N -b ndbus0 | grep -q pmem");
    let traces = guest.ok("dmesg | grep -cE 'BUG:|Oops|general protection|Call Trace' || true");
    assert_eq!(traces, "0", "{}", guest.ok("dmesg | tail -100"));
    guest.finish("exit 0").assert_ended(0, "power_off");
}

#[test]
fn contradictions_hurt_nobody_else() {
    lies("6.12", &[]);
}

/// `acpi_nfit_init` puts its description on the list `acpi_descs` before it parses, and `acpi_nfit_shutdown`, which takes
/// it off, is registered only once that has succeeded: one refused bus leaves freed memory on the list. 6.1 checks lists,
/// and panics when the next bus is added; a kernel that does not check has that memory on the list that
/// `nfit_handle_mce` walks.
#[test]
#[ignore = "wide"]
fn a_refused_bus_corrupts_a_list_on_6_1() {
    let run = Run::kernel("6.1").args(["--preset", "nfit_lies"]);
    let ended = run.output(&["true"]);
    ended.assert_ended(255, "panic");
    let console = ended.record.console();
    for words in ["list_add corruption", "acpi_nfit_init"] {
        assert!(console.contains(words), "{console}");
    }
}

#[test]
#[ignore = "wide"]
fn contradictions_hurt_nobody_else_on_7() {
    lies("7.x", &[]);
}
