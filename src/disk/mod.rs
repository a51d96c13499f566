//! Disks: where their bytes are.
//!
//! What a disk is to the guest is in [`aconite_devices::virtio::blk`]; who performs its requests, in [`crate::workers`].

mod file;

pub use file::FileStorage;
