//! A virtual machine: memslots, interrupts, events, and the MSRs that the monitor keeps for itself.
//!
//! Writes of the guest that mean nothing but "look here" signal an event without leaving KVM ([`IoEvents`]). The other way
//! has no counterpart: a thread that has an interrupt for the guest sends the message itself (`KVM_SIGNAL_MSI`), while an
//! irqfd would have it write to a descriptor, and a route for each vector kept in step with the MSI-X table, for KVM to
//! send the same message.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use aconite_devices::irq::{IrqLine, MsiSink};
use kvm_bindings::{
    KVM_CAP_X86_USER_SPACE_MSR, KVM_MAX_CPUID_ENTRIES, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY,
    KVM_MSR_EXIT_REASON_FILTER, KVM_MSR_EXIT_REASON_UNKNOWN, kvm_cpuid_entry2, kvm_enable_cap, kvm_msi,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{
    Cap, IoEventAddress, Kvm, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VcpuFd, VmFd,
};
use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use super::VcpuView;
use crate::memory::{Region, WriteLog};
use crate::x86::mca::MsrRange;

/// Guest-physical addresses that KVM needs for itself on Intel hosts, below the boot ROM.
const TSS_ADDRESS: usize = 0xfffb_d000;
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

/// A request to KVM that failed.
#[derive(Debug, Error)]
pub enum KvmError {
    /// The device node cannot be used.
    #[error("Cannot open /dev/kvm; `aconite doctor` says what is missing")]
    Open(#[source] kvm_ioctls::Error),
    /// KVM lacks something.
    #[error("This host's KVM lacks {capability}, which aconite needs; use a Linux 6.1 host or newer")]
    Missing {
        /// Name of the capability in the KVM API.
        capability: &'static str,
    },
    /// An ioctl failed.
    #[error("KVM refused {what}")]
    Refused {
        /// The request.
        what: String,
        /// The system's answer.
        source: kvm_ioctls::Error,
    },
}

impl KvmError {
    pub(super) fn refused(what: impl Into<String>) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        let what = what.into();
        move |source| Self::Refused { what, source }
    }
}

/// A virtual machine.
#[derive(Debug)]
pub struct Vm {
    kvm: Kvm,
    fd: Arc<VmFd>,
    slots: Arc<Mutex<Vec<bool>>>,
}

impl Vm {
    /// Opens KVM, and checks that it can do all that is needed.
    pub fn open() -> Result<Kvm, KvmError> {
        let kvm = Kvm::new().map_err(KvmError::Open)?;
        for (cap, capability) in [
            (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
            (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
            (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
            (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
            (Cap::SetGuestDebug, "KVM_CAP_SET_GUEST_DEBUG"),
            (Cap::X86UserSpaceMsr, "KVM_CAP_X86_USER_SPACE_MSR"),
            (Cap::X86MsrFilter, "KVM_CAP_X86_MSR_FILTER"),
            (Cap::ReadonlyMem, "KVM_CAP_READONLY_MEM"),
            (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI"),
        ] {
            if !kvm.check_extension(cap) {
                return Err(KvmError::Missing { capability });
            }
        }
        Ok(kvm)
    }

    /// Makes a virtual machine with its interrupt controllers, in which accesses to `monitor_msrs` come to the
    /// monitor.
    pub fn new(kvm: Kvm, monitor_msrs: &[MsrRange]) -> Result<Self, KvmError> {
        let fd = kvm.create_vm().map_err(KvmError::refused("a virtual machine"))?;
        fd.set_tss_address(TSS_ADDRESS).map_err(KvmError::refused("the TSS address"))?;
        fd.set_identity_map_address(IDENTITY_MAP_ADDRESS)
            .map_err(KvmError::refused("the identity map address"))?;
        fd.create_irq_chip().map_err(KvmError::refused("interrupt controllers"))?;
        own_msrs(&fd, monitor_msrs)?;
        Ok(Self { kvm, fd: Arc::new(fd), slots: Arc::default() })
    }

    /// Whether the local APIC timer has the deadline mode.
    pub fn has_tsc_deadline_timer(&self) -> bool {
        self.kvm.check_extension(Cap::TscDeadlineTimer)
    }

    /// What KVM can show of this host's processor.
    pub fn supported_cpuid(kvm: &Kvm) -> Result<Vec<kvm_cpuid_entry2>, KvmError> {
        let list = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(KvmError::refused("to show the CPUID it supports"))?;
        Ok(list.as_slice().to_vec())
    }

    /// Makes vCPU `id`.
    pub fn create_vcpu(&self, id: u32) -> Result<VcpuFd, KvmError> {
        self.fd.create_vcpu(u64::from(id)).map_err(KvmError::refused(format!("vCPU {id}")))
    }

    /// A look at a vCPU that works while its thread has it.
    pub fn view(&self, vcpu: &VcpuFd, physical_bits: u8) -> Result<VcpuView, KvmError> {
        VcpuView::new(&self.fd, vcpu, physical_bits)
    }

    /// Shows `region` to the guest for as long as the slot lives.
    pub fn map(&self, region: &Arc<Region>) -> Result<Slot, KvmError> {
        let number = {
            let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
            let number = slots.iter().position(|used| !used).unwrap_or(slots.len());
            if number == slots.len() {
                slots.push(true);
            } else {
                slots[number] = true;
            }
            number as u32
        };
        let slot = Slot { fd: self.fd.clone(), slots: self.slots.clone(), number, region: region.clone() };
        slot.set(region.len())?;
        if region.logs_writes() {
            region.ask_for_writes(Arc::new(SlotLog { fd: self.fd.clone(), number, len: region.len() }));
        }
        Ok(slot)
    }

    /// The interrupt line that enters the IOAPIC at `gsi`.
    pub fn line(&self, gsi: u32) -> Arc<GsiLine> {
        Arc::new(GsiLine { fd: self.fd.clone(), gsi })
    }

    /// Where events are attached to addresses.
    pub fn io_events(&self) -> IoEvents {
        IoEvents { fd: self.fd.clone() }
    }

    /// Where devices send message-signalled interrupts.
    pub fn msi(&self) -> Arc<dyn MsiSink> {
        Arc::new(Msi { fd: self.fd.clone() })
    }
}

fn own_msrs(fd: &VmFd, ranges: &[MsrRange]) -> Result<(), KvmError> {
    fd.enable_cap(&kvm_enable_cap {
        cap: KVM_CAP_X86_USER_SPACE_MSR,
        args: [u64::from(KVM_MSR_EXIT_REASON_FILTER | KVM_MSR_EXIT_REASON_UNKNOWN), 0, 0, 0],
        ..Default::default()
    })
    .map_err(KvmError::refused("MSR exits"))?;
    let longest = ranges.iter().map(|range| range.count).max().unwrap_or(0);
    let denied = vec![0u8; longest.div_ceil(8) as usize];
    let filters: Vec<_> = ranges
        .iter()
        .map(|range| MsrFilterRange {
            flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
            base: range.base,
            msr_count: range.count,
            bitmap: &denied[..range.count.div_ceil(8) as usize],
        })
        .collect();
    fd.set_msr_filter(MsrFilterDefaultAction::ALLOW, &filters).map_err(KvmError::refused("the MSR filter"))
}

/// A memslot; the guest loses sight of the region when it is dropped.
#[derive(Debug)]
pub struct Slot {
    fd: Arc<VmFd>,
    slots: Arc<Mutex<Vec<bool>>>,
    number: u32,
    region: Arc<Region>,
}

impl Slot {
    fn set(&self, len: u64) -> Result<(), KvmError> {
        let writable = if self.region.writable() { 0 } else { KVM_MEM_READONLY };
        let logged = if self.region.logs_writes() { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
        let slot = kvm_userspace_memory_region {
            slot: self.number,
            flags: writable | logged,
            guest_phys_addr: self.region.gpa(),
            memory_size: len,
            userspace_addr: self.region.host_address(),
        };
        // SAFETY: the slot keeps the region, and so its map, alive; nothing else refers to that map.
        unsafe { self.fd.set_user_memory_region(slot) }
            .map_err(KvmError::refused(format!("memory at {:#x}, {len:#x} bytes", self.region.gpa())))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if let Err(error) = self.set(0) {
            tracing::error!(%error, slot = self.number, "a memslot stays");
            return;
        }
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)[self.number as usize] = false;
    }
}

/// KVM's log of the pages of a memslot that the guest has written (`KVM_GET_DIRTY_LOG`).
#[derive(Debug)]
struct SlotLog {
    fd: Arc<VmFd>,
    number: u32,
    len: u64,
}

impl WriteLog for SlotLog {
    fn take(&self) -> io::Result<Vec<u64>> {
        let log = self.fd.get_dirty_log(self.number, self.len as usize);
        log.map_err(|error| io::Error::from_raw_os_error(error.errno()))
    }
}

/// An IOAPIC input.
#[derive(Debug)]
pub struct GsiLine {
    fd: Arc<VmFd>,
    gsi: u32,
}

impl IrqLine for GsiLine {
    fn trigger(&self) {
        self.set(true);
        self.set(false);
    }

    fn set(&self, asserted: bool) {
        if let Err(error) = self.fd.set_irq_line(self.gsi, asserted) {
            tracing::error!(%error, gsi = self.gsi, "an interrupt was lost");
        }
    }
}

/// Attaches events to addresses (`KVM_IOEVENTFD`).
#[derive(Clone, Debug)]
pub struct IoEvents {
    fd: Arc<VmFd>,
}

impl IoEvents {
    /// From now on a vCPU that writes `value`, as two bytes, to the guest-physical address `gpa` signals `event` and goes
    /// on. Any other write is an exit as before, and so is any read.
    ///
    /// # Errors
    /// Another event is there, or KVM has no more.
    pub fn at(&self, gpa: u64, value: u16, event: &Arc<EventFd>) -> Result<IoEvent, KvmError> {
        self.fd
            .register_ioevent(event, &IoEventAddress::Mmio(gpa), value)
            .map_err(KvmError::refused(format!("an event at {gpa:#x}")))?;
        Ok(IoEvent { fd: self.fd.clone(), gpa, value, event: event.clone() })
    }
}

/// An event at an address, until it is dropped.
#[derive(Debug)]
pub struct IoEvent {
    fd: Arc<VmFd>,
    gpa: u64,
    value: u16,
    event: Arc<EventFd>,
}

impl Drop for IoEvent {
    fn drop(&mut self) {
        let address = IoEventAddress::Mmio(self.gpa);
        if let Err(error) = self.fd.unregister_ioevent(&self.event, &address, self.value) {
            tracing::error!(%error, gpa = self.gpa, "an event stays where it was");
        }
    }
}

#[derive(Debug)]
struct Msi {
    fd: Arc<VmFd>,
}

impl MsiSink for Msi {
    fn signal(&self, address: u64, data: u32) {
        let msi = kvm_msi {
            address_lo: address as u32,
            address_hi: (address >> 32) as u32,
            data,
            ..Default::default()
        };
        if let Err(error) = self.fd.signal_msi(msi) {
            tracing::warn!(%error, address, data, "a message-signalled interrupt went nowhere");
        }
    }
}
