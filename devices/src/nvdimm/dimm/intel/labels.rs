//! Functions 4 to 6: the label area.

use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::super::super::dsm::only_status;
use super::super::Dimm;
use super::super::labels::{LabelError, TRANSFER};
use super::status;

/// Extended status of function 4: the area is locked (`ND_CONFIG_LOCKED` in Linux).
const SIZE_LOCKED: u32 = 1 << 16;

/// Output of function 4.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Size {
    status: U32,
    size: U32,
    /// Most bytes of one transfer.
    transfer: U32,
}
const _: () = assert!(size_of::<Size>() == 12);

/// Head of the input of functions 5 and 6; in 6 the bytes follow.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Transfer {
    offset: U32,
    length: U32,
}
const _: () = assert!(size_of::<Transfer>() == 8);

fn code(error: &LabelError) -> u32 {
    match error {
        LabelError::NoArea => status::NOT_SUPPORTED,
        LabelError::OutOfRange => status::INVALID_PARAMETER,
        LabelError::Locked => status::INVALID_STATE,
        LabelError::NotKept(_) => status::HARDWARE_ERROR,
    }
}

/// Function 4: size of the area.
pub(super) fn size(dimm: &Dimm) -> Vec<u8> {
    let (status, size) = match dimm.label_size() {
        Ok(size) => (status::SUCCESS, size),
        Err(LabelError::Locked) => (SIZE_LOCKED, 0),
        Err(error) => (code(&error), 0),
    };
    Size { status: status.into(), size: size.into(), transfer: TRANSFER.into() }.as_bytes().to_vec()
}

/// Function 5: read from the area.
pub(super) fn read(dimm: &Dimm, input: &[u8]) -> Vec<u8> {
    let bytes = Transfer::read_from_bytes(input)
        .map_err(|_| LabelError::OutOfRange)
        .and_then(|wanted| dimm.read_labels(wanted.offset.get().into(), wanted.length.get().into()));
    match bytes {
        Ok(bytes) => [only_status(status::SUCCESS), bytes].concat(),
        Err(error) => only_status(code(&error)),
    }
}

/// Function 6: write to the area. The input may be longer than its length says, never shorter.
pub(super) fn write(dimm: &Dimm, input: &[u8]) -> Vec<u8> {
    let written =
        Transfer::read_from_prefix(input).map_err(|_| LabelError::OutOfRange).and_then(|(wanted, bytes)| {
            let bytes = bytes.get(..wanted.length.get() as usize).ok_or(LabelError::OutOfRange)?;
            dimm.write_labels(wanted.offset.get().into(), bytes)
        });
    only_status(written.map_or_else(|error| code(&error), |()| status::SUCCESS))
}
