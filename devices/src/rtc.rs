//! The battery-backed clock of a PC: an MC146818 behind ports 0x70 (index) and 0x71 (data).
//!
//! Linux takes its wall time from here at boot (`arch/x86/kernel/rtc.c` `mach_get_cmos_time`) and drives it through
//! `drivers/rtc/rtc-cmos.c`. A machine without one costs a second of boot: ports that read 0xFF look like a clock
//! that is updating for ever.
//!
//! The time is a clock given by the caller plus what the guest has set, so guest time can stand still. There are
//! no interrupts: alarm and interrupt-enable registers keep what is written, the update-ended flag can be polled.
//! The ACPI description should therefore give the device no interrupt; rtc-cmos then offers no alarms instead of
//! alarms that never ring.

use std::time::Duration;

use crate::bus::{BusDevice, Effects};
use crate::calendar::Calendar;
use crate::clock::Clock;

/// Register of the century in BCD, also named in the FADT (ACPI 6.5, table 5.9, CENTURY).
pub const CENTURY: u8 = 0x32;

const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
const DAY_OF_WEEK: u8 = 0x06;
const DAY_OF_MONTH: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const REGISTER_A: u8 = 0x0A;
const REGISTER_B: u8 = 0x0B;
const REGISTER_C: u8 = 0x0C;
const REGISTER_D: u8 = 0x0D;

/// Register A: an update is in progress. Never seen here: an update takes no time.
const A_UPDATE_IN_PROGRESS: u8 = 1 << 7;
/// Register A, divider bits: 11x holds the divider in reset.
const A_DIVIDER_RESET: u8 = 0b110 << 4;
/// Register A after power-on: 32.768 kHz time base, 1024 Hz periodic rate.
const A_DEFAULT: u8 = 0x26;
/// Register B: the time stands still while it is being set.
const B_SET: u8 = 1 << 7;
/// Register B: update-ended interrupt enable.
const B_UPDATE_INTERRUPT: u8 = 1 << 4;
/// Register B: binary instead of BCD.
const B_BINARY: u8 = 1 << 2;
/// Register B: 24-hour instead of 12-hour.
const B_24_HOURS: u8 = 1 << 1;
/// Register C: an enabled interrupt's flag is set.
const C_INTERRUPT: u8 = 1 << 7;
/// Register C: an update has ended since the register was read.
const C_UPDATE_ENDED: u8 = 1 << 4;
/// Register D: RAM and time are valid.
const D_VALID: u8 = 1 << 7;
/// In 12-hour mode: afternoon.
const HOURS_PM: u8 = 1 << 7;
/// Bytes of registers and NVRAM.
const RAM_SIZE: usize = 128;

/// The clock starts its first second half a second after the divider is released (MC146818A data sheet, divider
/// control), which is why Linux sets the time half a second late (`arch/x86/kernel/rtc.c`).
const AFTER_RELEASE: Duration = Duration::from_millis(500);

/// The real-time clock and its 114 bytes of NVRAM.
pub struct Rtc {
    clock: Clock,
    index: u8,
    ram: [u8; RAM_SIZE],
    time: Time,
    /// Second in which register C was last read.
    seen: i64,
}

/// Where the time comes from.
enum Time {
    /// The caller's clock plus this many nanoseconds.
    Running(i128),
    /// It stands at this second since the epoch, while SET or the divider's reset holds it.
    Held(i64),
}

impl Rtc {
    /// Number of ports.
    pub const SIZE: u64 = 2;

    /// A clock that shows the time of `clock` (since 1970-01-01 00:00:00 UTC) until the guest sets another.
    pub fn new(clock: Clock) -> Self {
        let mut ram = [0; RAM_SIZE];
        ram[usize::from(REGISTER_A)] = A_DEFAULT;
        ram[usize::from(REGISTER_B)] = B_24_HOURS;
        let mut rtc = Self { clock, index: 0, ram, time: Time::Running(0), seen: 0 };
        rtc.seen = rtc.seconds();
        rtc
    }

    fn register(&self, index: u8) -> u8 {
        self.ram[usize::from(index) % RAM_SIZE]
    }

    fn now(&self) -> i128 {
        i128::try_from((self.clock)().as_nanos()).unwrap_or(i128::MAX / 2)
    }

    /// The time shown, in seconds since the epoch.
    fn seconds(&self) -> i64 {
        match self.time {
            Time::Held(second) => second,
            Time::Running(offset) => {
                i64::try_from((self.now() + offset).div_euclid(1_000_000_000)).unwrap_or(i64::MAX / 2)
            }
        }
    }

    fn encode(&self, value: i64) -> u8 {
        let value = value.rem_euclid(100) as u8;
        if self.register(REGISTER_B) & B_BINARY != 0 { value } else { ((value / 10) << 4) | (value % 10) }
    }

    fn decode(&self, value: u8) -> i64 {
        if self.register(REGISTER_B) & B_BINARY != 0 {
            i64::from(value)
        } else {
            i64::from(value >> 4) * 10 + i64::from(value & 0xF)
        }
    }

    fn encode_hour(&self, hour: i64) -> u8 {
        if self.register(REGISTER_B) & B_24_HOURS != 0 {
            return self.encode(hour);
        }
        let twelve = if hour % 12 == 0 { 12 } else { hour % 12 };
        self.encode(twelve) | if hour >= 12 { HOURS_PM } else { 0 }
    }

    fn decode_hour(&self, value: u8) -> i64 {
        if self.register(REGISTER_B) & B_24_HOURS != 0 {
            return self.decode(value);
        }
        self.decode(value & !HOURS_PM) % 12 + if value & HOURS_PM != 0 { 12 } else { 0 }
    }

    fn read_data(&mut self) -> u8 {
        let seconds = self.seconds();
        let calendar = Calendar::from_epoch(seconds);
        match self.index {
            SECONDS => self.encode(calendar.second),
            MINUTES => self.encode(calendar.minute),
            HOURS => self.encode_hour(calendar.hour),
            // 1 is Sunday; 1970-01-01 was a Thursday.
            DAY_OF_WEEK => self.encode((seconds.div_euclid(86_400) + 4).rem_euclid(7) + 1),
            DAY_OF_MONTH => self.encode(calendar.day),
            MONTH => self.encode(calendar.month),
            YEAR => self.encode(calendar.year),
            // BCD in every mode: Linux converts it with the others, firmware only knows BCD.
            CENTURY => self.encode(calendar.year.div_euclid(100)),
            REGISTER_C => {
                let ended = seconds != self.seen;
                self.seen = seconds;
                match (ended, self.register(REGISTER_B) & B_UPDATE_INTERRUPT != 0) {
                    (true, true) => C_UPDATE_ENDED | C_INTERRUPT,
                    (true, false) => C_UPDATE_ENDED,
                    (false, _) => 0,
                }
            }
            REGISTER_D => D_VALID,
            index => self.register(index),
        }
    }

    fn write_data(&mut self, value: u8) {
        let mut calendar = Calendar::from_epoch(self.seconds());
        match self.index {
            SECONDS => calendar.second = self.decode(value),
            MINUTES => calendar.minute = self.decode(value),
            HOURS => calendar.hour = self.decode_hour(value),
            DAY_OF_MONTH => calendar.day = self.decode(value),
            MONTH => calendar.month = self.decode(value),
            YEAR => calendar.year = calendar.year.div_euclid(100) * 100 + self.decode(value),
            CENTURY => calendar.year = self.decode(value) * 100 + calendar.year.rem_euclid(100),
            // The day of the week follows from the date.
            DAY_OF_WEEK | REGISTER_C | REGISTER_D => return,
            REGISTER_A => return self.write_control(REGISTER_A, value & !A_UPDATE_IN_PROGRESS),
            REGISTER_B => return self.write_control(REGISTER_B, value),
            index => {
                self.ram[usize::from(index) % RAM_SIZE] = value;
                return;
            }
        }
        self.set(calendar.to_epoch());
    }

    /// Makes `second` the time shown.
    fn set(&mut self, second: i64) {
        self.time = match self.time {
            Time::Held(_) => Time::Held(second),
            Time::Running(offset) => {
                let fraction = (self.now() + offset).rem_euclid(1_000_000_000);
                Time::Running(i128::from(second) * 1_000_000_000 + fraction - self.now())
            }
        };
    }

    /// Writes register A or B, which hold the time or let it go.
    fn write_control(&mut self, index: u8, value: u8) {
        let second = self.seconds();
        self.ram[usize::from(index)] = value;
        let in_reset = self.register(REGISTER_A) & A_DIVIDER_RESET == A_DIVIDER_RESET;
        let held = in_reset || self.register(REGISTER_B) & B_SET != 0;
        self.time = match (&self.time, held) {
            (Time::Running(offset), false) => Time::Running(*offset),
            (_, true) => Time::Held(second),
            (Time::Held(second), false) => Time::Running(
                i128::from(*second) * 1_000_000_000 + AFTER_RELEASE.as_nanos() as i128 - self.now(),
            ),
        };
    }
}

impl BusDevice for Rtc {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = match at {
                1 => self.read_data(),
                // The index register is write-only on a PC.
                _ => 0xFF,
            };
        }
    }

    fn write(&mut self, offset: u64, data: &[u8], _effects: &mut Effects) {
        for (at, &value) in (offset..).zip(data) {
            match at {
                // Bit 7 masks the NMI on a PC and is not part of the index.
                0 => self.index = value & 0x7F,
                1 => self.write_data(value),
                _ => {}
            }
        }
    }
}

#[cfg(test)]
#[path = "rtc_test.rs"]
mod tests;
