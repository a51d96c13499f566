//! Interrupts beside machine checks: a guest of two vCPUs that would wait for ever for one that is lost.
//!
//! vCPU 0 sends vCPU 1 an interrupt, waits for its answer, and so on, halting in every second round, and with NMIs in
//! every other two rounds; both have a timer, which the program that a tick interrupted sets anew, so that slow handlers cannot take all of its time. Meanwhile machine checks are put into either of them, and the pages that delivery needs are
//! guarded in turn, so that interrupts and machine checks trap in the middle. The threads are those of the monitor
//! ([`aconite::machine::cpu`]).

use crate::case::{Class, Line, Row, Verdict, assemble};
use crate::image::{IDT_LIMIT, Image, Mode, gate};
use crate::layout::*;
use crate::machine::system;
use aconite::command::{EventBus, MceOrigin};
use aconite::fault::{Injection, Injector, Progress, StaleLog, Traps};
use aconite::kvm::{Baton, ExitCounts, Slot, Vcpu, Vm};
use aconite::machine::cpu::{Cpu, Left, Mailbox, Message};
use aconite::memory::{AddressSpace, Backing, Region, RegionKind, backing};
use aconite::x86::cpuid::{self, CpuidConfig, Vendor};
use aconite::x86::mca::{self, Flavour, McaConfig, McaState};
use aconite::x86::xstate::XsaveLayout;
use aconite_devices::bus::{Bus, BusDevice, Effect, Effects};
use anyhow::{Context, Result, ensure};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use kvm_bindings::{KVM_MP_STATE_RUNNABLE, kvm_mp_state, kvm_regs, kvm_segment};
use std::slice;
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use vm_memory::VolatileMemory;
use vmm_sys_util::eventfd::EventFd;

/// How long a round, a tick or a machine check may take: some hundred steps through guarded pages.
const LIMIT: Duration = Duration::from_secs(30);
/// Interrupts and answers.
const ROUNDS: u32 = 30;
/// Least ticks of each timer.
const TICKS: u32 = 10;
/// Nanoseconds to a tick (`APIC_BUS_CYCLE_NS` in arch/x86/kvm/lapic.h).
const TICK: u32 = 10_000_000;
const VCPUS: u32 = 2;

const TIMER_VECTOR: u8 = 0x40;
const PING_VECTOR: u8 = 0x41;
const PONG_VECTOR: u8 = 0x42;
const NMI_VECTOR: u8 = 2;
/// Delivery mode NMI of an interrupt command (SDM volume 3, 12.6.1).
const NMI_COMMAND: u32 = 4 << 8;

/// Pages of the main programs, of handlers, of counters, and of each stack.
const MAIN: u64 = CODE;
const HANDLERS: u64 = CODE + 0x1000;
const COUNTERS: u64 = CODE + 0x2000;
/// Bytes of a handler.
const HANDLER: u64 = 0x80;
const STACKS: [u64; 2] = [STACK, STACK + 0x1000];

const ROUND: u64 = COUNTERS;
const PINGS: u64 = COUNTERS + 8;
const PONGS: u64 = COUNTERS + 0x10;
/// One for each vCPU.
const TICKED: u64 = COUNTERS + 0x40;
const CHECKED: u64 = COUNTERS + 0x80;

/// MSRs of the local APIC (SDM volume 3, table 12-6).
const X2APIC_EOI: u32 = 0x80b;
const X2APIC_SPURIOUS: u32 = 0x80f;
const X2APIC_COMMAND: u32 = 0x830;
const X2APIC_TIMER: u32 = 0x832;
const X2APIC_INITIAL_COUNT: u32 = 0x838;
const X2APIC_DIVIDE: u32 = 0x83e;
const MCG_STATUS: u32 = 0x17a;
const MCG_EXT_CTL: u32 = 0x4d0;
const APIC_BASE_X2APIC: u64 = 0xc00;
const CR4_MCE: u64 = 1 << 6;

/// Pages that are guarded: an offset in each of them that nothing touches.
const TARGETS: [(&str, &[u64]); 8] = [
    ("nothing", &[]),
    ("interrupt descriptor table", &[IDT + 0xf00]),
    ("global descriptor table", &[GDT + 0xf00]),
    ("handlers", &[HANDLERS + 0xf00]),
    ("stacks", &[STACKS[0], STACKS[1]]),
    ("main programs", &[MAIN + 0xf00]),
    ("data", &[COUNTERS + 0xf00]),
    (
        "all of them",
        &[IDT + 0xf00, GDT + 0xf00, HANDLERS + 0xf00, STACKS[0], STACKS[1], MAIN + 0xf00, COUNTERS + 0xf00],
    ),
];

/// Kinds of machine checks.
fn kinds() -> [(&'static str, McaConfig); 3] {
    let intel = McaConfig::for_vendor(Vendor::Intel);
    [
        ("SMCA", McaConfig::for_vendor(Vendor::Amd)),
        ("LMCE", intel),
        ("broadcast", McaConfig { lmce: false, ..intel }),
    ]
}

/// Runs all of them; `wanted` says which forms.
pub fn rows(wanted: impl Fn(&str) -> bool) -> Vec<Row> {
    const FORM: &str = "interrupts beside machine checks";
    if !wanted(FORM) {
        return Vec::new();
    }
    let mut rows = Vec::new();
    for (kind, mca) in kinds() {
        for (target, lines) in TARGETS {
            let (outcome, detail) = match Ticks::new(mca, lines).and_then(Ticks::run) {
                Ok(Ok(detail)) => (Verdict::Pass, detail),
                Ok(Err(detail)) => (Verdict::Fail, detail),
                Err(error) => (Verdict::Fail, format!("{error:#}")),
            };
            let variant = format!("{kind}, {target} guarded");
            let form = FORM.to_owned();
            rows.push(Row { form, class: Class::Machine, variant, line: Line::Miss, outcome, detail });
        }
    }
    rows
}

/// The port that ends the guest.
struct Done;

impl BusDevice for Done {
    fn read(&mut self, _offset: u64, _data: &mut [u8]) {}

    fn write(&mut self, _offset: u64, _data: &[u8], effects: &mut Effects) {
        effects.push(Effect::PowerOff);
    }
}

/// A guest that is ready to run.
struct Ticks {
    _vm: Vm,
    _slot: Slot,
    mca: McaConfig,
    space: Arc<AddressSpace>,
    baton: Arc<Baton>,
    injector: Injector,
    messages: Receiver<Message>,
    cpus: Vec<Cpu>,
}

impl Ticks {
    fn new(mca: McaConfig, poison: &[u64]) -> Result<Self> {
        let kvm = Vm::open()?;
        let supported = Vm::supported_cpuid(&kvm)?;
        let vm = Vm::new(kvm, mca.msr_ranges())?;
        let file = backing::anonymous(c"aconite-ticks", LOW_LEN)?;
        let backing = Backing { file, offset: 0, writable: true };
        let region = Arc::new(Region::new("low", RegionKind::Ram, LOW, LOW_LEN, backing)?);
        let memory = memory(mca)?;
        region.alias().get_slice(0, memory.low.len())?.copy_from(&memory.low[..]);
        let space = Arc::new(AddressSpace::default());
        space.insert(region.clone())?;
        let slot = vm.map(&region)?;
        for line in poison {
            region.poison(slice::from_ref(&(*line..line + 64)), usize::MAX)?;
        }
        let baton = Baton::new(VCPUS as usize);
        let events = EventBus::new();
        let injector = Injector::new(mca, VCPUS, baton.clone(), vm.msi(), events.clone());
        let (sender, messages) = mpsc::channel();
        let mailbox = Mailbox::new(sender, Arc::new(EventFd::new(libc::EFD_NONBLOCK)?));
        let mut ports = Bus::new();
        ports.insert("done", PORT_DONE.into(), 1, Arc::new(Mutex::new(Done)))?;
        let ports = Arc::new(ports);
        let counts = Arc::new(ExitCounts::default());
        let mut traps = None;
        let mut cpus = Vec::new();
        for id in 0..VCPUS {
            let fd = vm.create_vcpu(id)?;
            let config = CpuidConfig {
                vcpus: VCPUS,
                vendor: None,
                hypervisor: true,
                erms: true,
                mca,
                tsc_khz: fd.get_tsc_khz().ok(),
                tsc_deadline: false,
                invariant_tsc: None,
            };
            let leaves = cpuid::guest_cpuid(&supported, &config, id);
            let vcpu = Vcpu::new(id, fd, counts.clone());
            vcpu.set_cpuid(&leaves)?;
            let mut sregs = system(vcpu.sregs()?, Mode::KERNEL);
            sregs.apic_base |= APIC_BASE_X2APIC;
            sregs.cr4 |= CR4_MCE;
            if id == 1 {
                sregs.tr = kvm_segment { base: SPARE_TSS, ..sregs.tr };
            }
            sregs.idt.limit = IDT_LIMIT;
            vcpu.set_sregs(&sregs)?;
            let stack = STACKS[id as usize] + 0x1000;
            let rip = MAIN + u64::from(id) * 0x800;
            vcpu.set_regs(&kvm_regs {
                rip,
                rsp: stack,
                r15: u64::from(id),
                rflags: 2,
                ..Default::default()
            })?;
            vcpu.fd().set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE })?;
            let traps = traps.get_or_insert_with(|| {
                Arc::new(Traps {
                    space: space.clone(),
                    baton: baton.clone(),
                    events: events.clone(),
                    stale: Arc::new(StaleLog::default()),
                    physical_bits: cpuid::physical_bits(&leaves),
                    xsave: XsaveLayout::from_cpuid(&leaves),
                    injector: injector.clone(),
                })
            });
            cpus.push(Cpu {
                vcpu,
                mca: McaState::new(mca),
                baton: baton.clone(),
                ports: ports.clone(),
                mmio: Arc::new(Bus::new()),
                injector: injector.clone(),
                traps: traps.clone(),
                progress: Progress::default(),
                mailbox: mailbox.clone(),
            });
        }
        Ok(Self { _vm: vm, _slot: slot, mca, space, baton, injector, messages, cpus })
    }

    fn counter(&self, at: u64) -> u64 {
        self.space.read_u64(at).unwrap_or(u64::MAX)
    }

    /// Runs it; what went wrong, in words, is the inner error.
    fn run(mut self) -> Result<Result<String, String>> {
        let threads: Vec<JoinHandle<Left>> =
            self.cpus.drain(..).map(|cpu| thread::spawn(move || cpu.run())).collect();
        let raised = self.raise(&threads);
        self.baton.stop();
        let mut reports = String::new();
        for thread in threads {
            let left = thread.join().map_err(|_| anyhow::anyhow!("The thread of a vCPU panicked"))?;
            if let Some(report) = left.report {
                reports.push_str(&format!("; {report}"));
            }
        }
        let ended: Vec<Message> = self.messages.try_iter().collect();
        let counts = format!(
            "{} rounds, {} and {} ticks, {} and {} machine checks",
            self.counter(ROUND),
            self.counter(TICKED),
            self.counter(TICKED + 8),
            self.counter(CHECKED),
            self.counter(CHECKED + 8),
        );
        let done = matches!(ended[..], [Message::Effect(Effect::PowerOff)]);
        Ok(match raised {
            Ok(()) if done => Ok(counts),
            Ok(()) => Err(format!("it did not end: {counts}, {ended:?}{reports}")),
            Err(what) => Err(format!("{what}: {counts}, {ended:?}{reports}")),
        })
    }

    /// Puts one machine check after the other into either vCPU, until the guest ends.
    fn raise(&self, threads: &[JoinHandle<Left>]) -> Result<(), String> {
        let error = mca::MachineError::line(mca::ErrorClass::Load, DATA);
        let finished = || threads.iter().any(JoinHandle::is_finished);
        let (mut round, mut since) = (0, Instant::now());
        let broadcast = self.mca.flavour == Flavour::Intel && !self.mca.lmce;
        let mut number = 0u64;
        while !finished() {
            let vcpu = (number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 63) as u32;
            let concerns = |id: &u32| *id == vcpu || broadcast;
            let both = |counter: u64| [self.counter(counter), self.counter(counter + 8)];
            let each = |what: &str, counter: u64, before: [u64; 2]| -> Result<(), String> {
                let deadline = Instant::now() + LIMIT;
                let waits = |id: u32| both(counter)[id as usize] == before[id as usize];
                while (0..VCPUS).filter(concerns).any(waits) && !finished() {
                    if Instant::now() > deadline {
                        return Err(format!("{what} machine check {number}, of vCPU {vcpu}, is missing"));
                    }
                    thread::sleep(Duration::from_micros(100));
                }
                Ok(())
            };
            let before = both(CHECKED);
            let injection = Injection::error(error, MceOrigin::Request);
            self.injector.raise(Some(vcpu), injection).map_err(|error| error.to_string())?;
            each("the end of", CHECKED, before)?;
            // A tick comes when the handler has returned: no other machine check may come before.
            each("a tick after", TICKED, both(TICKED))?;
            let now = self.counter(ROUND);
            if now > round || now == u64::from(ROUNDS) {
                (round, since) = (now, Instant::now());
            } else if since.elapsed() > LIMIT {
                return Err(format!("round {round} does not end"));
            }
            thread::sleep(Duration::from_micros(number % 7 * 500));
            number += 1;
        }
        Ok(())
    }
}

/// Writes an MSR.
fn wrmsr(a: &mut CodeAssembler, msr: u32, high: u32, low: u32) -> Result<(), IcedError> {
    a.mov(ecx, msr)?;
    a.mov(edx, high)?;
    a.mov(eax, low)?;
    a.wrmsr()
}

/// Bytes that [`handler`] puts below the frame.
const SAVED: u64 = 24;
const HLT: i32 = 0xf4u8 as i8 as i32;

/// A handler that keeps its registers.
fn handler(
    a: &mut CodeAssembler,
    body: impl Fn(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Result<(), IcedError> {
    a.push(rax)?;
    a.push(rcx)?;
    a.push(rdx)?;
    body(a)?;
    a.pop(rdx)?;
    a.pop(rcx)?;
    a.pop(rax)?;
    a.iretq()
}

/// Lets a handler that came between STI and HLT return behind the latter: an interrupt that comes at the return must not
/// be slept over.
fn skip_halt(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut running = a.create_label();
    a.mov(rax, qword_ptr(rsp + SAVED))?;
    a.cmp(byte_ptr(rax), HLT)?;
    a.jne(running)?;
    a.inc(qword_ptr(rsp + SAVED))?;
    a.set_label(&mut running)?;
    a.nop()
}

/// Sets the timer anew when it has ticked; R14 counts the ticks seen.
fn rearm(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut armed = a.create_label();
    a.cmp(qword_ptr(TICKED + r15 * 8), r14)?;
    a.je(armed)?;
    a.inc(r14)?;
    wrmsr(a, X2APIC_INITIAL_COUNT, 0, TICK)?;
    a.set_label(&mut armed)?;
    a.nop()
}

/// What both vCPUs begin with.
fn begin(a: &mut CodeAssembler, mca: McaConfig) -> Result<(), IcedError> {
    if mca.lmce {
        wrmsr(a, MCG_EXT_CTL, 0, 1)?;
    }
    wrmsr(a, X2APIC_SPURIOUS, 0, 0x1ff)?;
    wrmsr(a, X2APIC_DIVIDE, 0, 0xb)?;
    wrmsr(a, X2APIC_TIMER, 0, TIMER_VECTOR.into())?;
    wrmsr(a, X2APIC_INITIAL_COUNT, 0, TICK)
}

/// The program of vCPU 0.
fn first(a: &mut CodeAssembler, mca: McaConfig) -> Result<(), IcedError> {
    begin(a, mca)?;
    let (mut round, mut wait, mut spin, mut got) =
        (a.create_label(), a.create_label(), a.create_label(), a.create_label());
    let (mut ticks, mut more, mut done) = (a.create_label(), a.create_label(), a.create_label());
    let mut other = a.create_label();
    // An interrupt that is sent to a local APIC not yet enabled is lost by right.
    a.set_label(&mut other)?;
    a.pause()?;
    a.cmp(qword_ptr(TICKED + 8), 0)?;
    a.je(other)?;
    a.set_label(&mut round)?;
    a.mov(rbx, qword_ptr(PONGS))?;
    let (mut by_nmi, mut sent) = (a.create_label(), a.create_label());
    a.test(byte_ptr(ROUND), 2)?;
    a.jnz(by_nmi)?;
    wrmsr(a, X2APIC_COMMAND, 1, PING_VECTOR.into())?;
    a.jmp(sent)?;
    a.set_label(&mut by_nmi)?;
    wrmsr(a, X2APIC_COMMAND, 1, NMI_COMMAND)?;
    a.set_label(&mut sent)?;
    a.nop()?;
    a.set_label(&mut wait)?;
    a.cli()?;
    rearm(a)?;
    a.cmp(qword_ptr(PONGS), rbx)?;
    a.jne(got)?;
    a.test(byte_ptr(ROUND), 1)?;
    a.jz(spin)?;
    a.sti()?;
    a.hlt()?;
    a.jmp(wait)?;
    a.set_label(&mut spin)?;
    a.sti()?;
    a.pause()?;
    a.jmp(wait)?;
    a.set_label(&mut got)?;
    a.sti()?;
    a.inc(qword_ptr(ROUND))?;
    a.cmp(qword_ptr(ROUND), ROUNDS as i32)?;
    a.jb(round)?;
    a.set_label(&mut ticks)?;
    a.cli()?;
    rearm(a)?;
    a.cmp(qword_ptr(TICKED), TICKS as i32)?;
    a.jb(more)?;
    a.cmp(qword_ptr(TICKED + 8), TICKS as i32)?;
    a.jae(done)?;
    a.set_label(&mut more)?;
    a.sti()?;
    a.hlt()?;
    a.jmp(ticks)?;
    a.set_label(&mut done)?;
    a.out(u32::from(PORT_DONE), al)?;
    a.hlt()
}

/// The program of vCPU 1.
fn second(a: &mut CodeAssembler, mca: McaConfig) -> Result<(), IcedError> {
    begin(a, mca)?;
    let mut again = a.create_label();
    a.set_label(&mut again)?;
    a.cli()?;
    rearm(a)?;
    a.sti()?;
    a.hlt()?;
    a.jmp(again)
}

/// Memory of the guest at its start.
fn memory(mca: McaConfig) -> Result<Image> {
    let error = mca::MachineError::line(mca::ErrorClass::Load, DATA);
    let bank = u32::from(error.record(&mca, true).bank);
    let status = match mca.flavour {
        Flavour::Smca => 0xc000_2001 + 16 * bank,
        _ => 0x401 + 4 * bank,
    };
    let mut image = Image::new(Mode::KERNEL, [status, status + 1, MCG_STATUS])?;
    image.write(MAIN, &assemble(|a| first(a, mca), MAIN)?);
    image.write(MAIN + 0x800, &assemble(|a| second(a, mca), MAIN + 0x800)?);
    let eoi = |a: &mut CodeAssembler| wrmsr(a, X2APIC_EOI, 0, 0);
    type Body<'a> = &'a dyn Fn(&mut CodeAssembler) -> Result<(), IcedError>;
    let bodies: [(u8, Body); 5] = [
        (NMI_VECTOR, &|a| {
            skip_halt(a)?;
            a.inc(qword_ptr(PINGS))?;
            wrmsr(a, X2APIC_COMMAND, 0, PONG_VECTOR.into())
        }),
        (TIMER_VECTOR, &|a| {
            a.inc(qword_ptr(TICKED + r15 * 8))?;
            eoi(a)
        }),
        (PING_VECTOR, &|a| {
            a.inc(qword_ptr(PINGS))?;
            wrmsr(a, X2APIC_COMMAND, 0, PONG_VECTOR.into())?;
            eoi(a)
        }),
        (PONG_VECTOR, &|a| {
            a.inc(qword_ptr(PONGS))?;
            eoi(a)
        }),
        (18, &|a| {
            wrmsr(a, status, 0, 0)?;
            wrmsr(a, MCG_STATUS, 0, 0)?;
            skip_halt(a)?;
            a.inc(qword_ptr(CHECKED + r15 * 8))
        }),
    ];
    for (at, (vector, body)) in (HANDLERS..).step_by(HANDLER as usize).zip(bodies) {
        let code = assemble(|a| handler(a, body), at).context("A handler cannot be assembled")?;
        ensure!(code.len() as u64 <= HANDLER, "A handler is too long");
        image.write(at, &code);
        image.write(IDT + 16 * u64::from(vector), &gate(at, 0));
    }
    Ok(image)
}
