//! Descriptors, gates, task state and frames on the stack in the guarded page.

use super::Planned;
use crate::case::{Case, Class, Code, Expect, assemble, registers};
use crate::image::Mode;
use crate::layout::*;
use crate::machine::Guest;
use anyhow::Result;
use iced_x86::code_asm::*;

const NEXT: u64 = CODE_VA + 0x200;
/// A page for a stack, and its line with a frame.
const PAGE: u64 = DATA + 0x1000;
const FRAME: u64 = PAGE + 0x200;

/// A program with the line that it loads; `far` is another line of that page.
fn loaded(form: &str, class: Class, guest: Guest, code: Code, line: u64, far: u64) -> Result<[Case; 2]> {
    let variant = format!("CPL {}", guest.mode.cpl);
    let case = Case::new(form, class, &variant, guest, assemble(code, CODE_VA)?);
    Ok([case.clone().consumed(line), case.miss(far)])
}

/// The same, with a line that it only stores to.
fn stored(form: &str, guest: Guest, code: Code, line: u64, far: u64) -> Result<[Case; 2]> {
    let [_, miss] = loaded(form, Class::Frame, guest, code, line, far)?;
    Ok([miss.clone().hit(line, Expect::Same), miss])
}

/// A guest whose code at [`NEXT`] ends.
fn guest(mode: Mode) -> Guest {
    let mut guest = Guest::new(mode, registers(mode));
    guest.write(NEXT - CODE_VA + CODE, &[0x90, 0xe6, PORT_DONE]);
    guest
}

/// A guest with a far pointer to `selector` and [`NEXT`] at RSI, and the frames of IRETQ and RETFQ at RSP.
fn far(selector: u16) -> Guest {
    let mut guest = guest(Mode::KERNEL);
    guest.write(DATA, &[&NEXT.to_le_bytes()[..], &selector.to_le_bytes()[..]].concat());
    let words = [NEXT, u64::from(selector), 2, STACK_TOP_VA, u64::from(KERNEL_SS)];
    (FRAME..).step_by(8).zip(words).for_each(|(gpa, word)| guest.word(gpa, word));
    guest.regs.rsp = FRAME - DATA + DATA_VA;
    guest
}

fn descriptors() -> Result<Vec<Case>> {
    let (line, miss) = (GDT + 0x40, GDT + 0xfc0);
    let with = |value: u16| {
        let mut guest = guest(Mode::KERNEL);
        guest.regs.rbx = u64::from(value);
        guest
    };
    let table = |form, guest, code| loaded(form, Class::Table, guest, code, line, miss);
    let cases = [
        table("descriptor of mov sreg", with(OTHER_DATA), |a| a.mov(ds, bx))?,
        table("descriptor of lar", with(OTHER_DATA), |a| a.lar(eax, ebx))?,
        table("descriptor of lsl", with(OTHER_DATA), |a| a.lsl(eax, ebx))?,
        table("descriptor of verw", with(OTHER_DATA), |a| a.verw(bx))?,
        table("descriptor of ltr", with(OTHER_TASK), |a| a.ltr(bx))?,
        table("descriptor of jmp far", far(OTHER_CODE), |a| a.db(&[0x48, 0xff, 0x2e]))?,
        table("descriptor of call far", far(OTHER_CODE), |a| a.db(&[0x48, 0xff, 0x1e]))?,
        table("descriptor of retf", far(OTHER_CODE), |a| a.db(&[0x48, 0xcb]))?,
        table("descriptor of iret", far(OTHER_CODE), |a| a.iretq())?,
    ];
    Ok(cases.into_iter().flatten().collect())
}

fn deliveries() -> Result<Vec<Case>> {
    let gate = |vector: u64| IDT + 16 * vector;
    let miss = IDT + 0xfc0;
    let mut cases = Vec::new();
    for mode in [Mode::KERNEL, Mode::USER] {
        let table = |form, vector, code| loaded(form, Class::Table, guest(mode), code, gate(vector), miss);
        cases.extend(table("gate of int n", 0x80, |a| a.int(0x80))?);
        cases.extend(table("gate of int3", 3, |a| a.int3())?);
        cases.extend(table("gate of #UD", 6, |a| a.ud2())?);
        cases.extend(
            table("gate of #GP", 13, |a| {
                a.mov(rax, 1u64 << 63)?;
                a.mov(rax, qword_ptr(rax))
            })?
            .map(|case| Case {
                before: case.tested[..10].to_vec(),
                tested: case.tested[10..].to_vec(),
                ..case
            }),
        );
        let mut absent = guest(mode);
        absent.regs.rbx = DATA_VA + 0x10_0000;
        let code: Code = |a| a.mov(rax, qword_ptr(rbx));
        cases.extend(loaded("gate of #PF", Class::Table, absent, code, gate(14), miss)?);
    }
    // The stack pointer for level 0 lies in another line than the stack of machine checks.
    let (line, miss) = (TSS & !63, (TSS & !0xfff) + 0xfc0);
    let task = |form, code| loaded(form, Class::Table, guest(Mode::USER), code, line, miss);
    cases.extend(task("stack pointer of int n", |a| a.int(0x80))?);
    cases.extend(task("stack pointer of #UD", |a| a.ud2())?);
    Ok(cases)
}

fn frames() -> Result<Vec<Case>> {
    let miss = PAGE + 0xfc0;
    let mut cases = Vec::new();
    cases.extend(loaded("frame of iret", Class::Frame, far(KERNEL_CS), |a| a.iretq(), FRAME, miss)?);
    cases.extend(loaded(
        "frame of retf",
        Class::Frame,
        far(KERNEL_CS),
        |a| a.db(&[0x48, 0xcb]),
        FRAME,
        miss,
    )?);
    // The handlers end: a frame that is popped would be another row.
    let ending = |vector: u8, mode| {
        let mut guest = guest(mode);
        guest.gate(vector, SPARE, 0);
        guest.write(SPARE, &[0xe6, PORT_DONE]);
        guest.regs.rbx = DATA_VA + 0x10_0000;
        guest
    };
    for (form, vector, code) in [
        ("frame of int n", 0x80, (|a| a.int(0x80)) as Code),
        ("frame of int3", 3, |a| a.int3()),
        ("frame of #UD", 6, |a| a.ud2()),
        ("frame of #PF", 14, |a| a.mov(rax, qword_ptr(rbx))),
    ] {
        let mut same = ending(vector, Mode::KERNEL);
        same.regs.rsp = FRAME + 64 - DATA + DATA_VA;
        cases.extend(stored(form, same, code, FRAME, miss)?);
        let stack = KERNEL_STACK + 0xfc0;
        cases.extend(stored(form, ending(vector, Mode::USER), code, stack, KERNEL_STACK)?);
    }
    Ok(cases)
}

/// All of them.
pub fn rows() -> Result<Vec<Planned>> {
    let cases = [descriptors()?, deliveries()?, frames()?];
    Ok(cases.into_iter().flatten().map(|case| Planned::Run(Box::new(case))).collect())
}
