//! HMAT (ACPI 6.5, 5.2.27): how fast processors reach the memory of each proximity domain.
//!
//! Linux puts nodes of memory into tiers by it (`hmat_calculate_adistance` in drivers/acpi/numa/hmat.c, since 6.7): what
//! is slower than the RAM beside the processors comes into a tier of its own. The figures are those of DIMMs on the
//! market; nothing in the machine takes as long.

use std::collections::BTreeSet;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::{Description, Table};

/// Memory proximity domain attributes, table 5.146.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct ProximityAttributes {
    kind: U16,
    reserved0: U16,
    length: U32,
    flags: U16,
    reserved1: U16,
    initiator: U32,
    memory: U32,
    reserved2: [u8; 20],
}

/// Head of system locality latency and bandwidth information, table 5.147.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Locality {
    kind: U16,
    reserved0: U16,
    length: U32,
    flags: u8,
    data_type: u8,
    min_transfer: u8,
    reserved1: u8,
    initiators: U32,
    targets: U32,
    reserved2: U32,
    base_unit: U64,
}

const _: () = assert!(size_of::<ProximityAttributes>() == 40);
const _: () = assert!(size_of::<Locality>() == 32);

/// Flag of [`ProximityAttributes`]: the initiator is valid.
const INITIATOR_VALID: u16 = 1 << 0;

/// A quantity of [`Locality`], in multiples of its base unit.
struct Quantity {
    data_type: u8,
    base_unit: u64,
    ram: u16,
    device: u16,
}

/// Access latency, in nanoseconds; the unit of the table is the picosecond.
const LATENCY: Quantity = Quantity { data_type: 0, base_unit: 1000, ram: 100, device: 300 };
/// Access bandwidth, in megabytes a second.
const BANDWIDTH: Quantity = Quantity { data_type: 3, base_unit: 1, ram: 20_000, device: 6_000 };

/// HMAT of a machine.
pub(crate) fn hmat(description: &Description) -> Table {
    let initiators: BTreeSet<u32> = description.processors.iter().map(|cpu| cpu.proximity).collect();
    let ram: BTreeSet<u32> = description.memory.iter().map(|memory| memory.proximity).collect();
    let devices = description.windows().map(|window| window.proximity);
    let targets: BTreeSet<u32> = devices.chain(ram.iter().copied()).collect();

    let mut body = vec![0; 4];
    for &memory in &targets {
        // The processors beside the memory, or the first ones.
        let beside = initiators.get(&memory).or(initiators.first()).copied();
        let attributes = ProximityAttributes {
            kind: U16::new(0),
            reserved0: U16::ZERO,
            length: U32::new(size_of::<ProximityAttributes>() as u32),
            flags: U16::new(if beside.is_some() { INITIATOR_VALID } else { 0 }),
            reserved1: U16::ZERO,
            initiator: U32::new(beside.unwrap_or(0)),
            memory: U32::new(memory),
            reserved2: [0; 20],
        };
        body.extend_from_slice(attributes.as_bytes());
    }
    for quantity in [LATENCY, BANDWIDTH] {
        let (rows, columns) = (initiators.len(), targets.len());
        let length = size_of::<Locality>() + 4 * (rows + columns) + 2 * rows * columns;
        let locality = Locality {
            kind: U16::new(1),
            reserved0: U16::ZERO,
            length: U32::new(length as u32),
            flags: 0,
            data_type: quantity.data_type,
            min_transfer: 0,
            reserved1: 0,
            initiators: U32::new(rows as u32),
            targets: U32::new(columns as u32),
            reserved2: U32::ZERO,
            base_unit: U64::new(quantity.base_unit),
        };
        body.extend_from_slice(locality.as_bytes());
        initiators.iter().chain(&targets).for_each(|domain| body.extend(domain.to_le_bytes()));
        for _ in &initiators {
            let value = |target| if ram.contains(target) { quantity.ram } else { quantity.device };
            targets.iter().for_each(|target| body.extend(value(target).to_le_bytes()));
        }
    }
    Table::new(*b"HMAT", 2, &body)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checksum;
    use crate::sample::sample;

    #[test]
    fn every_byte_is_as_specified() {
        let table = hmat(&sample());
        let bytes = table.bytes();
        assert_eq!((checksum(bytes), bytes[8]), (0, 2));
        // Domain 0 is RAM, 1 to 3 are slots; all processors are in domain 0.
        let attributes = &bytes[40 + 2 * 40..40 + 3 * 40];
        assert_eq!(attributes[..12], [0, 0, 0, 0, 40, 0, 0, 0, 1, 0, 0, 0]);
        assert_eq!(attributes[12..20], [0, 0, 0, 0, 2, 0, 0, 0]);
        assert!(attributes[20..].iter().all(|&byte| byte == 0));
        let latency = &bytes[200..260];
        assert_eq!(latency[..12], [1, 0, 0, 0, 60, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(latency[12..24], [1, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(latency[24..32], 1000u64.to_le_bytes());
        assert_eq!(latency[32..52], [0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0]);
        assert_eq!(latency[52..], [100, 0, 44, 1, 44, 1, 44, 1]);
        let bandwidth = &bytes[260..];
        assert_eq!((bandwidth.len(), bandwidth[9], bandwidth[24]), (60, 3, 1));
        assert_eq!(bandwidth[52..56], [20_000u16.to_le_bytes(), 6_000u16.to_le_bytes()].concat());
    }
}
