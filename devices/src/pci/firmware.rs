//! Gives BARs their first addresses, as firmware does before it starts a kernel.
//!
//! It works through configuration cycles only, so it needs nothing from a function but the sizing protocol. A
//! kernel keeps addresses that lie in a window of the host bridge, and spends no exits on giving them. Memory
//! decoding stays off: Linux switches it on when a driver takes the function, and off and on again for sizing if it
//! finds it on.

use std::ops::Range;

use super::{DevFn, PciBus, PciError, PciRoot};
use crate::bus::{DeviceId, Effects, lock};

const HEADER_TYPE: u16 = 0x0e;
const BAR0: u16 = 0x10;
const TYPE0_BARS: u8 = 6;

/// Where BARs may be put: the host bridge's memory windows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BarWindows {
    /// Below 4 GiB, for 32-bit BARs.
    pub low: Range<u64>,
    /// For 64-bit BARs.
    pub high: Range<u64>,
}

/// Gives every unassigned memory BAR on root bus 0 of `root` an aligned address, in the order of the slots.
///
/// # Errors
/// [`PciError::WindowFull`] names the slot, the BAR and what it needs.
pub fn assign_bars(root: &PciRoot, windows: BarWindows) -> Result<(), PciError> {
    let mut slots: Vec<(DevFn, DeviceId)> = root
        .functions()
        .into_iter()
        .filter(|(_, bus, _)| *bus == PciBus::Root(0))
        .map(|(id, _, devfn)| (devfn, id))
        .collect();
    slots.sort();
    let mut low = Cursor::new(windows.low);
    let mut high = Cursor::new(windows.high);
    for (devfn, id) in slots {
        let Some(mut probe) = Probe::new(root, id) else { continue };
        if probe.byte(HEADER_TYPE) & 0x7f != 0 {
            continue;
        }
        let mut bar = 0;
        while bar < TYPE0_BARS {
            let Some(found) = probe.size(bar) else {
                bar += 1;
                continue;
            };
            if found.address == 0 {
                let cursor = if found.wide { &mut high } else { &mut low };
                let base =
                    cursor.take(found.size).ok_or(PciError::WindowFull { devfn, bar, size: found.size })?;
                probe.place(bar, base, found.wide);
            }
            bar += if found.wide { 2 } else { 1 };
        }
        root.refresh(id);
    }
    Ok(())
}

struct Cursor {
    next: u64,
    end: u64,
}

impl Cursor {
    fn new(window: Range<u64>) -> Self {
        Self { next: window.start, end: window.end }
    }

    fn take(&mut self, size: u64) -> Option<u64> {
        let base = self.next.checked_next_multiple_of(size)?;
        let end = base.checked_add(size)?;
        if end > self.end {
            return None;
        }
        self.next = end;
        Some(base)
    }
}

struct Sized {
    address: u64,
    size: u64,
    wide: bool,
}

/// Configuration cycles to one function.
struct Probe {
    function: super::SharedFunction,
}

impl Probe {
    fn new(root: &PciRoot, id: DeviceId) -> Option<Self> {
        root.function(id).map(|function| Self { function })
    }

    fn byte(&mut self, offset: u16) -> u8 {
        let mut data = [0];
        lock(&*self.function).config_read(offset, &mut data);
        data[0]
    }

    fn read(&mut self, offset: u16) -> u32 {
        let mut data = [0; 4];
        lock(&*self.function).config_read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&mut self, offset: u16, value: u32) {
        // No guest runs yet, and a BAR write has no effect beyond the function.
        lock(&*self.function).config_write(offset, &value.to_le_bytes(), &mut Effects::new());
    }

    /// Size and present address of memory BAR `bar`; none if it is not implemented or is I/O space.
    fn size(&mut self, bar: u8) -> Option<Sized> {
        let at = BAR0 + 4 * u16::from(bar);
        let low = self.read(at);
        let wide = low & 0b110 == 0b100;
        let high = if wide { self.read(at + 4) } else { 0 };
        self.write(at, u32::MAX);
        let mut mask = u64::from(self.read(at) & !0xf) | 0xffff_ffff_0000_0000;
        self.write(at, low);
        if wide {
            self.write(at + 4, u32::MAX);
            mask = mask & 0xffff_ffff | u64::from(self.read(at + 4)) << 32;
            self.write(at + 4, high);
        }
        let size = (!mask).checked_add(1).filter(|size| size.is_power_of_two())?;
        let memory = low & 1 == 0 && mask as u32 != 0 || wide && mask != 0;
        let address = u64::from(low & !0xf) | u64::from(high) << 32;
        memory.then_some(Sized { address, size, wide })
    }

    fn place(&mut self, bar: u8, base: u64, wide: bool) {
        let at = BAR0 + 4 * u16::from(bar);
        self.write(at, base as u32);
        if wide {
            self.write(at + 4, (base >> 32) as u32);
        }
    }
}
