//! The DIMM behind a memory device: from its description to the model of its firmware.

use std::path::PathBuf;
use std::sync::Arc;
use std::{fs, io};

use aconite_devices::nvdimm::{
    self, Dimm, DimmConfig, Forgetful, LABEL_AREA_MAX, LABEL_AREA_MIN, LABEL_AREA_SIZE, empty_area, has_index,
};
use thiserror::Error;

use crate::config::{Family, Labels, Pmem};

/// Why a DIMM could not be had.
#[derive(Debug, Error)]
pub enum DimmError {
    /// The file of labels cannot be read.
    #[error("Cannot read the labels in {path}; name a file that ndctl read-labels has written")]
    Labels {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The file of labels is too short or too long to be a label area.
    #[error(
        "{path} has {length} bytes, and a label area has {LABEL_AREA_MIN} to {LABEL_AREA_MAX}; name another file"
    )]
    LabelSize {
        /// The file.
        path: PathBuf,
        /// Its length in bytes.
        length: usize,
    },
}

/// Gives the DIMM of a device power.
pub fn power_on(pmem: &Pmem) -> Result<Arc<Dimm>, DimmError> {
    let family = match pmem.family {
        Family::Intel => nvdimm::Family::Intel,
        Family::Microsoft => nvdimm::Family::Microsoft,
        Family::None => nvdimm::Family::None,
    };
    let labels = match &pmem.labels {
        Labels::None => None,
        Labels::Kept => Some(vec![0; LABEL_AREA_SIZE]),
        Labels::Init => Some(initialized(vec![0; LABEL_AREA_SIZE])),
        Labels::File(path) => {
            let bytes = fs::read(path).map_err(|source| DimmError::Labels { path: path.clone(), source })?;
            if !(LABEL_AREA_MIN as usize..=LABEL_AREA_MAX).contains(&bytes.len()) {
                return Err(DimmError::LabelSize { path: path.clone(), length: bytes.len() });
            }
            Some(bytes)
        }
    };
    Ok(Arc::new(Dimm::new(DimmConfig { family, labels, keeper: Arc::new(Forgetful) })))
}

/// The area with an empty index, if it has none that Linux takes.
fn initialized(area: Vec<u8>) -> Vec<u8> {
    if has_index(&area) { area } else { empty_area(area.len()) }
}
