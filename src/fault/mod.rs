//! Faults: what happens when a guest touches memory that is poisoned or gone.

mod copy;
mod deliver;
mod emulated;
mod host_memory;
mod inject;
mod stale;
mod step;
mod stores;
mod touch;
mod trap;

pub use deliver::{Delivered, InjectError, Injection, Injector, Mode, Turn, What};
pub use stale::StaleLog;
pub use trap::{Progress, TrapError, Traps};
