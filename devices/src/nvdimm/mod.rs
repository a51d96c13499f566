//! NVDIMMs as firmware presents them: units that come and go, and the `_DSM` that Linux asks about their errors.
//!
//! A *unit* is what can be removed by itself: a container with its own NVDIMM root device, `_FIT` and DIMMs, which
//! provide ranges of system-physical addresses (SPA) alone or interleaved. AML does nothing of this; it copies arguments into the unit's
//! mailbox in guest RAM and rings the doorbell of [`Units`], which looks the unit up in the [`UnitTable`] and
//! answers there. A unit's errors are not kept here: they are the poison of its [`Media`], asked for each time,
//! so that what the guest is told, what its loads hit and what the API lists cannot disagree.
//!
//! Layout of the `_DSM` models: `root` is the NVDIMM root device with one module for each group of functions
//! (`ars`, `clear`, `translate`, `inject`) and `activation`, Intel's functions for firmware, `dimm` is the DIMM with one module for each family. Structures of the
//! interface are byte-exact types that name the section of the ACPI specification, asserted by their size.

mod activation;
mod ars;
mod clear;
mod dimm;
mod dsm;
mod fault;
mod flush;
mod inject;
mod interleave;
mod mailbox;
mod media;
mod registers;
mod root;
mod translate;
mod unit;

pub use ars::MAX_RECORDS as ARS_RECORDS_MAX;
pub use dimm::{
    Dimm, DimmConfig, Family, Forgetful, Keeper, LABEL_AREA_MAX, LABEL_AREA_MIN, LABEL_AREA_SIZE, NotKept,
    Record, empty_area, has_index,
};
pub use fault::{CallFault, Callee, Deed, PlannedFault};
pub use flush::FlushHint;
pub use interleave::{Interleave, Place, Share};
pub use media::Media;
pub use registers::Units;
pub use unit::{CLEAR_UNIT, Unit, UnitConfig, UnitError, UnitRange, UnitTable};

#[cfg(test)]
mod testing;
