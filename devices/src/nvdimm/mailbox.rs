//! The mailbox of a unit in guest RAM: how a request is read and a reply written.
//!
//! The guest can write anything there at any time, also while a call runs. So the head is copied once, then the
//! input with the length that the copy names, and nothing is looked at twice.

use aconite_acpi::layout::mailbox_base;
use aconite_acpi::platform::mailbox::{INPUT, INPUT_MAX, OUTPUT_MAX, RESULT, RESULT_OK, RESULT_UNSUPPORTED};
use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::dsm::{Request, Uuid};
use crate::dma::{Dma, DmaError};

/// Head of the request half ([`aconite_acpi::platform::mailbox`]).
#[derive(Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct RequestHead {
    pub(super) call: U32,
    pub(super) uuid: Uuid,
    pub(super) revision: U32,
    pub(super) function: U32,
    pub(super) input_length: U32,
}
const _: () = assert!(size_of::<RequestHead>() as u64 == INPUT);

/// Head of the reply half ([`aconite_acpi::platform::mailbox`]).
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct ReplyHead {
    result: U32,
    output_length: U32,
}
const _: () = assert!(size_of::<ReplyHead>() == 8);

/// A copy of the request in a mailbox.
pub(super) struct Call {
    head: RequestHead,
    input: Vec<u8>,
}

impl Call {
    /// Copies the request of `unit`. `None` if it claims more input than there is room for.
    ///
    /// # Errors
    /// If the part of the mailbox that the request occupies is not memory, or poisoned.
    pub(super) fn read(dma: &Dma, unit: u32) -> Result<Option<Self>, DmaError> {
        let (view, base) = (dma.view(), mailbox_base(unit));
        let mut head = RequestHead::default();
        view.read(base, head.as_mut_bytes())?;
        let length = head.input_length.get();
        if u64::from(length) > INPUT_MAX {
            return Ok(None);
        }
        let mut input = vec![0; length as usize];
        view.read(base + INPUT, &mut input)?;
        Ok(Some(Self { head, input }))
    }

    /// The call code.
    pub(super) fn code(&self) -> u32 {
        self.head.call.get()
    }

    /// The arguments, if the call is a `_DSM`.
    pub(super) fn request(&self) -> Request<'_> {
        Request {
            uuid: self.head.uuid,
            revision: self.head.revision.get(),
            function: self.head.function.get(),
            input: &self.input,
        }
    }
}

/// Writes the reply of `unit`: "unsupported" for `None`, and for output that does not fit.
///
/// If the output cannot be written because of poison, "unsupported" is tried in its place, which needs only the
/// head. If that is poisoned too, the guest meets the poison itself when it reads the reply.
///
/// # Errors
/// If nothing could be written.
pub(super) fn reply(dma: &Dma, unit: u32, output: Option<&[u8]>) -> Result<(), DmaError> {
    let (view, base) = (dma.view(), mailbox_base(unit) + RESULT);
    let output = output.filter(|output| output.len() as u64 <= OUTPUT_MAX);
    if let Some(output) = output {
        let head = ReplyHead { result: RESULT_OK.into(), output_length: (output.len() as u32).into() };
        match view.write(base, &[head.as_bytes(), output].concat()) {
            Ok(()) => return Ok(()),
            Err(error) => tracing::debug!(unit, %error, "Reply does not reach the mailbox"),
        }
    }
    let head = ReplyHead { result: RESULT_UNSUPPORTED.into(), output_length: 0.into() };
    view.write(base, head.as_bytes())
}
