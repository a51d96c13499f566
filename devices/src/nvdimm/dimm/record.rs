//! What a DIMM remembers without power, beside its labels.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of a passphrase (`ND_INTEL_PASSPHRASE_SIZE`).
pub(super) const PASSPHRASE: usize = 32;
/// A passphrase; the one of a DIMM that has none is zeros.
pub(super) type Passphrase = [u8; PASSPHRASE];

/// Version of the layout of [`Record`].
const VERSION: u8 = 1;

/// Limits at which a DIMM raises an alarm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Thresholds {
    /// Which alarms are on: bit 0 spares, bit 1 media temperature, bit 2 controller temperature.
    pub(super) alarms: U16,
    /// Spare blocks left, in percent: an alarm at and below.
    pub(super) spares: u8,
    /// Sixteenths of a degree Celsius: an alarm at and above.
    pub(super) media_temperature: U16,
    /// Sixteenths of a degree Celsius: an alarm at and above.
    pub(super) controller_temperature: U16,
}

/// The memory of a DIMM, byte by byte as it is kept.
#[derive(Clone, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Record {
    version: u8,
    /// 1 while the next loss of power counts as unsafe ("latch system shutdown status").
    pub(super) latch: u8,
    /// 1 if the last shutdown was unsafe.
    pub(super) unsafe_shutdown: u8,
    /// 1 if the health is fatal.
    pub(super) fatal: u8,
    pub(super) unsafe_shutdowns: U32,
    /// Sixteenths of a degree Celsius.
    pub(super) media_temperature: U16,
    /// Spare blocks left, in percent.
    pub(super) spares: u8,
    pub(super) thresholds: Thresholds,
    /// 1 if there is a passphrase.
    pub(super) secured: u8,
    pub(super) passphrase: Passphrase,
    pub(super) master: Passphrase,
    /// Version of the firmware that runs.
    pub(super) running: U64,
    /// Version of the firmware that will run after the next activation or power cycle, or 0.
    pub(super) staged: U64,
}

/// Media temperature of a healthy DIMM: 23 degrees.
pub(super) const MEDIA_TEMPERATURE: u16 = 23 * 16;
/// Controller temperature: 25 degrees.
pub(super) const CONTROLLER_TEMPERATURE: u16 = 25 * 16;
/// Spare blocks of a healthy DIMM, in percent.
pub(super) const SPARES: u8 = 75;
/// Firmware of a new DIMM.
const FIRST_FIRMWARE: u64 = 0x0001_0000_0000_0001;

impl Default for Record {
    /// A new DIMM: healthy, not secured. Values are those of the kernel's own mock, tools/testing/nvdimm/test/nfit.c.
    fn default() -> Self {
        Self {
            version: VERSION,
            latch: 0,
            unsafe_shutdown: 0,
            fatal: 0,
            unsafe_shutdowns: 0.into(),
            media_temperature: MEDIA_TEMPERATURE.into(),
            spares: SPARES,
            thresholds: Thresholds {
                alarms: 0b11.into(),
                spares: 5,
                media_temperature: (40 * 16).into(),
                controller_temperature: (30 * 16).into(),
            },
            secured: 0,
            passphrase: [0; PASSPHRASE],
            master: [0; PASSPHRASE],
            running: FIRST_FIRMWARE.into(),
            staged: 0.into(),
        }
    }
}

impl Record {
    /// The record with these bytes; `None` if this is no record, or one of another version.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        Self::read_from_bytes(bytes).ok().filter(|record| record.version == VERSION)
    }

    /// The bytes to keep.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.as_bytes().to_vec()
    }

    /// The record after power has come back: a shutdown that was not announced while it was latched was unsafe, and
    /// staged firmware runs.
    pub(super) fn powered_on(mut self) -> Self {
        self.unsafe_shutdown = self.latch;
        if self.latch != 0 {
            self.unsafe_shutdowns = self.unsafe_shutdowns.get().saturating_add(1).into();
            self.latch = 0;
        }
        self.activated()
    }

    /// The record with the staged firmware running.
    pub(super) fn activated(mut self) -> Self {
        if self.staged.get() != 0 {
            self.running = self.staged;
            self.staged = 0.into();
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_read_back_and_others_are_told_apart() {
        let record = Record { spares: 9, master: [7; 32], ..Default::default() };
        let bytes = record.to_bytes();
        assert_eq!(Record::from_bytes(&bytes), Some(record));
        assert_eq!(Record::from_bytes(&bytes[1..]), None);
        let mut newer = bytes;
        newer[0] = 2;
        assert_eq!(Record::from_bytes(&newer), None);
    }

    #[test]
    fn a_loss_of_power_while_latched_was_unsafe() {
        let safe = Record::default().powered_on();
        assert_eq!((safe.unsafe_shutdown, safe.unsafe_shutdowns.get()), (0, 0));
        let latched = Record { latch: 1, ..Default::default() }.powered_on();
        assert_eq!((latched.unsafe_shutdown, latched.unsafe_shutdowns.get(), latched.latch), (1, 1, 0));
        let again = latched.powered_on();
        assert_eq!((again.unsafe_shutdown, again.unsafe_shutdowns.get()), (0, 1), "the count stays");
    }

    #[test]
    fn staged_firmware_runs_after_a_power_cycle() {
        let record = Record { staged: 99.into(), ..Default::default() }.powered_on();
        assert_eq!((record.running.get(), record.staged.get()), (99, 0));
        assert_eq!(Record::default().powered_on().running.get(), FIRST_FIRMWARE);
    }
}
