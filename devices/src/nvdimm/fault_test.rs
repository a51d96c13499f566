use std::sync::Arc;

use aconite_acpi::layout::{MAILBOX_BASE, UNIT_SIZE, mailbox_base};
use aconite_acpi::platform::hotplug::DOORBELL;
use aconite_acpi::platform::mailbox::{OUTPUT_MAX, RESULT};
use proptest::prelude::*;

use super::super::registers::Units;
use super::super::root::UUID;
use super::super::testing::{BASE, SIZE, unit};
use super::super::unit::UnitTable;
use super::*;
use crate::bus::{BusDevice, Effect, Effects};
use crate::dma::Dma;
use crate::dma::testing::dma;

struct Guest {
    units: Units,
    table: Arc<UnitTable>,
    dma: Dma,
}

impl Guest {
    fn new() -> Self {
        let (dma, _) = dma(&[(MAILBOX_BASE, 0x8_0000)]);
        let table = Arc::new(UnitTable::new());
        table.insert(unit().0).unwrap();
        Self { units: Units::new(table.clone(), dma.clone()), table, dma }
    }

    fn plan(&self, function: u32, call: u64, count: Option<u64>, deed: Deed) {
        let fault = CallFault { callee: Callee::Root, function, call, count, deed };
        self.table.get(3).unwrap().plan_fault(fault);
    }

    /// Calls a function of the root device: result, output, effects.
    fn call(&mut self, function: u32, input: &[u8]) -> (u32, Vec<u8>, Vec<Effect>) {
        let mut head = 1u32.to_le_bytes().to_vec();
        head.extend(UUID);
        [1, function, input.len() as u32].iter().for_each(|word| head.extend(word.to_le_bytes()));
        head.extend(input);
        self.dma.write(mailbox_base(3), &head).unwrap();
        let mut effects = Effects::new();
        self.units.write(3 * UNIT_SIZE + DOORBELL, &[1, 0, 0, 0], &mut effects);
        let mut head = [0; 8];
        self.dma.read(mailbox_base(3) + RESULT, &mut head).unwrap();
        let [result, length] = [0, 4].map(|at| u32::from_le_bytes(head[at..at + 4].try_into().unwrap()));
        assert!(u64::from(length) <= OUTPUT_MAX);
        let mut output = vec![0; length as usize];
        self.dma.read(mailbox_base(3) + RESULT + 8, &mut output).unwrap();
        (result, output, effects.into_iter().collect())
    }

    fn capabilities(&mut self) -> (Vec<u8>, Vec<Effect>) {
        let (result, output, effects) =
            self.call(root::ARS_CAPABILITIES, &[BASE.to_le_bytes(), SIZE.to_le_bytes()].concat());
        assert_eq!(result, 0);
        (output, effects)
    }
}

fn told(status: u32) -> Effect {
    let status = Some(status);
    Effect::FirmwareFault { unit: 3, callee: Callee::Root, function: root::ARS_CAPABILITIES, status }
}

#[test]
fn the_nth_call_fails_and_no_other() {
    let mut guest = Guest::new();
    let (good, effects) = guest.capabilities();
    assert!(effects.is_empty());
    guest.plan(root::ARS_CAPABILITIES, 2, Some(2), Deed::Status(5));
    for call in 1..=5 {
        let (output, effects) = guest.capabilities();
        if (2..=3).contains(&call) {
            let mut failure = vec![0; 16];
            failure[0] = 5;
            assert_eq!((output, effects), (failure, vec![told(5)]));
        } else {
            assert_eq!((output, effects), (good.clone(), vec![]), "{call}");
        }
        // Another function is not counted.
        assert_eq!(guest.call(root::QUERY, &[]).1, [0xBF, 3]);
    }
    let unit = guest.table.get(3).unwrap();
    assert_eq!(unit.faults()[0].met, 2);
    unit.forget_faults();
    assert!(unit.faults().is_empty());
}

#[test]
fn a_failing_function_is_not_carried_out() {
    let mut guest = Guest::new();
    guest.plan(root::INJECT, 1, None, Deed::Status(2));
    let input = [&BASE.to_le_bytes()[..], &256u64.to_le_bytes(), &[1]].concat();
    for _ in 0..3 {
        let (_, output, effects) = guest.call(root::INJECT, &input);
        assert_eq!(output, [2, 0, 0, 0]);
        assert_eq!(effects.len(), 1, "and the OS is told of no error: {effects:?}");
    }
    assert!(guest.table.get(3).unwrap().all_poisoned(1).is_empty());
}

#[test]
fn answers_are_cut_filled_overwritten_and_late() {
    let mut guest = Guest::new();
    let (good, _) = guest.capabilities();
    guest.plan(root::ARS_CAPABILITIES, 1, Some(1), Deed::Length(6));
    assert_eq!(guest.capabilities().0, good[..6]);
    guest.plan(root::ARS_CAPABILITIES, 1, Some(1), Deed::Length(u32::MAX));
    let (long, _) = guest.capabilities();
    assert_eq!((long.len() as u64, &long[..16]), (OUTPUT_MAX, &good[..]));
    guest.plan(root::ARS_CAPABILITIES, 1, Some(1), Deed::Bytes { offset: 14, bytes: vec![1, 2, 3, 4] });
    guest.plan(root::ARS_CAPABILITIES, 1, Some(1), Deed::Delay(Duration::from_secs(2)));
    let (output, effects) = guest.capabilities();
    assert_eq!((&output[..14], &output[14..]), (&good[..14], &[1, 2][..]));
    assert_eq!(effects, [told(0x2_0000), Effect::Stall { time: Duration::from_secs(2) }]);
    guest.plan(root::ARS_CAPABILITIES, 1, Some(1), Deed::Length(3));
    let (_, effects) = guest.capabilities();
    assert!(matches!(effects[..], [Effect::FirmwareFault { status: None, .. }]), "{effects:?}");
}

#[test]
fn a_failure_is_as_long_as_a_good_answer_without_lists() {
    let mut guest = Guest::new();
    let range = [BASE.to_le_bytes(), SIZE.to_le_bytes()].concat();
    let start = [&range[..], &[2, 0, 0, 0, 0, 0, 0, 0]].concat();
    for (function, input) in [
        (root::ARS_CAPABILITIES, &range[..]),
        (root::ARS_START, &start),
        (root::ARS_STATUS, &[]),
        (root::CLEAR_ERROR, &range),
        (root::INJECT_CLEAR, &range),
        (root::INJECT_STATUS, &[]),
    ] {
        let good = guest.call(function, input).1.len();
        guest.plan(function, 1, Some(1), Deed::Status(1));
        assert_eq!(guest.call(function, input).1.len(), good, "{function}");
    }
}

fn deed() -> impl Strategy<Value = Deed> {
    prop_oneof![
        any::<u32>().prop_map(Deed::Status),
        any::<u32>().prop_map(Deed::Length),
        (any::<u32>(), prop::collection::vec(any::<u8>(), 0..20))
            .prop_map(|(offset, bytes)| Deed::Bytes { offset, bytes }),
        (0u64..u64::MAX).prop_map(|nanoseconds| Deed::Delay(Duration::from_nanos(nanoseconds))),
    ]
}

proptest! {
    /// Whatever is planned, every call has a reply that fits, and once the faults are over they are as before.
    #[test]
    fn any_faults_leave_calls_answered(
        faults in prop::collection::vec((0u32..11, 1u64..4, 1u64..4, deed()), 0..8),
        calls in prop::collection::vec((0u32..12, prop::collection::vec(any::<u8>(), 0..40)), 1..20),
    ) {
        let mut guest = Guest::new();
        for (function, call, count, deed) in faults {
            guest.plan(function, call, Some(count), deed);
        }
        for (function, input) in calls {
            guest.call(function, &input);
        }
        guest.table.get(3).unwrap().forget_faults();
        let (output, effects) = guest.capabilities();
        prop_assert_eq!((output.len(), effects.len()), (16, 0));
    }
}
