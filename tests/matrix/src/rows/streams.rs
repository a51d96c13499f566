//! Random instruction streams: what no list of forms has thought of together.
//!
//! A stream is drawn from its seed, instruction by instruction, with addresses that are known beforehand. So it is known
//! which lines each of them loads, and where a machine check must come: at the first instruction, and the iteration of
//! it, that loads the poisoned line. Everything else must be as it is without a guard.

use super::Planned;
use crate::case::{Before, Case, Class, Expect, Line, assemble, registers};
use crate::feature::{Feature, Features};
use crate::image::{Mode, PageSize};
use crate::layout::*;
use crate::machine::Guest;
use anyhow::Result;
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use std::ops::Range;

const LINE: u64 = 64;
const PAGE: u64 = 0x1000;
/// Instructions that are drawn for a stream.
const LENGTH: usize = 24;
/// Bytes of operands that streams use, the last of which are the stack's.
const OPERANDS: u64 = DATA_LEN - 2 * PAGE;
/// Offset of the stack's top in the data region.
const STACK_TOP: u64 = DATA_LEN - PAGE;
/// Most iterations of a repeated instruction.
const MOST_ITERATIONS: u64 = 40;

/// Numbers that follow from a seed (SplitMix64).
struct Draw(u64);

impl Draw {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = self.0;
        value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ value >> 31
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    fn of<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.below(list.len() as u64) as usize]
    }
}

/// An instruction of a stream.
struct Drawn {
    code: Vec<u8>,
    /// What each iteration loads: offsets in the data region. One that is not repeated has one.
    loads: Vec<Vec<Range<u64>>>,
    /// What it writes.
    stores: Vec<Range<u64>>,
    /// A repeated one: bytes of its operation code.
    repeated: bool,
}

/// A stream as it grows.
struct Stream {
    draw: Draw,
    /// Address of the next instruction.
    at: u64,
    /// Offset of the stack in the data region.
    stack: u64,
    drawn: Vec<Drawn>,
}

/// Registers that streams use freely.
const WORDS: [AsmRegister64; 9] = [rax, rbx, rdx, rbp, r8, r9, r10, r11, r12];

type Emit<'a> = &'a dyn Fn(&mut CodeAssembler) -> Result<(), IcedError>;

impl Stream {
    fn new(seed: u64) -> Self {
        Self { draw: Draw(seed), at: CODE_VA, stack: STACK_TOP, drawn: Vec::new() }
    }

    fn push(&mut self, emit: Emit, loads: &[Range<u64>], stores: &[Range<u64>]) -> Result<()> {
        let code = assemble(emit, self.at)?;
        self.at += code.len() as u64;
        self.drawn.push(Drawn {
            code,
            loads: vec![loads.to_vec()],
            stores: stores.to_vec(),
            repeated: false,
        });
        Ok(())
    }

    /// An operand of `size` bytes: its offset, and its address, by R15 or by R15 and R14. Often across lines or pages.
    fn operand(&mut self, size: u64, align: u64) -> Result<(Range<u64>, AsmMemoryOperand)> {
        let near = match self.draw.below(4) {
            0 => self.draw.below(OPERANDS / PAGE - 1) * PAGE + PAGE - size / 2,
            1 => self.draw.below(OPERANDS / LINE - 2) * LINE + LINE - size / 2,
            _ => self.draw.below(OPERANDS - size),
        };
        let offset = near / align * align;
        let address = if self.draw.below(3) == 0 {
            let (index, scale) = (self.draw.below(64), self.draw.of(&[1, 2, 4, 8]));
            self.push(&|a| a.mov(r14, index), &[], &[])?;
            r15 + r14 * scale as i32 + (offset as i64 - (index * scale) as i64) as i32
        } else {
            r15 + offset as i32
        };
        Ok((offset..offset + size, address))
    }

    /// An instruction that leaves flags undefined, and one that sets them: what undefined flags are depends in QEMU on
    /// how it has translated what surrounds the instruction.
    fn push_defined(&mut self, emit: Emit, loads: &[Range<u64>], stores: &[Range<u64>]) -> Result<()> {
        self.push(emit, loads, stores)?;
        let (word, number) = (self.draw.of(&WORDS), self.draw.next() as i32);
        self.push(&|a| a.cmp(word, number), &[], &[])
    }

    /// Draws one instruction, with those that surround it.
    fn draw(&mut self, features: &Features) -> Result<()> {
        const HALVES: [AsmRegister32; 9] = [eax, ebx, edx, ebp, r8d, r9d, r10d, r11d, r12d];
        const SHORTS: [AsmRegister16; 9] = [ax, bx, dx, bp, r8w, r9w, r10w, r11w, r12w];
        const BYTES: [AsmRegister8; 9] = [al, bl, dl, bpl, r8b, r9b, r10b, r11b, r12b];
        const VECTORS: [AsmRegisterXmm; 6] = [xmm0, xmm1, xmm5, xmm8, xmm11, xmm15];
        let (word, other) = (self.draw.of(&WORDS), self.draw.of(&WORDS));
        let (half, short, byte) = (self.draw.of(&HALVES), self.draw.of(&SHORTS), self.draw.of(&BYTES));
        let vector = self.draw.of(&VECTORS);
        let number = self.draw.next() as i32;
        let kind = self.draw.below(12);
        match kind {
            0 => self.register(word, other, number),
            1 => self.stack(word),
            2 => self.string(),
            3 => self.vector(vector, word, features),
            4 => {
                let (range, m) = self.operand(4, 1)?;
                let loaded = std::slice::from_ref(&range);
                match self.draw.below(6) {
                    0 => self.push(&|a| a.mov(half, dword_ptr(m)), loaded, &[]),
                    1 => self.push(&|a| a.add(half, dword_ptr(m)), loaded, &[]),
                    2 => self.push(&|a| a.sbb(dword_ptr(m), half), loaded, loaded),
                    3 => self.push(&|a| a.movsxd(word, dword_ptr(m)), loaded, &[]),
                    4 => self.push(&|a| a.cmp(dword_ptr(m), number), loaded, &[]),
                    _ => self.push(&|a| a.mov(dword_ptr(m), number), &[], loaded),
                }
            }
            5 => {
                let (range, m) = self.operand(2, 1)?;
                let loaded = std::slice::from_ref(&range);
                match self.draw.below(5) {
                    0 => self.push(&|a| a.movzx(word, word_ptr(m)), loaded, &[]),
                    1 => self.push(&|a| a.xor(short, word_ptr(m)), loaded, &[]),
                    2 => self.push_defined(&|a| a.rol(word_ptr(m), 3), loaded, loaded),
                    3 => self.push(&|a| a.test(word_ptr(m), short), loaded, &[]),
                    _ => self.push(&|a| a.mov(word_ptr(m), short), &[], loaded),
                }
            }
            6 => {
                let (range, m) = self.operand(1, 1)?;
                let loaded = std::slice::from_ref(&range);
                match self.draw.below(6) {
                    0 => self.push(&|a| a.movsx(word, byte_ptr(m)), loaded, &[]),
                    1 => self.push(&|a| a.adc(byte, byte_ptr(m)), loaded, &[]),
                    2 => self.push(&|a| a.not(byte_ptr(m)), loaded, loaded),
                    3 => self.push(&|a| a.setb(byte_ptr(m)), &[], loaded),
                    4 => self.push(&|a| a.or(byte_ptr(m), number & 0x7f), loaded, loaded),
                    _ => self.push(&|a| a.mov(byte_ptr(m), byte), &[], loaded),
                }
            }
            7 => {
                // A locked access that is split is another matter.
                let (range, m) = self.operand(8, 8)?;
                let loaded = std::slice::from_ref(&range);
                match self.draw.below(6) {
                    0 => self.push(&|a| a.lock().xadd(qword_ptr(m), word), loaded, loaded),
                    1 => self.push(&|a| a.lock().cmpxchg(qword_ptr(m), word), loaded, loaded),
                    2 => self.push(&|a| a.xchg(qword_ptr(m), word), loaded, loaded),
                    3 => self.push_defined(&|a| a.lock().btc(qword_ptr(m), number & 63), loaded, loaded),
                    4 => self.push(&|a| a.lock().dec(qword_ptr(m)), loaded, loaded),
                    _ => self.push(&|a| a.movnti(qword_ptr(m), word), &[], loaded),
                }
            }
            8 => {
                // The bit is in another word than the operand.
                let (range, m) = self.operand(8, 8)?;
                let bit = self.draw.below(64 * 8);
                let at = range.start + bit / 64 * 8;
                let loaded = [at..at + 8];
                self.push(&|a| a.mov(r13, bit), &[], &[])?;
                match self.draw.below(2) {
                    0 => self.push_defined(&|a| a.bt(qword_ptr(m), r13), &loaded, &[]),
                    _ => self.push_defined(&|a| a.bts(qword_ptr(m), r13), &loaded, &loaded),
                }
            }
            _ => {
                let (range, m) = self.operand(8, 1)?;
                let loaded = std::slice::from_ref(&range);
                match self.draw.below(12) {
                    0 => self.push(&|a| a.mov(word, qword_ptr(m)), loaded, &[]),
                    1 => self.push_defined(&|a| a.imul_2(word, qword_ptr(m)), loaded, &[]),
                    2 => self.push(&|a| a.cmovnz(word, qword_ptr(m)), loaded, &[]),
                    3 => self.push_defined(&|a| a.bsf(word, qword_ptr(m)), loaded, &[]),
                    4 => self.push(&|a| a.sub(qword_ptr(m), word), loaded, loaded),
                    5 => self.push(&|a| a.and(word, qword_ptr(m)), loaded, &[]),
                    6 => self.push(&|a| a.neg(qword_ptr(m)), loaded, loaded),
                    7 => self.push_defined(&|a| a.shld(qword_ptr(m), word, 7), loaded, loaded),
                    8 => self.push_defined(&|a| a.mul(qword_ptr(m)), loaded, &[]),
                    9 => self.push(&|a| a.prefetcht0(byte_ptr(m)), &[], &[]),
                    10 => self.push(&|a| a.lea(word, qword_ptr(m)), &[], &[]),
                    _ => self.push(&|a| a.mov(qword_ptr(m), word), &[], loaded),
                }
            }
        }
    }

    /// Something without memory, a jump among it.
    fn register(&mut self, word: AsmRegister64, other: AsmRegister64, number: i32) -> Result<()> {
        match self.draw.below(6) {
            0 => self.push(&|a| a.mov(word, i64::from(number) << 20 | 0x155), &[], &[]),
            1 => self.push(&|a| a.add(word, other), &[], &[]),
            2 => self.push(&|a| a.adc(word, number), &[], &[]),
            3 => self.push(&|a| a.bswap(word), &[], &[]),
            4 => self.push(&|a| a.ror(word, 1), &[], &[]),
            _ => self.push(
                &|a| {
                    let mut over = a.create_label();
                    a.jc(over)?;
                    a.not(word)?;
                    a.set_label(&mut over)?;
                    a.inc(other)
                },
                &[],
                &[],
            ),
        }
    }

    /// Something with the stack, which is among the operands.
    fn stack(&mut self, word: AsmRegister64) -> Result<()> {
        let top = self.stack..self.stack + 8;
        let next = self.stack.wrapping_sub(8)..self.stack;
        let empty = self.stack == STACK_TOP;
        let full = self.stack <= STACK_TOP - PAGE / 2;
        match self.draw.below(6) {
            0 | 1 if !full => {
                self.stack -= 8;
                self.push(&|a| a.push(word), &[], &[next])
            }
            2 if !full => {
                let (range, m) = self.operand(8, 1)?;
                self.stack -= 8;
                self.push(&|a| a.push(qword_ptr(m)), &[range], &[next])
            }
            3 if !full => {
                self.stack -= 8;
                let after = self.at + 5;
                self.push(&|a| a.call(after), &[], &[next])
            }
            4 if !empty => {
                let (range, m) = self.operand(8, 1)?;
                self.stack += 8;
                self.push(&|a| a.pop(qword_ptr(m)), &[top], &[range])
            }
            _ if !empty => {
                self.stack += 8;
                self.push(&|a| a.pop(word), &[top], &[])
            }
            _ => self.push(&|a| a.cmc(), &[], &[]),
        }
    }

    /// A string instruction, repeated or not, upwards or downwards.
    fn string(&mut self) -> Result<()> {
        let size = self.draw.of(&[1, 2, 4, 8]);
        let down = self.draw.below(4) == 0;
        let repeated = self.draw.below(3) != 0;
        let count = if repeated { self.draw.below(MOST_ITERATIONS) } else { 1 };
        let room = size * MOST_ITERATIONS;
        let place = |draw: &mut Draw| room + draw.below(OPERANDS - 2 * room);
        let (from, to) = (place(&mut self.draw), place(&mut self.draw));
        self.push(&|a| a.mov(rsi, DATA_VA + from), &[], &[])?;
        self.push(&|a| a.mov(rdi, DATA_VA + to), &[], &[])?;
        self.push(&|a| if down { a.std() } else { a.cld() }, &[], &[])?;
        if repeated {
            self.push(&|a| a.mov(rcx, count), &[], &[])?;
        }
        let element = |start: u64, n: u64| {
            let at = if down { start - n * size } else { start + n * size };
            at..at + size
        };
        let which = self.draw.below(if repeated { 3 } else { 5 });
        let emit = |a: &mut CodeAssembler| {
            let a = if repeated { a.rep() } else { a };
            match (which, size) {
                (0, 1) => a.movsb(),
                (0, 2) => a.movsw(),
                (0, 4) => a.movsd(),
                (0, _) => a.movsq(),
                (1, 1) => a.stosb(),
                (1, 2) => a.stosw(),
                (1, 4) => a.stosd(),
                (1, _) => a.stosq(),
                (2, 1) => a.lodsb(),
                (2, 2) => a.lodsw(),
                (2, 4) => a.lodsd(),
                (2, _) => a.lodsq(),
                (3, 1) => a.scasb(),
                (3, 2) => a.scasw(),
                (3, 4) => a.scasd(),
                (3, _) => a.scasq(),
                (_, 1) => a.cmpsb(),
                (_, 2) => a.cmpsw(),
                (_, 4) => a.cmpsd(),
                (_, _) => a.cmpsq(),
            }
        };
        let loads = (0..count)
            .map(|n| match which {
                0 | 2 => vec![element(from, n)],
                1 => Vec::new(),
                3 => vec![element(to, n)],
                _ => vec![element(from, n), element(to, n)],
            })
            .collect();
        let stores = (0..count).filter(|_| which < 2).map(|n| element(to, n)).collect();
        let code = assemble(emit, self.at)?;
        self.at += code.len() as u64;
        self.drawn.push(Drawn { code, loads, stores, repeated });
        self.push(&|a| a.cld(), &[], &[])
    }

    fn vector(&mut self, vector: AsmRegisterXmm, word: AsmRegister64, features: &Features) -> Result<()> {
        let which = self.draw.below(9);
        let (size, align) = match which {
            0..=3 => (16, 1),
            4 | 5 => (16, 16),
            6 => (32, 1),
            _ => (8, 1),
        };
        let (range, m) = self.operand(size, align)?;
        let loaded = std::slice::from_ref(&range);
        match which {
            0 => self.push(&|a| a.movdqu(vector, xmmword_ptr(m)), loaded, &[]),
            1 => self.push(&|a| a.movups(xmmword_ptr(m), vector), &[], loaded),
            2 => self.push(&|a| a.lddqu(vector, xmmword_ptr(m)), loaded, &[]),
            3 => self.push(&|a| a.movdqu(xmmword_ptr(m), vector), &[], loaded),
            4 => self.push(&|a| a.paddb(vector, xmmword_ptr(m)), loaded, &[]),
            5 => self.push(&|a| a.movntdq(xmmword_ptr(m), vector), &[], loaded),
            6 if features.has(Feature::Avx) => self.push(&|a| a.vmovdqu(ymm5, ymmword_ptr(m)), loaded, &[]),
            7 => self.push(&|a| a.movq(vector, qword_ptr(m)), loaded, &[]),
            8 => self.push(&|a| a.movhps(qword_ptr(m), vector), &[], loaded),
            _ => self.push(&|a| a.movq(word, vector), &[], &[]),
        }
    }

    /// The guest of this stream, and the case of a poisoned line.
    fn case(mut self, seed: u64, features: &Features) -> Result<Case> {
        let mode = match self.draw.below(4) {
            0 => Mode::USER,
            1 => Mode { page: PageSize::Large, ..Mode::USER },
            _ => Mode::KERNEL,
        };
        for _ in 0..LENGTH {
            self.draw(features)?;
        }
        let touched: Vec<u64> = self
            .drawn
            .iter()
            .flat_map(|drawn| drawn.loads.iter().flatten().chain(&drawn.stores))
            .flat_map(|range| [range.start & !(LINE - 1), (range.end - 1) & !(LINE - 1)])
            .collect();
        // Mostly a line that is touched, so one in whose page much happens.
        let line = match self.draw.below(4) {
            0 => self.draw.below(DATA_LEN / LINE) * LINE,
            1 => self.draw.of(&touched) ^ LINE,
            _ => self.draw.of(&touched),
        };
        let hits = |range: &Range<u64>| range.start < line + LINE && line < range.end;
        let first = self.drawn.iter().enumerate().find_map(|(index, drawn)| {
            let iteration = drawn.loads.iter().position(|loads| loads.iter().any(hits))?;
            Some((index, iteration as u64))
        });
        let mut regs = registers(mode);
        (regs.r15, regs.rsp) = (DATA_VA, DATA_VA + STACK_TOP);
        let code = |part: &[Drawn]| part.iter().flat_map(|drawn| drawn.code.clone()).collect::<Vec<u8>>();
        let mut case =
            Case::new("random stream", Class::ReadModifyWrite, "", Guest::new(mode, regs), Vec::new());
        case.variant = format!("seed {seed}");
        case.quiet = !touched.iter().any(|touched| touched / PAGE == line / PAGE);
        let Some((index, iteration)) = first else {
            case.tested = code(&self.drawn);
            return Ok(case.miss(DATA + line));
        };
        let (before, tested) = self.drawn.split_at(index);
        (case.before, case.tested) = (code(before), code(tested));
        let state = match &tested[0] {
            Drawn { repeated: true, loads, code: repeated, .. } if iteration > 0 => {
                let left = loads.len() as u64 - iteration;
                let mut program = case.before.clone();
                let count = |n: u64| assemble(|a| a.mov(rcx, n), CODE_VA);
                program.extend([count(iteration)?, repeated.clone(), count(left)?].concat());
                Before::Program(program)
            }
            _ => Before::Instruction,
        };
        Ok(Case { line: Line::Hit, ..case.hit(DATA + line, Expect::MachineCheck { before: state }) })
    }
}

/// The streams of `seeds`.
pub fn rows(seeds: Range<u64>, features: &Features) -> Result<Vec<Planned>> {
    seeds.map(|seed| Ok(Planned::Run(Box::new(Stream::new(seed).case(seed, features)?)))).collect()
}
