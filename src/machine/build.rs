//! Putting a machine together: memory, firmware tables, devices, vCPUs, kernel.

use std::fs::File;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use aconite_acpi::Tables;
use aconite_acpi::layout as fixed;
use aconite_devices::bus::{Bus, BusError};
use aconite_devices::clock::Clock;
use aconite_devices::dma::{Dma, DmaError};
use aconite_devices::erst::Erst;
use aconite_devices::nvdimm::UnitTable;
use aconite_devices::pci::PciError;
use aconite_devices::platform::Platform;
use aconite_devices::virtio::console::Console;
use aconite_devices::virtio::{TransportError, VirtioPci};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryError};

use super::arrival::{NotAdded, When};
use super::bad_ram::{self, BadRamError};
use super::boot_errors::{BootErrors, BootErrorsError};
use super::console::ConsoleSink;
use super::disk::{DiskError, Disks, Surroundings};
use super::dma::DevicePoison;
use super::errors::Errors;
use super::injection::Injections;
use super::memory::{self, MemoryDevices, Parts};
use super::operations::Operations;
use super::pcie::{Pcie, PcieError};
use super::plan::{MemoryPlan, Plan};
use super::records;
use super::wired::Wired;
use crate::boot::{self, BootError, Image};
use crate::command::EventBus;
use crate::config::{self, CheckedPmem, ConfigError};
use crate::fault::{Injector, StaleLog, Traps};
use crate::host::probe;
use crate::kvm::{Baton, ExitCounts, KvmError, Slot, Vcpu, VcpuView, Vm};
use crate::layout::LayoutError;
use crate::memory::backing::{self, BackingError};
use crate::memory::{AddressSpace, Backing, MapError, Region, RegionKind, SpaceError};
use crate::state::{State, StateError};
use crate::x86::cpuid::{self, CpuidConfig, Vendor};
use crate::x86::mca::McaState;
use crate::x86::xstate::XsaveLayout;

/// Address bits of a machine that is only described: what the software KVM host has.
const DEFAULT_ADDRESS_BITS: u8 = 40;

/// Why a machine could not be built.
#[derive(Debug, Error)]
pub enum BuildError {
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The description does not fit this host.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Places.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// RAM's file.
    #[error(transparent)]
    Backing(#[from] BackingError),
    /// RAM's map.
    #[error(transparent)]
    Map(#[from] MapError),
    /// RAM's place.
    #[error(transparent)]
    Space(#[from] SpaceError),
    /// A memory device.
    #[error(transparent)]
    Memory(#[from] NotAdded),
    /// A disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A device's place.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// A PCI device's place.
    #[error(transparent)]
    Pci(#[from] PciError),
    /// A PCI Express port or card.
    #[error(transparent)]
    Pcie(#[from] PcieError),
    /// A virtio device.
    #[error(transparent)]
    Virtio(#[from] TransportError),
    /// What an earlier machine has left.
    #[error(transparent)]
    State(#[from] StateError),
    /// Firmware tables.
    #[error(transparent)]
    Acpi(#[from] aconite_acpi::Error),
    /// The kernel.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// Errors of the previous boot.
    #[error(transparent)]
    BootErrors(#[from] BootErrorsError),
    /// Bad lines of RAM.
    #[error(transparent)]
    BadRam(#[from] BadRamError),
    /// Status blocks of error sources.
    #[error("Cannot write the status blocks of error sources into guest memory")]
    ErrorSources(#[from] DmaError),
    /// Guest memory.
    #[error("Cannot write firmware tables into guest memory")]
    GuestMemory(#[from] GuestMemoryError),
}

/// What a machine is built from.
#[derive(Debug)]
pub struct Spec<'a> {
    /// The description, complete and checked.
    pub config: &'a config::Machine,
    /// Sizes of the memory devices, in the order of the description.
    pub pmem: &'a [CheckedPmem],
    /// Sizes of the disks, in the order of the description.
    pub disks: &'a [CheckedPmem],
    /// The kernel's release, where its image says.
    pub kernel_release: Option<String>,
    /// The initial RAM disk.
    pub initrd: &'a [u8],
    /// The kernel command line.
    pub command_line: &'a str,
    /// Where the serial line goes.
    pub console: ConsoleSink,
    /// The event stream.
    pub events: EventBus,
    /// What outlives the machine, if something does.
    pub state: Option<Arc<State>>,
}

/// Everything that [`super::Machine`] owns.
pub struct Built {
    /// vCPUs, not yet on threads.
    pub vcpus: Vec<(Vcpu, McaState)>,
    /// The vCPUs once more, to look at while they stand still.
    pub views: Vec<VcpuView>,
    /// The baton.
    pub baton: Arc<Baton>,
    /// Devices behind ports.
    pub ports: Arc<Bus>,
    /// Devices in memory.
    pub mmio: Arc<Bus>,
    /// Who serves traps.
    pub traps: Arc<Traps>,
    /// The platform page.
    pub platform: Arc<Mutex<Platform>>,
    /// The agent's console.
    pub console: Arc<Mutex<VirtioPci<Console>>>,
    /// PCI Express ports and host bridges, and what is behind them.
    pub pcie: Arc<Mutex<Pcie>>,
    /// Disks.
    pub disks: Disks,
    /// What was asked for and takes its time.
    pub operations: Operations,
    /// Memory devices.
    pub memory: MemoryDevices,
    /// Error sources of the firmware.
    pub errors: Errors,
    /// Errors of the previous boot, and for the next one.
    pub boot_errors: Arc<BootErrors>,
    /// What carries out the errors that the guest injects.
    pub injections: Injections,
    /// Memslots of RAM; they only have to live.
    pub _ram_slots: Vec<Slot>,
    /// Exits to the monitor.
    pub counts: Arc<ExitCounts>,
    /// Firmware tables.
    pub tables: Tables,
}

/// The firmware tables of a machine, without building it: KVM is asked for its address bits where it is there.
pub fn tables(config: &config::Machine, pmem: &[CheckedPmem]) -> Result<Tables, BuildError> {
    // A KVM that cannot run machines says nothing of the one that will.
    let supported = probe::kvm().usable().then(|| Vm::open().and_then(|kvm| Vm::supported_cpuid(&kvm)));
    let address_bits = match supported {
        Some(Ok(supported)) => cpuid::physical_bits(&supported),
        _ => DEFAULT_ADDRESS_BITS,
    };
    let plan = Plan::new(config, pmem, address_bits)?;
    let occupants = plan.occupants(config, pmem);
    let memory_plan = MemoryPlan { occupants, persistence: memory::persistence(&config.pmem) };
    Ok(Tables::build(&plan.description(config, &memory_plan))?)
}

/// Builds the machine; the first vCPU stands at the kernel's first instruction.
pub fn build(spec: Spec<'_>) -> Result<Built, BuildError> {
    let config = spec.config;
    let kvm = Vm::open()?;
    let supported = Vm::supported_cpuid(&kvm)?;
    let host = Vendor::of(&supported);
    let mca = config.cpu.mca(host)?;
    let vm = Arc::new(Vm::new(kvm, mca.msr_ranges())?);
    let fds = (0..config.cpus).map(|cpu| vm.create_vcpu(cpu)).collect::<Result<Vec<_>, _>>()?;
    // Without kvmclock, Linux on AMD can only measure the TSC against the PM timer, and gives that up where a port
    // access takes longer than 50000 cycles (`tsc_read_refs` in arch/x86/kernel/tsc.c), as it does in a software KVM
    // host: it is told the frequency on its command line instead.
    let tsc_khz = fds.first().and_then(|fd| fd.get_tsc_khz().ok());
    let cpu_config = CpuidConfig {
        vcpus: config.cpus,
        vendor: Some(config.cpu.guest_vendor(host)),
        hypervisor: config.cpu.hypervisor,
        erms: config.cpu.erms,
        mca,
        tsc_khz,
        tsc_deadline: vm.has_tsc_deadline_timer(),
        // Without kvmclock the TSC is the guest's clock, and no watchdog of a slow host may take it away.
        invariant_tsc: (!config.cpu.hypervisor).then_some(true),
    };
    let guest_cpuid = |cpu| cpuid::guest_cpuid(&supported, &cpu_config, cpu);
    let first = guest_cpuid(0);
    let physical_bits = cpuid::physical_bits(&first);
    let plan = Plan::new(config, spec.pmem, physical_bits)?;

    let space = Arc::new(AddressSpace::default());
    let ram_slots = map_ram(&vm, &space, &plan.ram)?;
    let baton = Baton::new(config.cpus as usize);
    let units = Arc::new(UnitTable::new());
    let stale = Arc::new(StaleLog::default());
    let dma = Dma::new(space.dma(), Arc::new(DevicePoison::new(space.clone(), spec.events.clone())));
    let erst = records::store(dma.named("erst"), spec.state.as_ref())?;
    let boot_errors = Arc::new(BootErrors::show(spec.state.clone(), &dma.named("bert"))?);
    let mut wired = Wired::new(&vm, config, &plan, dma.clone(), units.clone(), spec.console)?;
    wired.mmio.insert("erst", fixed::ERST_REGISTERS, Erst::SIZE, Arc::new(Mutex::new(erst)))?;

    let operations = Operations::default();
    let mut devices = MemoryDevices::new(Parts {
        vm: vm.clone(),
        space: space.clone(),
        units: units.clone(),
        baton: baton.clone(),
        events: spec.events.clone(),
        stale: stale.clone(),
        windows: plan.windows.clone(),
        dimms_of_unit: plan.dimms.clone(),
        pcie: wired.pcie.clone(),
        dma: dma.clone(),
        operations: operations.clone(),
        kernel: spec.kernel_release,
    });
    let mut occupants = Vec::new();
    for (unit, arrivals) in plan.arrivals(config, spec.pmem).iter().enumerate() {
        let firmware = devices.add(unit, arrivals, When::AtStart)?;
        if unit < plan.dimms.len() {
            occupants.push(firmware);
        }
    }

    let around = Surroundings {
        dma,
        msi: vm.msi(),
        io_events: vm.io_events(),
        space: space.clone(),
        events: spec.events.clone(),
        cpus: config.cpus,
        clock: monotonic_clock(),
        pcie: wired.pcie.clone(),
        operations: operations.clone(),
    };
    let disks = Disks::new(&config.disk, spec.disks, around)?;

    let errors =
        Errors::new(wired.errors, wired.platform.clone(), vm.msi(), spec.events.clone(), boot_errors.clone());

    let memory_plan = MemoryPlan { occupants, persistence: memory::persistence(&config.pmem) };
    let tables = Tables::build(&plan.description(config, &memory_plan))?;
    let guest = space.dma().memory();
    guest.write_slice(&tables.blob(), GuestAddress(tables.blob_address()))?;
    guest.write_slice(tables.rsdp(), GuestAddress(tables.rsdp_address()))?;
    boot::write_start_state(&guest)?;
    let command_line = match tsc_khz.filter(|_| !config.cpu.hypervisor) {
        Some(khz) => format!("tsc_early_khz={khz} {}", spec.command_line),
        None => spec.command_line.to_owned(),
    };
    let more_memory = plan.e820(config, spec.pmem);
    let image = Image {
        kernel: &config.kernel,
        initrd: spec.initrd,
        command_line: &command_line,
        more_memory: &more_memory,
    };
    let entry = boot::load(&guest, &plan.ram, &image)?;

    if let Some(state) = &spec.state {
        bad_ram::restore(state, &space)?;
    }

    let counts = Arc::new(ExitCounts::default());
    let (mut vcpus, mut views) = (Vec::new(), Vec::new());
    for (cpu, fd) in (0..).zip(fds) {
        views.push(vm.view(&fd, physical_bits)?);
        let vcpu = Vcpu::new(cpu, fd, counts.clone());
        let list = guest_cpuid(cpu);
        vcpu.set_cpuid(&list)?;
        vcpu.set_msrs(&boot::FIRMWARE_MSRS)?;
        if cpu == 0 {
            let mut sregs = vcpu.sregs()?;
            let regs = boot::start_registers(entry, &mut sregs);
            vcpu.set_sregs(&sregs)?;
            vcpu.set_regs(&regs)?;
        }
        vcpus.push((vcpu, McaState::new(mca)));
    }
    let injector = Injector::new(mca, config.cpus, baton.clone(), vm.msi(), spec.events.clone());
    let injections = Injections {
        einj: wired.einj,
        injector: injector.clone(),
        events: spec.events.clone(),
        cpus: config.cpus,
    };
    let traps = Arc::new(Traps {
        injector,
        space,
        baton: baton.clone(),
        events: spec.events,
        stale,
        physical_bits,
        xsave: XsaveLayout::from_cpuid(&first),
    });
    Ok(Built {
        vcpus,
        views,
        baton,
        ports: Arc::new(wired.ports),
        mmio: Arc::new(wired.mmio),
        traps,
        platform: wired.platform,
        console: wired.console,
        pcie: wired.pcie,
        disks,
        operations,
        memory: devices,
        errors,
        boot_errors,
        injections,
        _ram_slots: ram_slots,
        counts,
        tables,
    })
}

/// One anonymous file holds all RAM, so that every line of it can be poisoned and every device reach it.
fn map_ram(vm: &Vm, space: &AddressSpace, ranges: &[Range<u64>]) -> Result<Vec<Slot>, BuildError> {
    let file = backing::anonymous(c"aconite-ram", ranges.iter().map(|r| r.end - r.start).sum())?;
    let mut offset = 0;
    let mut slots = Vec::new();
    for range in ranges {
        let len = range.end - range.start;
        let file: File = file
            .try_clone()
            .map_err(|source| BackingError::Open { path: Path::new("aconite-ram").to_owned(), source })?;
        let backing = Backing { file, offset, writable: true };
        let region = Arc::new(Region::new("ram", RegionKind::Ram, range.start, len, backing)?);
        space.insert(region.clone())?;
        slots.push(vm.map(&region)?);
        offset += len;
    }
    Ok(slots)
}

/// The time since now.
pub(super) fn monotonic_clock() -> Clock {
    let start = Instant::now();
    Arc::new(move || start.elapsed())
}
