//! One vCPU: its registers, its exits, its single steps.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use kvm_bindings::{
    CpuId, KVM_CAP_ENFORCE_PV_FEATURE_CPUID, KVM_EXIT_DEBUG, KVM_EXIT_FAIL_ENTRY, KVM_EXIT_HLT,
    KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_INTR, KVM_EXIT_IO, KVM_EXIT_IO_OUT, KVM_EXIT_MEMORY_FAULT,
    KVM_EXIT_MMIO, KVM_EXIT_SHUTDOWN, KVM_EXIT_X86_RDMSR, KVM_EXIT_X86_WRMSR, KVM_GUESTDBG_BLOCKIRQ,
    KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP, KVM_MP_STATE_HALTED,
    KVM_MP_STATE_RUNNABLE, KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_SMM, Msrs, kvm_cpuid_entry2,
    kvm_debugregs, kvm_enable_cap, kvm_guest_debug, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events,
};
use kvm_ioctls::VcpuFd;
use thiserror::Error;

use super::vm::KvmError;
use super::{Kick, KickTimer};

/// How long a single step may take before it is interrupted, in milliseconds.
const STEP_LIMIT_MS: u32 = 50;

/// A vCPU that cannot go on.
#[derive(Debug, Error)]
pub enum RunError {
    /// KVM_RUN failed in a way that has no meaning here.
    #[error("KVM_RUN of vCPU {cpu} failed")]
    Run {
        /// The vCPU.
        cpu: u32,
        /// The system's answer.
        source: kvm_ioctls::Error,
    },
    /// The thread could not be prepared for kicks.
    #[error("Cannot prepare the thread of vCPU {cpu}")]
    Thread {
        /// The vCPU.
        cpu: u32,
        /// The system's answer.
        source: std::io::Error,
    },
    /// Another request failed.
    #[error(transparent)]
    Kvm(#[from] KvmError),
}

/// Why KVM_RUN returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VcpuExitKind {
    /// A port was accessed `count` times, `size` bytes each; the data is in [`Vcpu::io_data`].
    Io {
        /// The port.
        port: u16,
        /// Bytes of one access.
        size: usize,
        /// Whether the guest wrote.
        write: bool,
    },
    /// An address without memory was accessed; the data is in [`Vcpu::mmio_data`].
    Mmio {
        /// Guest-physical address.
        gpa: u64,
        /// Whether the guest wrote.
        write: bool,
    },
    /// An MSR of the monitor is read; answered with [`Vcpu::finish_msr`].
    ReadMsr {
        /// The MSR.
        index: u32,
    },
    /// An MSR of the monitor is written; answered with [`Vcpu::finish_msr`].
    WriteMsr {
        /// The MSR.
        index: u32,
        /// What is written.
        value: u64,
    },
    /// A single step ended.
    Debug,
    /// HLT with interrupt controllers outside the kernel; does not occur here.
    Halt,
    /// Triple fault.
    Shutdown,
    /// A signal came, or nothing happened.
    Interrupted,
    /// The vCPU stands before an instruction whose memory cannot be reached. KVM may have said where.
    Fault {
        /// Guest-physical address from KVM_EXIT_MEMORY_FAULT.
        gpa: Option<u64>,
    },
    /// KVM's emulator gave up.
    InternalError {
        /// KVM_INTERNAL_ERROR_*.
        suberror: u32,
    },
    /// The processor refused the guest's state.
    FailEntry {
        /// Hardware's reason.
        reason: u64,
    },
    /// An exit reason that this program does not know.
    Unknown {
        /// KVM_EXIT_*.
        reason: u32,
    },
}

/// What stops a vCPU after an instruction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StopAt {
    /// The single-step trap.
    pub trap: bool,
    /// A breakpoint register on the instruction at this linear address.
    pub breakpoint: Option<u64>,
}

/// Exits to the monitor, counted by kind.
#[derive(Debug, Default)]
pub struct ExitCounts {
    /// Port accesses.
    pub io: AtomicU64,
    /// Accesses to devices in memory.
    pub mmio: AtomicU64,
    /// MSR accesses.
    pub msr: AtomicU64,
    /// Accesses to guarded memory.
    pub fault: AtomicU64,
    /// Single steps.
    pub step: AtomicU64,
    /// Everything else, kicks among it.
    pub other: AtomicU64,
}

impl ExitCounts {
    fn count(&self, exit: &VcpuExitKind) {
        let counter = match exit {
            VcpuExitKind::Io { .. } => &self.io,
            VcpuExitKind::Mmio { .. } => &self.mmio,
            VcpuExitKind::ReadMsr { .. } | VcpuExitKind::WriteMsr { .. } => &self.msr,
            VcpuExitKind::Fault { .. } => &self.fault,
            VcpuExitKind::Debug => &self.step,
            _ => &self.other,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

/// One vCPU, on its own thread once [`Vcpu::on_this_thread`] was called.
#[derive(Debug)]
pub struct Vcpu {
    id: u32,
    fd: VcpuFd,
    timer: Option<KickTimer>,
    counts: Arc<ExitCounts>,
    /// The last exit is completed by the next KVM_RUN.
    unfinished: bool,
}

impl Vcpu {
    /// Wraps vCPU `id`.
    pub fn new(id: u32, fd: VcpuFd, counts: Arc<ExitCounts>) -> Self {
        Self { id, fd, timer: None, counts, unfinished: false }
    }

    /// The vCPU's number, which is its APIC id.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// The KVM handle, for setting up.
    pub fn fd(&self) -> &VcpuFd {
        &self.fd
    }

    /// Ties the vCPU to the calling thread and returns the way to kick it. The thread calls
    /// [`Kick::forget_this_thread`] before it drops the vCPU.
    pub fn on_this_thread(&mut self) -> std::io::Result<Kick> {
        self.timer = Some(KickTimer::new()?);
        let flag = &raw mut self.fd.get_kvm_run().immediate_exit;
        // SAFETY: the flag lies in the shared page of this vCPU, which lives as long as `self`, and the
        // thread forgets it before it drops `self`.
        unsafe { Kick::for_this_thread(flag) }
    }

    /// Runs the guest until it needs the monitor.
    pub fn run(&mut self) -> Result<VcpuExitKind, RunError> {
        let result = self.fd.run().map(|_| ());
        let run = self.fd.get_kvm_run();
        run.immediate_exit = 0;
        let exit = match result {
            Ok(()) => decode(run),
            // KVM_EXIT_MEMORY_FAULT comes with an error (Documentation/virt/kvm/api.rst); other faults leave
            // KVM_EXIT_UNKNOWN.
            Err(error) => match error.errno() {
                libc::EFAULT | libc::EHWPOISON if run.exit_reason == KVM_EXIT_MEMORY_FAULT => {
                    // SAFETY: the exit reason says which member is valid.
                    VcpuExitKind::Fault { gpa: Some(unsafe { run.__bindgen_anon_1.memory_fault.gpa }) }
                }
                libc::EFAULT | libc::EHWPOISON => VcpuExitKind::Fault { gpa: None },
                libc::EINTR | libc::EAGAIN => VcpuExitKind::Interrupted,
                _ => return Err(RunError::Run { cpu: self.id, source: error }),
            },
        };
        self.counts.count(&exit);
        self.unfinished = matches!(
            exit,
            VcpuExitKind::Io { .. }
                | VcpuExitKind::Mmio { .. }
                | VcpuExitKind::ReadMsr { .. }
                | VcpuExitKind::WriteMsr { .. }
        );
        Ok(exit)
    }

    /// Whether KVM still has to finish the instruction of the last exit: only afterwards do registers and events
    /// belong to a boundary of instructions.
    pub fn unfinished(&self) -> bool {
        self.unfinished
    }

    /// Lets KVM finish the instruction of the last exit and no more. The answer is another exit, which is to be
    /// served, or [`VcpuExitKind::Interrupted`].
    pub fn finish(&mut self) -> Result<VcpuExitKind, RunError> {
        self.fd.get_kvm_run().immediate_exit = 1;
        self.run()
    }

    /// Interrupts KVM_RUN in `milliseconds`, if the vCPU has been tied to this thread.
    pub fn interrupt_within(&self, milliseconds: u32) {
        if let Some(timer) = &self.timer {
            timer.arm(milliseconds);
        }
    }

    /// Executes one instruction, or one iteration of a string instruction, with interrupts held off. `guest` are the
    /// guest's own debug registers. An exit to be served leaves the instruction unfinished: see
    /// [`Self::finish`]. However it ends, [`Self::end_step`] follows.
    pub fn step(&mut self, stop: StopAt, guest: &kvm_debugregs) -> Result<VcpuExitKind, RunError> {
        let mut debug = kvm_guest_debug {
            control: KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_BLOCKIRQ,
            ..kvm_guest_debug::default()
        };
        if stop.trap {
            debug.control |= KVM_GUESTDBG_SINGLESTEP;
        }
        if let Some(target) = stop.breakpoint {
            debug.control |= KVM_GUESTDBG_USE_HW_BP;
            let (slot, dr7) = instruction_breakpoint(guest.dr7);
            debug.arch.debugreg[..4].copy_from_slice(&guest.db);
            debug.arch.debugreg[slot] = target;
            debug.arch.debugreg[7] = dr7;
        }
        self.fd.set_guest_debug(&debug).map_err(KvmError::refused("single stepping"))?;
        if let Some(timer) = &self.timer {
            timer.arm(STEP_LIMIT_MS);
        }
        let exit = self.run();
        if let Some(timer) = &self.timer {
            timer.arm(0);
        }
        exit
    }

    /// Ends what [`Self::step`] began. TF is clear afterwards if the step was by trap, whatever the guest had there
    /// (`kvm_get_rflags` in arch/x86/kvm/x86.c).
    pub fn end_step(&self) -> Result<(), KvmError> {
        self.fd
            .set_guest_debug(&kvm_guest_debug::default())
            .map_err(KvmError::refused("an end of single stepping"))
    }

    /// DR6 as the exception had it that ended in [`VcpuExitKind::Debug`]; 0 after other exits.
    pub fn debug_status(&mut self) -> u64 {
        let run = self.fd.get_kvm_run();
        if run.exit_reason != KVM_EXIT_DEBUG {
            return 0;
        }
        // SAFETY: the exit reason says which member is valid.
        unsafe { run.__bindgen_anon_1.debug.arch.dr6 }
    }

    /// The guest's debug registers.
    pub fn debug_registers(&self) -> Result<kvm_debugregs, KvmError> {
        self.fd.get_debug_regs().map_err(KvmError::refused("to show debug registers"))
    }

    /// Sets the guest's debug registers.
    pub fn set_debug_registers(&self, registers: &kvm_debugregs) -> Result<(), KvmError> {
        self.fd.set_debug_regs(registers).map_err(KvmError::refused("debug registers"))
    }

    /// The bytes of a port access, all of its repetitions.
    pub fn io_data(&mut self) -> &mut [u8] {
        let run = self.fd.get_kvm_run();
        if run.exit_reason != KVM_EXIT_IO {
            return &mut [];
        }
        // SAFETY: the exit reason says which member is valid.
        let io = unsafe { run.__bindgen_anon_1.io };
        let start = std::ptr::from_mut(run).cast::<u8>();
        // SAFETY: KVM places the data in the mapping that begins with `run`, at this offset and of this
        // length, and the borrow keeps others away.
        unsafe {
            std::slice::from_raw_parts_mut(
                start.add(io.data_offset as usize),
                io.count as usize * usize::from(io.size),
            )
        }
    }

    /// The bytes of an access to an address without memory.
    pub fn mmio_data(&mut self) -> &mut [u8] {
        let run = self.fd.get_kvm_run();
        if run.exit_reason != KVM_EXIT_MMIO {
            return &mut [];
        }
        // SAFETY: the exit reason says which member is valid.
        let mmio = unsafe { &mut run.__bindgen_anon_1.mmio };
        let len = (mmio.len as usize).min(mmio.data.len());
        &mut mmio.data[..len]
    }

    /// Answers an MSR exit: the value read (ignored for writes), or none for #GP.
    pub fn finish_msr(&mut self, value: Option<u64>) {
        let run = self.fd.get_kvm_run();
        if matches!(run.exit_reason, KVM_EXIT_X86_RDMSR | KVM_EXIT_X86_WRMSR) {
            run.__bindgen_anon_1.msr.error = u8::from(value.is_none());
            run.__bindgen_anon_1.msr.data = value.unwrap_or(0);
        }
    }

    /// General registers.
    pub fn regs(&self) -> Result<kvm_regs, KvmError> {
        self.fd.get_regs().map_err(KvmError::refused("to show registers"))
    }

    /// Sets the general registers.
    pub fn set_regs(&self, regs: &kvm_regs) -> Result<(), KvmError> {
        self.fd.set_regs(regs).map_err(KvmError::refused("registers"))
    }

    /// Segment and control registers.
    pub fn sregs(&self) -> Result<kvm_sregs, KvmError> {
        self.fd.get_sregs().map_err(KvmError::refused("to show system registers"))
    }

    /// Sets segment and control registers.
    pub fn set_sregs(&self, sregs: &kvm_sregs) -> Result<(), KvmError> {
        self.fd.set_sregs(sregs).map_err(KvmError::refused("system registers"))
    }

    /// Sets model-specific registers: pairs of index and value.
    pub fn set_msrs(&self, msrs: &[(u32, u64)]) -> Result<(), KvmError> {
        let entries: Vec<_> =
            msrs.iter().map(|&(index, data)| kvm_msr_entry { index, data, ..Default::default() }).collect();
        let too_many = |_| KvmError::refused("MSRs")(kvm_ioctls::Error::new(libc::E2BIG));
        let list = Msrs::from_entries(&entries).map_err(too_many)?;
        let done = self.fd.set_msrs(&list).map_err(KvmError::refused("MSRs"))?;
        match msrs.get(done) {
            None => Ok(()),
            Some((index, _)) => {
                Err(KvmError::refused(format!("MSR {index:#x}"))(kvm_ioctls::Error::new(libc::EINVAL)))
            }
        }
    }

    /// The values of model-specific registers, in the order asked for.
    pub fn msrs<const N: usize>(&self, indices: [u32; N]) -> Result<[u64; N], KvmError> {
        let entries = indices.map(|index| kvm_msr_entry { index, ..Default::default() });
        let too_many = |_| KvmError::refused("MSRs")(kvm_ioctls::Error::new(libc::E2BIG));
        let mut list = Msrs::from_entries(&entries).map_err(too_many)?;
        let done = self.fd.get_msrs(&mut list).map_err(KvmError::refused("to show MSRs"))?;
        match indices.get(done) {
            None => {
                let mut values = [0; N];
                for (value, entry) in values.iter_mut().zip(list.as_slice()) {
                    *value = entry.data;
                }
                Ok(values)
            }
            Some(index) => {
                let what = format!("to show MSR {index:#x}");
                Err(KvmError::refused(what)(kvm_ioctls::Error::new(libc::EINVAL)))
            }
        }
    }

    /// Gives the guest its CPUID, and holds it to the paravirtual features named there.
    pub fn set_cpuid(&self, entries: &[kvm_cpuid_entry2]) -> Result<(), KvmError> {
        let list = CpuId::from_entries(entries)
            .map_err(|_| KvmError::refused("CPUID")(kvm_ioctls::Error::new(libc::E2BIG)))?;
        self.fd.set_cpuid2(&list).map_err(KvmError::refused("CPUID"))?;
        let enforce = kvm_enable_cap {
            cap: KVM_CAP_ENFORCE_PV_FEATURE_CPUID,
            args: [1, 0, 0, 0],
            ..Default::default()
        };
        self.fd.enable_cap(&enforce).map_err(KvmError::refused("the bounds of paravirtual features"))
    }

    /// Pending events.
    pub fn events(&self) -> Result<kvm_vcpu_events, KvmError> {
        self.fd.get_vcpu_events().map_err(KvmError::refused("to show pending events"))
    }

    /// Sets the pending events, but for NMIs and SMIs that are pending: others send them at any moment, and one that came
    /// since [`Self::events`] would be lost (`kvm_vcpu_ioctl_x86_set_vcpu_events` in arch/x86/kvm/x86.c).
    pub fn set_events(&self, events: &kvm_vcpu_events) -> Result<(), KvmError> {
        let theirs = KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SMM;
        let events = kvm_vcpu_events { flags: events.flags & !theirs, ..*events };
        self.fd.set_vcpu_events(&events).map_err(KvmError::refused("pending events"))
    }

    /// Makes an NMI pending.
    pub fn request_nmi(&self) -> Result<(), KvmError> {
        self.fd.nmi().map_err(KvmError::refused("an NMI"))
    }

    /// Ends the interrupt of the highest priority that is in service in the local APIC.
    ///
    /// KVM takes an end of interrupt from user space in every mode of the APIC, as Hyper-V's MSR for it
    /// (`kvm_hv_vapic_msr_write` in arch/x86/kvm/hyperv.c); in the guest that MSR does not exist.
    pub fn end_of_interrupt(&self) -> Result<(), KvmError> {
        const HV_X64_MSR_EOI: u32 = 0x4000_0070;
        self.set_msrs(&[(HV_X64_MSR_EOI, 0)])
    }

    /// The XSAVE area and XCR0.
    pub fn xsave(&self) -> Result<(Vec<u8>, u64), KvmError> {
        let area = self.fd.get_xsave().map_err(KvmError::refused("to show vector registers"))?;
        let xcrs = self.fd.get_xcrs().map_err(KvmError::refused("to show extended control registers"))?;
        let xcr0 = xcrs.xcrs.iter().take(xcrs.nr_xcrs as usize).find(|x| x.xcr == 0).map_or(1, |x| x.value);
        Ok((area.region.iter().flat_map(|word| word.to_le_bytes()).collect(), xcr0))
    }

    /// Tells a guest with kvmclock that it stood still, so that its watchdogs do not complain
    /// (KVM_KVMCLOCK_CTRL; `kvm_check_and_clear_guest_paused` in arch/x86/kernel/kvmclock.c).
    pub fn was_paused(&self) {
        if let Err(error) = self.fd.kvmclock_ctrl() {
            // EINVAL: the guest does not use kvmclock.
            tracing::debug!(%error, vcpu = self.id, "the guest was not told of a pause");
        }
    }

    /// Wakes a halted vCPU, so that an injected exception is delivered.
    pub fn wake(&self) -> Result<(), KvmError> {
        let state = self.fd.get_mp_state().map_err(KvmError::refused("to show the run state"))?;
        if state.mp_state == KVM_MP_STATE_HALTED {
            self.fd
                .set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE })
                .map_err(KvmError::refused("the run state"))?;
        }
        Ok(())
    }
}

/// A breakpoint register for an instruction, beside those that the guest uses: its number, and DR7 with it. If the
/// guest uses all four, it lends the last one for a step.
fn instruction_breakpoint(dr7: u64) -> (usize, u64) {
    let slot = (0..4).find(|slot| dr7 & (3 << (2 * slot)) == 0).unwrap_or(3);
    // R/W and LEN of the slot are zero: an instruction (SDM volume 3, 18.2.4).
    let dr7 = dr7 & !(0xf << (16 + 4 * slot)) | 3 << (2 * slot) | 1 << 10;
    (slot, dr7)
}

fn decode(run: &kvm_bindings::kvm_run) -> VcpuExitKind {
    match run.exit_reason {
        KVM_EXIT_IO => {
            // SAFETY: the exit reason says which member is valid.
            let io = unsafe { run.__bindgen_anon_1.io };
            VcpuExitKind::Io {
                port: io.port,
                size: usize::from(io.size),
                write: u32::from(io.direction) == KVM_EXIT_IO_OUT,
            }
        }
        KVM_EXIT_MMIO => {
            // SAFETY: the exit reason says which member is valid.
            let mmio = unsafe { run.__bindgen_anon_1.mmio };
            VcpuExitKind::Mmio { gpa: mmio.phys_addr, write: mmio.is_write != 0 }
        }
        KVM_EXIT_X86_RDMSR => {
            // SAFETY: the exit reason says which member is valid.
            VcpuExitKind::ReadMsr { index: unsafe { run.__bindgen_anon_1.msr.index } }
        }
        KVM_EXIT_X86_WRMSR => {
            // SAFETY: the exit reason says which member is valid.
            let msr = unsafe { run.__bindgen_anon_1.msr };
            VcpuExitKind::WriteMsr { index: msr.index, value: msr.data }
        }
        KVM_EXIT_DEBUG => VcpuExitKind::Debug,
        KVM_EXIT_HLT => VcpuExitKind::Halt,
        KVM_EXIT_SHUTDOWN => VcpuExitKind::Shutdown,
        KVM_EXIT_INTR => VcpuExitKind::Interrupted,
        KVM_EXIT_INTERNAL_ERROR => {
            // SAFETY: the exit reason says which member is valid.
            VcpuExitKind::InternalError { suberror: unsafe { run.__bindgen_anon_1.internal.suberror } }
        }
        KVM_EXIT_FAIL_ENTRY => {
            // SAFETY: the exit reason says which member is valid.
            let fail = unsafe { run.__bindgen_anon_1.fail_entry };
            VcpuExitKind::FailEntry { reason: fail.hardware_entry_failure_reason }
        }
        reason => VcpuExitKind::Unknown { reason },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_breakpoint_for_a_step_leaves_the_guests_own_alone() {
        assert_eq!(instruction_breakpoint(0x400), (0, 0x403));
        // DR0 and DR1 watch four bytes each.
        assert_eq!(instruction_breakpoint(0x00ff_0405), (2, 0x00ff_0435));
        assert_eq!(instruction_breakpoint(0xffff_04aa), (3, 0x0fff_04ea));
    }
}
