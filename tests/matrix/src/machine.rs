//! One bare guest after the other in one virtual machine, served by the monitor's own code.

use crate::image::{IDT_LIMIT, Image, Mode, START, gate, has_error_code};
use crate::layout::*;
use aconite::command::EventBus;
use aconite::fault::{Injector, Progress, StaleLog, TrapError, Traps};
use aconite::kvm::{Baton, ExitCounts, KickTimer, Slot, StopAt, Vcpu, VcpuExitKind, Vm};
use aconite::memory::{AddressSpace, Backing, Region, RegionKind, backing};
use aconite::x86::cpuid::{self, CpuidConfig, Vendor};
use aconite::x86::mca::{self, McaConfig, McaState};
use aconite::x86::state::CpuState;
use aconite::x86::xstate::XsaveLayout;
use anyhow::{Context, Result, bail};
use kvm_bindings::{
    kvm_cpuid_entry2, kvm_debugregs, kvm_regs, kvm_segment, kvm_sregs, kvm_vcpu_events, kvm_xcr, kvm_xcrs,
};
use std::fs::File;
use std::slice;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vm_memory::VolatileMemory;

/// How long a guest may run; it takes a few milliseconds.
const LIMIT: Duration = Duration::from_secs(5);
/// Exits after which a guest is said to hang.
const MOST_EXITS: usize = 20_000;
/// More guarded places than any row has.
const GUARDS: usize = 64;

const CR0: u64 = 0x8005_0033;
const CR4: u64 = 1 << 5 | 1 << 6 | 1 << 9 | 1 << 10 | 1 << 18;
const CR4_LA57: u64 = 1 << 12;
const CR4_PCIDE: u64 = 1 << 17;
/// A process-context identifier.
const PCID: u64 = 0x5a5;
const CR4_SMAP: u64 = 1 << 21;
/// SYSCALL, long mode, no-execute.
const EFER: u64 = 1 | 1 << 8 | 1 << 10 | 1 << 11;
/// Flags of user code: it may use ports.
pub const IOPL3: u64 = 3 << 12;
pub const RFLAGS_AC: u64 = 1 << 18;

/// A guest.
#[derive(Clone, Debug, PartialEq)]
pub struct Guest {
    /// Paging and privilege.
    pub mode: Mode,
    /// What stands elsewhere in memory than in that of every guest, by guest-physical address.
    pub writes: Vec<(u64, Vec<u8>)>,
    /// General registers at the first instruction under test.
    pub regs: kvm_regs,
    /// Breakpoint registers DR0 to DR3 and DR7.
    pub breakpoints: Option<([u64; 4], u64)>,
    /// MSRs at the start.
    pub msrs: Vec<(u32, u64)>,
    /// Guest-physical addresses of poisoned lines.
    pub poison: Vec<u64>,
    /// The file of the operands is made shorter before the guest runs.
    pub truncated: bool,
}

impl Guest {
    /// A guest with nothing special.
    pub fn new(mode: Mode, regs: kvm_regs) -> Self {
        Self {
            mode,
            writes: Vec::new(),
            regs,
            breakpoints: None,
            msrs: Vec::new(),
            poison: Vec::new(),
            truncated: false,
        }
    }

    /// Writes memory.
    pub fn write(&mut self, gpa: u64, bytes: &[u8]) {
        self.writes.push((gpa, bytes.to_vec()));
    }

    /// Writes a 64-bit word.
    pub fn word(&mut self, gpa: u64, value: u64) {
        self.write(gpa, &value.to_le_bytes());
    }

    /// Points the gate of `vector` at `handler`, on stack table entry `ist`.
    pub fn gate(&mut self, vector: u8, handler: u64, ist: u8) {
        self.write(IDT + 16 * u64::from(vector), &gate(handler, ist));
    }
}

/// A handler that was reached.
#[derive(Clone, Debug, PartialEq)]
pub struct Reached {
    /// Vector.
    pub vector: u8,
    /// Error code, where there is one.
    pub error: Option<u64>,
    /// RIP, CS, RFLAGS, RSP and SS on the stack.
    pub frame: [u64; 5],
    /// General registers in the handler.
    pub regs: kvm_regs,
    /// DR6.
    pub dr6: u64,
    /// DR7.
    pub dr7: u64,
    /// CR2.
    pub cr2: u64,
}

/// A machine check as the guest met it.
#[derive(Clone, Debug)]
pub struct MachineCheck {
    /// The frame and the registers.
    pub reached: Reached,
    /// Memory when the handler was reached.
    pub memory: Image,
    /// The XSAVE area.
    pub vectors: Vec<u8>,
    /// MCG_STATUS, MCi_STATUS and MCi_ADDR as the handler has read them.
    pub registers: [u64; 3],
}

/// How a guest ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// At the end of its program.
    Done,
    /// In the handler of an exception that its program does not come back from.
    Exception(u8),
    /// By a triple fault.
    Shutdown,
    /// In HLT.
    Halted,
    /// Not in time.
    Hung,
    /// The monitor found no way on, and said why.
    Stuck(String),
    /// By something that must not happen.
    Failed(String),
}

/// What became of a guest.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// How it ended.
    pub end: End,
    /// General registers.
    pub regs: kvm_regs,
    /// System registers.
    pub sregs: kvm_sregs,
    /// Debug registers.
    pub debug: kvm_debugregs,
    /// The XSAVE area.
    pub vectors: Vec<u8>,
    /// Memory.
    pub memory: Image,
    /// Handlers that were reached, but for that of machine checks.
    pub reached: Vec<Reached>,
    /// Machine checks.
    pub checks: Vec<MachineCheck>,
    /// Poisoned lines that are left, by guest-physical address.
    pub poison: Vec<u64>,
    /// What was written to the device, by address.
    pub device: Vec<(u64, Vec<u8>)>,
    /// Accesses to guarded memory that KVM reported.
    pub traps: usize,
}

/// The virtual machine.
pub struct Machine {
    _vm: Vm,
    _slots: Vec<Slot>,
    low: Arc<Region>,
    data: Arc<Region>,
    data_file: File,
    traps: Traps,
    baton: Arc<Baton>,
    vcpu: Vcpu,
    timer: KickTimer,
    mca: McaConfig,
    xcr0: u64,
    cpuid: Vec<kvm_cpuid_entry2>,
    /// The last guest without poison, and what became of it: a hit and a miss share it.
    reference: Option<(Guest, Outcome)>,
    /// Memory that all guests of a mode begin with.
    images: Vec<(Mode, Image)>,
}

impl Machine {
    /// Makes it, on this thread.
    pub fn new() -> Result<Self> {
        let kvm = Vm::open()?;
        let supported = Vm::supported_cpuid(&kvm)?;
        let mca = McaConfig::for_vendor(Vendor::of(&supported));
        let vm = Vm::new(kvm, mca.msr_ranges())?;
        let fd = vm.create_vcpu(0)?;
        let config = CpuidConfig {
            vcpus: 1,
            vendor: None,
            hypervisor: true,
            erms: true,
            mca,
            tsc_khz: fd.get_tsc_khz().ok(),
            tsc_deadline: vm.has_tsc_deadline_timer(),
            invariant_tsc: None,
        };
        let cpuid = cpuid::guest_cpuid(&supported, &config, 0);
        let mut vcpu = Vcpu::new(0, fd, Arc::new(ExitCounts::default()));
        vcpu.set_cpuid(&cpuid)?;
        let space = Arc::new(AddressSpace::default());
        let region = |name: &str, gpa, len| -> Result<_> {
            let file = backing::anonymous(c"aconite-matrix", len)?;
            let kept = file.try_clone()?;
            let backing = Backing { file, offset: 0, writable: true };
            let region = Arc::new(Region::new(name, RegionKind::Ram, gpa, len, backing)?);
            space.insert(region.clone())?;
            Ok((region, kept))
        };
        let (low, _) = region("low", LOW, LOW_LEN)?;
        let (data, data_file) = region("data", DATA, DATA_LEN)?;
        let slots = vec![vm.map(&low)?, vm.map(&data)?];
        let baton = Baton::new(1);
        let events = EventBus::new();
        let kick = vcpu.on_this_thread()?;
        baton.set_kick(0, Some(kick));
        let traps = Traps {
            space,
            baton: baton.clone(),
            events: events.clone(),
            stale: Arc::new(StaleLog::default()),
            physical_bits: cpuid::physical_bits(&cpuid),
            xsave: XsaveLayout::from_cpuid(&cpuid),
            injector: Injector::new(mca, 1, baton.clone(), vm.msi(), events),
        };
        let xcr0 =
            cpuid.iter().find(|leaf| leaf.function == 0xd && leaf.index == 0).map_or(3, |leaf| leaf.eax);
        Ok(Self {
            _vm: vm,
            _slots: slots,
            low,
            data,
            data_file,
            traps,
            baton,
            vcpu,
            timer: KickTimer::new()?,
            mca,
            xcr0: u64::from(xcr0),
            cpuid,
            reference: None,
            images: Vec::new(),
        })
    }

    /// The guest's CPUID.
    pub fn cpuid(&self) -> &[kvm_cpuid_entry2] {
        &self.cpuid
    }

    /// Memory of a guest before its first instruction.
    pub fn image(&mut self, guest: &Guest) -> Result<Image> {
        let found = self.images.iter().find(|(mode, _)| *mode == guest.mode);
        let mut image = match found {
            Some((_, image)) => image.clone(),
            None => {
                let mut image = Image::new(guest.mode, self.bank())?;
                image.write(XSAVE + 512, &(self.xcr0 & 7).to_le_bytes());
                self.images.push((guest.mode, image.clone()));
                image
            }
        };
        guest.writes.iter().for_each(|(gpa, bytes)| image.write(*gpa, bytes));
        Ok(image)
    }

    /// The MSRs in which a load of poison is found: status, address, MCG_STATUS.
    fn bank(&self) -> [u32; 3] {
        let error = mca::MachineError::line(mca::ErrorClass::Load, 0);
        let bank = u32::from(error.record(&self.mca, true).bank);
        match self.mca.flavour {
            mca::Flavour::Smca => [0xc000_2001 + 16 * bank, 0xc000_2002 + 16 * bank, 0x17a],
            _ => [0x401 + 4 * bank, 0x402 + 4 * bank, 0x17a],
        }
    }

    /// Runs a guest without poison to its end, or recalls the last one.
    pub fn reference(&mut self, guest: &Guest) -> Result<Outcome> {
        match &self.reference {
            Some((last, outcome)) if last == guest => Ok(outcome.clone()),
            _ => {
                let outcome = self.run(guest)?;
                self.reference = Some((guest.clone(), outcome.clone()));
                Ok(outcome)
            }
        }
    }

    /// Runs a guest to its end.
    pub fn run(&mut self, guest: &Guest) -> Result<Outcome> {
        self.run_stepped(guest, None)
    }

    /// Runs a guest to its end; KVM steps it over the instruction at `stepped`, though nothing calls for that.
    pub fn run_stepped(&mut self, guest: &Guest, stepped: Option<u64>) -> Result<Outcome> {
        self.timer.arm(LIMIT.as_millis() as u32);
        self.prepare(guest)?;
        let mut run = Run::new(&self.mca);
        if let Some(address) = stepped {
            let debug = self.vcpu.debug_registers()?;
            let mut last = false;
            while !last {
                last = self.vcpu.regs()?.rip == address;
                self.vcpu.step(StopAt { trap: true, breakpoint: None }, &debug)?;
                self.vcpu.end_step()?;
            }
        }
        let end = self.go(&mut run);
        if matches!(end, Ok(End::Done)) {
            // With the last instruction done, nothing is left of a step.
            if run.progress.unfinished() {
                self.traps.finish(&mut self.vcpu, &mut run.progress)?;
            } else {
                self.vcpu.finish()?;
            }
            // KVM writes DR6 when it is asked for an exception that is pending (kvm_deliver_exception_payload).
            self.vcpu.events()?;
        }
        self.timer.arm(0);
        if guest.truncated {
            self.data_file.set_len(DATA_LEN).context("Cannot change the length of a file")?;
        }
        let poison = self.poisoned();
        self.repair()?;
        let outcome = Outcome {
            end: end?,
            regs: self.vcpu.regs()?,
            sregs: self.vcpu.sregs()?,
            debug: self.vcpu.fd().get_debug_regs()?,
            vectors: self.vcpu.xsave()?.0,
            memory: self.memory()?,
            reached: run.reached,
            checks: run.checks,
            poison,
            device: run.device,
            traps: run.traps,
        };
        Ok(outcome)
    }

    /// Makes all lines good again.
    fn repair(&self) -> Result<()> {
        for region in [&self.low, &self.data] {
            region.clean(slice::from_ref(&(0..region.len())))?;
        }
        Ok(())
    }

    fn memory(&self) -> Result<Image> {
        let read = |region: &Region| -> Result<Vec<u8>> {
            let mut bytes = vec![0; region.len() as usize];
            region.alias().get_slice(0, bytes.len())?.copy_to(&mut bytes[..]);
            Ok(bytes)
        };
        Ok(Image { low: read(&self.low)?, data: read(&self.data)? })
    }

    fn poisoned(&self) -> Vec<u64> {
        [&self.low, &self.data]
            .into_iter()
            .flat_map(|region| {
                let runs = region.poisoned(0..region.len(), usize::MAX);
                runs.into_iter().flat_map(|run| run.step_by(64)).map(|offset| region.gpa() + offset)
            })
            .collect()
    }

    /// Writes memory and registers, and lets the guest load its vector registers.
    fn prepare(&mut self, guest: &Guest) -> Result<()> {
        let image = self.image(guest)?;
        for (region, bytes) in [(&self.low, &image.low), (&self.data, &image.data)] {
            region.alias().get_slice(0, bytes.len())?.copy_from(&bytes[..]);
        }
        let vcpu = &mut self.vcpu;
        // The last guest may have ended within a step.
        vcpu.end_step()?;
        vcpu.set_events(&kvm_vcpu_events::default())?;
        vcpu.wake()?;
        let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
        xcrs.xcrs[0] = kvm_xcr { xcr: 0, value: self.xcr0 & 7, ..Default::default() };
        let mut sregs = system(vcpu.sregs()?, Mode { cpl: 0, ..guest.mode });
        vcpu.set_sregs(&sregs)?;
        vcpu.fd().set_xcrs(&xcrs)?;
        vcpu.fd().set_debug_regs(&kvm_debugregs { dr6: 0xffff_0ff0, dr7: 0x400, ..Default::default() })?;
        vcpu.set_msrs(&guest.msrs)?;
        vcpu.set_regs(&kvm_regs { rip: START, rsp: KERNEL_STACK + 0x1000, rflags: 2, ..Default::default() })?;
        match vcpu.run()? {
            VcpuExitKind::Io { port, .. } if port == u16::from(PORT_READY) => {}
            exit => bail!("The start of a guest ended in {exit:?} at {:x?}", vcpu.regs()?),
        }
        sregs = system(vcpu.sregs()?, guest.mode);
        vcpu.set_sregs(&sregs)?;
        if let Some((db, dr7)) = guest.breakpoints {
            let debug = kvm_debugregs { db, dr6: 0xffff_0ff0, dr7, ..Default::default() };
            vcpu.fd().set_debug_regs(&debug)?;
        }
        vcpu.set_regs(&guest.regs)?;
        if guest.truncated {
            self.data_file.set_len(0).context("Cannot change the length of a file")?;
        }
        for line in &guest.poison {
            let region = if *line >= DATA { &self.data } else { &self.low };
            let offset = line - region.gpa();
            region.poison(slice::from_ref(&(offset..offset + 1)), GUARDS)?;
        }
        Ok(())
    }

    fn go(&mut self, run: &mut Run) -> Result<End> {
        let deadline = Instant::now() + LIMIT;
        for _ in 0..MOST_EXITS {
            if self.baton.enter(0).is_err() {
                bail!("The baton is gone");
            }
            let exit = self.vcpu.run();
            self.baton.leave(0);
            if let Some(end) = self.serve(run, exit?)? {
                return Ok(end);
            }
            if Instant::now() > deadline {
                break;
            }
        }
        Ok(End::Hung)
    }

    /// Serves a trap, and the exits of the instruction that it lets through, as the thread of a vCPU does
    /// (`machine::cpu`).
    fn trap(&mut self, run: &mut Run, wanted: Option<u64>) -> Result<Option<End>> {
        let mut served = self.traps.serve(&mut self.vcpu, &mut run.mca, &mut run.progress, wanted);
        loop {
            match served {
                Ok(None) => return Ok(None),
                Ok(Some(exit)) => {
                    let end = self.serve(run, exit)?;
                    if end.is_some() || !run.progress.unfinished() {
                        return Ok(end);
                    }
                }
                Err(error) => return Ok(Some(failure(error))),
            }
            served = self.traps.finish(&mut self.vcpu, &mut run.progress);
        }
    }

    fn serve(&mut self, run: &mut Run, exit: VcpuExitKind) -> Result<Option<End>> {
        match exit {
            VcpuExitKind::Io { port, write, .. } => return self.port(run, port, write),
            VcpuExitKind::Mmio { gpa, write } if self.traps.holds(gpa) => {
                run.traps += 1;
                let Run { mca, progress, .. } = run;
                return match self.traps.serve_emulated(&mut self.vcpu, mca, progress, gpa, write) {
                    Ok(None) => Ok(None),
                    Ok(Some(exit)) => self.serve(run, exit),
                    Err(error) => Ok(Some(failure(error))),
                };
            }
            VcpuExitKind::Mmio { gpa, write } if (DEVICE..DEVICE + DEVICE_LEN).contains(&gpa) => {
                let data = self.vcpu.mmio_data();
                if write {
                    run.device.push((gpa, data.to_vec()));
                } else {
                    (gpa as u8..).zip(data).for_each(|(value, byte)| *byte = value ^ 0xa5);
                }
            }
            VcpuExitKind::ReadMsr { index } => {
                let value = run.mca.rdmsr(index).ok();
                self.vcpu.finish_msr(value);
            }
            VcpuExitKind::WriteMsr { index, value } => {
                let done = run.mca.wrmsr(index, value);
                self.vcpu.finish_msr(done.ok().map(|()| 0));
            }
            VcpuExitKind::Fault { gpa } => {
                run.traps += 1;
                return self.trap(run, gpa);
            }
            VcpuExitKind::Interrupted | VcpuExitKind::Debug => {}
            VcpuExitKind::Halt => return Ok(Some(End::Halted)),
            VcpuExitKind::Shutdown => return Ok(Some(End::Shutdown)),
            exit => {
                let rip = self.vcpu.regs()?.rip;
                return Ok(Some(End::Failed(format!("{exit:?} at {rip:#x}"))));
            }
        }
        Ok(None)
    }

    fn port(&mut self, run: &mut Run, port: u16, write: bool) -> Result<Option<End>> {
        let port = u8::try_from(port).context("A port that no guest uses")?;
        match port {
            PORT_DONE => return Ok(Some(End::Done)),
            PORT_HANDLED => {
                if let Some(check) = run.checks.last_mut() {
                    let mut words = [0; 3];
                    for (slot, word) in (0..).zip(&mut words) {
                        *word = self.low.read_u64(RECORD + 8 * slot).context("No record")?;
                    }
                    check.registers = words;
                }
                // The line is good again, and the instruction can be tried once more.
                self.repair()?;
            }
            PORT_DEVICE => {
                let data = self.vcpu.io_data();
                if write {
                    let data = data.to_vec();
                    run.device.push((u64::from(port), data));
                } else {
                    (0x31u8..).zip(data).for_each(|(value, byte)| *byte = value);
                }
            }
            PORT_VECTOR.. if port < PORT_DONE => {
                let vector = match port - PORT_VECTOR {
                    vector @ 0..32 => vector,
                    other => EXTRA_VECTORS[usize::from(other - 32)],
                };
                let reached = self.reached(vector)?;
                if vector == 18 {
                    let check = MachineCheck {
                        reached,
                        memory: self.memory()?,
                        vectors: self.vcpu.xsave()?.0,
                        registers: [0; 3],
                    };
                    run.checks.push(check);
                    return Ok(None);
                }
                run.reached.push(reached);
                if !matches!(vector, 1..=4 | 32..) {
                    return Ok(Some(End::Exception(vector)));
                }
            }
            _ => {}
        }
        Ok(None)
    }

    /// The frame that the handler at hand finds.
    fn reached(&self, vector: u8) -> Result<Reached> {
        let state = CpuState {
            regs: self.vcpu.regs()?,
            sregs: self.vcpu.sregs()?,
            physical_bits: self.traps.physical_bits,
            extended: None,
        };
        let word = |at: u64| -> Result<u64> {
            let gpa = state.paging().walk(&*self.traps.space, at).result?.gpa;
            self.traps.space.read_u64(gpa).context("A stack without memory")
        };
        let mut at = state.regs.rsp;
        let mut error = None;
        if has_error_code(vector) {
            error = Some(word(at)?);
            at += 8;
        }
        let mut frame = [0; 5];
        for (slot, value) in (0..).zip(&mut frame) {
            *value = word(at + 8 * slot)?;
        }
        let kvm_debugregs { dr6, dr7, .. } = self.vcpu.debug_registers()?;
        Ok(Reached { vector, error, frame, regs: state.regs, dr6, dr7, cr2: state.sregs.cr2 })
    }
}

/// The end of a guest whose trap could not be served.
fn failure(error: TrapError) -> End {
    match error {
        TrapError::Stuck { diagnosis, .. } => End::Stuck(diagnosis),
        error => End::Failed(error.to_string()),
    }
}

/// What is noted while a guest runs.
struct Run {
    mca: McaState,
    progress: Progress,
    reached: Vec<Reached>,
    checks: Vec<MachineCheck>,
    device: Vec<(u64, Vec<u8>)>,
    traps: usize,
}

impl Run {
    fn new(mca: &McaConfig) -> Self {
        Self {
            mca: McaState::new(*mca),
            progress: Progress::default(),
            reached: Vec::new(),
            checks: Vec::new(),
            device: Vec::new(),
            traps: 0,
        }
    }
}

/// System registers of 64-bit code.
pub fn system(old: kvm_sregs, mode: Mode) -> kvm_sregs {
    let segment = |selector: u16, kind: u8| kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_: kind,
        present: 1,
        dpl: (selector & 3) as u8,
        s: 1,
        g: 1,
        db: u8::from(kind != 11),
        l: u8::from(kind == 11),
        ..Default::default()
    };
    let (cs, ss) = if mode.cpl == 3 { (USER_CS, USER_SS) } else { (KERNEL_CS, KERNEL_SS) };
    let mut new = old;
    new.cs = segment(cs, 11);
    if mode.compatibility && mode.cpl == 3 {
        (new.cs.selector, new.cs.l, new.cs.db) = (COMPATIBILITY_CS, 0, 1);
    }
    let data = segment(ss, 3);
    (new.ss, new.ds, new.es, new.fs, new.gs) = (data, data, data, data, data);
    new.tr = kvm_segment {
        base: TSS,
        limit: u32::from(TSS_LEN - 1),
        selector: TASK,
        type_: 11,
        present: 1,
        ..Default::default()
    };
    new.ldt = kvm_segment { unusable: 1, ..Default::default() };
    (new.gdt.base, new.gdt.limit) = (GDT, GDT_LEN - 1);
    (new.idt.base, new.idt.limit) = (IDT, IDT_LIMIT);
    new.cr0 = CR0;
    new.cr2 = 0;
    new.cr3 = if mode.five_levels { PML5 } else { PML4 };
    new.cr4 = CR4;
    if mode.five_levels {
        new.cr4 |= CR4_LA57;
    }
    if mode.smap {
        new.cr4 |= CR4_SMAP;
    }
    if mode.pcid {
        new.cr4 |= CR4_PCIDE;
        new.cr3 |= PCID;
    }
    new.cr8 = 0;
    new.efer = EFER;
    new.interrupt_bitmap = [0; 4];
    new
}
