use aconite_acpi::layout::{MAILBOX_BASE, MAX_UNITS, mailbox_base};
use aconite_acpi::platform::EventTarget;
use aconite_acpi::platform::mailbox::{INPUT_MAX, OUTPUT_MAX, RESULT, RESULT_UNSUPPORTED};
use proptest::prelude::*;

use super::super::dimm::{Dimm, DimmConfig, Family, INTEL};
use super::super::interleave::{Interleave, Share};
use super::super::root::{UUID, function};
use super::super::testing::{BASE, Memory, SIZE, bytes, dimm_config, unit, unit_with};
use super::super::unit::UnitConfig;
use super::*;
use crate::dma::testing::{Lines, dma};

const SLOT: u32 = 3;
const REGISTERS: u64 = SLOT as u64 * UNIT_SIZE;

struct Machine {
    units: Units,
    table: Arc<UnitTable>,
    memory: Memory,
    dma: Dma,
    poison: Arc<Lines>,
}

fn machine() -> Machine {
    let (unit, memory) = unit();
    let (dma, poison) = dma(&[(MAILBOX_BASE, 0x8_0000)]);
    let table = Arc::new(UnitTable::new());
    table.insert(unit).unwrap();
    Machine { units: Units::new(table.clone(), dma.clone()), table, memory, dma, poison }
}

impl Machine {
    fn read_u32(&mut self, offset: u64) -> u32 {
        let mut data = [0xEE; 4];
        self.units.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Vec<Effect> {
        let mut effects = Effects::new();
        self.units.write(offset, data, &mut effects);
        effects.into_iter().collect()
    }

    /// Does what the AML does: fill the request half.
    fn request(&self, call: u32, uuid: [u8; 16], revision: u32, function: u32, input: &[u8]) {
        let mut head = call.to_le_bytes().to_vec();
        head.extend(uuid);
        head.extend(revision.to_le_bytes());
        head.extend(function.to_le_bytes());
        head.extend((input.len() as u32).to_le_bytes());
        head.extend(input);
        self.dma.write(mailbox_base(SLOT), &head).unwrap();
        // Something stale that no reply may be taken for.
        self.dma.write(mailbox_base(SLOT) + RESULT, &[0xEE; 16]).unwrap();
    }

    /// Rings the doorbell, which does nothing else, and reads result and output.
    fn ring(&mut self, code: u32) -> (u32, Vec<u8>) {
        assert_eq!(self.write(REGISTERS + DOORBELL, &code.to_le_bytes()), []);
        self.reply()
    }

    /// Result and output.
    fn reply(&self) -> (u32, Vec<u8>) {
        let mut head = [0; 8];
        self.dma.read(mailbox_base(SLOT) + RESULT, &mut head).unwrap();
        let (result, length) = head.split_at(4);
        let length = u32::from_le_bytes(length.try_into().unwrap());
        assert!(u64::from(length) <= OUTPUT_MAX);
        let mut output = vec![0; length as usize];
        self.dma.read(mailbox_base(SLOT) + RESULT + 8, &mut output).unwrap();
        (u32::from_le_bytes(result.try_into().unwrap()), output)
    }

    fn dsm(&mut self, function: u32, input: &[u8]) -> (u32, Vec<u8>) {
        self.request(1, UUID, 1, function, input);
        self.ring(1)
    }
}

#[test]
fn status_tells_which_units_are_there() {
    let mut machine = machine();
    assert_eq!(machine.read_u32(REGISTERS + STATUS), 0xF);
    for slot in (0..u64::from(MAX_UNITS)).filter(|&slot| slot != u64::from(SLOT)) {
        assert_eq!(machine.read_u32(slot * UNIT_SIZE), 0, "{slot}");
    }
    for register in (4..UNIT_SIZE).step_by(4) {
        assert_eq!(machine.read_u32(REGISTERS + register), 0);
    }
    assert_eq!(machine.read_u32(REGISTERS + 1), 0);
    machine.table.remove(SLOT);
    assert_eq!(machine.read_u32(REGISTERS + STATUS), 0);
}

#[test]
fn an_ejected_unit_is_gone_when_the_write_returns() {
    let mut machine = machine();
    assert_eq!(
        machine.write(REGISTERS + EJECT, &[1, 0, 0, 0]),
        [Effect::Ejected(EventTarget::Container(SLOT))]
    );
    assert_eq!(machine.read_u32(REGISTERS + STATUS), 0);
    assert_eq!(machine.write(REGISTERS + EJECT, &[1, 0, 0, 0]), [], "nothing is left to eject");
    assert_eq!(machine.write(REGISTERS + UNIT_SIZE + EJECT, &[1]), []);
}

#[test]
fn what_the_os_says_of_a_notification_is_passed_on_of_empty_slots_too() {
    let mut machine = machine();
    let said = |unit, event, status| Effect::OsStatus {
        target: EventTarget::Container(unit),
        status: OsStatus { event, status },
    };
    assert_eq!(machine.write(REGISTERS + OS_STATUS, &[3, 0, 0x84, 0]), [said(SLOT, 3, OsStatus::EJECTING)]);
    machine.table.remove(SLOT);
    assert_eq!(machine.write(REGISTERS + OS_STATUS, &[1, 0, 0, 0]), [said(SLOT, 1, OsStatus::SUCCESS)]);
    assert_eq!(machine.write(REGISTERS + OS_STATUS, &[3, 1]), [said(SLOT, OsStatus::EJECT_BY_OS, 0)]);
    assert_eq!(machine.write(OS_STATUS, &[1, 0, 0x82, 0]), [said(0, 1, 0x82)]);
}

#[test]
fn fit_is_the_unit_s_own_and_empty_without_it() {
    let mut machine = machine();
    machine.request(3, [0; 16], 0, 0, &[]);
    assert_eq!(machine.ring(3), (0, vec![0xF1; 100]));
    machine.table.remove(SLOT);
    assert_eq!(machine.ring(3), (0, vec![]));
}

#[test]
fn the_root_device_answers_its_functions() {
    let mut machine = machine();
    machine.memory.poison(BASE + 0x400..BASE + 0x440);
    assert_eq!(machine.dsm(function::QUERY, &[]), (0, vec![0xBF, 0x03]));
    let range = [BASE.to_le_bytes(), SIZE.to_le_bytes()].concat();
    let (result, output) = machine.dsm(function::ARS_CAPABILITIES, &range);
    assert_eq!((result, output), (0, bytes("00000200 F00F0000 00010000 0100 0000")));
    let start = [range.clone(), bytes("0200 00 0000000000")].concat();
    assert_eq!(machine.dsm(function::ARS_START, &start), (0, bytes("00000000 00000000")));
    let (result, output) = machine.dsm(function::ARS_STATUS, &[]);
    assert_eq!((result, output.len()), (0, 72));
    assert_eq!(output[56..], bytes("0004004001000000 4000000000000000"));
    let sector = [(BASE + 0x400).to_le_bytes(), 0x200u64.to_le_bytes()].concat();
    let (result, output) = machine.dsm(function::CLEAR_ERROR, &sector);
    assert_eq!((result, output), (0, bytes("00000000 00000000 0002000000000000")));
    assert!(machine.memory.is_clean());
    let (result, output) = machine.dsm(function::TRANSLATE_SPA, &BASE.to_le_bytes());
    assert_eq!((result, output.len()), (0, 36));
}

#[test]
fn a_dimm_answers_its_family_and_the_label_methods() {
    let mut machine = machine();
    machine.table.remove(SLOT);
    let dimm = dimm_config(Family::Intel, Some(vec![0; 1024]));
    let with_labels = |config: &mut UnitConfig| config.dimms = vec![Arc::new(Dimm::new(dimm).unwrap())];
    machine.table.insert(unit_with(&machine.memory, with_labels)).unwrap();
    machine.request(2, INTEL, 1, 4, &[]);
    assert_eq!(machine.ring(2), (0, bytes("00000000 00040000 000F0000")));
    machine.request(4, [0; 16], 0, 0, &[]);
    assert_eq!(machine.ring(4), (0, bytes("00000000 00040000 000F0000")));
    machine.request(6, [0; 16], 0, 0, &bytes("1000000000000000 0200000000000000 ABCD"));
    assert_eq!(machine.ring(6), (0, bytes("00000000")));
    machine.request(5, [0; 16], 0, 0, &bytes("1000000000000000 0200000000000000"));
    assert_eq!(machine.ring(5), (0, bytes("00000000 ABCD")));
    machine.table.remove(SLOT);
    machine.request(2, INTEL, 1, 4, &[]);
    assert_eq!(machine.ring(2), (RESULT_UNSUPPORTED, vec![]));
    machine.request(5, [0; 16], 0, 0, &bytes("1000000000000000 0200000000000000"));
    assert_eq!(machine.ring(5), (0, bytes("01000000")), "a departed DIMM fails");
}

#[test]
fn memory_is_out_of_reach_while_a_dimm_behind_it_is_locked() {
    let mut machine = machine();
    let passphrases = [[0; 32], [7; 32]].concat();
    let before = Dimm::new(dimm_config(Family::Intel, None)).unwrap();
    let put = |machine: &Machine, dimm: Dimm| {
        machine.table.remove(SLOT);
        let interleave = Interleave { line: 4096, shares: vec![Share { dimm: 0, dimm_address: 0 }] };
        let with = |config: &mut UnitConfig| {
            config.dimms = vec![Arc::new(dimm)];
            config.ranges[0].interleave = interleave;
        };
        machine.table.insert(unit_with(&machine.memory, with)).unwrap()
    };
    let unit = put(&machine, before);
    machine.request(2, INTEL, 2, 20, &passphrases);
    assert_eq!(machine.ring(2), (0, bytes("00000000")));
    assert!(!machine.memory.locked(), "it stays open as long as it has power");
    let record = unit.dimms()[0].record();
    put(&machine, Dimm::new(DimmConfig { record, ..dimm_config(Family::Intel, None) }).unwrap());
    machine.request(2, INTEL, 2, 22, &[8; 32]);
    assert_eq!(machine.ring(2), (0, bytes("0B000000")));
    assert!(machine.memory.locked());
    machine.request(2, INTEL, 2, 22, &[7; 32]);
    assert_eq!(machine.ring(2), (0, bytes("00000000")));
    assert!(!machine.memory.locked());
}

#[test]
fn calls_reach_the_dimm_that_they_name() {
    let mut machine = machine();
    machine.table.remove(SLOT);
    let dimms = [1u8, 2].map(|byte| {
        let config = dimm_config(Family::Intel, Some(vec![byte; 1024]));
        Arc::new(Dimm::new(config).unwrap())
    });
    let two = |config: &mut UnitConfig| config.dimms = dimms.to_vec();
    machine.table.insert(unit_with(&machine.memory, two)).unwrap();
    for (dimm, answer) in [(0, "00000000 0101"), (1, "00000000 0202"), (2, "01000000")] {
        let word = 5 | dimm << 8;
        machine.request(word, [0; 16], 0, 0, &bytes("1000000000000000 0200000000000000"));
        assert_eq!(machine.ring(word), (0, bytes(answer)), "DIMM {dimm}");
    }
    for word in [2 | 2 << 8, 1 | 1 << 8] {
        machine.request(word, INTEL, 1, 4, &[]);
        assert_eq!(machine.ring(word), (RESULT_UNSUPPORTED, vec![]));
    }
    machine.request(2 | 1 << 8, INTEL, 2, 18, &bytes("0200000000000000 00 0000 01 04 00 00"));
    let target = EventTarget::Dimm { unit: SLOT, dimm: 1 };
    let effects = machine.write(REGISTERS + DOORBELL, &(2u32 | 1 << 8).to_le_bytes());
    assert_eq!(effects, [Effect::Notify(FirmwareEvent { target, code: 0x81 })]);
}

#[test]
fn what_the_os_wants_to_know_is_notified() {
    let mut machine = machine();
    machine.table.remove(SLOT);
    let intel = Dimm::new(dimm_config(Family::Intel, None)).unwrap();
    machine.table.insert(unit_with(&machine.memory, |config| config.dimms = vec![Arc::new(intel)])).unwrap();
    let ring = |machine: &mut Machine, code: u32| machine.write(REGISTERS + DOORBELL, &code.to_le_bytes());
    let root = FirmwareEvent { target: EventTarget::Root(SLOT), code: 0x81 };
    let dimm = FirmwareEvent { target: EventTarget::Dimm { unit: SLOT, dimm: 0 }, code: 0x81 };
    machine.request(1, UUID, 1, 7, &bytes("0000004001000000 0001000000000000 01"));
    assert_eq!(ring(&mut machine, 1), [Effect::Notify(root)]);
    machine.request(1, UUID, 1, 7, &bytes("0000004001000000 0001000000000000 00"));
    assert_eq!(ring(&mut machine, 1), [], "without the option");
    // Spares of 4 percent, below the threshold of 5.
    machine.request(2, INTEL, 2, 18, &bytes("0200000000000000 00 0000 01 04 00 00"));
    assert_eq!(ring(&mut machine, 2), [Effect::Notify(dimm)]);
    machine.request(2, INTEL, 2, 18, &bytes("0200000000000000 00 0000 00 00 00 00"));
    assert_eq!(ring(&mut machine, 2), [], "back to the real value");
}

#[test]
fn functions_that_do_not_exist_are_not_supported() {
    let mut machine = machine();
    for function in [6, 10, 32, u32::MAX] {
        assert_eq!(machine.dsm(function, &[0; 16]), (0, vec![1, 0, 0, 0]), "{function}");
    }
}

#[test]
fn what_is_no_call_of_the_device_is_told_so() {
    let mut machine = machine();
    let unsupported = (RESULT_UNSUPPORTED, vec![]);
    machine.request(1, [7; 16], 1, 0, &[]);
    assert_eq!(machine.ring(1), unsupported, "another UUID");
    for revision in [0, 2, u32::MAX] {
        machine.request(1, UUID, revision, 0, &[]);
        assert_eq!(machine.ring(1), unsupported, "revision {revision}");
    }
    machine.request(2, UUID, 1, 0, &[]);
    assert_eq!(machine.ring(2), unsupported, "the DIMM has no family");
    for code in [0, 7, u32::MAX] {
        machine.request(code, UUID, 1, 0, &[]);
        assert_eq!(machine.ring(code), unsupported, "call {code}");
    }
    machine.request(3, UUID, 1, 0, &[]);
    assert_eq!(machine.ring(1), unsupported, "doorbell and mailbox disagree");
    machine.request(1, UUID, 1, 0, &[]);
    machine.dma.write(mailbox_base(SLOT) + 0x1C, &(INPUT_MAX as u32 + 1).to_le_bytes()).unwrap();
    assert_eq!(machine.ring(1), unsupported, "more input than there is room for");
}

#[test]
fn input_may_fill_the_mailbox() {
    let mut machine = machine();
    let (result, output) = machine.dsm(function::CLEAR_ERROR, &vec![0; INPUT_MAX as usize]);
    assert_eq!((result, &output[..4]), (0, &[2, 0, 0, 0][..]));
}

#[test]
fn a_departed_unit_answers_with_a_status() {
    let mut machine = machine();
    machine.table.remove(SLOT);
    assert_eq!(machine.dsm(function::QUERY, &[]), (0, vec![0xBF, 0x03]));
    let range = [BASE.to_le_bytes(), SIZE.to_le_bytes()].concat();
    let start = [range.clone(), bytes("0200 00 0000000000")].concat();
    for (function, input, status) in [
        (function::ARS_CAPABILITIES, &range, [2, 0, 0, 0]),
        (function::ARS_START, &start, [2, 0, 0, 0]),
        (function::ARS_STATUS, &vec![], [0, 0, 2, 0]),
        (function::CLEAR_ERROR, &range, [2, 0, 0, 0]),
        (function::TRANSLATE_SPA, &BASE.to_le_bytes().to_vec(), [2, 0, 0, 0]),
    ] {
        let (result, output) = machine.dsm(function, input);
        assert_eq!((result, &output[..4]), (0, &status[..]), "function {function}");
    }
}

#[test]
fn another_unit_in_the_slot_starts_without_a_scrub() {
    let mut machine = machine();
    let start =
        [BASE.to_le_bytes().to_vec(), SIZE.to_le_bytes().to_vec(), bytes("0200 00 0000000000")].concat();
    machine.dsm(function::ARS_START, &start);
    assert_eq!(machine.dsm(function::ARS_STATUS, &[]).1[..4], [0; 4]);
    machine.table.remove(SLOT);
    machine.table.insert(unit_with(&Memory::default(), |_| {})).unwrap();
    assert_eq!(machine.dsm(function::ARS_STATUS, &[]).1[..4], [0, 0, 2, 0]);
}

#[test]
fn poison_in_the_mailbox_ends_in_a_defined_reply() {
    let mut machine = machine();
    let base = mailbox_base(SLOT);
    // In the request.
    machine.request(1, UUID, 1, 0, &[]);
    machine.poison.0.lock().unwrap().push(base);
    assert_eq!(machine.ring(1), (RESULT_UNSUPPORTED, vec![]));
    // Behind the request: of no interest.
    *machine.poison.0.lock().unwrap() = vec![base + 0x40];
    machine.dma.write(base, &1u32.to_le_bytes()).unwrap();
    assert_eq!(machine.ring(1), (0, vec![0xBF, 0x03]));
    // In the output.
    *machine.poison.0.lock().unwrap() = vec![base + RESULT + 0x40];
    machine.request(3, [0; 16], 0, 0, &[]);
    assert_eq!(machine.ring(3), (RESULT_UNSUPPORTED, vec![]));
    // In the reply's head: nothing can be written, nothing else happens.
    *machine.poison.0.lock().unwrap() = vec![base + RESULT];
    assert_eq!(machine.write(REGISTERS + DOORBELL, &3u32.to_le_bytes()), []);
}

#[test]
fn a_machine_without_mailbox_memory_goes_on() {
    let (dma, _) = dma(&[(0, 0x1000)]);
    let mut units = Units::new(Arc::new(UnitTable::new()), dma);
    let mut effects = Effects::new();
    units.write(DOORBELL, &[1, 0, 0, 0], &mut effects);
    assert!(effects.is_empty());
}

#[test]
fn a_write_acts_on_the_registers_whose_first_byte_it_covers() {
    let mut machine = machine();
    machine.request(3, [0; 16], 0, 0, &[]);
    assert_eq!(machine.write(REGISTERS + EJECT + 1, &[1, 1, 1]), []);
    assert_eq!(machine.ring(3).1.len(), 100, "still there");
    assert_eq!(machine.write(REGISTERS + OS_STATUS + 2, &[1, 1]), []);
    let both = [1, 0, 0, 0, 3, 0, 0, 0];
    assert_eq!(machine.write(REGISTERS + EJECT, &both), [Effect::Ejected(EventTarget::Container(SLOT))]);
    let mut head = [0xEE; 8];
    machine.dma.read(mailbox_base(SLOT) + RESULT, &mut head).unwrap();
    assert_eq!(head, [0; 8], "ejected, then asked for a _FIT that is empty");
    assert_eq!(machine.write(Units::SIZE - 8, &[0xFF; 8]), []);
}

fn uuid() -> impl Strategy<Value = [u8; 16]> {
    prop_oneof![4 => Just(UUID), 1 => any::<[u8; 16]>()]
}

fn number(likely: std::ops::Range<u32>) -> impl Strategy<Value = u32> {
    prop_oneof![4 => likely, 1 => any::<u32>()]
}

/// Input near to what functions take: an address and a length around the unit, then anything.
fn input() -> impl Strategy<Value = Vec<u8>> {
    let address = prop_oneof![BASE - 0x400..BASE + SIZE + 0x400, any::<u64>()];
    let length = prop_oneof![0..0x2000u64, any::<u64>()];
    let near = (address, length, prop::collection::vec(any::<u8>(), 0..16), 0usize..28).prop_map(
        |(address, length, tail, size)| {
            let mut input = [&address.to_le_bytes()[..], &length.to_le_bytes()[..], &tail[..]].concat();
            input.truncate(size);
            input
        },
    );
    prop_oneof![3 => near, 1 => prop::collection::vec(any::<u8>(), 0..0xFE0)]
}

proptest! {
    /// Whatever a guest asks, it gets one of the results, an output that fits, and a status where there is one.
    #[test]
    fn any_request_has_a_defined_reply(
        calls in prop::collection::vec(
            (number(0..8), uuid(), number(0..3), number(0..10), input(), any::<bool>()), 1..24),
    ) {
        let mut machine = machine();
        machine.memory.poison(BASE..BASE + 0x100);
        for (code, uuid, revision, function, input, present) in calls {
            if present {
                let _ = machine.table.insert(unit_with(&machine.memory, |_| {}));
            } else {
                machine.table.remove(SLOT);
            }
            machine.request(code, uuid, revision, function, &input);
            let effects = machine.write(REGISTERS + DOORBELL, &code.to_le_bytes());
            let (result, output) = machine.reply();
            let ours = code == 1 && uuid == UUID && revision == 1;
            // An injected error may be told of (NVDIMM DSM interface 1.8, "ARS Error Inject", option bit 0).
            const INJECT: u32 = 7;
            let told = Effect::Notify(FirmwareEvent { target: EventTarget::Root(SLOT), code: 0x81 });
            prop_assert!(effects.is_empty() || effects == [told] && ours && function == INJECT, "{:?}", effects);
            let answered = ours || (3..=6).contains(&code);
            prop_assert_eq!(result, if answered { 0 } else { RESULT_UNSUPPORTED });
            if ours && function != 0 {
                let status = u32::from_le_bytes(output[..4].try_into().unwrap());
                prop_assert!([0, 1, 2, 0x2_0000, 0x3_0000].contains(&status), "{:#x}", status);
                prop_assert_eq!(status & 0xFFFF == 1, function == 6 || function > 9);
            }
        }
    }

    /// Random bytes over the whole request half, and random accesses to the registers, change nothing but replies.
    #[test]
    fn any_bytes_and_any_access_are_survived(
        request in prop::collection::vec(any::<u8>(), 0x1000),
        accesses in prop::collection::vec(
            (0..Units::SIZE - 8, prop::collection::vec(any::<u8>(), 1..=8), any::<bool>()), 0..64),
    ) {
        let mut machine = machine();
        machine.dma.write(mailbox_base(SLOT), &request).unwrap();
        let code = u32::from_le_bytes(request[..4].try_into().unwrap());
        let _ = machine.ring(code);
        for (offset, mut data, is_write) in accesses {
            if is_write {
                let known = |effect: &Effect| match *effect {
                    Effect::Ejected(target) => target == EventTarget::Container(SLOT),
                    Effect::OsStatus { target: EventTarget::Container(unit), .. } => unit < MAX_UNITS,
                    _ => false,
                };
                let effects = machine.write(offset, &data);
                prop_assert!(effects.len() <= 2 && effects.iter().all(known));
            } else {
                machine.units.read(offset, &mut data);
            }
        }
    }
}
