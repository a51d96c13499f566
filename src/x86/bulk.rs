//! Repeated copies and fills that the monitor does itself.
//!
//! A single step moves one element. Over a guarded page that would be a step for each byte, so the iterations that
//! certainly touch no poison are done by the monitor, and the processor takes over where that ends.

use kvm_bindings::kvm_regs;

use super::decide::LINE;
use super::operands::{Access, AccessKind, Repeat, StringOperation, mask};
use super::physical::physical_accesses;
use super::state::CpuState;
use super::walk::PhysRead;

/// RFLAGS.TF: the guest steps itself, and each iteration traps.
const RFLAGS_TF: u64 = 1 << 8;
/// RFLAGS.RF: breakpoints on the instruction have been met.
pub const RFLAGS_RF: u64 = 1 << 16;
const PAGE: u64 = 4096;

/// Iterations of REP MOVS or REP STOS, all within one page of each operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bulk {
    /// How many; at least one.
    pub iterations: u64,
    /// Bytes of an element.
    pub element: u8,
    /// The first element is the last one in memory.
    pub backwards: bool,
    /// Guest-physical address of the lowest source byte, for a copy.
    pub source: Option<u64>,
    /// Guest-physical address of the lowest destination byte.
    pub destination: u64,
    /// What a fill stores: the low [`Bulk::element`] bytes count.
    pub fill: u64,
    /// Source and destination share bytes: copy element by element, in the direction of the instruction.
    pub overlaps: bool,
}

impl Bulk {
    /// Bytes of each operand.
    pub fn length(&self) -> u64 {
        self.iterations * u64::from(self.element)
    }

    /// Moves the registers past the iterations. `next_rip` is that of the instruction after the repeated one.
    pub fn advance(&self, regs: &mut kvm_regs, repeat: &Repeat, next_rip: u64) {
        let length = if self.backwards { self.length().wrapping_neg() } else { self.length() };
        let size = repeat.address_size;
        regs.rcx = merged(regs.rcx, regs.rcx.wrapping_sub(self.iterations), size);
        regs.rdi = merged(regs.rdi, regs.rdi.wrapping_add(length), size);
        if self.source.is_some() {
            regs.rsi = merged(regs.rsi, regs.rsi.wrapping_add(length), size);
        }
        if regs.rcx & mask(size) == 0 {
            regs.rip = next_rip;
            // Set where a step ended between two iterations; the end of an instruction clears it.
            regs.rflags &= !RFLAGS_RF;
        }
    }
}

/// A register written in part: 4 bytes clear the upper half, 2 bytes keep the rest (SDM volume 1, 3.4.1.1).
fn merged(old: u64, new: u64, size: u8) -> u64 {
    match size {
        2 => old & !0xffff | new & 0xffff,
        4 => new & 0xffff_ffff,
        _ => new,
    }
}

/// The iterations that can be done at once, from the current one on; `None` if there is none.
///
/// They end before the first poisoned source line, and at the end of the page of either operand. A page whose
/// accessed or dirty bit is still clear is left to the processor, and so is everything while the guest steps itself.
/// Breakpoint registers are not looked at: with data breakpoints set, the caller steps. Stores consume no poison, so
/// poisoned destination lines do not end the run; they stay poisoned.
pub fn bulk(
    state: &CpuState,
    memory: &impl PhysRead,
    repeat: &Repeat,
    first_poisoned: impl Fn(u64, u64) -> Option<u64>,
) -> Option<Bulk> {
    let copies = match repeat.operation {
        StringOperation::Move => true,
        StringOperation::Store => false,
        _ => return None,
    };
    if state.regs.rflags & RFLAGS_TF != 0 {
        return None;
    }
    let element = u64::from(repeat.element.max(1));
    let locate = |kind, address| {
        let access = Access { kind, address, size: element as u32, implicit: false };
        let list = physical_accesses(state, memory, &[access]);
        let range = list.ranges.iter().find(|range| range.kind == kind)?;
        // One range of the whole size: the element lies in one page, and nothing is left for the processor to mark.
        let usable = list.fault.is_none() && u64::from(range.size) == element && !range.marks_entry;
        (usable && memory.read_u64(range.gpa & !7).is_some()).then_some(range.gpa)
    };
    let room = |gpa: u64| {
        let offset = gpa % PAGE;
        if repeat.backwards { offset / element + 1 } else { (PAGE - offset) / element }
    };
    let to = locate(AccessKind::Store, repeat.destination?)?;
    // The address registers must not wrap within the run.
    let registers = |value: u64| {
        let value = value & mask(repeat.address_size);
        if repeat.backwards {
            value / element + 1
        } else {
            ((mask(repeat.address_size) - value) / element).saturating_add(1)
        }
    };
    let mut iterations = repeat.count.min(room(to)).min(registers(state.regs.rdi));
    let mut from = None;
    if copies {
        let gpa = locate(AccessKind::Load, repeat.source?)?;
        iterations = iterations.min(room(gpa)).min(registers(state.regs.rsi));
        iterations = before_poison(gpa, element, iterations, repeat.backwards, first_poisoned);
        from = Some(gpa);
    }
    if iterations == 0 {
        return None;
    }
    let lowest = |gpa: u64| if repeat.backwards { gpa - (iterations - 1) * element } else { gpa };
    let (source, destination) = (from.map(lowest), lowest(to));
    let length = iterations * element;
    Some(Bulk {
        iterations,
        element: repeat.element,
        backwards: repeat.backwards,
        source,
        destination,
        fill: state.regs.rax,
        overlaps: source.is_some_and(|source| source.abs_diff(destination) < length),
    })
}

/// How many of the iterations come before a poisoned source line.
fn before_poison(
    gpa: u64,
    element: u64,
    iterations: u64,
    backwards: bool,
    first_poisoned: impl Fn(u64, u64) -> Option<u64>,
) -> u64 {
    let length = iterations * element;
    if !backwards {
        return match first_poisoned(gpa, length) {
            Some(line) => (line & !(LINE - 1)).saturating_sub(gpa) / element,
            None => iterations,
        };
    }
    // Downwards the highest poisoned line comes first.
    let end = gpa + element;
    let (mut from, mut highest) = (end - length, None);
    while from < end {
        let Some(line) = first_poisoned(from, end - from) else { break };
        highest = Some(line & !(LINE - 1));
        from = (line & !(LINE - 1)) + LINE;
    }
    match highest {
        Some(line) => end.saturating_sub(line + LINE) / element,
        None => iterations,
    }
}

#[cfg(test)]
#[path = "bulk_test.rs"]
mod tests;
