//! Putting a machine check into a vCPU without losing what was on its way.
//!
//! KVM drops a queued interrupt when an exception is set over it, and leaves its ISR bit behind, so that no
//! EOI ever comes (`svm_complete_interrupts`, `kvm_check_and_inject_events` in arch/x86/kvm). An event that
//! was being delivered when the vCPU trapped is therefore taken back first: it comes again after the
//! machine check.

use aconite_devices::irq::MsiSink;
use kvm_bindings::kvm_vcpu_events;

use crate::kvm::{KvmError, Vcpu};

/// Where messages to local APICs go, and the place of the APIC id in the address (SDM volume 3, 12.11.1).
const MSI_ADDRESS: u64 = 0xfee0_0000;
const MSI_DESTINATION_SHIFT: u32 = 12;
/// The machine-check exception.
const MC_VECTOR: u8 = 18;

/// What was taken back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Taken {
    /// An external interrupt, which the local APIC must request again.
    pub interrupt: Option<u8>,
    /// An NMI, which must be made pending again.
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

/// Whether KVM is delivering an exception: one that is no fault would be lost.
pub fn exception_in_flight(events: &kvm_vcpu_events) -> bool {
    events.exception.injected != 0 || events.exception.pending != 0
}

/// Gets the local APIC to ask again for an interrupt that it takes for delivered: an end of interrupt, which is that of
/// the highest vector in service, and a message-signalled one.
///
/// Nothing else of the APIC changes, and nobody has to be kept from sending interrupts meanwhile. Writing its state
/// back would lose what came in between, and a tick of its timer (`kvm_apic_set_state` and `cancel_apic_timer` in
/// arch/x86/kvm/lapic.c).
pub fn request_again(vcpu: &Vcpu, msi: &dyn MsiSink, vector: u8) -> Result<(), KvmError> {
    vcpu.end_of_interrupt()?;
    msi.signal(MSI_ADDRESS | u64::from(vcpu.id()) << MSI_DESTINATION_SHIFT, vector.into());
    Ok(())
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
    }

    #[test]
    fn an_nmi_in_flight_is_told_and_unmasked() {
        let mut events = kvm_vcpu_events::default();
        events.nmi.injected = 1;
        events.nmi.masked = 1;
        assert!(take_back_events(&mut events).nmi);
        assert_eq!((events.nmi.injected, events.nmi.masked), (0, 0));
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
