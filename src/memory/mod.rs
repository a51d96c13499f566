//! Guest memory: what is mapped where, which lines of it are poisoned, and which pages trap.
//!
//! Every region has two maps of one file. KVM sees the *guest map*, in which a page that must trap is
//! protected; the monitor and its devices use the *alias map*, which never traps. A memslot is never
//! punched to make poison.

pub mod backing;
mod durable;
mod guard;
mod guest_map;
pub mod host_fault;
mod keeper;
mod poison;
mod policy;
mod ranges;
mod region;
mod space;
mod tables;

pub use durable::{Durable, Loss, Survivors, WriteLog};
pub use guard::GuardMethod;
pub use guest_map::{GuestMap, LARGE, MapError, PAGE_SIZE};
pub use keeper::PoisonKeeper;
pub use poison::{LINE_SIZE, PoisonChange, PoisonMap, round_in, round_out};
pub use policy::{Consume, FullLineStore, PoisonPolicy, PolicyChange, ReportedAddress, StaleAnswer};
pub use ranges::RangeSet;
pub use region::{Backing, GuardError, GuardState, Region, RegionKind};
pub use space::{AddressSpace, DmaMemory, SpaceError};
pub use tables::GuestTables;
