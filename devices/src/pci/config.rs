//! Configuration space: bytes, and a mask for each byte that says which bits a guest may change.
//!
//! Everything a guest can do to a header follows from the masks. BAR sizing needs no state of its own: the address
//! bits below the size are not writable, so writing ones reads back the size (PCI Local Bus Specification 3.0,
//! section 6.2.5.1).

use thiserror::Error;

use super::{BarRange, BridgeDecode, Decode};

/// Bytes of one function's configuration space.
pub(super) const CONFIG_SIZE: usize = 4096;

const VENDOR: usize = 0x00;
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const CLASS_REVISION: usize = 0x08;
const CACHE_LINE: usize = 0x0c;
const HEADER_TYPE: usize = 0x0e;
const BAR0: usize = 0x10;
const SUBSYSTEM: usize = 0x2c;
const CAPABILITY_POINTER: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const FIRST_CAPABILITY: usize = 0x40;

/// Registers of a type 1 header (PCI-to-PCI Bridge Architecture Specification 1.2, section 3.2).
const SECONDARY_BUS: usize = 0x19;
const SUBORDINATE_BUS: usize = 0x1a;
const SECONDARY_STATUS: usize = 0x1e;
const MEMORY_WINDOW: usize = 0x20;
const PREFETCHABLE_WINDOW: usize = 0x24;
const PREFETCHABLE_BASE_UPPER: usize = 0x28;
const PREFETCHABLE_LIMIT_UPPER: usize = 0x2c;
/// Bridge Control of a type 1 header.
pub(super) const BRIDGE_CONTROL: usize = 0x3e;
/// Bridge Control: the secondary bus is held in reset.
pub(super) const SECONDARY_BUS_RESET: u16 = 1 << 6;
/// What a guest may change of Bridge Control: parity, SERR#, reset of the secondary bus.
const BRIDGE_CONTROL_WRITABLE: u16 = SECONDARY_BUS_RESET | 0b11;
/// Address bits of the base and limit registers of memory windows; windows are multiples of 1 MiB.
const WINDOW_BITS: u16 = 0xfff0;
const WINDOW_GRAIN: u64 = 1 << 20;
const CAPABILITY_END: usize = 0x100;

const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_BUS_MASTER: u16 = 1 << 2;
const COMMAND_PARITY: u16 = 1 << 6;
const COMMAND_SERR: u16 = 1 << 8;
const COMMAND_INTX_DISABLE: u16 = 1 << 10;
const COMMAND_WRITABLE: u16 =
    COMMAND_MEMORY | COMMAND_BUS_MASTER | COMMAND_PARITY | COMMAND_SERR | COMMAND_INTX_DISABLE;
const STATUS_CAPABILITIES: u16 = 1 << 4;
const STATUS_WRITE_ONE_TO_CLEAR: u16 = 0xf900;

/// Smallest memory BAR made here: a page, so that no two functions share one.
const MIN_BAR_SIZE: u64 = 0x1000;

/// The numbers by which drivers find a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Revision id.
    pub revision: u8,
    /// Class code, 24 bits: base class, subclass, programming interface.
    pub class: u32,
    /// Subsystem vendor id.
    pub subsystem_vendor: u16,
    /// Subsystem id.
    pub subsystem: u16,
}

/// What kind of memory a 64-bit BAR decodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    /// 64-bit, reads have side effects.
    Memory64,
    /// 64-bit, prefetchable: may sit behind a bridge above 4 GiB.
    Prefetchable64,
}

/// Why a configuration space cannot be built as asked. Always an error of the device model.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ConfigError {
    /// The BAR does not exist, is taken, or its upper half is.
    #[error("BAR {bar} of a function is not free for a 64-bit BAR: use 0, 2 or 4, each once")]
    BarIndex {
        /// The BAR.
        bar: u8,
    },
    /// The size is not a power of two, or smaller than a page.
    #[error("BAR {bar} of a function cannot have {size:#x} bytes: use a power of two from 0x1000 up")]
    BarSize {
        /// The BAR.
        bar: u8,
        /// The size asked for, in bytes.
        size: u64,
    },
    /// There is no room in the first 256 bytes for one more capability.
    #[error("Capability {id:#x} with {length} bytes does not fit into configuration space: drop another")]
    CapabilitySpace {
        /// Capability id.
        id: u8,
        /// Length in bytes.
        length: usize,
    },
}

#[derive(Clone, Copy, Debug)]
struct Bar {
    size: u64,
}

/// Configuration space of one function, type 0 or 1.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    bytes: Vec<u8>,
    writable: Vec<u8>,
    write_one_to_clear: Vec<u8>,
    bars: [Option<Bar>; 6],
    capability_end: usize,
    last_capability_link: usize,
}

impl ConfigSpace {
    /// A function without BARs and capabilities, decoding nothing.
    pub fn new(identity: Identity) -> Self {
        let mut space = Self::common(identity);
        space.set(SUBSYSTEM, &identity.subsystem_vendor.to_le_bytes());
        space.set(SUBSYSTEM + 2, &identity.subsystem.to_le_bytes());
        space
    }

    /// A bridge with its windows shut, as firmware leaves one behind which there is nothing. It has no I/O window, and
    /// no subsystem, which a type 1 header has no place for.
    pub fn bridge(identity: Identity) -> Self {
        let mut space = Self::common(identity);
        space.set(HEADER_TYPE, &[1]);
        space.allow(SECONDARY_BUS - 1, &[0xff; 3]);
        space.write_one_to_clear[SECONDARY_STATUS..SECONDARY_STATUS + 2]
            .copy_from_slice(&STATUS_WRITE_ONE_TO_CLEAR.to_le_bytes());
        for (window, kind) in [(MEMORY_WINDOW, 0), (PREFETCHABLE_WINDOW, 1)] {
            space.set(window, &(WINDOW_BITS | kind).to_le_bytes());
            space.set(window + 2, &u16::to_le_bytes(kind));
            space.allow(window, &WINDOW_BITS.to_le_bytes());
            space.allow(window + 2, &WINDOW_BITS.to_le_bytes());
        }
        space.allow(PREFETCHABLE_BASE_UPPER, &[0xff; 8]);
        space.allow(BRIDGE_CONTROL, &BRIDGE_CONTROL_WRITABLE.to_le_bytes());
        space
    }

    fn common(identity: Identity) -> Self {
        let mut space = Self {
            bytes: vec![0; CONFIG_SIZE],
            writable: vec![0; CONFIG_SIZE],
            write_one_to_clear: vec![0; CONFIG_SIZE],
            bars: [None; 6],
            capability_end: FIRST_CAPABILITY,
            last_capability_link: CAPABILITY_POINTER,
        };
        space.set(VENDOR, &identity.vendor.to_le_bytes());
        space.set(VENDOR + 2, &identity.device.to_le_bytes());
        space.set(CLASS_REVISION, &(identity.class << 8 | u32::from(identity.revision)).to_le_bytes());
        space.allow(COMMAND, &COMMAND_WRITABLE.to_le_bytes());
        space.allow(CACHE_LINE, &[0xff]);
        space.allow(INTERRUPT_LINE, &[0xff]);
        space.write_one_to_clear[STATUS..STATUS + 2]
            .copy_from_slice(&STATUS_WRITE_ONE_TO_CLEAR.to_le_bytes());
        space
    }

    /// Adds a 64-bit memory BAR of `size` bytes at registers `bar` and `bar + 1`.
    ///
    /// # Errors
    /// [`ConfigError::BarIndex`] and [`ConfigError::BarSize`].
    pub fn add_bar(&mut self, bar: u8, size: u64, kind: BarKind) -> Result<(), ConfigError> {
        let index = usize::from(bar);
        if !bar.is_multiple_of(2) || index >= self.bars.len() || self.bars[index].is_some() {
            return Err(ConfigError::BarIndex { bar });
        }
        if !size.is_power_of_two() || size < MIN_BAR_SIZE {
            return Err(ConfigError::BarSize { bar, size });
        }
        self.bars[index] = Some(Bar { size });
        let at = BAR0 + 4 * index;
        self.set(at, &[if kind == BarKind::Prefetchable64 { 0b1100 } else { 0b0100 }]);
        self.allow(at, &(!(size - 1)).to_le_bytes());
        Ok(())
    }

    /// Appends a capability: its id, and the bytes after the link with the bits of each that a guest may write.
    /// `body` and `writable` go together byte by byte; a shorter `writable` means the rest is read-only.
    /// Returns the offset of the capability's id.
    ///
    /// # Errors
    /// [`ConfigError::CapabilitySpace`].
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Result<u16, ConfigError> {
        let at = self.capability_end;
        let end = (at + 2 + body.len()).next_multiple_of(4);
        if end > CAPABILITY_END || writable.len() > body.len() {
            return Err(ConfigError::CapabilitySpace { id, length: body.len() + 2 });
        }
        self.set(self.last_capability_link, &[at as u8]);
        self.set(at, &[id, 0]);
        self.set(at + 2, body);
        self.allow(at + 2, writable);
        let status = self.u16(STATUS) | STATUS_CAPABILITIES;
        self.set(STATUS, &status.to_le_bytes());
        self.last_capability_link = at + 1;
        self.capability_end = end;
        Ok(at as u16)
    }

    /// Reads `data.len()` bytes; bytes past the end of the space read as ones.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = self.bytes.get(usize::from(offset) + index).copied().unwrap_or(0xff);
        }
    }

    /// A guest's write: only writable bits change, bits that clear by writing one clear.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        for (index, value) in data.iter().enumerate() {
            let at = usize::from(offset) + index;
            let Some(byte) = self.bytes.get_mut(at) else { return };
            *byte = *byte & !self.writable[at] | value & self.writable[at];
            *byte &= !(value & self.write_one_to_clear[at]);
        }
    }

    /// The device's own write: sets read-only bits too. Bytes past the end of the space are dropped.
    pub fn set(&mut self, offset: usize, data: &[u8]) {
        for (byte, value) in self.bytes.iter_mut().skip(offset).zip(data) {
            *byte = *value;
        }
    }

    /// The 16-bit register at `offset`; all ones past the end of the space.
    pub fn u16(&self, offset: usize) -> u16 {
        let mut data = [0; 2];
        self.read(offset as u16, &mut data);
        u16::from_le_bytes(data)
    }

    /// The 32-bit register at `offset`; all ones past the end of the space.
    pub fn u32(&self, offset: usize) -> u32 {
        let mut data = [0; 4];
        self.read(offset as u16, &mut data);
        u32::from_le_bytes(data)
    }

    /// Whether the function may read and write memory, and send messages (COMMAND bit 2).
    pub fn bus_master(&self) -> bool {
        self.u16(COMMAND) & COMMAND_BUS_MASTER != 0
    }

    /// The ranges that the BARs claim: none while memory decoding is off.
    pub fn decode(&self) -> Decode {
        let mut decode = Decode::default();
        if self.u16(COMMAND) & COMMAND_MEMORY != 0 {
            for (index, bar) in self.bars.iter().enumerate() {
                if let Some(Bar { size }) = bar {
                    let at = BAR0 + 4 * index;
                    let base = u64::from(self.u32(at) & !0xf) | u64::from(self.u32(at + 4)) << 32;
                    decode.bars.push(BarRange { bar: index as u8, base, size: *size });
                }
            }
        }
        decode
    }

    /// What a bridge forwards: its buses always, memory only while memory decoding is on.
    pub fn forwarded(&self) -> BridgeDecode {
        let mut bridge = BridgeDecode {
            secondary: self.bytes[SECONDARY_BUS],
            subordinate: self.bytes[SUBORDINATE_BUS],
            windows: Vec::new(),
        };
        if self.u16(COMMAND) & COMMAND_MEMORY != 0 {
            let low = |at: usize| u64::from(self.u16(at) & WINDOW_BITS) << 16;
            let high = |at: usize| u64::from(self.u32(at)) << 32;
            let base = PREFETCHABLE_WINDOW;
            let windows = [
                (low(MEMORY_WINDOW), low(MEMORY_WINDOW + 2)),
                (low(base) | high(PREFETCHABLE_BASE_UPPER), low(base + 2) | high(PREFETCHABLE_LIMIT_UPPER)),
            ];
            let open = windows.into_iter().filter(|(first, last)| first <= last);
            bridge.windows.extend(open.map(|(first, last)| (first, last | (WINDOW_GRAIN - 1))));
        }
        bridge
    }

    /// Makes bits that a guest clears by writing ones to them.
    pub(super) fn clears(&mut self, offset: usize, mask: &[u8]) {
        for (byte, value) in self.write_one_to_clear.iter_mut().skip(offset).zip(mask) {
            *byte = *value;
        }
    }

    fn allow(&mut self, offset: usize, mask: &[u8]) {
        for (byte, value) in self.writable.iter_mut().skip(offset).zip(mask) {
            *byte = *value;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn space() -> ConfigSpace {
        let mut space = ConfigSpace::new(Identity {
            vendor: 0x1af4,
            device: 0x1043,
            revision: 1,
            class: 0x078000,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        });
        space.add_bar(0, 0x8000, BarKind::Prefetchable64).unwrap();
        space.add_capability(0x09, &[16, 1, 0], &[]).unwrap();
        space.add_capability(0x11, &[0; 10], &[0, 0xc0]).unwrap();
        space
    }

    #[test]
    fn identity_is_where_drivers_look() {
        let space = space();
        assert_eq!(space.u32(0), 0x1043_1af4);
        assert_eq!(space.u32(8), 0x0780_0001);
        assert_eq!(space.u32(0x2c), 0x1100_1af4);
        assert_eq!(space.u16(STATUS), STATUS_CAPABILITIES);
    }

    #[test]
    fn sizing_reads_back_the_size() {
        let mut space = space();
        space.write(0x10, &[0xff; 4]);
        space.write(0x14, &[0xff; 4]);
        assert_eq!(space.u32(0x10), 0xffff_800c);
        assert_eq!(space.u32(0x14), 0xffff_ffff);
        space.write(0x18, &[0xff; 4]);
        assert_eq!(space.u32(0x18), 0);
    }

    #[test]
    fn a_bar_decodes_only_when_told() {
        let mut space = space();
        space.write(0x10, &0x1234_8000u32.to_le_bytes());
        space.write(0x14, &0x40u32.to_le_bytes());
        assert_eq!(space.decode(), Decode::default());
        space.write(4, &[2]);
        assert_eq!(space.decode().bars, [BarRange { bar: 0, base: 0x40_1234_8000, size: 0x8000 }]);
    }

    #[test]
    fn capabilities_form_a_chain() {
        let space = space();
        let first = usize::from(space.u16(CAPABILITY_POINTER) as u8);
        assert_eq!(first, 0x40);
        assert_eq!(space.u32(first), 0x0110_4809);
        assert_eq!(space.u16(0x48), 0x0011);
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() {
        let mut space = space();
        assert_eq!(space.add_bar(0, 0x1000, BarKind::Memory64), Err(ConfigError::BarIndex { bar: 0 }));
        assert_eq!(space.add_bar(1, 0x1000, BarKind::Memory64), Err(ConfigError::BarIndex { bar: 1 }));
        assert_eq!(space.add_bar(6, 0x1000, BarKind::Memory64), Err(ConfigError::BarIndex { bar: 6 }));
        for size in [0, 0x800, 0x1800] {
            assert_eq!(space.add_bar(2, size, BarKind::Memory64), Err(ConfigError::BarSize { bar: 2, size }));
        }
        let mut added = 0;
        while space.add_capability(9, &[0; 14], &[]).is_ok() {
            added += 1;
        }
        assert_eq!(added, (0x100 - 0x54) / 16);
    }

    #[test]
    fn status_errors_clear_by_writing_one() {
        let mut space = space();
        space.set(STATUS, &0xf910u16.to_le_bytes());
        space.write(6, &0x8000u16.to_le_bytes());
        assert_eq!(space.u16(STATUS), 0x7910);
    }

    proptest! {
        #[test]
        fn guests_change_nothing_but_what_they_may(
            writes in prop::collection::vec((0u16..4096, prop::collection::vec(any::<u8>(), 1..=8)), 0..200),
        ) {
            let fresh = space();
            let mut space = space();
            for (offset, data) in writes {
                space.write(offset, &data);
                let mut back = [0; 8];
                space.read(offset, &mut back);
            }
            for at in 0..CONFIG_SIZE {
                let fixed = !(space.writable[at] | space.write_one_to_clear[at]);
                prop_assert_eq!(space.bytes[at] & fixed, fresh.bytes[at] & fixed);
            }
            space.decode();
        }
    }
}
