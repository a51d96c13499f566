//! The doorbells of a device's queues: KVM rings for the guest, and the device's own threads hear it.
//!
//! A notification costs the guest no exit to the monitor, and the main loop has no part in it. Interrupts need no such
//! thing: the thread that completes a request sends the message itself ([`Vm::msi`](crate::kvm::Vm::msi)), in one system
//! call, which an irqfd would need, too (`irqfd_wakeup()`).

use std::io;
use std::sync::Arc;

use aconite_devices::virtio::{Doorbells, VirtioPci, Worked};
use vmm_sys_util::eventfd::EventFd;

use crate::kvm::{IoEvent, IoEvents};
use crate::workers::Workers;

/// The bells of a device, one for each queue.
#[derive(Debug)]
struct Bells {
    vm: IoEvents,
    bells: Vec<Arc<EventFd>>,
    hung: Vec<IoEvent>,
}

/// Has `workers` answer the notifications of `function`, for as long as it lives.
///
/// # Errors
/// The host has no more descriptors.
pub fn install<D: Worked>(
    function: &mut VirtioPci<D>,
    workers: &Workers<D::Job>,
    vm: &IoEvents,
) -> io::Result<()> {
    let queues = 0..function.device().queue_sizes().len() as u16;
    let bells = queues.map(|queue| workers.bell(queue)).collect::<io::Result<_>>()?;
    function.set_doorbells(Some(Box::new(Bells { vm: vm.clone(), bells, hung: Vec::new() })));
    Ok(())
}

impl Doorbells for Bells {
    fn hang(&mut self, addresses: &[u64]) {
        // Before others are made: they may have the same addresses.
        self.hung.clear();
        for ((queue, &address), bell) in (0u16..).zip(addresses).zip(&self.bells) {
            match self.vm.at(address, queue, bell) {
                Ok(event) => self.hung.push(event),
                // The notification is an exit then.
                Err(error) => tracing::warn!(%error, queue, "a queue has no doorbell"),
            }
        }
    }
}
