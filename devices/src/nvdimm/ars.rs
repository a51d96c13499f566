//! Address range scrub of the NVDIMM root device (ACPI 6.5, 9.20.7.2 and 9.20.7.4 to 9.20.7.6).
//!
//! The monitor knows its poison, so a scrub finds nothing out: starting one fixes which range is reported, and when
//! it is over. Until then the status is "in progress" without records, and another start is refused with
//! "busy". Afterwards the records are the poison of the range when the status is read: an error that was cleared
//! after the start is not reported any more, and no list of records is kept. A start that asks for what is known from
//! before, which Linux calls a short scrub, is over at once.
//!
//! When a scrub ends that took time, the OS gets "ARS stopped" (Notify 0x82; ACPI 6.5, 5.6.6). Linux ignores it and
//! asks for the status after 1, 2, 4, … seconds (`acpi_nfit_scrub` in drivers/acpi/nfit/core.c).
//!
//! An error is one record however many DIMMs of an interleave set it is on, with the handle of the first: Linux
//! does not look at handles, and a record for each line would soon be more than fit. Function 5 tells of each line.
//!
//! A status buffer holds [`Unit::ars_records`] records. If there are more, the scrub "stopped early" with the
//! overflow flag: the answer covers the range up to the last record, and the rest is named for a restart.
//!
//! # Where Linux and the specification differ
//! - `out_length` counts from itself to the end, without the status before it: 44 + 24 for each record. Linux takes
//!   both readings for the transfer, but counts whole records by this one (`ars_status_process_records` in
//!   drivers/acpi/nfit/core.c).
//! - Linux restarts after an overflow (`ars_continue`), yet throws the records of every restarted scrub away as
//!   stale: only `ars_start` sets ARS_VALID. In a guest, errors beyond the first buffer therefore show up only
//!   once earlier ones are cleared and the range is scrubbed again. The buffer is as large as the mailbox allows.
//! - A restart carries the type of the last status, which is therefore the type of the start.

use std::ops::Range;
use std::time::Duration;

use aconite_acpi::platform::mailbox::OUTPUT_MAX;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::dsm::status;
use super::unit::Unit;
use crate::bus::{Effect, Effects, lock};

/// Position in [`CapabilitiesOutput::status`] of the types of memory that can be scrubbed.
const CAN_SCRUB_SHIFT: u32 = 16;
/// Type of a scrub: volatile memory.
const TYPE_VOLATILE: u16 = 1 << 0;
/// Type of a scrub: persistent memory.
const TYPE_PERSISTENT: u16 = 1 << 1;
/// Flag of [`StartInput`]: return what is known instead of scrubbing anew.
const FLAG_PREVIOUS_DATA: u8 = 1 << 1;
/// Flag of [`CapabilitiesOutput`]: the OS is notified of errors that nobody has consumed.
const NOTIFIES_ERRORS: u16 = 1 << 0;
/// Flag of [`CapabilitiesOutput`]: the OS is notified when a scrub has stopped.
const NOTIFIES_STOP: u16 = 1 << 1;
/// Status of [`StartOutput`]: a scrub is in progress (`NFIT_ARS_START_BUSY` in drivers/acpi/nfit/nfit.h).
const BUSY: u32 = 6;
/// Extended status of [`StatusHeader`]: the scrub is in progress.
const IN_PROGRESS: u32 = 1 << 16;
/// Extended status of [`StatusHeader`]: no scrub in this boot.
const NO_SCRUB: u32 = 2 << 16;
/// Extended status of [`StatusHeader`]: the scrub stopped before the end of its range.
const STOPPED_EARLY: u32 = 3 << 16;
/// Flag of [`StatusHeader`]: there are more records than fit.
const FLAG_OVERFLOW: u16 = 1 << 0;

/// Input of function 1 (ACPI 6.5, 9.20.7.4).
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct CapabilitiesInput {
    pub(super) address: U64,
    pub(super) length: U64,
}
const _: () = assert!(size_of::<CapabilitiesInput>() == 16);

/// Output of function 1 (ACPI 6.5, 9.20.7.4).
#[derive(Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct CapabilitiesOutput {
    pub(super) status: U32,
    /// Most bytes that function 3 returns, status included.
    pub(super) max_status_output: U32,
    /// Alignment and smallest length of function 4, in bytes.
    pub(super) clear_unit: U32,
    /// Which notifications there are.
    pub(super) flags: U16,
    pub(super) reserved: U16,
}
const _: () = assert!(size_of::<CapabilitiesOutput>() == 16);

/// Input of function 2 (ACPI 6.5, 9.20.7.5).
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct StartInput {
    pub(super) address: U64,
    pub(super) length: U64,
    pub(super) kind: U16,
    pub(super) flags: u8,
    pub(super) reserved: [u8; 5],
}
const _: () = assert!(size_of::<StartInput>() == 24);

/// Output of function 2 (ACPI 6.5, 9.20.7.5).
#[derive(Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct StartOutput {
    pub(super) status: U32,
    /// Estimated time in seconds. Linux ignores it.
    pub(super) seconds: U32,
}
const _: () = assert!(size_of::<StartOutput>() == 8);

/// Head of the output of function 3 (ACPI 6.5, 9.20.7.6).
#[derive(Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct StatusHeader {
    pub(super) status: U32,
    /// Bytes from this field to the end.
    pub(super) out_length: U32,
    /// Start of the range that the records cover.
    pub(super) address: U64,
    /// Length of the range that the records cover.
    pub(super) length: U64,
    /// Where to start again after an overflow.
    pub(super) restart_address: U64,
    /// Length of what is left after an overflow.
    pub(super) restart_length: U64,
    pub(super) kind: U16,
    pub(super) flags: U16,
    pub(super) records: U32,
}
const _: () = assert!(size_of::<StatusHeader>() == 48);

/// One record of the output of function 3 (ACPI 6.5, 9.20.7.6).
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct StatusRecord {
    pub(super) handle: U32,
    pub(super) reserved: U32,
    pub(super) address: U64,
    pub(super) length: U64,
}
const _: () = assert!(size_of::<StatusRecord>() == 24);

/// Records that fit into a mailbox behind the header.
pub const MAX_RECORDS: usize = (OUTPUT_MAX as usize - size_of::<StatusHeader>()) / size_of::<StatusRecord>();

/// The scrub whose results function 3 reports.
#[derive(Clone, Debug)]
pub(super) struct Scrub {
    range: Range<u64>,
    kind: u16,
    /// When it is over, by its unit's clock; `None` once the OS has been told.
    ends: Option<Duration>,
}

impl Scrub {
    /// How long it goes on.
    pub(super) fn left(&self, now: Duration) -> Option<Duration> {
        self.ends.map(|ends| ends.saturating_sub(now))
    }

    /// Whether it is over and the OS is still to be told; never again afterwards.
    pub(super) fn take_end(&mut self, now: Duration) -> bool {
        self.ends.take_if(|ends| *ends <= now).is_some()
    }

    fn in_progress(&self, now: Duration) -> bool {
        self.ends.is_some_and(|ends| now < ends)
    }
}

/// Function 1: what can be scrubbed in a range.
pub(super) fn capabilities(unit: Option<&Unit>, input: &[u8]) -> Vec<u8> {
    let range = CapabilitiesInput::read_from_bytes(input)
        .ok()
        .zip(unit)
        .and_then(|(input, unit)| Some((unit, unit.range(input.address.get(), input.length.get())?)));
    let output = match range {
        Some((unit, range)) => CapabilitiesOutput {
            status: (status::SUCCESS | u32::from(type_of(unit, &range)) << CAN_SCRUB_SHIFT).into(),
            max_status_output: (unit.ars_output_size() as u32).into(),
            clear_unit: unit.clear_unit().into(),
            flags: notifications(unit).into(),
            ..Default::default()
        },
        None => CapabilitiesOutput { status: status::INVALID_INPUT.into(), ..Default::default() },
    };
    output.as_bytes().to_vec()
}

/// The type of memory in a range.
fn type_of(unit: &Unit, range: &Range<u64>) -> u16 {
    if unit.volatile(range.start) { TYPE_VOLATILE } else { TYPE_PERSISTENT }
}

/// A scrub that takes no time ends before anyone could be told.
fn notifications(unit: &Unit) -> u16 {
    if unit.scrubs_take_time() { NOTIFIES_ERRORS | NOTIFIES_STOP } else { NOTIFIES_ERRORS }
}

/// Function 2: scrub a range, or have what is known about it returned.
pub(super) fn start(unit: Option<&Unit>, input: &[u8], effects: &mut Effects) -> Vec<u8> {
    let output = match begin(unit, input, effects) {
        Ok(time) => StartOutput {
            status: status::SUCCESS.into(),
            seconds: u32::try_from(time.as_secs_f64().ceil() as u64).unwrap_or(u32::MAX).into(),
        },
        Err(status) => StartOutput { status: status.into(), ..Default::default() },
    };
    output.as_bytes().to_vec()
}

/// Begins a scrub, and says how long it will take; a status if it cannot begin.
fn begin(unit: Option<&Unit>, input: &[u8], effects: &mut Effects) -> Result<Duration, u32> {
    let input = StartInput::read_from_bytes(input).map_err(|_| status::INVALID_INPUT)?;
    let unit = unit.ok_or(status::INVALID_INPUT)?;
    let range = unit.range(input.address.get(), input.length.get()).ok_or(status::INVALID_INPUT)?;
    let kind = input.kind.get();
    if kind & !(TYPE_VOLATILE | TYPE_PERSISTENT) != 0 || kind & type_of(unit, &range) == 0 {
        return Err(status::INVALID_INPUT);
    }
    let now = unit.now();
    let mut scrub = lock(unit.scrub());
    if scrub.as_ref().is_some_and(|scrub| scrub.in_progress(now)) {
        return Err(BUSY);
    }
    let time = match input.flags & FLAG_PREVIOUS_DATA {
        0 => unit.scrub_time(&range),
        _ => Duration::ZERO,
    };
    tracing::debug!(slot = unit.slot(), ?range, ?time, flags = input.flags, "ARS start");
    let ends = (!time.is_zero()).then(|| now.saturating_add(time));
    if ends.is_some() {
        effects.push(Effect::ScrubStarted { unit: unit.slot() });
    }
    *scrub = Some(Scrub { range, kind, ends });
    Ok(time)
}

/// Function 3: the results of the last scrub.
pub(super) fn status(unit: Option<&Unit>, input: &[u8]) -> Vec<u8> {
    if !input.is_empty() {
        return report(StatusHeader { status: status::INVALID_INPUT.into(), ..Default::default() }, &[]);
    }
    let scrub = unit.and_then(|unit| Some((unit, lock(unit.scrub()).clone()?)));
    let Some((unit, scrub)) = scrub else {
        return report(StatusHeader { status: NO_SCRUB.into(), ..Default::default() }, &[]);
    };
    let in_progress = scrub.in_progress(unit.now());
    let Scrub { range, kind, .. } = scrub;
    if in_progress {
        let (address, length) = (range.start.into(), (range.end - range.start).into());
        let header = StatusHeader {
            status: IN_PROGRESS.into(),
            address,
            length,
            kind: kind.into(),
            ..Default::default()
        };
        return report(header, &[]);
    }
    let most = unit.ars_records();
    // One more than fits tells whether there are more.
    let mut found = unit.poisoned(range.clone(), most + 1);
    let overflow = found.len() > most;
    found.truncate(most);
    let mut header = StatusHeader { address: range.start.into(), kind: kind.into(), ..Default::default() };
    let covered = match found.last() {
        Some(last) if overflow => {
            header.status = STOPPED_EARLY.into();
            header.flags = FLAG_OVERFLOW.into();
            header.restart_address = last.end.into();
            header.restart_length = range.end.saturating_sub(last.end).into();
            last.end
        }
        _ => range.end,
    };
    header.length = covered.saturating_sub(range.start).into();
    let records: Vec<_> = found
        .iter()
        .map(|bad| StatusRecord {
            handle: unit.handle_at(bad.start).into(),
            reserved: 0.into(),
            address: bad.start.into(),
            length: bad.end.saturating_sub(bad.start).into(),
        })
        .collect();
    report(header, &records)
}

/// Bytes of a status output with this many records.
pub(super) fn output_size(records: usize) -> usize {
    size_of::<StatusHeader>() + records * size_of::<StatusRecord>()
}

/// A status output: fills in the lengths.
fn report(mut header: StatusHeader, records: &[StatusRecord]) -> Vec<u8> {
    let size = output_size(records.len());
    header.out_length = ((size - size_of::<U32>()) as u32).into();
    header.records = (records.len() as u32).into();
    let mut output = Vec::with_capacity(size);
    output.extend_from_slice(header.as_bytes());
    output.extend_from_slice(records.as_bytes());
    output
}

#[cfg(test)]
#[path = "ars_test.rs"]
mod tests;
