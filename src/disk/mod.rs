//! Disks: where their bytes are, and the threads that move them.
//!
//! What a disk is to the guest is in [`aconite_devices::virtio::blk`], which has no threads. Here are the workers that
//! perform its requests, so that neither a vCPU nor the main loop waits for the host's storage.

mod file;
mod pool;

pub use file::FileStorage;
pub use pool::{Function, Pool, Workers};
