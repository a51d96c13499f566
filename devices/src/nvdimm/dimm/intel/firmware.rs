//! Functions 12 to 16, 29 and 30: another firmware is sent, checked and activated.
//!
//! The version of an image is its first eight bytes, little-endian; an image of less, with a gap, or of version 0 is
//! bad. It runs after the next power cycle, or once it is armed and the root device activates it.

use std::time::Duration;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::super::super::dsm::only_status;
use super::super::labels::TRANSFER;
use super::super::{Dimm, Failure};
use super::status;

/// Largest image in bytes.
const STORAGE: u32 = 1 << 20;
/// How often function 16 should be called, in microseconds.
const QUERY_INTERVAL: u32 = 250_000;
/// How long function 16 should be called at most, in microseconds.
const QUERY_MOST: u32 = 3_000_000;
/// Version of the interface: 1.5.
const INTERFACE: u32 = 0x0105;
/// How long an image is checked.
const CHECKING: Duration = Duration::from_secs(1);
/// How long the root device is busy after an activation.
const ACTIVATING: Duration = Duration::from_secs(1);

/// Extended status of function 13: another update has begun, or waits for its activation.
const BUSY_UPDATING: u32 = 0x1_0000 | status::EXTENDED;
/// Extended status of functions 14 to 16: this is not the context of the update.
const WRONG_CONTEXT: u32 = 0x1_0000 | status::EXTENDED;
/// Extended status of function 15: the update is over.
const DONE: u32 = 0x2_0000 | status::EXTENDED;
/// Extended status of functions 15 and 16: the image is bad.
const BAD_IMAGE: u32 = 0x3_0000 | status::EXTENDED;
/// Extended status of function 15: aborted, as asked for.
const ABORTED: u32 = 0x4_0000 | status::EXTENDED;
/// Extended status of function 16: the image is being checked.
const CHECKING_IMAGE: u32 = 0x2_0000 | status::EXTENDED;
/// Extended status of function 16: the image has not been finished.
const SEQUENCE_ERROR: u32 = 0x4_0000 | status::EXTENDED;

/// Firmware of a DIMM as long as it has power.
#[derive(Debug, Default)]
pub(in super::super) struct Session {
    context: u32,
    update: Update,
    armed: bool,
    result: Activation,
    /// Until when the last activation lasts.
    busy: Duration,
}

#[derive(Debug, Default)]
enum Update {
    #[default]
    None,
    Receiving {
        image: Vec<u8>,
        gap: bool,
    },
    Checking {
        version: u64,
        until: Duration,
    },
    Staged,
}

/// How the last activation went (`ND_INTEL_DIMM_FWA_*`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u16)]
enum Activation {
    #[default]
    None = 0,
    NotStaged = 1,
    Success = 2,
}

/// What the root device knows of a DIMM's activation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(in super::super::super) enum Activity {
    /// There is nothing to activate.
    Idle = 0,
    /// Staged firmware is armed.
    Armed = 1,
    /// An activation is under way.
    Busy = 2,
}

/// Output of function 12 (`struct nd_intel_fw_info`).
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Information {
    status: U32,
    storage: U32,
    transfer: U32,
    query_interval: U32,
    query_most: U32,
    capability: u8,
    reserved: [u8; 3],
    interface: U32,
    running: U64,
    staged: U64,
}
const _: () = assert!(size_of::<Information>() == 44);

/// Head of the input of function 14; the bytes follow.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Send {
    context: U32,
    offset: U32,
    length: U32,
}
const _: () = assert!(size_of::<Send>() == 12);

/// Input of function 15.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Finish {
    /// 0 finishes, 1 aborts.
    control: u8,
    reserved: [u8; 3],
    context: U32,
}
const _: () = assert!(size_of::<Finish>() == 8);

/// Output of function 29 (`struct nd_intel_fw_activate_dimminfo`).
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct ActivationOutput {
    status: U32,
    result: U16,
    state: u8,
    reserved: [u8; 7],
}
const _: () = assert!(size_of::<ActivationOutput>() == 14);

/// Function 12: what can be updated, and what runs.
pub(super) fn information(dimm: &Dimm) -> Vec<u8> {
    let record = dimm.record();
    let output = Information {
        status: status::SUCCESS.into(),
        storage: STORAGE.into(),
        transfer: TRANSFER.into(),
        query_interval: QUERY_INTERVAL.into(),
        query_most: QUERY_MOST.into(),
        capability: 0,
        reserved: [0; 3],
        interface: INTERFACE.into(),
        running: record.running,
        staged: record.staged,
    };
    output.as_bytes().to_vec()
}

/// Function 13: an update begins.
pub(super) fn start(dimm: &Dimm) -> Vec<u8> {
    dimm.with_firmware(|firmware| match firmware.update {
        Update::None => {
            firmware.context = firmware.context.wrapping_add(1);
            firmware.update = Update::Receiving { image: Vec::new(), gap: false };
            [status::SUCCESS, firmware.context].map(u32::to_le_bytes).concat()
        }
        _ => [BUSY_UPDATING, 0].map(u32::to_le_bytes).concat(),
    })
}

/// Function 14: a part of the image.
pub(super) fn send(dimm: &Dimm, input: &[u8]) -> Vec<u8> {
    let part = Send::read_from_prefix(input).ok().and_then(|(head, bytes)| {
        let bytes = bytes.get(..head.length.get() as usize)?;
        let end = head.offset.get().checked_add(head.length.get())?;
        (end <= STORAGE).then_some((head, bytes))
    });
    let Some((head, bytes)) = part else { return only_status(status::INVALID_PARAMETER) };
    only_status(dimm.with_firmware(|firmware| {
        let right = head.context.get() == firmware.context;
        let Update::Receiving { image, gap } = &mut firmware.update else { return WRONG_CONTEXT };
        if !right {
            return WRONG_CONTEXT;
        }
        let offset = head.offset.get() as usize;
        *gap |= offset > image.len();
        image.resize(image.len().max(offset + bytes.len()), 0);
        image[offset..offset + bytes.len()].copy_from_slice(bytes);
        status::SUCCESS
    }))
}

/// Function 15: the image is complete, or given up.
pub(super) fn finish(dimm: &Dimm, input: &[u8]) -> Vec<u8> {
    let now = dimm.now();
    let Ok((input, _)) = Finish::read_from_prefix(input) else {
        return only_status(status::INVALID_PARAMETER);
    };
    only_status(dimm.with_firmware(|firmware| {
        if let Update::Staged = firmware.update {
            return DONE;
        }
        let Update::Receiving { image, gap } = &firmware.update else { return WRONG_CONTEXT };
        if input.context.get() != firmware.context {
            return WRONG_CONTEXT;
        }
        let version = image.first_chunk().map_or(0, |version| u64::from_le_bytes(*version));
        let (update, status) = match input.control {
            0 if *gap || version == 0 => (Update::None, BAD_IMAGE),
            0 => (Update::Checking { version, until: now + CHECKING }, status::SUCCESS),
            1 => (Update::None, ABORTED),
            _ => return status::INVALID_PARAMETER,
        };
        firmware.update = update;
        status
    }))
}

/// Function 16: how the check of the image went, and its version.
pub(super) fn query(dimm: &Dimm, input: &[u8]) -> Vec<u8> {
    let now = dimm.now();
    let answer = |status: u32, version: u64| [&status.to_le_bytes()[..], &version.to_le_bytes()].concat();
    let Some(context) = input.first_chunk().map(|context| u32::from_le_bytes(*context)) else {
        return answer(status::INVALID_PARAMETER, 0);
    };
    let checked = dimm.with_firmware(|firmware| match firmware.update {
        _ if context != firmware.context => Err(WRONG_CONTEXT),
        Update::None => Ok(None),
        Update::Receiving { .. } => Err(SEQUENCE_ERROR),
        Update::Checking { until, .. } if now < until => Err(CHECKING_IMAGE),
        Update::Checking { version, .. } => Ok(Some(version)),
        Update::Staged => Ok(None),
    });
    match checked {
        Err(status) => answer(status, 0),
        Ok(None) => answer(status::SUCCESS, dimm.record().staged.get()),
        Ok(Some(version)) => {
            let staged = dimm.change(|record, _| {
                record.staged = version.into();
                Ok(())
            });
            match staged {
                Ok(()) => {
                    dimm.with_firmware(|firmware| firmware.update = Update::Staged);
                    answer(status::SUCCESS, version)
                }
                Err(Failure(status)) => answer(status, 0),
            }
        }
    }
}

/// Function 29: how an activation stands.
pub(super) fn activation(dimm: &Dimm) -> Vec<u8> {
    let (activity, result) = (activity(dimm), dimm.with_firmware(|firmware| firmware.result));
    let output = ActivationOutput {
        status: status::SUCCESS.into(),
        result: (result as u16).into(),
        state: activity as u8,
        reserved: [0; 7],
    };
    output.as_bytes().to_vec()
}

/// Function 30: staged firmware is to be activated, or not after all.
pub(super) fn arm(dimm: &Dimm, input: &[u8]) -> Vec<u8> {
    let staged = dimm.record().staged.get() != 0;
    only_status(dimm.with_firmware(|firmware| match input.first() {
        Some(0) => {
            firmware.armed = false;
            status::SUCCESS
        }
        Some(1) if staged => {
            firmware.armed = true;
            status::SUCCESS
        }
        Some(1) => {
            firmware.result = Activation::NotStaged;
            status::INVALID_STATE
        }
        _ => status::INVALID_PARAMETER,
    }))
}

/// How the activation of a DIMM stands.
pub(in super::super::super) fn activity(dimm: &Dimm) -> Activity {
    let now = dimm.now();
    dimm.with_firmware(|firmware| match firmware.armed {
        _ if now < firmware.busy => Activity::Busy,
        true => Activity::Armed,
        false => Activity::Idle,
    })
}

/// Lets the staged firmware of an armed DIMM run.
pub(in super::super::super) fn activate(dimm: &Dimm) -> Result<(), Failure> {
    let now = dimm.now();
    dimm.change(|record, _| {
        *record = record.clone().activated();
        Ok(())
    })?;
    dimm.with_firmware(|firmware| {
        let context = firmware.context;
        let (result, busy) = (Activation::Success, now + ACTIVATING);
        *firmware = Session { context, result, busy, ..Session::default() };
    });
    Ok(())
}
