//! Walks against hand-made tables, and against a model that builds tables for random mappings.

use std::collections::HashMap;

use proptest::prelude::*;

use super::*;

/// Sparse guest memory.
#[derive(Default)]
struct Memory {
    words: HashMap<u64, u64>,
    next: u64,
}

impl PhysRead for Memory {
    fn read_u64(&self, gpa: u64) -> Option<u64> {
        assert_eq!(gpa % 8, 0, "the walk reads whole words");
        (gpa < 1 << 36).then(|| self.words.get(&gpa).copied().unwrap_or(0))
    }
}

impl Memory {
    fn table(&mut self) -> u64 {
        self.next += 4096;
        self.next
    }

    /// Maps a page of 4 KiB << (9 * large), and returns the addresses of the entries from the top down.
    fn map(&mut self, paging: &Paging, linear: u64, large: u32, leaf: u64) -> Vec<u64> {
        let levels = if paging.mode() == Mode::Level5 { 5 } else { 4 };
        let mut table = paging.cr3;
        let mut path = Vec::new();
        for level in (large + 1..=levels).rev() {
            let at = table + ((linear >> (12 + 9 * (level - 1))) & 511) * 8;
            path.push(at);
            if level == large + 1 {
                self.words.insert(at, leaf | if large > 0 { LARGE } else { 0 });
            } else {
                let present = self.words.get(&at).copied().unwrap_or(0);
                let entry = if present & PRESENT != 0 { present } else { self.table() | 7 };
                self.words.insert(at, entry);
                table = entry & FRAME;
            }
        }
        path
    }
}

fn long_mode(five: bool) -> Paging {
    Paging {
        cr0: CR0_PE | CR0_PG | CR0_WP,
        cr3: 0x1000,
        cr4: CR4_PAE | if five { CR4_LA57 } else { 0 },
        efer: EFER_LMA | EFER_NXE,
        physical_bits: 40,
    }
}

fn data(write: bool, user: bool) -> Intent {
    Intent { write, fetch: false, user, smap_exempt: false, pkru: None }
}

#[test]
fn four_levels_read_four_entries() {
    let paging = long_mode(false);
    let mut memory = Memory { next: 0x1000, ..Default::default() };
    let path = memory.map(&paging, 0x7fff_1234_5000, 0, 0x8000_0000 | 7 | NO_EXECUTE);
    let walk = paging.walk(&memory, 0x7fff_1234_5678);
    assert_eq!(walk.entries.iter().map(|entry| entry.gpa).collect::<Vec<_>>(), path);
    let found = walk.result.unwrap();
    assert_eq!((found.gpa, found.page_size), (0x8000_0678, 4096));
    assert!(found.writable && found.user && !found.executable && !found.dirty);
}

#[test]
fn large_pages_and_their_reserved_bits() {
    let paging = long_mode(true);
    let mut memory = Memory { next: 0x1000, ..Default::default() };
    memory.map(&paging, 0x40_0000_0000, 2, 0x1_4000_0000 | 3 | 1 << 12);
    memory.map(&paging, 0x20_0000, 1, 0x60_0000 | 1);
    memory.map(&paging, 0x40_0000, 1, 0x60_2000 | 1);
    let giant = paging.walk(&memory, 0x40_1234_5678);
    assert_eq!(giant.entries.len(), 3);
    assert_eq!(giant.result.unwrap().gpa, 0x1_5234_5678, "bit 12 of a large page is PAT");
    assert_eq!(paging.walk(&memory, 0x2f_ffff).result.unwrap().gpa, 0x6f_ffff);
    assert_eq!(
        paging.walk(&memory, 0x40_0000).result,
        Err(NotTranslated::ReservedBit { level: 2, entry: 0x60_2000 | 1 | LARGE })
    );
}

#[test]
fn failures_name_the_level_and_keep_what_was_read() {
    let paging = long_mode(false);
    let mut memory = Memory { next: 0x1000, ..Default::default() };
    memory.map(&paging, 0x1000, 0, 0);
    let absent = paging.walk(&memory, 0x1000);
    assert_eq!(absent.result, Err(NotTranslated::NotPresent { level: 1 }));
    assert_eq!(absent.entries.len(), 4);
    assert_eq!(paging.walk(&memory, 1 << 47).result, Err(NotTranslated::NonCanonical));
    memory.words.insert(0x1000, 0x40_0000_0000_0000 & FRAME | 1 | 1 << 45);
    assert!(matches!(paging.walk(&memory, 0).result, Err(NotTranslated::ReservedBit { level: 4, .. })));
    memory.words.insert(0x1000, 0xf0_0000_0000 | 1);
    let missing = paging.walk(&memory, 0);
    assert_eq!(missing.result, Err(NotTranslated::NoMemory { entry: 0xf0_0000_0000 }));
    assert_eq!(missing.entries.len(), 1);
}

#[test]
fn canonical_depends_on_the_number_of_levels() {
    let (four, five) = (long_mode(false), long_mode(true));
    for (linear, in_four, in_five) in [
        (0x0000_7fff_ffff_ffff, true, true),
        (0x0000_8000_0000_0000, false, true),
        (0xffff_8000_0000_0000, true, true),
        (0xffff_7fff_ffff_ffff, false, true),
        (0x00ff_ffff_ffff_ffff, false, true),
        (0x0100_0000_0000_0000, false, false),
    ] {
        assert_eq!((four.canonical(linear), five.canonical(linear)), (in_four, in_five), "{linear:#x}");
    }
    let off = Paging { cr0: CR0_PE, ..four };
    assert!(off.canonical(0xffff_ffff) && !off.canonical(1 << 32));
}

#[test]
fn pae_has_four_directory_pointers_without_rights() {
    let paging = Paging { cr4: CR4_PAE, efer: EFER_NXE, cr3: 0x1fe0, ..long_mode(false) };
    assert_eq!(paging.mode(), Mode::Pae);
    let mut memory = Memory::default();
    memory.words.insert(0x1fe0 + 3 * 8, 0x3001);
    memory.words.insert(0x3000 + 8, 0x4007);
    memory.words.insert(0x3000 + 16, 0x20_0000 | LARGE | 3);
    memory.words.insert(0x4000 + 2 * 8, 0xab_c000 | 5);
    let small = paging.walk(&memory, 0xc020_2345);
    assert_eq!(small.entries.len(), 3);
    let found = small.result.unwrap();
    assert_eq!((found.gpa, found.writable, found.user), (0xab_c345, false, true));
    assert_eq!(paging.walk(&memory, 0xc040_0010).result.unwrap().gpa, 0x20_0010);
    memory.words.insert(0x1fe0 + 3 * 8, 0x3003);
    assert!(matches!(
        paging.walk(&memory, 0xc020_2345).result,
        Err(NotTranslated::ReservedBit { level: 3, .. })
    ));
}

#[test]
fn two_levels_of_four_bytes_with_and_without_large_pages() {
    let paging = Paging { cr4: CR4_PSE, efer: 0, cr3: 0x1000, ..long_mode(false) };
    assert_eq!(paging.mode(), Mode::Bits32);
    let mut memory = Memory::default();
    // Directory entries 0 (a table) and 1 (a 4 MiB page above 4 GiB) share one word.
    memory.words.insert(0x1000, (0x0080_0000u64 | 1 << 13 | LARGE | 7) << 32 | 0x2003);
    memory.words.insert(0x2000 + 4 * 4, 0x5000 | 1);
    let small = paging.walk(&memory, 0x4123);
    assert_eq!(small.entries, [TableEntry { gpa: 0x1000, size: 4 }, TableEntry { gpa: 0x2010, size: 4 }]);
    assert_eq!(small.result.map(|found| (found.gpa, found.writable)), Ok((0x5123, false)));
    assert_eq!(paging.walk(&memory, 0x41_2345).result.unwrap().gpa, 0x1_0081_2345);
    let plain = Paging { cr4: 0, ..paging };
    assert!(plain.walk(&memory, 0x41_2345).result.is_err(), "without PSE the entry names a table");
}

#[test]
fn permissions() {
    let paging = Paging { cr4: CR4_PAE | CR4_SMEP | CR4_SMAP | CR4_PKE, ..long_mode(false) };
    let user = Translation {
        gpa: 0,
        page_size: 4096,
        writable: false,
        user: true,
        executable: true,
        accessed: true,
        dirty: false,
        protection_key: Some(1),
    };
    let kernel = Translation { user: false, ..user };
    let fetch = Intent { fetch: true, ..data(false, false) };
    assert!(user.permits(&paging, data(false, true)) && !user.permits(&paging, data(true, true)));
    assert!(!kernel.permits(&paging, data(false, true)));
    assert!(!user.permits(&paging, data(false, false)), "SMAP");
    assert!(user.permits(&paging, Intent { smap_exempt: true, ..data(false, false) }));
    assert!(!user.permits(&paging, fetch), "SMEP");
    assert!(user.permits(&paging, Intent { user: true, ..fetch }));
    assert!(!Translation { executable: false, ..kernel }.permits(&paging, fetch));
    assert!(!kernel.permits(&paging, data(true, false)), "WP");
    assert!(kernel.permits(&Paging { cr0: CR0_PG, ..paging }, data(true, false)));
    let writable = Translation { writable: true, ..user };
    assert!(writable.permits(&paging, Intent { pkru: Some(2), ..data(true, true) }), "another key");
    assert!(!writable.permits(&paging, Intent { pkru: Some(8), ..data(true, true) }), "write-disable");
    assert!(writable.permits(&paging, Intent { pkru: Some(8), ..data(false, true) }));
    assert!(!writable.permits(&paging, Intent { pkru: Some(4), ..data(false, true) }), "access-disable");
}

#[test]
fn bytes_end_where_memory_ends() {
    let memory = |gpa: u64| (gpa < 16).then_some(0x0706_0504_0302_0100 + gpa * 0x0101_0101_0101_0101);
    let mut buffer = [0xee; 20];
    assert_eq!(memory.read_bytes(3, &mut buffer), 13);
    assert_eq!(buffer[..13], [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]);
    assert_eq!((|_| Some(0)).read_bytes(u64::MAX - 2, &mut buffer), 3);
}

/// (page number, size in levels, frame number, rights)
fn mapping() -> impl Strategy<Value = (u64, u32, u64, u64)> {
    (0..1u64 << 45, 0..3u32, 0..1u64 << 28, 0..8u64)
}

proptest! {
    #[test]
    fn random_tables_translate_as_the_model_says(
        five in any::<bool>(),
        mappings in prop::collection::vec(mapping(), 1..24),
        offsets in prop::collection::vec(any::<u64>(), 24),
    ) {
        let paging = long_mode(five);
        let bits = if five { 57 } else { 48 };
        let mut memory = Memory { next: 0x1000, ..Default::default() };
        let mut model: Vec<(u64, u64, u64, u64)> = Vec::new();
        for (page, large, frame, rights) in mappings {
            let size = 4096u64 << (9 * large);
            let sign = 64 - bits;
            let linear = ((page.wrapping_mul(size) << sign) as i64 >> sign) as u64;
            // A large page and anything under its entry would replace each other's tables.
            let overlap = |&(other, length, ..): &(u64, u64, u64, u64)| {
                let span = size.max(length);
                linear / span == other / span
            };
            if model.iter().any(overlap) {
                continue;
            }
            let gpa = (frame * 4096) & !(size - 1);
            let leaf = gpa | PRESENT | (rights & 3) << 1 | if rights & 4 != 0 { NO_EXECUTE } else { 0 };
            memory.map(&paging, linear, large, leaf);
            model.push((linear, size, gpa, rights));
        }
        for (&(linear, size, gpa, rights), offset) in model.iter().zip(offsets) {
            let offset = offset & (size - 1);
            let walk = paging.walk(&memory, linear + offset);
            let found = walk.result.unwrap();
            prop_assert_eq!((found.gpa, found.page_size), (gpa + offset, size));
            prop_assert_eq!(found.writable, rights & 1 != 0);
            prop_assert_eq!(found.user, rights & 2 != 0);
            prop_assert_eq!(found.executable, rights & 4 == 0);
        }
    }

    #[test]
    fn no_registers_and_no_memory_make_it_panic(
        cr0 in any::<u64>(), cr3 in any::<u64>(), cr4 in any::<u64>(), efer in any::<u64>(),
        physical_bits in any::<u8>(), linear in any::<u64>(), fill in any::<u64>(),
    ) {
        let paging = Paging { cr0, cr3, cr4, efer, physical_bits };
        let walk = paging.walk(&|gpa: u64| (gpa & 0x4000 == 0).then_some(fill), linear);
        prop_assert!(walk.entries.len() <= 5);
        if let Ok(found) = walk.result {
            found.permits(&paging, data(true, true));
            prop_assert!(found.gpa >> 52 == 0);
        }
    }
}
