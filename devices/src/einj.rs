//! Error injection as the OS sees it: the registers behind EINJ ([`aconite_acpi::einj`]).
//!
//! The device only holds the conversation. That an error is to be injected, and that it is to happen, are effects;
//! the machine carries them out and reports with [`Einj::finish`]. Until then the OS sees the interface busy.

use aconite_acpi::einj::{
    AVAILABLE, BEGIN, BUSY, BUSY_NOW, END, ERROR_TYPE, EXECUTE, OPERATION, PARAMETERS, Parameters, STATUS,
    TIMINGS, TRIGGER, TRIGGER_TABLE, TRIGGER_TABLE_BASE, flags, status, trigger_table, types,
};
use aconite_acpi::layout::APEI_REGISTERS_SIZE;
use zerocopy::IntoBytes;

use crate::bus::{BusDevice, Effect, Effects};
use crate::dma::Dma;

/// Times that an operation takes: 1 ms, and 1 s at most, which is what Linux waits for.
const OPERATION_TIMES: u64 = (1_000_000 << 32) | 1000;

/// How bad an injected error is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Severity {
    /// It is corrected, and only reported.
    Corrected,
    /// Data is lost, and the system can go on.
    NonFatal,
    /// The system cannot go on.
    Fatal,
}

/// An error in memory that the OS wants injected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Injection {
    /// Number of the injection, from 1; it comes round after 2^32.
    pub number: u32,
    /// How bad it is.
    pub severity: Severity,
    /// Guest-physical address.
    pub address: u64,
    /// Local APIC ID of the processor that is to report it, if one was named.
    pub apic_id: Option<u32>,
}

/// Why an error is not injected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// There is nothing at the address, or no such processor.
    InvalidAccess,
    /// It did not work.
    Failure,
}

impl Refusal {
    const fn status(self) -> u32 {
        match self {
            Self::InvalidAccess => status::INVALID_ACCESS,
            Self::Failure => status::FAILURE,
        }
    }
}

/// All error types that this platform injects.
const ALL: [(u32, Severity); 3] = [
    (types::MEMORY_CORRECTABLE, Severity::Corrected),
    (types::MEMORY_UNCORRECTABLE, Severity::NonFatal),
    (types::MEMORY_FATAL, Severity::Fatal),
];

/// The registers.
///
/// A write acts on each register whose first byte it covers, with the bytes that it has; the others are zero. Bytes
/// that belong to no register read as zero.
pub struct Einj {
    dma: Dma,
    /// SET_ERROR_TYPE since the operation began.
    error_type: Option<u32>,
    /// The injection that the machine is carrying out.
    running: Option<Injection>,
    /// The injection that a trigger makes happen.
    armed: Option<Injection>,
    status: u32,
    last: u32,
}

impl Einj {
    /// Length of the registers in bytes.
    pub const SIZE: u64 = APEI_REGISTERS_SIZE;

    /// The interface, with its parameters and its trigger table in the memory behind `dma`.
    pub fn new(dma: Dma) -> Self {
        Self { dma, error_type: None, running: None, armed: None, status: status::SUCCESS, last: 0 }
    }

    /// The machine has carried out injection `number`, or has refused it.
    pub fn finish(&mut self, number: u32, result: Result<(), Refusal>) {
        let Some(injection) = self.running.take_if(|running| running.number == number) else { return };
        self.status = result.err().map_or(status::SUCCESS, Refusal::status);
        self.armed = result.ok().map(|()| injection);
    }

    fn operate(&mut self, operation: u32, effects: &mut Effects) {
        match operation {
            // An operation at a time: until it is done nothing begins or ends.
            _ if self.running.is_some() => {}
            BEGIN | END => {
                self.error_type = None;
                self.armed = None;
            }
            EXECUTE => {
                self.armed = None;
                match self.prepare() {
                    Ok(injection) => {
                        self.last = injection.number;
                        self.running = Some(injection);
                        effects.push(Effect::InjectError(injection));
                    }
                    Err(refusal) => self.status = refusal.status(),
                }
            }
            _ => {}
        }
    }

    /// What the OS has asked for. The trigger table is in memory when this returns.
    fn prepare(&mut self) -> Result<Injection, Refusal> {
        let memory_fails = |error| {
            tracing::debug!(%error, "Error injection cannot reach its memory");
            Refusal::Failure
        };
        let mut parameters = Parameters::default();
        match self.error_type {
            // Without parameters the platform would choose a place, which this one does not.
            Some(error_type) => parameters.error_type = error_type.into(),
            None => self.dma.read(PARAMETERS, parameters.as_mut_bytes()).map_err(memory_fails)?,
        }
        let error_type = parameters.error_type.get();
        let (_, severity) =
            ALL.into_iter().find(|entry| entry.0 == error_type).ok_or(Refusal::InvalidAccess)?;
        let valid = |flag| parameters.flags.get() & flag != 0;
        if !valid(flags::ADDRESS) {
            return Err(Refusal::InvalidAccess);
        }
        // Of the addresses that the mask leaves, the one that was named is taken: its line is the one meant.
        let address = parameters.address.get();
        let apic_id = valid(flags::APIC_ID).then_some(parameters.apic_id.get());
        let number = self.last.checked_add(1).unwrap_or(1);
        self.dma.write(TRIGGER_TABLE_BASE, &trigger_table(number)).map_err(memory_fails)?;
        Ok(Injection { number, severity, address, apic_id })
    }

    fn trigger(&mut self, number: u32, effects: &mut Effects) {
        if let Some(injection) = self.armed.take_if(|armed| armed.number == number) {
            effects.push(Effect::TriggerError(injection));
        }
    }

    fn register(&self, register: u64) -> u64 {
        match register {
            ERROR_TYPE => self.error_type.unwrap_or(0).into(),
            AVAILABLE => ALL.iter().fold(0, |bits, entry| bits | u64::from(entry.0)),
            BUSY => self.running.map_or(0, |_| BUSY_NOW.into()),
            STATUS => self.status.into(),
            TRIGGER_TABLE => TRIGGER_TABLE_BASE,
            TIMINGS => OPERATION_TIMES,
            _ => 0,
        }
    }
}

impl BusDevice for Einj {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = self.register(at & !7).to_le_bytes()[(at & 7) as usize];
        }
    }

    fn write(&mut self, offset: u64, data: &[u8], effects: &mut Effects) {
        for (index, at) in (offset..).take(data.len()).enumerate() {
            let mut value = [0; 4];
            for (byte, &written) in value.iter_mut().zip(&data[index..]) {
                *byte = written;
            }
            let value = u32::from_le_bytes(value);
            match at {
                OPERATION => self.operate(value, effects),
                ERROR_TYPE if self.running.is_none() => self.error_type = Some(value),
                TRIGGER => self.trigger(value, effects),
                _ => {}
            }
        }
    }
}

#[cfg(test)]
#[path = "einj_test.rs"]
mod tests;
