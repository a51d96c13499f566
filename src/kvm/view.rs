//! A look at a vCPU from outside its thread.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd};

use kvm_ioctls::{VcpuFd, VmFd};

use super::{Held, KvmError};
use crate::x86::walk::Paging;

/// A second handle of a vCPU whose thread has the first one.
#[derive(Debug)]
pub struct VcpuView {
    fd: VcpuFd,
    physical_bits: u8,
}

impl VcpuView {
    /// A view of `vcpu`, which belongs to `vm` and has `physical_bits` physical address bits.
    pub(super) fn new(vm: &VmFd, vcpu: &VcpuFd, physical_bits: u8) -> Result<Self, KvmError> {
        // SAFETY: `vcpu` is borrowed, so its descriptor is open.
        let borrowed = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
        let second = borrowed.as_fd().try_clone_to_owned().map_err(|source| KvmError::Refused {
            what: "a second handle of a vCPU".to_owned(),
            source: kvm_ioctls::Error::new(source.raw_os_error().unwrap_or(libc::EIO)),
        })?;
        // SAFETY: the descriptor is that of a vCPU of `vm`, and nobody else's.
        let fd = unsafe { vm.create_vcpu_from_rawfd(second.into_raw_fd()) }
            .map_err(KvmError::refused("a second handle of a vCPU"))?;
        Ok(Self { fd, physical_bits })
    }

    /// How the vCPU translates addresses. With the baton held it is outside KVM_RUN, so this does not wait.
    pub fn paging(&self, _held: &Held) -> Result<Paging, KvmError> {
        let sregs = self.fd.get_sregs().map_err(KvmError::refused("to show a vCPU's registers"))?;
        Ok(Paging::new(&sregs, self.physical_bits))
    }
}
