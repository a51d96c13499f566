//! What ACPICA makes of the tables: `iasl` decodes every one of them, and the fields it names are compared with
//! the description; it compiles its own decoding back; and `acpiexec` runs the DSDT's methods.
//!
//! `ACONITE_IASL` and `ACONITE_ACPIEXEC` name the programs, should they be neither in `PATH` nor among the fetched
//! material.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use aconite_acpi::layout::{
    ECAM_BASE, FLUSH_BASE, FLUSH_SIZE, IOAPIC_BASE, LAPIC_BASE, MAX_UNITS, PLATFORM_BASE, PM_TIMER_PORT,
    TABLES_BASE, mailbox_base, unit_base,
};
use aconite_acpi::platform::{
    Call, EventTarget, FirmwareEvent, RESET, RESET_VALUE, SLEEP_CONTROL, SLEEP_STATUS, device_handle, unit,
};
use aconite_acpi::{
    AddressRange, Description, DimmFlags, MemoryRange, Persistence, PmemUnit, Processor, Tables, UnitSlot,
};

#[path = "../src/sample.rs"]
mod sample;

/// A program of Debian's acpica-tools: the one that a variable names, or that `cargo xtask fetch` has unpacked
/// with the libraries and the loader it needs, or that is installed.
fn program(name: &str, variable: &str) -> Command {
    let command = || {
        if let Some(path) = std::env::var_os(variable) {
            return Command::new(path);
        }
        let tools =
            std::env::var_os("ACONITE_MATERIAL").map(|material| Path::new(&material).join("tools/usr"));
        if let Some(tools) = tools.filter(|tools| tools.join("bin").join(name).is_file()) {
            let mut command = Command::new(tools.join("lib64/ld-linux-x86-64.so.2"));
            command
                .arg("--library-path")
                .arg(tools.join("lib/x86_64-linux-gnu"))
                .arg(tools.join("bin").join(name));
            return command;
        }
        Command::new(name)
    };
    if let Err(error) = command().arg("-v").output() {
        panic!(
            "{name} cannot be started: {error}. Install the package acpica-tools, name the program in {variable}, \
             or run the tests by cargo xtask test, which fetches it"
        );
    }
    command()
}

/// Runs a program in a directory and gives back all it printed.
fn run(mut command: Command, directory: &Path, arguments: &[&str]) -> (bool, String) {
    let output = command.current_dir(directory).args(arguments).output().expect("the program runs");
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&text).into_owned())
}

/// The tables of a description, in files that iasl has decoded.
struct Decoded {
    directory: tempfile::TempDir,
    tables: Tables,
}

impl Decoded {
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
            if name == "Subtable Type" || value.is_empty() {
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
        let range = AddressRange { size: size / 2, ..window };
        let unit = PmemUnit { range, proximity: number + 4, ..sample::unit(number) };
        UnitSlot { window, proximity: number + 4, occupant: number.is_multiple_of(2).then_some(unit) }
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
        pci_proximity: 0,
        units: Vec::new(),
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
            let fields = decoded.fields(&placed.table.name());
            assert_eq!(fields.one("", "Table Length"), placed.table.bytes().len() as u64);
            assert_eq!(fields.texts("", "Oem ID"), ["\"ACONIT\""]);
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
        let slots = description.units.iter().map(|slot| (slot.window, slot.proximity, 1));
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
        let units: Vec<&PmemUnit> =
            description.units.iter().filter_map(|slot| slot.occupant.as_ref()).collect();
        let column =
            |value: &dyn Fn(&PmemUnit) -> u64| -> Vec<u64> { units.iter().map(|unit| value(unit)).collect() };
        let indexes = column(&|unit| unit.index().into());
        let handles = column(&|unit| device_handle(unit.unit).into());
        let sizes = column(&|unit| unit.range.size);

        assert_eq!(nfit.all("0000", "Range Index"), indexes);
        assert_eq!(nfit.all("0000", "Address Range Base"), column(&|unit| unit.range.base));
        assert_eq!(nfit.all("0000", "Address Range Length"), sizes);
        assert_eq!(nfit.all("0000", "Proximity Domain"), column(&|unit| unit.proximity.into()));
        assert!(nfit.all("0000", "Proximity Domain Valid").iter().all(|&valid| valid == 1));
        for guid in nfit.texts("0000", "Region Type GUID") {
            assert_eq!(guid, "66F0D379-B4F3-4074-AC43-0D3318B78CDB");
        }

        assert_eq!(nfit.all("0001", "Device Handle"), handles);
        assert_eq!(nfit.all("0001", "Range Index"), indexes);
        assert_eq!(nfit.all("0001", "Control Region Index"), indexes);
        assert_eq!(nfit.all("0001", "Region Size"), sizes);
        assert_eq!(nfit.all("0004", "Region Index"), indexes);
        // iasl shows as one little-endian number what Linux shows byte by byte.
        assert_eq!(nfit.all("0004", "Serial Number"), column(&|unit| unit.serial.swap_bytes().into()));
        assert_eq!(nfit.all("0006", "Device Handle"), handles);
        assert_eq!(
            nfit.all("0006", "Hint Address"),
            column(&|unit| FLUSH_BASE + u64::from(unit.unit) * FLUSH_SIZE)
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
        let arguments = ["-p", "again", "DSDT.dsl"];
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
        for once in ["\"ACPI0013\"", "\"QEMU0001\"", "(\"PNP0A08\")", "(\"PNP0C02\")", "(\"PNP0501\")"] {
            assert_eq!(count(once), 1, "{once}");
        }
        for unit in 0..units as u32 {
            assert!(text.contains(&format!("(REGS, SystemMemory, 0x{:08X}, 0x0C)", unit_base(unit))));
            assert!(text.contains(&format!("(MBOX, SystemMemory, 0x{:08X}, 0x2000)", mailbox_base(unit))));
        }
        match description.pci_window64 {
            Some(window) => {
                assert!(text.contains(&format!("0x{:016X}, // Range Minimum", window.base)));
                assert!(text.contains(&format!("0x{:016X}, // Range Maximum", window.end() - 1)));
            }
            None => assert_eq!(count("QWordMemory"), 0),
        }
    });
}

/// Runs debugger commands on the DSDT of the sample; `fields` are preset as if hardware had written them.
fn execute(fields: &[(&str, u64)], commands: &[&str]) -> String {
    let decoded = Decoded::new(&sample::sample());
    let lines: Vec<String> = fields.iter().map(|(name, value)| format!("{name} {value:#x}\n")).collect();
    std::fs::write(decoded.path("fields"), lines.concat()).expect("written");
    let commands = commands.join(";");
    let arguments = ["-r", "-to", "1", "-fi", "fields", "-b", &commands, "DSDT.aml"];
    let (ok, text) = run(program("acpiexec", "ACONITE_ACPIEXEC"), decoded.directory.path(), &arguments);
    assert!(ok, "{text}");
    text
}

/// Values that acpiexec says evaluations of an object returned.
fn values(text: &str, object: &str) -> Vec<String> {
    let start = format!("Evaluation of {object} returned object");
    let mut lines = text.lines();
    let mut values = Vec::new();
    while let Some(line) = lines.next() {
        if line.starts_with(&start) {
            let value: Vec<&str> =
                lines.by_ref().take_while(|line| !line.is_empty()).map(str::trim).collect();
            values.push(value.join(" "));
        }
    }
    assert!(!values.is_empty(), "acpiexec shows no value of {object}: {text}");
    values
}

fn integer(text: &str, object: &str) -> Vec<u64> {
    let number = |value: &String| {
        let digits = value.strip_prefix("[Integer] = ").expect("an integer");
        u64::from_str_radix(digits, 16).expect("a hexadecimal number")
    };
    values(text, object).iter().map(number).collect()
}

/// UUID of the NVDIMM root device's `_DSM`, as bytes for acpiexec.
const ROOT_UUID: &str = "(A4 E7 10 2F 91 9E E4 11 89 D3 12 3B 93 F7 5C BA)";

/// The interpreter has complained of nothing. That acpiexec leaks memory of its own at its end (20250404) is no
/// complaint.
fn clean(text: &str) {
    let complaint = |line: &&str| {
        (line.contains("ACPI Error") || line.contains("ACPI Warning")) && !line.contains("Outstanding")
    };
    assert_eq!(text.lines().find(complaint), None, "{text}");
}

#[test]
fn status_and_eject_reach_the_registers() {
    let text = execute(
        &[("\\_SB_.NV01.STAT", unit::STATUS_PRESENT.into())],
        &[
            "evaluate \\_SB.NV00._STA",
            "evaluate \\_SB.NV01._STA",
            "evaluate \\_SB.NV01.NVDR._STA",
            "evaluate \\_SB.NV01._EJ0 1",
            "evaluate \\_SB.NV01.EJCT",
        ],
    );
    clean(&text);
    assert_eq!(integer(&text, "\\_SB.NV00._STA"), [0]);
    assert_eq!(integer(&text, "\\_SB.NV01._STA"), [0xF]);
    assert_eq!(integer(&text, "\\_SB.NV01.NVDR._STA"), [0xF]);
    assert_eq!(integer(&text, "\\_SB.NV01.EJCT"), [1]);
}

#[test]
fn a_root_call_fills_the_mailbox_and_returns_what_the_model_wrote() {
    let dsm = format!("evaluate \\_SB.NV01.NVDR._DSM {ROOT_UUID} 1 4 [(11 22 33 44 55 66 77 88 99)]");
    let text = execute(
        &[("\\_SB_.NV01.OLEN", 5), ("\\_SB_.NV01.RSLT", 0)],
        &[
            &dsm,
            "evaluate \\_SB.NV01.CODE",
            "evaluate \\_SB.NV01.UUID",
            "evaluate \\_SB.NV01.REVI",
            "evaluate \\_SB.NV01.FUNC",
            "evaluate \\_SB.NV01.ILEN",
            "evaluate \\_SB.NV01.IBUF",
            "evaluate \\_SB.NV01.DBEL",
            "evaluate \\_SB.NV00.CODE",
        ],
    );
    clean(&text);
    let value = |field: &str| integer(&text, &format!("\\_SB.NV01.{field}"))[0];
    assert_eq!(value("CODE"), Call::RootDsm.code().into());
    assert_eq!(value("DBEL"), Call::RootDsm.code().into());
    assert_eq!((value("REVI"), value("FUNC"), value("ILEN")), (1, 4, 9));
    let uuid = &values(&text, "\\_SB.NV01.UUID")[0];
    assert!(uuid.contains("A4 E7 10 2F 91 9E E4 11 89 D3 12 3B 93 F7 5C BA"), "{uuid}");
    let input = &values(&text, "\\_SB.NV01.IBUF")[0];
    assert!(input.contains("0000: 11 22 33 44 55 66 77 88 99 00 00"), "{input}");
    let output = &values(&text, "\\_SB.NV01.NVDR._DSM")[0];
    assert!(output.starts_with("[Buffer] Length 05"), "{output}");
    assert_eq!(integer(&text, "\\_SB.NV00.CODE"), [0], "the mailbox of another unit");
}

#[test]
fn long_input_and_output_go_through_whole() {
    // acpiexec takes no longer command lines.
    let bytes: Vec<String> = (0..136u8).map(|byte| format!("{:02X}", byte.wrapping_mul(7))).collect();
    let dsm = format!("evaluate \\_SB.NV00.NVDR._DSM {ROOT_UUID} 1 7 [({})]", bytes.join(" "));
    let text = execute(
        &[("\\_SB_.NV00.OLEN", 200)],
        &[&dsm, "evaluate \\_SB.NV00.ILEN", "evaluate \\_SB.NV00.IBUF", "evaluate \\_SB.NV00.NVDR._FIT"],
    );
    clean(&text);
    assert_eq!(integer(&text, "\\_SB.NV00.ILEN"), [136]);
    let input = &values(&text, "\\_SB.NV00.IBUF")[0];
    for (row, bytes) in bytes.chunks(16).enumerate() {
        assert!(input.contains(&format!("{:04X}: {} ", 16 * row, bytes.join(" "))), "row {row}: {input}");
    }
    assert!(values(&text, "\\_SB.NV00.NVDR._FIT")[0].starts_with("[Buffer] Length C8"));
}

#[test]
fn calls_take_any_kind_of_argument() {
    for (argument, length) in [("[(01 02 03)]", 3), ("[7]", 0), ("7", 0), ("(01 02 03)", 0)] {
        let dsm = format!("evaluate \\_SB.NV00.NVDR.D000._DSM (01 02) 2 1 {argument}");
        let text = execute(
            &[("\\_SB_.NV00.OLEN", 4)],
            &[&dsm, "evaluate \\_SB.NV00.ILEN", "evaluate \\_SB.NV00.CODE"],
        );
        assert_eq!(text.lines().find(|line| line.contains("Aborting")), None, "{argument}: {text}");
        assert_eq!(integer(&text, "\\_SB.NV00.ILEN"), [length], "{argument}");
        assert_eq!(integer(&text, "\\_SB.NV00.CODE"), [Call::DimmDsm.code().into()], "{argument}");
    }
}

#[test]
fn an_output_length_beyond_the_mailbox_is_cut() {
    let text = execute(&[("\\_SB_.NV00.OLEN", 0xFFFF_FFFF)], &["evaluate \\_SB.NV00.NVDR._FIT"]);
    clean(&text);
    let output = &values(&text, "\\_SB.NV00.NVDR._FIT")[0];
    assert!(output.starts_with("[Buffer] Length FF8"), "{output}");
}

#[test]
fn unknown_calls_return_what_acpi_wants() {
    let root = format!("evaluate \\_SB.NV00.NVDR._DSM {ROOT_UUID} 1 4 [7]");
    let text = execute(
        &[("\\_SB_.NV00.RSLT", 1), ("\\_SB_.NV00.OLEN", 16)],
        &[
            &root,
            "evaluate \\_SB.NV00.NVDR._DSM (01 02) 1 0 [7]",
            "evaluate \\_SB.NV00.NVDR._FIT",
            "evaluate \\_SB.NV00.CODE",
        ],
    );
    clean(&text);
    for result in values(&text, "\\_SB.NV00.NVDR._DSM") {
        assert!(result.starts_with("[Buffer] Length 01 =     0000: 00 "), "{result}");
    }
    assert!(values(&text, "\\_SB.NV00.NVDR._FIT")[0].starts_with("[Buffer] Length 00"));
    assert_eq!(integer(&text, "\\_SB.NV00.CODE"), [Call::Fit.code().into()]);
}

#[test]
fn firmware_events_notify_their_targets() {
    let targets = [
        (EventTarget::Container(1), 0x01, "NV01"),
        (EventTarget::Root(0), 0x81, "NVDR"),
        (EventTarget::Dimm(2), 0x81, "D000"),
    ];
    for (target, code, name) in targets {
        let event = FirmwareEvent { target, code };
        // The register never runs empty here, so that acpiexec ends the loop when its time is over.
        let text = execute(&[("\\_SB_.GED_.EVNT", event.encode().into())], &["evaluate \\_SB.GED._EVT 9"]);
        let notified = text.lines().find(|line| line.contains("Notify on")).unwrap_or_default();
        assert!(notified.contains(&format!("[{name}]")), "{notified}");
        assert!(notified.contains(&format!("Value 0x{code:02X}")), "{notified}");
    }
}

#[test]
fn the_event_method_ends_when_nothing_is_left() {
    clean(&execute(&[], &["evaluate \\_SB.GED._EVT 9"]));
}
