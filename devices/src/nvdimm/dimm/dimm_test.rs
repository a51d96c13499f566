use proptest::prelude::*;

use super::super::dsm::Uuid;
use super::super::testing::{bytes, dimm_config};
use super::intel::UUID as INTEL;
use super::methods::MICROSOFT;
use super::*;

/// Refuses to keep anything.
#[derive(Debug)]
struct Broken;

impl Keeper for Broken {
    fn labels(&self, _offset: u64, _bytes: &[u8]) -> Result<(), NotKept> {
        Err(NotKept(std::io::Error::other("no space")))
    }

    fn record(&self, _record: &Record) -> Result<(), NotKept> {
        Err(NotKept(std::io::Error::other("no space")))
    }
}

fn dimm(family: Family, labels: Option<Vec<u8>>) -> Dimm {
    Dimm::new(dimm_config(family, labels)).unwrap()
}

fn ask(dimm: &Dimm, uuid: Uuid, revision: u32, function: u32, input: &[u8]) -> Option<Vec<u8>> {
    dimm.dsm(&|| true, &Request { uuid, revision, function, input }).map(|answer| answer.output)
}

fn intel(dimm: &Dimm, function: u32, input: &[u8]) -> Vec<u8> {
    ask(dimm, INTEL, 1, function, input).unwrap()
}

#[test]
fn families_answer_under_their_own_uuid_and_revision() {
    let area = Some(vec![0; 1024]);
    for revision in [1, 2] {
        assert_eq!(
            ask(&dimm(Family::Intel, area.clone()), INTEL, revision, 0, &[]).unwrap(),
            bytes("77F4FF7F")
        );
    }
    assert_eq!(ask(&dimm(Family::Intel, None), INTEL, 1, 0, &[]).unwrap(), bytes("07F4FF7F"));
    assert_eq!(ask(&dimm(Family::Microsoft, area.clone()), MICROSOFT, 1, 0, &[]).unwrap(), [1]);
    assert_eq!(ask(&dimm(Family::Microsoft, area.clone()), MICROSOFT, 1, 11, &[]).unwrap(), [1, 0, 0, 0]);
    for (family, uuid, revision) in [
        (Family::Intel, INTEL, 0),
        (Family::Intel, INTEL, 3),
        (Family::Intel, MICROSOFT, 1),
        (Family::Microsoft, MICROSOFT, 2),
        (Family::Microsoft, INTEL, 1),
        (Family::None, INTEL, 1),
        (Family::None, MICROSOFT, 1),
    ] {
        assert_eq!(ask(&dimm(family, area.clone()), uuid, revision, 0, &[]), None, "{family:?} {revision}");
    }
}

#[test]
fn every_byte_of_intel_s_label_functions_is_as_specified() {
    let dimm = dimm(Family::Intel, Some(vec![0; LABEL_AREA_SIZE]));
    assert_eq!(intel(&dimm, 4, &[]), bytes("00000000 00000200 000F0000"));
    assert_eq!(intel(&dimm, 6, &bytes("00010000 04000000 DEADBEEF")), bytes("00000000"));
    assert_eq!(intel(&dimm, 5, &bytes("FE000000 08000000")), bytes("00000000 0000DEADBEEF0000"));
    assert_eq!(intel(&dimm, 5, &bytes("00000200 00000000")), bytes("00000000"), "nothing, at the end");
}

#[test]
fn intel_s_label_functions_refuse_what_is_not_in_the_area() {
    let dimm = dimm(Family::Intel, Some(vec![0; 1024]));
    for input in
        ["", "00", "00000000 00000000 00", "01040000 00000000", "00000000 01040000", "FFFFFFFF FFFFFFFF"]
    {
        assert_eq!(intel(&dimm, 5, &bytes(input)), bytes("03000000"), "{input:?}");
    }
    for input in ["", "00000000 05000000 01020304", "FF030000 02000000 0102", "FFFFFFFF 01000000 01"] {
        assert_eq!(intel(&dimm, 6, &bytes(input)), bytes("03000000"), "{input:?}");
    }
    assert_eq!(dimm.labels().unwrap(), vec![0; 1024]);
}

#[test]
fn every_byte_of_the_label_methods_is_as_the_aml_expects() {
    let dimm = dimm(Family::Microsoft, Some(vec![0; 1024]));
    assert_eq!(label_information(Some(&dimm)), bytes("00000000 00040000 000F0000"));
    let write = bytes("0001000000000000 0400000000000000 DEADBEEF");
    assert_eq!(label_write(Some(&dimm), &write), bytes("00000000"));
    let read = bytes("FE00000000000000 0800000000000000");
    assert_eq!(label_read(Some(&dimm), &read), bytes("00000000 0000DEADBEEF0000"));
    assert_eq!(label_write(Some(&dimm), &write[..19]), bytes("02000000"), "a byte too few");
    assert_eq!(label_read(Some(&dimm), &write), bytes("02000000"), "too long");
    assert_eq!(label_read(Some(&dimm), &bytes("0004000000000000 0100000000000000")), bytes("02000000"));
}

#[test]
fn label_methods_without_an_area_or_a_dimm_fail() {
    let without = dimm(Family::Microsoft, None);
    for dimm in [Some(&without), None] {
        assert_eq!(label_information(dimm), bytes("01000000 00000000 000F0000"));
        assert_eq!(label_read(dimm, &[0; 16]), bytes("01000000"));
        assert_eq!(label_write(dimm, &[0; 16]), bytes("01000000"));
    }
    assert_eq!(intel(&dimm(Family::Intel, None), 4, &[])[..4], [1, 0, 0, 0]);
}

#[test]
fn what_cannot_be_kept_is_an_error_and_changes_nothing() {
    let keeper = Arc::new(Broken);
    let dimm = Dimm::new(DimmConfig { keeper, ..dimm_config(Family::Intel, Some(vec![0; 1024])) }).unwrap();
    let record = dimm.record();
    assert_eq!(intel(&dimm, 10, &[1]), bytes("04000000"));
    assert_eq!(intel(&dimm, 20, &[7; 64]), bytes("04000000"));
    assert_eq!(dimm.record(), record);
    assert_eq!(intel(&dimm, 6, &bytes("00000000 01000000 FF")), bytes("04000000"));
    assert_eq!(
        label_write(Some(&dimm), &[&[0; 8][..], &[1, 0, 0, 0, 0, 0, 0, 0, 0xFF]].concat()),
        [1, 0, 0, 0]
    );
    assert_eq!(dimm.labels().unwrap(), vec![0; 1024]);
}

proptest! {
    /// The area is what was written to it, however it is reached; a refused transfer changes nothing.
    #[test]
    fn label_areas_behave_like_bytes(
        steps in prop::collection::vec(
            (0u64..5000, prop::collection::vec(any::<u8>(), 0..300), any::<bool>(), 0u64..5000), 1..40),
    ) {
        let dimm = dimm(Family::Intel, Some(vec![0; 4096]));
        let mut model = vec![0; 4096];
        for (offset, data, by_method, length) in steps {
            let end = offset as usize + data.len();
            let status = if by_method {
                let head = [offset.to_le_bytes(), (data.len() as u64).to_le_bytes()].concat();
                label_write(Some(&dimm), &[head, data.clone()].concat())
            } else {
                let head = [(offset as u32).to_le_bytes(), (data.len() as u32).to_le_bytes()].concat();
                intel(&dimm, 6, &[head, data.clone()].concat())
            };
            prop_assert_eq!(status == [0; 4], end <= 4096);
            if end <= 4096 {
                model[offset as usize..end].copy_from_slice(&data);
            }
            let wanted = [offset.to_le_bytes(), length.to_le_bytes()].concat();
            let read = label_read(Some(&dimm), &wanted);
            if offset + length <= 4096 && length <= 0xF00 {
                prop_assert_eq!(&read[4..], &model[offset as usize..(offset + length) as usize]);
            } else {
                prop_assert_eq!(read, [2, 0, 0, 0]);
            }
        }
        prop_assert_eq!(dimm.labels().unwrap(), model);
    }
}
