//! What a guest can see of single steps: memory-errors, section 8a.
//!
//! The programs lie in a guarded page, so each of their instructions is stepped or done in its place.

use super::Planned;
use crate::case::{Case, Class, Code, Expect, Sound, assemble, registers};
use crate::image::Mode;
use crate::layout::*;
use crate::machine::{Guest, IOPL3, Outcome};
use anyhow::Result;
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use kvm_bindings::kvm_regs;

const TF: u64 = 1 << 8;
const STAR: u32 = 0xc000_0081;
const LSTAR: u32 = 0xc000_0082;
const FMASK: u32 = 0xc000_0084;
/// SYSCALL loads the kernel's segments, SYSRET the user's.
const SEGMENTS: u64 = (KERNEL_CS as u64) << 32 | 0x13 << 48;
/// Where the program goes on after a change of level.
const NEXT: u64 = CODE_VA + 0x200;
const KERNEL: Mode = Mode::KERNEL;
const USER: Mode = Mode::USER;
const ENTERING: Mode = Mode::ENTERING;

/// A point of the list.
struct Point {
    name: &'static str,
    variant: &'static str,
    mode: Mode,
    code: Code,
    change: fn(&mut Guest),
    sound: Option<Sound>,
}

fn point(name: &'static str, variant: &'static str, mode: Mode, code: Code) -> Point {
    Point { name, variant, mode, code, change: |_| {}, sound: None }
}

impl Point {
    fn with(self, change: fn(&mut Guest)) -> Self {
        Self { change, ..self }
    }

    fn sound(self, sound: fn(&Outcome) -> bool, otherwise: &'static str) -> Self {
        Self { sound: Some((sound, otherwise)), ..self }
    }
}

/// `out PORT_DONE, al`, for programs that end in two places.
fn done(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.out(u32::from(PORT_DONE), al)
}

/// Pushes what IRETQ pops: to [`NEXT`] with the flags in `flags`.
fn frame(a: &mut CodeAssembler, code: u16, stack: u16, flags: u64) -> Result<(), IcedError> {
    a.mov(r15, rsp)?;
    a.push(i32::from(stack))?;
    a.push(r15)?;
    a.push(flags as i32)?;
    a.push(i32::from(code))?;
    a.mov(r15, NEXT)?;
    a.push(r15)
}

fn flags() -> Vec<Point> {
    vec![
        point("8a pushf", "64 bits", USER, |a| a.pushfq()),
        point("8a pushf", "16 bits", KERNEL, |a| a.pushf()),
        point("8a pushf", "twice, and back", USER, |a| {
            a.pushfq()?;
            a.pop(rax)?;
            a.pushfq()?;
            a.popfq()
        }),
        point("8a popf", "TF stays clear", USER, |a| {
            a.push(0x3246)?;
            a.popfq()?;
            a.nop()
        }),
        point("8a popf", "loads TF", USER, |a| {
            a.push((0x3002 | TF) as i32)?;
            a.popfq()?;
            a.nop()?;
            a.add(rax, rbx)?;
            a.push(0x3002)?;
            a.popfq()
        }),
        point("8a iret", "to the same level", KERNEL, |a| {
            frame(a, KERNEL_CS, KERNEL_SS, 0x46).and_then(|()| a.iretq())
        })
        .with(at_next),
        point("8a iret", "to the same level, loads TF", KERNEL, |a| {
            frame(a, KERNEL_CS, KERNEL_SS, 2 | TF)?;
            a.iretq()
        })
        .with(at_next),
        point("8a iret", "to itself, and on", KERNEL, |a| {
            frame(a, KERNEL_CS, KERNEL_SS, 0x46)?;
            let mut itself = a.create_label();
            a.mov(r14, rsp)?;
            a.push(i32::from(KERNEL_SS))?;
            a.push(r14)?;
            a.push(0x46)?;
            a.push(i32::from(KERNEL_CS))?;
            a.lea(r14, ptr(itself))?;
            a.push(r14)?;
            a.set_label(&mut itself)?;
            a.iretq()
        })
        .with(at_next),
        point("8a iret", "to user code", ENTERING, |a| {
            frame(a, USER_CS, USER_SS, 0x46 | IOPL3)?;
            a.iretq()
        })
        .with(at_next),
        point("8a iret", "to user code, loads TF", ENTERING, |a| {
            frame(a, USER_CS, USER_SS, 2 | IOPL3 | TF)?;
            a.iretq()
        })
        .with(at_next),
    ]
}

/// Code at [`NEXT`]: two instructions, and the end.
fn at_next(guest: &mut Guest) {
    guest.write(NEXT - CODE_VA + CODE, &[0x48, 0x01, 0xd8, 0x90, 0xe6, PORT_DONE]);
}

fn system_calls() -> Vec<Point> {
    /// The kernel's entry notes nothing and ends.
    fn entry(guest: &mut Guest, mask: u64) {
        guest.write(SPARE, &[0x48, 0x01, 0xd8, 0xe6, PORT_DONE]);
        guest.msrs = vec![(STAR, SEGMENTS), (LSTAR, SPARE), (FMASK, mask)];
    }
    vec![
        point("8a syscall", "R11, FMASK clears all", USER, |a| a.syscall())
            .with(|guest| entry(guest, 0x4_7700)),
        point("8a syscall", "R11, FMASK is empty", USER, |a| a.syscall()).with(|guest| entry(guest, 0)),
        point("8a syscall", "the guest steps itself", USER, |a| a.syscall()).with(|guest| {
            entry(guest, TF);
            guest.regs.rflags |= TF;
        }),
        point("8a syscall", "the guest steps itself into the kernel", USER, |a| a.syscall()).with(|guest| {
            entry(guest, 0);
            guest.regs.rflags |= TF;
        }),
        point("8a sysret", "R11", ENTERING, |a| a.sysretq()).with(|guest| {
            at_next(guest);
            guest.msrs = vec![(STAR, SEGMENTS)];
            (guest.regs.rcx, guest.regs.r11) = (NEXT, 0x46 | IOPL3);
        }),
        point("8a sysret", "loads TF", ENTERING, |a| a.sysretq()).with(|guest| {
            at_next(guest);
            guest.msrs = vec![(STAR, SEGMENTS)];
            (guest.regs.rcx, guest.regs.r11) = (NEXT, 2 | IOPL3 | TF);
        }),
    ]
}

fn interrupts() -> Vec<Point> {
    vec![
        point("8a int n frame", "CPL 0", KERNEL, |a| a.int(0x80)),
        point("8a int n frame", "CPL 3", USER, |a| a.int(0x80)),
        point("8a int3 frame", "CPL 0", KERNEL, |a| a.int3()),
        point("8a int3 frame", "CPL 3", USER, |a| a.int3()),
        point("8a int n frame", "the guest steps itself", USER, |a| a.int(0x80))
            .with(|guest| guest.regs.rflags |= TF),
        point("8a fault in the step", "#PF, load", USER, |a| a.mov(rax, qword_ptr(rbx)))
            .with(|guest| guest.regs.rbx = DATA_VA + 0x10_0000),
        point("8a fault in the step", "#PF, store, CPL 0", KERNEL, |a| a.mov(qword_ptr(rbx), rax))
            .with(|guest| guest.regs.rbx = DATA_VA + 0x10_0000),
        point("8a fault in the step", "#PF, repeated after two iterations", USER, |a| a.rep().movsq())
            .with(|guest| (guest.regs.rsi, guest.regs.rcx) = (DATA_VA + DATA_LEN - 16, 5)),
        point("8a fault in the step", "#PF, push", USER, |a| a.push(rax))
            .with(|guest| guest.regs.rsp = DATA_VA + 0x10_0000),
        point("8a fault in the step", "#GP, address", USER, |a| a.mov(rax, qword_ptr(rbx)))
            .with(|guest| guest.regs.rbx = 1 << 63),
        point("8a fault in the step", "#GP, privilege", USER, |a| a.cli())
            .with(|guest| guest.regs.rflags &= !IOPL3),
        point("8a fault in the step", "#GP, alignment of 16", KERNEL, |a| {
            a.movdqa(xmm1, xmmword_ptr(rsi + 1))
        }),
        point("8a fault in the step", "#GP, gate", USER, |a| a.int(0x31)).sound(
            |outcome| outcome.reached.first().is_some_and(|reached| reached.frame[0] == CODE_VA),
            "without a guard, QEMU says that the exception came after the instruction",
        ),
        point("8a fault in the step", "#GP, MSR", KERNEL, |a| a.rdmsr())
            .with(|guest| guest.regs.rcx = 0x1234_5678),
        point("8a fault in the step", "#DE", USER, |a| a.div(rbx)).with(|guest| guest.regs.rbx = 0),
        point("8a fault in the step", "#UD", USER, |a| a.ud2()),
        point("8a fault in the step", "#SS", USER, |a| a.mov(rax, qword_ptr(rbp)))
            .with(|guest| guest.regs.rbp = 1 << 63),
        point("8a fault in the step", "#UD, the guest steps itself", USER, |a| a.ud2())
            .with(|guest| guest.regs.rflags |= TF),
        point("8a fault in the step", "#PF, the guest steps itself", USER, |a| a.mov(rax, qword_ptr(rbx)))
            .with(|guest| {
                guest.regs.rbx = DATA_VA + 0x10_0000;
                guest.regs.rflags |= TF;
            }),
    ]
}

fn shadows() -> Vec<Point> {
    vec![
        point("8a mov ss", "and a load", KERNEL, |a| {
            a.mov(ss, bx)?;
            a.mov(rax, qword_ptr(rsi))?;
            a.nop()
        })
        .with(|guest| guest.regs.rbx = u64::from(KERNEL_SS)),
        point("8a mov ss", "and a push of flags", KERNEL, |a| {
            a.mov(ss, bx)?;
            a.pushfq()?;
            a.pop(rax)
        })
        .with(|guest| guest.regs.rbx = u64::from(KERNEL_SS)),
        point("8a mov ss", "CPL 3, and a system call by gate", USER, |a| {
            a.mov(ss, bx)?;
            a.int(0x80)
        })
        .with(|guest| guest.regs.rbx = u64::from(USER_SS)),
        point("8a mov ss", "the guest steps itself", KERNEL, |a| {
            a.mov(ss, bx)?;
            a.add(rax, rbx)?;
            a.nop()
        })
        .with(|guest| {
            guest.regs.rbx = u64::from(KERNEL_SS);
            guest.regs.rflags |= TF;
        }),
        point("8a sti", "and a nop", KERNEL, |a| {
            a.sti()?;
            a.nop()?;
            a.cli()
        }),
    ]
}

fn own_steps() -> Vec<Point> {
    fn stepping(guest: &mut Guest) {
        guest.regs.rflags |= TF;
    }
    vec![
        point("8a own single step", "arithmetic and memory", USER, |a| {
            a.add(rax, rbx)?;
            a.mov(rcx, qword_ptr(rsi))?;
            a.mov(qword_ptr(rdi), rcx)?;
            a.nop()
        })
        .with(stepping),
        point("8a own single step", "push, call and return", USER, |a| {
            let mut over = a.create_label();
            a.push(rax)?;
            a.call(over)?;
            a.set_label(&mut over)?;
            a.pop(rbx)?;
            a.pop(rcx)
        })
        .with(stepping),
        point("8a own single step", "flags out and in", USER, |a| {
            a.pushfq()?;
            a.popfq()?;
            a.nop()
        })
        .with(stepping),
        point("8a own single step", "repeated", USER, |a| a.rep().movsb()).with(|guest| {
            stepping(guest);
            guest.regs.rcx = 4;
        }),
        point("8a own single step", "ports and CPUID, CPL 0", KERNEL, |a| {
            a.in_(al, u32::from(PORT_DEVICE))?;
            a.out(u32::from(PORT_DEVICE), al)?;
            a.xor(eax, eax)?;
            a.cpuid()
        })
        .with(stepping),
        point("8a own single step", "device, load", USER, |a| a.mov(eax, dword_ptr(rbx))).with(|guest| {
            stepping(guest);
            guest.regs.rbx = DEVICE_VA;
        }),
        point("8a own single step", "device, store", USER, |a| a.mov(dword_ptr(rbx), eax))
            .with(|guest| {
                stepping(guest);
                guest.regs.rbx = DEVICE_VA;
            })
            .sound(
                |outcome| !outcome.reached.is_empty(),
                "without a guard, KVM forgets the trap after a store to a device of the monitor \
                 (x86_emulate_instruction in arch/x86/kvm/x86.c)",
            ),
    ]
}

fn breakpoints() -> Vec<Point> {
    /// Execution at the second instruction; data that is written; data that is read or written.
    fn watch(guest: &mut Guest, at: u64, kind: u64) {
        guest.breakpoints = Some(([at, 0, 0, 0], 0x401 | kind << 16));
    }
    vec![
        point("8a breakpoint", "execution of the next instruction", USER, |a| {
            a.nop()?;
            a.add(rax, rbx)
        })
        .with(|guest| {
            watch(guest, CODE_VA + 1, 0);
            // The handler must not come back to the breakpoint for ever.
            guest.gate(1, SPARE, 0);
            guest.write(SPARE, &[0xe6, PORT_DONE]);
        }),
        point("8a breakpoint", "data written", USER, |a| {
            a.mov(qword_ptr(rsi), rax)?;
            a.nop()
        })
        .with(|guest| watch(guest, DATA_VA, 0b1001)),
        point("8a breakpoint", "data read", KERNEL, |a| {
            a.mov(rax, qword_ptr(rsi))?;
            a.nop()
        })
        .with(|guest| watch(guest, DATA_VA, 0b1011)),
        point("8a breakpoint", "elsewhere", USER, |a| a.add(rax, qword_ptr(rsi)))
            .with(|guest| watch(guest, DATA_VA + 0x100, 0b1011)),
        point("8a breakpoint", "debug registers read and written", KERNEL, |a| {
            a.mov(rax, dr6)?;
            a.mov(rbx, dr7)?;
            a.mov(dr0, rsi)?;
            a.mov(rcx, dr0)
        }),
    ]
}

fn exits() -> Vec<Point> {
    fn device(guest: &mut Guest) {
        guest.regs.rbx = DEVICE_VA + 8;
    }
    vec![
        point("8a stepped MMIO", "load", USER, |a| a.mov(rax, qword_ptr(rbx))).with(device),
        point("8a stepped MMIO", "store", KERNEL, |a| a.mov(dword_ptr(rbx), eax)).with(device),
        point("8a stepped MMIO", "read-modify-write", USER, |a| a.add(dword_ptr(rbx), eax)).with(device),
        point("8a stepped MMIO", "string", USER, |a| a.rep().movsd()).with(|guest| {
            (guest.regs.rsi, guest.regs.rcx) = (DEVICE_VA, 3);
        }),
        point("8a stepped PIO", "in", USER, |a| a.in_(eax, u32::from(PORT_DEVICE))),
        point("8a stepped PIO", "out", KERNEL, |a| a.out(u32::from(PORT_DEVICE), ax)),
        point("8a stepped PIO", "rep outs", USER, |a| a.rep().outsw())
            .with(|guest| (guest.regs.rdx, guest.regs.rcx) = (u64::from(PORT_DEVICE), 3)),
        point("8a stepped PIO", "rep ins", USER, |a| a.rep().insb())
            .with(|guest| (guest.regs.rdx, guest.regs.rcx) = (u64::from(PORT_DEVICE), 3)),
        point("8a stepped MSR", "rdmsr of the monitor", KERNEL, |a| a.rdmsr())
            .with(|guest| guest.regs.rcx = 0x179),
        point("8a stepped MSR", "wrmsr of the monitor", KERNEL, |a| a.wrmsr()).with(|guest| {
            (guest.regs.rcx, guest.regs.rax, guest.regs.rdx) = (0x17a, 0, 0);
        }),
        point("8a stepped MSR", "wrmsr of the monitor, refused", KERNEL, |a| a.wrmsr()).with(|guest| {
            (guest.regs.rcx, guest.regs.rax, guest.regs.rdx) = (0x179, 1, 1);
        }),
        point("8a stepped MSR", "rdmsr of KVM", KERNEL, |a| a.rdmsr())
            .with(|guest| guest.regs.rcx = u64::from(LSTAR)),
        point("8a stepped HLT", "an interrupt is pending", KERNEL, |a| {
            x2apic(a, 0x1b, 0xfee0_0d00)?;
            x2apic(a, 0x80f, 0x1ff)?;
            x2apic(a, 0x83f, 0x20)?;
            a.sti()?;
            a.hlt()?;
            a.cli()?;
            x2apic(a, 0x80b, 0)
        }),
        point("8a intercepted by KVM", "cpuid", USER, |a| a.cpuid())
            .with(|guest| guest.regs.rax = 0x8000_0000),
        point("8a intercepted by KVM", "xgetbv", USER, |a| a.xgetbv()).with(|guest| guest.regs.rcx = 0),
        point("8a intercepted by KVM", "control registers", KERNEL, |a| {
            a.mov(rax, cr0)?;
            a.mov(cr0, rax)?;
            a.mov(rbx, cr4)?;
            a.mov(cr4, rbx)?;
            a.mov(rcx, cr3)?;
            a.mov(cr3, rcx)
        }),
        point("8a intercepted by KVM", "invlpg and wbinvd", KERNEL, |a| {
            a.invlpg(byte_ptr(rsi))?;
            a.wbinvd()
        }),
        point("8a intercepted by KVM", "pause and swapgs", KERNEL, |a| {
            a.pause()?;
            a.swapgs()?;
            a.swapgs()
        }),
    ]
}

/// Writes an MSR.
fn x2apic(a: &mut CodeAssembler, msr: u32, value: u32) -> Result<(), IcedError> {
    a.mov(ecx, msr)?;
    a.mov(eax, value)?;
    a.xor(edx, edx)?;
    a.wrmsr()
}

/// All of them.
pub fn rows() -> Result<Vec<Planned>> {
    let mut rows = Vec::new();
    let points = [flags(), system_calls(), interrupts(), shadows(), own_steps(), breakpoints(), exits()];
    for Point { name, variant, mode, code, change, sound } in points.into_iter().flatten() {
        let mut guest = Guest::new(mode, kvm_regs { rdi: DATA_VA + 0x2000, ..registers(mode) });
        change(&mut guest);
        let tested = assemble(
            |a| {
                code(a)?;
                done(a)
            },
            CODE_VA,
        )?;
        let case = Case { sound, ..Case::new(name, Class::Step, variant, guest, tested) };
        let also = |what: &str, page: u64| {
            let mut case = case.clone().miss(CODE + 0xfc0);
            case.variant = format!("{variant}, {what} guarded");
            case.poison.extend([page].into_iter().filter(|page| *page != 0));
            case.poison.sort_unstable();
            Planned::Run(Box::new(case))
        };
        rows.push(also("code", 0));
        rows.push(also("code and stack", STACK + 0x1fc0));
        rows.push(also("code and data", DATA + 0xfc0));
        rows.push(also("code and tables", GDT + 0xfc0));
        rows.push(also("code and gates", IDT + 0xfc0));
        rows.push(also("code and handlers", STUBS + 0xfc0));
    }
    // A file made shorter: nothing is guarded, and nothing can be reached.
    let guest = Guest { truncated: true, ..Guest::new(USER, registers(USER)) };
    let mut stuck =
        Case::new("no progress", Class::Machine, "the file of the page was made shorter", guest, Vec::new());
    stuck.tested = assemble(|a| a.mov(rax, qword_ptr(rsi)), CODE_VA)?;
    stuck.expect = Expect::Stuck;
    rows.push(Planned::Run(Box::new(stuck)));
    Ok(rows)
}
