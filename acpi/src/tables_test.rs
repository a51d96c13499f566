use super::*;
use crate::checksum;
use crate::layout::{MAX_DIMMS, MAX_UNITS};
use crate::sample::{SLOT_SIZE, sample};
use crate::{AddressRange, Processor, UnitSlot, UnitWindow};

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(bytes[offset..offset + 8].try_into().expect("8 bytes"))
}

/// What is at a guest-physical address, as an OS would find it: by the table's own length.
fn at(tables: &Tables, address: u64) -> Vec<u8> {
    let blob = tables.blob();
    let start = (address - tables.blob_address()) as usize;
    let length = u32::from_le_bytes(blob[start + 4..start + 8].try_into().expect("4 bytes")) as usize;
    blob[start..start + length].to_vec()
}

#[test]
fn an_os_finds_everything_from_the_rsdp() {
    let tables = Tables::build(&sample()).expect("tables");
    let xsdt = at(&tables, u64_at(tables.rsdp(), 24));
    assert_eq!(&xsdt[..4], b"XSDT");
    let mut found = Vec::new();
    for offset in (36..xsdt.len()).step_by(8) {
        let table = at(&tables, u64_at(&xsdt, offset));
        assert_eq!(checksum(&table), 0);
        found.push(String::from_utf8(table[..4].to_vec()).expect("signature"));
        if &table[..4] == b"FACP" {
            let dsdt = at(&tables, u64_at(&table, 140));
            assert_eq!(&dsdt[..4], b"DSDT");
            assert_eq!(checksum(&dsdt), 0);
        }
    }
    assert_eq!(
        found,
        ["FACP", "APIC", "MCFG", "SRAT", "SLIT", "HMAT", "HEST", "BERT", "EINJ", "ERST", "NFIT"]
    );
}

#[test]
fn iteration_and_lookup_agree_with_the_blob() {
    let tables = Tables::build(&sample()).expect("tables");
    for placed in tables.iter() {
        assert_eq!(placed.address % 64, 0);
        assert_eq!(at(&tables, placed.address), placed.table.bytes());
        assert_eq!(tables.get(&placed.table.signature()), Some(placed));
    }
    assert_eq!(tables.get(b"HPET"), None);
}

#[test]
fn a_machine_without_slots_has_no_nfit() {
    let mut description = sample();
    description.units.clear();
    let tables = Tables::build(&description).expect("tables");
    assert_eq!(tables.get(b"NFIT"), None);
}

#[test]
fn empty_slots_keep_the_nfit() {
    let mut description = sample();
    for slot in &mut description.units {
        slot.occupant = None;
    }
    let tables = Tables::build(&description).expect("tables");
    assert_eq!(tables.get(b"NFIT").expect("NFIT").table.bytes().len(), 40);
}

#[test]
fn the_largest_machine_fits() {
    let mut description = sample();
    description.processors = (0..255).map(|apic_id| Processor { apic_id, proximity: 0 }).collect();
    description.units = (0..u64::from(MAX_UNITS))
        .map(|unit| {
            let range = AddressRange { base: 0x10_0000_0000 + unit * SLOT_SIZE, size: SLOT_SIZE };
            UnitSlot {
                windows: vec![UnitWindow { range, proximity: unit as u32 + 1 }],
                dimms: MAX_DIMMS,
                occupant: None,
            }
        })
        .collect();
    let tables = Tables::build(&description).expect("tables");
    assert!(tables.blob().len() as u64 <= TABLES_SIZE);
}

#[test]
fn a_wrong_description_gives_no_tables() {
    let mut description = sample();
    description.processors.clear();
    assert_eq!(Tables::build(&description), Err(Error::NoProcessors));
}
