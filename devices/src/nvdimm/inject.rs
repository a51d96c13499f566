//! Functions 7 to 9 of the NVDIMM root device: error injection (ACPI 6.5, 9.20.7.10 to 9.20.7.12).
//!
//! An injected error is poison of the medium like any other: what was injected by the API is listed too, and what was
//! injected here is met by loads. Injection rounds outward to lines of 64 bytes.
//!
//! ndctl gives function 7 twenty bytes for seventeen and function 9 eight for none (`ndctl_bus_cmd_new_err_inj` in
//! ndctl/lib/nfit.c sizes the input by the whole structure): longer input than the specification's is taken.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::dsm::{only_status, status};
use super::unit::Unit;

/// Option of [`InjectInput`]: notify the OS of the error.
const NOTIFY: u8 = 1 << 0;

/// Input of function 7.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct InjectInput {
    pub(super) address: U64,
    pub(super) length: U64,
    pub(super) options: u8,
}
const _: () = assert!(size_of::<InjectInput>() == 17);

/// Input of function 8.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct ClearInput {
    address: U64,
    length: U64,
}
const _: () = assert!(size_of::<ClearInput>() == 16);

/// Head of the output of function 9.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct StatusHeader {
    status: U32,
    records: U32,
}
const HEADER: usize = size_of::<StatusHeader>();
const _: () = assert!(HEADER == 8);

/// A record of the output of function 9.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct StatusRecord {
    address: U64,
    length: U64,
}
const _: () = assert!(size_of::<StatusRecord>() == 16);

/// Function 7: injects an error, and says whether the OS is to be notified.
pub(super) fn inject(unit: Option<&Unit>, input: &[u8]) -> (Vec<u8>, bool) {
    let wanted = InjectInput::read_from_prefix(input).ok().zip(unit).and_then(|((input, _), unit)| {
        Some((unit, unit.range(input.address.get(), input.length.get())?, input.options))
    });
    match wanted {
        Some((unit, range, options)) if unit.poison(range.clone()) => {
            tracing::debug!(slot = unit.slot(), ?range, "Error injected");
            (only_status(status::SUCCESS), options & NOTIFY != 0)
        }
        _ => (only_status(status::INVALID_INPUT), false),
    }
}

/// Function 8: takes injected errors back. The OS is not told, and keeps what it knows.
pub(super) fn clear(unit: Option<&Unit>, input: &[u8]) -> Vec<u8> {
    let wanted = ClearInput::read_from_prefix(input)
        .ok()
        .zip(unit)
        .and_then(|((input, _), unit)| Some((unit, unit.range(input.address.get(), input.length.get())?)));
    only_status(match wanted {
        Some((unit, range)) if unit.clear(range.clone()) == range.end - range.start => status::SUCCESS,
        _ => status::INVALID_INPUT,
    })
}

/// Function 9: the errors there are, as many as ndctl has room for: it takes the size of an ARS status buffer.
pub(super) fn status(unit: Option<&Unit>) -> Vec<u8> {
    let records: Vec<_> = unit.map_or_else(Vec::new, |unit| {
        let most = (unit.ars_output_size() - HEADER) / size_of::<StatusRecord>();
        unit.all_poisoned(most)
            .into_iter()
            .map(|bad| StatusRecord { address: bad.start.into(), length: (bad.end - bad.start).into() })
            .collect()
    });
    let header = StatusHeader { status: status::SUCCESS.into(), records: (records.len() as u32).into() };
    [header.as_bytes(), records.as_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use super::super::testing::{BASE, Memory, SIZE, bytes, unit, unit_with};
    use super::*;

    fn ask(unit: &Unit, address: u64, length: u64, options: u8) -> (Vec<u8>, bool) {
        inject(Some(unit), InjectInput { address: address.into(), length: length.into(), options }.as_bytes())
    }

    #[test]
    fn every_byte_of_an_injection_is_as_specified() {
        let (unit, memory) = unit();
        let input = bytes("0002004001000000 0001000000000000 01");
        assert_eq!(inject(Some(&unit), &input), (bytes("00000000"), true));
        assert_eq!(memory.poison_total(), 0x100);
        // Base 0x140000200, 0x100 bytes.
        let one = bytes("00000000 01000000 0002004001000000 0001000000000000");
        assert_eq!(status(Some(&unit)), one);
        assert_eq!(clear(Some(&unit), &input[..16]), bytes("00000000"));
        assert_eq!(status(Some(&unit)), bytes("00000000 00000000"));
    }

    #[test]
    fn input_as_ndctl_sends_it_is_taken() {
        let (unit, memory) = unit();
        // Twenty bytes: the structure with its status.
        let mut input = bytes("0000004001000000 0001000000000000 00");
        input.extend([0xEE; 3]);
        assert_eq!(inject(Some(&unit), &input), (bytes("00000000"), false));
        assert_eq!(memory.poison_total(), 0x100);
        input.truncate(17);
        input.extend([0; 3]);
        assert_eq!(clear(Some(&unit), &input), bytes("00000000"));
        assert!(memory.is_clean());
    }

    #[test]
    fn other_ranges_and_shorter_input_are_invalid() {
        let (unit, memory) = unit();
        for (address, length) in [(BASE, 0), (BASE - 1, 2), (BASE, SIZE + 1), (0, 64), (u64::MAX, 64)] {
            assert_eq!(
                ask(&unit, address, length, 1),
                (bytes("02000000"), false),
                "{address:#x}+{length:#x}"
            );
            let input = [address.to_le_bytes(), length.to_le_bytes()].concat();
            assert_eq!(clear(Some(&unit), &input), bytes("02000000"));
        }
        for size in [0, 8, 16] {
            assert_eq!(inject(Some(&unit), &vec![0; size]).0, bytes("02000000"));
        }
        assert_eq!(clear(Some(&unit), &[0; 15]), bytes("02000000"));
        assert!(memory.is_clean());
        assert_eq!(inject(None, &[0; 17]).0, bytes("02000000"));
        assert_eq!(status(None), bytes("00000000 00000000"));
    }

    #[test]
    fn no_more_records_than_fit_are_listed() {
        let memory = Memory::default();
        let unit = unit_with(&memory, |config| config.ars_records = 1);
        for n in 0..10 {
            memory.poison(BASE + n * 0x1000..BASE + n * 0x1000 + 64);
        }
        // 48 + 24 bytes hold a header and four records.
        assert_eq!(status(Some(&unit))[..8], bytes("00000000 04000000"));
    }
}
