//! What ACPICA's interpreter, which is also Linux's, makes of the DSDT: acpiexec runs its methods on simulated
//! registers.

use aconite_acpi::platform::{Call, EventTarget, FirmwareEvent, hotplug};
use aconite_acpi::{
    AddressRange, Description, DimmFlags, HostBridges, MemoryRange, NvdimmUnit, Persistence, Processor,
    RangeType, Share, Tables, UnitDimm, UnitRange, UnitSlot, UnitWindow,
};
use common::{program, run};

mod common;
#[path = "../src/sample.rs"]
mod sample;

/// Runs debugger commands on the DSDT of the sample; `fields` are preset as if hardware had written them.
fn execute(fields: &[(&str, u64)], commands: &[&str]) -> String {
    let directory = tempfile::tempdir().expect("a directory");
    let mut description = sample::sample();
    description.units[1].dimms = 3;
    let tables = Tables::build(&description).expect("tables");
    let dsdt = tables.get(b"DSDT").expect("a DSDT");
    std::fs::write(directory.path().join("DSDT.aml"), dsdt.table.bytes()).expect("written");
    let lines: Vec<String> = fields.iter().map(|(name, value)| format!("{name} {value:#x}\n")).collect();
    std::fs::write(directory.path().join("fields"), lines.concat()).expect("written");
    let commands = commands.join(";");
    let arguments = ["-r", "-to", "1", "-fi", "fields", "-b", &commands, "DSDT.aml"];
    let (ok, text) = run(program("acpiexec", "ACONITE_ACPIEXEC"), directory.path(), &arguments);
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
        &[("\\_SB_.NV01.STAT", hotplug::STATUS_PRESENT.into())],
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
fn a_host_bridge_comes_goes_and_is_answered_for() {
    let text = execute(
        &[("\\_SB_.HB01.STAT", hotplug::STATUS_PRESENT.into()), ("\\_SB_.HB01.WNDW", 0x123)],
        &[
            "evaluate \\_SB.HB01._CRS",
            "evaluate \\_SB.HB00._STA",
            "evaluate \\_SB.HB01._STA",
            "evaluate \\_SB.HB01._BBN",
            "evaluate \\_SB.HB01._EJ0 1",
            "evaluate \\_SB.HB01.EJCT",
            "evaluate \\_SB.HB01._OST 3 0x84 (00)",
            "evaluate \\_SB.HB01.OSTA",
            "evaluate \\_SB.HB00.OSTA",
        ],
    );
    clean(&text);
    assert_eq!(integer(&text, "\\_SB.HB00._STA"), [0]);
    assert_eq!(integer(&text, "\\_SB.HB01._STA"), [0xF]);
    assert_eq!(integer(&text, "\\_SB.HB01._BBN"), [0xFE]);
    let resources = &values(&text, "\\_SB.HB01._CRS")[0];
    let window = "0010: 30 12 FF 00 00 00 FF FF 3F 12 FF 00 00 00";
    assert!(resources.contains(window), "first and last address of window 0x123: {resources}");
    assert_eq!(integer(&text, "\\_SB.HB01.EJCT"), [1]);
    assert_eq!(integer(&text, "\\_SB.HB01.OSTA"), [0x84_0003]);
    assert_eq!(integer(&text, "\\_SB.HB00.OSTA"), [0]);
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

/// Values of fields of the output, as the model would write them.
const LABEL_OUTPUT: [(&str, u64); 2] = [("\\_SB_.NV01.OLEN", 12), ("\\_SB_.NV01.RSLT", 0)];

#[test]
fn label_methods_pass_offset_length_and_bytes() {
    let text = execute(
        &LABEL_OUTPUT,
        &[
            "evaluate \\_SB.NV01.NVDR.D000._LSW 0x200 3 (AA BB CC)",
            "evaluate \\_SB.NV01.CODE",
            "evaluate \\_SB.NV01.ILEN",
            "evaluate \\_SB.NV01.IBUF",
        ],
    );
    clean(&text);
    let value = |field: &str| integer(&text, &format!("\\_SB.NV01.{field}"))[0];
    assert_eq!((value("CODE"), value("ILEN")), (Call::LabelWrite.code().into(), 19));
    let input = &values(&text, "\\_SB.NV01.IBUF")[0];
    assert!(input.contains("0000: 00 02 00 00 00 00 00 00 03 00 00 00 00 00 00 00"), "{input}");
    assert!(input.contains("0010: AA BB CC 00"), "{input}");
    assert_eq!(integer(&text, "\\_SB.NV01.NVDR.D000._LSW"), [0]);
}

#[test]
fn calls_to_other_dimms_name_them() {
    let text = execute(
        &LABEL_OUTPUT,
        &[
            "evaluate \\_SB.NV01.NVDR.D002._DSM (01 02) 2 1 [(01)]",
            "evaluate \\_SB.NV01.CODE",
            "evaluate \\_SB.NV01.NVDR.D001._LSR 0 8",
            "evaluate \\_SB.NV01.DBEL",
        ],
    );
    clean(&text);
    assert_eq!(integer(&text, "\\_SB.NV01.CODE"), [Call::DimmDsm.to_dimm(2).into()]);
    assert_eq!(integer(&text, "\\_SB.NV01.DBEL"), [Call::LabelRead.to_dimm(1).into()]);
}

#[test]
fn label_methods_return_packages() {
    let text =
        execute(&LABEL_OUTPUT, &["evaluate \\_SB.NV01.NVDR.D000._LSR 0x100 8", "evaluate \\_SB.NV01.ILEN"]);
    clean(&text);
    let read = &values(&text, "\\_SB.NV01.NVDR.D000._LSR")[0];
    assert!(read.starts_with("[Package] Contains 2 Elements: [Integer] = 0000000000000000"), "{read}");
    assert!(read.contains("[Buffer] Length 08"), "{read}");
    assert_eq!(integer(&text, "\\_SB.NV01.ILEN"), [16]);
    let text = execute(&LABEL_OUTPUT, &["evaluate \\_SB.NV01.NVDR.D000._LSI"]);
    clean(&text);
    let information = &values(&text, "\\_SB.NV01.NVDR.D000._LSI")[0];
    assert_eq!(information.matches("[Integer]").count(), 3, "{information}");
}

#[test]
fn label_methods_of_a_model_without_an_area_fail() {
    let text = execute(
        &[("\\_SB_.NV01.RSLT", 1)],
        &[
            "evaluate \\_SB.NV01.NVDR.D000._LSI",
            "evaluate \\_SB.NV01.NVDR.D000._LSR 0 16",
            "evaluate \\_SB.NV01.NVDR.D000._LSW 0 1 (01)",
        ],
    );
    clean(&text);
    assert_eq!(integer(&text, "\\_SB.NV01.NVDR.D000._LSW"), [1]);
    for method in ["_LSI", "_LSR"] {
        let package = &values(&text, &format!("\\_SB.NV01.NVDR.D000.{method}"))[0];
        assert!(package.contains("Elements: [Integer] = 0000000000000001"), "{method}: {package}");
    }
}

#[test]
fn firmware_events_notify_their_targets() {
    let targets = [
        (EventTarget::Container(1), 0x01, "NV01"),
        (EventTarget::Root(0), 0x81, "NVDR"),
        (EventTarget::Dimm { unit: 2, dimm: 0 }, 0x81, "D000"),
        (EventTarget::Dimm { unit: 1, dimm: 2 }, 0x81, "D002"),
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
