//! A machine that the tests of several modules describe: two processors, RAM on both sides of the hole, three
//! slots of which the first two are occupied, two host bridges that come and go.

use crate::{
    AddressRange, Description, DimmFlags, HostBridges, MemoryRange, NvdimmUnit, Persistence, Processor,
    RangeType, Share, UnitDimm, UnitRange, UnitSlot, UnitWindow,
};

/// Size of a slot of the sample.
pub const SLOT_SIZE: u64 = 0x4000_0000;

/// Base of a slot of the sample.
pub fn slot_base(unit: u32) -> u64 {
    0x2_4000_0000 + u64::from(unit) * 0x6000_0000
}

/// The sample's unit of a slot: a range and the one DIMM that provides it.
pub fn unit(unit: u32) -> NvdimmUnit {
    let dimm = UnitDimm {
        serial: 0x1234_5600 + unit,
        flags: DimmFlags::empty(),
        capacity: SLOT_SIZE,
        flush_hint: true,
    };
    let range = UnitRange {
        range: AddressRange { base: slot_base(unit), size: SLOT_SIZE },
        proximity: unit + 1,
        kind: RangeType::Persistent,
        line: 4096,
        shares: vec![Share { dimm: 0, dimm_address: 0 }],
    };
    NvdimmUnit { unit, ranges: vec![range], dimms: vec![dimm], lie: None }
}

/// A slot of the sample.
pub fn slot(number: u32, occupant: Option<NvdimmUnit>) -> UnitSlot {
    let range = AddressRange { base: slot_base(number), size: SLOT_SIZE };
    UnitSlot { windows: vec![UnitWindow { range, proximity: number + 1 }], dimms: 1, occupant }
}

/// The sample machine.
pub fn sample() -> Description {
    Description {
        processors: vec![Processor { apic_id: 0, proximity: 0 }, Processor { apic_id: 1, proximity: 0 }],
        memory: vec![
            MemoryRange { range: AddressRange { base: 0, size: 0xC000_0000 }, proximity: 0 },
            MemoryRange { range: AddressRange { base: 0x1_0000_0000, size: 0x4000_0000 }, proximity: 0 },
        ],
        pci_window64: Some(AddressRange { base: 0xC0_0000_0000, size: 0x3F_0000_0000 }),
        host_bridges: Some(HostBridges {
            count: 2,
            windows: AddressRange { base: 0xFF_0000_0000, size: 0x1_0000_0000 },
        }),
        pci_proximity: 0,
        units: vec![slot(0, Some(unit(0))), slot(1, Some(unit(1))), slot(2, None)],
        arrivals: Vec::new(),
        persistence: Persistence::MemoryController,
        pm_timer: true,
    }
}
