//! Faults: what happens when a guest touches memory that is poisoned or gone.

mod copy;
mod inject;
mod stale;
mod trap;

pub use stale::StaleLog;
pub use trap::{Progress, TrapError, Traps};
