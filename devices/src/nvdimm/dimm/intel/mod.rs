//! Intel's family ("Intel Optane Persistent Memory Module DSM Interface", version 3; version 1.8 of what was NVDIMM
//! DSM Interface; `ND_INTEL_*` in ndctl and Linux).
//!
//! Linux asks function 0 at revision 1 for functions 1 to 10 and at revision 2 for the others, each by itself
//! (`nfit_dsm_revid` in drivers/acpi/nfit/core.c): both revisions answer alike here.

pub(super) mod firmware;
mod labels;
pub(super) mod security;
mod smart;

use super::super::dsm::{Request, Uuid, only_status, uuid};
use super::{Dimm, Erase};

/// UUID of the family.
pub(in super::super) const UUID: Uuid =
    uuid(0x4309_ac30, 0x0d11, 0x11e4, [0x91, 0x91, 0x08, 0x00, 0x20, 0x0c, 0x9a, 0x66]);

/// Functions of the family.
pub(in super::super) mod function {
    /// Which functions there are.
    pub(crate) const QUERY: u32 = 0;
    /// Get SMART and health information.
    pub(crate) const HEALTH: u32 = 1;
    /// Get SMART thresholds.
    pub(crate) const THRESHOLDS: u32 = 2;
    /// Get size of the label area.
    pub(crate) const LABEL_SIZE: u32 = 4;
    /// Get label data.
    pub(crate) const LABEL_READ: u32 = 5;
    /// Set label data.
    pub(crate) const LABEL_WRITE: u32 = 6;
    /// Enable latching of the system shutdown status.
    pub(crate) const LATCH: u32 = 10;
    /// Get firmware information.
    pub(crate) const FIRMWARE: u32 = 12;
    /// Start a firmware update.
    pub(crate) const FIRMWARE_START: u32 = 13;
    /// Send firmware data.
    pub(crate) const FIRMWARE_SEND: u32 = 14;
    /// Finish a firmware update.
    pub(crate) const FIRMWARE_FINISH: u32 = 15;
    /// Query a finished firmware update.
    pub(crate) const FIRMWARE_QUERY: u32 = 16;
    /// Set SMART thresholds.
    pub(crate) const SET_THRESHOLDS: u32 = 17;
    /// Inject health.
    pub(crate) const INJECT: u32 = 18;
    /// Get the security state.
    pub(crate) const SECURITY: u32 = 19;
    /// Set the passphrase.
    pub(crate) const SET_PASSPHRASE: u32 = 20;
    /// Disable the passphrase.
    pub(crate) const DISABLE_PASSPHRASE: u32 = 21;
    /// Unlock.
    pub(crate) const UNLOCK: u32 = 22;
    /// Freeze the security state.
    pub(crate) const FREEZE: u32 = 23;
    /// Secure erase.
    pub(crate) const SECURE_ERASE: u32 = 24;
    /// Overwrite.
    pub(crate) const OVERWRITE: u32 = 25;
    /// Query overwriting.
    pub(crate) const QUERY_OVERWRITE: u32 = 26;
    /// Set the master passphrase.
    pub(crate) const SET_MASTER: u32 = 27;
    /// Secure erase by the master passphrase.
    pub(crate) const MASTER_ERASE: u32 = 28;
    /// Get the state of firmware activation.
    pub(crate) const ACTIVATION: u32 = 29;
    /// Arm firmware activation.
    pub(crate) const ARM: u32 = 30;
}

/// Low half of the status that each function returns first; the high half is of the function's own.
pub(super) mod status {
    /// Success.
    pub(crate) const SUCCESS: u32 = 0;
    /// The function is not supported.
    pub(crate) const NOT_SUPPORTED: u32 = 1;
    /// An input parameter is invalid.
    pub(crate) const INVALID_PARAMETER: u32 = 3;
    /// Hardware error.
    pub(crate) const HARDWARE_ERROR: u32 = 4;
    /// The high half says what it is.
    pub(crate) const EXTENDED: u32 = 7;
    /// The DIMM is in a security state that forbids it.
    pub(crate) const INVALID_STATE: u32 = 10;
    /// The passphrase is wrong.
    pub(crate) const INVALID_PASSPHRASE: u32 = 11;
}

/// The answer to a call, and whether the OS is to be told that the health has changed.
pub(in super::super) struct Answer {
    pub(in super::super) output: Vec<u8>,
    pub(in super::super) alarm: bool,
}

/// Answers one call on a DIMM, whose data `erase` erases. `None`: this is no call of the family.
pub(super) fn call(dimm: &Dimm, erase: Erase<'_>, request: &Request<'_>) -> Option<Answer> {
    if request.uuid != UUID || !matches!(request.revision, 1 | 2) {
        return None;
    }
    let input = request.input;
    let output = match request.function {
        function::SET_THRESHOLDS | function::INJECT => {
            let (output, alarm) = match request.function {
                function::SET_THRESHOLDS => smart::set_thresholds(dimm, input),
                _ => smart::inject(dimm, input),
            };
            return Some(Answer { output, alarm });
        }
        function::QUERY => mask(dimm).to_le_bytes().to_vec(),
        function::HEALTH => smart::health(dimm),
        function::THRESHOLDS => smart::thresholds(dimm),
        function::LABEL_SIZE => labels::size(dimm),
        function::LABEL_READ => labels::read(dimm, input),
        function::LABEL_WRITE => labels::write(dimm, input),
        function::LATCH => smart::latch(dimm, input),
        function::FIRMWARE => firmware::information(dimm),
        function::FIRMWARE_START => firmware::start(dimm),
        function::FIRMWARE_SEND => firmware::send(dimm, input),
        function::FIRMWARE_FINISH => firmware::finish(dimm, input),
        function::FIRMWARE_QUERY => firmware::query(dimm, input),
        function::SECURITY => security::state(dimm),
        function::QUERY_OVERWRITE => security::query_overwrite(dimm),
        number @ function::SET_PASSPHRASE..=function::MASTER_ERASE => {
            security::change(dimm, erase, number, input)
        }
        function::ACTIVATION => firmware::activation(dimm),
        function::ARM => firmware::arm(dimm, input),
        _ => only_status(status::NOT_SUPPORTED),
    };
    Some(Answer { output, alarm: false })
}

/// Bits of the functions that the DIMM has: all but those for flags (3), the effect log (7, 8), what a vendor
/// defines (9) and modes of old DIMMs (11).
fn mask(dimm: &Dimm) -> u32 {
    let labels = 1 << function::LABEL_SIZE | 1 << function::LABEL_READ | 1 << function::LABEL_WRITE;
    let all = 0x7FFF_F477;
    if dimm.has_labels() { all } else { all & !labels }
}

#[cfg(test)]
#[path = "intel_test.rs"]
mod tests;
