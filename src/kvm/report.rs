//! What a vCPU was doing when its machine ended: for those who ask why it went no further.

use std::fmt;

use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_SIPI_RECEIVED,
    KVM_MP_STATE_UNINITIALIZED,
};
use serde::Serialize;

use super::{KvmError, Vcpu};

/// Offsets in a local APIC's page (SDM volume 3, table 12-1).
const APIC_TASK_PRIORITY: usize = 0x80;
const APIC_IN_SERVICE: usize = 0x100;
const APIC_REQUESTED: usize = 0x200;
const APIC_TIMER: usize = 0x320;

/// A vCPU that runs no more. On AMD, KVM resets one that has shut down (`shutdown_interception` in
/// arch/x86/kvm/svm/svm.c), so nothing is known of what led there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CpuReport {
    /// Its number.
    pub vcpu: u32,
    /// What it waits for, or `runs`.
    pub activity: &'static str,
    /// Its privilege.
    pub cpl: u8,
    /// The next instruction.
    #[serde(serialize_with = "hexadecimal")]
    pub rip: u64,
    /// The stack.
    #[serde(serialize_with = "hexadecimal")]
    pub rsp: u64,
    /// The flags.
    #[serde(serialize_with = "hexadecimal")]
    pub rflags: u64,
    /// Where the last page fault was.
    #[serde(serialize_with = "hexadecimal")]
    pub cr2: u64,
    /// The page tables.
    #[serde(serialize_with = "hexadecimal")]
    pub cr3: u64,
    /// The vector of the exception, interrupt or NMI that is being delivered.
    pub delivering: Option<u8>,
    /// Whether NMIs are masked: it is in a handler of one.
    pub nmi_masked: bool,
    /// Vectors that the local APIC has in service.
    pub in_service: Vec<u8>,
    /// Vectors that wait in the local APIC.
    pub requested: Vec<u8>,
    /// The local APIC's task priority.
    pub task_priority: u8,
    /// The local vector table's entry of the timer.
    #[serde(serialize_with = "hexadecimal")]
    pub timer: u64,
}

fn hexadecimal<S: serde::Serializer>(value: &u64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{value:#x}"))
}

impl CpuReport {
    /// The state of `vcpu`, on its thread, outside KVM_RUN.
    pub fn of(vcpu: &Vcpu) -> Result<Self, KvmError> {
        let (regs, sregs, events) = (vcpu.regs()?, vcpu.sregs()?, vcpu.events()?);
        let activity =
            match vcpu.fd().get_mp_state().map_err(KvmError::refused("to show the run state"))?.mp_state {
                KVM_MP_STATE_RUNNABLE => "runs",
                KVM_MP_STATE_HALTED => "waits for an interrupt (HLT)",
                KVM_MP_STATE_UNINITIALIZED => "waits for INIT",
                KVM_MP_STATE_INIT_RECEIVED => "waits for SIPI",
                KVM_MP_STATE_SIPI_RECEIVED => "has got SIPI",
                _ => "other",
            };
        let apic = vcpu.fd().get_lapic().map_err(KvmError::refused("to show the local APIC"))?;
        let apic = apic.regs.map(|byte| byte as u8);
        let delivering = [
            (events.exception.injected, events.exception.nr),
            (events.interrupt.injected, events.interrupt.nr),
            (events.nmi.injected, 2),
        ];
        Ok(Self {
            vcpu: vcpu.id(),
            activity,
            cpl: sregs.ss.dpl,
            rip: regs.rip,
            rsp: regs.rsp,
            rflags: regs.rflags,
            cr2: sregs.cr2,
            cr3: sregs.cr3,
            delivering: delivering.into_iter().find_map(|(is, vector)| (is != 0).then_some(vector)),
            nmi_masked: events.nmi.masked != 0,
            in_service: vectors(&apic, APIC_IN_SERVICE),
            requested: vectors(&apic, APIC_REQUESTED),
            task_priority: register(&apic, APIC_TASK_PRIORITY) as u8,
            timer: register(&apic, APIC_TIMER).into(),
        })
    }
}

impl fmt::Display for CpuReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { vcpu, activity, cpl, rip, rflags, in_service, requested, .. } = self;
        write!(f, "vCPU {vcpu} {activity}: rip {rip:#x}, cpl {cpl}, rflags {rflags:#x}")?;
        if let Some(vector) = self.delivering {
            write!(f, ", delivering vector {vector}")?;
        }
        write!(f, "; interrupts in service {in_service:?}, waiting {requested:?}")
    }
}

/// A register of the page, 32 bits wide.
fn register(apic: &[u8], offset: usize) -> u32 {
    apic.get(offset..offset + 4)
        .map_or(0, |bytes| bytes.iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte)))
}

/// The vectors that are set in the eight registers from `offset` on.
fn vectors(apic: &[u8], offset: usize) -> Vec<u8> {
    (0..=u8::MAX)
        .filter(|vector| register(apic, offset + usize::from(vector / 32) * 16) & 1 << (vector % 32) != 0)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors_are_found_in_their_registers() {
        let mut apic = [0; 0x400];
        apic[APIC_REQUESTED] = 1;
        apic[APIC_REQUESTED + 0x10] = 0x80;
        apic[APIC_REQUESTED + 0x70 + 3] = 0x80;
        assert_eq!(vectors(&apic, APIC_REQUESTED), [0, 39, 255]);
        assert!(vectors(&apic, APIC_IN_SERVICE).is_empty());
        assert_eq!(register(&apic, APIC_REQUESTED + 0x70), 0x8000_0000);
    }
}
