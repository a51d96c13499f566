//! Instructions in the guarded page.

use super::Planned;
use crate::case::{Case, Class, Expect, assemble, registers};
use crate::image::Mode;
use crate::layout::*;
use crate::machine::Guest;
use anyhow::Result;
use iced_x86::code_asm::*;

const PAGE: u64 = 0x1000;
/// `mov rax, imm64`: ten bytes.
const LONG: [u8; 10] = [0x48, 0xb8, 1, 2, 3, 4, 5, 6, 7, 8];

/// The instructions that are fetched.
fn instructions() -> Result<Vec<(&'static str, Vec<u8>)>> {
    let code = |code: fn(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>| assemble(code, CODE_VA);
    Ok(vec![
        ("mov r, imm", LONG.to_vec()),
        ("add r, r", code(|a| a.add(rax, rbx))?),
        ("mov r, m", code(|a| a.mov(rax, qword_ptr(rsi)))?),
        ("mov m, r", code(|a| a.mov(qword_ptr(rdi), rax))?),
        ("push r", code(|a| a.push(rbx))?),
        ("lock xadd m, r", code(|a| a.lock().xadd(qword_ptr(rsi), rax))?),
        ("vector add", code(|a| a.paddd(xmm1, xmm2))?),
        ("fld m", code(|a| a.fld(qword_ptr(rsi)))?),
    ])
}

/// `before` leads to the instruction, `padding` bytes on that are never run.
fn entered(before: &[u8], padding: usize) -> Vec<u8> {
    let mut bytes = before.to_vec();
    bytes.resize(before.len() + padding, 0xcc);
    bytes
}

/// All of them.
pub fn rows() -> Result<Vec<Planned>> {
    let mut rows = Vec::new();
    let mut add = |case: Case, hit: u64, miss: u64| {
        rows.push(Planned::Run(Box::new(case.clone().consumed(hit))));
        rows.push(Planned::Run(Box::new(case.miss(miss))));
    };
    let page = CODE + PAGE;
    let linear = CODE_VA + PAGE;
    for (name, code) in instructions()? {
        for mode in [Mode::KERNEL, Mode::USER] {
            let case = |variant: &str, at: u64| {
                let guest = Guest::new(mode, registers(mode));
                let variant = format!("{variant}, CPL {}", mode.cpl);
                Case {
                    at,
                    ..Case::new(&format!("fetch of {name}"), Class::Fetch, &variant, guest, code.clone())
                }
            };
            add(case("within a line", linear + 0x104), page + 0x100, page + 0x800);
            let half = code.len() as u64 / 2;
            if half == 0 {
                continue;
            }
            add(case("across lines, second", linear + 0x140 - half), page + 0x140, page + 0x800);
            add(case("across pages, second", linear - half), page, page + 0x800);
            add(case("across pages, first", linear - half), page - 64, page - 0x800);
        }
    }
    let case = |variant: &str, before: &[u8], mode| -> Result<Case> {
        let guest = Guest::new(mode, registers(mode));
        let code = assemble(|a| a.add(rax, rbx), CODE_VA)?;
        Ok(Case {
            at: linear - before.len() as u64,
            before: before.to_vec(),
            ..Case::new("entry into a page", Class::Fetch, variant, guest, code)
        })
    };
    for mode in [Mode::KERNEL, Mode::USER] {
        let level = mode.cpl;
        add(case(&format!("sequential, CPL {level}"), &[0x90; 3], mode)?, page, page + 0x800);
        add(case(&format!("jmp, CPL {level}"), &entered(&[0xeb, 10], 10), mode)?, page, page + 0x800);
        add(
            case(&format!("call, CPL {level}"), &entered(&[0xe8, 10, 0, 0, 0], 10), mode)?,
            page,
            page + 0x800,
        );
        // push target; ret
        let mut by_return = assemble(
            |a| {
                a.mov(r15, linear)?;
                a.push(r15)?;
                a.ret()
            },
            CODE_VA,
        )?;
        by_return.resize(by_return.len() + 7, 0xcc);
        add(case(&format!("ret, CPL {level}"), &by_return, mode)?, page, page + 0x800);
    }
    // A prefetched line is not an executed one: the program ends before it.
    let guest = Guest::new(Mode::USER, registers(Mode::USER));
    let mut next = Case::new("fetch of the line before", Class::Fetch, "CPL 3", guest, vec![0x90]);
    next.at = linear + 0x140 - 3;
    rows.push(Planned::Run(Box::new(next.hit(page + 0x140, Expect::Same))));
    Ok(rows)
}
