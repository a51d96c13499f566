//! The memory devices of a machine: which are there, which have gone, and what can be done to them.
//!
//! How they come is in [`super::arrival`], how they go in [`super::plug`]. What changes maps or slots takes a [`crate::kvm::Held`]: the caller shows
//! that no vCPU runs.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use aconite_acpi::Persistence;
use aconite_acpi::platform::{EventTarget, FirmwareEvent, notify};
use aconite_devices::bus::lock;
use aconite_devices::dma::Dma;
use aconite_devices::nvdimm::{Dimm, UnitError, UnitTable};
use aconite_devices::platform::Platform;
use aconite_devices::virtio::TransportError;
use thiserror::Error;

use super::build::monotonic_clock;
use super::dimm::DimmError;
use super::operations::Operations;
use super::pcie::{Pcie, PcieError};
use super::removal::Removal;
use super::topology::Seat;
use super::virtio_pmem::{Card, Surroundings};
use crate::command::{
    DeviceState, Error, ErrorCode, Event, EventBus, MemoryDevice, MemoryKind, NotifyKind, StaleAnswer,
    StaleState,
};
use crate::config::{Channel, Pmem, PmemSource, Unflushed, Via};
use crate::fault::StaleLog;
use crate::kvm::{Baton, KvmError, Slot, Vm};
use crate::memory::backing::BackingError;
use crate::memory::{AddressSpace, GuardError, LINE_SIZE, MapError, Region, SpaceError};
use crate::sidefile::SideFileError;
use crate::workers::Outbox;

/// Persistence that the platform capabilities promise of these devices: a store is durable once it has left the CPU
/// cache for the file's page, and the flush hint writes that back; or nothing, where only a flush makes it durable.
pub fn persistence<'a>(devices: impl IntoIterator<Item = &'a Pmem>) -> Persistence {
    match devices.into_iter().any(|pmem| pmem.unflushed == Unflushed::Drop) {
        true => Persistence::Unspecified,
        false => Persistence::MemoryController,
    }
}

/// First kernel whose nfit driver does not let go when its container departs.
const FIRST_WITHOUT_CONTAINER: (u32, u32) = (7, 0);

/// Why a memory device could not be added.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// Its file.
    #[error(transparent)]
    Backing(#[from] BackingError),
    /// Its map.
    #[error(transparent)]
    Map(#[from] MapError),
    /// Its place.
    #[error(transparent)]
    Space(#[from] SpaceError),
    /// Its memslot.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Its firmware.
    #[error(transparent)]
    Unit(#[from] UnitError),
    /// Its DIMM.
    #[error(transparent)]
    Dimm(#[from] DimmError),
    /// The poison of the last run.
    #[error("Cannot poison what was poisoned in the last run")]
    Poison(#[from] GuardError),
    /// What it keeps beside its data.
    #[error(transparent)]
    SideFile(#[from] SideFileError),
    /// Its PCI function.
    #[error(transparent)]
    Virtio(#[from] TransportError),
    /// Its slot.
    #[error(transparent)]
    Pcie(#[from] PcieError),
    /// Its thread.
    #[error(
        "Cannot start the thread of a virtio-pmem device: the host has no more threads or file descriptors"
    )]
    Thread(#[from] io::Error),
}

/// Where a range of a unit may be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    /// Guest-physical addresses.
    pub range: Range<u64>,
    /// Proximity domain.
    pub node: u32,
    /// The unit whose range is there.
    pub unit: usize,
    /// How the guest is told of what is there.
    pub via: Via,
}

/// A device, present or departed.
#[derive(Debug)]
pub(super) struct Device {
    /// Its id.
    pub(super) id: String,
    pub(super) pmem: Pmem,
    /// Index of its firmware.
    pub(super) unit: usize,
    /// Index of its window.
    pub(super) window: usize,
    /// Where it stands.
    pub(super) state: DeviceState,
    /// Its memory.
    pub(super) region: Arc<Region>,
    /// The DIMMs whose state it keeps.
    pub(super) dimms: Vec<Arc<Dimm>>,
    /// All DIMMs that it lies on.
    pub(super) seats: Vec<Seat>,
    /// What the guest finds behind a port or a host bridge.
    pub(super) card: Option<Card>,
    pub(super) _slot: Slot,
    /// How it can be removed.
    pub(super) channel: Channel,
    /// The channel of its last removal.
    pub(super) left_by: Option<Channel>,
}

/// All memory devices of a machine.
#[derive(Debug)]
pub struct MemoryDevices {
    pub(super) vm: Arc<Vm>,
    /// Where everything lies.
    pub(super) space: Arc<AddressSpace>,
    pub(super) units: Arc<UnitTable>,
    pub(super) baton: Arc<Baton>,
    /// The event stream.
    pub(super) events: EventBus,
    pub(super) stale: Arc<StaleLog>,
    pub(super) windows: Vec<Window>,
    /// DIMMs that each unit has room for.
    pub(super) dimms_of_unit: Vec<u32>,
    pub(super) pcie: Arc<Mutex<Pcie>>,
    pub(super) cards: Surroundings,
    /// Where goes what the threads of cards leave to do; known once the machine runs.
    pub(super) send: Option<Outbox>,
    kernel: Option<(u32, u32)>,
    pub(super) devices: Vec<Device>,
    /// Memory without a file, kept under the device's id so that a reboot finds it again.
    pub(super) anonymous: HashMap<String, File>,
    pub(super) operations: Operations,
    /// Removals under way, by unit.
    pub(super) removals: BTreeMap<usize, Removal>,
    /// Units with scrubs of whose end the guest is to be told.
    pub(super) scrubbed: BTreeSet<u32>,
}

/// What [`MemoryDevices`] needs of the machine.
#[derive(Debug)]
pub struct Parts {
    /// The virtual machine.
    pub vm: Arc<Vm>,
    /// Its address space.
    pub space: Arc<AddressSpace>,
    /// The firmware's units.
    pub units: Arc<UnitTable>,
    /// Stops the vCPUs.
    pub baton: Arc<Baton>,
    /// The event stream.
    pub events: EventBus,
    /// Accesses to departed memory.
    pub stale: Arc<StaleLog>,
    /// Places for units.
    pub windows: Vec<Window>,
    /// DIMMs that each NFIT unit has room for.
    pub dimms_of_unit: Vec<u32>,
    /// Ports and host bridges for devices.
    pub pcie: Arc<Mutex<Pcie>>,
    /// Guest memory, as devices reach it.
    pub dma: Dma,
    /// Where operations are kept.
    pub operations: Operations,
    /// The guest kernel's version, where its image says.
    pub kernel: Option<String>,
}

impl MemoryDevices {
    /// No devices yet.
    pub fn new(parts: Parts) -> Self {
        let cards = Surroundings {
            dma: parts.dma,
            msi: parts.vm.msi(),
            io_events: parts.vm.io_events(),
            events: parts.events.clone(),
            clock: monotonic_clock(),
        };
        Self {
            pcie: parts.pcie,
            cards,
            send: None,
            vm: parts.vm,
            space: parts.space,
            units: parts.units,
            baton: parts.baton,
            events: parts.events,
            stale: parts.stale,
            windows: parts.windows,
            dimms_of_unit: parts.dimms_of_unit,
            kernel: parts.kernel.as_deref().and_then(major_minor),
            devices: Vec::new(),
            anonymous: HashMap::new(),
            operations: parts.operations,
            removals: BTreeMap::new(),
            scrubbed: BTreeSet::new(),
        }
    }

    /// Starts the threads of all cards; what they leave to do goes to `send`.
    pub fn start(&mut self, send: Outbox) -> io::Result<()> {
        let mut cards = self.devices.iter_mut().filter_map(|device| device.card.as_mut());
        cards.try_for_each(|card| card.start(&send))?;
        self.send = Some(send);
        Ok(())
    }

    /// Ends the threads of all cards.
    pub fn stop(&mut self) {
        self.devices.iter_mut().filter_map(|device| device.card.as_mut()).for_each(Card::stop);
    }

    /// Windows of NFIT units in which there is no device, or one that has departed.
    pub fn free_windows(&self) -> usize {
        let there = self.devices.iter().filter(|device| device.state != DeviceState::Departed);
        let taken = there.filter(|device| device.pmem.via == Via::Nfit).count();
        self.windows.iter().filter(|window| window.via == Via::Nfit).count() - taken
    }

    /// All devices.
    pub fn list(&self) -> Vec<MemoryDevice> {
        self.devices.iter().map(|device| self.describe(device)).collect()
    }

    /// One device.
    pub fn show(&self, id: &str) -> Result<MemoryDevice, Error> {
        Ok(self.describe(self.find(id)?))
    }

    /// What touching a device does once it has departed, changed before if it is asked to.
    pub fn stale(&self, id: &str, answer: Option<StaleAnswer>) -> Result<StaleState, Error> {
        let device = self.find(id)?;
        if let Some(answer) = answer {
            device.region.set_stale_answer(answer);
        }
        Ok(StaleState {
            device: id.to_owned(),
            answer: device.region.stale_answer(),
            accesses: self.stale.total(id),
        })
    }

    /// Sends a notification to the firmware device that `kind` belongs to.
    pub fn notify(&self, platform: &Mutex<Platform>, id: &str, kind: NotifyKind) -> Result<(), Error> {
        let device = self.present(id)?;
        if device.pmem.via != Via::Nfit {
            return Err(Error::new(
                ErrorCode::NotSupported,
                format!("{id} has no firmware that could notify (via={})", device.pmem.via.name()),
                "notify an NVDIMM (via=nfit), or raise a machine check",
            ));
        }
        let unit = device.unit as u32;
        let target = match kind {
            NotifyKind::Uncorrectable | NotifyKind::Update | NotifyKind::ArsStopped => {
                EventTarget::Root(unit)
            }
            NotifyKind::Health => EventTarget::Dimm { unit, dimm: 0 },
        };
        lock(platform).push(FirmwareEvent { target, code: kind.code() });
        self.events.publish(Event::NotifySent { device: id.to_owned(), kind });
        Ok(())
    }

    /// Sends a notification that the firmware's model asks for.
    pub fn announce(&self, platform: &Mutex<Platform>, event: FirmwareEvent) {
        lock(platform).push(event);
        let (unit, kind) = match event.target {
            EventTarget::Root(unit) if event.code == notify::ARS_STOPPED => (unit, NotifyKind::ArsStopped),
            EventTarget::Root(unit) => (unit, NotifyKind::Uncorrectable),
            EventTarget::Dimm { unit, .. } => (unit, NotifyKind::Health),
            EventTarget::Container(_) | EventTarget::ErrorDevice | EventTarget::HostBridge(_) => return,
        };
        if let Some(device) = self.devices.iter().find(|device| device.unit == unit as usize) {
            self.events.publish(Event::NotifySent { device: device.id.clone(), kind });
        }
    }

    /// Tells every DIMM that its power will go.
    pub fn power_off(&self) {
        for device in self.devices.iter().filter(|device| device.state == DeviceState::Present) {
            if let Err(error) = device.dimms.iter().try_for_each(|dimm| dimm.power_off()) {
                tracing::error!(%error, device = device.id, "the next start will be told of an unsafe shutdown");
            }
        }
    }

    /// The unit of the device with this id, if it is a card that has not departed.
    pub fn unit_of_card(&self, id: &str) -> Option<usize> {
        let its = |device: &&Device| {
            device.id == id && device.card.is_some() && device.state != DeviceState::Departed
        };
        self.devices.iter().find(its).map(|device| device.unit)
    }

    /// The ids of all devices, and the names of their buses.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.devices
            .iter()
            .flat_map(|device| [Some(&device.id), device.pmem.bus.as_ref()])
            .flatten()
            .map(String::as_str)
    }

    /// The first of p0, p1, … that no device has.
    pub fn free_id(&self) -> String {
        (0..=self.devices.len())
            .map(|n| format!("p{n}"))
            .find(|id| self.devices.iter().all(|d| d.id != *id))
            .unwrap_or_default()
    }

    fn describe(&self, device: &Device) -> MemoryDevice {
        MemoryDevice {
            id: device.id.clone(),
            kind: MemoryKind::Pmem,
            state: device.state,
            gpa: device.region.gpa().into(),
            size: device.region.len(),
            via: device.pmem.via,
            channel: device.channel,
            no_channel_because: (device.channel == Channel::None).then(|| self.no_channel(device).message),
            node: self.windows[device.window].node,
            readonly: device.pmem.readonly,
            file: match &device.pmem.source {
                PmemSource::File { path, .. } => Some(path.display().to_string()),
                PmemSource::Memory(_) => None,
            },
            poisoned: device.region.poisoned_lines() * LINE_SIZE,
            stale_accesses: self.stale.total(&device.id),
            locked: device.region.locked(),
            bus: device.pmem.bus.clone(),
            range: (device.pmem.via == Via::Nfit).then(|| device.pmem.range.name().to_owned()),
            dimms: device.seats.iter().map(Seat::describe).collect(),
        }
    }

    /// The channel of a device that names none.
    pub(super) fn default_channel(&self, via: Via) -> Channel {
        match self.kernel {
            _ if via == Via::Virtio => Channel::Pcie,
            _ if via == Via::E820 => Channel::None,
            Some(version) if version >= FIRST_WITHOUT_CONTAINER => Channel::None,
            _ => Channel::Container,
        }
    }

    /// Why a device cannot be removed.
    pub(super) fn no_channel(&self, device: &Device) -> Error {
        match self.kernel {
            _ if device.pmem.via == Via::E820 => Error::new(
                ErrorCode::NotSupported,
                format!(
                    "{} cannot be removed: the E820 map says that it is there, and is read once",
                    device.id
                ),
                "use a device with via=nfit or via=virtio",
            ),
            Some((major, minor)) if device.pmem.channel.is_none() => Error::new(
                ErrorCode::NotSupported,
                format!(
                    "{} cannot be removed: the nfit driver of the guest's Linux {major}.{minor} does not let go when its container departs (7.0 and newer)",
                    device.id
                ),
                "let the agent unbind the driver in the guest (via=agent), or name via=container to do it all the same; a device that begins with via=virtio goes on every kernel",
            ),
            _ => Error::new(
                ErrorCode::NotSupported,
                format!("{} was declared with channel=none", device.id),
                "name another channel (via), or give it one when the machine starts",
            ),
        }
    }

    /// The device with this id.
    pub(super) fn find(&self, id: &str) -> Result<&Device, Error> {
        self.devices.iter().find(|d| d.id == id).ok_or_else(|| {
            Error::no_such_device(id, &self.devices.iter().map(|d| d.id.as_str()).collect::<Vec<_>>())
        })
    }

    /// The device with this id, if it is present.
    pub(super) fn present(&self, id: &str) -> Result<&Device, Error> {
        let device = self.find(id)?;
        if device.state == DeviceState::Present {
            return Ok(device);
        }
        Err(Error::new(
            ErrorCode::WrongDeviceState,
            format!("{id} is {}", device.state.name()),
            format!("insert a device in its place (at={id}), or name one that is present"),
        ))
    }
}

/// Bytes of a window.
pub(super) fn length(window: &Window) -> u64 {
    window.range.end - window.range.start
}

/// Major and minor number of a kernel release such as `6.12.95+deb12-cloud-amd64`.
fn major_minor(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_releases_are_understood() {
        assert_eq!(major_minor("6.12.95+deb12-cloud-amd64"), Some((6, 12)));
        assert_eq!(major_minor("7.2-rc1"), Some((7, 2)));
        assert_eq!(major_minor("unknown"), None);
    }
}
