//! All tables of a machine, placed in guest-physical memory.

use crate::layout::{RSDP_BASE, TABLES_BASE, TABLES_SIZE};
use crate::{
    Description, Error, RSDP_SIZE, Table, bert, dsdt, einj, erst, fadt, hest, hmat, madt, mcfg, nfit, rsdp,
    slit, srat,
};

/// Tables begin at multiples of this.
const ALIGNMENT: u64 = 64;

/// A table and where it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlacedTable {
    /// Guest-physical address.
    pub address: u64,
    /// The table.
    pub table: Table,
}

/// All tables of a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tables {
    rsdp: [u8; RSDP_SIZE],
    tables: Vec<PlacedTable>,
}

impl Tables {
    /// Makes all tables of a machine. The same description gives the same bytes.
    ///
    /// # Errors
    /// What [`Description::check`] finds, and tables that are too large for their range.
    pub fn build(description: &Description) -> Result<Self, Error> {
        description.check()?;
        let mut placed = Placer::default();
        let dsdt = placed.add(dsdt::dsdt(description));
        let mut listed = vec![
            placed.add(fadt::fadt(dsdt, description.pm_timer)),
            placed.add(madt::madt(&description.processors)),
            placed.add(mcfg::mcfg()),
            placed.add(srat::srat(description)),
            placed.add(slit::slit(description.proximity_domains())),
            placed.add(hmat::hmat(description)),
            placed.add(hest::hest()),
            placed.add(bert::bert()),
            placed.add(einj::einj()),
            placed.add(erst::erst()),
        ];
        if !description.units.is_empty() {
            let present = description.units.iter().filter_map(|slot| slot.occupant.as_ref());
            listed.push(placed.add(nfit::nfit(present, description.persistence)));
        }
        let xsdt = placed.add(rsdp::xsdt(&listed));
        let size = placed.next - TABLES_BASE;
        if size > TABLES_SIZE {
            return Err(Error::TooLarge(size));
        }
        Ok(Self { rsdp: rsdp::rsdp(xsdt), tables: placed.tables })
    }

    /// Address at which the RSDP is to be put.
    pub fn rsdp_address(&self) -> u64 {
        RSDP_BASE
    }

    /// The RSDP, which is not a table with a header.
    pub fn rsdp(&self) -> &[u8; RSDP_SIZE] {
        &self.rsdp
    }

    /// The tables in the order of their addresses.
    pub fn iter(&self) -> impl Iterator<Item = &PlacedTable> {
        self.tables.iter()
    }

    /// The table with a signature, such as `b"DSDT"`.
    pub fn get(&self, signature: &[u8; 4]) -> Option<&PlacedTable> {
        self.tables.iter().find(|placed| placed.table.signature() == *signature)
    }

    /// Address at which [`Self::blob`] is to be put.
    pub fn blob_address(&self) -> u64 {
        TABLES_BASE
    }

    /// All tables in one piece, to be put at [`Self::blob_address`].
    pub fn blob(&self) -> Vec<u8> {
        let mut blob = Vec::new();
        for placed in &self.tables {
            blob.resize((placed.address - TABLES_BASE) as usize, 0);
            blob.extend_from_slice(placed.table.bytes());
        }
        blob
    }
}

/// Hands out addresses one behind the other.
struct Placer {
    next: u64,
    tables: Vec<PlacedTable>,
}

impl Default for Placer {
    fn default() -> Self {
        Self { next: TABLES_BASE, tables: Vec::new() }
    }
}

impl Placer {
    fn add(&mut self, table: Table) -> u64 {
        let address = self.next.next_multiple_of(ALIGNMENT);
        self.next = address + table.bytes().len() as u64;
        self.tables.push(PlacedTable { address, table });
        address
    }
}

#[cfg(test)]
#[path = "tables_test.rs"]
mod tests;
