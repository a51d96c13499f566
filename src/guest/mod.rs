//! What goes into a guest, and the conversation with it.
//!
//! A guest starts from an initramfs that is packed from files of the host: the agent, busybox, the
//! tools that the user names with their libraries, and the modules its kernel needs. The
//! [`client`] then talks to the agent over a virtio console port; the protocol is
//! [`aconite_agent::protocol`].

pub mod client;
mod cpio;
mod elf;
pub mod initramfs;
pub mod kernel_image;
mod libraries;
pub mod modules;
pub mod process;

/// The agent: a static program for x86-64 Linux, PID 1 of a guest.
pub static AGENT: &[u8] = include_bytes!(env!("ACONITE_AGENT"));
