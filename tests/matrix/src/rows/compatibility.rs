//! 32-bit user code: what only it can do, and what is another instruction in it.

use super::Planned;
use crate::case::{Case, Class, Code, Expect, assemble_for, registers};
use crate::image::Mode;
use crate::layout::*;
use crate::machine::{Guest, IOPL3};
use anyhow::{Context, Result};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

const MODE: Mode = Mode::COMPATIBILITY;
/// Operands are in the middle of a line; stacks, too.
const OPERAND: u64 = DATA + 0x1210;
/// Where programs that jump go on.
const NEXT: u64 = CODE + 0x200;
const TF: u64 = 1 << 8;
/// SYSCALL from 32-bit code goes here, with FMASK.
const CSTAR: u32 = 0xc000_0083;
const STAR: u32 = 0xc000_0081;
const FMASK: u32 = 0xc000_0084;

/// A program of one instruction that loads, stores or both at [`OPERAND`].
struct Form {
    name: &'static str,
    class: Class,
    code: Code,
    /// What the operand holds.
    operand: &'static [u8],
    change: fn(&mut Guest),
}

const fn form(name: &'static str, class: Class, code: Code) -> Form {
    Form { name, class, code, operand: &[], change: |_| {} }
}

impl Form {
    const fn holds(self, operand: &'static [u8]) -> Self {
        Self { operand, ..self }
    }

    const fn with(self, change: fn(&mut Guest)) -> Self {
        Self { change, ..self }
    }
}

/// The operand is on top of the stack.
fn on_stack(guest: &mut Guest) {
    guest.regs.rsp = OPERAND;
}

/// The operand is what is pushed next.
fn below_stack(guest: &mut Guest) {
    guest.regs.rsp = OPERAND + 0x20;
}

const NEXT_BYTES: [u8; 4] = (NEXT as u32).to_le_bytes();
const NEAR: &[u8] = &NEXT_BYTES;
const FAR: &[u8] = &[NEXT_BYTES[0], NEXT_BYTES[1], NEXT_BYTES[2], NEXT_BYTES[3], COMPATIBILITY_CS as u8, 0];
/// A far pointer to data.
const DATA_POINTER: &[u8] = &[0x11, 0x22, 0x33, 0x44, USER_SS as u8, 0];
/// EIP, CS, EFLAGS, ESP and SS.
const FRAME: &[u8] = &[
    NEXT_BYTES[0],
    NEXT_BYTES[1],
    NEXT_BYTES[2],
    NEXT_BYTES[3],
    COMPATIBILITY_CS as u8,
    0,
    0,
    0,
    0x46,
    0x30,
    0,
    0,
];
/// Bounds of an array index.
const BOUNDS: &[u8] = &[0, 0, 0, 0, 0xff, 0xff, 0xff, 0x7f];

fn forms() -> Vec<Form> {
    use Class::{Frame, Load, ReadModifyWrite, Store};
    vec![
        form("32-bit mov", Load, |a| a.mov(eax, dword_ptr(esi))),
        form("32-bit mov", Store, |a| a.mov(dword_ptr(esi), eax)),
        form("32-bit add", ReadModifyWrite, |a| a.add(dword_ptr(esi), eax)),
        form("32-bit mov moffs", Load, |a| a.mov(eax, dword_ptr(OPERAND))),
        form("32-bit mov moffs", Store, |a| a.mov(dword_ptr(OPERAND), eax)),
        form("32-bit inc", ReadModifyWrite, |a| a.inc(dword_ptr(esi))),
        form("32-bit cmpxchg8b", ReadModifyWrite, |a| a.cmpxchg8b(qword_ptr(esi))),
        form("32-bit address that wraps", Load, |a| a.mov(eax, dword_ptr(esi + edx * 4)))
            .with(|guest| (guest.regs.rsi, guest.regs.rdx) = (OPERAND + 0x100, 0xffff_ffc0)),
        form("32-bit xlat", Load, |a| a.xlatb()).with(|guest| {
            (guest.regs.rbx, guest.regs.rax) = (OPERAND - 0x21, 0x21);
        }),
        form("32-bit bound", Load, |a| a.bound(ebx, qword_ptr(esi))).holds(BOUNDS).with(|guest| {
            guest.regs.rbx = 7;
        }),
        form("32-bit arpl", ReadModifyWrite, |a| a.arpl(word_ptr(esi), ax)),
        form("32-bit les", Load, |a| a.les(eax, fword_ptr(esi))).holds(DATA_POINTER),
        form("32-bit lds", Load, |a| a.lds(eax, fword_ptr(esi))).holds(DATA_POINTER),
        form("32-bit lss", Load, |a| a.lss(ebx, fword_ptr(esi))).holds(DATA_POINTER),
        form("32-bit movs", Load, |a| a.movsd()),
        form("32-bit vector load", Load, |a| a.movdqu(xmm3, xmmword_ptr(esi))),
        form("32-bit push m", Load, |a| a.push(dword_ptr(esi))),
        form("32-bit pop m", Store, |a| a.pop(dword_ptr(esi))),
        form("32-bit call m", Load, |a| a.call(dword_ptr(esi))).holds(NEAR),
        form("32-bit jmp m", Load, |a| a.jmp(dword_ptr(esi))).holds(NEAR),
        form("32-bit call far m", Load, |a| a.db(&[0xff, 0x1e])).holds(FAR),
        form("32-bit jmp far m", Load, |a| a.db(&[0xff, 0x2e])).holds(FAR),
        form("32-bit push", Store, |a| a.push(eax)).with(below_stack),
        form("32-bit pop", Load, |a| a.pop(eax)).with(on_stack),
        form("32-bit pusha", Store, |a| a.pushad()).with(below_stack),
        form("32-bit popa", Load, |a| a.popad()).with(on_stack),
        form("32-bit push sreg", Store, |a| a.push(es)).with(below_stack),
        form("32-bit pop sreg", Load, |a| a.pop(es)).holds(&[USER_SS as u8, 0]).with(on_stack),
        form("32-bit pop ss", Load, |a| a.pop(ss)).holds(&[USER_SS as u8, 0]).with(on_stack),
        form("32-bit pushf", Store, |a| a.pushfd()).with(below_stack),
        form("32-bit popf", Load, |a| a.popfd()).holds(&[0x46, 0x30, 0, 0]).with(on_stack),
        form("32-bit call", Store, |a| a.call(NEXT)).with(below_stack),
        form("32-bit ret", Load, |a| a.ret()).holds(NEAR).with(on_stack),
        form("32-bit retf", Frame, |a| a.retf()).holds(FAR_FRAME).with(on_stack),
        form("32-bit iret", Frame, |a| a.iretd()).holds(FRAME).with(on_stack),
        form("32-bit enter", Store, |a| a.enter(16, 0)).with(below_stack),
        form("32-bit leave", Load, |a| a.leave()).with(|guest| guest.regs.rbp = OPERAND),
    ]
}

/// EIP and CS.
const FAR_FRAME: &[u8] =
    &[NEXT_BYTES[0], NEXT_BYTES[1], NEXT_BYTES[2], NEXT_BYTES[3], COMPATIBILITY_CS as u8, 0, 0, 0];

/// A guest with operands at [`OPERAND`], whose code at [`NEXT`] ends.
fn guest() -> Guest {
    let mut guest = Guest::new(MODE, registers(MODE));
    guest.regs.rsi = OPERAND;
    // Programs that jump there come with other privileges to use ports than they had.
    guest.write(NEXT, &[0x90, 0xe6, PORT_DONE]);
    guest
}

/// A point of the single step.
struct Point {
    name: &'static str,
    variant: &'static str,
    code: Code,
    change: fn(&mut Guest),
}

fn point(name: &'static str, variant: &'static str, code: Code, change: fn(&mut Guest)) -> Point {
    Point { name, variant, code, change }
}

/// A system call's entry, which ends.
fn entry(guest: &mut Guest) {
    guest.write(SPARE, &[0xe6, PORT_DONE]);
    guest.msrs = vec![(STAR, u64::from(KERNEL_CS) << 32 | 0x13 << 48), (CSTAR, SPARE), (FMASK, 0x4_7700)];
}

fn points() -> Vec<Point> {
    let none: fn(&mut Guest) = |_| {};
    let stepping: fn(&mut Guest) = |guest| guest.regs.rflags |= TF;
    let pop_ss: fn(&mut CodeAssembler) -> Result<(), IcedError> = |a| {
        a.push(i32::from(USER_SS))?;
        a.pop(ss)?;
        a.mov(eax, dword_ptr(esi))?;
        a.nop()
    };
    vec![
        point("8a pop ss", "and a load", pop_ss, none),
        point("8a pop ss", "the guest steps itself", pop_ss, stepping),
        point(
            "8a pop ss",
            "and a push of flags",
            |a| {
                a.push(i32::from(USER_SS))?;
                a.pop(ss)?;
                a.pushfd()?;
                a.pop(eax)
            },
            none,
        ),
        point("8a pushf", "32 bits", |a| a.pushfd(), none),
        point(
            "8a popf",
            "32 bits, loads TF",
            |a| {
                a.push((0x3002 | TF) as i32)?;
                a.popfd()?;
                a.nop()?;
                a.push(0x3002)?;
                a.popfd()
            },
            none,
        ),
        point("8a int n frame", "32 bits", |a| a.int(0x80), none),
        point("8a int n frame", "32 bits, the guest steps itself", |a| a.int(0x80), stepping),
        point("8a int3 frame", "32 bits", |a| a.int3(), none),
        point("8a into frame", "32 bits", |a| a.into(), |guest| guest.regs.rflags |= 1 << 11),
        point("8a syscall", "32 bits, FMASK clears all", |a| a.syscall(), entry),
        point(
            "8a fault in the step",
            "32 bits, #PF",
            |a| a.mov(eax, dword_ptr(ebx)),
            |guest| guest.regs.rbx = DATA + 0x10_0000,
        ),
        point("8a fault in the step", "32 bits, #GP", |a| a.cli(), |guest| guest.regs.rflags &= !IOPL3),
        point("8a fault in the step", "32 bits, #BR", |a| a.bound(ebx, qword_ptr(esi)), none),
        point(
            "8a iret",
            "32 bits, loads TF",
            |a| {
                a.push((0x3002 | TF) as i32)?;
                a.push(i32::from(COMPATIBILITY_CS))?;
                a.push(NEXT as i32)?;
                a.iretd()
            },
            none,
        ),
        point(
            "8a own single step",
            "32 bits",
            |a| {
                a.add(eax, ebx)?;
                a.mov(ecx, dword_ptr(esi))?;
                a.pushad()?;
                a.popad()?;
                a.daa()?;
                a.aam(10)
            },
            stepping,
        ),
    ]
}

/// All of them.
pub fn rows() -> Result<Vec<Planned>> {
    let mut rows = Vec::new();
    for Form { name, class, code, operand, change } in forms() {
        let mut guest = guest();
        guest.write(OPERAND, operand);
        change(&mut guest);
        let case = Case::new(name, class, "CPL 3", guest, assemble_for(32, code, CODE).context(name)?);
        let line = OPERAND & !63;
        rows.push(match class {
            Class::Store => case.clone().hit(line, Expect::Same),
            _ => case.clone().consumed(line),
        });
        rows.push(case.miss(OPERAND | 0xfff));
    }
    for Point { name, variant, code, change } in points() {
        let mut guest = guest();
        change(&mut guest);
        let code = assemble_for(
            32,
            |a| {
                code(a)?;
                a.out(u32::from(PORT_DONE), al)
            },
            CODE,
        )
        .context(name)?;
        let case = Case::new(name, Class::Step, variant, guest, code);
        for (what, page) in [
            ("code", None),
            ("code and stack", Some(STACK + 0x1fc0)),
            ("code and data", Some(DATA + 0x1fc0)),
            ("code and tables", Some(GDT + 0xfc0)),
            ("code and gates", Some(IDT + 0xfc0)),
        ] {
            let mut case = case.clone().miss(CODE + 0xfc0);
            case.variant = format!("{variant}, {what} guarded");
            case.poison.extend(page);
            case.poison.sort_unstable();
            rows.push(case);
        }
    }
    Ok(rows.into_iter().map(|case| Planned::Run(Box::new(case))).collect())
}
