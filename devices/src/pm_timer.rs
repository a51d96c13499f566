//! The ACPI power management timer (ACPI 6.5, 4.8.2.1 and 4.8.3.3): a counter of 3.579545 MHz behind an I/O port.
//!
//! It is the one reference that Linux can calibrate its TSC against when there is neither PIT, HPET nor kvmclock
//! (`arch/x86/kernel/tsc.c` `pit_hpet_ptimer_calibrate_cpu`, `drivers/clocksource/acpi_pm.c`).

use crate::bus::{BusDevice, Effects};
use crate::clock::Clock;

/// Ticks of the timer in a second (ACPI 6.5, 4.8.2.1).
pub const FREQUENCY: u64 = 3_579_545;

/// How many bits the counter has before it wraps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    /// 24 bits; wraps after 4.69 s. FADT flag TMR_VAL_EXT is clear.
    Bits24,
    /// 32 bits; wraps after 20 minutes. FADT flag TMR_VAL_EXT is set.
    Bits32,
}

impl Width {
    fn mask(self) -> u32 {
        match self {
            Self::Bits24 => 0x00FF_FFFF,
            Self::Bits32 => u32::MAX,
        }
    }
}

/// The timer's register block: one 32-bit read-only counter at offset 0.
///
/// A read at any offset and of any width takes the bytes of the counter that it covers, and zeros behind it.
/// Writes are dropped.
pub struct PmTimer {
    clock: Clock,
    width: Width,
}

impl PmTimer {
    /// Size of the register block in ports.
    pub const SIZE: u64 = 4;

    /// A timer that counts the ticks of `clock`, which must be monotonic.
    pub fn new(clock: Clock, width: Width) -> Self {
        Self { clock, width }
    }

    /// The counter now.
    pub fn value(&self) -> u32 {
        let ticks = (self.clock)().as_nanos() * u128::from(FREQUENCY) / 1_000_000_000;
        ticks as u32 & self.width.mask()
    }
}

impl BusDevice for PmTimer {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let bytes = self.value().to_le_bytes();
        for (at, byte) in (offset..).zip(data) {
            *byte = usize::try_from(at).ok().and_then(|at| bytes.get(at)).copied().unwrap_or(0);
        }
    }

    fn write(&mut self, _offset: u64, _data: &[u8], _effects: &mut Effects) {}
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::clock::testing::Hand;

    fn read(timer: &mut PmTimer, offset: u64, length: usize) -> Vec<u8> {
        let mut data = vec![0xEE; length];
        timer.read(offset, &mut data);
        data
    }

    #[test]
    fn a_second_has_its_ticks() {
        let hand = Hand::default();
        let mut timer = PmTimer::new(hand.clock(), Width::Bits32);
        assert_eq!(read(&mut timer, 0, 4), [0; 4]);
        hand.set(Duration::from_secs(1));
        assert_eq!(read(&mut timer, 0, 4), 3_579_545u32.to_le_bytes());
        hand.set(Duration::from_nanos(280));
        assert_eq!(timer.value(), 1);
        hand.set(Duration::from_nanos(279));
        assert_eq!(timer.value(), 0);
    }

    #[test]
    fn the_counter_wraps_at_its_width() {
        let hand = Hand::default();
        let wide = PmTimer::new(hand.clock(), Width::Bits32);
        let narrow = PmTimer::new(hand.clock(), Width::Bits24);
        hand.set(Duration::from_secs(5));
        assert_eq!(wide.value(), 17_897_725);
        assert_eq!(narrow.value(), 17_897_725 - (1 << 24));
        hand.set(Duration::from_secs(1200));
        assert_eq!(u64::from(wide.value()), FREQUENCY * 1200 - (1 << 32));
        hand.set(Duration::MAX);
        let _ = (wide.value(), narrow.value());
    }

    #[test]
    fn every_access_is_defined_and_writes_change_nothing() {
        let hand = Hand::at(1);
        let mut timer = PmTimer::new(hand.clock(), Width::Bits32);
        let bytes = 3_579_545u32.to_le_bytes();
        assert_eq!(read(&mut timer, 1, 2), bytes[1..3]);
        assert_eq!(read(&mut timer, 2, 4), [bytes[2], bytes[3], 0, 0]);
        assert_eq!(read(&mut timer, 0, 8)[4..], [0; 4]);
        assert_eq!(read(&mut timer, 4, 1), [0]);
        let mut effects = Effects::new();
        timer.write(0, &[0; 4], &mut effects);
        assert!(effects.is_empty());
        assert_eq!(read(&mut timer, 0, 4), bytes);
    }
}
