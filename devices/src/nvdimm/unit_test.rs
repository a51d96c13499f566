use aconite_acpi::{DimmFlags, NvdimmUnit, Persistence, RangeType, UnitDimm};

use super::super::testing::{BASE, Memory, SIZE, bare_dimm, range, still, unit, unit_with};
use super::*;

fn config() -> UnitConfig {
    UnitConfig::new(3, vec![1, 2, 3], vec![range(&Memory::default())], vec![bare_dimm()], still())
}

#[test]
fn wrong_values_are_refused_by_name() {
    let refused = |change: fn(&mut UnitConfig)| {
        let mut config = config();
        change(&mut config);
        Unit::new(config).unwrap_err()
    };
    assert_eq!(refused(|c| c.slot = 64), UnitError::NoSlot(64));
    for clear_unit in [0, 32, 96, 255] {
        let mut config = config();
        config.clear_unit = clear_unit;
        assert_eq!(Unit::new(config).unwrap_err(), UnitError::ClearUnit { slot: 3, clear_unit });
    }
    assert!(matches!(refused(|c| c.ranges[0].size = 0), UnitError::Range { .. }));
    assert!(matches!(refused(|c| c.ranges[0].size = 0x180), UnitError::Range { .. }));
    assert!(matches!(refused(|c| c.ranges[0].base += 64), UnitError::Range { .. }));
    assert!(matches!(refused(|c| c.ranges[0].base = u64::MAX - 0xFFF), UnitError::Range { .. }));
    assert!(matches!(refused(|c| c.dimms.clear()), UnitError::Interleave { slot: 3, base: BASE }));
    assert!(matches!(refused(|c| c.ranges[0].interleave.line = 0), UnitError::Interleave { .. }));
    assert!(matches!(refused(|c| c.ars_records = 0), UnitError::ArsRecords { .. }));
    assert!(matches!(refused(|c| c.ars_records = MAX_RECORDS + 1), UnitError::ArsRecords { .. }));
    assert!(matches!(refused(|c| c.fit = vec![0; 0xFF9]), UnitError::Fit { length: 0xFF9, .. }));
    assert_eq!(
        refused(|c| c.fit = vec![0; 5000]).to_string(),
        "_FIT of unit 3 has 5000 bytes: give at most 4088"
    );
}

#[test]
fn a_slot_holds_one_unit_at_a_time() {
    let table = UnitTable::new();
    assert!(table.get(3).is_none());
    table.insert(unit().0).unwrap();
    assert_eq!(table.insert(unit().0).unwrap_err(), UnitError::Taken(3));
    assert_eq!(table.get(3).unwrap().handle_at(BASE), 0x301);
    assert!(table.remove(3).is_some());
    assert!(table.remove(3).is_none());
    assert!(table.get(3).is_none());
    table.insert(unit().0).unwrap();
    assert!(table.get(64).is_none() && table.remove(u32::MAX).is_none());
}

#[test]
fn fit_and_unit_name_the_same_dimm_and_range() {
    let pmem = NvdimmUnit {
        unit: 3,
        ranges: vec![aconite_acpi::UnitRange {
            range: aconite_acpi::AddressRange { base: BASE, size: SIZE },
            proximity: 1,
            kind: RangeType::Persistent,
            line: 256,
            shares: vec![aconite_acpi::Share { dimm: 0, dimm_address: 0 }],
        }],
        dimms: vec![UnitDimm { serial: 7, flags: DimmFlags::empty(), capacity: SIZE, flush_hint: true }],
        lie: None,
    };
    let fit = pmem.fit(Persistence::MemoryController);
    let unit = unit_with(&Memory::default(), |config| config.fit = fit);
    let fit = unit.fit();
    // SPA range at 0 (56 bytes), region map behind it; Linux `struct acpi_nfit_system_address` and
    // `acpi_nfit_memory_map`.
    assert_eq!(fit[32..40], BASE.to_le_bytes());
    assert_eq!(fit[40..48], SIZE.to_le_bytes());
    assert_eq!(fit[56 + 4..56 + 8], unit.handle_at(BASE).to_le_bytes());
    assert_eq!(fit[56 + 32..56 + 40], unit.place(BASE).unwrap().address.to_le_bytes());
}

#[test]
fn ranges_inside_the_unit_are_told_from_others() {
    let memory = Memory::default();
    let unit = unit_with(&memory, |_| {});
    assert_eq!(unit.range(BASE, SIZE), Some(BASE..BASE + SIZE));
    assert_eq!(unit.range(BASE + SIZE - 1, 1), Some(BASE + SIZE - 1..BASE + SIZE));
    for (address, length) in [(BASE, 0), (BASE - 1, 2), (BASE, SIZE + 1), (u64::MAX, 1), (BASE, u64::MAX)] {
        assert_eq!(unit.range(address, length), None, "{address:#x}+{length:#x}");
    }
}

/// Two ranges that touch each other, over three DIMMs, of which the second is in both.
fn two_ranges() -> (Unit, [Memory; 2]) {
    let memories = [Memory::default(), Memory::default()];
    let share = |dimm, dimm_address| Share { dimm, dimm_address };
    let first = UnitRange {
        interleave: Interleave { line: 256, shares: vec![share(0, 0), share(1, 0)] },
        ..range(&memories[0])
    };
    let second = UnitRange {
        base: BASE + SIZE,
        interleave: Interleave { line: 4096, shares: vec![share(1, SIZE / 2), share(2, 0)] },
        ..range(&memories[1])
    };
    let dimms = vec![bare_dimm(), bare_dimm(), bare_dimm()];
    (Unit::new(UnitConfig::new(3, Vec::new(), vec![second, first], dimms, still())).unwrap(), memories)
}

#[test]
fn a_range_of_a_call_lies_in_one_range_of_the_unit() {
    let (unit, memories) = two_ranges();
    assert_eq!(unit.range(BASE + SIZE, SIZE), Some(BASE + SIZE..BASE + 2 * SIZE));
    assert_eq!(unit.range(BASE + SIZE - 64, 128), None, "across two ranges");
    assert_eq!(unit.range(BASE + 2 * SIZE, 64), None);
    for place in [BASE, BASE + SIZE] {
        assert!(unit.poison(place..place + 64));
    }
    assert_eq!(memories.each_ref().map(Memory::poison_total), [64, 64]);
    assert_eq!(unit.all_poisoned(9), [BASE..BASE + 64, BASE + SIZE..BASE + SIZE + 64]);
    assert_eq!(unit.all_poisoned(1), [BASE..BASE + 64]);
    assert_eq!(unit.poisoned(BASE + SIZE..BASE + 2 * SIZE, 9).len(), 1);
    assert_eq!(unit.clear(BASE + SIZE..BASE + SIZE + 256), 256);
    assert_eq!(memories.each_ref().map(Memory::poison_total), [64, 0]);
}

#[test]
fn addresses_are_places_on_dimms() {
    let (unit, _) = two_ranges();
    assert_eq!(unit.handle_at(BASE + 256), 0x302);
    assert_eq!(unit.handle_at(BASE + SIZE + 4096), 0x303);
    let place = unit.place(BASE + SIZE + 8192 + 5).unwrap();
    assert_eq!((place.dimm, place.address, place.length), (1, SIZE / 2 + 4096 + 5, 4091));
    assert_eq!((unit.place(BASE + 2 * SIZE), unit.handle_at(BASE - 1)), (None, 0));
}

#[test]
fn what_a_dimm_holds_is_erased_and_flushed() {
    let (unit, memories) = two_ranges();
    assert!(unit.erase(1));
    let erased = memories.each_ref().map(Memory::erased);
    assert_eq!([erased[0].len() as u64, erased[1].len() as u64], [SIZE / 512, SIZE / 8192]);
    assert_eq!(erased[0][..2], [BASE + 256..BASE + 512, BASE + 768..BASE + 1024]);
    assert_eq!(erased[1][0], BASE + SIZE..BASE + SIZE + 4096);
    unit.flush(2);
    assert_eq!(memories.each_ref().map(Memory::flushes), [0, 1]);
    unit.flush(1);
    assert_eq!(memories.each_ref().map(Memory::flushes), [1, 2]);
}

#[test]
fn a_larger_unit_takes_the_place_of_another_with_its_faults() {
    let (unit, memory) = unit();
    let table = UnitTable::new();
    let larger = || unit_with(&memory, |config| config.fit = vec![0xF2; 120]);
    assert_eq!(table.replace(larger()).unwrap_err(), UnitError::NoSlot(3));
    let fault =
        CallFault { callee: Callee::Root, function: 3, call: 1, count: Some(1), deed: Deed::Status(2) };
    unit.plan_fault(fault);
    table.insert(unit).unwrap();
    let now = table.replace(larger()).unwrap();
    assert_eq!((now.fit().len(), now.faults().len()), (120, 1));
    assert_eq!(table.get(3).unwrap().fit().len(), 120);
}
