//! `_DSM` of the NVDIMM root device (ACPI 6.5, 9.20.7).
//!
//! What is not said by the specification, and how it is answered here:
//! - Input of another size than the function's is "invalid input"; so is any address outside the unit's range,
//!   and with it every address once the unit has gone.
//!   Linux and ndctl send these sizes exactly. (They will not for error injection: ndctl gives function 7 twenty
//!   bytes for seventeen and function 9 eight for none, `ndctl_bus_cmd_new_err_inj` in ndctl/lib/nfit.c.)
//! - A function that does not exist answers with the four bytes of "not supported". Another UUID or revision is
//!   no call of this device at all; AML then returns what ACPI 6.5, 9.1.1 says about an unknown `_DSM`.

use aconite_acpi::platform::mailbox::OUTPUT_MAX;

use super::dsm::{Request, Uuid, only_status, status, uuid};
use super::unit::Unit;
use super::{ars, clear, translate};

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
}

/// Bits of the functions that exist.
const MASK: u8 = 1 << function::QUERY
    | 1 << function::ARS_CAPABILITIES
    | 1 << function::ARS_START
    | 1 << function::ARS_STATUS
    | 1 << function::CLEAR_ERROR
    | 1 << function::TRANSLATE_SPA;

/// Answers one call on the root device of a unit, which may have gone. `None`: this is no call of the device.
pub(super) fn call(unit: Option<&Unit>, request: &Request<'_>) -> Option<Vec<u8>> {
    if request.uuid != UUID || request.revision != REVISION {
        return None;
    }
    let input = request.input;
    let output = match request.function {
        function::QUERY => vec![MASK],
        function::ARS_CAPABILITIES => ars::capabilities(unit, input),
        function::ARS_START => ars::start(unit, input),
        function::ARS_STATUS => ars::status(unit, input),
        function::CLEAR_ERROR => clear::clear(unit, input),
        function::TRANSLATE_SPA => translate::translate(unit, input),
        _ => only_status(status::NOT_SUPPORTED),
    };
    debug_assert!(output.len() as u64 <= OUTPUT_MAX);
    Some(output)
}
