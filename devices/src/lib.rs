//! Device models. No KVM, no unsafe, no threads of their own.
//!
//! A device is a register file ([`bus::BusDevice`]) or a PCI function ([`pci::PciFunction`]). It reaches the
//! rest of the machine through three narrow doors: guest memory through [`dma::Dma`], interrupts through
//! [`irq::IrqLine`] and [`irq::MsiSink`], and everything else by *returning* [`bus::Effect`]s, which the caller
//! carries out when it holds no device's lock.
#![forbid(unsafe_code)]

pub mod bus;
pub mod calendar;
pub mod clock;
pub mod dma;
pub mod einj;
pub mod erst;
pub mod ghes;
pub mod irq;
pub mod nvdimm;
pub mod pci;
pub mod platform;
pub mod pm_timer;
pub mod reset_control;
pub mod rtc;
pub mod serial;
pub mod virtio;
