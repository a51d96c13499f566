//! What the monitor must know of the processor to answer one question: which bytes does this instruction touch?
//!
//! A guarded page makes `KVM_RUN` fail without saying which address was wanted, so the monitor works it out from
//! the registers: [`walk`] follows the guest's page tables, [`operands`] lists the accesses of the instruction at
//! RIP, [`physical`] turns them into guest-physical ranges, and [`decide`] holds those against the poisoned lines.
//! Everything here is a function of plain data. Nothing calls KVM, and nothing panics on what a guest wrote.

pub mod bulk;
pub mod census;
pub mod cpuid;
pub mod decide;
pub mod mca;
pub mod moves;
pub mod operands;
pub mod physical;
pub mod state;
pub mod step;
pub mod walk;
pub mod xstate;
