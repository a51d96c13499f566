//! x87, and the areas that hold whole register files.

use super::{Form, LOAD, MODIFY, STORE};
use crate::case::Class;
use crate::feature::Feature;
use iced_x86::code_asm::*;

/// The start of a saved environment or state: control word, status word, tag word.
const ENVIRONMENT: [u8; 12] = [0x7f, 3, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0];
/// An FXSAVE image: control word and MXCSR, and all else zero.
const IMAGE: [u8; 512] = {
    let mut image = [0; 512];
    (image[0], image[1]) = (0x7f, 3);
    (image[24], image[25]) = (0x80, 0x1f);
    image
};
/// An XSAVE area that has the SSE component.
const AREA: [u8; 576] = {
    let mut area = [0; 576];
    let mut at = 0;
    while at < 512 {
        area[at] = IMAGE[at];
        at += 1;
    }
    area[512] = 2;
    area
};
const PACKED_DECIMAL: [u8; 10] = [0x45, 0x23, 1, 0, 0, 0, 0, 0, 0, 0x80];

pub fn forms() -> Vec<Form> {
    let mut forms = loads();
    forms.extend(stores());
    forms.extend(areas());
    forms
}

fn loads() -> Vec<Form> {
    vec![
        Form { name: "fld m", note: "32 bits", size: 4, code: |a| a.fld(dword_ptr(rsi)), ..LOAD },
        Form { name: "fld m", note: "64 bits", code: |a| a.fld(qword_ptr(rsi)), ..LOAD },
        Form { name: "fld m", note: "80 bits", size: 10, code: |a| a.fld(tbyte_ptr(rsi)), ..LOAD },
        Form { name: "fild m", size: 2, code: |a| a.fild(word_ptr(rsi)), ..LOAD },
        Form { name: "fbld m", size: 10, code: |a| a.fbld(tbyte_ptr(rsi)), operand: &PACKED_DECIMAL, ..LOAD },
        Form { name: "fadd m", size: 4, code: |a| a.fadd(dword_ptr(rsi)), ..LOAD },
        Form { name: "fidiv m", size: 4, code: |a| a.fidiv(dword_ptr(rsi)), ..LOAD },
        Form { name: "fcomp m", code: |a| a.fcomp(qword_ptr(rsi)), ..LOAD },
        Form { name: "fldcw m", size: 2, code: |a| a.fldcw(word_ptr(rsi)), operand: &[0x7f, 2], ..LOAD },
        Form { name: "fldenv m", size: 28, code: |a| a.fldenv(ptr(rsi)), operand: &ENVIRONMENT, ..LOAD },
        Form { name: "frstor m", size: 108, code: |a| a.frstor(ptr(rsi)), operand: &ENVIRONMENT, ..LOAD },
    ]
}

fn stores() -> Vec<Form> {
    vec![
        Form { name: "fst m", note: "32 bits", size: 4, code: |a| a.fst(dword_ptr(rsi)), ..STORE },
        Form { name: "fst m", note: "64 bits", code: |a| a.fst(qword_ptr(rsi)), ..STORE },
        Form { name: "fstp m", note: "80 bits", size: 10, code: |a| a.fstp(tbyte_ptr(rsi)), ..STORE },
        Form { name: "fistp m", code: |a| a.fistp(qword_ptr(rsi)), ..STORE },
        Form { name: "fisttp m", size: 4, code: |a| a.fisttp(dword_ptr(rsi)), ..STORE },
        Form { name: "fbstp m", size: 10, code: |a| a.fbstp(tbyte_ptr(rsi)), ..STORE },
        Form { name: "fnstcw m", size: 2, code: |a| a.fnstcw(word_ptr(rsi)), ..STORE },
        Form { name: "fnstsw m", size: 2, code: |a| a.fnstsw(word_ptr(rsi)), ..STORE },
        Form { name: "fnstenv m", size: 28, code: |a| a.fnstenv(ptr(rsi)), ..STORE },
        Form { name: "fnsave m", size: 108, code: |a| a.fnsave(ptr(rsi)), ..STORE },
    ]
}

fn areas() -> Vec<Form> {
    vec![
        Form { name: "fxsave m", size: 416, align: 16, code: |a| a.fxsave(ptr(rsi)), ..STORE },
        Form {
            name: "fxrstor m",
            size: 416,
            align: 16,
            code: |a| a.fxrstor(ptr(rsi)),
            operand: &IMAGE,
            ..LOAD
        },
        Form {
            name: "xsave m",
            note: "x87 and SSE",
            // Without the header, in which XSAVE keeps the bits that were not asked for.
            size: 416,
            align: 64,
            code: |a| a.xsave(ptr(rsi)),
            regs: |regs, _| (regs.rax, regs.rdx) = (3, 0),
            ..STORE
        },
        Form {
            name: "xsave m",
            note: "header",
            size: 8,
            align: 64,
            code: |a| a.xsave(ptr(rsi)),
            regs: |regs, at| (regs.rsi, regs.rax, regs.rdx) = (at - 512, 3, 0),
            ..MODIFY
        },
        Form {
            name: "xsave m",
            note: "AVX alone",
            size: 256,
            align: 64,
            needs: &[Feature::Avx],
            code: |a| a.xsave64(ptr(rsi)),
            regs: |regs, at| (regs.rsi, regs.rax, regs.rdx) = (at - 576, 4, 0),
            ..STORE
        },
        Form {
            name: "xsaveopt m",
            size: 256,
            align: 64,
            needs: &[Feature::Avx, Feature::Xsaveopt],
            code: |a| a.xsaveopt(ptr(rsi)),
            regs: |regs, at| (regs.rsi, regs.rax, regs.rdx) = (at - 576, 4, 0),
            quiet: true,
            ..STORE
        },
        Form {
            name: "xsavec m",
            size: 576,
            align: 64,
            needs: &[Feature::Xsavec],
            code: |a| a.xsavec(ptr(rsi)),
            regs: |regs, _| (regs.rax, regs.rdx) = (3, 0),
            ..STORE
        },
        Form {
            name: "xsaves m",
            size: 576,
            align: 64,
            needs: &[Feature::Xsaves],
            privileged: true,
            code: |a| a.xsaves(ptr(rsi)),
            regs: |regs, _| (regs.rax, regs.rdx) = (3, 0),
            ..STORE
        },
        Form {
            name: "xrstor m",
            note: "header",
            size: 64,
            align: 64,
            code: |a| a.xrstor(ptr(rsi)),
            regs: |regs, at| (regs.rsi, regs.rax, regs.rdx) = (at - 512, 3, 0),
            operand: &[0; 64],
            ..LOAD
        },
        Form {
            name: "xrstor m",
            note: "SSE",
            size: 576,
            align: 64,
            code: |a| a.xrstor(ptr(rsi)),
            regs: |regs, _| (regs.rax, regs.rdx) = (2, 0),
            operand: &AREA,
            // The first line holds MXCSR, the last one is the header.
            ..LOAD
        },
        Form {
            name: "xrstor m",
            note: "a component that is not there",
            class: Class::CacheControl,
            size: 64,
            align: 64,
            consumes: Some(false),
            quiet: true,
            code: |a| a.xrstor(ptr(rsi)),
            // The line of XMM registers, with an empty header.
            regs: |regs, at| (regs.rsi, regs.rax, regs.rdx) = (at - 192, 3, 0),
            operand: &[0; 512],
            ..LOAD
        },
    ]
}
