//! Functions 1, 2, 10, 17 and 18: health, its thresholds, its injection, and the latch of the shutdown status.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::super::super::dsm::only_status;
use super::super::record::{CONTROLLER_TEMPERATURE, MEDIA_TEMPERATURE, Record, SPARES, Thresholds};
use super::super::{Dimm, Failure};
use super::status;

/// Fields of [`Smart`] that hold something: health, spares, life used, both temperatures, unsafe shutdowns, status of
/// the address indirection table, alarms, and the last shutdown.
const VALID: u32 = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 9 | 1 << 10;
/// Health in [`Smart`]: fatal. Zero is good.
const FATAL: u8 = 1 << 2;
/// The address indirection table is good.
const TABLE_GOOD: u8 = 1;
/// Life used, in percent.
const LIFE_USED: u8 = 5;

/// Output of function 1 (`struct nd_intel_smart`).
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Smart {
    status: U32,
    valid: U32,
    reserved0: [u8; 4],
    health: u8,
    spares: u8,
    life_used: u8,
    alarms: u8,
    media_temperature: U16,
    controller_temperature: U16,
    unsafe_shutdowns: U32,
    table_status: u8,
    power_temperature: U16,
    reserved1: [u8; 8],
    last_shutdown: u8,
    vendor_size: U32,
    vendor: [u8; 92],
}
const _: () = assert!(size_of::<Smart>() == 132);

/// Output of function 2 (`struct nd_intel_smart_threshold`).
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct ThresholdsOutput {
    status: U32,
    thresholds: Thresholds,
    reserved: u8,
}
const _: () = assert!(size_of::<ThresholdsOutput>() == 12);

/// Input of function 18 (`struct nd_intel_smart_inject`).
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Injection {
    /// What is injected, or taken back: bit 0 media temperature, bit 1 spares, bit 2 fatal health, bit 3 an unsafe
    /// shutdown.
    flags: U64,
    media_enable: u8,
    media_temperature: U16,
    spares_enable: u8,
    spares: u8,
    fatal_enable: u8,
    unsafe_enable: u8,
}
const _: () = assert!(size_of::<Injection>() == 15);

/// Alarms that the record's values raise, as bits of [`Thresholds::alarms`].
fn alarms(record: &Record) -> u16 {
    let limits = &record.thresholds;
    let raised = [
        record.spares <= limits.spares,
        record.media_temperature.get() >= limits.media_temperature.get(),
        CONTROLLER_TEMPERATURE >= limits.controller_temperature.get(),
    ];
    let raised = raised.into_iter().enumerate().fold(0, |bits, (bit, on)| bits | u16::from(on) << bit);
    raised & limits.alarms.get()
}

/// Whether there is something that the OS wants to know (`smart_notify` in tools/testing/nvdimm/test/nfit.c).
fn alarming(record: &Record) -> bool {
    alarms(record) != 0 || record.fatal != 0 || record.unsafe_shutdown != 0
}

/// Function 1: health.
pub(super) fn health(dimm: &Dimm) -> Vec<u8> {
    let record = dimm.record();
    let smart = Smart {
        status: status::SUCCESS.into(),
        valid: VALID.into(),
        reserved0: [0; 4],
        health: if record.fatal != 0 { FATAL } else { 0 },
        spares: record.spares,
        life_used: LIFE_USED,
        alarms: alarms(&record) as u8,
        media_temperature: record.media_temperature,
        controller_temperature: CONTROLLER_TEMPERATURE.into(),
        unsafe_shutdowns: record.unsafe_shutdowns,
        table_status: TABLE_GOOD,
        power_temperature: 0.into(),
        reserved1: [0; 8],
        last_shutdown: record.unsafe_shutdown,
        vendor_size: 0.into(),
        vendor: [0; 92],
    };
    smart.as_bytes().to_vec()
}

/// Function 2: thresholds.
pub(super) fn thresholds(dimm: &Dimm) -> Vec<u8> {
    let thresholds = dimm.record().thresholds;
    let output = ThresholdsOutput { status: status::SUCCESS.into(), thresholds, reserved: 0 };
    output.as_bytes().to_vec()
}

/// Function 17: other thresholds. Whether the OS is to be told comes with the answer, as for [`inject`].
pub(super) fn set_thresholds(dimm: &Dimm, input: &[u8]) -> (Vec<u8>, bool) {
    let wanted = Thresholds::read_from_prefix(input).map(|(wanted, _)| wanted);
    change(dimm, |record| {
        record.thresholds = wanted.map_err(|_| status::INVALID_PARAMETER)?;
        Ok(())
    })
}

/// Function 18: another state of health, or back to the real one.
pub(super) fn inject(dimm: &Dimm, input: &[u8]) -> (Vec<u8>, bool) {
    let wanted = Injection::read_from_prefix(input).map(|(wanted, _)| wanted);
    change(dimm, |record| {
        let wanted = wanted.map_err(|_| status::INVALID_PARAMETER)?;
        let flags = wanted.flags.get();
        if flags & !0b1111 != 0 {
            return Err(status::INVALID_PARAMETER.into());
        }
        if flags & 1 << 0 != 0 {
            record.media_temperature =
                if wanted.media_enable != 0 { wanted.media_temperature } else { MEDIA_TEMPERATURE.into() };
        }
        if flags & 1 << 1 != 0 {
            record.spares = if wanted.spares_enable != 0 { wanted.spares } else { SPARES };
        }
        if flags & 1 << 2 != 0 {
            record.fatal = u8::from(wanted.fatal_enable != 0);
        }
        if flags & 1 << 3 != 0 {
            record.unsafe_shutdown = u8::from(wanted.unsafe_enable != 0);
            if wanted.unsafe_enable != 0 {
                record.unsafe_shutdowns = record.unsafe_shutdowns.get().saturating_add(1).into();
            }
        }
        Ok(())
    })
}

/// Function 10: whether the next loss of power is unsafe unless it is announced.
pub(super) fn latch(dimm: &Dimm, input: &[u8]) -> Vec<u8> {
    let enable = input.first().copied();
    change(dimm, |record| {
        record.latch = enable.filter(|enable| *enable <= 1).ok_or(status::INVALID_PARAMETER)?;
        Ok(())
    })
    .0
}

fn change(dimm: &Dimm, change: impl FnOnce(&mut Record) -> Result<(), Failure>) -> (Vec<u8>, bool) {
    match dimm.change(|record, _| change(record)) {
        Ok(()) => (only_status(status::SUCCESS), alarming(&dimm.record())),
        Err(Failure(status)) => (only_status(status), false),
    }
}
