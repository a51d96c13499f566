//! Errors of the host's own memory, turned into the guest's.
//!
//! A page that was consumed under a vCPU becomes poison, and the vCPU's next try consumes that. One that was only found
//! bad is told to the guest by a machine check that asks for nothing (SRAO, or a deferred error on AMD).

use super::deliver::Injection;
use super::trap::Traps;
use crate::command::{Event, MceOrigin};
use crate::kvm::Held;
use crate::memory::Region;
use crate::memory::host_fault::{self, HostCause, HostFault};
use crate::x86::mca::{ErrorClass, MachineError};

impl Traps {
    /// Serves what the host reported since the last time.
    pub fn serve_host_faults(&self, _held: &Held) {
        let (noted, lost) = host_fault::take();
        if lost > 0 {
            tracing::error!(lost, "more errors of the host's memory at once than can be noted");
        }
        let regions = self.space.regions();
        let mut served: Vec<HostFault> = Vec::new();
        for fault in noted.iter().map(|noted| noted.fault) {
            if served.contains(&fault) {
                continue;
            }
            served.push(fault);
            let place = regions.iter().find_map(|r| r.offset_of(fault.address).map(|offset| (r, offset)));
            match place {
                Some((region, offset)) => self.serve_host_fault(region, offset, fault),
                None => tracing::warn!(?fault, "an error of the host's memory under no device"),
            }
        }
    }

    fn serve_host_fault(&self, region: &Region, offset: u64, fault: HostFault) {
        let failed = |message: String| {
            self.events.publish(Event::DeviceError { device: region.name().to_owned(), message });
        };
        if fault.cause == HostCause::BeyondEnd {
            failed(shortened(region));
            return;
        }
        let pages = offset..(offset + fault.len).min(region.len());
        let whole = pages.end - pages.start;
        // The kernel tells of a page once for each map of it.
        let known =
            region.poisoned(pages.clone(), usize::MAX).iter().map(|run| run.end - run.start).sum::<u64>()
                == whole;
        if known && fault.cause == HostCause::Found {
            return;
        }
        if let Err(error) = region.lose(pages.clone()) {
            failed(format!("Bad memory of the host stays under the guest: {error}"));
            return;
        }
        let gpa = region.gpa() + pages.start;
        self.events.publish(Event::HostMemoryError {
            device: region.name().to_owned(),
            offset: region.named_offset(gpa).into(),
            bytes: whole,
            consumed: fault.cause == HostCause::Consumed,
        });
        if fault.cause == HostCause::Found {
            let granularity = whole.trailing_zeros() as u8;
            let error = MachineError { granularity, ..MachineError::page(ErrorClass::ActionOptional, gpa) };
            if let Err(error) = self.injector.raise(None, Injection::error(error, MceOrigin::Host)) {
                tracing::warn!(%error, "the guest is not told of bad memory");
            }
        }
    }
}

/// What is to be said of a region whose file was made shorter.
pub(super) fn shortened(region: &Region) -> String {
    format!(
        "{} was made shorter while the machine uses it: {:#x} bytes are missing at its end; make it {:#x} bytes long again",
        region.file_name(),
        region.missing(),
        region.len()
    )
}
