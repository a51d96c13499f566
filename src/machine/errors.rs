//! Firmware's error records on their way to the guest: taken by request, put before it, announced.

use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use aconite_acpi::ghes::Source;
use aconite_acpi::platform::{EventTarget, FirmwareEvent, notify};
use aconite_devices::bus::lock;
use aconite_devices::ghes::{ErrorSources, Happened, SubmitError};
use aconite_devices::irq::MsiSink;
use aconite_devices::platform::Platform;

use super::boot_errors::BootErrors;
use crate::command::{CperAccepted, CperRequest, CperSeverity, Error, ErrorCode, Event, EventBus};

/// The message that is an NMI for the first vCPU: physical destination 0, delivery mode NMI (Intel SDM 3A, 11.11).
const NMI: (u64, u32) = (0xFEE0_0000, 0x400);

/// The error sources of a machine, and the ways by which the guest is told of them.
pub struct Errors {
    sources: Arc<Mutex<ErrorSources>>,
    platform: Arc<Mutex<Platform>>,
    msi: Arc<dyn MsiSink>,
    events: EventBus,
    boot_errors: Arc<BootErrors>,
}

impl Errors {
    /// Error sources that are told by `platform` and `msi`.
    pub fn new(
        sources: Arc<Mutex<ErrorSources>>,
        platform: Arc<Mutex<Platform>>,
        msi: Arc<dyn MsiSink>,
        events: EventBus,
        boot_errors: Arc<BootErrors>,
    ) -> Self {
        Self { sources, platform, msi, events, boot_errors }
    }

    /// Takes a record, and puts it before the guest if no other one is. A fatal one is kept for the next boot first.
    ///
    /// # Errors
    /// [`ErrorCode::BadParameter`] for a value without a place, [`ErrorCode::QueueFull`] for a guest that takes
    /// nothing.
    pub fn submit(&self, request: &CperRequest) -> Result<CperAccepted, Error> {
        let block = request.status_block(SystemTime::now())?;
        let source = request.source();
        let fatal = (request.common.severity == CperSeverity::Fatal).then(|| block.clone());
        let accepted = {
            let mut sources = lock(&self.sources);
            let ahead = sources.waiting(source) + usize::from(sources.outstanding(source).is_some());
            let record = sources.submit(source, block).map_err(|error| refused(&error))?;
            CperAccepted { record, source: source.name().to_owned(), ahead }
        };
        if let Some(block) = fatal {
            self.boot_errors.keep(&block);
        }
        self.events.publish(Event::CperQueued {
            record: accepted.record,
            source: accepted.source.clone(),
            severity: request.common.severity,
            section: request.section.name().to_owned(),
        });
        self.proceed();
        Ok(accepted)
    }

    /// Tells guest and reader of what has happened at the sources.
    pub fn proceed(&self) {
        let happened = lock(&self.sources).take_happened();
        for one in happened {
            self.events.publish(match one {
                Happened::Delivered { record, source } => {
                    self.notify(source);
                    Event::CperDelivered { record, source: source.name().to_owned() }
                }
                Happened::Acknowledged { record, source } => {
                    Event::CperAcknowledged { record, source: source.name().to_owned() }
                }
                Happened::Lost { record, source, error } => {
                    Event::CperLost { record, source: source.name().to_owned(), reason: super::chain(&error) }
                }
            });
        }
    }

    fn notify(&self, source: Source) {
        match source {
            Source::Corrected | Source::Uncorrected => {
                let event = FirmwareEvent { target: EventTarget::ErrorDevice, code: notify::HARDWARE_ERROR };
                lock(&self.platform).push(event);
            }
            Source::Nmi => self.msi.signal(NMI.0, NMI.1),
            Source::Polled => {}
        }
    }
}

fn refused(error: &SubmitError) -> Error {
    match error {
        SubmitError::Full { .. } => Error::new(ErrorCode::QueueFull, error.to_string(), ""),
        SubmitError::TooLong { .. } | SubmitError::TooShort { .. } => {
            Error::new(ErrorCode::BadParameter, error.to_string(), "")
        }
    }
}
