//! Function 4 of the NVDIMM root device: clear uncorrectable error (ACPI 6.5, 9.20.7.7).
//!
//! Linux sends it when it writes to a sector that it knows to be bad (`nvdimm_clear_poison` in
//! drivers/nvdimm/bus.c), aligned to the unit that function 1 names. Less than asked for may be cleared: Linux then
//! forgets only that much, and takes zero for an I/O error.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::dsm::status;
use super::unit::Unit;

/// Input of function 4.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct ClearInput {
    pub(super) address: U64,
    pub(super) length: U64,
}
const _: () = assert!(size_of::<ClearInput>() == 16);

/// Output of function 4.
#[derive(Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct ClearOutput {
    pub(super) status: U32,
    pub(super) reserved: U32,
    /// Bytes cleared, from the start of the range.
    pub(super) cleared: U64,
}
const _: () = assert!(size_of::<ClearOutput>() == 16);

/// Function 4: clears the errors of a range whose start and length are multiples of the clear unit.
pub(super) fn clear(unit: Option<&Unit>, input: &[u8]) -> Vec<u8> {
    let wanted = ClearInput::read_from_bytes(input).ok().zip(unit).and_then(|(input, unit)| {
        let range = unit.range(input.address.get(), input.length.get())?;
        let step = u64::from(unit.clear_unit());
        (range.start.is_multiple_of(step) && range.end.is_multiple_of(step)).then_some((unit, range))
    });
    let output = match wanted {
        Some((unit, range)) => {
            let step = u64::from(unit.clear_unit());
            let cleared = unit.clear(range.clone()).min(range.end - range.start);
            let cleared = cleared - cleared % step;
            tracing::debug!(slot = unit.slot(), ?range, cleared, "Clear uncorrectable error");
            ClearOutput { status: status::SUCCESS.into(), cleared: cleared.into(), ..Default::default() }
        }
        None => ClearOutput { status: status::INVALID_INPUT.into(), ..Default::default() },
    };
    output.as_bytes().to_vec()
}

#[cfg(test)]
mod tests {
    use super::super::testing::{BASE, Memory, SIZE, bytes, unit, unit_with};
    use super::*;

    fn ask(unit: Option<&Unit>, address: u64, length: u64) -> ClearOutput {
        let input = ClearInput { address: address.into(), length: length.into() };
        ClearOutput::read_from_bytes(&clear(unit, input.as_bytes())).unwrap()
    }

    #[test]
    fn every_byte_of_a_clear_is_as_specified() {
        let (unit, memory) = unit();
        memory.poison(BASE + 0x200..BASE + 0x240);
        let mut input = (BASE + 0x200).to_le_bytes().to_vec();
        input.extend(0x200u64.to_le_bytes());
        let output = clear(Some(&unit), &input);
        assert_eq!(output, bytes("00000000 00000000 0002000000000000"));
        assert!(memory.is_clean());
    }

    #[test]
    fn what_is_good_already_is_cleared_too() {
        let (unit, _) = unit();
        let output = ask(Some(&unit), BASE, SIZE);
        assert_eq!((output.status.get(), output.cleared.get()), (0, SIZE));
    }

    #[test]
    fn a_partial_clear_is_told_in_whole_units() {
        let (unit, memory) = unit();
        memory.poison(BASE..BASE + 0x1000);
        memory.clear_at_most(0x2C0);
        let output = ask(Some(&unit), BASE, 0x1000);
        assert_eq!((output.status.get(), output.cleared.get()), (0, 0x200));
        memory.clear_at_most(0x40);
        let output = ask(Some(&unit), BASE, 0x1000);
        assert_eq!((output.status.get(), output.cleared.get()), (0, 0));
    }

    #[test]
    fn misaligned_and_foreign_ranges_are_invalid() {
        let (unit, memory) = unit();
        memory.poison(BASE..BASE + 0x1000);
        for (address, length) in [
            (BASE + 0x40, 0x100),
            (BASE + 1, 0x100),
            (BASE, 0x80),
            (BASE, 0x101),
            (BASE, 0),
            (BASE - 0x100, 0x200),
            (BASE + SIZE, 0x100),
            (BASE + SIZE - 0x100, 0x200),
            (BASE, u64::MAX - 0xFF),
            (u64::MAX - 0xFF, 0x100),
        ] {
            let output = ask(Some(&unit), address, length);
            assert_eq!((output.status.get(), output.cleared.get()), (2, 0), "{address:#x}+{length:#x}");
        }
        assert_eq!(memory.poison_total(), 0x1000);
        assert_eq!(ask(None, BASE, 0x100).status.get(), 2);
    }

    #[test]
    fn other_sizes_of_input_are_invalid() {
        let (unit, _) = unit();
        for size in [0, 1, 8, 15, 17, 24, 4064] {
            let output = clear(Some(&unit), &vec![0; size]);
            assert_eq!(output, bytes("02000000 00000000 0000000000000000"), "{size}");
        }
    }

    #[test]
    fn the_clear_unit_is_the_configured_one() {
        let memory = Memory::default();
        let unit = unit_with(&memory, |config| config.clear_unit = 0x1000);
        memory.poison(BASE..BASE + 0x2000);
        assert_eq!(ask(Some(&unit), BASE + 0x200, 0x200).status.get(), 2);
        assert_eq!(ask(Some(&unit), BASE + 0x1000, 0x1000).cleared.get(), 0x1000);
        assert_eq!(memory.poison_total(), 0x1000);
    }
}
