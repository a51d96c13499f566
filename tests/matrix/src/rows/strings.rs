//! Repeated string instructions that run into the guarded page, and those that KVM carries out itself.

use super::Planned;
use crate::case::{Before, Case, Class, Expect, assemble, registers};
use crate::image::Mode;
use crate::layout::*;
use crate::machine::Guest;
use anyhow::Result;
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use kvm_bindings::kvm_regs;

const PAGE: u64 = 0x1000;
const RFLAGS_DF: u64 = 1 << 10;
/// Elements before the guarded page.
const OUTSIDE: u64 = 5;
/// Bytes of the guarded page before the poisoned line.
const INSIDE: u64 = 192;
/// Elements from the poisoned line on.
const BEYOND: u64 = 3;

/// A string instruction.
struct Operation {
    name: &'static str,
    note: &'static str,
    element: u64,
    code: fn(&mut CodeAssembler) -> Result<(), IcedError>,
    /// It loads at the operand.
    loads: bool,
    /// The operand is that of RDI.
    destination: bool,
}

const OPERATIONS: &[Operation] = &[
    operation("rep movs", "8 bits, source", 1, |a| a.rep().movsb(), true, false),
    operation("rep movs", "16 bits, source", 2, |a| a.rep().movsw(), true, false),
    operation("rep movs", "64 bits, source", 8, |a| a.rep().movsq(), true, false),
    operation("rep movs", "8 bits, destination", 1, |a| a.rep().movsb(), false, true),
    operation("rep movs", "32 bits, destination", 4, |a| a.rep().movsd(), false, true),
    operation("rep stos", "8 bits", 1, |a| a.rep().stosb(), false, true),
    operation("rep stos", "64 bits", 8, |a| a.rep().stosq(), false, true),
    operation("rep lods", "16 bits", 2, |a| a.rep().lodsw(), true, false),
    operation("rep lods", "64 bits", 8, |a| a.rep().lodsq(), true, false),
    operation("repne scas", "8 bits", 1, |a| a.repne().scasb(), true, true),
    operation("repne scas", "32 bits", 4, |a| a.repne().scasd(), true, true),
    operation("repe cmps", "8 bits, source", 1, |a| a.repe().cmpsb(), true, false),
    operation("repe cmps", "64 bits, destination", 8, |a| a.repe().cmpsq(), true, true),
];

const fn operation(
    name: &'static str,
    note: &'static str,
    element: u64,
    code: fn(&mut CodeAssembler) -> Result<(), IcedError>,
    loads: bool,
    destination: bool,
) -> Operation {
    Operation { name, note, element, code, loads, destination }
}

/// How an operation enters the guarded page, which is the second one.
#[derive(Clone, Copy)]
struct Way {
    backwards: bool,
    /// Elements are not aligned: one straddles the border of the pages, another that of the lines.
    askew: bool,
    mode: Mode,
}

impl Operation {
    fn cases(&self, way: Way) -> Result<[Case; 2]> {
        let size = self.element;
        let skew = if way.askew { size / 2 } else { 0 };
        // The first element, and how many come before the first one that touches the line.
        let (first, count, line) = if way.backwards {
            let first = 2 * PAGE + (OUTSIDE - 1) * size + skew;
            let line = 2 * PAGE - INSIDE - 64;
            // Element n is at first - n * size; it touches the line once it starts below its end.
            (first, (first - (line + 64)) / size + 1, line)
        } else {
            let first = PAGE - OUTSIDE * size + skew;
            let line = PAGE + INSIDE;
            // Element n ends at first + (n + 1) * size.
            (first, (line - first) / size, line)
        };
        let mut regs = registers(way.mode);
        let (operand, other) = (DATA_VA + first, DATA_VA + 0x4800);
        (regs.rsi, regs.rdi) = if self.destination { (other, operand) } else { (operand, other) };
        regs.rcx = count + BEYOND;
        regs.rax = 0;
        if way.backwards {
            regs.rflags |= RFLAGS_DF;
        }
        let mut guest = Guest::new(way.mode, regs);
        if self.name == "repe cmps" {
            guest.write(DATA, &[0x55; DATA_LEN as usize]);
        }
        let variant = format!(
            "{}, {}{}, CPL {}",
            self.note,
            if way.backwards { "downwards" } else { "upwards" },
            if way.askew { ", elements astride" } else { "" },
            way.mode.cpl
        );
        let case = Case::new(self.name, Class::Repeat, &variant, guest, assemble(self.code, CODE_VA)?);
        let expect = if self.loads {
            Expect::MachineCheck { before: Before::Iterations(count) }
        } else {
            Expect::Same
        };
        let far = if way.backwards { PAGE } else { 2 * PAGE - 64 };
        Ok([case.clone().hit(DATA + line, expect), case.miss(DATA + far)])
    }
}

/// A program of one instruction with registers of its own.
fn single(
    form: &str,
    variant: &str,
    mode: Mode,
    code: fn(&mut CodeAssembler) -> Result<(), IcedError>,
    change: fn(&mut kvm_regs),
) -> Result<Case> {
    let mut regs = registers(mode);
    change(&mut regs);
    Ok(Case::new(form, Class::Repeat, variant, Guest::new(mode, regs), assemble(code, CODE_VA)?))
}

/// What KVM's emulator carries out: ports, and moves between a device and the guarded page.
fn emulated() -> Result<Vec<Case>> {
    const PORT: u64 = PORT_DEVICE as u64;
    let iterations = |count| Expect::MachineCheck { before: Before::Iterations(count) };
    let instruction = Expect::MachineCheck { before: Before::Instruction };
    // Four elements before the line, four in it.
    let line = DATA + PAGE + 64;
    let far = DATA + 2 * PAGE - 64;
    let mut cases = Vec::new();
    for mode in [Mode::KERNEL, Mode::USER] {
        let level = if mode.cpl == 3 { "CPL 3" } else { "CPL 0" };
        let out = single(
            "rep outs",
            level,
            mode,
            |a| a.rep().outsb(),
            |regs| {
                (regs.rdx, regs.rcx, regs.rsi) = (PORT, 8, DATA_VA + PAGE + 60);
            },
        )?;
        cases.push(out.clone().hit(line, iterations(4)));
        cases.push(out.miss(far));
        let input = single(
            "rep ins",
            level,
            mode,
            |a| a.rep().insd(),
            |regs| {
                (regs.rdx, regs.rcx, regs.rdi) = (PORT, 8, DATA_VA + PAGE + 48);
            },
        )?;
        cases.push(input.clone().hit(line, Expect::Same));
        cases.push(input.miss(far));
        let single_out = single(
            "outs",
            level,
            mode,
            |a| a.outsd(),
            |regs| {
                (regs.rdx, regs.rsi) = (PORT, DATA_VA + PAGE + 68);
            },
        )?;
        cases.push(single_out.clone().hit(line, instruction.clone()));
        cases.push(single_out.miss(far));
        let from = single(
            "movs",
            &format!("device to memory, {level}"),
            mode,
            |a| a.movsd(),
            |regs| {
                (regs.rsi, regs.rdi) = (DEVICE_VA + 0x20, DATA_VA + PAGE + 68);
            },
        )?;
        cases.push(from.clone().hit(line, Expect::Same));
        cases.push(from.miss(far));
        let to = single(
            "movs",
            &format!("memory to device, {level}"),
            mode,
            |a| a.movsd(),
            |regs| {
                (regs.rsi, regs.rdi) = (DATA_VA + PAGE + 68, DEVICE_VA + 0x20);
            },
        )?;
        cases.push(to.clone().hit(line, instruction.clone()));
        cases.push(to.miss(far));
        let copied = single(
            "rep movs",
            &format!("device to memory, {level}"),
            mode,
            |a| a.rep().movsb(),
            |regs| {
                (regs.rcx, regs.rsi, regs.rdi) = (8, DEVICE_VA + 0x20, DATA_VA + PAGE + 60);
            },
        )?;
        cases.push(copied.clone().hit(line, Expect::Same));
        cases.push(copied.miss(far));
        let sent = single(
            "rep movs",
            &format!("memory to device, {level}"),
            mode,
            |a| a.rep().movsb(),
            |regs| {
                (regs.rcx, regs.rsi, regs.rdi) = (8, DATA_VA + PAGE + 60, DEVICE_VA + 0x20);
            },
        )?;
        cases.push(sent.clone().hit(line, iterations(4)));
        cases.push(sent.miss(far));
        let pushed = single(
            "push m",
            &format!("device to stack, {level}"),
            mode,
            |a| a.push(qword_ptr(rsi)),
            |regs| {
                (regs.rsi, regs.rsp) = (DEVICE_VA + 0x20, DATA_VA + PAGE + 80);
            },
        )?;
        cases.push(pushed.clone().hit(line, Expect::Same));
        cases.push(pushed.miss(far));
    }
    Ok(cases)
}

/// Copies onto themselves, and repetitions of nothing.
fn corners() -> Result<Vec<Case>> {
    let (line, far) = (DATA + PAGE + INSIDE, DATA + 2 * PAGE - 64);
    let overlap = single(
        "rep movs",
        "onto itself, one byte on",
        Mode::USER,
        |a| a.rep().movsb(),
        |regs| {
            (regs.rsi, regs.rdi, regs.rcx) = (DATA_VA + PAGE + 0x80, DATA_VA + PAGE + 0x81, 80);
        },
    )?;
    let mut empty = single(
        "rep movs",
        "no iteration",
        Mode::USER,
        |a| a.rep().movsb(),
        |regs| {
            (regs.rsi, regs.rcx) = (DATA_VA + PAGE + INSIDE, 0);
        },
    )?;
    empty.quiet = true;
    Ok(vec![
        overlap.clone().hit(line, Expect::MachineCheck { before: Before::Iterations(64) }),
        overlap.miss(far),
        empty.hit(line, Expect::Same),
    ])
}

/// All of them.
pub fn rows() -> Result<Vec<Planned>> {
    let way = Way { backwards: false, askew: false, mode: Mode::USER };
    let mut cases = Vec::new();
    for operation in OPERATIONS {
        cases.extend(operation.cases(way)?);
        cases.extend(operation.cases(Way { mode: Mode::KERNEL, ..way })?);
        cases.extend(operation.cases(Way { backwards: true, ..way })?);
        if operation.element > 1 {
            cases.extend(operation.cases(Way { askew: true, ..way })?);
        }
    }
    cases.extend(corners()?);
    cases.extend(emulated()?);
    Ok(cases.into_iter().map(|case| Planned::Run(Box::new(case))).collect())
}
