//! ACPI's own label methods (ACPI 6.5, 6.5.10), and the function of Microsoft's family that makes Linux use them.

use aconite_acpi::platform::label_status;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::super::dsm::{Request, Uuid, only_status, status, uuid};
use super::Dimm;
use super::labels::{LabelError, TRANSFER};

/// UUID of Microsoft's family (`UUID_NFIT_DIMM_N_MSFT` in Linux).
pub(super) const MICROSOFT: Uuid =
    uuid(0x1ee6_8b36, 0xd4bd, 0x4a1a, [0x9a, 0x16, 0x4f, 0x8e, 0x53, 0xd4, 0x6e, 0x05]);
/// The only function of Microsoft's family: which there are.
const MASK: u8 = 1 << 0;

/// Offset and length before the bytes of a transfer.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Transfer {
    offset: U64,
    length: U64,
}
const _: () = assert!(size_of::<Transfer>() == 16);

/// Output of `_LSI`.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Information {
    status: U32,
    size: U32,
    transfer: U32,
}
const _: () = assert!(size_of::<Information>() == 12);

/// Answers a `_DSM` call of Microsoft's family.
pub(super) fn microsoft(request: &Request<'_>) -> Option<Vec<u8>> {
    if request.uuid != MICROSOFT || request.revision != 1 {
        return None;
    }
    Some(match request.function {
        0 => vec![MASK],
        _ => only_status(status::NOT_SUPPORTED),
    })
}

fn code(error: &LabelError) -> u32 {
    match error {
        LabelError::OutOfRange => label_status::INVALID_INPUT,
        LabelError::Locked => label_status::LOCKED,
        LabelError::NoArea | LabelError::NotKept(_) => label_status::FAILURE,
    }
}

/// `_LSI` of a DIMM, which may have gone.
pub(in super::super) fn label_information(dimm: Option<&Dimm>) -> Vec<u8> {
    let size = dimm.ok_or(LabelError::NoArea).and_then(Dimm::label_size);
    let (status, size) = match size {
        Ok(size) => (label_status::SUCCESS, size),
        Err(error) => (code(&error), 0),
    };
    Information { status: status.into(), size: size.into(), transfer: TRANSFER.into() }.as_bytes().to_vec()
}

/// `_LSR` of a DIMM, which may have gone.
pub(in super::super) fn label_read(dimm: Option<&Dimm>, input: &[u8]) -> Vec<u8> {
    let bytes = Transfer::read_from_bytes(input)
        .map_err(|_| LabelError::OutOfRange)
        .and_then(|wanted| Ok((wanted, dimm.ok_or(LabelError::NoArea)?)))
        .and_then(|(wanted, dimm)| dimm.read_labels(wanted.offset.get(), wanted.length.get()));
    match bytes {
        Ok(bytes) => [only_status(label_status::SUCCESS), bytes].concat(),
        Err(error) => only_status(code(&error)),
    }
}

/// `_LSW` of a DIMM, which may have gone.
pub(in super::super) fn label_write(dimm: Option<&Dimm>, input: &[u8]) -> Vec<u8> {
    let written =
        Transfer::read_from_prefix(input).map_err(|_| LabelError::OutOfRange).and_then(|(wanted, bytes)| {
            let bytes = usize::try_from(wanted.length.get())
                .ok()
                .and_then(|length| bytes.get(..length))
                .ok_or(LabelError::OutOfRange)?;
            dimm.ok_or(LabelError::NoArea)?.write_labels(wanted.offset.get(), bytes)
        });
    only_status(written.map_or_else(|error| code(&error), |()| label_status::SUCCESS))
}
