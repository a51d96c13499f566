use proptest::prelude::*;

use super::super::clear::{ClearInput, ClearOutput, clear};
use super::super::testing::{BASE, LINE, Memory, SIZE, bytes, unit, unit_with};
use super::*;
use crate::clock::testing::Hand;

fn start_input(address: u64, length: u64, kind: u16, flags: u8) -> Vec<u8> {
    let input = StartInput {
        address: address.into(),
        length: length.into(),
        kind: kind.into(),
        flags,
        reserved: [0; 5],
    };
    input.as_bytes().to_vec()
}

/// Function 2, which leaves nothing to be done.
fn start(unit: Option<&Unit>, input: &[u8]) -> Vec<u8> {
    let mut effects = Effects::new();
    let output = super::start(unit, input, &mut effects);
    assert_eq!(effects.into_iter().count(), 0);
    output
}

fn begin(unit: &Unit, address: u64, length: u64) -> u32 {
    let output = start(Some(unit), &start_input(address, length, TYPE_PERSISTENT, 0));
    StartOutput::read_from_bytes(&output).unwrap().status.get()
}

/// A status, checked for what holds of every status.
fn results(unit: &Unit) -> (StatusHeader, Vec<Range<u64>>) {
    let output = status(Some(unit), &[]);
    let (header, tail) = StatusHeader::read_from_prefix(&output).unwrap();
    assert_eq!(header.out_length.get() as usize, output.len() - 4);
    assert_eq!(tail.len(), header.records.get() as usize * 24);
    let records = tail
        .chunks(24)
        .map(|record| {
            let record = StatusRecord::read_from_bytes(record).unwrap();
            assert_eq!((record.handle.get(), record.reserved.get()), (unit.handle_at(BASE), 0));
            record.address.get()..record.address.get() + record.length.get()
        })
        .collect();
    (header, records)
}

#[test]
fn every_byte_of_the_capabilities_is_as_specified() {
    let (unit, _) = unit();
    let mut input = BASE.to_le_bytes().to_vec();
    input.extend(SIZE.to_le_bytes());
    // Persistent, 48 + 168 * 24 = 4080 bytes, 256 bytes.
    assert_eq!(capabilities(Some(&unit), &input), bytes("00000200 F00F0000 00010000 0100 0000"));
    input[8..].copy_from_slice(&512u64.to_le_bytes());
    assert_eq!(capabilities(Some(&unit), &input)[..4], [0, 0, 2, 0], "part of the unit");
}

#[test]
fn every_byte_of_a_start_is_as_specified() {
    let (unit, _) = unit();
    let input = bytes("0000004001000000 0000000100000000 0200 00 0000000000");
    assert_eq!(start(Some(&unit), &input), bytes("00000000 00000000"));
    let input = bytes("0000004001000000 0000000100000000 0200 02 0000000000");
    assert_eq!(start(Some(&unit), &input), bytes("00000000 00000000"));
}

#[test]
fn every_byte_of_a_status_is_as_specified() {
    let (unit, memory) = unit();
    let none = "00000200 2C000000 0000000000000000 0000000000000000
                0000000000000000 0000000000000000 0000 0000 00000000";
    assert_eq!(status(Some(&unit), &[]), bytes(none), "no scrub yet");
    assert_eq!(begin(&unit, BASE, SIZE), 0);
    let clean = "00000000 2C000000 0000004001000000 0000000100000000
                 0000000000000000 0000000000000000 0200 0000 00000000";
    assert_eq!(status(Some(&unit), &[]), bytes(clean));
    memory.poison(BASE + 0x1040..BASE + 0x10C0);
    memory.poison(BASE + SIZE - 64..BASE + SIZE);
    assert_eq!(begin(&unit, BASE, SIZE), 0);
    let two = "00000000 5C000000 0000004001000000 0000000100000000
               0000000000000000 0000000000000000 0200 0000 02000000
               01030000 00000000 4010004001000000 8000000000000000
               01030000 00000000 C0FFFF4001000000 4000000000000000";
    assert_eq!(status(Some(&unit), &[]), bytes(two));
}

#[test]
fn every_byte_of_an_overflow_is_as_specified() {
    let memory = Memory::default();
    let unit = unit_with(&memory, |config| config.ars_records = 1);
    memory.poison(BASE + 0x100..BASE + 0x140);
    memory.poison(BASE + 0x200..BASE + 0x240);
    assert_eq!(begin(&unit, BASE, SIZE), 0);
    let expected = "00000300 44000000 0000004001000000 4001000000000000
                    4001004001000000 C0FEFF0000000000 0200 0100 01000000
                    01030000 00000000 0001004001000000 4000000000000000";
    assert_eq!(status(Some(&unit), &[]), bytes(expected));
    assert_eq!(status(Some(&unit), &[]), bytes(expected), "asking again changes nothing");
    // The restart that Linux sends: address, length and type of the status.
    assert_eq!(start(Some(&unit), &start_input(BASE + 0x140, SIZE - 0x140, 2, 0))[..4], [0; 4]);
    let rest = "00000000 44000000 4001004001000000 C0FEFF0000000000
                0000000000000000 0000000000000000 0200 0000 01000000
                01030000 00000000 0002004001000000 4000000000000000";
    assert_eq!(status(Some(&unit), &[]), bytes(rest));
}

#[test]
fn a_full_buffer_is_no_overflow_and_fits_what_was_promised() {
    let (unit, memory) = unit();
    for n in 0..MAX_RECORDS as u64 {
        memory.poison(BASE + n * 0x1000..BASE + n * 0x1000 + 64);
    }
    assert_eq!(begin(&unit, BASE, SIZE), 0);
    let (header, records) = results(&unit);
    assert_eq!((header.status.get(), header.flags.get(), records.len()), (0, 0, 168));
    assert_eq!(status(Some(&unit), &[]).len(), 4080);
    memory.poison(BASE + SIZE - 64..BASE + SIZE);
    let (header, records) = results(&unit);
    assert_eq!((header.status.get(), header.flags.get(), records.len()), (0x30000, 1, 168));
    assert_eq!(status(Some(&unit), &[]).len(), 4080);
}

#[test]
fn records_are_cut_to_the_scrubbed_range() {
    let (unit, memory) = unit();
    memory.poison(BASE..BASE + 0x1000);
    assert_eq!(begin(&unit, BASE + 0x210, 0x20), 0);
    let (header, records) = results(&unit);
    assert_eq!((header.address.get(), header.length.get()), (BASE + 0x210, 0x20));
    assert_eq!((records.len(), &records[0]), (1, &(BASE + 0x210..BASE + 0x230)));
}

#[test]
fn wrong_starts_are_invalid_and_leave_the_last_scrub() {
    let (unit, _) = unit();
    assert_eq!(begin(&unit, BASE, 0x1000), 0);
    for (address, length, kind) in [
        (BASE, SIZE, 0),
        (BASE, SIZE, TYPE_VOLATILE),
        (BASE, SIZE, TYPE_PERSISTENT | 4),
        (BASE, 0, TYPE_PERSISTENT),
        (BASE - 1, 2, TYPE_PERSISTENT),
        (BASE, SIZE + 1, TYPE_PERSISTENT),
        (BASE + SIZE, 1, TYPE_PERSISTENT),
        (u64::MAX, u64::MAX, TYPE_PERSISTENT),
        (BASE, u64::MAX, TYPE_PERSISTENT),
    ] {
        let output = start(Some(&unit), &start_input(address, length, kind, 0));
        assert_eq!(output, bytes("02000000 00000000"), "{address:#x}+{length:#x} {kind}");
    }
    assert_eq!(start(None, &start_input(BASE, SIZE, 2, 0)), bytes("02000000 00000000"));
    assert_eq!(results(&unit).0.length.get(), 0x1000);
    let both = start(Some(&unit), &start_input(BASE, SIZE, TYPE_VOLATILE | TYPE_PERSISTENT, 0));
    assert_eq!(both[..4], [0; 4]);
    assert_eq!(results(&unit).0.kind.get(), 3, "a restart sends this type again");
}

#[test]
fn other_sizes_of_input_are_invalid() {
    let (unit, _) = unit();
    assert_eq!(begin(&unit, BASE, SIZE), 0);
    for size in [0, 8, 15, 17, 24] {
        let output = capabilities(Some(&unit), &vec![0; size]);
        assert_eq!(output, bytes("02000000 00000000 00000000 0000 0000"), "{size}");
    }
    for size in [0, 16, 23, 25, 4064] {
        assert_eq!(start(Some(&unit), &vec![0; size]), bytes("02000000 00000000"), "{size}");
    }
    let invalid = "02000000 2C000000 0000000000000000 0000000000000000
                   0000000000000000 0000000000000000 0000 0000 00000000";
    for size in [1, 4, 48] {
        assert_eq!(status(Some(&unit), &vec![0; size]), bytes(invalid), "{size}");
    }
}

#[test]
fn a_unit_that_has_gone_has_no_ranges_and_no_scrub() {
    let mut input = BASE.to_le_bytes().to_vec();
    input.extend(SIZE.to_le_bytes());
    assert_eq!(capabilities(None, &input)[..4], [2, 0, 0, 0]);
    assert_eq!(status(None, &[])[..4], [0, 0, 2, 0]);
}

/// A scrub of all takes ten seconds.
fn slow() -> (Unit, Memory, Hand) {
    let (memory, hand) = (Memory::default(), Hand::at(100));
    let unit = unit_with(&memory, |config| {
        config.ranges[0].scrub = Duration::from_secs(10);
        config.clock = hand.clock();
    });
    (unit, memory, hand)
}

#[test]
fn a_scrub_is_in_progress_until_its_time_is_over() {
    let (unit, memory, hand) = slow();
    memory.poison(BASE + 0x1000..BASE + 0x1040);
    let mut cap = BASE.to_le_bytes().to_vec();
    cap.extend(SIZE.to_le_bytes());
    assert_eq!(capabilities(Some(&unit), &cap)[12..], bytes("0300 0000"), "it tells when it stops");
    assert_eq!(unit.scrub_left(), None);
    let all = start_input(BASE, SIZE, TYPE_PERSISTENT, 0);
    let mut effects = Effects::new();
    assert_eq!(super::start(Some(&unit), &all, &mut effects), bytes("00000000 0A000000"), "ten seconds");
    assert_eq!(effects.into_iter().collect::<Vec<_>>(), [Effect::ScrubStarted { unit: 3 }]);
    let busy = "00000100 2C000000 0000004001000000 0000000100000000
                0000000000000000 0000000000000000 0200 0000 00000000";
    for seconds in [10, 6, 1] {
        assert_eq!(unit.scrub_left(), Some(Duration::from_secs(seconds)));
        assert!(!unit.take_scrub_end());
        assert_eq!(status(Some(&unit), &[]), bytes(busy));
        // Nothing else can be started, long or short, and the one under way goes on.
        for flags in [0, FLAG_PREVIOUS_DATA] {
            let refused = start(Some(&unit), &start_input(BASE, SIZE, TYPE_PERSISTENT, flags));
            assert_eq!(refused, bytes("06000000 00000000"));
        }
        let invalid = start(Some(&unit), &start_input(BASE, SIZE + 1, TYPE_PERSISTENT, 0));
        assert_eq!(invalid, bytes("02000000 00000000"), "what is wrong is wrong at any time");
        hand.set(Duration::from_secs(110 - if seconds == 10 { 6 } else { 1 }));
    }
    hand.set(Duration::from_secs(110));
    let (header, records) = results(&unit);
    assert_eq!((header.status.get(), records.len()), (0, 1));
    assert_eq!(unit.scrub_left(), Some(Duration::ZERO));
    assert!(unit.take_scrub_end() && !unit.take_scrub_end(), "its end is told once");
    assert_eq!(unit.scrub_left(), None);
}

#[test]
fn a_short_scrub_and_a_restart_take_what_they_should() {
    let (unit, _, hand) = slow();
    let short = start_input(BASE, SIZE, TYPE_PERSISTENT, FLAG_PREVIOUS_DATA);
    assert_eq!(start(Some(&unit), &short), bytes("00000000 00000000"));
    assert_eq!(results(&unit).0.status.get(), 0);
    let mut effects = Effects::new();
    let quarter = start_input(BASE + SIZE / 4 * 3, SIZE / 4, TYPE_PERSISTENT, 0);
    assert_eq!(super::start(Some(&unit), &quarter, &mut effects), bytes("00000000 03000000"));
    hand.advance(Duration::from_millis(2499));
    assert_eq!(results(&unit).0.status.get(), IN_PROGRESS);
    hand.advance(Duration::from_millis(1));
    assert_eq!(results(&unit).0.status.get(), 0);
}

/// What Linux does after a notification, minus its forgetting of restarted scrubs: start, then status and restart
/// until the end of the range is covered.
fn scrub(unit: &Unit, range: Range<u64>) -> Vec<Range<u64>> {
    let mut all = Vec::new();
    let (mut address, mut length) = (range.start, range.end - range.start);
    loop {
        assert_eq!(begin(unit, address, length), 0);
        let (header, records) = results(unit);
        assert_eq!(header.address.get(), address);
        assert!(records.len() <= unit.ars_records());
        all.extend(records);
        if header.flags.get() & FLAG_OVERFLOW == 0 {
            assert_eq!((header.status.get(), header.length.get()), (0, length));
            return all;
        }
        assert_eq!(header.status.get(), STOPPED_EARLY);
        assert_eq!(address + header.length.get(), header.restart_address.get());
        assert!(header.restart_length.get() < length, "every restart gets further");
        assert_eq!(header.restart_address.get() + header.restart_length.get(), range.end);
        (address, length) = (header.restart_address.get(), header.restart_length.get());
    }
}

#[derive(Clone, Debug)]
enum Step {
    Poison(u64, u64),
    Clear(u64, u64),
    Scrub(u64, u64),
}

fn step() -> impl Strategy<Value = Step> {
    // 64 KiB, so that steps meet each other.
    let lines = 1024u64;
    prop_oneof![
        3 => (0..lines, 1u64..5).prop_map(|(at, count)| Step::Poison(at, count)),
        2 => (0..lines / 4, 1u64..9).prop_map(|(at, count)| Step::Clear(at, count)),
        2 => (0..lines * LINE, 1..lines * LINE).prop_map(|(at, length)| Step::Scrub(at, length)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// The model is a list of lines. Whatever was poisoned and not cleared is found, once, by every scrub over it,
    /// through any number of overflows.
    #[test]
    fn scrubs_find_exactly_the_poison(steps in prop::collection::vec(step(), 1..80), records in 1usize..6) {
        let memory = Memory::default();
        let unit = unit_with(&memory, |config| config.ars_records = records);
        let mut model = vec![false; 1024 + 8];
        for step in steps {
            match step {
                Step::Poison(at, count) => {
                    memory.poison(BASE + at * LINE..BASE + (at + count) * LINE);
                    model[at as usize..(at + count) as usize].fill(true);
                }
                Step::Clear(at, count) => {
                    let input = ClearInput { address: (BASE + at * 256).into(), length: (count * 256).into() };
                    let output = clear(Some(&unit), input.as_bytes());
                    prop_assert_eq!(ClearOutput::read_from_bytes(&output).unwrap().cleared.get(), count * 256);
                    let end = model.len().min((at + count) as usize * 4);
                    model[at as usize * 4..end].fill(false);
                }
                Step::Scrub(at, length) => {
                    let range = BASE + at..(BASE + at + length).min(BASE + 1032 * LINE);
                    let mut found = vec![false; model.len() * LINE as usize];
                    for record in scrub(&unit, range.clone()) {
                        let (start, end) = ((record.start - BASE) as usize, (record.end - BASE) as usize);
                        prop_assert!(start < end && found[start..end].iter().all(|byte| !byte));
                        found[start..end].fill(true);
                    }
                    for (byte, found) in found.iter().enumerate() {
                        let expected = range.contains(&(BASE + byte as u64)) && model[byte / LINE as usize];
                        prop_assert_eq!(*found, expected, "byte {:#x}", byte);
                    }
                }
            }
        }
    }
}

#[test]
fn volatile_memory_is_scrubbed_as_such() {
    let unit = unit_with(&Memory::default(), |config| config.ranges[0].volatile = true);
    let input = CapabilitiesInput { address: BASE.into(), length: SIZE.into() };
    assert_eq!(capabilities(Some(&unit), input.as_bytes())[..4], [0, 0, 1, 0]);
    for (kind, status) in [(1u16, 0u8), (2, 2), (3, 0)] {
        let input = StartInput {
            address: BASE.into(),
            length: SIZE.into(),
            kind: kind.into(),
            flags: 0,
            reserved: [0; 5],
        };
        assert_eq!(start(Some(&unit), input.as_bytes())[0], status, "type {kind}");
    }
}
