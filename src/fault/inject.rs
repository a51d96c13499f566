//! Putting a machine check into a vCPU without losing what was on its way.
//!
//! KVM drops a queued interrupt when an exception is set over it, and leaves its ISR bit behind, so that no
//! EOI ever comes (`svm_complete_interrupts`, `kvm_check_and_inject_events` in arch/x86/kvm). An event that
//! was being delivered when the vCPU trapped is therefore taken back first: it comes again after the
//! machine check.

use kvm_bindings::{kvm_lapic_state, kvm_vcpu_events};

use crate::kvm::{KvmError, Vcpu};

/// Offset of the first in-service register in the local APIC page (SDM volume 3, table 12-1).
const APIC_ISR: usize = 0x100;
/// Offset of the first interrupt-request register.
const APIC_IRR: usize = 0x200;
/// IA32_APIC_BASE: x2APIC mode.
const APIC_BASE_X2APIC: u64 = 1 << 10;
/// MSRs of the x2APIC: end of interrupt, and self-IPI.
const X2APIC_EOI: u32 = 0x80b;
const X2APIC_SELF_IPI: u32 = 0x83f;
/// The machine-check exception.
const MC_VECTOR: u8 = 18;

/// NMIs that KVM keeps pending (`process_nmi` in arch/x86/kvm/x86.c).
const MOST_NMIS: u8 = 2;

/// What was taken back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Taken {
    /// An external interrupt, which the local APIC must request again.
    pub interrupt: Option<u8>,
    /// An NMI, pending again.
    pub nmi: bool,
    /// An exception. A fault comes again when its instruction does; another kind is lost, and reported.
    pub exception: Option<u8>,
}

/// Takes back what `events` says is being delivered, and puts #MC in its place.
pub fn take_back_events(events: &mut kvm_vcpu_events) -> Taken {
    let mut taken = Taken::default();
    if events.interrupt.injected != 0 {
        // A software interrupt is raised again by its instruction.
        taken.interrupt = (events.interrupt.soft == 0).then_some(events.interrupt.nr);
        events.interrupt.injected = 0;
        events.interrupt.nr = 0;
    }
    if events.nmi.injected != 0 {
        taken.nmi = true;
        events.nmi.injected = 0;
        events.nmi.masked = 0;
        events.nmi.pending = events.nmi.pending.saturating_add(1).min(MOST_NMIS);
    }
    if events.exception.injected != 0 {
        taken.exception = Some(events.exception.nr);
    }
    events.exception.injected = 1;
    events.exception.nr = MC_VECTOR;
    events.exception.has_error_code = 0;
    events.exception.error_code = 0;
    events.exception.pending = 0;
    taken
}

/// What KVM is delivering to a vCPU, and what it would lose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InFlight {
    /// An interrupt of the local APIC.
    pub interrupt: Option<u8>,
    /// An exception.
    pub exception: Option<u8>,
}

/// What is being delivered; an NMI is not among it, since it can always be taken back.
pub fn in_flight(events: &kvm_vcpu_events) -> InFlight {
    InFlight {
        interrupt: (events.interrupt.injected != 0).then_some(events.interrupt.nr),
        exception: (events.exception.injected != 0 || events.exception.pending != 0)
            .then_some(events.exception.nr),
    }
}

/// Gets the local APIC to ask again for an interrupt that it takes for delivered.
///
/// In x2APIC mode this is an end of interrupt, which is that of the highest vector in service, and a self-IPI: nothing
/// else of the APIC changes. In xAPIC mode its whole state is written back, so that nobody may send it an interrupt
/// meanwhile (`kvm_apic_set_state` in arch/x86/kvm/lapic.c).
pub fn request_again(vcpu: &Vcpu, vector: u8) -> Result<(), KvmError> {
    if vcpu.sregs()?.apic_base & APIC_BASE_X2APIC != 0 {
        return vcpu.set_msrs(&[(X2APIC_EOI, 0), (X2APIC_SELF_IPI, u64::from(vector))]);
    }
    let mut lapic = vcpu.lapic()?;
    move_to_requested(&mut lapic, vector);
    vcpu.set_lapic(&lapic)
}

/// Moves `vector` from in service back to requested.
fn move_to_requested(lapic: &mut kvm_lapic_state, vector: u8) {
    let word = usize::from(vector / 32) * 0x10;
    let (byte, bit) = (usize::from(vector % 32 / 8), 1u8 << (vector % 8));
    let regs = &mut lapic.regs;
    regs[APIC_ISR + word + byte] &= !(bit as std::os::raw::c_char);
    regs[APIC_IRR + word + byte] |= bit as std::os::raw::c_char;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interrupt_in_flight_is_requested_again() {
        let mut events = kvm_vcpu_events::default();
        events.interrupt.injected = 1;
        events.interrupt.nr = 0xec;
        assert_eq!(take_back_events(&mut events), Taken { interrupt: Some(0xec), ..Default::default() });
        assert_eq!((events.interrupt.injected, events.exception.injected, events.exception.nr), (0, 1, 18));

        let mut lapic = kvm_lapic_state::default();
        lapic.regs[APIC_ISR + 0x70 + 1] = 1 << 4;
        move_to_requested(&mut lapic, 0xec);
        assert_eq!(lapic.regs[APIC_ISR + 0x70 + 1], 0);
        assert_eq!(lapic.regs[APIC_IRR + 0x70 + 1], 1 << 4);
    }

    #[test]
    fn an_nmi_in_flight_is_pending_again_and_unmasked() {
        let mut events = kvm_vcpu_events::default();
        events.nmi.injected = 1;
        events.nmi.masked = 1;
        assert!(take_back_events(&mut events).nmi);
        assert_eq!((events.nmi.injected, events.nmi.pending, events.nmi.masked), (0, 1, 0));
    }

    #[test]
    fn a_software_interrupt_is_left_to_its_instruction() {
        let mut events = kvm_vcpu_events::default();
        events.interrupt.injected = 1;
        events.interrupt.nr = 0x80;
        events.interrupt.soft = 1;
        assert_eq!(take_back_events(&mut events), Taken::default());
    }
}
