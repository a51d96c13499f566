//! A DIMM: its label area and the calls of its `_DSM` and label methods.
//!
//! A DIMM speaks one *family*, a set of functions under a vendor's UUID. Linux tries the families that it knows, takes
//! the first that answers function 0, and without one uses neither labels nor health of the DIMM, not even by ACPI's
//! own label methods (`acpi_nfit_add_dimm` in drivers/acpi/nfit/core.c).

mod intel;
mod keeper;
mod labels;
mod methods;
mod namespace_index;

use std::fmt;
use std::sync::{Arc, Mutex};

#[cfg(test)]
pub(super) use self::intel::UUID as INTEL;
pub use self::keeper::{Forgetful, Keeper, NotKept};
use self::labels::LabelError;
pub use self::labels::{LABEL_AREA_MAX, LABEL_AREA_SIZE};
// Input and output of the label methods are as `aconite_acpi::platform::Call` describes them.
pub(super) use self::methods::{label_information, label_read, label_write};
pub use self::namespace_index::{MIN_SIZE as LABEL_AREA_MIN, empty_area, has_index};
use super::dsm::Request;
use crate::bus::lock;

/// The functions that a DIMM offers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Family {
    /// Intel's DSM interface, version 1.8, labels by its functions 4 to 6.
    #[default]
    Intel,
    /// Microsoft's, of which there is only function 0: it makes Linux use `_LSI`, `_LSR` and `_LSW`.
    Microsoft,
    /// None.
    None,
}

/// What a DIMM is made of.
#[derive(Clone, Debug)]
pub struct DimmConfig {
    /// Its functions.
    pub family: Family,
    /// Content of its label area, if it has one.
    pub labels: Option<Vec<u8>>,
    /// Where its state is kept.
    pub keeper: Arc<dyn Keeper>,
}

/// A DIMM with power.
pub struct Dimm {
    family: Family,
    keeper: Arc<dyn Keeper>,
    state: Mutex<State>,
}

struct State {
    labels: Option<Vec<u8>>,
}

impl Dimm {
    /// Gives a DIMM power.
    pub fn new(config: DimmConfig) -> Self {
        let DimmConfig { family, labels, keeper } = config;
        Self { family, keeper, state: Mutex::new(State { labels }) }
    }

    /// A copy of the label area, if there is one.
    pub fn labels(&self) -> Option<Vec<u8>> {
        lock(&self.state).labels.clone()
    }

    /// Size of the label area in bytes.
    fn label_size(&self) -> Result<u32, LabelError> {
        lock(&self.state).labels.as_ref().map(|area| area.len() as u32).ok_or(LabelError::NoArea)
    }

    fn read_labels(&self, offset: u64, length: u64) -> Result<Vec<u8>, LabelError> {
        let state = lock(&self.state);
        let area = state.labels.as_ref().ok_or(LabelError::NoArea)?;
        Ok(area[labels::range(area.len(), offset, length)?].to_vec())
    }

    /// Writes to the label area; the bytes are kept when this returns.
    fn write_labels(&self, offset: u64, bytes: &[u8]) -> Result<(), LabelError> {
        let mut state = lock(&self.state);
        let area = state.labels.as_mut().ok_or(LabelError::NoArea)?;
        let range = labels::range(area.len(), offset, bytes.len() as u64)?;
        self.keeper.labels(offset, bytes)?;
        area[range].copy_from_slice(bytes);
        Ok(())
    }

    /// Answers a `_DSM` call. `None`: this is no call of the device.
    pub(super) fn dsm(&self, request: &Request<'_>) -> Option<Vec<u8>> {
        match self.family {
            Family::Intel => intel::call(self, request),
            Family::Microsoft => methods::microsoft(request),
            Family::None => None,
        }
    }
}

impl fmt::Debug for Dimm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dimm").field("family", &self.family).finish_non_exhaustive()
    }
}

#[cfg(test)]
#[path = "dimm_test.rs"]
mod tests;
