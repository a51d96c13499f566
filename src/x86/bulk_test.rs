//! Runs against a model that takes one element at a time.

use std::collections::HashMap;

use proptest::prelude::*;

use super::*;
use crate::x86::operands::operands;

const CODE: u64 = 0x3000;

/// Identity-mapped pages 0 to 15 in one 4 KiB table; the code's page and the operands are accessed and dirty.
struct Memory {
    words: HashMap<u64, u64>,
}

impl PhysRead for Memory {
    fn read_u64(&self, gpa: u64) -> Option<u64> {
        (gpa < 0x20_0000).then(|| self.words.get(&gpa).copied().unwrap_or(0))
    }
}

fn machine(code: u64) -> (CpuState, Memory) {
    let mut words =
        HashMap::from([(0x10_1000, 0x10_2063), (0x10_2000, 0x10_3063), (0x10_3000, 0x10_4063), (CODE, code)]);
    words.extend((0..16).map(|page| (0x10_4000 + 8 * page, page << 12 | 0x63)));
    let mut state = CpuState { physical_bits: 40, ..Default::default() };
    state.sregs.cr0 = 0x8005_0033;
    state.sregs.cr3 = 0x10_1000;
    state.sregs.cr4 = 0x20;
    state.sregs.efer = 0xd01;
    state.sregs.cs.l = 1;
    (state.regs.rip, state.regs.rsi, state.regs.rdi, state.regs.rcx) = (CODE, 0x4000, 0x8000, 0x10_0000);
    (state, Memory { words })
}

const REP_MOVSB: u64 = 0xa4f3;
const REP_MOVSQ: u64 = 0xa5_48f3;
const REP_STOSB: u64 = 0xaaf3;
const REP_MOVSB_BY_32: u64 = 0xa4_f367;

fn run(state: &CpuState, memory: &Memory, poison: &[u64]) -> Option<Bulk> {
    let repeat = operands(state, memory).unwrap().repeat.unwrap();
    bulk(state, memory, &repeat, |gpa, length| {
        poison.iter().copied().filter(|&line| line < gpa + length && line + LINE > gpa).min()
    })
}

#[test]
fn a_page_is_one_run_and_the_last_line_is_left() {
    let (state, memory) = machine(REP_MOVSB);
    let whole = run(&state, &memory, &[]).unwrap();
    assert_eq!(
        (whole.iterations, whole.source, whole.destination, whole.overlaps),
        (4096, Some(0x4000), 0x8000, false)
    );
    let short = run(&state, &memory, &[0x4fc0]).unwrap();
    assert_eq!(short.iterations, 4096 - 64);
    assert_eq!(run(&state, &memory, &[0x4000]), None, "the first element is poisoned");
    assert_eq!(
        run(&state, &memory, &[0x8000]).map(|bulk| bulk.iterations),
        Some(4096),
        "a store consumes nothing"
    );
}

#[test]
fn elements_do_not_cross_into_poison_or_pages() {
    let (mut state, memory) = machine(REP_MOVSQ);
    (state.regs.rsi, state.regs.rdi) = (0x4004, 0x8000);
    assert_eq!(run(&state, &memory, &[]).unwrap().iterations, 511);
    assert_eq!(
        run(&state, &memory, &[0x4040]).unwrap().iterations,
        7,
        "the eighth word would reach into the line"
    );
    state.regs.rsi = 0x4ffc;
    assert_eq!(run(&state, &memory, &[]), None, "across pages the processor does it");
}

#[test]
fn backwards_the_highest_poison_counts() {
    let (mut state, memory) = machine(REP_MOVSB);
    state.regs.rflags = 1 << 10;
    (state.regs.rsi, state.regs.rdi) = (0x4fff, 0x8fff);
    let found = run(&state, &memory, &[0x4000, 0x4e00]).unwrap();
    assert_eq!((found.iterations, found.source, found.destination), (0x1c0, Some(0x4e40), 0x8e40));
    let mut regs = state.regs;
    let repeat = operands(&state, &memory).unwrap().repeat.unwrap();
    found.advance(&mut regs, &repeat, CODE + 2);
    assert_eq!((regs.rsi, regs.rdi, regs.rcx, regs.rip), (0x4e3f, 0x8e3f, 0x10_0000 - 0x1c0, CODE));
}

#[test]
fn what_is_left_to_the_processor() {
    let (state, mut memory) = machine(REP_MOVSB);
    let stepping = CpuState { regs: kvm_regs { rflags: 1 << 8, ..state.regs }, ..state.clone() };
    assert_eq!(run(&stepping, &memory, &[]), None, "the guest steps itself");
    let none = CpuState { regs: kvm_regs { rcx: 0, ..state.regs }, ..state.clone() };
    assert_eq!(run(&none, &memory, &[]), None);
    memory.words.insert(0x10_4000 + 8 * 8, 0x8023);
    assert_eq!(run(&state, &memory, &[]), None, "the destination's dirty bit is clear");
    memory.words.insert(0x10_4000 + 8 * 8, 0x8061);
    assert_eq!(run(&state, &memory, &[]), None, "the destination is read-only");
    memory.words.insert(0x10_4000 + 8 * 8, 0x80_0063);
    assert_eq!(run(&state, &memory, &[]), None, "the destination is no memory");
    let (state, memory) = machine(0xaef2);
    assert_eq!(run(&state, &memory, &[]), None, "scans end by what they find");
}

#[test]
fn the_end_of_a_run_moves_the_registers_as_wide_as_they_are() {
    let (mut state, memory) = machine(REP_MOVSB_BY_32);
    let high = 0xffff_ffff_0000_0000;
    (state.regs.rsi, state.regs.rdi, state.regs.rcx) = (high | 0x4000, high | 0x8000, high | 3);
    let repeat = operands(&state, &memory).unwrap().repeat.unwrap();
    let found = run(&state, &memory, &[]).unwrap();
    let mut regs = state.regs;
    found.advance(&mut regs, &repeat, CODE + 3);
    assert_eq!((regs.rsi, regs.rdi, regs.rcx, regs.rip), (0x4003, 0x8003, 0, CODE + 3));
    let (state, memory) = machine(REP_STOSB);
    let mut regs = state.regs;
    let found = run(&state, &memory, &[]).unwrap();
    found.advance(&mut regs, &operands(&state, &memory).unwrap().repeat.unwrap(), CODE + 2);
    assert_eq!((regs.rsi, regs.rdi, found.source), (0x4000, 0x9000, None));
    assert_eq!(merged(0x1234_5678_9abc_def0, 0xffff_ffff, 2), 0x1234_5678_9abc_ffff);
}

proptest! {
    #[test]
    fn runs_are_what_single_elements_would_do(
        element in 0..4u32, source in 0x4000..0x5000u64, destination in 0x4000..0x6000u64,
        count in 0..600u64, backwards in any::<bool>(), lines in prop::collection::vec(0..64u64, 0..3),
    ) {
        let code = [REP_MOVSB, 0xa5_66f3, 0xa5f3, REP_MOVSQ][element as usize];
        let size = 1u64 << element;
        let poison: Vec<u64> = lines.iter().map(|line| 0x4000 + line * LINE).collect();
        let (mut state, memory) = machine(code);
        (state.regs.rsi, state.regs.rdi, state.regs.rcx) = (source, destination, count);
        state.regs.rflags = u64::from(backwards) << 10;
        let poisoned = |at: u64| poison.iter().any(|&line| line < at + size && line + LINE > at);
        let crosses = |at: u64| at % PAGE + size > PAGE;
        let (mut model, mut taken) = ((source, destination), 0u64);
        let page = |at: u64| at / PAGE;
        while taken < count
            && !poisoned(model.0)
            && !crosses(model.0) && !crosses(model.1)
            && page(model.0) == page(source) && page(model.1) == page(destination)
        {
            let step = if backwards { size.wrapping_neg() } else { size };
            model = (model.0.wrapping_add(step), model.1.wrapping_add(step));
            taken += 1;
        }
        let found = run(&state, &memory, &poison);
        prop_assert_eq!(found.map_or(0, |found| found.iterations), taken);
        if let Some(found) = found {
            let repeat = operands(&state, &memory).unwrap().repeat.unwrap();
            let mut regs = state.regs;
            found.advance(&mut regs, &repeat, CODE + 2);
            prop_assert_eq!((regs.rsi, regs.rdi, regs.rcx), (model.0, model.1, count - taken));
            prop_assert_eq!(regs.rip == CODE + 2, taken == count);
        }
    }
}
