//! The disks of a machine, each behind a port of its own: how they are built, what is asked of them, and what they tell.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use aconite_devices::bus::{DeviceId, Effects, lock};
use aconite_devices::clock::Clock;
use aconite_devices::dma::Dma;
use aconite_devices::irq::MsiSink;
use aconite_devices::pci::PortType;
use aconite_devices::virtio::blk::{
    Action, Armed, Blk, End, Fault, Held, Job, Notice, Operation, Order, Parts, Pattern, Release,
    ReleaseError, Request, SECTOR, Status, Storage, Transfer, What, Witness,
};
use aconite_devices::virtio::{MAX_FAULTS, TransportError, VirtioPci, Wiring};
use thiserror::Error;

use super::doorbells;
use super::operations::Operations;
use super::pcie::{At, Card, CardKind, Pcie, PcieError};
use super::removal::Removal;
use crate::command::{
    DeviceState, DiskAction, DiskArmed, DiskCommand, DiskDisarmed, DiskFault, DiskHeldRequest, DiskInfo,
    DiskList, DiskOperation, DiskOrder, DiskOutcome, DiskPattern, DiskRelease, DiskReleased, DiskReply,
    DiskRequest, DiskStatus, DiskTransfer, Error, ErrorCode, Event, EventBus, SectorRange,
};
use crate::config::{self, CheckedPmem, PmemSource};
use crate::disk::FileStorage;
use crate::kvm::IoEvents;
use crate::memory::backing::{self, BackingError};
use crate::memory::{AddressSpace, RegionKind};
use crate::units::{ByteRange, TimeSpan};
use crate::workers::{Outbox, Pool, Workers};

/// Most threads of a disk: more wait for the same storage.
const MAX_WORKERS: u32 = 4;

/// Why there is no disk.
#[derive(Debug, Error)]
pub enum DiskError {
    /// Its file.
    #[error(transparent)]
    Backing(#[from] BackingError),
    /// Its function.
    #[error(transparent)]
    Virtio(#[from] TransportError),
    /// Its port.
    #[error(transparent)]
    Port(#[from] PcieError),
    /// Its threads, and what they wait for.
    #[error("Cannot start the threads of a disk: the host has no more threads or file descriptors")]
    Threads(#[from] io::Error),
}

/// What disks need of the machine.
pub struct Surroundings {
    /// Guest memory.
    pub dma: Dma,
    /// Where interrupts go.
    pub msi: Arc<dyn MsiSink>,
    /// Where notifications come from.
    pub io_events: IoEvents,
    /// What is where.
    pub space: Arc<AddressSpace>,
    /// The event stream.
    pub events: EventBus,
    /// Number of vCPUs.
    pub cpus: u32,
    /// What delays are measured by.
    pub clock: Clock,
    /// Ports.
    pub pcie: Arc<Mutex<Pcie>>,
    /// Where operations are kept.
    pub operations: Operations,
}

/// A disk.
pub(super) struct Disk {
    pub(super) config: config::Disk,
    pub(super) state: DeviceState,
    pub(super) size: u64,
    function: Arc<Mutex<VirtioPci<Blk>>>,
    workers: Workers<Job>,
    storage: Arc<dyn Storage>,
    pool: Option<Pool<Job>>,
    teller: Teller,
}

/// The disks of a machine, but for those that have departed: nothing is left of a disk.
pub struct Disks {
    pub(super) list: Vec<Disk>,
    pub(super) around: Surroundings,
    /// Removals under way, by disk.
    pub(super) removals: BTreeMap<String, Removal>,
    /// Known once the machine runs.
    send: Option<Outbox>,
}

impl Disks {
    /// Makes the disks of a machine and puts them behind ports; their threads are still to be started.
    pub fn new(
        disks: &[config::Disk],
        checked: &[CheckedPmem],
        around: Surroundings,
    ) -> Result<Self, DiskError> {
        let mut all = Self { list: Vec::new(), around, removals: BTreeMap::new(), send: None };
        for (config, checked) in disks.iter().zip(checked) {
            let (disk, card) = all.make(config, *checked)?;
            lock(&all.around.pcie).install(card, At::Port)?;
            all.list.push(disk);
        }
        Ok(all)
    }

    /// A disk, and what of it goes into a slot.
    fn make(&self, config: &config::Disk, checked: CheckedPmem) -> Result<(Disk, Card), DiskError> {
        let device = lock(&self.around.pcie).name_card();
        let disk = Disk::new(device, config, checked, &self.around)?;
        let card = Card::virtio(CardKind::Disk, &config.id, device, disk.function.clone());
        Ok((disk, card))
    }

    /// Starts the threads of all disks; what they leave to do goes to `send`.
    pub fn start(&mut self, send: Outbox) -> io::Result<()> {
        self.list.iter_mut().try_for_each(|disk| disk.start(&send))?;
        self.send = Some(send);
        Ok(())
    }

    /// Adds a disk to a machine that runs, in the slot in `place` or the first free one.
    pub(super) fn add(
        &mut self,
        config: &config::Disk,
        checked: CheckedPmem,
        place: Option<usize>,
    ) -> Result<(), DiskError> {
        let (mut disk, card) = self.make(config, checked)?;
        if let Some(send) = &self.send {
            disk.start(send)?;
        }
        lock(&self.around.pcie).insert(card, At::Port, place)?;
        self.list.push(disk);
        Ok(())
    }

    /// Ends the threads of all disks. What was written reaches the host.
    pub fn stop(&mut self) {
        for disk in &mut self.list {
            disk.pool = None;
            if let Err(error) = disk.storage.flush() {
                tracing::error!(%error, disk = disk.config.id, "a disk's data could not be written back");
            }
        }
    }

    /// Whether there is a disk with this id.
    pub fn has(&self, id: &str) -> bool {
        self.list.iter().any(|disk| disk.config.id == id)
    }

    /// The ids of all disks.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.list.iter().map(|disk| disk.config.id.as_str())
    }

    /// Does what is asked; what that leaves to do in the machine goes to `effects`.
    pub fn execute(&self, command: &DiskCommand, effects: &mut Effects) -> Result<DiskReply, Error> {
        Ok(match command {
            DiskCommand::List => {
                DiskReply::List(DiskList { disks: self.list.iter().map(Disk::info).collect() })
            }
            DiskCommand::Show { device } => DiskReply::Disk(self.find(device)?.info()),
            DiskCommand::Arm { device, fault } => DiskReply::Armed(self.find(device)?.arm(fault)?),
            DiskCommand::Disarm { device, fault } => DiskReply::Disarmed(self.find(device)?.disarm(*fault)?),
            DiskCommand::Release { device, release } => {
                DiskReply::Released(self.find(device)?.release(release, effects)?)
            }
        })
    }

    pub(super) fn find(&self, device: &str) -> Result<&Disk, Error> {
        self.list.iter().find(|disk| disk.config.id == device).ok_or_else(|| {
            let known: Vec<_> = self.names().collect();
            let remedy = if known.is_empty() {
                "the machine has no disks: give it one with --disk".to_owned()
            } else {
                format!("name one of: {}", known.join(", "))
            };
            Error::new(ErrorCode::NoSuchDevice, format!("There is no disk {device:?}"), remedy)
        })
    }
}

impl Disk {
    fn new(
        id: DeviceId,
        disk: &config::Disk,
        checked: CheckedPmem,
        around: &Surroundings,
    ) -> Result<Self, DiskError> {
        let size = checked.size.bytes();
        let file = match &disk.source {
            PmemSource::Memory(_) => backing::anonymous(c"aconite-disk", size)?,
            PmemSource::File { path, .. } => backing::open(path, size, !disk.readonly, checked.create)?,
        };
        let workers = Workers::new(around.clock.clone())?;
        let teller =
            Teller { disk: disk.id.clone(), space: around.space.clone(), events: around.events.clone() };
        let dma = around.dma.named(&disk.id);
        let queues = disk.queues(around.cpus);
        let blk = Blk::new(Parts {
            name: disk.id.clone(),
            sectors: size / SECTOR,
            readonly: disk.readonly,
            queues: queues as u16,
            dma: dma.clone(),
            backend: Box::new(workers.clone()),
            witness: Arc::new(teller.clone()),
            clock: around.clock.clone(),
        });
        let wiring = Wiring { id, dma, msi: around.msi.clone(), express: Some(PortType::Endpoint) };
        let mut function = VirtioPci::new(blk, wiring)?;
        doorbells::install(&mut function, &workers, &around.io_events)?;
        let function = Arc::new(Mutex::new(function));
        let config = config::Disk { queues: Some(queues), ..disk.clone() };
        let storage = Arc::new(FileStorage::new(file));
        Ok(Self { config, state: DeviceState::Present, size, function, workers, storage, pool: None, teller })
    }

    fn start(&mut self, send: &Outbox) -> io::Result<()> {
        let count = self.config.queues.unwrap_or(1).min(MAX_WORKERS) as usize;
        let (workers, storage) = (self.workers.clone(), self.storage.clone());
        let mut buffer = Vec::new();
        let perform = move |job: &Job| job.perform(&*storage, &mut buffer);
        let name = format!("disk-{}", self.config.id);
        self.pool = Some(Pool::start(&name, workers, count, &self.function, perform, send)?);
        Ok(())
    }

    /// The disk has gone: nothing of what the guest waits for moves any more.
    pub(super) fn depart(&self) {
        lock(&self.function).depart();
    }

    fn info(&self) -> DiskInfo {
        let function = lock(&self.function);
        let disk = function.device();
        DiskInfo {
            id: self.config.id.clone(),
            state: self.state,
            size: self.size,
            readonly: self.config.readonly,
            queues: self.config.queues.unwrap_or(1),
            file: match &self.config.source {
                PmemSource::File { path, .. } => Some(path.display().to_string()),
                PmemSource::Memory(_) => None,
            },
            in_flight: disk.in_flight() as u64,
            faults: disk.faults().iter().map(|armed| self.armed(armed)).collect(),
            held: disk.held().iter().map(|held| self.held(held)).collect(),
        }
    }

    fn armed(&self, armed: &Armed) -> DiskArmed {
        DiskArmed {
            device: self.config.id.clone(),
            number: armed.number,
            fault: describe(&armed.fault),
            seen: armed.seen,
            taken: armed.taken,
        }
    }

    fn held(&self, held: &Held) -> DiskHeldRequest {
        DiskHeldRequest {
            of: self.teller.request(held.number, held.fault, &held.request),
            transfer: held.transfer.into(),
            held_ns: nanoseconds(held.waited),
            left_ns: held.left.map(nanoseconds),
        }
    }

    fn arm(&self, wanted: &DiskFault) -> Result<DiskArmed, Error> {
        let fault = self.fault(wanted)?;
        let number = lock(&self.function).device_mut().arm(fault).ok_or_else(|| {
            Error::new(
                ErrorCode::WrongDeviceState,
                format!("Disk {} has {MAX_FAULTS} faults, and no room for another", self.config.id),
                "take some away first (ctl disk disarm)",
            )
        })?;
        let device = self.config.id.clone();
        Ok(DiskArmed { device, number, fault: *wanted, seen: 0, taken: 0 })
    }

    /// The fault that is wanted, if it can ever do something.
    fn fault(&self, wanted: &DiskFault) -> Result<Fault, Error> {
        let id = &self.config.id;
        let wrong = |what: String, remedy: &str| Err(Error::new(ErrorCode::BadParameter, what, remedy));
        let DiskPattern { operation, dax, sectors, memory, skip, count } = wanted.requests;
        if count == Some(0) {
            return wrong(
                format!("A fault of {id} that takes 0 requests does nothing"),
                "give count=1 or more",
            );
        }
        let total = self.size / SECTOR;
        let range = |SectorRange { first, count }: SectorRange| {
            let end = first.checked_add(count).filter(|end| *end <= total && count > 0)?;
            Some(first..end)
        };
        let sectors = match sectors.map(|sectors| (sectors, range(sectors))) {
            None => None,
            Some((_, Some(range))) => Some(range),
            Some((SectorRange { first, count }, None)) => {
                return wrong(
                    format!("Sectors {first}+{count} are not in {id}, which has {total}"),
                    "name sectors that it has, such as 2048+8",
                );
            }
        };
        let memory = match memory.map(|memory| (memory, memory.end())) {
            None => None,
            Some((range, Some(end))) if range.length > 0 => Some(range.offset.0..end),
            Some((range, _)) => {
                return wrong(
                    format!("The range {range} is empty or wraps"),
                    "name memory, such as 0x1000+4096",
                );
            }
        };
        let action = match wanted.action {
            DiskAction::Hold { transfer } => Action::Hold(transfer.into()),
            DiskAction::Delay { time, transfer } => Action::Delay(time.0, transfer.into()),
            DiskAction::Fail { status: DiskStatus::Ok } => {
                return wrong(
                    format!("A request of {id} that fails does not end with ok"),
                    "give io_error or unsupported, or tear it after 0 bytes: that may end with ok",
                );
            }
            DiskAction::Fail { status } => Action::Fail(status.into()),
            DiskAction::Tear { bytes, status } => Action::Tear { bytes, status: status.into() },
            DiskAction::Reorder { window, .. } if window < 2 => {
                return wrong(
                    format!("{window} requests of {id} cannot be put into another order"),
                    "give a window of 2 or more",
                );
            }
            DiskAction::Reorder { window, order, seed, patience } => Action::Reorder {
                window: window as usize,
                order: order_of(order, seed),
                patience: patience.0,
            },
        };
        let pattern = Pattern { operation: operation.map(Into::into), persistent: dax, sectors, memory };
        Ok(Fault { pattern, skip, count, action })
    }

    fn disarm(&self, number: Option<u64>) -> Result<DiskDisarmed, Error> {
        let device = self.config.id.clone();
        let unwanted = |armed: &Armed| number.is_none_or(|number| armed.number == number);
        let faults = lock(&self.function).device_mut().disarm(unwanted);
        match number {
            Some(number) if faults.is_empty() => Err(Error::new(
                ErrorCode::WrongDeviceState,
                format!("Disk {device} has no fault {number}"),
                "see ctl disk list; a fault that has taken its number of requests is gone",
            )),
            _ => Ok(DiskDisarmed { device, faults }),
        }
    }

    fn release(&self, wanted: &DiskRelease, effects: &mut Effects) -> Result<DiskReleased, Error> {
        let how = match (wanted.fail, wanted.tear) {
            (Some(DiskStatus::Ok), _) => {
                return Err(Error::new(
                    ErrorCode::BadParameter,
                    "A request that fails does not end with ok",
                    "give io_error or unsupported, or leave fail out",
                ));
            }
            (Some(_), Some(_)) => {
                return Err(Error::new(
                    ErrorCode::BadParameter,
                    "A request cannot both fail and be torn",
                    "give either fail or tear",
                ));
            }
            (Some(status), None) => Release::Fail(status.into()),
            (None, Some(bytes)) => Release::Tear { bytes, status: Status::IoError },
            (None, None) => Release::Complete,
        };
        let mut function = lock(&self.function);
        let all = wanted.requests.is_empty();
        let mut requests = match all {
            true => function.device().held().iter().map(|held| held.number).collect(),
            false => wanted.requests.clone(),
        };
        order_of(wanted.order, wanted.seed).arrange(&mut requests);
        function.release(&requests, how, effects).map_err(|error| self.refused(error))?;
        let holds = |armed: &Armed| {
            matches!(armed.fault.action, Action::Hold(_) | Action::Delay(..) | Action::Reorder { .. })
        };
        let faults = if all && !wanted.keep { function.device_mut().disarm(holds) } else { Vec::new() };
        Ok(DiskReleased { device: self.config.id.clone(), requests, faults })
    }

    fn refused(&self, error: ReleaseError) -> Error {
        let remedy = match error {
            ReleaseError::NotHeld(_) => "see ctl disk list for those that are",
            ReleaseError::Transferred(_) => "release it, or let it fail",
        };
        Error::new(ErrorCode::WrongDeviceState, format!("{error} (disk {})", self.config.id), remedy)
    }
}

/// Who tells of a disk's requests.
#[derive(Clone)]
struct Teller {
    disk: String,
    space: Arc<AddressSpace>,
    events: EventBus,
}

impl Teller {
    fn request(&self, number: u64, fault: u64, request: &Request) -> DiskRequest {
        let gpa = request.memory().first().map(|segment| segment.address);
        let region = gpa.and_then(|gpa| self.space.find(gpa));
        DiskRequest {
            device: self.disk.clone(),
            request: number,
            fault,
            operation: request.operation().into(),
            sector: request.sector(),
            bytes: request.bytes(),
            gpa: gpa.map(Into::into),
            memory: region.as_ref().map(|region| region.name().to_owned()),
            offset: gpa.zip(region).map(|(gpa, region)| region.named_offset(gpa).into()),
        }
    }
}

impl Witness for Teller {
    fn persistent(&self, gpa: u64, len: u64) -> bool {
        let end = gpa.saturating_add(len);
        self.space.regions().iter().any(|region| {
            let range = region.range();
            region.kind() == RegionKind::Pmem && range.start < end && gpa < range.end
        })
    }

    fn tell(&self, notice: &Notice<'_>) {
        let of = self.request(notice.number, notice.fault, notice.request);
        self.events.publish(match notice.what {
            What::Held(transfer) => Event::DiskHeld { of, transfer: transfer.into() },
            What::Released { how, after } => {
                let how = match how {
                    Release::Complete => DiskOutcome::Complete,
                    Release::Fail(_) => DiskOutcome::Fail,
                    Release::Tear { .. } => DiskOutcome::Tear,
                };
                Event::DiskReleased { of, how, held_ns: nanoseconds(after) }
            }
            What::Completed(status) => Event::DiskCompleted { of, status: status.into() },
            What::Dropped { end, after } => {
                let how = match end {
                    End::Reset => DiskOutcome::Drop,
                    End::Departed => DiskOutcome::Depart,
                };
                Event::DiskReleased { of, how, held_ns: nanoseconds(after) }
            }
        });
    }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

fn order_of(order: DiskOrder, seed: u64) -> Order {
    match order {
        DiskOrder::Submission => Order::Submission,
        DiskOrder::Reverse => Order::Reverse,
        DiskOrder::Random => Order::Random(seed),
    }
}

/// A fault in the words of the API.
fn describe(fault: &Fault) -> DiskFault {
    let action = match fault.action {
        Action::Hold(transfer) => DiskAction::Hold { transfer: transfer.into() },
        Action::Delay(time, transfer) => {
            DiskAction::Delay { time: TimeSpan(time), transfer: transfer.into() }
        }
        Action::Fail(status) => DiskAction::Fail { status: status.into() },
        Action::Tear { bytes, status } => DiskAction::Tear { bytes, status: status.into() },
        Action::Reorder { window, order, patience } => {
            let (order, seed) = match order {
                Order::Submission => (DiskOrder::Submission, 0),
                Order::Reverse => (DiskOrder::Reverse, 0),
                Order::Random(seed) => (DiskOrder::Random, seed),
            };
            DiskAction::Reorder { window: window as u32, order, seed, patience: TimeSpan(patience) }
        }
    };
    let pattern = &fault.pattern;
    let requests = DiskPattern {
        operation: pattern.operation.map(Into::into),
        dax: pattern.persistent,
        sectors: pattern
            .sectors
            .as_ref()
            .map(|range| SectorRange { first: range.start, count: range.end - range.start }),
        memory: pattern.memory.as_ref().map(|range| ByteRange::new(range.start, range.end - range.start)),
        skip: fault.skip,
        count: fault.count,
    };
    DiskFault { action, requests }
}

/// The same words twice: for the guest's device and for the API.
macro_rules! same {
    ($device:ident, $api:ident: $($word:ident),+) => {
        impl From<$device> for $api {
            fn from(value: $device) -> Self {
                match value { $($device::$word => Self::$word),+ }
            }
        }
        impl From<$api> for $device {
            fn from(value: $api) -> Self {
                match value { $($api::$word => Self::$word),+ }
            }
        }
    };
}

same!(Operation, DiskOperation: Read, Write, Flush, GetId, Discard, WriteZeroes);
same!(Status, DiskStatus: Ok, IoError, Unsupported);
same!(Transfer, DiskTransfer: Release, Submission);

impl fmt::Debug for Disks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.list.iter().map(|disk| &disk.config)).finish()
    }
}
