//! The register block of all units: `_STA`, `_EJ0`, `_OST` and the doorbell of the mailbox.

use std::sync::Arc;

use aconite_acpi::layout::{MAX_UNITS, UNIT_SIZE};
use aconite_acpi::platform::hotplug::{DOORBELL, EJECT, OS_STATUS, OsStatus, STATUS, STATUS_PRESENT};
use aconite_acpi::platform::{self, EventTarget, FirmwareEvent, mailbox as layout, notify};

use super::dimm::{label_information, label_read, label_write};
use super::dsm::Request;
use super::fault::{Callee, distort, failure};
use super::mailbox::{Call, reply};
use super::root;
use super::unit::{Unit, UnitTable};
use crate::bus::{BusDevice, Effect, Effects, first_word};
use crate::dma::Dma;

/// The registers of all slots, [`UNIT_SIZE`] bytes each ([`aconite_acpi::platform::hotplug`]).
///
/// A write acts on each register whose first byte it covers; bytes that belong to no register read as zero. An empty
/// slot reads as zero and still answers its doorbell: a guest whose unit has just been pulled gets a status.
pub struct Units {
    units: Arc<UnitTable>,
    dma: Dma,
}

impl Units {
    /// Length of the block in bytes.
    pub const SIZE: u64 = UNIT_SIZE * MAX_UNITS as u64;

    /// The registers of `units`, with mailboxes in the memory behind `dma`.
    pub fn new(units: Arc<UnitTable>, dma: Dma) -> Self {
        Self { units, dma }
    }

    fn eject(&self, slot: u32, effects: &mut Effects) {
        // `_STA` must be 0 when `_EJ0` returns (Linux `acpi_scan_hot_remove`), whoever lets go of the memory when.
        if self.units.remove(slot).is_some() {
            tracing::debug!(slot, "Guest ejected a unit");
            effects.push(Effect::Ejected(EventTarget::Container(slot)));
        }
    }

    fn ring(&self, slot: u32, code: u32, effects: &mut Effects) {
        let output = match Call::read(&self.dma, slot) {
            Ok(Some(call)) if call.code() == code => {
                self.answer(self.units.get(slot).as_deref(), code, &call, effects)
            }
            Ok(_) => None,
            Err(error) => {
                tracing::debug!(slot, %error, "Request cannot be read from the mailbox");
                None
            }
        };
        if let Err(error) = reply(&self.dma, slot, output.as_deref()) {
            tracing::debug!(slot, %error, "Mailbox call stays without a reply");
        }
    }

    /// The output of a call, and what faults make of it; `None` if there is no such call.
    fn answer(&self, unit: Option<&Unit>, code: u32, call: &Call, effects: &mut Effects) -> Option<Vec<u8>> {
        let request = call.request();
        let (call, number) = platform::Call::decode(code)?;
        let callee = Callee::of(call, &request);
        let deeds = unit.map(|unit| unit.meet_faults(callee, request.function)).unwrap_or_default();
        let Some(unit) = unit.filter(|_| !deeds.is_empty()) else {
            return carry_out(unit, call, number, &request, effects);
        };
        let failed = failure(&deeds, callee, &request);
        let mut output = failed.or_else(|| carry_out(Some(unit), call, number, &request, effects))?;
        let time = distort(&deeds, &mut output);
        effects.push(Effect::FirmwareFault {
            unit: unit.slot(),
            callee,
            function: request.function,
            status: output.first_chunk().map(|word| u32::from_le_bytes(*word)),
        });
        if !time.is_zero() {
            effects.push(Effect::Stall { time });
        }
        Some(output)
    }
}

/// The output of a call; `None` if there is no such call.
fn carry_out(
    unit: Option<&Unit>,
    call: platform::Call,
    number: u32,
    request: &Request<'_>,
    effects: &mut Effects,
) -> Option<Vec<u8>> {
    let dimm = unit.and_then(|unit| unit.dimm(number));
    let output = match call {
        platform::Call::RootDsm => root::call(unit, request, effects),
        platform::Call::DimmDsm => {
            let unit = unit?;
            let answer = dimm?.dsm(&|| unit.erase(number), request)?;
            unit.settle_locks();
            if answer.alarm {
                let target = EventTarget::Dimm { unit: unit.slot(), dimm: number };
                effects.push(Effect::Notify(FirmwareEvent { target, code: notify::DIMM_HEALTH }));
            }
            Some(answer.output)
        }
        platform::Call::LabelInformation => Some(label_information(dimm)),
        platform::Call::LabelRead => Some(label_read(dimm, request.input)),
        platform::Call::LabelWrite => Some(label_write(dimm, request.input)),
        // A unit that has gone has no sub-tables.
        platform::Call::Fit => Some(unit.map(|unit| unit.fit().to_vec()).unwrap_or_default()),
    };
    output.filter(|output| output.len() as u64 <= layout::OUTPUT_MAX)
}

impl BusDevice for Units {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            let (slot, register) = ((at / UNIT_SIZE) as u32, at % UNIT_SIZE);
            *byte = match register {
                STATUS..EJECT if self.units.get(slot).is_some() => {
                    STATUS_PRESENT.to_le_bytes()[(register - STATUS) as usize]
                }
                _ => 0,
            };
        }
    }

    fn write(&mut self, offset: u64, data: &[u8], effects: &mut Effects) {
        for (index, at) in (offset..).take(data.len()).enumerate() {
            let (slot, register) = ((at / UNIT_SIZE) as u32, at % UNIT_SIZE);
            if slot >= MAX_UNITS {
                return;
            }
            match register {
                EJECT => self.eject(slot, effects),
                DOORBELL => self.ring(slot, first_word(&data[index..]), effects),
                // An empty slot's too: it is what the OS says after it has let go.
                OS_STATUS => {
                    let status = OsStatus::decode(first_word(&data[index..]));
                    effects.push(Effect::OsStatus { target: EventTarget::Container(slot), status });
                }
                _ => {}
            }
        }
    }
}

#[cfg(test)]
#[path = "registers_test.rs"]
mod tests;
