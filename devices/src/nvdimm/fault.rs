//! Firmware that misbehaves on command: answers to chosen calls are failures, come late, or are not what they should be.
//!
//! A fault is planned for calls of one function, counted from its planning: the n-th, and as many after it. Several can
//! meet the same call. They belong to the unit and go with it.

use std::time::Duration;

use aconite_acpi::platform::{Call, mailbox::OUTPUT_MAX};

use super::activation;
use super::dimm::function as dimm;
use super::dsm::Request;
use super::root::function as root;

/// What is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Callee {
    /// `_DSM` of the root device with ACPI's UUID (ACPI 6.5, 9.20.7).
    Root,
    /// `_DSM` of the root device with Intel's UUID: activation of firmware.
    Activation,
    /// `_DSM` of a DIMM.
    Dimm,
    /// `_FIT`.
    Fit,
    /// `_LSI`.
    LabelInformation,
    /// `_LSR`.
    LabelRead,
    /// `_LSW`.
    LabelWrite,
}

impl Callee {
    /// Whom a call is to.
    pub(super) fn of(call: Call, request: &Request<'_>) -> Self {
        match call {
            Call::RootDsm if request.uuid == activation::UUID => Self::Activation,
            Call::RootDsm => Self::Root,
            Call::DimmDsm => Self::Dimm,
            Call::Fit => Self::Fit,
            Call::LabelInformation => Self::LabelInformation,
            Call::LabelRead => Self::LabelRead,
            Call::LabelWrite => Self::LabelWrite,
        }
    }

    /// Whether it has functions.
    pub const fn is_dsm(self) -> bool {
        matches!(self, Self::Root | Self::Activation | Self::Dimm)
    }

    /// Length of the answer of a function whose lists are empty.
    fn answer_length(self, function: u32, input: &[u8]) -> usize {
        let asked = |at: usize| {
            let word =
                input.get(at..at + 4).and_then(|word| word.try_into().ok()).map_or(0, u32::from_le_bytes);
            4usize.saturating_add(word as usize)
        };
        let length = match (self, function) {
            (Self::Root, root::ARS_CAPABILITIES | root::CLEAR_ERROR) => 16,
            (Self::Root, root::ARS_START | root::INJECT_STATUS) => 8,
            (Self::Root, root::ARS_STATUS) => 48,
            (Self::Root, root::TRANSLATE_SPA) => 20,
            (Self::Activation, 1) => 40,
            (Self::Dimm, dimm::HEALTH) => 132,
            (Self::Dimm, dimm::FIRMWARE) => 44,
            (Self::Dimm, dimm::THRESHOLDS | dimm::LABEL_SIZE | dimm::FIRMWARE_QUERY | dimm::SECURITY) => 12,
            (Self::Dimm, dimm::LABEL_READ) => asked(4),
            (Self::Dimm, dimm::FIRMWARE_START) => 8,
            (Self::Dimm, dimm::ACTIVATION) => 14,
            (Self::LabelInformation, _) => 12,
            (Self::LabelRead, _) => asked(8),
            _ => 4,
        };
        length.min(OUTPUT_MAX as usize)
    }
}

/// What becomes of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Deed {
    /// The function is not carried out. Its answer has its length, this status, and zeros.
    Status(u32),
    /// The answer is cut, or zeros are added, to this number of bytes, 4088 at most.
    Length(u32),
    /// These bytes take the place of those from an offset on, as far as the answer reaches.
    Bytes {
        /// The offset.
        offset: u32,
        /// The bytes.
        bytes: Vec<u8>,
    },
    /// The processor that calls stands still for this long, as in a firmware's system management mode.
    Delay(Duration),
}

/// A fault that is planned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CallFault {
    /// What is called.
    pub callee: Callee,
    /// The function of a `_DSM`; of no meaning for others.
    pub function: u32,
    /// The first call that it meets: 1 is the next.
    pub call: u64,
    /// How many calls it meets; `None` is all from then on.
    pub count: Option<u64>,
    /// What it does.
    pub deed: Deed,
}

/// A fault, and how often it has met a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlannedFault {
    /// The fault.
    pub fault: CallFault,
    /// Calls that it has met.
    pub met: u64,
    seen: u64,
}

impl PlannedFault {
    /// A fault that has met nothing yet.
    pub(super) fn new(fault: CallFault) -> Self {
        Self { fault, met: 0, seen: 0 }
    }

    /// Counts a call, and says whether the fault meets it.
    pub(super) fn meets(&mut self, callee: Callee, function: u32) -> bool {
        let fault = &self.fault;
        if fault.callee != callee || (callee.is_dsm() && fault.function != function) {
            return false;
        }
        self.seen = self.seen.saturating_add(1);
        let meets = self.seen >= fault.call && fault.count.is_none_or(|count| self.met < count);
        self.met += u64::from(meets);
        meets
    }
}

/// The answer that a failing function gives, if one of `deeds` makes it fail.
pub(super) fn failure(deeds: &[Deed], callee: Callee, request: &Request<'_>) -> Option<Vec<u8>> {
    let status = deeds.iter().find_map(|deed| match deed {
        Deed::Status(status) => Some(*status),
        _ => None,
    })?;
    let mut output = vec![0; callee.answer_length(request.function, request.input)];
    output[..4].copy_from_slice(&status.to_le_bytes());
    Some(output)
}

/// Makes of an answer what `deeds` want; how long the caller waits for it.
pub(super) fn distort(deeds: &[Deed], output: &mut Vec<u8>) -> Duration {
    let mut delay = Duration::ZERO;
    for deed in deeds {
        match deed {
            Deed::Status(_) => {}
            Deed::Length(length) => output.resize((*length as usize).min(OUTPUT_MAX as usize), 0),
            Deed::Bytes { offset, bytes } => {
                let places = output.iter_mut().skip(*offset as usize);
                places.zip(bytes).for_each(|(place, byte)| *place = *byte);
            }
            Deed::Delay(time) => delay = delay.saturating_add(*time),
        }
    }
    delay
}

#[cfg(test)]
#[path = "fault_test.rs"]
mod tests;
