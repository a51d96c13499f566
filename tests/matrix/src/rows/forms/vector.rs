//! Vector registers.

use super::{Form, LOAD, STORE};
use crate::case::{Before, Class, Code, Quirk};
use crate::feature::Feature;
use iced_x86::code_asm::*;

const AVX: &[Feature] = &[Feature::Avx];
const AVX2: &[Feature] = &[Feature::Avx2];

/// Words of 32 bits as bytes.
const fn words(words: [u32; 16]) -> [u8; 64] {
    let mut bytes = [0; 64];
    let mut at = 0;
    while at < 64 {
        bytes[at] = words[at / 4].to_le_bytes()[at % 4];
        at += 1;
    }
    bytes
}

const ALL: u32 = 0x8000_0000;
/// Indexes: element 2 is the operand, the others lie in a clean page. All elements are wanted.
const GATHER: [u8; 64] = words([
    0x3000, 0x3004, 0, 0x3008, 0x300c, 0x3010, 0x3014, 0x3018, ALL, ALL, ALL, ALL, ALL, ALL, ALL, ALL,
]);
/// The same without the operand.
const GATHER_OTHERS: [u8; 64] =
    words([0x3000, 0x3004, 0, 0x3008, 0x300c, 0x3010, 0x3014, 0x3018, ALL, ALL, 0, ALL, ALL, ALL, ALL, ALL]);
/// A mask for 32 bytes: the two ends.
const ENDS: [u8; 64] = words([0, 0, 0, 0, 0, 0, 0, 0, ALL, 0, 0, 0, 0, 0, 0, ALL]);
/// A mask for nothing.
const NONE: [u8; 64] = [0; 64];

/// vpgatherdd ymm3, [rsi+ymm1], ymm2 and vpgatherdq ymm3, [rsi+xmm1], ymm2, which the assembler does not have.
const VPGATHERDD: [u8; 6] = [0xc4, 0xe2, 0x6d, 0x90, 0x1c, 0x0e];
const VPGATHERDQ: [u8; 6] = [0xc4, 0xe2, 0xed, 0x90, 0x1c, 0x0e];

/// target/i386/tcg: the helper enter_mmx runs before the load.
const MMX: Quirk = Quirk::Fault("QEMU empties the x87 stack before it loads, at any fault");

/// Loads ymm1 and ymm2 from the clean page.
const FROM_SCRATCH: Code = |a| {
    a.vmovdqu(ymm1, ymmword_ptr(rdi))?;
    a.vmovdqu(ymm2, ymmword_ptr(rdi + 32))
};
/// Loads xmm2.
const FROM_SCRATCH_128: Code = |a| a.movdqu(xmm2, xmmword_ptr(rbx + 32));

pub fn forms() -> Vec<Form> {
    let mut forms = loads();
    forms.extend(stores());
    forms.extend(avx());
    forms.extend(masked());
    forms.extend(full_lines());
    forms
}

fn loads() -> Vec<Form> {
    const WIDE: Form = Form { size: 16, ..LOAD };
    const ALIGNED: Form = Form { size: 16, align: 16, ..LOAD };
    vec![
        Form { name: "movdqa xmm, m", code: |a| a.movdqa(xmm3, xmmword_ptr(rsi)), ..ALIGNED },
        Form { name: "movdqu xmm, m", code: |a| a.movdqu(xmm3, xmmword_ptr(rsi)), ..WIDE },
        Form { name: "movups xmm, m", code: |a| a.movups(xmm9, xmmword_ptr(rsi)), ..WIDE },
        Form { name: "lddqu xmm, m", code: |a| a.lddqu(xmm9, xmmword_ptr(rsi)), ..WIDE },
        Form { name: "movntdqa xmm, m", code: |a| a.movntdqa(xmm3, xmmword_ptr(rsi)), ..ALIGNED },
        Form { name: "paddd xmm, m", code: |a| a.paddd(xmm3, xmmword_ptr(rsi)), ..ALIGNED },
        Form { name: "pshufb xmm, m", code: |a| a.pshufb(xmm3, xmmword_ptr(rsi)), ..ALIGNED },
        Form { name: "mulps xmm, m", code: |a| a.mulps(xmm3, xmmword_ptr(rsi)), ..ALIGNED },
        Form { name: "movss xmm, m", size: 4, code: |a| a.movss(xmm3, dword_ptr(rsi)), ..LOAD },
        Form { name: "movsd xmm, m", code: |a| a.movsd_2(xmm3, qword_ptr(rsi)), ..LOAD },
        Form { name: "movhps xmm, m", code: |a| a.movhps(xmm3, qword_ptr(rsi)), ..LOAD },
        Form { name: "movd xmm, m", size: 4, code: |a| a.movd(xmm3, dword_ptr(rsi)), ..LOAD },
        Form { name: "cvtsi2sd xmm, m", code: |a| a.cvtsi2sd(xmm3, qword_ptr(rsi)), ..LOAD },
        Form { name: "pinsrw xmm, m, imm", size: 2, code: |a| a.pinsrw(xmm3, word_ptr(rsi), 5), ..LOAD },
        Form { name: "pmovzxbq xmm, m", size: 2, code: |a| a.pmovzxbq(xmm3, word_ptr(rsi)), ..LOAD },
        Form {
            name: "pcmpestri xmm, m, imm",
            needs: &[Feature::Sse42],
            code: |a| a.pcmpestri(xmm3, xmmword_ptr(rsi), 0),
            ..WIDE
        },
        Form {
            name: "ldmxcsr m",
            size: 4,
            code: |a| a.ldmxcsr(dword_ptr(rsi)),
            operand: &[0x80, 0x3f, 0, 0],
            ..LOAD
        },
        Form { name: "movq mm, m", quirk: Some(MMX), code: |a| a.movq(mm3, qword_ptr(rsi)), ..LOAD },
    ]
}

fn stores() -> Vec<Form> {
    const WIDE: Form = Form { size: 16, ..STORE };
    const ALIGNED: Form = Form { size: 16, align: 16, ..STORE };
    vec![
        Form { name: "movdqa m, xmm", code: |a| a.movdqa(xmmword_ptr(rsi), xmm3), ..ALIGNED },
        Form { name: "movdqu m, xmm", code: |a| a.movdqu(xmmword_ptr(rsi), xmm3), ..WIDE },
        Form { name: "movntdq m, xmm", code: |a| a.movntdq(xmmword_ptr(rsi), xmm3), ..ALIGNED },
        Form { name: "movntps m, xmm", code: |a| a.movntps(xmmword_ptr(rsi), xmm3), ..ALIGNED },
        Form { name: "movss m, xmm", size: 4, code: |a| a.movss(dword_ptr(rsi), xmm3), ..STORE },
        Form { name: "movhpd m, xmm", code: |a| a.movhpd(qword_ptr(rsi), xmm3), ..STORE },
        Form { name: "pextrb m, xmm, imm", size: 1, code: |a| a.pextrb(byte_ptr(rsi), xmm3, 3), ..STORE },
        Form { name: "stmxcsr m", size: 4, code: |a| a.stmxcsr(dword_ptr(rsi)), ..STORE },
        Form { name: "movntq m, mm", code: |a| a.movntq(qword_ptr(rsi), mm3), ..STORE },
    ]
}

fn avx() -> Vec<Form> {
    const WIDE: Form = Form { size: 32, needs: AVX, ..LOAD };
    const WIDE_STORE: Form = Form { size: 32, needs: AVX, ..STORE };
    vec![
        Form { name: "vmovdqu ymm, m", code: |a| a.vmovdqu(ymm3, ymmword_ptr(rsi)), ..WIDE },
        Form { name: "vmovdqa ymm, m", align: 32, code: |a| a.vmovdqa(ymm3, ymmword_ptr(rsi)), ..WIDE },
        Form {
            name: "vmovntdqa ymm, m",
            align: 32,
            needs: AVX2,
            code: |a| a.vmovntdqa(ymm3, ymmword_ptr(rsi)),
            ..WIDE
        },
        Form {
            name: "vpaddd ymm, ymm, m",
            needs: AVX2,
            code: |a| a.vpaddd(ymm3, ymm4, ymmword_ptr(rsi)),
            ..WIDE
        },
        Form { name: "vbroadcastsd ymm, m", size: 8, code: |a| a.vbroadcastsd(ymm3, qword_ptr(rsi)), ..WIDE },
        Form {
            name: "vinsertf128 ymm, ymm, m, imm",
            size: 16,
            code: |a| a.vinsertf128(ymm3, ymm4, xmmword_ptr(rsi), 1),
            ..WIDE
        },
        Form {
            name: "vcvtph2ps ymm, m",
            size: 16,
            needs: &[Feature::F16c],
            code: |a| a.vcvtph2ps(ymm3, xmmword_ptr(rsi)),
            ..WIDE
        },
        Form { name: "vmovdqu m, ymm", code: |a| a.vmovdqu(ymmword_ptr(rsi), ymm3), ..WIDE_STORE },
        Form { name: "vmovdqa m, ymm", align: 32, code: |a| a.vmovdqa(ymmword_ptr(rsi), ymm3), ..WIDE_STORE },
        Form {
            name: "vmovntdq m, ymm",
            align: 32,
            code: |a| a.vmovntdq(ymmword_ptr(rsi), ymm3),
            ..WIDE_STORE
        },
        Form {
            name: "vextractf128 m, ymm, imm",
            size: 16,
            code: |a| a.vextractf128(xmmword_ptr(rsi), ymm3, 1),
            ..WIDE_STORE
        },
    ]
}

fn masked() -> Vec<Form> {
    const MASKED: Form = Form { size: 32, needs: AVX, before: FROM_SCRATCH, scratch: &ENDS, ..LOAD };
    // Elements that are loaded before the one that faults are there, and their masks are clear (SDM volume 2).
    const GATHERED: Form = Form {
        size: 4,
        needs: AVX2,
        before: FROM_SCRATCH,
        scratch: &GATHER,
        state: Before::PageFault,
        ..LOAD
    };
    vec![
        Form { name: "vpgatherdd ymm, m, ymm", code: |a| a.db(&VPGATHERDD), ..GATHERED },
        Form {
            name: "vpgatherdd ymm, m, ymm",
            note: "element masked off",
            class: Class::CacheControl,
            quiet: true,
            scratch: &GATHER_OTHERS,
            code: |a| a.db(&VPGATHERDD),
            ..GATHERED
        },
        Form { name: "vpgatherdq ymm, m, ymm", size: 8, code: |a| a.db(&VPGATHERDQ), ..GATHERED },
        Form {
            name: "vmaskmovps ymm, ymm, m",
            code: |a| a.vmaskmovps(ymm3, ymm2, ymmword_ptr(rsi)),
            ..MASKED
        },
        Form {
            name: "vpmaskmovd ymm, ymm, m",
            needs: AVX2,
            code: |a| a.vpmaskmovd(ymm3, ymm2, ymmword_ptr(rsi)),
            ..MASKED
        },
        Form {
            name: "vmaskmovps ymm, ymm, m",
            note: "all masked off",
            class: Class::CacheControl,
            quiet: true,
            scratch: &NONE,
            code: |a| a.vmaskmovps(ymm3, ymm2, ymmword_ptr(rsi)),
            ..MASKED
        },
        Form {
            name: "vmaskmovps m, ymm, ymm",
            class: Class::Store,
            code: |a| a.vmaskmovps(ymmword_ptr(rsi), ymm2, ymm3),
            ..MASKED
        },
        Form {
            name: "maskmovdqu xmm, xmm",
            class: Class::Store,
            size: 16,
            needs: &[],
            before: FROM_SCRATCH_128,
            code: |a| a.maskmovdqu(xmm3, xmm2),
            scratch: &[0x80; 64],
            regs: |regs, at| (regs.rdi, regs.rbx) = (at, regs.rdi),
            ..MASKED
        },
    ]
}

/// AVX-512 and stores of whole lines.
fn full_lines() -> Vec<Form> {
    const LINE: Form = Form { size: 64, needs: &[Feature::Avx512], ..LOAD };
    vec![
        Form { name: "vmovdqu32 zmm, m", code: |a| a.vmovdqu32(zmm3, zmmword_ptr(rsi)), ..LINE },
        Form {
            name: "vmovdqu32 m, zmm",
            class: Class::Store,
            code: |a| a.vmovdqu32(zmmword_ptr(rsi), zmm3),
            ..LINE
        },
        Form {
            name: "clzero",
            class: Class::Store,
            align: 64,
            needs: &[Feature::Clzero],
            code: |a| a.clzero(),
            regs: |regs, at| regs.rax = at,
            ..LINE
        },
        Form {
            name: "movdir64b r, m",
            note: "source",
            needs: &[Feature::Movdir64b],
            code: |a| a.movdir64b(rdi, zmmword_ptr(rsi)),
            ..LINE
        },
    ]
}
