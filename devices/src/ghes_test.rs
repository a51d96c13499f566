//! Tests of the error sources, against a model of what an OS and the specification agree on.

use aconite_acpi::layout::{GHES_BASE, GHES_SIZE};
use proptest::prelude::*;

use super::*;
use crate::dma::testing::dma;

fn sources() -> (ErrorSources, Dma) {
    let (dma, _) = dma(&[(GHES_BASE, GHES_SIZE as usize)]);
    (ErrorSources::new(dma.clone()).unwrap(), dma)
}

/// A block of `length` bytes whose status and body tell it from others.
fn block(tag: u8, length: usize) -> Vec<u8> {
    let mut block = vec![tag; length];
    block[..4].copy_from_slice(&(0x10 | u32::from(tag) << 8).to_le_bytes());
    block
}

fn read(dma: &Dma, gpa: u64, length: usize) -> Vec<u8> {
    let mut data = vec![0; length];
    dma.read(gpa, &mut data).unwrap();
    data
}

/// What Linux does after it has read a block (`ghes_clear_estatus`, `ghes_ack_error`).
fn acknowledge(sources: &mut ErrorSources, dma: &Dma, source: Source) -> Effects {
    dma.write(source.block(), &[0; 4]).unwrap();
    let offset = source.acknowledge_register() - aconite_acpi::layout::GHES_REGISTERS;
    let mut value = [0; 8];
    sources.read(offset, &mut value);
    let value = u64::from_le_bytes(value) & !ACKNOWLEDGE | ACKNOWLEDGE;
    let mut effects = Effects::new();
    sources.write(offset, &value.to_le_bytes(), &mut effects);
    effects
}

fn delivered(happened: &[Happened]) -> Vec<u64> {
    happened
        .iter()
        .filter_map(|one| match one {
            Happened::Delivered { record, .. } => Some(*record),
            _ => None,
        })
        .collect()
}

#[test]
fn an_os_finds_empty_blocks_at_first() {
    let (_, dma) = sources();
    for source in Source::ALL {
        assert_eq!(read(&dma, source.address_register(), 8), source.block().to_le_bytes());
        assert_eq!(read(&dma, source.block(), 4), [0; 4]);
    }
}

#[test]
fn one_record_is_outstanding_and_the_others_follow_its_acknowledgement() {
    let (mut sources, dma) = sources();
    let first = sources.submit(Source::Corrected, block(1, 100)).unwrap();
    let second = sources.submit(Source::Corrected, block(2, 40)).unwrap();
    assert_eq!(delivered(&sources.take_happened()), [first]);
    assert_eq!(read(&dma, Source::Corrected.block(), 100), block(1, 100));
    assert_eq!(
        (sources.outstanding(Source::Corrected), sources.waiting(Source::Corrected)),
        (Some(first), 1)
    );

    let effects = acknowledge(&mut sources, &dma, Source::Corrected);
    assert_eq!(effects.as_slice(), [Effect::ErrorSources]);
    let happened = sources.take_happened();
    assert!(matches!(happened[0], Happened::Acknowledged { record, .. } if record == first));
    assert_eq!(delivered(&happened), [second]);
    assert_eq!(read(&dma, Source::Corrected.block(), 40), block(2, 40));

    assert!(!acknowledge(&mut sources, &dma, Source::Corrected).is_empty());
    assert!(acknowledge(&mut sources, &dma, Source::Corrected).is_empty(), "nothing is outstanding");
    assert_eq!(sources.outstanding(Source::Corrected), None);
}

#[test]
fn sources_do_not_wait_for_each_other() {
    let (mut sources, dma) = sources();
    for (tag, source) in (1..).zip(Source::ALL) {
        sources.submit(source, block(tag, 64)).unwrap();
    }
    assert_eq!(delivered(&sources.take_happened()), [1, 2, 3, 4]);
    for (tag, source) in (1..).zip(Source::ALL) {
        assert_eq!(read(&dma, source.block(), 64), block(tag, 64));
    }
}

#[test]
fn lengths_and_the_queue_have_bounds() {
    let (mut sources, _) = sources();
    assert_eq!(sources.submit(Source::Nmi, vec![1; 19]), Err(SubmitError::TooShort { length: 19 }));
    let length = BLOCK_SIZE as usize + 1;
    assert_eq!(sources.submit(Source::Nmi, vec![1; length]), Err(SubmitError::TooLong { length }));
    for _ in 0..=MAX_WAITING {
        sources.submit(Source::Nmi, vec![1; BLOCK_SIZE as usize]).unwrap();
    }
    let error = sources.submit(Source::Nmi, block(1, 20)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "Error source nmi has 64 records waiting for the guest to acknowledge record 1: wait for it, or use another source"
    );
    sources.submit(Source::Polled, block(1, 20)).unwrap();
}

#[test]
fn a_record_that_meets_poison_is_lost_and_the_next_one_goes() {
    let (dma, poison) = dma(&[(GHES_BASE, GHES_SIZE as usize)]);
    let mut sources = ErrorSources::new(dma.clone()).unwrap();
    poison.0.lock().unwrap().push(Source::Nmi.block() + 0x40);
    sources.submit(Source::Nmi, block(1, 0x41)).unwrap();
    sources.submit(Source::Nmi, block(2, 0x40)).unwrap();
    let happened = sources.take_happened();
    let Happened::Lost { record: 1, error: DmaError::Poisoned { .. }, .. } = happened[0] else {
        panic!("{happened:?}");
    };
    assert_eq!(delivered(&happened), [2]);
    assert_eq!(read(&dma, Source::Nmi.block(), 4), block(2, 0x40)[..4]);
}

/// What a guest and a user can do to the sources.
#[derive(Clone, Debug)]
enum Action {
    Submit(usize, u8, usize),
    Write(u64, Vec<u8>),
    Read(u64, usize),
    Garbage(u64, Vec<u8>),
}

fn action() -> impl Strategy<Value = Action> {
    let offset = prop_oneof![4 => 0u64..40, 1 => 0..ErrorSources::SIZE - 8];
    prop_oneof![
        (0..SOURCES, 1u8.., prop_oneof![20usize..200, 0usize..0x4010])
            .prop_map(|(source, tag, length)| Action::Submit(source, tag, length)),
        (offset.clone(), prop::collection::vec(any::<u8>(), 1..=8))
            .prop_map(|(at, data)| Action::Write(at, data)),
        (offset, 1usize..=8).prop_map(|(at, length)| Action::Read(at, length)),
        (0..GHES_SIZE - 64, prop::collection::vec(any::<u8>(), 1..64))
            .prop_map(|(at, data)| Action::Garbage(GHES_BASE + at, data)),
    ]
}

/// What is expected: a queue of records for each source, the first of which is before the guest.
#[derive(Default)]
struct Model {
    records: [VecDeque<(u64, Vec<u8>)>; SOURCES],
    registers: [u64; SOURCES],
}

proptest! {
    #[test]
    fn any_guest_meets_the_model(actions in prop::collection::vec(action(), 1..200)) {
        let (mut sources, dma) = sources();
        let mut model = Model::default();
        for action in actions {
            // Records that are before the guest after this action and were not before it.
            let mut fresh: Vec<usize> = Vec::new();
            match action {
                Action::Submit(index, tag, length) => {
                    let block = vec![tag; length];
                    let result = sources.submit(Source::ALL[index], block.clone());
                    let records = &mut model.records[index];
                    let fits = (STATUS_BLOCK_SIZE..=BLOCK_SIZE as usize).contains(&length);
                    prop_assert_eq!(result.is_ok(), fits && records.len() <= MAX_WAITING);
                    if let Ok(record) = result {
                        records.push_back((record, block));
                        if records.len() == 1 {
                            fresh.push(index);
                        }
                    }
                }
                Action::Write(offset, data) => {
                    let mut effects = Effects::new();
                    sources.write(offset, &data, &mut effects);
                    let mut acknowledged = false;
                    for (at, &byte) in (offset..).zip(&data) {
                        let index = (at / 8) as usize;
                        if index >= SOURCES {
                            continue;
                        }
                        let mut bytes = model.registers[index].to_le_bytes();
                        bytes[(at % 8) as usize] = byte;
                        model.registers[index] = u64::from_le_bytes(bytes);
                        if at % 8 == 0 && byte & 1 != 0 && model.records[index].pop_front().is_some() {
                            acknowledged = true;
                            if !model.records[index].is_empty() {
                                fresh.push(index);
                                model.registers[index] &= !1;
                            }
                        }
                    }
                    prop_assert_eq!(effects.as_slice() == [Effect::ErrorSources], acknowledged);
                }
                Action::Read(offset, length) => {
                    let mut data = vec![0xEE; length];
                    sources.read(offset, &mut data);
                    for (at, byte) in (offset..).zip(data) {
                        let register = model.registers.get((at / 8) as usize).map_or(0, |register| *register);
                        prop_assert_eq!(byte, register.to_le_bytes()[(at % 8) as usize]);
                    }
                }
                Action::Garbage(gpa, data) => dma.write(gpa, &data).unwrap(),
            }
            for &index in &fresh {
                let source = Source::ALL[index];
                model.registers[index] &= !1;
                let (record, block) = &model.records[index][0];
                prop_assert_eq!(sources.outstanding(source), Some(*record));
                prop_assert_eq!(&read(&dma, source.block(), block.len()), block);
                prop_assert_eq!(read(&dma, source.address_register(), 8), source.block().to_le_bytes());
            }
            let happened = sources.take_happened();
            prop_assert_eq!(delivered(&happened).len(), fresh.len());
            for (index, records) in model.records.iter().enumerate() {
                let source = Source::ALL[index];
                prop_assert_eq!(sources.outstanding(source), records.front().map(|(record, _)| *record));
                prop_assert_eq!(sources.waiting(source), records.len().saturating_sub(1));
            }
        }
    }
}
