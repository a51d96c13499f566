//! Intel's family ("Intel Optane Persistent Memory Module DSM Interface", version 3; version 1.8 of what was NVDIMM
//! DSM Interface; `ND_INTEL_*` in ndctl and Linux).
//!
//! Linux asks function 0 at revision 1 for functions 1 to 10 and at revision 2 for the others, each by itself
//! (`nfit_dsm_revid` in drivers/acpi/nfit/core.c): both revisions answer alike here.

mod labels;

use super::super::dsm::{Request, Uuid, only_status, uuid};
use super::Dimm;

/// UUID of the family.
pub(in super::super) const UUID: Uuid =
    uuid(0x4309_ac30, 0x0d11, 0x11e4, [0x91, 0x91, 0x08, 0x00, 0x20, 0x0c, 0x9a, 0x66]);

/// Functions of the family.
pub(in super::super) mod function {
    /// Which functions there are.
    pub(crate) const QUERY: u32 = 0;
    /// Get size of the label area.
    pub(crate) const LABEL_SIZE: u32 = 4;
    /// Get label data.
    pub(crate) const LABEL_READ: u32 = 5;
    /// Set label data.
    pub(crate) const LABEL_WRITE: u32 = 6;
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
}

/// Answers one call on a DIMM. `None`: this is no call of the family.
pub(super) fn call(dimm: &Dimm, request: &Request<'_>) -> Option<Vec<u8>> {
    if request.uuid != UUID || !matches!(request.revision, 1 | 2) {
        return None;
    }
    let input = request.input;
    Some(match request.function {
        function::QUERY => mask(dimm).to_le_bytes().to_vec(),
        function::LABEL_SIZE => labels::size(dimm),
        function::LABEL_READ => labels::read(dimm, input),
        function::LABEL_WRITE => labels::write(dimm, input),
        _ => only_status(status::NOT_SUPPORTED),
    })
}

/// Bits of the functions that the DIMM has.
fn mask(dimm: &Dimm) -> u32 {
    let labels = 1 << function::LABEL_SIZE | 1 << function::LABEL_READ | 1 << function::LABEL_WRITE;
    let all = 1 << function::QUERY | labels;
    if dimm.label_size().is_ok() { all } else { all & !labels }
}
