//! End-to-end tests: `aconite run` with stock kernels. Each module is a suite, `cargo xtask test SUITE`.
//!
//! A boot takes many seconds where KVM is emulated, so a test asks one guest as much as is honest. Tests that are
//! slow or look at many cells of a table are ignored by default (`wide`), and run with their suite's name.

mod apei;
mod api;
mod backings;
mod boot;
mod bridges;
mod clocks;
mod crowd;
mod cycles;
mod defects;
mod disk;
mod disk_removal;
mod dma;
mod dma_held;
mod doctor;
mod e820;
mod einj;
mod erst;
mod firmware;
mod flushes;
mod host_poison;
mod hostile;
mod input;
mod kmem;
mod lies;
mod mapped;
mod matrix;
mod mce;
mod misbehaving;
mod nvdimm;
mod online;
mod outcomes;
mod pins;
mod policy;
mod ports;
mod power;
mod ram;
mod removal;
mod repurposed;
mod scrub;
mod security;
mod stacked;
mod topology;
mod virtio_pmem;
