//! `_DSM` of the NVDIMM root device (ACPI 6.5, 9.20.7).
//!
//! What is not said by the specification, and how it is answered here:
//! - Input of another size than the function's is "invalid input"; so is any address outside the unit's range,
//!   and with it every address once the unit has gone.
//!   Linux and ndctl send these sizes exactly, but for error injection ([`inject`]).
//! - A function that does not exist answers with the four bytes of "not supported". Another UUID or revision is
//!   no call of this device at all; AML then returns what ACPI 6.5, 9.1.1 says about an unknown `_DSM`.

use aconite_acpi::platform::mailbox::OUTPUT_MAX;
use aconite_acpi::platform::{EventTarget, FirmwareEvent, notify};

use super::dsm::{Request, Uuid, only_status, status, uuid};
use super::unit::Unit;
use super::{activation, ars, clear, inject, translate};
use crate::bus::{Effect, Effects};

/// UUID of the root device's functions.
pub(super) const UUID: Uuid =
    uuid(0x2f10_e7a4, 0x9e91, 0x11e4, [0x89, 0xd3, 0x12, 0x3b, 0x93, 0xf7, 0x5c, 0xba]);
/// The only revision.
pub(super) const REVISION: u32 = 1;

/// Functions of the root device.
pub(super) mod function {
    /// Which functions there are.
    pub(crate) const QUERY: u32 = 0;
    /// Query ARS capabilities.
    pub(crate) const ARS_CAPABILITIES: u32 = 1;
    /// Start address range scrub.
    pub(crate) const ARS_START: u32 = 2;
    /// Query ARS status.
    pub(crate) const ARS_STATUS: u32 = 3;
    /// Clear uncorrectable error.
    pub(crate) const CLEAR_ERROR: u32 = 4;
    /// Translate SPA.
    pub(crate) const TRANSLATE_SPA: u32 = 5;
    /// ARS error inject.
    pub(crate) const INJECT: u32 = 7;
    /// ARS error inject clear.
    pub(crate) const INJECT_CLEAR: u32 = 8;
    /// ARS error inject status query.
    pub(crate) const INJECT_STATUS: u32 = 9;
}

/// Bits of the functions that exist.
const MASK: u16 = 1 << function::QUERY
    | 1 << function::ARS_CAPABILITIES
    | 1 << function::ARS_START
    | 1 << function::ARS_STATUS
    | 1 << function::CLEAR_ERROR
    | 1 << function::TRANSLATE_SPA
    | 1 << function::INJECT
    | 1 << function::INJECT_CLEAR
    | 1 << function::INJECT_STATUS;

/// Answers one call on the root device of a unit, which may have gone. `None`: this is no call of the device.
pub(super) fn call(unit: Option<&Unit>, request: &Request<'_>, effects: &mut Effects) -> Option<Vec<u8>> {
    if request.uuid == activation::UUID {
        return activation::call(unit, request);
    }
    if request.uuid != UUID || request.revision != REVISION {
        return None;
    }
    let input = request.input;
    let output = match request.function {
        function::QUERY => MASK.to_le_bytes().to_vec(),
        function::ARS_CAPABILITIES => ars::capabilities(unit, input),
        function::ARS_START => ars::start(unit, input, effects),
        function::ARS_STATUS => ars::status(unit, input),
        function::CLEAR_ERROR => clear::clear(unit, input),
        function::TRANSLATE_SPA => translate::translate(unit, input),
        function::INJECT => {
            let (output, notify) = inject::inject(unit, input);
            if notify {
                let event = |unit: &Unit| FirmwareEvent {
                    target: EventTarget::Root(unit.slot()),
                    code: notify::UNCORRECTABLE_ERROR,
                };
                unit.into_iter().for_each(|unit| effects.push(Effect::Notify(event(unit))));
            }
            output
        }
        function::INJECT_CLEAR => inject::clear(unit, input),
        function::INJECT_STATUS => inject::status(unit),
        _ => only_status(status::NOT_SUPPORTED),
    };
    debug_assert!(output.len() as u64 <= OUTPUT_MAX);
    Some(output)
}
