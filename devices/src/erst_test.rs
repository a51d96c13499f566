use std::sync::{Arc, Mutex};

use proptest::prelude::*;

use super::*;
use crate::dma::testing::{Lines, dma};

/// What a test's keeper has, and how it is to answer.
#[derive(Default)]
struct Medium {
    kept: BTreeMap<u64, Vec<u8>>,
    fails: Option<KeepError>,
}

struct TestKeeper(Arc<Mutex<Medium>>);

impl Keeper for TestKeeper {
    fn keep(&mut self, id: u64, record: &[u8]) -> Result<(), KeepError> {
        let mut medium = self.0.lock().unwrap();
        medium.fails.map_or(Ok(()), Err)?;
        medium.kept.insert(id, record.to_vec());
        Ok(())
    }

    fn forget(&mut self, id: u64) -> Result<(), KeepError> {
        let mut medium = self.0.lock().unwrap();
        medium.fails.map_or(Ok(()), Err)?;
        medium.kept.remove(&id);
        Ok(())
    }
}

struct Store {
    erst: Erst,
    dma: Dma,
    poison: Arc<Lines>,
    medium: Arc<Mutex<Medium>>,
}

impl Store {
    fn new() -> Self {
        let (dma, poison) = dma(&[(ERST_BASE, ERST_SIZE as usize)]);
        let medium = Arc::<Mutex<Medium>>::default();
        let erst = Erst::new(dma.clone(), BTreeMap::new(), Box::new(TestKeeper(medium.clone())));
        Self { erst, dma, poison, medium }
    }

    fn get(&mut self, register: u64) -> u64 {
        let mut data = [0xEE; 8];
        self.erst.read(register, &mut data);
        u64::from_le_bytes(data)
    }

    fn set(&mut self, register: u64, value: u64) {
        let mut effects = Effects::new();
        self.erst.write(register, &value.to_le_bytes(), &mut effects);
        assert!(effects.is_empty());
    }

    /// Begins, executes and ends an operation as Linux does; its status.
    fn run(&mut self, begin: u32, offset: u32, id: u64) -> u32 {
        self.set(OPERATION, begin.into());
        self.set(RECORD_OFFSET, offset.into());
        self.set(RECORD_ID, id);
        self.set(OPERATION, operation::EXECUTE.into());
        assert_eq!(self.get(BUSY), 0);
        let status = self.get(STATUS) as u32;
        self.set(OPERATION, operation::END.into());
        status
    }

    fn write(&mut self, offset: u32, record: &[u8]) -> u32 {
        self.dma.write(ERST_BASE + u64::from(offset), record).unwrap();
        self.run(operation::BEGIN_WRITE, offset, 0)
    }

    fn read(&mut self, id: u64, length: usize) -> Result<Vec<u8>, u32> {
        match self.run(operation::BEGIN_READ, 64, id) {
            status::SUCCESS => {
                let mut record = vec![0; length];
                self.dma.read(ERST_BASE + 64, &mut record).unwrap();
                Ok(record)
            }
            status => Err(status),
        }
    }

    fn next(&mut self) -> u64 {
        self.set(OPERATION, operation::NEXT_ID.into());
        self.get(NEXT_ID)
    }
}

/// A record of `length` bytes.
fn record(id: u64, length: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..length).map(|at| (at as u64 ^ id) as u8).collect();
    bytes[..4].copy_from_slice(SIGNATURE);
    bytes[LENGTH_AT..LENGTH_AT + 4].copy_from_slice(&(length as u32).to_le_bytes());
    bytes[ID_AT..ID_AT + 8].copy_from_slice(&id.to_le_bytes());
    bytes
}

#[test]
fn records_are_written_found_read_and_cleared() {
    let mut store = Store::new();
    assert_eq!(
        (store.get(RANGE_BASE), store.get(RANGE_LENGTH), store.get(RANGE_ATTRIBUTES)),
        (ERST_BASE, ERST_SIZE, 0)
    );
    assert_eq!((store.next(), store.get(COUNT)), (NO_RECORD, 0));
    assert_eq!(store.read(7, 1), Err(status::STORE_EMPTY));
    for (id, length) in [(7, 300), (5, 128), (9, 4096)] {
        assert_eq!(store.write(0, &record(id, length)), status::SUCCESS);
    }
    assert_eq!(store.get(COUNT), 3);
    assert_eq!([0; 5].map(|_| store.next()), [5, 7, 9, 5, 7], "round and round");
    assert_eq!(store.read(7, 300), Ok(record(7, 300)));
    assert_eq!(store.read(8, 1), Err(status::RECORD_NOT_FOUND));
    assert_eq!(store.medium.lock().unwrap().kept.len(), 3);
    // A record with the same identifier takes the place of the old one.
    assert_eq!(store.write(128, &record(7, 200)), status::SUCCESS);
    assert_eq!((store.read(7, 200), store.get(COUNT)), (Ok(record(7, 200)), 3));
    assert_eq!(store.run(operation::BEGIN_CLEAR, 0, 7), status::SUCCESS);
    assert_eq!(store.run(operation::BEGIN_CLEAR, 0, 7), status::RECORD_NOT_FOUND);
    assert_eq!(store.medium.lock().unwrap().kept.keys().copied().collect::<Vec<_>>(), [5, 9]);
    assert_eq!([0; 3].map(|_| store.next()), [9, 5, 9]);
}

#[test]
fn a_dummy_write_keeps_nothing() {
    let mut store = Store::new();
    store.dma.write(ERST_BASE, &record(1, 128)).unwrap();
    assert_eq!(store.run(operation::BEGIN_DUMMY_WRITE, 0, 0), status::SUCCESS);
    assert_eq!(store.get(COUNT), 0);
}

#[test]
fn what_is_no_record_is_refused() {
    let mut store = Store::new();
    let good = record(3, 256);
    let with = |at: usize, bytes: &[u8]| {
        let mut record = good.clone();
        record[at..at + bytes.len()].copy_from_slice(bytes);
        record
    };
    let bad = [
        with(0, b"XPER"),
        with(LENGTH_AT, &127u32.to_le_bytes()),
        with(LENGTH_AT, &0u32.to_le_bytes()),
        with(LENGTH_AT, &u32::MAX.to_le_bytes()),
        with(LENGTH_AT, &(ERST_SIZE as u32 + 1).to_le_bytes()),
        with(ID_AT, &0u64.to_le_bytes()),
        with(ID_AT, &u64::MAX.to_le_bytes()),
    ];
    for record in bad {
        assert_eq!(store.write(0, &record), status::FAILED);
    }
    for offset in [ERST_SIZE as u32 - 127, ERST_SIZE as u32, u32::MAX] {
        assert_eq!(store.run(operation::BEGIN_WRITE, offset, 0), status::FAILED, "{offset:#x}");
    }
    assert_eq!(store.write(ERST_SIZE as u32 - 256, &good), status::SUCCESS);
    for offset in [ERST_SIZE as u32 - 255, u32::MAX] {
        assert_eq!(store.run(operation::BEGIN_READ, offset, 3), status::FAILED);
    }
    // Nothing was begun.
    store.set(OPERATION, operation::EXECUTE.into());
    assert_eq!(store.get(STATUS), u64::from(status::FAILED));
}

#[test]
fn a_full_store_says_so() {
    let mut store = Store::new();
    for id in 1..=MAX_RECORDS as u64 {
        assert_eq!(store.write(0, &record(id, 128)), status::SUCCESS);
    }
    assert_eq!(store.write(0, &record(1000, 128)), status::NOT_ENOUGH_SPACE);
    assert_eq!(store.write(0, &record(1, 256)), status::SUCCESS, "that one was there");
    assert_eq!(store.run(operation::BEGIN_CLEAR, 0, 2), status::SUCCESS);
    assert_eq!(store.write(0, &record(1000, 128)), status::SUCCESS);

    let mut store = Store::new();
    let largest = ERST_SIZE as usize;
    let most = (MAX_BYTES / largest) as u64;
    for id in 1..=most {
        assert_eq!(store.write(0, &record(id, largest)), status::SUCCESS);
    }
    assert_eq!(store.write(0, &record(1000, 128)), status::NOT_ENOUGH_SPACE);
    assert_eq!(store.get(COUNT), most);
}

#[test]
fn a_medium_that_fails_changes_nothing() {
    let mut store = Store::new();
    assert_eq!(store.write(0, &record(1, 200)), status::SUCCESS);
    for (error, expected) in [
        (KeepError::NoSpace, status::NOT_ENOUGH_SPACE),
        (KeepError::Unavailable, status::HARDWARE_NOT_AVAILABLE),
    ] {
        store.medium.lock().unwrap().fails = Some(error);
        assert_eq!(store.write(0, &record(2, 128)), expected);
        assert_eq!(store.write(0, &record(1, 128)), expected);
        assert_eq!(store.run(operation::BEGIN_CLEAR, 0, 1), expected);
        assert_eq!((store.get(COUNT), store.read(1, 200)), (1, Ok(record(1, 200))));
    }
}

#[test]
fn poison_in_the_range_fails_an_operation() {
    let mut store = Store::new();
    assert_eq!(store.write(0, &record(1, 200)), status::SUCCESS);
    store.dma.write(ERST_BASE, &record(2, 200)).unwrap();
    store.poison.0.lock().unwrap().push(ERST_BASE + 128);
    assert_eq!(store.run(operation::BEGIN_WRITE, 0, 0), status::FAILED);
    assert_eq!(store.run(operation::BEGIN_READ, 0, 1), status::FAILED);
    assert_eq!((store.get(COUNT), store.read(1, 200).is_err()), (1, true));
}

/// What an OS can do.
#[derive(Clone, Debug)]
enum Step {
    Write { id: u64, length: usize, offset: u32 },
    Read { id: u64 },
    Clear { id: u64 },
    Next,
    Garbage { at: u64, data: Vec<u8> },
    Look { at: u64, length: usize },
}

fn step() -> impl Strategy<Value = Step> {
    let id = || 1u64..6;
    prop_oneof![
        3 => (id(), 128usize..400, 0u32..8).prop_map(|(id, length, offset)| Step::Write { id, length, offset }),
        2 => id().prop_map(|id| Step::Read { id }),
        2 => id().prop_map(|id| Step::Clear { id }),
        2 => Just(Step::Next),
        // Not an execution: the model would have to be a second device.
        2 => (0u64..Erst::SIZE - 8, prop::collection::vec(any::<u8>(), 1..=8))
            .prop_filter("executes", |(at, data)| *at > OPERATION || data[0] != operation::EXECUTE as u8)
            .prop_map(|(at, data)| Step::Garbage { at, data }),
        1 => (0u64..Erst::SIZE - 8, 1usize..=8).prop_map(|(at, length)| Step::Look { at, length }),
    ]
}

proptest! {
    #[test]
    fn a_map_is_the_model(steps in prop::collection::vec(step(), 0..60)) {
        let mut store = Store::new();
        let mut model: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
        let missing = |model: &BTreeMap<u64, Vec<u8>>| {
            if model.is_empty() { status::STORE_EMPTY } else { status::RECORD_NOT_FOUND }
        };
        for step in steps {
            match step {
                Step::Write { id, length, offset } => {
                    prop_assert_eq!(store.write(offset, &record(id, length)), status::SUCCESS);
                    model.insert(id, record(id, length));
                }
                Step::Read { id } => {
                    let length = model.get(&id).map_or(0, Vec::len);
                    let expected = model.get(&id).cloned().ok_or(missing(&model));
                    prop_assert_eq!(store.read(id, length), expected);
                }
                Step::Clear { id } => {
                    let expected = if model.contains_key(&id) { status::SUCCESS } else { missing(&model) };
                    model.remove(&id);
                    prop_assert_eq!(store.run(operation::BEGIN_CLEAR, 0, id), expected);
                }
                Step::Next => {
                    let last = store.get(NEXT_ID);
                    let mut ids = model.keys().copied();
                    let first = ids.clone().next().unwrap_or(NO_RECORD);
                    prop_assert_eq!(store.next(), ids.find(|id| *id > last).unwrap_or(first));
                }
                Step::Garbage { at, data } => store.erst.write(at, &data, &mut Effects::new()),
                Step::Look { at, length } => {
                    let mut data = vec![0xEE; length];
                    store.erst.read(at, &mut data);
                    prop_assert_eq!(data[0], store.get(at & !7).to_le_bytes()[(at & 7) as usize]);
                }
            }
            prop_assert_eq!(store.get(COUNT), model.len() as u64);
            prop_assert!(store.get(STATUS) <= u64::from(status::RECORD_NOT_FOUND));
        }
        prop_assert_eq!(&store.medium.lock().unwrap().kept, &model);
    }

    #[test]
    fn any_bytes_end_in_a_status(
        memory in prop::collection::vec(any::<u8>(), 0..600),
        writes in prop::collection::vec((0u64..0x60, prop::collection::vec(any::<u8>(), 1..=8)), 0..100),
    ) {
        let mut store = Store::new();
        store.dma.write(ERST_BASE, &memory).unwrap();
        for (at, data) in writes {
            store.erst.write(at, &data, &mut Effects::new());
            prop_assert!(store.get(STATUS) <= u64::from(status::RECORD_NOT_FOUND));
            prop_assert!(store.get(COUNT) <= MAX_RECORDS as u64);
        }
    }
}
