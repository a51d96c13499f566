//! What is asked of a guest, and the judgement of what it did.

use crate::image::{Image, Mode, PageSize, STUB};
use crate::layout::*;
use crate::machine::{End, Guest, IOPL3, Machine, Outcome, RFLAGS_AC, Reached};
use anyhow::{Context, Result, bail};
use iced_x86::code_asm::CodeAssembler;
use kvm_bindings::{kvm_regs, kvm_sregs};
use serde::Serialize;

/// Writes instructions.
pub type Code = fn(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>;

/// What a run without a guard must show, and what is wrong where it does not.
pub type Sound = (fn(&Outcome) -> bool, &'static str);

/// What an instruction does with the guarded page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Class {
    /// Data enters the processor.
    Load,
    /// Data is written.
    Store,
    /// Both.
    ReadModifyWrite,
    /// The instruction's own bytes.
    Fetch,
    /// A page-table entry.
    Walk,
    /// A repeated string instruction runs into the page.
    Repeat,
    /// A descriptor, a gate or the task state.
    Table,
    /// A frame on the stack.
    Frame,
    /// A line is named and nothing is moved.
    CacheControl,
    /// The single step: memory-errors, section 8a.
    Step,
    /// Interrupts, and vCPUs beside each other.
    Machine,
}

/// Whether a poisoned line is touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Line {
    /// The line of the access is poisoned.
    Hit,
    /// Another line of its page is.
    Miss,
}

/// What must come of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expect {
    /// The same as without a guard.
    Same,
    /// One machine check at the instruction under test, then the same as without a guard.
    MachineCheck {
        /// State at the machine check.
        before: Before,
    },
    /// A shutdown.
    Shutdown,
    /// The monitor says that the guest cannot go on.
    Stuck,
}

/// State when the machine check comes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Before {
    /// That of a guest whose program ends before the instruction under test.
    Instruction,
    /// That of a guest that does this many iterations of the repeated instruction under test.
    Iterations(u64),
    /// That of a guest with this program.
    Program(Vec<u8>),
    /// That of the guest's own page fault when the operand's page is not there: the instruction may be done in part.
    PageFault,
}

/// What this processor does wrong by itself, proven by a run without a guard that ends the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quirk {
    /// When it is stepped over the instruction.
    Step(&'static str),
    /// When the instruction ends in a page fault.
    Fault(&'static str),
}

/// A guest with and without poison.
#[derive(Clone, Debug)]
pub struct Case {
    /// The instruction form, or the point of a list.
    pub form: String,
    /// What it does with the page.
    pub class: Class,
    /// Where and how: alignment, privilege, page size.
    pub variant: String,
    /// Whether poison is touched.
    pub line: Line,
    /// The program: what comes before the instruction under test, and that one with the rest.
    pub before: Vec<u8>,
    /// The instruction under test and what follows.
    pub tested: Vec<u8>,
    /// Where the program starts.
    pub at: u64,
    /// The guest without program and poison.
    pub guest: Guest,
    /// Poisoned lines, by guest-physical address.
    pub poison: Vec<u64>,
    /// The processor may do without touching the page.
    pub quiet: bool,
    /// What must come of it.
    pub expect: Expect,
    /// What may come of it instead, if it can be shown that the processor is to blame.
    pub quirk: Option<Quirk>,
    /// What the run without a guard must show, lest the row says nothing; and what is wrong where it does not.
    pub sound: Option<Sound>,
}

/// How a case ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// As it must.
    Pass,
    /// Otherwise.
    Fail,
    /// Otherwise, and it was shown that the processor does the same without a guard.
    Known,
    /// This processor cannot.
    NotRun,
}

/// A row of the report.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// The instruction form, or the point of a list.
    pub form: String,
    /// What it does with the page.
    pub class: Class,
    /// Where and how.
    pub variant: String,
    /// Whether poison is touched.
    pub line: Line,
    /// How it ended.
    pub outcome: Verdict,
    /// Traps that were served, or what went wrong, or why it was not run.
    pub detail: String,
}

/// General registers before the first instruction: all different, none a valid address but for RSP.
pub fn registers(mode: Mode) -> kvm_regs {
    let io = if mode.user { IOPL3 } else { 0 };
    // What is above 32 bits is lost to 32-bit code, or not (SDM volume 1, 3.4.1.1).
    let mask = if mode.compatibility { u64::from(u32::MAX) } else { u64::MAX };
    let value = |n: u64| ((0x0101_0101_0101_0101 * n) ^ 0x8040_2010_0804_0201) & mask;
    let (data, stack) = if mode.compatibility { (DATA, STACK_TOP) } else { (DATA_VA, STACK_TOP_VA) };
    kvm_regs {
        rax: value(1),
        rbx: value(2),
        rcx: value(3),
        rdx: value(4),
        rsi: data,
        rdi: data + 0x4000,
        rbp: value(5),
        rsp: stack,
        r8: value(6),
        r9: value(7),
        r10: value(8),
        r11: value(9),
        r12: value(10),
        r13: value(11),
        r14: value(12),
        r15: value(13),
        rip: 0,
        rflags: 2 | io | if mode.smap { RFLAGS_AC } else { 0 },
    }
}

/// Assembles `code` for `address`.
pub fn assemble(
    code: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>,
    address: u64,
) -> Result<Vec<u8>> {
    assemble_for(64, code, address)
}

/// Assembles `code` of 16, 32 or 64 bits for `address`.
pub fn assemble_for(
    bits: u32,
    code: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>,
    address: u64,
) -> Result<Vec<u8>> {
    let mut assembler = CodeAssembler::new(bits)?;
    code(&mut assembler)?;
    if assembler.instructions().is_empty() {
        return Ok(Vec::new());
    }
    assembler.assemble(address).context("A program cannot be assembled")
}

/// The guest-physical address of code.
fn physical(code: u64) -> u64 {
    if code < CODE_VA { code } else { code - (CODE_VA - CODE) }
}

/// `out PORT_DONE, al`.
pub const DONE: [u8; 2] = [0xe6, PORT_DONE];

impl Case {
    /// The program `code`, of which the first instruction is under test, with `guest` at a missed line.
    pub fn new(form: &str, class: Class, variant: &str, guest: Guest, code: Vec<u8>) -> Self {
        Self {
            form: form.to_owned(),
            class,
            variant: variant.to_owned(),
            line: Line::Miss,
            before: Vec::new(),
            tested: code,
            at: if guest.mode.compatibility { CODE } else { CODE_VA },
            guest,
            poison: Vec::new(),
            quiet: false,
            expect: Expect::Same,
            quirk: None,
            sound: None,
        }
    }

    /// With a poisoned line that is not touched.
    pub fn miss(mut self, line: u64) -> Self {
        (self.line, self.poison) = (Line::Miss, vec![line & !63]);
        self
    }

    /// With a poisoned line that is touched.
    pub fn hit(mut self, line: u64, expect: Expect) -> Self {
        (self.line, self.poison, self.expect) = (Line::Hit, vec![line & !63], expect);
        self
    }

    /// With a poisoned line that is loaded, which leaves nothing of the instruction done.
    pub fn consumed(self, line: u64) -> Self {
        self.hit(line, Expect::MachineCheck { before: Before::Instruction })
    }

    /// Address of the instruction under test.
    fn instruction(&self) -> u64 {
        self.at + self.before.len() as u64
    }

    fn guest(&self, program: &[&[u8]]) -> Guest {
        let mut guest = self.guest.clone();
        let mut gpa = physical(self.at);
        for part in program {
            guest.write(gpa, part);
            gpa += part.len() as u64;
        }
        guest.regs.rip = self.at;
        guest
    }

    /// Runs it, and judges.
    pub fn run(&self, machine: &mut Machine) -> Row {
        let (outcome, detail) = match self.judge(machine) {
            Ok(Judged { unsound: Some(reason), .. }) => (Verdict::NotRun, reason.to_owned()),
            Ok(Judged { differences, traps, known, unsound: None }) => {
                match (differences.is_empty(), known) {
                    (true, None) => (Verdict::Pass, format!("{traps} traps")),
                    (true, Some(reason)) => (Verdict::Known, reason.to_owned()),
                    (false, _) => (Verdict::Fail, differences.join("; ")),
                }
            }
            Err(error) => (Verdict::Fail, format!("{error:#}")),
        };
        self.row(outcome, detail)
    }

    /// The row of this case.
    pub fn row(&self, outcome: Verdict, detail: String) -> Row {
        Row {
            form: self.form.clone(),
            class: self.class,
            variant: self.variant.clone(),
            line: self.line,
            outcome,
            detail,
        }
    }

    fn judge(&self, machine: &mut Machine) -> Result<Judged> {
        let program: [&[u8]; 3] = [&self.before, &self.tested, &DONE];
        if self.expect == Expect::Stuck {
            let Outcome { end, traps, .. } = machine.run(&self.guest(&program))?;
            let differences = match end {
                End::Stuck(_) => Vec::new(),
                end => vec![format!("the end is {end:?}")],
            };
            return Ok(Judged { differences, traps, ..Judged::default() });
        }
        let reference = machine.reference(&self.guest(&program)).context("Without a guard")?;
        if let Some((_, reason)) = self.sound.filter(|(sound, _)| !sound(&reference)) {
            return Ok(Judged { unsound: Some(reason), ..Judged::default() });
        }
        let mut poisoned = self.guest(&program);
        poisoned.poison.clone_from(&self.poison);
        let guarded = machine.run(&poisoned).context("With a guard")?;
        let mut judged = self.compare(machine, &reference, &guarded)?;
        if let (Some(quirk), false) = (self.quirk, judged.differences.is_empty()) {
            let retried = match (quirk, &self.expect) {
                (Quirk::Step(_), Expect::Same) => {
                    let stepped = machine.run_stepped(&self.guest(&program), Some(self.instruction()))?;
                    self.compare(machine, &stepped, &guarded)?
                }
                (Quirk::Fault(_), Expect::MachineCheck { .. }) => {
                    let expect = Expect::MachineCheck { before: Before::PageFault };
                    Self { expect, ..self.clone() }.compare(machine, &reference, &guarded)?
                }
                _ => return Ok(judged),
            };
            if retried.differences.is_empty() {
                let (Quirk::Step(reason) | Quirk::Fault(reason)) = quirk;
                judged = Judged { known: Some(reason), ..retried };
            }
        }
        Ok(judged)
    }

    fn compare(&self, machine: &mut Machine, reference: &Outcome, guarded: &Outcome) -> Result<Judged> {
        let mut judged = Judged { traps: guarded.traps, ..Judged::default() };
        if !matches!(reference.end, End::Done | End::Exception(_)) {
            judged.note("without a guard, the end", &reference.end, &End::Done);
        }
        if guarded.traps == 0 && !self.quiet {
            judged.differences.push("nothing trapped".to_owned());
        }
        match &self.expect {
            Expect::Same => {
                judged.same(guarded, reference);
                judged.note("machine checks", &guarded.checks.len(), &0);
                judged.note("poisoned lines", &guarded.poison, &self.poison);
            }
            Expect::MachineCheck { before } => {
                let before = self.before(machine, before).context("Before the machine check")?;
                judged.machine_check(guarded, &before, self);
                judged.same(guarded, reference);
            }
            Expect::Shutdown => judged.note("the end", &guarded.end, &End::Shutdown),
            Expect::Stuck => {}
        }
        Ok(judged)
    }

    /// The state that the machine check must find.
    fn before(&self, machine: &mut Machine, before: &Before) -> Result<Outcome> {
        match before {
            Before::Instruction => {
                let mut outcome = machine.run(&self.guest(&[&self.before, &DONE]))?;
                outcome.memory.write(physical(self.instruction()), &[&self.tested[..], &DONE].concat());
                Ok(outcome)
            }
            Before::Program(program) => {
                let mut outcome = machine.run(&self.guest(&[program, &DONE]))?;
                let whole = self.guest(&[&self.before, &self.tested, &DONE]);
                let bytes = machine.image(&whole)?.bytes(CODE..STACK).context("No such memory")?.to_vec();
                outcome.memory.write(CODE, &bytes);
                Ok(outcome)
            }
            Before::Iterations(count) => {
                let mut guest = self.guest(&[&self.before, &self.tested, &DONE]);
                let left = guest.regs.rcx - count;
                guest.regs.rcx = *count;
                let mut outcome = machine.run(&guest)?;
                outcome.regs.rcx = left;
                Ok(outcome)
            }
            Before::PageFault => {
                let mut guest = self.guest(&[&self.before, &self.tested, &DONE]);
                let page = self.poison.first().context("No poison")? & !0xfff;
                let entry = match guest.mode.page {
                    PageSize::Small => DATA_TABLES[2] + 8 * (page >> 12 & 511),
                    PageSize::Large => DATA_TABLES[1] + 8 * (page >> 21),
                    PageSize::Huge => DATA_TABLES[0] + 8 * 16,
                };
                let kept = machine.image(&guest)?;
                guest.word(entry, 0);
                guest.gate(14, STUBS + 14 * STUB, 2);
                let mut outcome = machine.run(&guest)?;
                let [reached] = &outcome.reached[..] else {
                    bail!("{} handlers were reached instead of that of page faults", outcome.reached.len())
                };
                let [_, _, rflags, rsp, _] = reached.frame;
                outcome.regs = kvm_regs { rflags, rsp, ..reached.regs };
                for range in
                    [entry..entry + 8, IDT + 14 * 16..IDT + 15 * 16, SPARE_STACK..SPARE_STACK + 0x1000]
                {
                    let bytes = kept.bytes(range.clone()).context("No such memory")?;
                    outcome.memory.write(range.start, bytes);
                }
                Ok(outcome)
            }
        }
    }
}

/// Differences found.
#[derive(Default)]
struct Judged {
    differences: Vec<String>,
    traps: usize,
    known: Option<&'static str>,
    unsound: Option<&'static str>,
}

/// DR6 without conditions that are met and not enabled, which the processor may show or not (SDM volume 3, 18.2.3).
fn status(dr6: u64, dr7: u64) -> u64 {
    (0..4).filter(|slot| dr7 >> (2 * slot) & 3 == 0).fold(dr6, |dr6, slot| dr6 & !(1 << slot))
}

/// Flags that a frame may differ in: RF is the processor's choice (SDM volume 3, 18.3.1.1).
const RFLAGS_RF: u64 = 1 << 16;

impl Judged {
    fn note<T: PartialEq + std::fmt::Debug>(&mut self, what: &str, is: &T, must: &T) {
        if is != must {
            self.differences.push(format!("{what}: {is:x?} instead of {must:x?}"));
        }
    }

    /// The state that is left.
    fn same(&mut self, is: &Outcome, must: &Outcome) {
        self.note("end", &is.end, &must.end);
        self.registers("", &is.regs, &must.regs);
        self.system(&is.sregs, &must.sregs);
        let dr6 = |outcome: &Outcome| status(outcome.debug.dr6, outcome.debug.dr7);
        self.note("dr6", &dr6(is), &dr6(must));
        self.note("dr7", &is.debug.dr7, &must.debug.dr7);
        self.vectors("", &is.vectors, &must.vectors);
        self.memory("", &is.memory, &must.memory);
        self.handlers(&is.reached, &must.reached);
        self.note("device", &is.device, &must.device);
    }

    /// Handlers that were reached: those that differ, in brief.
    fn handlers(&mut self, is: &[Reached], must: &[Reached]) {
        let brief = |list: &[Reached]| {
            let one = |r: &Reached| {
                format!("{} at {:#x} with flags {:#x}, DR6 {:#x}", r.vector, r.frame[0], r.frame[2], r.dr6)
            };
            list.iter().map(one).collect::<Vec<_>>().join(", ")
        };
        let same = is.len() == must.len()
            && is.iter().zip(must).all(|(is, must)| Reached { dr6: must.dr6, ..is.clone() } == *must)
            && is.iter().zip(must).all(|(is, must)| status(is.dr6, is.dr7) == status(must.dr6, must.dr7));
        if !same {
            self.differences.push(format!("handlers: {} instead of {}", brief(is), brief(must)));
            for (is, must) in is.iter().zip(must) {
                self.registers("in a handler ", &is.regs, &must.regs);
                self.note("frame", &is.frame, &must.frame);
            }
        }
    }

    fn registers(&mut self, when: &str, is: &kvm_regs, must: &kvm_regs) {
        for (name, is, must) in pairs(is, must) {
            self.note(&format!("{when}{name}"), &is, &must);
        }
    }

    fn system(&mut self, is: &kvm_sregs, must: &kvm_sregs) {
        let names = ["cs", "ss", "ds", "es", "fs", "gs", "tr", "ldt"];
        let segments = |s: &kvm_sregs| [s.cs, s.ss, s.ds, s.es, s.fs, s.gs, s.tr, s.ldt];
        for ((name, is), must) in names.iter().zip(segments(is)).zip(segments(must)) {
            self.note(name, &is, &must);
        }
        for (name, is, must) in [
            ("gdt", (is.gdt.base, is.gdt.limit), (must.gdt.base, must.gdt.limit)),
            ("idt", (is.idt.base, is.idt.limit), (must.idt.base, must.idt.limit)),
            ("cr0, cr2", (is.cr0, is.cr2 as u16), (must.cr0, must.cr2 as u16)),
            ("cr3, cr2", (is.cr3, (is.cr2 >> 16) as u16), (must.cr3, (must.cr2 >> 16) as u16)),
            ("efer", (is.efer, 0), (must.efer, 0)),
            ("cr4", (is.cr4, 0), (must.cr4, 0)),
        ] {
            self.note(name, &is, &must);
        }
    }

    fn vectors(&mut self, when: &str, is: &[u8], must: &[u8]) {
        if let Some(at) = is.iter().zip(must).position(|(is, must)| is != must) {
            self.differences.push(format!("{when}XSAVE area differs at {at}"));
        }
    }

    /// All but the stack of the machine check and what its handler notes.
    fn memory(&mut self, when: &str, is: &Image, must: &Image) {
        for (base, is, must) in [(LOW, &is.low, &must.low), (DATA, &is.data, &must.data)] {
            for ((page, is), must) in (base..).step_by(0x1000).zip(is.chunks(0x1000)).zip(must.chunks(0x1000))
            {
                if is == must || matches!(page, MC_STACK | RECORD) {
                    continue;
                }
                if let Some(at) = is.iter().zip(must).position(|(is, must)| is != must) {
                    let (gpa, is, must) = (page + at as u64, is[at], must[at]);
                    self.differences.push(format!("{when}memory at {gpa:#x}: {is:#x} instead of {must:#x}"));
                }
            }
        }
    }

    fn machine_check(&mut self, is: &Outcome, before: &Outcome, case: &Case) {
        let [check] = &is.checks[..] else {
            self.differences.push(format!("{} machine checks", is.checks.len()));
            return;
        };
        let [rip, _, rflags, rsp, _] = check.reached.frame;
        self.note("RIP of the frame", &rip, &case.instruction());
        self.note("RSP of the frame", &rsp, &before.regs.rsp);
        self.note("RFLAGS of the frame", &(rflags & !RFLAGS_RF), &(before.regs.rflags & !RFLAGS_RF));
        // RIP, RSP and RFLAGS are the handler's own.
        let kept = kvm_regs {
            rip: check.reached.regs.rip,
            rsp: check.reached.regs.rsp,
            rflags: check.reached.regs.rflags,
            ..before.regs
        };
        self.registers("at the machine check ", &check.reached.regs, &kept);
        self.vectors("at the machine check ", &check.vectors, &before.vectors);
        self.memory("at the machine check ", &check.memory, &before.memory);
        let [mcg_status, status, address] = check.registers;
        self.note("MCi_ADDR", &Some(&address), &case.poison.first());
        const VALID_UNCORRECTED: u64 = 1 << 63 | 1 << 61 | 1 << 58;
        self.note("MCi_STATUS", &(status & VALID_UNCORRECTED), &VALID_UNCORRECTED);
        self.note("MCG_STATUS", &(mcg_status & 7), &7);
    }
}

fn pairs(is: &kvm_regs, must: &kvm_regs) -> impl Iterator<Item = (&'static str, u64, u64)> {
    const NAMES: [&str; 18] = [
        "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8", "r9", "r10", "r11", "r12", "r13",
        "r14", "r15", "rip", "rflags",
    ];
    let list = |r: &kvm_regs| {
        [
            r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rsp, r.rbp, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13,
            r.r14, r.r15, r.rip, r.rflags,
        ]
    };
    NAMES.into_iter().zip(list(is)).zip(list(must)).map(|((name, is), must)| (name, is, must))
}
