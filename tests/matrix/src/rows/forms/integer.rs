//! General registers.

use super::{Form, LOAD, MODIFY, STORE};
use crate::case::{Class, Quirk};
use crate::feature::Feature;
use iced_x86::code_asm::*;

pub fn forms() -> Vec<Form> {
    let mut forms = loads();
    forms.extend(stores());
    forms.extend(modifications());
    forms.extend(locked());
    forms.extend(hints());
    forms
}

fn loads() -> Vec<Form> {
    vec![
        Form { name: "mov r, m", note: "8 bits", size: 1, code: |a| a.mov(al, byte_ptr(rsi)), ..LOAD },
        Form { name: "mov r, m", note: "16 bits", size: 2, code: |a| a.mov(ax, word_ptr(rsi)), ..LOAD },
        Form { name: "mov r, m", note: "32 bits", size: 4, code: |a| a.mov(eax, dword_ptr(rsi)), ..LOAD },
        Form { name: "mov r, m", note: "64 bits", code: |a| a.mov(rax, qword_ptr(rsi)), ..LOAD },
        Form {
            name: "mov r, m",
            note: "base, index and displacement",
            code: |a| a.mov(r9, qword_ptr(rbx + r8 * 8 - 0x55)),
            regs: |regs, at| {
                (regs.r8, regs.rbx) = ((-3i64) as u64, at + 24 + 0x55);
            },
            ..LOAD
        },
        Form {
            name: "mov r, m",
            note: "through GS",
            code: |a| a.mov(r9, qword_ptr(rbx).gs()),
            regs: |regs, at| regs.rbx = at,
            ..LOAD
        },
        Form { name: "movzx r, m", size: 2, code: |a| a.movzx(ebx, word_ptr(rsi)), ..LOAD },
        Form { name: "movsx r, m", size: 1, code: |a| a.movsx(rbx, byte_ptr(rsi)), ..LOAD },
        Form { name: "movsxd r, m", size: 4, code: |a| a.movsxd(rbx, dword_ptr(rsi)), ..LOAD },
        Form { name: "movbe r, m", needs: &[Feature::Movbe], code: |a| a.movbe(rbx, qword_ptr(rsi)), ..LOAD },
        Form { name: "add r, m", code: |a| a.add(rax, qword_ptr(rsi)), ..LOAD },
        Form {
            name: "adc r, m",
            size: 4,
            code: |a| a.adc(eax, dword_ptr(rsi)),
            regs: |regs, _| regs.rflags |= 1,
            ..LOAD
        },
        Form { name: "and r, m", size: 2, code: |a| a.and(ax, word_ptr(rsi)), ..LOAD },
        Form { name: "cmp r, m", size: 1, code: |a| a.cmp(al, byte_ptr(rsi)), ..LOAD },
        Form { name: "cmp m, imm", code: |a| a.cmp(qword_ptr(rsi), 5), ..LOAD },
        Form { name: "test m, r", code: |a| a.test(qword_ptr(rsi), rax), ..LOAD },
        Form { name: "imul r, m", code: |a| a.imul_2(rax, qword_ptr(rsi)), ..LOAD },
        Form { name: "mul m", code: |a| a.mul(qword_ptr(rsi)), ..LOAD },
        Form {
            name: "div m",
            size: 4,
            code: |a| a.div(dword_ptr(rsi)),
            regs: |regs, _| (regs.rax, regs.rdx) = (1_000_003, 0),
            operand: &[7, 0, 0, 0],
            ..LOAD
        },
        Form { name: "cmovcc r, m", note: "moved", code: |a| a.cmovnz(rax, qword_ptr(rsi)), ..LOAD },
        Form { name: "cmovcc r, m", note: "not moved", code: |a| a.cmovz(rax, qword_ptr(rsi)), ..LOAD },
        Form { name: "bt m, imm", code: |a| a.bt(qword_ptr(rsi), 13), ..LOAD },
        Form {
            name: "bt m, r",
            note: "bits beyond the operand",
            code: |a| a.bt(qword_ptr(rsi), rax),
            regs: |regs, at| (regs.rsi, regs.rax) = (at - 80, 10 * 64 + 5),
            ..LOAD
        },
        Form {
            name: "bt m, r",
            note: "bits before the operand",
            size: 4,
            code: |a| a.bt(dword_ptr(rsi), eax),
            regs: |regs, at| (regs.rsi, regs.rax) = (at + 0x100, (-0x100i64 * 8 + 3) as u64),
            ..LOAD
        },
        Form { name: "bsf r, m", code: |a| a.bsf(rax, qword_ptr(rsi)), ..LOAD },
        Form { name: "tzcnt r, m", needs: &[Feature::Bmi1], code: |a| a.tzcnt(rax, qword_ptr(rsi)), ..LOAD },
        Form {
            name: "andn r, r, m",
            needs: &[Feature::Bmi1],
            code: |a| a.andn(rax, rbx, qword_ptr(rsi)),
            ..LOAD
        },
        Form { name: "adcx r, m", needs: &[Feature::Adx], code: |a| a.adcx(rax, qword_ptr(rsi)), ..LOAD },
        Form {
            name: "popcnt r, m",
            needs: &[Feature::Popcnt],
            code: |a| a.popcnt(rax, qword_ptr(rsi)),
            ..LOAD
        },
        Form { name: "crc32 r, m", needs: &[Feature::Sse42], code: |a| a.crc32(rax, qword_ptr(rsi)), ..LOAD },
        Form {
            name: "xlatb",
            size: 1,
            code: |a| a.xlatb(),
            regs: |regs, at| (regs.rbx, regs.rax) = (at - 0x21, 0x21),
            ..LOAD
        },
        Form { name: "lods", note: "8 bits", size: 1, code: |a| a.lodsb(), ..LOAD },
        Form { name: "lods", note: "64 bits", code: |a| a.lodsq(), ..LOAD },
        Form { name: "scas", size: 4, code: |a| a.scasd(), regs: |regs, at| regs.rdi = at, ..LOAD },
        Form { name: "cmps", note: "source", code: |a| a.cmpsq(), ..LOAD },
        Form {
            name: "cmps",
            note: "destination",
            size: 2,
            code: |a| a.cmpsw(),
            regs: |regs, at| (regs.rsi, regs.rdi) = (regs.rdi, at),
            ..LOAD
        },
        Form { name: "movs", note: "source", code: |a| a.movsq(), ..LOAD },
    ]
}

fn stores() -> Vec<Form> {
    vec![
        Form { name: "mov m, r", note: "8 bits", size: 1, code: |a| a.mov(byte_ptr(rsi), al), ..STORE },
        Form { name: "mov m, r", note: "64 bits", code: |a| a.mov(qword_ptr(rsi), rax), ..STORE },
        Form { name: "mov m, imm", size: 4, code: |a| a.mov(dword_ptr(rsi), 0x1234_5678), ..STORE },
        Form {
            name: "movbe m, r",
            needs: &[Feature::Movbe],
            code: |a| a.movbe(qword_ptr(rsi), rax),
            ..STORE
        },
        Form { name: "movnti m, r", code: |a| a.movnti(qword_ptr(rsi), rax), ..STORE },
        Form { name: "setcc m", size: 1, code: |a| a.setz(byte_ptr(rsi)), ..STORE },
        Form { name: "stos", code: |a| a.stosq(), regs: |regs, at| regs.rdi = at, ..STORE },
        Form {
            name: "movs",
            note: "destination",
            size: 2,
            code: |a| a.movsw(),
            regs: |regs, at| (regs.rsi, regs.rdi) = (regs.rdi, at),
            ..STORE
        },
    ]
}

fn modifications() -> Vec<Form> {
    vec![
        Form { name: "add m, r", code: |a| a.add(qword_ptr(rsi), rax), ..MODIFY },
        Form { name: "sbb m, imm", size: 2, code: |a| a.sbb(word_ptr(rsi), 0x123), ..MODIFY },
        Form { name: "inc m", size: 1, code: |a| a.inc(byte_ptr(rsi)), ..MODIFY },
        Form { name: "neg m", code: |a| a.neg(qword_ptr(rsi)), ..MODIFY },
        Form { name: "not m", size: 4, code: |a| a.not(dword_ptr(rsi)), ..MODIFY },
        Form { name: "shl m, cl", code: |a| a.shl(qword_ptr(rsi), cl), ..MODIFY },
        Form { name: "rcr m, imm", size: 4, code: |a| a.rcr(dword_ptr(rsi), 3), ..MODIFY },
        Form { name: "shld m, r, imm", code: |a| a.shld(qword_ptr(rsi), rax, 5), ..MODIFY },
        Form {
            name: "bts m, r",
            note: "bits beyond the operand",
            code: |a| a.bts(qword_ptr(rsi), rax),
            regs: |regs, at| (regs.rsi, regs.rax) = (at - 16, 2 * 64 + 9),
            ..MODIFY
        },
        Form { name: "btc m, imm", size: 4, code: |a| a.btc(dword_ptr(rsi), 7), ..MODIFY },
        Form { name: "xadd m, r", size: 4, code: |a| a.xadd(dword_ptr(rsi), eax), ..MODIFY },
        Form { name: "cmpxchg m, r", note: "different", code: |a| a.cmpxchg(qword_ptr(rsi), rbx), ..MODIFY },
        Form {
            name: "cmpxchg m, r",
            note: "equal",
            code: |a| a.cmpxchg(qword_ptr(rsi), rbx),
            regs: |regs, _| regs.rax = 0x0807_0605_0403_0201,
            operand: &[1, 2, 3, 4, 5, 6, 7, 8],
            ..MODIFY
        },
    ]
}

/// QEMU does a locked access across a line alone, outside its ordinary loop (accel/tcg/cpu-exec.c,
/// cpu_exec_step_atomic).
const SPLIT_LOCK: Quirk = Quirk::Step(
    "QEMU loses the flags of a locked access across lines when it is stepped, with or without a guard",
);

fn locked() -> Vec<Form> {
    const MODIFY: Form = Form { quirk: Some(SPLIT_LOCK), ..super::MODIFY };
    vec![
        Form { name: "xchg m, r", code: |a| a.xchg(qword_ptr(rsi), rax), ..MODIFY },
        Form { name: "lock add m, imm", code: |a| a.lock().add(qword_ptr(rsi), 1), ..MODIFY },
        Form { name: "lock xadd m, r", code: |a| a.lock().xadd(qword_ptr(rsi), rax), ..MODIFY },
        Form { name: "lock dec m", size: 4, code: |a| a.lock().dec(dword_ptr(rsi)), ..MODIFY },
        Form {
            name: "lock btr m, r",
            size: 4,
            code: |a| a.lock().btr(dword_ptr(rsi), eax),
            regs: |regs, _| regs.rax = 3,
            ..MODIFY
        },
        Form { name: "lock cmpxchg m, r", code: |a| a.lock().cmpxchg(qword_ptr(rsi), rbx), ..MODIFY },
        Form { name: "cmpxchg8b m", code: |a| a.cmpxchg8b(qword_ptr(rsi)), ..MODIFY },
        Form {
            name: "lock cmpxchg8b m",
            code: |a| a.lock().cmpxchg8b(qword_ptr(rsi)),
            regs: |regs, _| (regs.rax, regs.rdx) = (0x0403_0201, 0x0807_0605),
            operand: &[1, 2, 3, 4, 5, 6, 7, 8],
            ..MODIFY
        },
        Form {
            name: "cmpxchg16b m",
            size: 16,
            align: 16,
            needs: &[Feature::Cmpxchg16b],
            code: |a| a.cmpxchg16b(xmmword_ptr(rsi)),
            ..MODIFY
        },
        Form {
            name: "lock cmpxchg16b m",
            size: 16,
            align: 16,
            needs: &[Feature::Cmpxchg16b],
            code: |a| a.lock().cmpxchg16b(xmmword_ptr(rsi)),
            regs: |regs, _| (regs.rax, regs.rdx) = (0x0807_0605_0403_0201, 0x100f_0e0d_0c0b_0a09),
            operand: &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16],
            ..MODIFY
        },
    ]
}

/// What names a line and moves nothing. A processor of flesh translates for CLFLUSH as for a load; QEMU does not look.
fn hints() -> Vec<Form> {
    const HINT: Form = Form { class: Class::CacheControl, quiet: true, size: 1, ..LOAD };
    vec![
        Form { name: "clflush m", code: |a| a.clflush(byte_ptr(rsi)), ..HINT },
        Form {
            name: "clflushopt m",
            needs: &[Feature::Clflushopt],
            code: |a| a.clflushopt(byte_ptr(rsi)),
            ..HINT
        },
        Form { name: "clwb m", needs: &[Feature::Clwb], code: |a| a.clwb(byte_ptr(rsi)), ..HINT },
        Form { name: "prefetcht0 m", code: |a| a.prefetcht0(byte_ptr(rsi)), ..HINT },
        Form { name: "prefetchnta m", code: |a| a.prefetchnta(byte_ptr(rsi)), ..HINT },
        Form { name: "prefetchw m", code: |a| a.prefetchw(byte_ptr(rsi)), ..HINT },
        Form { name: "nop m", size: 4, code: |a| a.nop_1(dword_ptr(rsi)), ..HINT },
    ]
}
