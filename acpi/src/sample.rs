//! A machine that the tests of several modules describe: two processors, RAM on both sides of the hole, three
//! slots of which the first two are occupied.

use crate::{AddressRange, Description, DimmFlags, MemoryRange, Persistence, PmemUnit, Processor, UnitSlot};

/// Size of a slot of the sample.
pub const SLOT_SIZE: u64 = 0x4000_0000;

/// Base of a slot of the sample.
pub fn slot_base(unit: u32) -> u64 {
    0x2_4000_0000 + u64::from(unit) * 0x6000_0000
}

/// The sample's unit of a slot.
pub fn unit(unit: u32) -> PmemUnit {
    PmemUnit {
        unit,
        range: AddressRange { base: slot_base(unit), size: SLOT_SIZE },
        proximity: unit + 1,
        serial: 0x1234_5600 + unit,
        flags: DimmFlags::empty(),
        flush_hint: true,
    }
}

/// The sample machine.
pub fn sample() -> Description {
    let slot = |number, occupied: bool| UnitSlot {
        window: AddressRange { base: slot_base(number), size: SLOT_SIZE },
        proximity: number + 1,
        occupant: occupied.then(|| unit(number)),
    };
    Description {
        processors: vec![Processor { apic_id: 0, proximity: 0 }, Processor { apic_id: 1, proximity: 0 }],
        memory: vec![
            MemoryRange { range: AddressRange { base: 0, size: 0xC000_0000 }, proximity: 0 },
            MemoryRange { range: AddressRange { base: 0x1_0000_0000, size: 0x4000_0000 }, proximity: 0 },
        ],
        pci_window64: Some(AddressRange { base: 0xC0_0000_0000, size: 0x40_0000_0000 }),
        pci_proximity: 0,
        units: vec![slot(0, true), slot(1, true), slot(2, false)],
        persistence: Persistence::MemoryController,
        pm_timer: true,
    }
}
