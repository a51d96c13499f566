//! `_DSM` of a DIMM.
//!
//! A DIMM speaks one *family*, a set of functions under a vendor's UUID. This one speaks none yet, which ACPI
//! allows: Linux then has no label and no health commands for it (`acpi_nfit_add_dimm` in drivers/acpi/nfit/core.c)
//! and makes one namespace of the whole region.

use super::dsm::Request;
use super::unit::Unit;

/// Answers one call on the DIMM of a unit, which may have gone. `None`: this is no call of the device.
pub(super) fn call(_unit: Option<&Unit>, _request: &Request<'_>) -> Option<Vec<u8>> {
    None
}
