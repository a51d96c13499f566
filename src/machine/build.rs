//! Putting a machine together: memory, firmware tables, devices, vCPUs, kernel.

use std::fs::File;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use aconite_acpi::layout as fixed;
use aconite_acpi::{
    AddressRange, Description, HostBridges, MemoryRange, NvdimmUnit, Processor, Tables, UnitSlot, UnitWindow,
};
use aconite_devices::bus::{Bus, BusError, DeviceId};
use aconite_devices::clock::Clock;
use aconite_devices::dma::{Dma, DmaError};
use aconite_devices::einj::Einj;
use aconite_devices::erst::Erst;
use aconite_devices::ghes::ErrorSources;
use aconite_devices::nvdimm::{FlushHint, UnitTable, Units};
use aconite_devices::pci::{
    BarWindows, DevFn, Ecam, HostBridge, HotplugBridges, HotplugBridgesState, PciBus, PciError, PciRoot,
    PciWindow, SlotKind, assign_bars,
};
use aconite_devices::platform::Platform;
use aconite_devices::pm_timer::{PmTimer, Width};
use aconite_devices::reset_control::{self, ResetControl};
use aconite_devices::rtc::Rtc;
use aconite_devices::serial::Serial;
use aconite_devices::virtio::console::Console;
use aconite_devices::virtio::{TransportError, VirtioPci, Wiring};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryError};

use super::arrival::{Arrival, NotAdded, When};
use super::bad_ram::{self, BadRamError};
use super::boot_errors::{BootErrors, BootErrorsError};
use super::console::ConsoleSink;
use super::disk::{DiskError, Disks, Surroundings};
use super::dma::DevicePoison;
use super::errors::Errors;
use super::injection::Injections;
use super::memory::{self, MemoryDevices, Parts, Window};
use super::operations::Operations;
use super::pcie::{Pcie, PcieError};
use super::records;
use super::topology::{Member, Topology};
use crate::boot::{self, BootError, Image};
use crate::command::EventBus;
use crate::config::{self, CheckedPmem, ConfigError, Place, Via};
use crate::fault::{Injector, StaleLog, Traps};
use crate::host::probe;
use crate::kvm::{Baton, ExitCounts, KvmError, Slot, Vcpu, VcpuView, Vm};
use crate::layout::{Layout, LayoutError, UnitRequest};
use crate::memory::backing::{self, BackingError};
use crate::memory::{AddressSpace, Backing, MapError, Region, RegionKind, SpaceError};
use crate::state::{State, StateError};
use crate::x86::cpuid::{self, CpuidConfig, Vendor};
use crate::x86::mca::McaState;
use crate::x86::xstate::XsaveLayout;

/// The console's device id; ids name devices in effects.
pub const CONSOLE: DeviceId = DeviceId(1);
const HOST_BRIDGE: DeviceId = DeviceId(0);
/// Address bits of a machine that is only described: what the software KVM host has.
const DEFAULT_ADDRESS_BITS: u8 = 40;
/// Proximity domain of processors and RAM.
const SYSTEM_NODE: u32 = 0;

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

/// What of a machine is placed where, before anything is made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// RAM.
    pub ram: Vec<Range<u64>>,
    /// Places of memory devices, then the free ones.
    pub windows: Vec<Window>,
    /// DIMMs that each NFIT unit has room for.
    pub dimms: Vec<u32>,
    /// The 64-bit PCI window of the host bridge that is always there.
    pub pci64: Range<u64>,
    /// Where the windows of those are that come and go.
    pub host_bridges: Range<u64>,
}

impl Plan {
    /// The plan of a machine whose devices have the sizes `pmem`.
    pub fn new(
        config: &config::Machine,
        pmem: &[CheckedPmem],
        address_bits: u8,
    ) -> Result<Self, LayoutError> {
        let mut requests: Vec<_> = config
            .pmem
            .iter()
            .zip(pmem)
            .map(|(device, checked)| UnitRequest {
                size: checked.size.bytes(),
                at: match device.at {
                    Some(Place::Address(address)) => Some(address.0),
                    _ => None,
                },
            })
            .collect();
        let free = UnitRequest { size: config.slots.size.bytes(), at: None };
        let slots = config.slots;
        requests.extend((0..slots.nfit + slots.pcie + slots.bridge).map(|_| free));
        let layout = Layout::plan(config.memory.bytes(), &requests, address_bits)?;
        let chosen = config.pmem.iter().map(|device| device.node);
        let mut next = 1 + chosen.clone().flatten().max().unwrap_or(SYSTEM_NODE);
        let mut nodes: Vec<_> = chosen.collect();
        nodes.resize(requests.len(), None);
        let mut units = config.units();
        let nfit = config.nfit_units();
        units.extend(nfit - slots.nfit..nfit);
        let cards = config.ports() + config.host_bridges();
        let free_cards = slots.pcie + slots.bridge;
        units.extend(nfit + cards - free_cards..nfit + cards);
        // Ports may be for anything: what memory may come behind the free ones shares a domain.
        let first_free_card = requests.len() - free_cards as usize;
        let mut of_free_cards = None;
        let windows: Vec<_> = layout
            .units
            .into_iter()
            .zip(nodes)
            .zip(units)
            .enumerate()
            .map(|(index, ((range, node), unit))| {
                let mut new = || {
                    next += 1;
                    next - 1
                };
                let node = match node {
                    Some(node) => node,
                    None if index >= first_free_card => *of_free_cards.get_or_insert_with(new),
                    None => new(),
                };
                let via = match unit {
                    unit if unit < nfit => Via::Nfit,
                    unit if unit < nfit + cards => Via::Virtio,
                    _ => Via::E820,
                };
                Window { range, node, unit: unit as usize, via }
            })
            .collect();
        let Range { start, end } = layout.pci64;
        let of_bridges = if config.host_bridges() > 0 { end - (end - start) / 4 } else { end };
        let (pci64, host_bridges) = (start..of_bridges, of_bridges..end);
        let mut plan = Self { ram: layout.ram, windows, dimms: Vec::new(), pci64, host_bridges };
        plan.dimms = plan
            .arrivals(config, pmem)
            .iter()
            .take(nfit as usize)
            .map(|arrivals| {
                let dimms = plan.topology(arrivals).map_or(0, |topology| topology.firmware.dimms.len());
                config.slots.dimms.max(dimms as u32)
            })
            .collect();
        Ok(plan)
    }

    /// What the E820 map says of memory devices.
    pub fn e820(&self, config: &config::Machine, pmem: &[CheckedPmem]) -> Vec<(Range<u64>, u32)> {
        let devices = config.pmem.iter().zip(pmem).zip(&self.windows);
        devices
            .filter(|((device, _), _)| device.via == Via::E820)
            .map(|((device, checked), window)| {
                let start = window.range.start;
                (start..start + checked.size.bytes(), device.e820.number())
            })
            .collect()
    }

    /// The devices that are there at boot, by unit; the units of free slots have none.
    pub fn arrivals<'a>(&self, config: &'a config::Machine, pmem: &[CheckedPmem]) -> Vec<Vec<Arrival<'a>>> {
        let units = self.windows.iter().map(|window| window.unit + 1).max().unwrap_or(0);
        let mut arrivals = vec![Vec::new(); units];
        for (window, (pmem, checked)) in config.pmem.iter().zip(pmem).enumerate() {
            arrivals[self.windows[window].unit].push(Arrival { pmem, checked: *checked, window });
        }
        arrivals
    }

    /// The topology of the unit that arrives; none if nothing does.
    fn topology(&self, arrivals: &[Arrival<'_>]) -> Option<Topology> {
        let unit = self.windows[arrivals.first()?.window].unit;
        let members: Vec<_> = arrivals
            .iter()
            .map(|&Arrival { pmem, checked, window }| Member {
                pmem,
                size: checked.size.bytes(),
                window: &self.windows[window],
            })
            .collect();
        Some(Topology::of(unit as u32, &members))
    }

    /// The firmware's description of the machine; `occupants` are the units that are there at boot.
    pub fn description(&self, config: &config::Machine, memory: &MemoryPlan) -> Description {
        let range = |r: &Range<u64>| AddressRange { base: r.start, size: r.end - r.start };
        Description {
            processors: (0..config.cpus)
                .map(|cpu| Processor { apic_id: cpu as u8, proximity: SYSTEM_NODE })
                .collect(),
            memory: self
                .ram
                .iter()
                .map(|r| MemoryRange { range: range(r), proximity: SYSTEM_NODE })
                .collect(),
            pci_window64: Some(range(&self.pci64)),
            host_bridges: Some(config.host_bridges())
                .filter(|count| *count > 0)
                .map(|count| HostBridges { count, windows: range(&self.host_bridges) }),
            pci_proximity: SYSTEM_NODE,
            units: self
                .dimms
                .iter()
                .zip(memory.occupants.iter().cloned())
                .enumerate()
                .map(|(unit, (&dimms, occupant))| UnitSlot {
                    windows: self
                        .windows
                        .iter()
                        .filter(|window| window.unit == unit)
                        .map(|window| UnitWindow { range: range(&window.range), proximity: window.node })
                        .collect(),
                    dimms,
                    occupant,
                })
                .collect(),
            arrivals: self
                .windows
                .iter()
                .filter(|window| window.via != Via::Nfit)
                .map(|window| MemoryRange { range: range(&window.range), proximity: window.node })
                .collect(),
            persistence: memory.persistence,
            pm_timer: config.cpu.pm_timer,
        }
    }
}

/// What the firmware tables say of memory devices.
#[derive(Clone, Debug)]
pub struct MemoryPlan {
    /// What is in each NFIT unit at boot.
    pub occupants: Vec<Option<NvdimmUnit>>,
    /// How far stores must get.
    pub persistence: aconite_acpi::Persistence,
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
    let occupants = plan
        .arrivals(config, pmem)
        .iter()
        .take(plan.dimms.len())
        .map(|arrivals| plan.topology(arrivals).map(|topology| topology.firmware))
        .collect();
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
    let mut wired = Devices::new(&vm, config, &plan, dma.clone(), units.clone(), spec.console)?;
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

struct Devices {
    ports: Bus,
    mmio: Bus,
    platform: Arc<Mutex<Platform>>,
    console: Arc<Mutex<VirtioPci<Console>>>,
    pcie: Arc<Mutex<Pcie>>,
    errors: Arc<Mutex<ErrorSources>>,
    einj: Arc<Mutex<Einj>>,
}

impl Devices {
    fn new(
        vm: &Vm,
        config: &config::Machine,
        plan: &Plan,
        dma: Dma,
        units: Arc<UnitTable>,
        console: ConsoleSink,
    ) -> Result<Self, BuildError> {
        let mut ports = Bus::new();
        let serial = Serial::new(vm.line(fixed::SERIAL_GSI), Box::new(console));
        ports.insert("serial", fixed::SERIAL_PORT.into(), Serial::SIZE, Arc::new(Mutex::new(serial)))?;
        let rtc = Rtc::new(wall_clock());
        ports.insert("rtc", fixed::RTC_PORT.into(), Rtc::SIZE, Arc::new(Mutex::new(rtc)))?;
        let reset = ResetControl::default();
        ports.insert("reset", reset_control::PORT.into(), 1, Arc::new(Mutex::new(reset)))?;
        if config.cpu.pm_timer {
            let timer = PmTimer::new(monotonic_clock(), Width::Bits32);
            ports.insert(
                "pm-timer",
                fixed::PM_TIMER_PORT.into(),
                PmTimer::SIZE,
                Arc::new(Mutex::new(timer)),
            )?;
        }

        let mut mmio = Bus::new();
        let platform = Arc::new(Mutex::new(Platform::new(vm.line(fixed::GED_GSI))));
        mmio.insert("platform", fixed::PLATFORM_BASE, fixed::PLATFORM_SIZE, platform.clone())?;
        let errors = Arc::new(Mutex::new(ErrorSources::new(dma.named("error-sources"))?));
        mmio.insert("ghes", fixed::GHES_REGISTERS, ErrorSources::SIZE, errors.clone())?;
        let registers = Units::new(units.clone(), dma.named("nvdimm"));
        mmio.insert("nvdimm", fixed::UNIT_BASE, Units::SIZE, Arc::new(Mutex::new(registers)))?;
        for unit in 0..plan.dimms.len() as u32 {
            let hint = FlushHint::new(units.clone(), unit);
            let name = format!("flush-hint{unit}");
            mmio.insert(&name, fixed::flush_base(unit), fixed::FLUSH_SIZE, Arc::new(Mutex::new(hint)))?;
        }

        let einj = Arc::new(Mutex::new(Einj::new(dma.named("einj"))));
        mmio.insert("einj", fixed::EINJ_REGISTERS, Einj::SIZE, einj.clone())?;

        let root = PciRoot::new();
        root.insert(PciBus::Root(0), DevFn::new(0, 0), HOST_BRIDGE, Arc::new(Mutex::new(HostBridge::new())))?;
        let wiring = Wiring { id: CONSOLE, dma: dma.named("console"), msi: vm.msi(), express: None };
        let console = Console::new([aconite_agent::protocol::PORT_NAME]);
        let console = Arc::new(Mutex::new(VirtioPci::new(console, wiring)?));
        root.insert(PciBus::Root(0), DevFn::new(1, 0), CONSOLE, console.clone())?;
        let kind = if config.slots.button { SlotKind::Button } else { SlotKind::Plain };
        let Range { start, end } = plan.host_bridges;
        let bridges = HotplugBridgesState::new(((end - start) / fixed::HOST_BRIDGE_WINDOW) as u32);
        let registers = Arc::new(Mutex::new(HotplugBridges::new(bridges.clone())));
        mmio.insert("host-bridges", fixed::HOST_BRIDGE_BASE, HotplugBridges::SIZE, registers)?;
        let host_bridges = config.host_bridges();
        let pcie = Pcie::new(root.clone(), config.ports(), kind, host_bridges, bridges, &vm.msi())?;
        let low = fixed::PCI_MMIO32_BASE..fixed::PCI_MMIO32_BASE + fixed::PCI_MMIO32_SIZE;
        assign_bars(&root, BarWindows { low: low.clone(), high: plan.pci64.clone() })?;
        let of_bridges = ("pci64-bridges", plan.host_bridges.clone());
        let of_bridges = (!plan.host_bridges.is_empty()).then_some(of_bridges);
        for (name, range) in [("pci32", low), ("pci64", plan.pci64.clone())].into_iter().chain(of_bridges) {
            let window = PciWindow::new(root.clone(), range.start);
            mmio.insert(name, range.start, range.end - range.start, Arc::new(Mutex::new(window)))?;
        }
        mmio.insert("ecam", fixed::ECAM_BASE, fixed::ECAM_SIZE, Arc::new(Mutex::new(Ecam::new(root))))?;
        Ok(Self { ports, mmio, platform, console, pcie: Arc::new(Mutex::new(pcie)), errors, einj })
    }
}

fn wall_clock() -> Clock {
    Arc::new(|| SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO))
}

/// The time since now.
pub(super) fn monotonic_clock() -> Clock {
    let start = Instant::now();
    Arc::new(move || start.elapsed())
}
