//! The only module that calls KVM: a VM with its memslots and interrupts, vCPU threads with their
//! exits, the baton that stops them, and single steps.

mod baton;
mod kick;
mod report;
mod vcpu;
mod view;
mod vm;

pub use baton::{Baton, Held, Stopped};
pub use kick::{Kick, KickTimer};
pub use report::CpuReport;
pub use vcpu::{ExitCounts, RunError, StopAt, Vcpu, VcpuExitKind};
pub use view::VcpuView;
pub use vm::{GsiLine, IoEvent, IoEvents, KvmError, Slot, Vm};
