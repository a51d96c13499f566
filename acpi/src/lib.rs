//! ACPI tables and AML of a machine, as bytes. No I/O, no guest memory, no unsafe.
//!
//! [`Tables::build`] turns a plain [`Description`] into all tables, ready to be copied to fixed addresses.
//! [`FitBuilder`] makes the NFIT sub-tables, for the static table and for what a unit's `_FIT` returns at run
//! time.
//!
//! Two modules are shared with the device models and the monitor: [`layout`] says where things are in
//! guest-physical memory, [`platform`] says what the registers mean that AML touches. A register that AML
//! reads and a device model answers is described once, here, so the two cannot drift apart.
//!
//! The platform is hardware-reduced ACPI (ACPI 6.5, 4.1): no fixed hardware, firmware events arrive through a
//! generic event device, and sleep and reset are plain registers.
#![forbid(unsafe_code)]

mod apei;
mod bert;
pub mod cper;
mod description;
mod dsdt;
pub mod einj;
mod error;
pub mod erst;
mod fadt;
pub mod ghes;
mod guid;
mod hest;
mod hmat;
pub mod layout;
mod madt;
mod mcfg;
mod nfit;
pub mod platform;
mod rsdp;
#[cfg(test)]
mod sample;
mod slit;
mod srat;
mod table;
mod tables;

pub use description::{AddressRange, Description, HostBridges, MemoryRange, Processor, UnitSlot, UnitWindow};
pub use dsdt::target_path;
pub use error::Error;
pub use guid::{Guid, NotAGuid};
pub use nfit::{
    ControlRegion, DimmFlags, FitBuilder, Interleave, Lie, NvdimmUnit, Persistence, RangeType, RegionMap,
    Share, SpaRange, UnitDimm, UnitRange,
};
pub use rsdp::RSDP_SIZE;
pub use table::{HEADER_SIZE, Table, checksum};
pub use tables::{PlacedTable, Tables};
