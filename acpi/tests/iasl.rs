//! What iasl makes of the tables: it decodes every one of them, and the fields it names are compared with the
//! description; and it compiles its own decoding back.

use std::collections::HashMap;
use std::path::PathBuf;

use aconite_acpi::layout::{
    ECAM_BASE, FLUSH_BASE, FLUSH_SIZE, IOAPIC_BASE, LAPIC_BASE, MAX_UNITS, PLATFORM_BASE, PM_TIMER_PORT,
    TABLES_BASE, host_bridge_base, host_bridge_bus, mailbox_base, unit_base,
};
use aconite_acpi::platform::{RESET, RESET_VALUE, SLEEP_CONTROL, SLEEP_STATUS, device_handle};
use aconite_acpi::{
    AddressRange, Description, DimmFlags, HostBridges, MemoryRange, NvdimmUnit, Persistence, Processor,
    RangeType, Share, Tables, UnitDimm, UnitRange, UnitSlot, UnitWindow,
};
use common::{program, run};

mod common;
#[path = "../src/sample.rs"]
mod sample;

/// The tables of a description, in files that iasl has decoded.
struct Decoded {
    /// Holds `NAME.aml` and `NAME.dsl` of each table.
    directory: tempfile::TempDir,
    /// The tables.
    tables: Tables,
}

impl Decoded {
    /// Builds, writes and decodes the tables.
    fn new(description: &Description) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let tables = Tables::build(description).expect("tables");
        for placed in tables.iter() {
            let name = placed.table.name();
            let file = format!("{name}.aml");
            std::fs::write(directory.path().join(&file), placed.table.bytes()).expect("written");
            let (ok, text) = run(program("iasl", "ACONITE_IASL"), directory.path(), &["-d", &file]);
            assert!(ok && !text.contains("rror") && !text.contains("arning"), "{name}: {text}");
        }
        Self { directory, tables }
    }

    /// A file of the directory.
    fn path(&self, file: &str) -> PathBuf {
        self.directory.path().join(file)
    }

    fn text(&self, table: &str) -> String {
        std::fs::read_to_string(self.path(&format!("{table}.dsl"))).expect("a decoded table")
    }

    fn fields(&self, table: &str) -> Fields {
        Fields::parse(&self.text(table))
    }
}

/// Fields of a data table in the order of the table: sub-table type, name, value.
struct Fields(Vec<(String, String, String)>);

impl Fields {
    fn parse(text: &str) -> Self {
        let mut fields = Vec::new();
        let mut subtable = String::new();
        for line in text.lines() {
            // "[034h 0052   1]      Proximity Domain Low(8) : 00 [comment]"; flags have no brackets in front.
            let line = line.trim();
            let rest = match line.strip_prefix('[') {
                Some(rest) => match rest.split_once(']') {
                    Some((_, rest)) => rest,
                    None => continue,
                },
                None => line,
            };
            let Some((name, value)) = rest.split_once(" : ") else { continue };
            let value = value.split('[').next().unwrap_or(value);
            let (name, value) = (name.trim().to_owned(), value.trim().to_owned());
            if ["Subtable Type", "Structure Type"].contains(&&*name) || value.is_empty() {
                subtable = if value.is_empty() { name.clone() } else { value.clone() };
            }
            fields.push((subtable.clone(), name, value));
        }
        Self(fields)
    }

    fn texts(&self, subtable: &str, name: &str) -> Vec<&str> {
        let wanted = |field: &&(String, String, String)| field.0 == subtable && field.1 == name;
        self.0.iter().filter(wanted).map(|field| field.2.as_str()).collect()
    }

    /// Values of a field in all sub-tables of one type; "" is what comes before the first.
    fn all(&self, subtable: &str, name: &str) -> Vec<u64> {
        let number = |text: &&str| u64::from_str_radix(text, 16).expect("a hexadecimal number");
        let values: Vec<u64> = self.texts(subtable, name).iter().map(number).collect();
        assert!(!values.is_empty(), "iasl shows no field {name:?} in sub-table {subtable:?}");
        values
    }

    fn one(&self, subtable: &str, name: &str) -> u64 {
        let values = self.all(subtable, name);
        assert_eq!(values.len(), 1, "{name}: {values:x?}");
        values[0]
    }
}

/// A machine with as much as there can be: all slots, every other one occupied, several nodes.
fn large() -> Description {
    let size = 0x8000_0000;
    let slot = |number: u32| {
        let window = AddressRange { base: 0x20_0000_0000 + u64::from(number) * size, size };
        let mut unit = sample::unit(number);
        unit.ranges[0].range.base = window.base;
        unit.ranges[0].proximity = number + 4;
        // Every fourth unit has two DIMMs and a volatile range.
        if number.is_multiple_of(4) {
            unit.dimms.push(UnitDimm { serial: 7, ..unit.dimms[0] });
            unit.ranges[0].shares.push(Share { dimm: 1, dimm_address: 0x1000 });
            let range = AddressRange { base: window.base + size / 2, size: size / 2 };
            let (kind, shares) = (RangeType::Volatile, Vec::new());
            unit.ranges.push(UnitRange { range, proximity: number + 4, kind, line: 4096, shares });
        }
        UnitSlot {
            windows: vec![UnitWindow { range: window, proximity: number + 4 }],
            dimms: 2,
            occupant: number.is_multiple_of(2).then_some(unit),
        }
    };
    Description {
        processors: (0..64).map(|id| Processor { apic_id: 2 * id, proximity: u32::from(id) / 16 }).collect(),
        units: (0..MAX_UNITS).map(slot).collect(),
        persistence: Persistence::CpuCache,
        ..sample::sample()
    }
}

/// A machine with as little as there can be.
fn small() -> Description {
    Description {
        processors: vec![Processor { apic_id: 0, proximity: 0 }],
        memory: vec![MemoryRange { range: AddressRange { base: 0, size: 0x800_0000 }, proximity: 0 }],
        pci_window64: None,
        host_bridges: None,
        pci_proximity: 0,
        units: Vec::new(),
        arrivals: Vec::new(),
        persistence: Persistence::Unspecified,
        pm_timer: false,
    }
}

fn each_machine(test: impl Fn(&Description, &Decoded)) {
    for description in [sample::sample(), small(), large()] {
        test(&description, &Decoded::new(&description));
    }
}

#[test]
fn headers_and_pointers() {
    each_machine(|_, decoded| {
        for placed in decoded.tables.iter().filter(|placed| placed.table.name() != "DSDT") {
            let header = decoded.fields(&placed.table.name());
            assert_eq!(header.one("", "Table Length"), placed.table.bytes().len() as u64);
            assert_eq!(header.texts("", "Oem ID"), ["\"ACONIT\""]);
        }
        let xsdt = decoded.fields("XSDT");
        for placed in decoded.tables.iter().filter(|p| !["DSDT", "XSDT"].contains(&&*p.table.name())) {
            let listed = |field: &&(String, String, String)| {
                field.1.starts_with("ACPI Table Address")
                    && u64::from_str_radix(&field.2, 16) == Ok(placed.address)
            };
            assert_eq!(xsdt.0.iter().filter(listed).count(), 1, "{}", placed.table.name());
        }
    });
}

#[test]
fn fadt() {
    each_machine(|description, decoded| {
        let fadt = decoded.fields("FACP");
        assert_eq!((fadt.one("", "Revision"), fadt.one("", "Hardware Reduced (V5)")), (6, 1));
        // iasl names a register's block as a field without a number, then its parts; the part of the table that
        // comes before it is "".
        let all: HashMap<&str, &str> =
            fadt.0.iter().map(|field| (field.1.as_str(), field.2.as_str())).collect();
        assert_eq!(all["VGA Not Present (V4)"], "1");
        assert_eq!(all["MSI Not Supported (V4)"], "0");
        assert_eq!(all["CMOS RTC Not Present (V5)"], "0");
        assert_eq!(all["8042 Present on ports 60/64 (V2)"], "0");
        assert_eq!(all["Legacy Devices Supported (V2)"], "0");
        assert_eq!(all["Reset Register Supported (V2)"], "1");
        assert_eq!(all["Value to cause reset"], format!("{RESET_VALUE:02X}"));
        assert_eq!(all["32-bit PM Timer (V1)"], if description.pm_timer { "1" } else { "0" });
        let register = |name| (fadt.one(name, "Address"), fadt.one(name, "Bit Width"));
        assert_eq!(register("Reset Register"), (PLATFORM_BASE + RESET, 8));
        assert_eq!(register("Sleep Control Register"), (PLATFORM_BASE + SLEEP_CONTROL, 8));
        assert_eq!(register("Sleep Status Register"), (PLATFORM_BASE + SLEEP_STATUS, 8));
        let timer = if description.pm_timer { (u64::from(PM_TIMER_PORT), 32) } else { (0, 0) };
        assert_eq!(register("PM Timer Block"), timer);
        assert_eq!(fadt.one("PM Timer Block", "Space ID"), u64::from(description.pm_timer));
        assert_eq!(fadt.all("Reset Register", "DSDT Address"), [TABLES_BASE]);
    });
}

#[test]
fn madt() {
    each_machine(|description, decoded| {
        let madt = decoded.fields("APIC");
        assert_eq!(madt.one("", "Local Apic Address"), LAPIC_BASE);
        let ids: Vec<u64> = description.processors.iter().map(|p| p.apic_id.into()).collect();
        assert_eq!(madt.all("00", "Local Apic ID"), ids);
        assert_eq!(madt.all("00", "Processor ID"), (0..ids.len() as u64).collect::<Vec<_>>());
        assert!(madt.all("00", "Processor Enabled").iter().all(|&enabled| enabled == 1));
        assert_eq!((madt.one("01", "Address"), madt.one("01", "Interrupt")), (IOAPIC_BASE, 0));
        assert_eq!((madt.one("04", "Processor ID"), madt.one("04", "Interrupt Input LINT")), (0xFF, 1));
    });
}

#[test]
fn mcfg() {
    each_machine(|_, decoded| {
        let mcfg = decoded.fields("MCFG");
        assert_eq!(mcfg.one("", "Base Address"), ECAM_BASE);
        assert_eq!(mcfg.one("", "Segment Group Number"), 0);
        assert_eq!((mcfg.one("", "Start Bus Number"), mcfg.one("", "End Bus Number")), (0, 255));
    });
}

#[test]
fn srat_and_slit() {
    each_machine(|description, decoded| {
        let srat = decoded.fields("SRAT");
        let processors: Vec<(u64, u64)> =
            description.processors.iter().map(|p| (p.apic_id.into(), p.proximity.into())).collect();
        let shown: Vec<(u64, u64)> =
            srat.all("00", "Apic ID").into_iter().zip(srat.all("00", "Proximity Domain Low(8)")).collect();
        assert_eq!(shown, processors);

        let ram = description.memory.iter().map(|m| (m.range, m.proximity, 0));
        let windows = description.units.iter().flat_map(|slot| &slot.windows);
        let slots = windows.map(|window| (window.range, window.proximity, 1));
        let wanted: Vec<[u64; 5]> = ram
            .chain(slots)
            .map(|(range, domain, slot)| [range.base, range.size, domain.into(), slot, slot])
            .collect();
        let columns = ["Base Address", "Address Length", "Proximity Domain", "Hot Pluggable", "Non-Volatile"]
            .map(|name| srat.all("01", name));
        let shown: Vec<[u64; 5]> = (0..columns[0].len())
            .map(|row| [0, 1, 2, 3, 4].map(|column: usize| columns[column][row]))
            .collect();
        assert_eq!(shown, wanted);
        assert!(srat.all("01", "Enabled").iter().all(|&enabled| enabled == 1));

        let domains = u64::from(description.proximity_domains());
        let slit = decoded.fields("SLIT");
        assert_eq!(slit.one("", "Localities"), domains);

        let hmat = decoded.fields("HMAT");
        let memory = hmat.all("0000", "Memory Proximity Domain");
        assert_eq!(memory, (0..domains).filter(|domain| memory.contains(domain)).collect::<Vec<_>>());
        assert_eq!(hmat.all("0001", "Data Type"), [0, 3]);
        assert_eq!(hmat.all("0001", "Target Proximity Domains #"), [memory.len() as u64; 2]);
    });
}

#[test]
fn nfit() {
    each_machine(|description, decoded| {
        if description.units.is_empty() {
            assert_eq!(decoded.tables.get(b"NFIT"), None);
            return;
        }
        let nfit = decoded.fields("NFIT");
        let units: Vec<&NvdimmUnit> =
            description.units.iter().filter_map(|slot| slot.occupant.as_ref()).collect();
        let ranges = |value: &dyn Fn(&NvdimmUnit, usize, &UnitRange) -> u64| -> Vec<u64> {
            let of_unit = |unit: &&NvdimmUnit| -> Vec<u64> {
                unit.ranges.iter().enumerate().map(|(place, range)| value(unit, place, range)).collect()
            };
            units.iter().flat_map(of_unit).collect()
        };
        let dimms = |value: &dyn Fn(&NvdimmUnit, u32) -> u64| -> Vec<u64> {
            let of_unit =
                |unit: &&NvdimmUnit| (0..unit.dimms.len() as u32).map(|dimm| value(unit, dimm)).collect();
            units.iter().flat_map(|unit| -> Vec<u64> { of_unit(unit) }).collect()
        };
        let handles = dimms(&|unit, dimm| device_handle(unit.unit, dimm).into());
        let of_dimm = dimms(&|unit, dimm| unit.index(dimm as usize).into());

        assert_eq!(nfit.all("0000", "Range Index"), ranges(&|unit, place, _| unit.index(place).into()));
        assert_eq!(nfit.all("0000", "Address Range Base"), ranges(&|_, _, range| range.range.base));
        assert_eq!(nfit.all("0000", "Address Range Length"), ranges(&|_, _, range| range.range.size));
        assert_eq!(nfit.all("0000", "Proximity Domain"), ranges(&|_, _, range| range.proximity.into()));
        assert!(nfit.all("0000", "Proximity Domain Valid").iter().all(|&valid| valid == 1));
        for (guid, place) in
            nfit.texts("0000", "Region Type GUID").iter().zip(ranges(&|_, place, _| place as u64))
        {
            let kinds = ["66F0D379-B4F3-4074-AC43-0D3318B78CDB", "7305944F-FDDA-44E3-B16C-3F22D252E5D0"];
            assert_eq!(*guid, kinds[place as usize]);
        }

        // The samples' DIMMs have a share in the first range only.
        assert_eq!(nfit.all("0001", "Device Handle"), handles);
        assert_eq!(nfit.all("0001", "Range Index"), dimms(&|unit, _| unit.index(0).into()));
        assert_eq!(nfit.all("0001", "Control Region Index"), of_dimm);
        assert_eq!(
            nfit.all("0001", "Region Size"),
            dimms(&|unit, _| unit.ranges[0].range.size / unit.dimms.len() as u64)
        );
        assert_eq!(nfit.all("0001", "Region Offset"), dimms(&|_, dimm| u64::from(dimm) * 4096));
        assert_eq!(nfit.all("0001", "Interleave Ways"), dimms(&|unit, _| unit.dimms.len() as u64));
        assert_eq!(nfit.all("0004", "Region Index"), of_dimm);
        // iasl shows as one little-endian number what Linux shows byte by byte.
        let serials = dimms(&|unit, dimm| unit.dimms[dimm as usize].serial.swap_bytes().into());
        assert_eq!(nfit.all("0004", "Serial Number"), serials);
        assert_eq!(nfit.all("0006", "Device Handle"), handles);
        assert_eq!(
            nfit.all("0006", "Hint Address"),
            dimms(&|unit, dimm| FLUSH_BASE + u64::from(unit.unit) * FLUSH_SIZE + u64::from(dimm) * 64)
        );
        let cpu_cache = u64::from(description.persistence == Persistence::CpuCache);
        assert_eq!(nfit.one("0007", "Cache Flush to NVDIMM"), cpu_cache);
        assert_eq!(nfit.one("0007", "Memory Flush to NVDIMM"), 1);
    });
}

/// iasl has understood every byte of a data table if its decoding compiles back to the same bytes. Not of NFIT:
/// it decodes a control region without block windows, whose 32 bytes ACPI asks for, and cannot compile one.
#[test]
fn data_tables_compile_back_to_themselves() {
    each_machine(|_, decoded| {
        for placed in decoded.tables.iter().filter(|p| !["DSDT", "NFIT"].contains(&&*p.table.name())) {
            let name = placed.table.name();
            let source = format!("{name}.dsl");
            let arguments = ["-p", "again", &source];
            let (ok, text) = run(program("iasl", "ACONITE_IASL"), decoded.directory.path(), &arguments);
            assert!(ok && text.contains("0 Errors, 0 Warnings"), "{name}: {text}");
            let mut again = std::fs::read(decoded.path("again.aml")).expect("a compiled table");
            let mut bytes = placed.table.bytes().to_vec();
            // The compiler signs its work, which changes creator, creator revision and the checksum.
            for table in [&mut again, &mut bytes] {
                table[9] = 0;
                table[28..36].fill(0);
            }
            assert_eq!(again, bytes, "{name}");
        }
    });
}

#[test]
fn dsdt_compiles_without_a_word() {
    each_machine(|_, decoded| {
        // It does not know the UUID of error handling's _OSC (`apei_osc_setup` in drivers/acpi/apei/apei-base.c).
        let arguments = ["-vw", "2184", "-p", "again", "DSDT.dsl"];
        let (ok, text) = run(program("iasl", "ACONITE_IASL"), decoded.directory.path(), &arguments);
        assert!(ok && text.contains("0 Errors, 0 Warnings, 0 Remarks"), "{text}");
    });
}

#[test]
fn dsdt_has_the_devices_of_the_description() {
    each_machine(|description, decoded| {
        let text = decoded.text("DSDT");
        let count = |what: &str| text.matches(what).count();
        let units = description.units.len();
        assert_eq!(count("\"ACPI0007\""), description.processors.len());
        assert_eq!((count("\"ACPI0004\""), count("\"ACPI0012\"")), (units, units));
        for once in ["\"ACPI0013\"", "\"QEMU0001\"", "(\"PNP0C02\")", "(\"PNP0501\")"] {
            assert_eq!(count(once), 1, "{once}");
        }
        for unit in 0..units as u32 {
            assert!(text.contains(&format!("(REGS, SystemMemory, 0x{:08X}, 0x10)", unit_base(unit))));
            assert!(text.contains(&format!("(MBOX, SystemMemory, 0x{:08X}, 0x2000)", mailbox_base(unit))));
        }
        let bridges = description.host_bridges.map_or(0, |bridges| bridges.count);
        assert_eq!(count("(\"PNP0A08\")"), 1 + bridges as usize);
        for bridge in 0..bridges {
            assert!(
                text.contains(&format!("(REGS, SystemMemory, 0x{:08X}, 0x10)", host_bridge_base(bridge)))
            );
            assert!(text.contains(&format!("(_BBN, 0x{:02X})", host_bridge_bus(bridge))));
        }
        assert!(text.contains(&format!("0x{:04X},             // Range Maximum", 0xFF - bridges)));
        match description.pci_window64 {
            Some(window) => {
                assert!(text.contains(&format!("0x{:016X}, // Range Minimum", window.base)));
                assert!(text.contains(&format!("0x{:016X}, // Range Maximum", window.end() - 1)));
            }
            None => assert_eq!(count("QWordMemory"), 0),
        }
    });
}
