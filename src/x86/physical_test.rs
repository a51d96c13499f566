//! Pages, rights and order.

use super::*;
use crate::x86::operands::Reason;
use crate::x86::walk::{CR4_SMAP, PhysRead};
use std::collections::HashMap;

const PRESENT: u64 = 0x27;
const DIRTY: u64 = 0x40;

/// Page tables at 0x1000 to 0x4fff for linear pages 0 to 511, as words.
struct Memory(HashMap<u64, u64>);

impl PhysRead for Memory {
    fn read_u64(&self, gpa: u64) -> Option<u64> {
        (gpa < 1 << 30).then(|| self.0.get(&gpa).copied().unwrap_or(0))
    }
}

fn machine(pages: &[(u64, u64)]) -> (CpuState, Memory) {
    let mut words =
        HashMap::from([(0x1000, 0x2000 | PRESENT), (0x2000, 0x3000 | PRESENT), (0x3000, 0x4000 | PRESENT)]);
    words.extend(pages.iter().map(|&(page, entry)| (0x4000 + page * 8, entry)));
    let mut state = CpuState { physical_bits: 40, ..Default::default() };
    state.sregs.cr0 = 0x8005_0033;
    state.sregs.cr3 = 0x1000;
    state.sregs.cr4 = 0x20;
    state.sregs.efer = 0xd01;
    state.sregs.cs.l = 1;
    (state, Memory(words))
}

fn access(kind: AccessKind, address: u64, size: u32) -> Access {
    Access { kind, address, size, implicit: false }
}

fn shown(list: &PhysicalAccesses) -> Vec<(AccessKind, u64, u32)> {
    list.ranges.iter().map(|range| (range.kind, range.gpa, range.size)).collect()
}

const WALK: [(AccessKind, u64, u32); 3] =
    [(AccessKind::Walk, 0x1000, 8), (AccessKind::Walk, 0x2000, 8), (AccessKind::Walk, 0x3000, 8)];

#[test]
fn an_access_across_pages_needs_both_translations_first() {
    let (state, memory) = machine(&[(0x10, 0x8_0000 | PRESENT), (0x11, 0x9_0000 | PRESENT | DIRTY)]);
    let list = physical_accesses(&state, &memory, &[access(AccessKind::Store, 0x1_0ffc, 8)]);
    let mut expected = WALK.to_vec();
    expected.push((AccessKind::Walk, 0x4080, 8));
    expected.extend(WALK);
    expected.push((AccessKind::Walk, 0x4088, 8));
    expected.extend([(AccessKind::Store, 0x8_0ffc, 4), (AccessKind::Store, 0x9_0000, 4)]);
    assert_eq!(shown(&list), expected);
    assert_eq!(list.fault, None);
    let marks: Vec<_> = list.ranges[8..].iter().map(|range| range.marks_entry).collect();
    assert_eq!(marks, [true, false], "the first page's dirty bit is still to be set");
}

#[test]
fn the_list_ends_where_the_guest_faults() {
    let (state, memory) = machine(&[(0x10, 0x8_0000 | PRESENT)]);
    let list = physical_accesses(
        &state,
        &memory,
        &[
            access(AccessKind::Load, 0x1_0000, 8),
            access(AccessKind::Store, 0x1_0ffc, 8),
            access(AccessKind::Load, 0, 1),
        ],
    );
    let reason = FaultReason::NotTranslated(NotTranslated::NotPresent { level: 1 });
    assert_eq!(list.fault, Some(GuestFault { linear: 0x1_1000, kind: AccessKind::Store, reason }));
    assert_eq!(list.ranges.iter().filter(|range| range.kind != AccessKind::Walk).count(), 1);
    assert_eq!(list.ranges.len(), 4 + 1 + 4 + 4, "the entries that showed the fault were read");
}

#[test]
fn hints_never_fault() {
    let (state, memory) = machine(&[]);
    let list = physical_accesses(&state, &memory, &[access(AccessKind::Prefetch, 0x1_0000, 1)]);
    assert_eq!(list.fault, None);
    let list = physical_accesses(&state, &memory, &[access(AccessKind::CacheControl, 0x1_0000, 1)]);
    assert!(list.fault.is_some());
}

#[test]
fn implicit_accesses_are_made_by_the_supervisor() {
    let (mut state, memory) = machine(&[(0x10, 0x8_0023), (0x11, 0x9_0000 | PRESENT)]);
    state.sregs.ss.dpl = 3;
    let explicit = access(AccessKind::Load, 0x1_0000, 8);
    let implicit = Access { implicit: true, ..explicit };
    assert_eq!(
        physical_accesses(&state, &memory, &[explicit]).fault.map(|fault| fault.reason),
        Some(FaultReason::Forbidden)
    );
    assert_eq!(physical_accesses(&state, &memory, &[implicit]).fault, None);
    state.sregs.cr4 |= CR4_SMAP;
    state.regs.rflags = 1 << 18;
    let user_page = Access { address: 0x1_1000, ..implicit };
    assert!(
        physical_accesses(&state, &memory, &[user_page]).fault.is_some(),
        "AC exempts explicit accesses only"
    );
    state.sregs.ss.dpl = 0;
    assert_eq!(physical_accesses(&state, &memory, &[Access { implicit: false, ..user_page }]).fault, None);
}

#[test]
fn addresses_wrap_where_the_mode_says() {
    let (mut state, memory) = machine(&[(0, PRESENT)]);
    let list = physical_accesses(&state, &memory, &[access(AccessKind::Load, u64::MAX - 3, 8)]);
    assert!(list.fault.is_some(), "the last page is not mapped");
    state.sregs.cr0 = 1;
    state.sregs.efer = 0;
    let list = physical_accesses(&state, &memory, &[access(AccessKind::Load, 0xffff_fffc, 8)]);
    assert_eq!(shown(&list), [(AccessKind::Load, 0xffff_fffc, 4), (AccessKind::Load, 0, 4)]);
}

#[test]
fn an_instruction_from_bytes_to_physical_ranges() {
    let (mut state, mut memory) = machine(&[(0x10, 0x8_0000 | PRESENT), (0x20, 0x9_0000 | PRESENT)]);
    // add [rax], rax
    memory.0.insert(0x8_0008, 0x0000_0148);
    (state.regs.rip, state.regs.rax) = (0x1_0008, 0x2_0040);
    let (found, list) = touched(&state, &memory);
    assert_eq!(found.unwrap().text(), "add [rax],rax");
    let data: Vec<_> = shown(&list).into_iter().filter(|range| range.0 != AccessKind::Walk).collect();
    assert_eq!(data, [(AccessKind::Fetch, 0x8_0008, 3), (AccessKind::ReadModifyWrite, 0x9_0040, 8)]);
}

#[test]
fn a_fetch_that_faults_still_shows_its_walk() {
    let (mut state, memory) = machine(&[]);
    state.regs.rip = 0x1_0008;
    let (found, list) = touched(&state, &memory);
    assert!(matches!(found.unwrap_err().reason, Reason::FetchNotTranslated { linear: 0x1_0008, .. }));
    assert_eq!(list.ranges.len(), 4);
    assert!(list.fault.is_some_and(|fault| fault.kind == AccessKind::Fetch));
}
