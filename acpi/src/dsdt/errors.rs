//! What an OS needs of the namespace to let firmware tell it of errors.

use acpi_tables::aml::{
    And, Arg, CreateDWordField, Device, EISAName, Else, Equal, If, Local, Method, Name, NotEqual, ONE, Or,
    Return, Store, Uuid, ZERO,
};

use super::Body;

/// `_OSC` of the platform (ACPI 6.5, 6.2.12.2).
const PLATFORM_UUID: &str = "0811b06e-4a27-44f9-8d60-3cbbc22e7b48";
/// `_OSC` by which an OS says that it knows WHEA (Microsoft, "Windows Hardware Error Architecture").
const WHEA_UUID: &str = "ed855e0c-6c90-47bf-a62a-26de0fc5ad5c";
/// What the platform shares with the OS: the APEI interface (bit 4). Nothing else of the list is there.
const PLATFORM_SUPPORT: u32 = 1 << 4;
/// WHEA: bit 0.
const WHEA_SUPPORT: u32 = 1 << 0;
/// Status bits of the first `_OSC` word.
const UNKNOWN_UUID: u32 = 1 << 2;
const UNKNOWN_REVISION: u32 = 1 << 3;
const MASKED: u32 = 1 << 4;

/// Appends the error device, which is notified of records, and the platform's `_OSC`.
pub(super) fn append(body: &mut Body) {
    body.push(&Device::new(
        "HED_".into(),
        vec![&Name::new("_HID".into(), &EISAName::new("PNP0C33")), &Name::new("_UID".into(), &ZERO)],
    ));
    osc(body);
}

/// `_OSC`: arguments are UUID, revision, count of words, and the words: status, support. What is asked for and is not
/// there is masked, and the status says so.
///
/// Linux queries first and then asks for what it was given, so that the masked bits of the query do no harm
/// (`acpi_bus_osc_negotiate_platform_control` in drivers/acpi/bus.c).
fn osc(body: &mut Body) {
    let status = Name::new_field_name("CDW1");
    let support = Name::new_field_name("CDW2");
    let known = |uuid: &str, mask: u32| {
        let mut known = Body::default();
        known.push(&If::new(
            &Equal::new(&Arg(0), &Uuid::new(uuid)),
            vec![
                &And::new(&Local(0), &support, &mask),
                &If::new(&NotEqual::new(&support, &Local(0)), vec![&Or::new(&status, &status, &MASKED)]),
                &Store::new(&support, &Local(0)),
                &Store::new(&Local(1), &ONE),
            ],
        ));
        known
    };
    body.push(&Method::new(
        "_OSC".into(),
        4,
        true,
        vec![
            &CreateDWordField::new(&status, &Arg(3), &ZERO),
            &CreateDWordField::new(&support, &Arg(3), &4u8),
            &Store::new(&Local(1), &ZERO),
            &known(PLATFORM_UUID, PLATFORM_SUPPORT),
            &known(WHEA_UUID, WHEA_SUPPORT),
            &If::new(&Equal::new(&Local(1), &ZERO), vec![&Or::new(&status, &status, &UNKNOWN_UUID)]),
            &Else::new(vec![&If::new(
                &NotEqual::new(&Arg(1), &ONE),
                vec![&Or::new(&status, &status, &UNKNOWN_REVISION)],
            )]),
            &Return::new(&Arg(3)),
        ],
    ));
}
