//! Error records of the guest's firmware (ERST) in the state directory, a document for each.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::sync::Arc;

use aconite_devices::dma::Dma;
use aconite_devices::erst::{Erst, KeepError, Keeper, Volatile, record_id};

use crate::state::{Format, State, StateError};

const PREFIX: &str = "erst-";
const FORMAT: Format = Format { kind: "error-record", version: 1 };

fn name(id: u64) -> String {
    format!("{PREFIX}{id:016x}.record")
}

/// The firmware's store, with its error log address range behind `dma`. Without a state directory the records go with
/// the machine.
///
/// # Errors
/// A record in the directory is damaged, or cannot be read: it is named.
pub fn store(dma: Dma, state: Option<&Arc<State>>) -> Result<Erst, StateError> {
    let Some(state) = state else { return Ok(Erst::new(dma, BTreeMap::new(), Box::new(Volatile))) };
    Ok(Erst::new(dma, load(state)?, Box::new(StateKeeper { state: state.clone() })))
}

/// The records that the directory has, by their identifiers.
fn load(state: &State) -> Result<BTreeMap<u64, Vec<u8>>, StateError> {
    let mut records = BTreeMap::new();
    for file in state.names(PREFIX)? {
        let Some(record) = state.read(&file, FORMAT)? else { continue };
        match record_id(&record) {
            Some(id) if name(id) == file => {
                records.insert(id, record);
            }
            _ => return Err(state.foreign(&file)),
        }
    }
    Ok(records)
}

/// Keeps records in the state directory.
#[derive(Debug)]
struct StateKeeper {
    state: Arc<State>,
}

impl Keeper for StateKeeper {
    fn keep(&mut self, id: u64, record: &[u8]) -> Result<(), KeepError> {
        self.state.write(&name(id), FORMAT, record).map_err(|error| failed(&error))
    }

    fn forget(&mut self, id: u64) -> Result<(), KeepError> {
        self.state.remove(&name(id)).map_err(|error| failed(&error))
    }
}

fn failed(error: &StateError) -> KeepError {
    tracing::error!(error = super::chain(error), "an error record of the guest cannot be kept");
    match error {
        StateError::File { source, .. }
            if matches!(source.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded) =>
        {
            KeepError::NoSpace
        }
        _ => KeepError::Unavailable,
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::state::{Damage, Locking};

    fn open(dir: &Path) -> Arc<State> {
        Arc::new(State::open(dir, Locking::Here).unwrap())
    }

    fn record(id: u64) -> Vec<u8> {
        let mut bytes = vec![0; 200];
        bytes[..4].copy_from_slice(b"CPER");
        bytes[20..24].copy_from_slice(&200u32.to_le_bytes());
        bytes[96..104].copy_from_slice(&id.to_le_bytes());
        bytes
    }

    #[test]
    fn records_come_back() {
        let dir = tempfile::tempdir().unwrap();
        let mut keeper = StateKeeper { state: open(dir.path()) };
        assert!(load(&keeper.state).unwrap().is_empty());
        for id in [1, u64::MAX - 1, 0x6911_2233_0000_0001] {
            keeper.keep(id, &record(id)).unwrap();
        }
        keeper.forget(1).unwrap();
        drop(keeper);
        let records = load(&open(dir.path())).unwrap();
        assert_eq!(records.keys().copied().collect::<Vec<_>>(), [0x6911_2233_0000_0001, u64::MAX - 1]);
        assert!(records.iter().all(|(id, bytes)| *bytes == record(*id)));
    }

    #[test]
    fn a_damaged_or_foreign_record_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let state = open(dir.path());
        StateKeeper { state: state.clone() }.keep(5, &record(5)).unwrap();
        let (five, six) = (dir.path().join(name(5)), dir.path().join(name(6)));
        std::fs::copy(&five, &six).unwrap();
        let error = load(&state).unwrap_err();
        assert!(matches!(&error, StateError::Damaged { damage: Damage::Content, .. }), "{error}");
        assert!(error.to_string().contains("erst-0000000000000006.record"), "{error}");
        std::fs::write(&six, "x").unwrap();
        assert!(matches!(load(&state), Err(StateError::Damaged { .. })));
        std::fs::remove_file(&six).unwrap();
        assert_eq!(load(&state).unwrap().len(), 1);
    }
}
