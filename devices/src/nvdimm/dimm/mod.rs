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
mod record;

use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

#[cfg(test)]
pub(super) use self::intel::UUID as INTEL;
pub(super) use self::intel::firmware::{Activity, activate, activity};
pub(super) use self::intel::{Answer, function};
pub use self::keeper::{Forgetful, Keeper, NotKept};
use self::labels::LabelError;
pub use self::labels::{LABEL_AREA_MAX, LABEL_AREA_SIZE};
// Input and output of the label methods are as `aconite_acpi::platform::Call` describes them.
use self::intel::{firmware, security};
pub(super) use self::methods::{label_information, label_read, label_write};
pub use self::namespace_index::{MIN_SIZE as LABEL_AREA_MIN, empty_area, has_index};
pub use self::record::Record;
use super::dsm::Request;
use crate::bus::lock;
use crate::clock::Clock;

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
#[derive(Clone)]
pub struct DimmConfig {
    /// Its functions.
    pub family: Family,
    /// Content of its label area, if it has one.
    pub labels: Option<Vec<u8>>,
    /// What it remembers beside them.
    pub record: Record,
    /// Where its state is kept.
    pub keeper: Arc<dyn Keeper>,
    /// The time, for what takes some.
    pub clock: Clock,
}

/// A DIMM with power.
pub struct Dimm {
    family: Family,
    keeper: Arc<dyn Keeper>,
    clock: Clock,
    state: Mutex<State>,
}

struct State {
    labels: Option<Vec<u8>>,
    record: Record,
    security: security::Session,
    firmware: firmware::Session,
}

/// The status with which a function of the Intel family fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Failure(pub(super) u32);

impl From<u32> for Failure {
    fn from(status: u32) -> Self {
        Self(status)
    }
}

/// Fills all that the DIMM holds with zeros; false if that did not succeed.
pub(super) type Erase<'a> = &'a dyn Fn() -> bool;

impl Dimm {
    /// Gives a DIMM power.
    ///
    /// # Errors
    /// If what it learns of its last shutdown cannot be kept.
    pub fn new(config: DimmConfig) -> Result<Self, NotKept> {
        let DimmConfig { family, labels, record: before, keeper, clock } = config;
        let record = before.clone().powered_on();
        if record != before {
            keeper.record(&record)?;
        }
        let security = security::Session::new(&record);
        let state = State { labels, record, security, firmware: firmware::Session::default() };
        Ok(Self { family, keeper, clock, state: Mutex::new(state) })
    }

    /// Announces the loss of power: it is safe.
    ///
    /// # Errors
    /// If that cannot be kept.
    pub fn power_off(&self) -> Result<(), NotKept> {
        let mut state = lock(&self.state);
        if state.record.latch != 0 {
            state.record.latch = 0;
            self.keeper.record(&state.record)?;
        }
        Ok(())
    }

    /// A copy of the label area, if there is one.
    pub fn labels(&self) -> Option<Vec<u8>> {
        lock(&self.state).labels.clone()
    }

    /// What it remembers.
    pub fn record(&self) -> Record {
        lock(&self.state).record.clone()
    }

    /// Whether it lets nobody at its labels and its data before it is given its passphrase.
    pub fn locked(&self) -> bool {
        lock(&self.state).security.locked
    }

    /// Whether it has a passphrase.
    pub fn secured(&self) -> bool {
        lock(&self.state).record.secured != 0
    }

    fn now(&self) -> Duration {
        (self.clock)()
    }

    fn security(&self) -> (Record, security::Session) {
        let state = lock(&self.state);
        (state.record.clone(), state.security.clone())
    }

    fn with_firmware<T>(&self, work: impl FnOnce(&mut firmware::Session) -> T) -> T {
        work(&mut lock(&self.state).firmware)
    }

    /// Changes what the DIMM remembers, which is kept when this returns; after a failure nothing has changed.
    fn change<T>(
        &self,
        change: impl FnOnce(&mut Record, &mut security::Session) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let mut state = lock(&self.state);
        let (mut record, mut security) = (state.record.clone(), state.security.clone());
        let done = change(&mut record, &mut security)?;
        if record != state.record {
            self.keeper.record(&record).map_err(|error| {
                tracing::error!(%error, "A change of a DIMM is refused");
                Failure(intel::status::HARDWARE_ERROR)
            })?;
        }
        (state.record, state.security) = (record, security);
        Ok(done)
    }

    fn has_labels(&self) -> bool {
        lock(&self.state).labels.is_some()
    }

    /// Size of the label area in bytes.
    fn label_size(&self) -> Result<u32, LabelError> {
        let mut state = lock(&self.state);
        Ok(state.open_labels()?.len() as u32)
    }

    fn read_labels(&self, offset: u64, length: u64) -> Result<Vec<u8>, LabelError> {
        let mut state = lock(&self.state);
        let area = state.open_labels()?;
        Ok(area[labels::range(area.len(), offset, length)?].to_vec())
    }

    /// Writes to the label area; the bytes are kept when this returns.
    fn write_labels(&self, offset: u64, bytes: &[u8]) -> Result<(), LabelError> {
        let mut state = lock(&self.state);
        let area = state.open_labels()?;
        let range = labels::range(area.len(), offset, bytes.len() as u64)?;
        self.keeper.labels(offset, bytes)?;
        area[range].copy_from_slice(bytes);
        Ok(())
    }

    /// Fills the label area with zeros, locked or not.
    fn clear_labels(&self) -> Result<(), Failure> {
        let mut state = lock(&self.state);
        if let Some(area) = &mut state.labels {
            let zeros = vec![0; area.len()];
            self.keeper.labels(0, &zeros).map_err(|_| Failure(intel::status::HARDWARE_ERROR))?;
            *area = zeros;
        }
        Ok(())
    }

    /// Answers a `_DSM` call on the DIMM. `None`: this is no call of the device.
    pub(super) fn dsm(&self, erase: Erase<'_>, request: &Request<'_>) -> Option<Answer> {
        match self.family {
            Family::Intel => intel::call(self, erase, request),
            Family::Microsoft => methods::microsoft(request).map(|output| Answer { output, alarm: false }),
            Family::None => None,
        }
    }
}

impl State {
    /// The label area, unless it is locked.
    fn open_labels(&mut self) -> Result<&mut Vec<u8>, LabelError> {
        match &mut self.labels {
            None => Err(LabelError::NoArea),
            Some(_) if self.security.locked => Err(LabelError::Locked),
            Some(area) => Ok(area),
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
