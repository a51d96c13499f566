//! NFIT units: container, NVDIMM root device and DIMM, and the mailbox through which their methods call the
//! device model.
//!
//! Each unit has its own container and root, so that each can come and go by itself: Linux removes what is
//! below an ACPI0004 container whose `_STA` is 0, and cannot remove part of what one root device has. The methods that
//! do something are the container's; those of root and DIMMs only say whom they are for.

use acpi_tables::Aml;
use acpi_tables::aml::{
    Acquire, Arg, BufferData, Concat, DeRefOf, Device, Else, Equal, Field, FieldAccessType, FieldEntry,
    FieldLockRule, FieldUpdateRule, GreaterThan, If, Index, LessThan, Local, Method, MethodCall, Mid, Mutex,
    Name, ONE, ObjectType, OpRegion, OpRegionSpace, Package, Path, Release, Return, SizeOf, Store, ToInteger,
    ZERO,
};

use super::{Body, hotplug};
use crate::layout::{MAILBOX_SIZE, mailbox_base, unit_base};
use crate::platform::{Call, device_handle, label_status, mailbox};

/// ObjectType of a buffer and of a package (ACPI 6.5, table 19.26).
const TYPE_BUFFER: u8 = 3;
const TYPE_PACKAGE: u8 = 4;
/// Input and output up to this size go through fields of this size. An interpreter moves a field as a whole, one
/// access after the other, and nearly all calls are short.
const SHORT_PAYLOAD: u64 = 128;

pub(super) fn dimm_name(dimm: u32) -> String {
    format!("D{dimm:03X}")
}

/// Appends one unit with this many DIMMs. One that is not in the NFIT is of no interest to Linux.
pub(super) fn append(body: &mut Body, unit: u32, dimms: u32) {
    body.push(&Device::new(
        Path::new(&format!("NV{unit:02X}")),
        vec![
            &Name::new("_HID".into(), &"ACPI0004"),
            &Name::new("_UID".into(), &unit),
            &hotplug::registers(unit_base(unit), *b"DBEL"),
            &mailbox_fields(unit),
            &Mutex::new("MBLK".into(), 0),
            &buffer_call(),
            &mailbox_call(),
            &dsm_call(),
            &label_calls(),
            &hotplug::status(),
            &hotplug::answers(),
            &root(unit, dimms),
        ],
    ));
}

/// The unit's mailbox in guest RAM.
fn mailbox_fields(unit: u32) -> Body {
    const {
        assert!(mailbox::CALL == 0 && mailbox::UUID == 4 && mailbox::REVISION == 20);
        assert!(mailbox::FUNCTION == 24 && mailbox::INPUT_LENGTH == 28 && mailbox::INPUT == 32);
        assert!(mailbox::OUTPUT_LENGTH == mailbox::RESULT + 4 && mailbox::OUTPUT == mailbox::RESULT + 8);
    };
    let mut body = Body::default();
    body.push(&OpRegion::new("MBOX".into(), OpRegionSpace::SystemMemory, &mailbox_base(unit), &MAILBOX_SIZE));
    body.push(&Field::new(
        "MBOX".into(),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        vec![
            FieldEntry::Named(*b"CODE", 32),
            FieldEntry::Named(*b"UUID", 8 * mailbox::UUID_SIZE as usize),
            FieldEntry::Named(*b"REVI", 32),
            FieldEntry::Named(*b"FUNC", 32),
            FieldEntry::Named(*b"ILEN", 32),
            FieldEntry::Reserved(8 * mailbox::INPUT_MAX as usize),
            FieldEntry::Named(*b"RSLT", 32),
            FieldEntry::Named(*b"OLEN", 32),
        ],
    ));
    body.push(&payload_field(*b"IBUF", mailbox::INPUT_MAX, *b"OBUF", mailbox::OUTPUT_MAX));
    body.push(&payload_field(*b"ISHO", SHORT_PAYLOAD, *b"OSHO", SHORT_PAYLOAD));
    body
}

/// Fields over the first bytes of input and output.
fn payload_field(input: [u8; 4], input_size: u64, output: [u8; 4], output_size: u64) -> Field {
    const {
        assert!(mailbox::INPUT.is_multiple_of(8) && mailbox::OUTPUT.is_multiple_of(8));
        assert!(mailbox::INPUT_MAX.is_multiple_of(8) && mailbox::OUTPUT_MAX.is_multiple_of(8));
    };
    Field::new(
        "MBOX".into(),
        FieldAccessType::QWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        vec![
            FieldEntry::Reserved(8 * mailbox::INPUT as usize),
            FieldEntry::Named(input, 8 * input_size as usize),
            FieldEntry::Reserved(8 * (mailbox::OUTPUT - mailbox::INPUT - input_size) as usize),
            FieldEntry::Named(output, 8 * output_size as usize),
        ],
    )
}

/// `MCAL (call, UUID, revision, function, arguments)`: one call through the mailbox.
///
/// The input is the first element of the package of arguments if that is a buffer, and empty otherwise (what
/// is not a package, an empty package).
fn mailbox_call() -> Body {
    let (arguments, input) = (Arg(4), Local(0));
    let mut body = Body::default();
    body.push(&Method::new(
        "MCAL".into(),
        5,
        false,
        vec![
            &Store::new(&input, &BufferData::new(Vec::new())),
            &If::new(
                &Equal::new(&ObjectType::new(&arguments), &TYPE_PACKAGE),
                vec![&If::new(
                    &GreaterThan::new(&SizeOf::new(&arguments), &ZERO),
                    vec![
                        &Store::new(&Local(1), &DeRefOf::new(&Index::new(&ZERO, &arguments, &ZERO))),
                        &If::new(
                            &Equal::new(&ObjectType::new(&Local(1)), &TYPE_BUFFER),
                            vec![&Store::new(&input, &Local(1))],
                        ),
                    ],
                )],
            ),
            &Return::new(&MethodCall::new("MBUF".into(), vec![&Arg(0), &Arg(1), &Arg(2), &Arg(3), &input])),
        ],
    ));
    body
}

/// `MBUF (call, UUID, revision, function, input)`: one call with a buffer as input.
///
/// Returns a buffer of exactly as many bytes as the model wrote, and an empty one if the model does not know the call.
fn buffer_call() -> Body {
    let input_max = mailbox::INPUT_MAX as u32;
    let output_max = mailbox::OUTPUT_MAX as u32;
    let (call, uuid, revision, function, input) = (Arg(0), Arg(1), Arg(2), Arg(3), Arg(4));
    let (length, output) = (Local(1), Local(2));
    let field = Name::new_field_name;
    let mut body = Body::default();
    body.push(&Method::new(
        "MBUF".into(),
        5,
        false,
        vec![
            &Store::new(&length, &SizeOf::new(&input)),
            &If::new(&GreaterThan::new(&length, &input_max), vec![&Store::new(&length, &input_max)]),
            &Acquire::new("MBLK".into(), 0xFFFF),
            &Store::new(&field("CODE"), &call),
            &Store::new(&field("UUID"), &uuid),
            &Store::new(&field("REVI"), &revision),
            &Store::new(&field("FUNC"), &function),
            &Store::new(&field("ILEN"), &length),
            // A short buffer fills the rest of the field with zeros, a long one is cut.
            &If::new(&GreaterThan::new(&length, &SHORT_PAYLOAD), vec![&Store::new(&field("IBUF"), &input)]),
            &Else::new(vec![&If::new(
                &GreaterThan::new(&length, &ZERO),
                vec![&Store::new(&field("ISHO"), &input)],
            )]),
            &Store::new(&field("DBEL"), &call),
            &Store::new(&output, &BufferData::new(Vec::new())),
            &If::new(
                &Equal::new(&field("RSLT"), &mailbox::RESULT_OK),
                vec![
                    &Store::new(&length, &field("OLEN")),
                    &If::new(
                        &GreaterThan::new(&length, &output_max),
                        vec![&Store::new(&length, &output_max)],
                    ),
                    &If::new(
                        &GreaterThan::new(&length, &SHORT_PAYLOAD),
                        vec![&Store::new(&Local(4), &field("OBUF"))],
                    ),
                    &Else::new(vec![&Store::new(&Local(4), &field("OSHO"))]),
                    &Mid::new(&Local(4), &ZERO, &length, &output),
                ],
            ),
            &Release::new("MBLK".into()),
            &Return::new(&output),
        ],
    ));
    body
}

/// `XLSI (call)`, `XLSR (call, offset, length)` and `XLSW (call, offset, length, bytes)`: what `_LSI`, `_LSR` and
/// `_LSW` of a DIMM do (ACPI 6.5, 6.5.10).
fn label_calls() -> Body {
    let mut body = Body::default();
    body.push(&Method::new("XLSI".into(), 1, false, vec![&information()]));
    body.push(&Method::new("XLSR".into(), 3, false, vec![&read()]));
    body.push(&Method::new("XLSW".into(), 4, false, vec![&write()]));
    return body;

    /// Package {status, size, most bytes of a transfer}.
    fn information() -> Body {
        let mut body = label_call(&BufferData::new(Vec::new()), 12);
        body.push(&Store::new(&Local(2), &Package::new(vec![&ZERO, &ZERO, &ZERO])));
        for field in 0..3u8 {
            body.push(&Mid::new(&Local(0), &(field * 4), &4u8, &Local(1)));
            body.push(&ToInteger::new(&Index::new(&ZERO, &Local(2), &field), &Local(1)));
        }
        body.push(&Return::new(&Local(2)));
        body
    }

    /// Package {status, bytes}.
    fn read() -> Body {
        let mut body = Body::default();
        body.push(&Concat::new(&Local(3), &Arg(1), &Arg(2)));
        body.push(&label_call(&Local(3), 4));
        body.push(&Store::new(&Local(2), &Package::new(vec![&ZERO, &ZERO])));
        body.push(&Mid::new(&Local(0), &ZERO, &4u8, &Local(1)));
        body.push(&ToInteger::new(&Index::new(&ZERO, &Local(2), &ZERO), &Local(1)));
        body.push(&Mid::new(&Local(0), &4u8, &SizeOf::new(&Local(0)), &Index::new(&ZERO, &Local(2), &ONE)));
        body.push(&Return::new(&Local(2)));
        body
    }

    /// Status.
    fn write() -> Body {
        let mut body = Body::default();
        body.push(&Concat::new(&Local(2), &Arg(1), &Arg(2)));
        body.push(&Concat::new(&Local(3), &Local(2), &Arg(3)));
        body.push(&label_call(&Local(3), 4));
        body.push(&Return::new(&ToInteger::new(&ZERO, &Local(0))));
        body
    }
}

/// Makes the call in Arg0 with `input` and leaves its output in Local0: at least `least` bytes, a failure and zeros if
/// the model does not know the call.
///
/// Two integers concatenated are the sixteen bytes of both (ACPI 6.5, table 19.21), which is how callers make input.
fn label_call(input: &dyn Aml, least: u8) -> Body {
    let mut failure = label_status::FAILURE.to_le_bytes().to_vec();
    failure.resize(least.into(), 0);
    let no_uuid = BufferData::new(vec![0; mailbox::UUID_SIZE as usize]);
    let mut body = Body::default();
    body.push(&Store::new(&Local(4), input));
    body.push(&Store::new(
        &Local(0),
        &MethodCall::new("MBUF".into(), vec![&Arg(0), &no_uuid, &ZERO, &ZERO, &Local(4)]),
    ));
    body.push(&If::new(
        &LessThan::new(&SizeOf::new(&Local(0)), &least),
        vec![&Store::new(&Local(0), &BufferData::new(failure))],
    ));
    body
}

/// `XDSM (call, UUID, revision, function, arguments)`: what a `_DSM` returns. ACPI wants a buffer with a byte 0 for what
/// is not known (ACPI 6.5, 9.1.1).
fn dsm_call() -> Body {
    let result = Local(0);
    let mut body = Body::default();
    body.push(&Method::new(
        "XDSM".into(),
        5,
        false,
        vec![
            &Store::new(
                &result,
                &MethodCall::new("MCAL".into(), vec![&Arg(0), &Arg(1), &Arg(2), &Arg(3), &Arg(4)]),
            ),
            &If::new(&GreaterThan::new(&SizeOf::new(&result), &ZERO), vec![&Return::new(&result)]),
            &Return::new(&BufferData::new(vec![0])),
        ],
    ));
    body
}

/// A method that hands its arguments on to one of the container's, behind the call.
fn forward(name: &str, arguments: u8, to: &str, call: u32) -> Body {
    let arguments: Vec<Arg> = (0..arguments).map(Arg).collect();
    let mut all: Vec<&dyn Aml> = vec![&call];
    all.extend(arguments.iter().map(|argument| argument as &dyn Aml));
    let mut body = Body::default();
    body.push(&Method::new(
        name.into(),
        arguments.len() as u8,
        false,
        vec![&Return::new(&MethodCall::new(to.into(), all))],
    ));
    body
}

/// ACPI0012 with its DIMMs, whose `_ADR` is the handle that NFIT uses.
fn root(unit: u32, dimms: u32) -> Body {
    let fit = Call::Fit.code();
    let no_uuid = BufferData::new(vec![0; mailbox::UUID_SIZE as usize]);
    let mut children = Body::default();
    (0..dimms).for_each(|dimm| children.push(&self::dimm(unit, dimm)));
    let mut body = Body::default();
    body.push(&Device::new(
        "NVDR".into(),
        vec![
            &Name::new("_HID".into(), &"ACPI0012"),
            &Name::new("_UID".into(), &unit),
            &hotplug::status(),
            &Method::new(
                "_FIT".into(),
                0,
                false,
                vec![&Return::new(&MethodCall::new(
                    "MCAL".into(),
                    vec![&fit, &no_uuid, &ZERO, &ZERO, &ZERO],
                ))],
            ),
            &forward("_DSM", 4, "XDSM", Call::RootDsm.code()),
            &children,
        ],
    ));
    body
}

/// A DIMM. Linux uses its label methods if its `_DSM` family is one that it knows and is not Intel's
/// (`acpi_nfit_add_dimm` in drivers/acpi/nfit/core.c).
fn dimm(unit: u32, dimm: u32) -> Body {
    let mut body = Body::default();
    body.push(&Device::new(
        Path::new(&dimm_name(dimm)),
        vec![
            &Name::new("_ADR".into(), &device_handle(unit, dimm)),
            &forward("_DSM", 4, "XDSM", Call::DimmDsm.to_dimm(dimm)),
            &forward("_LSI", 0, "XLSI", Call::LabelInformation.to_dimm(dimm)),
            &forward("_LSR", 2, "XLSR", Call::LabelRead.to_dimm(dimm)),
            &forward("_LSW", 3, "XLSW", Call::LabelWrite.to_dimm(dimm)),
        ],
    ));
    body
}
