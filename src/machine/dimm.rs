//! The DIMMs behind a memory device: from its description to the model of their firmware.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::{fs, io};

use aconite_devices::clock::Clock;
use aconite_devices::nvdimm::{
    self, Dimm, DimmConfig, Forgetful, Keeper, LABEL_AREA_MAX, LABEL_AREA_MIN, LABEL_AREA_SIZE, NotKept,
    Record, empty_area, has_index,
};
use thiserror::Error;

use crate::config::{Family, Labels, Pmem};
use crate::memory::{GuardError, PoisonKeeper, PoisonMap, Region};
use crate::sidefile::{Change, Content, SideFile, SideFileError};

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
    /// What the device begins with cannot be kept.
    #[error(transparent)]
    NotKept(NotKept),
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

/// Where the state of a device is kept.
#[derive(Clone, Debug)]
pub enum Kept {
    /// In its side file.
    Beside(Arc<SideFile>),
    /// Nowhere: the device begins with this, and its state lives as long as the machine.
    Here(Content),
}

impl Kept {
    /// The state of a device whose bytes are in `file`, of `size` bytes and made just now if it is `new`.
    pub fn of_file(file: &Path, size: u64, readonly: bool, new: bool) -> Result<Self, SideFileError> {
        Ok(match readonly {
            true => Self::Here(SideFile::read(file, size)?),
            false => Self::Beside(Arc::new(SideFile::open(file, size, new)?)),
        })
    }

    /// Poisons what was poisoned in the last run, and keeps changes from now on. No vCPU has reached the region yet;
    /// `limit` is that of [`Region::poison`].
    pub fn restore_poison(&self, region: &Region, limit: usize) -> Result<(), GuardError> {
        let before: Vec<_> = self.content().poison.iter().collect();
        region.poison(&before, limit)?;
        if let Self::Beside(file) = self {
            region.keep_with(Arc::new(PoisonBeside(file.clone())));
        }
        Ok(())
    }

    /// What is kept now.
    pub fn content(&self) -> Content {
        match self {
            Self::Beside(file) => file.content(),
            Self::Here(content) => content.clone(),
        }
    }
}

/// Keeps the state of a DIMM in a side file.
#[derive(Debug)]
struct Beside {
    file: Arc<SideFile>,
    /// The DIMM's number there.
    dimm: u32,
    label_size: u64,
}

impl Keeper for Beside {
    fn labels(&self, offset: u64, bytes: &[u8]) -> Result<(), NotKept> {
        let change = Change::Labels { dimm: self.dimm, size: self.label_size, offset, bytes: bytes.to_vec() };
        Ok(self.file.keep(&change)?)
    }

    fn record(&self, record: &Record) -> Result<(), NotKept> {
        Ok(self.file.keep(&Change::Dimm { dimm: self.dimm, record: Box::new(record.clone()) })?)
    }
}

/// Keeps the poison of a region in a side file.
#[derive(Debug)]
struct PoisonBeside(Arc<SideFile>);

impl PoisonKeeper for PoisonBeside {
    fn keep(&self, poison: &PoisonMap) -> io::Result<()> {
        self.0.keep_poison(&poison.iter().collect())
    }
}

/// Gives a DIMM of a device power: the one with this number among those that the device keeps.
pub fn power_on(pmem: &Pmem, kept: &Kept, dimm: u32, clock: Clock) -> Result<Arc<Dimm>, DimmError> {
    let family = match pmem.family {
        Family::Intel => nvdimm::Family::Intel,
        Family::Microsoft => nvdimm::Family::Microsoft,
        Family::None => nvdimm::Family::None,
    };
    let content = kept.content().dimm(dimm);
    let before = content.labels.unwrap_or_else(|| vec![0; LABEL_AREA_SIZE]);
    let labels = match &pmem.labels {
        Labels::None => None,
        Labels::Kept => Some(before.clone()),
        Labels::Init => Some(if has_index(&before) { before.clone() } else { empty_area(before.len()) }),
        Labels::File(path) => Some(read_labels(path)?),
    };
    let keeper: Arc<dyn Keeper> = match kept {
        Kept::Here(_) => Arc::new(Forgetful),
        Kept::Beside(file) => {
            let label_size = labels.as_ref().map_or(0, |area| area.len() as u64);
            let keeper = Beside { file: file.clone(), dimm, label_size };
            if let Some(area) = labels.as_ref().filter(|area| **area != before) {
                keeper.labels(0, area).map_err(DimmError::NotKept)?;
            }
            Arc::new(keeper)
        }
    };
    let record = content.record.unwrap_or_default();
    Ok(Arc::new(Dimm::new(DimmConfig { family, labels, record, keeper, clock }).map_err(DimmError::NotKept)?))
}

fn read_labels(path: &Path) -> Result<Vec<u8>, DimmError> {
    let bytes = fs::read(path).map_err(|source| DimmError::Labels { path: path.to_owned(), source })?;
    if (LABEL_AREA_MIN as usize..=LABEL_AREA_MAX).contains(&bytes.len()) {
        Ok(bytes)
    } else {
        Err(DimmError::LabelSize { path: path.to_owned(), length: bytes.len() })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::sidefile::DimmContent;
    use crate::units::{GIB, Size};

    fn power_on(pmem: &Pmem, kept: &Kept) -> Result<Arc<Dimm>, DimmError> {
        super::power_on(pmem, kept, 0, Arc::new(|| Duration::ZERO))
    }

    fn pmem(labels: Labels) -> Pmem {
        Pmem { labels, ..Pmem::memory("p0", Size(GIB)) }
    }

    #[test]
    fn labels_begin_as_asked_for() {
        let nothing = Kept::Here(Content::default());
        let area = |labels| power_on(&pmem(labels), &nothing).unwrap().labels();
        assert_eq!(area(Labels::None), None);
        assert_eq!(area(Labels::Kept), Some(vec![0; LABEL_AREA_SIZE]));
        assert_eq!(area(Labels::Init), Some(empty_area(LABEL_AREA_SIZE)));
        let mut used = empty_area(4096);
        used[1024..1030].copy_from_slice(b"labels");
        let dimms = vec![DimmContent { labels: Some(used.clone()), record: None }];
        let kept = Kept::Here(Content { dimms, ..Content::default() });
        for labels in [Labels::Kept, Labels::Init] {
            assert_eq!(power_on(&pmem(labels), &kept).unwrap().labels(), Some(used.clone()));
        }
    }

    #[test]
    fn labels_of_a_file_are_its_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("labels");
        let area = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            power_on(&pmem(Labels::File(path.clone())), &Kept::Here(Content::default()))
        };
        assert_eq!(area(&[7; 2048]).unwrap().labels(), Some(vec![7; 2048]));
        let error = area(&[7; 1000]).unwrap_err().to_string();
        assert!(error.contains("has 1000 bytes, and a label area has 1024 to 4194304"), "{error}");
        fs::remove_file(&path).unwrap();
        let gone = power_on(&pmem(Labels::File(path)), &Kept::Here(Content::default())).unwrap_err();
        assert!(matches!(gone, DimmError::Labels { .. }), "{gone}");
    }

    #[test]
    fn an_index_is_kept_at_once_and_untouched_labels_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("p0.img");
        let kept = Kept::of_file(&file, GIB, false, true).unwrap();
        power_on(&pmem(Labels::Kept), &kept).unwrap();
        assert!(!SideFile::path_of(&file).exists());
        power_on(&pmem(Labels::Init), &kept).unwrap();
        let again = Kept::of_file(&file, GIB, true, false).unwrap();
        assert_eq!(again.content().dimm(0).labels, Some(empty_area(LABEL_AREA_SIZE)));
    }
}
