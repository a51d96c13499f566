//! An address space of devices: which device answers at which address, and what a write leaves to be done.
//!
//! The trait is small on purpose. What a device cannot do by itself (power the machine off, run a queue, eject a
//! memory device) it returns as an [`Effect`]; the caller applies effects after the device's lock is released, so
//! a device can never deadlock with the machine that owns it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use aconite_acpi::platform::hotplug::OsStatus;
use aconite_acpi::platform::{EventTarget, FirmwareEvent};
use thiserror::Error;

use crate::einj::Injection;
use crate::pci::SlotChange;

/// Names one device of a machine for as long as the machine lives. Handed out by the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceId(pub u32);

/// Something a device access leaves for the caller to do, with no device lock held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// The guest asked to be powered off (ACPI sleep state S5).
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// The guest kernel reported a panic (pvpanic).
    Panicked,
    /// The guest kernel is about to run its crash kernel (pvpanic).
    CrashLoaded,
    /// The guest has made buffers available in a virtqueue.
    QueueNotify {
        /// The device the queue belongs to.
        device: DeviceId,
        /// Index of the queue within the device.
        queue: u16,
    },
    /// The guest has changed something of a hot-plug slot.
    Slot {
        /// The port.
        port: DeviceId,
        /// What.
        change: SlotChange,
    },
    /// Firmware has something to tell the guest.
    Notify(FirmwareEvent),
    /// The guest has ejected a unit's container or a host bridge, whose `_STA` is 0 by now.
    Ejected(EventTarget),
    /// The guest said what it has come to with a notification of a unit's container or of a host bridge.
    OsStatus {
        /// What was notified.
        target: EventTarget,
        /// What it said.
        status: OsStatus,
    },
    /// A scrub of a memory unit is under way ([`crate::nvdimm::Unit::scrub_left`]).
    ScrubStarted {
        /// Index of the unit.
        unit: u32,
    },
    /// The answer to a firmware call met a planned fault ([`crate::nvdimm::CallFault`]).
    FirmwareFault {
        /// Index of the unit.
        unit: u32,
        /// What was called.
        callee: crate::nvdimm::Callee,
        /// The function of a `_DSM`.
        function: u32,
        /// The first word of the answer, if it is that long.
        status: Option<u32>,
    },
    /// The processor that made this access stands still for a time.
    Stall {
        /// How long.
        time: std::time::Duration,
    },
    /// Error sources have gone on ([`crate::ghes::ErrorSources::take_happened`]).
    ErrorSources,
    /// The guest wants an error injected; [`crate::einj::Einj::finish`] is told how that went.
    InjectError(Injection),
    /// The guest wants an injected error to happen now.
    TriggerError(Injection),
}

/// What one device access leaves to be done. Empty nearly always, and then it has allocated nothing.
#[derive(Debug, Default)]
pub struct Effects(Vec<Effect>);

impl Effects {
    /// Nothing to do yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds `effect`, unless the same one is already there.
    pub fn push(&mut self, effect: Effect) {
        if !self.0.contains(&effect) {
            self.0.push(effect);
        }
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Takes the effects out, oldest first, and leaves this empty for reuse.
    pub fn drain(&mut self) -> impl Iterator<Item = Effect> + '_ {
        self.0.drain(..)
    }

    /// The effects, oldest first.
    pub fn as_slice(&self) -> &[Effect] {
        &self.0
    }
}

impl IntoIterator for Effects {
    type Item = Effect;
    type IntoIter = std::vec::IntoIter<Effect>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

/// A device that answers in a range of addresses.
///
/// Offsets are relative to the start of the range. An access has 1 to 8 bytes, little-endian, at any alignment;
/// it lies wholly inside the range. A device must accept every such access without panicking.
pub trait BusDevice: Send {
    /// Reads into the whole of `data`. A register that pops on reading may do so.
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// Writes `data`; what is left for the caller to do goes to `effects`.
    fn write(&mut self, offset: u64, data: &[u8], effects: &mut Effects);
}

/// Why a device could not be put on a [`Bus`].
#[derive(Debug, Error, PartialEq, Eq)]
pub enum BusError {
    /// Another device answers in part of the range.
    #[error(
        "Range {base:#x}+{size:#x} of `{name}` overlaps {other_base:#x}+{other_size:#x} of `{other}`: move one of them"
    )]
    Overlap {
        /// The device that was refused.
        name: String,
        /// Its first address.
        base: u64,
        /// Its length in bytes.
        size: u64,
        /// The device that is already there.
        other: String,
        /// First address of the device that is already there.
        other_base: u64,
        /// Length in bytes of the device that is already there.
        other_size: u64,
    },
    /// The range is empty or reaches past the end of the address space.
    #[error("Range {base:#x}+{size:#x} of `{name}` is empty or wraps: give it a size that fits")]
    Shape {
        /// The device that was refused.
        name: String,
        /// Its first address.
        base: u64,
        /// Its length in bytes.
        size: u64,
    },
}

/// A device that several holders share: the bus, and whoever moves its data.
pub type SharedDevice = Arc<Mutex<dyn BusDevice>>;

/// Locks a device. A panic elsewhere under the same lock does not spread: the state is a register file, and any
/// value of it is a valid one.
pub fn lock<T: ?Sized>(device: &Mutex<T>) -> MutexGuard<'_, T> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The first four bytes of a write as a number, zeroes where it ends before.
pub(crate) fn first_word(data: &[u8]) -> u32 {
    let mut value = [0; 4];
    for (byte, &written) in value.iter_mut().zip(data) {
        *byte = written;
    }
    u32::from_le_bytes(value)
}

#[derive(Clone)]
struct Entry {
    base: u64,
    size: u64,
    name: String,
    device: SharedDevice,
}

/// One address space (memory-mapped or port) of devices.
///
/// Cloning is cheap next to a change of the machine and shares the devices, so an owner that changes the bus at
/// run time can publish a new one.
#[derive(Clone, Default)]
pub struct Bus {
    entries: Vec<Entry>,
}

impl Bus {
    /// A bus without devices.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts `device` at `[base, base + size)` under `name`, which appears in errors.
    ///
    /// # Errors
    /// [`BusError::Overlap`] names both ranges; [`BusError::Shape`] if the range is empty or wraps.
    pub fn insert(&mut self, name: &str, base: u64, size: u64, device: SharedDevice) -> Result<(), BusError> {
        let Some(last) = size.checked_sub(1).and_then(|length| base.checked_add(length)) else {
            return Err(BusError::Shape { name: name.to_owned(), base, size });
        };
        let at = self.entries.partition_point(|entry| entry.base < base);
        let neighbours = [at.checked_sub(1), Some(at)].into_iter().flatten();
        for other in neighbours.filter_map(|index| self.entries.get(index)) {
            if other.base <= last && base <= other.base + (other.size - 1) {
                return Err(BusError::Overlap {
                    name: name.to_owned(),
                    base,
                    size,
                    other: other.name.clone(),
                    other_base: other.base,
                    other_size: other.size,
                });
            }
        }
        self.entries.insert(at, Entry { base, size, name: name.to_owned(), device });
        Ok(())
    }

    /// Takes the device that starts at `base` off the bus; `None` if no device starts there.
    pub fn remove(&mut self, base: u64) -> Option<SharedDevice> {
        let at = self.entries.binary_search_by_key(&base, |entry| entry.base).ok()?;
        Some(self.entries.remove(at).device)
    }

    /// Reads `data.len()` bytes at `address`. All ones, and `false`, if no device answers there.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        match self.find(address, data.len()) {
            Some((device, offset)) => {
                lock(device).read(offset, data);
                true
            }
            None => {
                data.fill(0xff);
                false
            }
        }
    }

    /// Writes `data` at `address`. Dropped, and `false`, if no device answers there.
    pub fn write(&self, address: u64, data: &[u8], effects: &mut Effects) -> bool {
        match self.find(address, data.len()) {
            Some((device, offset)) => {
                lock(device).write(offset, data, effects);
                true
            }
            None => false,
        }
    }

    /// The ranges in ascending order: name, first address, length in bytes.
    pub fn ranges(&self) -> impl Iterator<Item = (&str, u64, u64)> {
        self.entries.iter().map(|entry| (entry.name.as_str(), entry.base, entry.size))
    }

    fn find(&self, address: u64, length: usize) -> Option<(&SharedDevice, u64)> {
        let index = self.entries.partition_point(|entry| entry.base <= address).checked_sub(1)?;
        let entry = self.entries.get(index)?;
        let offset = address - entry.base;
        let room = entry.size.checked_sub(offset)?;
        (length > 0 && length as u64 <= room).then_some((&entry.device, offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads as its offset; records writes; asks for a reset at offset 0.
    #[derive(Default)]
    struct Probe(Vec<(u64, Vec<u8>)>);

    impl BusDevice for Probe {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }

        fn write(&mut self, offset: u64, data: &[u8], effects: &mut Effects) {
            self.0.push((offset, data.to_vec()));
            if offset == 0 {
                effects.push(Effect::Reset);
            }
        }
    }

    fn probe() -> SharedDevice {
        Arc::new(Mutex::new(Probe::default()))
    }

    #[test]
    fn an_access_reaches_the_device_at_its_offset() {
        let mut bus = Bus::new();
        let device = Arc::new(Mutex::new(Probe::default()));
        bus.insert("probe", 0x1000, 0x10, device.clone()).unwrap();
        let mut data = [0; 2];
        assert!(bus.read(0x1004, &mut data));
        assert_eq!(data, [4, 4]);
        let mut effects = Effects::new();
        assert!(bus.write(0x1000, &[7], &mut effects));
        assert_eq!(effects.as_slice(), [Effect::Reset]);
        assert_eq!(lock(&device).0, [(0, vec![7])]);
    }

    #[test]
    fn nothing_answers_with_ones() {
        let mut bus = Bus::new();
        bus.insert("probe", 0x1000, 0x10, probe()).unwrap();
        let mut effects = Effects::new();
        for (address, length) in [(0xfff, 1), (0xfff, 2), (0x100f, 2), (0x1010, 4), (0, 8), (u64::MAX, 1)] {
            let mut data = vec![0; length];
            assert!(!bus.read(address, &mut data), "{address:#x}");
            assert_eq!(data, vec![0xff; length]);
            assert!(!bus.write(address, &data, &mut effects));
        }
        assert!(effects.is_empty());
    }

    #[test]
    fn overlaps_are_refused_with_both_ranges() {
        let mut bus = Bus::new();
        bus.insert("a", 0x1000, 0x1000, probe()).unwrap();
        bus.insert("b", 0x3000, 0x1000, probe()).unwrap();
        for (base, size) in
            [(0x1000, 1), (0x1fff, 1), (0x0, 0x1001), (0x2fff, 2), (0x2000, 0x1001), (0, 0x8000)]
        {
            let error = bus.insert("c", base, size, probe()).unwrap_err();
            assert!(matches!(error, BusError::Overlap { .. }), "{base:#x}+{size:#x}: {error}");
        }
        assert_eq!(
            bus.insert("c", 0x1800, 8, probe()).unwrap_err().to_string(),
            "Range 0x1800+0x8 of `c` overlaps 0x1000+0x1000 of `a`: move one of them"
        );
        bus.insert("c", 0x2000, 0x1000, probe()).unwrap();
        assert_eq!(bus.ranges().map(|range| range.1).collect::<Vec<_>>(), [0x1000, 0x2000, 0x3000]);
    }

    #[test]
    fn empty_and_wrapping_ranges_are_refused() {
        let mut bus = Bus::new();
        assert!(matches!(bus.insert("a", 5, 0, probe()), Err(BusError::Shape { .. })));
        assert!(matches!(bus.insert("a", u64::MAX, 2, probe()), Err(BusError::Shape { .. })));
        bus.insert("a", u64::MAX, 1, probe()).unwrap();
        let mut data = [0];
        assert!(bus.read(u64::MAX, &mut data));
    }

    #[test]
    fn a_removed_device_is_gone() {
        let mut bus = Bus::new();
        bus.insert("a", 0, 8, probe()).unwrap();
        assert!(bus.remove(4).is_none());
        assert!(bus.remove(0).is_some());
        assert!(!bus.read(0, &mut [0]));
    }

    #[test]
    fn a_panic_under_the_lock_does_not_spread() {
        let device = Arc::new(Mutex::new(Probe::default()));
        let other = device.clone();
        let _ = std::thread::spawn(move || {
            let _guard = other.lock().unwrap();
            panic!("under the lock");
        })
        .join();
        let mut bus = Bus::new();
        bus.insert("a", 0, 8, device).unwrap();
        assert!(bus.read(0, &mut [0]));
    }

    #[test]
    fn equal_effects_are_kept_once() {
        let mut effects = Effects::new();
        effects.push(Effect::Reset);
        effects.push(Effect::PowerOff);
        effects.push(Effect::Reset);
        assert_eq!(effects.drain().collect::<Vec<_>>(), [Effect::Reset, Effect::PowerOff]);
        assert!(effects.is_empty());
    }
}
