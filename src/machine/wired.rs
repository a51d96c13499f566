//! The devices at fixed places, and the buses that lead to them.

use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aconite_acpi::layout as fixed;
use aconite_devices::bus::{Bus, DeviceId};
use aconite_devices::clock::Clock;
use aconite_devices::dma::Dma;
use aconite_devices::einj::Einj;
use aconite_devices::ghes::ErrorSources;
use aconite_devices::nvdimm::{FlushHint, UnitTable, Units};
use aconite_devices::pci::{
    BarWindows, DevFn, Ecam, HostBridge, HotplugBridges, HotplugBridgesState, PciBus, PciRoot, PciWindow,
    SlotKind, assign_bars,
};
use aconite_devices::platform::Platform;
use aconite_devices::pm_timer::{PmTimer, Width};
use aconite_devices::reset_control::{self, ResetControl};
use aconite_devices::rtc::Rtc;
use aconite_devices::serial::Serial;
use aconite_devices::virtio::console::Console;
use aconite_devices::virtio::{VirtioPci, Wiring};

use super::build::{BuildError, monotonic_clock};
use super::console::ConsoleSink;
use super::pcie::Pcie;
use super::plan::Plan;
use crate::config;
use crate::kvm::Vm;

/// The console's device id; ids name devices in effects.
pub const CONSOLE: DeviceId = DeviceId(1);
const HOST_BRIDGE: DeviceId = DeviceId(0);

/// The devices of a machine that are always there.
pub struct Wired {
    /// Devices behind ports.
    pub ports: Bus,
    /// Devices in memory.
    pub mmio: Bus,
    /// The platform page.
    pub platform: Arc<Mutex<Platform>>,
    /// The agent's console.
    pub console: Arc<Mutex<VirtioPci<Console>>>,
    /// PCI Express ports and host bridges, with nothing behind them yet.
    pub pcie: Arc<Mutex<Pcie>>,
    /// Error sources of the firmware.
    pub errors: Arc<Mutex<ErrorSources>>,
    /// Error injection by the firmware.
    pub einj: Arc<Mutex<Einj>>,
}

impl Wired {
    /// Makes them, at the places that `plan` and [`fixed`] name.
    ///
    /// # Errors
    /// Two are at one place, or a PCI window is full.
    pub fn new(
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
