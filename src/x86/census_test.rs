//! A census of hand-made, random and hostile tables.

use std::collections::HashMap;

use proptest::prelude::*;

use super::*;
use crate::x86::walk::{CR0_PE, CR0_PG, CR4_LA57, CR4_PAE, EFER_LMA, PhysRead};

/// Where RAM ends.
const RAM: u64 = 1 << 30;
const DEVICE: Range<u64> = 0x1_0000_0000..0x1_4000_0000;
const USER: u64 = 7;

/// Sparse guest memory.
#[derive(Clone, Default)]
struct Memory {
    tables: HashMap<u64, Box<Table>>,
    next: u64,
}

impl TableMemory for Memory {
    fn table(&self, gpa: u64, table: &mut Table) -> bool {
        assert_eq!(gpa % 4096, 0);
        *table = self.tables.get(&gpa).map_or([0; WORDS], |found| **found);
        gpa < RAM
    }

    fn occupied(&self) -> Vec<Range<u64>> {
        vec![0x1000..self.next + 4096]
    }
}

impl PhysRead for Memory {
    fn read_u64(&self, gpa: u64) -> Option<u64> {
        let index = (gpa % 4096 / 8) as usize;
        (gpa < RAM).then(|| self.tables.get(&(gpa & !4095)).map_or(0, |table| table[index]))
    }
}

impl Memory {
    fn new_table(&mut self) -> u64 {
        self.next += 4096;
        self.tables.insert(self.next, Box::new([0; WORDS]));
        self.next
    }

    fn set(&mut self, table: u64, index: usize, entry: u64) {
        self.tables.get_mut(&table).expect("a table")[index] = entry;
    }

    fn get(&self, table: u64, index: usize) -> u64 {
        self.tables[&table][index]
    }

    /// Maps a page of 4 KiB << (9 * large).
    fn map(&mut self, paging: &Paging, va: u64, large: u32, leaf: u64) {
        let levels = if paging.mode() == Mode::Level5 { 5 } else { 4 };
        let mut table = paging.cr3;
        for level in (large + 1..=levels).rev() {
            let index = ((va >> (12 + 9 * (level - 1))) & 511) as usize;
            if level == large + 1 {
                self.set(table, index, leaf | if large > 0 { LARGE } else { 0 });
            } else {
                if self.get(table, index) & PRESENT == 0 {
                    let next = self.new_table();
                    self.set(table, index, next | USER);
                }
                table = self.get(table, index) & FRAME;
            }
        }
    }

    /// A process of the kernel that `first` belongs to.
    fn fork(&mut self, first: &Paging) -> Paging {
        let cr3 = self.new_table();
        for index in KERNEL_HALF..WORDS {
            // Linux sets accessed bits in each table by itself.
            let entry = self.get(first.cr3, index) | (1 << 5);
            self.set(cr3, index, entry & if entry & PRESENT == 0 { 0 } else { !0 });
        }
        Paging { cr3, ..*first }
    }
}

fn kernel(memory: &mut Memory, five: bool) -> Paging {
    let cr3 = memory.new_table();
    let cr4 = CR4_PAE | if five { CR4_LA57 } else { 0 };
    let paging = Paging { cr0: CR0_PE | CR0_PG, cr3, cr4, efer: EFER_LMA, physical_bits: 40 };
    // Text at the end, and a direct map of RAM.
    memory.map(&paging, 0xffff_ffff_8000_0000, 1, 0x20_0000 | 3);
    memory.map(&paging, 0xffff_8880_0000_0000, 1, 3);
    paging
}

#[test]
fn every_process_is_found_and_each_half_told_apart() {
    for five in [false, true] {
        let mut memory = Memory::default();
        let first = kernel(&mut memory, five);
        memory.map(&first, 0xffff_8880_4000_0000, 2, DEVICE.start | 3);
        let other = memory.fork(&first);
        let third = memory.fork(&first);
        memory.map(&other, 0x7f00_0000_1000, 0, (DEVICE.start + 0x5000) | USER);
        memory.map(&other, 0x7f00_0000_2000, 0, (DEVICE.start + 0x6000) | USER);
        memory.map(&other, 0x7f00_0000_3000, 0, 0x5000 | USER);
        memory.map(&third, 0x6000_0020_0000, 1, (DEVICE.start + 0x20_0000) | 5);
        let found = census(&memory, &[first], DEVICE);
        assert!(found.complete);
        assert_eq!(found.roots, 3);
        let user = |root: Paging, va, gpa, bytes, page_size, writable| Mapping {
            root: root.cr3,
            va,
            gpa,
            bytes,
            page_size,
            writable,
        };
        assert_eq!(
            found.user.mappings,
            [
                user(other, 0x7f00_0000_1000, DEVICE.start + 0x5000, 0x2000, 0x1000, true),
                user(third, 0x6000_0020_0000, DEVICE.start + 0x20_0000, 0x20_0000, 0x20_0000, false),
            ]
        );
        assert_eq!((found.user.entries, found.user.bytes), (3, 0x20_2000));
        let direct = user(first, 0xffff_8880_4000_0000, DEVICE.start, 1 << 30, 1 << 30, true);
        assert_eq!(found.kernel.mappings, [direct], "the kernel's half is looked into once");
        for mapping in found.user.mappings {
            let paging = Paging { cr3: mapping.root, ..first };
            assert_eq!(
                paging.walk(&memory, mapping.va).result.unwrap().gpa,
                mapping.gpa,
                "as a processor sees it"
            );
        }
    }
}

#[test]
fn a_large_page_that_holds_the_range_counts_with_what_lies_in_it() {
    let mut memory = Memory::default();
    let first = kernel(&mut memory, false);
    memory.map(&first, 0x4000_0000, 2, 0x1_0000_0000 | USER);
    let found = census(&memory, &[first], 0x1_0000_3000..0x1_0000_5000);
    let [mapping] = found.user.mappings[..] else { panic!("{found:?}") };
    assert_eq!((mapping.va, mapping.gpa, mapping.bytes), (0x4000_3000, 0x1_0000_3000, 0x2000));
    assert_eq!(found.user.bytes, 0x2000);
}

#[test]
fn the_first_of_two_top_tables_of_a_process_counts() {
    let mut memory = Memory { next: 0x1000, ..Memory::default() };
    let first = kernel(&mut memory, false);
    assert_eq!(first.cr3, 0x2000);
    let hidden = Paging { cr3: 0x3000, ..first };
    memory.tables.insert(0x3000, Box::new([0; WORDS]));
    memory.set(0x3000, 511, memory.get(0x2000, 511));
    let found = census(&memory, &[hidden], DEVICE);
    assert_eq!(found.roots, 1);
}

/// With five levels the two tables have only entries of the second level in common.
#[test]
fn the_first_of_two_top_tables_counts_with_five_levels() {
    let mut memory = Memory { next: 0x3000, ..Memory::default() };
    let first = kernel(&mut memory, true);
    assert_eq!(first.cr3, 0x4000);
    let (hidden, own) = (Paging { cr3: 0x5000, ..first }, memory.new_table());
    // What `kernel` has put there goes elsewhere.
    let taken = memory.tables.insert(0x5000, Box::new([0; WORDS])).unwrap();
    let moved = memory.new_table();
    *memory.tables.get_mut(&moved).unwrap() = taken;
    let text = memory.get(first.cr3, 511);
    assert_eq!(text & FRAME, 0x5000);
    memory.set(first.cr3, 511, moved | USER);
    memory.set(own, 511, memory.get(moved, 511));
    memory.set(hidden.cr3, 511, own | USER);
    assert_eq!(census(&memory, &[hidden], DEVICE).roots, 1);
}

/// What lies before a process's top table is not its first one, whatever is in it.
#[test]
fn a_page_before_a_top_table_is_no_top_table() {
    for five in [false, true] {
        let mut memory = Memory::default();
        let first = kernel(&mut memory, five);
        while memory.next & 0x1000 == 0 {
            memory.new_table();
        }
        let before = memory.new_table();
        let process = memory.fork(&first);
        assert_eq!(before, process.cr3 & !0x1000);
        for index in 0..WORDS {
            memory.set(before, index, 0x1_0000_0000 | (index as u64) << 12 | USER);
        }
        let found = census(&memory, &[process], DEVICE);
        assert_eq!((found.roots, found.user), (2, Half::default()));
    }
}

#[test]
fn processors_that_sleep_or_run_something_else_are_no_mistake() {
    let memory = Memory::default();
    let off = Paging { cr0: 0, cr3: 0, cr4: 0, efer: 0, physical_bits: 40 };
    assert_eq!(census(&memory, &[off], DEVICE), Findings { complete: true, ..Findings::default() });
    let old = Paging { cr0: CR0_PE | CR0_PG, ..off };
    assert!(!census(&memory, &[old], DEVICE).complete, "its tables were not looked into");
    let nowhere = Paging { cr3: 1 << 40, cr4: CR4_PAE, efer: EFER_LMA, ..old };
    assert_eq!(census(&memory, &[nowhere], DEVICE).user, Half::default());
}

/// Every entry of every table leads to one of the tables again.
#[test]
fn tables_that_contain_themselves_end() {
    let mut memory = Memory::default();
    let first = kernel(&mut memory, true);
    for table in [first.cr3, 0x2000, 0x3000, 0x4000, 0x5000] {
        for index in 0..WORDS {
            memory.set(table, index, (0x1000 * (index as u64 % 5 + 1)) | USER);
        }
    }
    let found = census(&memory, &[first], DEVICE);
    assert!(found.complete && found.tables < 10_000, "{} tables", found.tables);
    assert_eq!((found.user, found.kernel), (Half::default(), Half::default()));

    // With a leaf at every end there is no end: it is said.
    for index in 0..WORDS {
        memory.set(0x3000, index, (DEVICE.start + 4096 * index as u64) | LARGE | USER);
    }
    let found = census_within(&memory, &[first], DEVICE, 20_000);
    assert!(!found.complete && found.user.more > 0);
    assert_eq!((found.tables, found.user.mappings.len()), (20_000, MOST_MAPPINGS));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// Random mappings of random processes: the census lists exactly the pages that a walk finds in the device.
    #[test]
    fn a_census_finds_what_a_walk_does(
        five in any::<bool>(),
        maps in prop::collection::vec((0usize..4, 0u64..8, 0u32..2, 0u64..0x400, any::<bool>()), 0..40),
    ) {
        let mut memory = Memory::default();
        let first = kernel(&mut memory, five);
        let mut processes = vec![first];
        for _ in 0..3 {
            processes.push(memory.fork(&first));
        }
        let mut used = Vec::new();
        for (process, place, large, page, outside) in maps {
            let va = 0x5500_0000_0000 + place * 0x20_0000;
            let base = if outside { 0x2_0000_0000 } else { DEVICE.start };
            let gpa = base + page * if large == 1 { 0x20_0000 } else { 0x1000 } % 0x4000_0000;
            if used.iter().any(|(_, other, size)| *other == va && *size != large) {
                continue;
            }
            used.push((process, va, large));
            memory.map(&processes[process], va, large, gpa | USER);
        }
        let found = census(&memory, &[first], DEVICE);
        prop_assert!(found.complete);
        let mut listed: Vec<(u64, u64)> = Vec::new();
        for mapping in &found.user.mappings {
            let pages = (0..mapping.bytes).step_by(0x1000);
            listed.extend(pages.map(|offset| (mapping.root, mapping.va + offset)));
        }
        listed.sort_unstable();
        let mut walked = Vec::new();
        for paging in &processes {
            for page in 0..8 * 512 {
                let va = 0x5500_0000_0000 + page * 0x1000;
                if paging.walk(&memory, va).result.is_ok_and(|found| DEVICE.contains(&found.gpa)) {
                    walked.push((paging.cr3, va));
                }
            }
        }
        walked.sort_unstable();
        prop_assert_eq!(listed, walked);
    }
}
