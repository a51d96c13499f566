//! Where RAM, memory devices and PCI windows lie in the guest-physical address space.
//!
//! What is the same in every machine stands in [`aconite_acpi::layout`]; this places the rest: RAM around
//! the hole below 4 GiB, above it one window for each NFIT unit that is there or may arrive, and the 64-bit
//! PCI window in the top quarter.

use std::ops::Range;

use aconite_acpi::layout::{
    ECAM_BASE, ECAM_SIZE, HIGH_RAM_BASE, IOAPIC_BASE, IOAPIC_SIZE, LAPIC_BASE, LAPIC_SIZE, LOW_RAM_END,
    PCI_MMIO32_BASE, PCI_MMIO32_SIZE, PLATFORM_BASE, PLATFORM_END,
};
use thiserror::Error;

/// Windows start at multiples of the largest x86 page, so that Linux maps devices with it.
const WINDOW_ALIGN: u64 = 1 << 30;
/// More address bits than this are not used: Linux's direct map with 4-level paging ends there.
const MOST_ADDRESS_BITS: u8 = 46;

/// A unit that is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnitRequest {
    /// Bytes of the largest device that it may hold.
    pub size: u64,
    /// Its guest-physical address, if that matters.
    pub at: Option<u64>,
}

/// The ranges of one machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// RAM, the first range from address 0.
    pub ram: Vec<Range<u64>>,
    /// Windows of the NFIT units, in the order of the requests.
    pub units: Vec<Range<u64>>,
    /// The 64-bit PCI window.
    pub pci64: Range<u64>,
}

/// Why a machine has no layout.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum LayoutError {
    /// The address space is too small.
    #[error(
        "RAM and memory devices reach to {end:#x}, and with {bits} address bits they must end below {limit:#x}; ask for less"
    )]
    TooLarge {
        /// End of the last window.
        end: u64,
        /// Where they must end.
        limit: u64,
        /// Guest-physical address bits.
        bits: u8,
    },
    /// A chosen address is not usable.
    #[error("A device at {at:#x} with {size:#x} bytes cannot be there: {reason}")]
    Place {
        /// The address.
        at: u64,
        /// Bytes.
        size: u64,
        /// What is in the way.
        reason: String,
    },
}

impl Layout {
    /// Places `memory` bytes of RAM and the `units`, with `address_bits` guest-physical address bits.
    pub fn plan(memory: u64, units: &[UnitRequest], address_bits: u8) -> Result<Self, LayoutError> {
        let bits = address_bits.min(MOST_ADDRESS_BITS);
        let top = 1u64 << bits;
        let limit = top - top / 4;
        let low = 0..memory.min(LOW_RAM_END);
        let high = HIGH_RAM_BASE..HIGH_RAM_BASE + memory.saturating_sub(LOW_RAM_END);
        let ram: Vec<_> = [low, high].into_iter().filter(|range| !range.is_empty()).collect();
        let ram_end = ram.last().map_or(0, |r| r.end).max(HIGH_RAM_BASE);

        let mut windows: Vec<Option<Range<u64>>> = Vec::with_capacity(units.len());
        for unit in units {
            windows.push(unit.at.map(|at| chosen(at, unit.size, ram_end, limit)).transpose()?);
        }
        let mut taken: Vec<Range<u64>> = windows.iter().flatten().cloned().collect();
        taken.sort_by_key(|r| r.start);
        if let Some(pair) = taken.windows(2).find(|pair| pair[0].end > pair[1].start) {
            return Err(LayoutError::Place {
                at: pair[1].start,
                size: pair[1].end - pair[1].start,
                reason: format!("{:#x} to {:#x} is taken by another device", pair[0].start, pair[0].end),
            });
        }

        for (window, unit) in windows.iter_mut().zip(units) {
            if window.is_some() {
                continue;
            }
            let mut start = ram_end.next_multiple_of(WINDOW_ALIGN);
            for other in &taken {
                if other.start.saturating_sub(start) >= unit.size && other.start >= start {
                    break;
                }
                start = start.max(other.end.next_multiple_of(WINDOW_ALIGN));
            }
            let end = start.saturating_add(unit.size);
            if end > limit {
                return Err(LayoutError::TooLarge { end, limit, bits });
            }
            let at = taken.partition_point(|r| r.start < start);
            taken.insert(at, start..end);
            *window = Some(start..end);
        }
        if ram_end > limit {
            return Err(LayoutError::TooLarge { end: ram_end, limit, bits });
        }
        Ok(Self { ram, units: windows.into_iter().flatten().collect(), pci64: limit..top })
    }
}

/// What of the platform is at guest-physical `address`, in words; `None` where every machine has its own.
pub fn platform_part(address: u64) -> Option<&'static str> {
    let parts = [
        (ECAM_BASE..ECAM_BASE + ECAM_SIZE, "PCI Express configuration space (ECAM)"),
        (PCI_MMIO32_BASE..PCI_MMIO32_BASE + PCI_MMIO32_SIZE, "the 32-bit PCI memory window"),
        (PLATFORM_BASE..PLATFORM_END, "a platform register"),
        (IOAPIC_BASE..IOAPIC_BASE + IOAPIC_SIZE, "the I/O APIC"),
        (LAPIC_BASE..LAPIC_BASE + LAPIC_SIZE, "the local APIC"),
    ];
    parts.into_iter().find(|(range, _)| range.contains(&address)).map(|(_, name)| name)
}

fn chosen(at: u64, size: u64, ram_end: u64, limit: u64) -> Result<Range<u64>, LayoutError> {
    let place = |reason: String| LayoutError::Place { at, size, reason };
    let end = at.checked_add(size).ok_or_else(|| place("it wraps around".to_owned()))?;
    if at < ram_end {
        return Err(place(format!("RAM and platform devices end at {ram_end:#x}; choose a higher address")));
    }
    if end > limit {
        return Err(place(format!("the 64-bit PCI window begins at {limit:#x}; choose a lower address")));
    }
    Ok(at..end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GIB: u64 = 1 << 30;

    fn any_place(size: u64) -> UnitRequest {
        UnitRequest { size, at: None }
    }

    #[test]
    fn ram_surrounds_the_hole_and_units_follow() {
        let layout =
            Layout::plan(5 * GIB, &[any_place(GIB), any_place(GIB / 2), any_place(GIB)], 40).unwrap();
        assert_eq!(layout.ram, vec![0..3 * GIB, 4 * GIB..6 * GIB]);
        assert_eq!(layout.units, vec![6 * GIB..7 * GIB, 7 * GIB..7 * GIB + GIB / 2, 8 * GIB..9 * GIB]);
        assert_eq!(layout.pci64, 768 * GIB..1024 * GIB);
    }

    #[test]
    fn a_small_machine_has_one_ram_range() {
        let layout = Layout::plan(GIB, &[any_place(512 * GIB)], 40).unwrap();
        assert_eq!(layout.ram.len(), 1);
        assert_eq!(layout.units[0], 4 * GIB..516 * GIB);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        assert_eq!(
            Layout::plan(GIB, &[any_place(765 * GIB)], 40).unwrap_err(),
            LayoutError::TooLarge { end: 769 * GIB, limit: 768 * GIB, bits: 40 }
        );
        for at in [0, 2 * GIB, u64::MAX - 5, 768 * GIB] {
            assert!(matches!(
                Layout::plan(GIB, &[UnitRequest { size: GIB, at: Some(at) }], 40),
                Err(LayoutError::Place { .. })
            ));
        }
        let twice = UnitRequest { size: GIB, at: Some(8 * GIB) };
        assert!(matches!(Layout::plan(GIB, &[twice, twice], 40), Err(LayoutError::Place { .. })));
    }

    proptest! {
        #[test]
        fn windows_never_overlap(
            memory in 1u64..64,
            units in prop::collection::vec((1u64..40, prop::option::of(0u64..200)), 0..10),
        ) {
            let requests: Vec<_> = units
                .iter()
                .map(|(size, at)| UnitRequest { size: size * GIB / 8, at: at.map(|g| g * GIB) })
                .collect();
            if let Ok(layout) = Layout::plan(memory * GIB / 4, &requests, 40) {
                let mut all: Vec<_> = layout.ram.iter().chain(&layout.units).cloned().collect();
                all.push(LOW_RAM_END..HIGH_RAM_BASE);
                all.push(layout.pci64.clone());
                all.sort_by_key(|r| r.start);
                prop_assert!(all.windows(2).all(|w| w[0].end <= w[1].start), "{:x?}", all);
                for (window, request) in layout.units.iter().zip(&requests) {
                    prop_assert_eq!(window.end - window.start, request.size);
                    match request.at {
                        Some(at) => prop_assert_eq!(window.start, at),
                        None => prop_assert_eq!(window.start % WINDOW_ALIGN, 0),
                    }
                }
            }
        }
    }
}
