//! Tests of what one boot leaves for the next.

use std::time::UNIX_EPOCH;

use aconite_devices::dma::NoPoison;
use proptest::prelude::*;
use vm_memory::{GuestAddress, GuestMemoryAtomic, GuestMemoryMmap};

use super::*;
use crate::state::Locking;
use crate::x86::mca::{ErrorClass, MachineError, McaConfig, Reach};

/// CR4.MCE: the guest takes machine checks.
const CR4_MCE: u64 = 1 << 6;

fn memory() -> Dma {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(BERT_BASE), BERT_SIZE as usize)]).unwrap();
    Dma::new(GuestMemoryAtomic::new(memory), Arc::new(NoPoison))
}

fn region(dma: &Dma) -> Vec<u8> {
    let mut bytes = vec![0; BERT_SIZE as usize];
    dma.read(BERT_BASE, &mut bytes).unwrap();
    bytes
}

fn block(length: usize) -> Vec<u8> {
    let mut block = vec![0x11; length];
    block[12..16].copy_from_slice(&(length as u32 - 20).to_le_bytes());
    block
}

#[test]
fn a_record_is_shown_to_one_boot() {
    let dir = tempfile::tempdir().unwrap();
    let open = || Some(Arc::new(State::open(dir.path(), Locking::Here).unwrap()));

    let first = BootErrors::show(open(), &memory()).unwrap();
    assert_eq!(first.shown(), 0);
    assert!(first.keep(&block(100)) && first.keep(&block(40)));
    // Killed here: nothing is left to do.
    drop(first);

    let dma = memory();
    let second = BootErrors::show(open(), &dma).unwrap();
    assert_eq!(second.shown(), 2);
    assert_eq!(region(&dma)[..140], [block(100), block(40)].concat());
    assert_eq!(region(&dma)[140..160], [0; 20]);
    drop(second);
    let again = BootErrors::show(open(), &memory()).unwrap();
    assert_eq!(again.shown(), 2, "a machine that never ran has shown nothing");
    again.forget();
    drop(again);

    let third = memory();
    assert_eq!(BootErrors::show(open(), &third).unwrap().shown(), 0);
    assert!(region(&third).iter().all(|&byte| byte == 0));
}

#[test]
fn the_region_is_the_bound() {
    let errors = BootErrors::show(None, &memory()).unwrap();
    assert!(errors.keep(&block(BERT_SIZE as usize - 50)));
    assert!(!errors.keep(&block(51)));
    assert!(errors.keep(&block(50)));
}

#[test]
fn banks_that_the_guest_has_cleared_are_no_error() {
    let config = McaConfig::for_vendor(crate::x86::cpuid::Vendor::Amd);
    let now = UNIX_EPOCH;
    let mut state = McaState::new(config);
    let error = MachineError::line(ErrorClass::Load, 0x1234_5678);
    state.raise_record(error.record(&config, true), Reach::Architecture, CR4_MCE);
    let logged: Vec<_> = state.logged().collect();
    assert_eq!(logged.len(), 1);
    assert_eq!(logged[0].address, 0x1234_5640);

    let errors = BootErrors::show(None, &memory()).unwrap();
    errors.keep_machine_checks(&[(0, McaState::new(config)), (1, state.clone())], now);
    let kept = errors.next.lock().unwrap().clone();
    let blocks = split(&kept);
    assert_eq!(blocks.len(), 1);
    assert_eq!(blocks[0][16], 1, "fatal");
    // Entry, memory section: physical address and mask.
    assert_eq!(blocks[0][92 + 16..92 + 24], 0x1234_5640u64.to_le_bytes());
    assert_eq!(blocks[0][92 + 24..92 + 32], (!0x3Fu64).to_le_bytes());

    state.wrmsr(0xc000_2011, 0).unwrap();
    assert_eq!(state.logged().count(), 0);
}

#[test]
fn what_was_corrected_is_not_told() {
    let config = McaConfig::for_vendor(crate::x86::cpuid::Vendor::Intel);
    for (class, told) in
        [(ErrorClass::Corrected, 0), (ErrorClass::Load, 1), (ErrorClass::Fetch, 1), (ErrorClass::NoAction, 1)]
    {
        let mut state = McaState::new(config);
        let record = MachineError::line(class, 0x1000).record(&config, true);
        state.raise_record(record, Reach::Architecture, CR4_MCE);
        let errors = BootErrors::show(None, &memory()).unwrap();
        errors.keep_machine_checks(&[(0, state.clone()), (1, state)], UNIX_EPOCH);
        assert_eq!(split(&errors.next.lock().unwrap()).len(), told, "{class:?}");
    }
}

proptest! {
    #[test]
    fn any_document_is_split_within_the_region(bytes in prop::collection::vec(any::<u8>(), 0..400), big: bool) {
        let mut bytes = bytes;
        if big {
            bytes.resize(BERT_SIZE as usize * 2, 0);
        }
        let blocks = split(&bytes);
        let total: usize = blocks.iter().map(|block| block.len()).sum();
        prop_assert!(total <= bytes.len() && total as u64 <= BERT_SIZE);
    }
}
