//! Errors that the guest injects through its firmware (EINJ).
//!
//! An uncorrected error is poison in the one poison map, so that it is met wherever poison is met. What the trigger
//! stands for is the memory controller's own discovery: its scrubber comes across the bad line and reports it, with no
//! processor having consumed it (action optional; on AMD deferred), or, of a fatal error, with a machine check that
//! nothing survives.

use std::sync::{Arc, Mutex};

use aconite_devices::bus::lock;
use aconite_devices::einj::{Einj, Injection, Refusal, Severity};

use super::memory::MemoryDevices;
use crate::command::{
    Error, ErrorCode, Event, EventBus, InjectionSeverity, InjectionStep, MceOrigin, PoisonPattern,
};
use crate::fault::{self, Injector};
use crate::kvm::Held;
use crate::memory::LINE_SIZE;
use crate::units::ByteRange;
use crate::x86::mca::{ErrorClass, MachineError};

/// What carries out injections.
pub struct Injections {
    /// The firmware's interface.
    pub einj: Arc<Mutex<Einj>>,
    /// Where machine checks go.
    pub injector: Injector,
    /// The event stream.
    pub events: EventBus,
    /// Number of processors; their local APIC IDs are their numbers.
    pub cpus: u32,
}

impl Injections {
    /// Puts the error in place, and tells the guest's firmware interface how that went.
    pub fn inject(&self, held: &Held, memory: &MemoryDevices, injection: Injection) {
        let result = self.place(held, memory, injection);
        let (step, detail) = match &result {
            Ok(()) => (InjectionStep::Injected, None),
            Err(refused) => (InjectionStep::Refused, Some(refused.why.clone())),
        };
        self.tell(injection, step, detail);
        lock(&self.einj).finish(injection.number, result.map_err(|refused| refused.answer));
    }

    fn place(&self, held: &Held, memory: &MemoryDevices, injection: Injection) -> Result<(), Refused> {
        if let Some(id) = injection.apic_id.filter(|id| *id >= self.cpus) {
            let why = format!("no processor has the local APIC ID {id}");
            return Err(Refused { answer: Refusal::InvalidAccess, why });
        }
        let (id, range) = memory.named_line(injection.address)?;
        match injection.severity {
            Severity::Corrected => Ok(()),
            Severity::NonFatal | Severity::Fatal => {
                memory.poison(held, &id, PoisonPattern::Ranges(vec![range]))?;
                Ok(())
            }
        }
    }

    /// Makes an error happen that was injected.
    pub fn trigger(&self, memory: &MemoryDevices, injection: Injection) {
        let error = |class| MachineError::line(class, injection.address);
        let error = match injection.severity {
            Severity::Corrected => error(ErrorClass::Corrected),
            // Whoever has repaired the line meanwhile has left the scrubber nothing to find.
            Severity::NonFatal if !memory.is_poisoned(injection.address) => {
                self.tell(injection, InjectionStep::Triggered, Some("the line was repaired".to_owned()));
                return;
            }
            Severity::NonFatal => error(ErrorClass::ActionOptional),
            Severity::Fatal => MachineError { context_corrupt: true, ..error(ErrorClass::Load) },
        };
        let raised =
            self.injector.raise(injection.apic_id, fault::Injection::error(error, MceOrigin::Injection));
        let detail = match raised {
            Ok(vcpu) => format!("reported by vCPU {vcpu}"),
            Err(error) => error.to_string(),
        };
        self.tell(injection, InjectionStep::Triggered, Some(detail));
    }

    fn tell(&self, injection: Injection, step: InjectionStep, detail: Option<String>) {
        let severity = match injection.severity {
            Severity::Corrected => InjectionSeverity::Corrected,
            Severity::NonFatal => InjectionSeverity::NonFatal,
            Severity::Fatal => InjectionSeverity::Fatal,
        };
        let (injection, gpa) = (injection.number, injection.address.into());
        self.events.publish(Event::ErrorInjection { injection, step, severity, gpa, detail });
    }
}

/// Why an error is not put in place.
struct Refused {
    /// What the guest is told.
    answer: Refusal,
    /// What events tell.
    why: String,
}

impl From<Error> for Refused {
    fn from(error: Error) -> Self {
        let answer = match error.code {
            ErrorCode::HostLimit => Refusal::Failure,
            _ => Refusal::InvalidAccess,
        };
        Self { answer, why: error.message }
    }
}

impl MemoryDevices {
    /// The id under which poison of the line at `gpa` is asked for, and the line by that id's offsets.
    fn named_line(&self, gpa: u64) -> Result<(String, ByteRange), Error> {
        let line = gpa & !(LINE_SIZE - 1);
        let Some(region) = self.space.find(line).filter(|region| !region.absent()) else {
            return Err(Error::new(
                ErrorCode::OutsideDevice,
                format!("There is no memory at {gpa:#x}"),
                "name an address of RAM or of a memory device that is present",
            ));
        };
        Ok((region.name().to_owned(), ByteRange::new(region.named_offset(line), LINE_SIZE)))
    }

    fn is_poisoned(&self, gpa: u64) -> bool {
        self.space.first_poison(gpa & !(LINE_SIZE - 1), LINE_SIZE).is_some()
    }
}
