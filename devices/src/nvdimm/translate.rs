//! Function 5 of the NVDIMM root device: translate SPA (ACPI 6.5, 9.20.7.8).
//!
//! ndctl uses it to name the DIMM of a bad block (`ndctl list -M`). The translation of an address holds to the end of
//! its line in an interleave set, and to the end of its range on a DIMM that is not interleaved.

use aconite_acpi::platform::device_handle;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::dsm::status;
use super::unit::Unit;

/// Input of function 5.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct TranslateInput {
    pub(super) spa: U64,
}
const _: () = assert!(size_of::<TranslateInput>() == 8);

/// Head of the output of function 5.
#[derive(Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct TranslateOutput {
    pub(super) status: U32,
    /// No flag is set: the address is on one DIMM only.
    pub(super) flags: u8,
    pub(super) reserved: [u8; 3],
    /// Bytes from the address on for which the translation holds.
    pub(super) length: U64,
    /// Number of [`TranslateDevice`]s that follow.
    pub(super) devices: U32,
}
const _: () = assert!(size_of::<TranslateOutput>() == 20);

/// A DIMM in the output of function 5.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct TranslateDevice {
    pub(super) handle: U32,
    pub(super) reserved: U32,
    /// Address in the DIMM.
    pub(super) dpa: U64,
}
const _: () = assert!(size_of::<TranslateDevice>() == 16);

/// Function 5: the DIMM behind an address, and the address there.
pub(super) fn translate(unit: Option<&Unit>, input: &[u8]) -> Vec<u8> {
    let found = TranslateInput::read_from_bytes(input)
        .ok()
        .zip(unit)
        .and_then(|(input, unit)| Some((unit, unit.place(input.spa.get())?)));
    let Some((unit, place)) = found else {
        let output = TranslateOutput { status: status::INVALID_INPUT.into(), ..Default::default() };
        return output.as_bytes().to_vec();
    };
    let output = TranslateOutput {
        status: status::SUCCESS.into(),
        length: place.length.into(),
        devices: 1.into(),
        ..Default::default()
    };
    let handle = device_handle(unit.slot(), place.dimm).into();
    let device = TranslateDevice { handle, reserved: 0.into(), dpa: place.address.into() };
    [output.as_bytes(), device.as_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use super::super::interleave::{Interleave, Share};
    use super::super::testing::{BASE, Memory, SIZE, bare_dimm, bytes, unit, unit_with};
    use super::*;

    #[test]
    fn every_byte_of_a_translation_is_as_specified() {
        let memory = Memory::default();
        let unit =
            unit_with(&memory, |config| config.ranges[0].interleave.shares[0].dimm_address = 0x10_0000);
        let output = translate(Some(&unit), &(BASE + 0x1234).to_le_bytes());
        // SIZE is 16 MiB: 0x1000000 - 0x1234 = 0xFFEDCC.
        let expected = bytes(
            "00000000 00 000000 CCEDFF0000000000 01000000
             01030000 00000000 3412100000000000",
        );
        assert_eq!(output, expected);
    }

    #[test]
    fn a_line_of_an_interleave_set_translates_to_its_end() {
        let memory = Memory::default();
        let unit = unit_with(&memory, |config| {
            config.dimms = vec![bare_dimm(), bare_dimm()];
            let share = |dimm| Share { dimm, dimm_address: 0x1000 };
            config.ranges[0].interleave = Interleave { line: 256, shares: vec![share(1), share(0)] };
        });
        let output = translate(Some(&unit), &(BASE + 0x310).to_le_bytes());
        let expected = bytes(
            "00000000 00 000000 F000000000000000 01000000
             01030000 00000000 1011000000000000",
        );
        assert_eq!(output, expected);
    }

    #[test]
    fn both_ends_of_the_unit_translate_and_no_more() {
        let (unit, _) = unit();
        for (spa, status) in
            [(BASE, 0u32), (BASE + SIZE - 1, 0), (BASE - 1, 2), (BASE + SIZE, 2), (0, 2), (u64::MAX, 2)]
        {
            let output = translate(Some(&unit), &spa.to_le_bytes());
            assert_eq!(output[..4], status.to_le_bytes(), "{spa:#x}");
            assert_eq!(output.len(), if status == 0 { 36 } else { 20 });
        }
        assert_eq!(translate(None, &BASE.to_le_bytes())[..4], [2, 0, 0, 0]);
    }

    #[test]
    fn other_sizes_of_input_are_invalid() {
        let (unit, _) = unit();
        for size in [0, 7, 9, 16] {
            let output = translate(Some(&unit), &vec![0; size]);
            assert_eq!(output, bytes("02000000 00 000000 0000000000000000 00000000"));
        }
    }
}
