//! A machine for tests: it keeps its devices in a list and does at once what it is told.

use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use super::Executor;
use crate::command::{
    Census, CensusHalf, ClearedBy, Command, CperAccepted, DeviceState, DiskArmed, DiskCommand, DiskDisarmed,
    DiskInfo, DiskList, DiskReleased, DiskReply, Error, ErrorCode, Event, EventBus, FirmwareChange,
    FirmwareFaultState, FirmwareState, FlushState, MachineInfo, MachineState, MceQueued, MemoryDevice,
    MemoryKind, Operation, OperationState, PoisonAdded, PoisonCleared, PoisonGuard, PoisonPattern,
    PoisonPlace, PoisonPlaced, PoisonPolicy, PoisonState, PowerLoss, RemoveMode, Reply, StaleState,
};
use crate::config::{Channel, PmemSource, Via};
use crate::host::usage::Usage;
use crate::memory::{GuardMethod, RangeSet, round_out};
use crate::units::{ByteRange, GIB};

/// The granularity of the fake's poison.
pub const GRANULARITY: u64 = 4096;

/// What guards the fake's poison, in words only.
const GUARD: PoisonGuard =
    PoisonGuard { method: GuardMethod::Protection, guarded_pages: 1, clean_guarded_pages: 0 };

/// The fake.
pub struct FakeMachine {
    bus: EventBus,
    state: Mutex<State>,
}

struct State {
    devices: Vec<(MemoryDevice, Vec<ByteRange>)>,
    operations: Vec<Operation>,
    quit: bool,
}

impl FakeMachine {
    /// A machine with one device, `p0`, of 1 GiB.
    pub fn new(bus: EventBus) -> Self {
        let devices = vec![(device("p0", 0x1_4000_0000, GIB), Vec::new())];
        let state = State { devices, operations: Vec::new(), quit: false };
        Self { bus, state: Mutex::new(state) }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Poisons by the page.
    fn poison(
        &self,
        (found, poison): &mut (MemoryDevice, Vec<ByteRange>),
        what: PoisonPattern,
    ) -> Result<PoisonAdded, Error> {
        let ranges = what.ranges(&found.id, &[ByteRange::new(0, found.size)])?;
        if let Some(range) = ranges.iter().find(|range| range.end().is_none_or(|end| end > found.size)) {
            let message = format!("The range {range} is not in {}", found.id);
            return Err(Error::new(
                ErrorCode::OutsideDevice,
                message,
                format!("stay below {:#x}", found.size),
            ));
        }
        let bytes = |range: &ByteRange| range.offset.0..range.offset.0 + range.length;
        let pages: RangeSet = ranges.iter().map(|range| round_out(bytes(range), GRANULARITY)).collect();
        let armed: Vec<_> = pages.iter().map(|r| ByteRange::new(r.start, r.end - r.start)).collect();
        poison.extend(&armed);
        found.poisoned = poison.iter().map(|range| range.length).sum();
        self.bus.publish(Event::poison_added(&found.id, &armed));
        Ok(PoisonAdded {
            device: found.id.clone(),
            rounded: armed != ranges,
            armed,
            granularity: GRANULARITY,
            guard: GUARD,
        })
    }

    /// Whether it was told to quit.
    pub fn has_quit(&self) -> bool {
        self.lock().quit
    }

    /// Ends operation `number` some time later, as a guest would.
    fn finish_later(&self, number: u64, error: Option<Error>) {
        let bus = self.bus.clone();
        let operation = &mut self.lock().operations[number as usize - 1];
        // The fake's operation is over for whoever asks; the event that says so comes later.
        operation.state = if error.is_some() { OperationState::Failed } else { OperationState::Done };
        operation.error.clone_from(&error);
        thread::spawn(move || {
            thread::sleep(Duration::from_millis(20));
            bus.publish(Event::OperationFinished { operation: number, error });
        });
    }
}

fn device(id: &str, gpa: u64, size: u64) -> MemoryDevice {
    MemoryDevice {
        id: id.to_owned(),
        kind: MemoryKind::Pmem,
        state: DeviceState::Present,
        gpa: gpa.into(),
        size,
        via: Via::Nfit,
        channel: Channel::Container,
        no_channel_because: None,
        node: 1,
        readonly: false,
        file: None,
        poisoned: 0,
        stale_accesses: 0,
        locked: false,
        bus: None,
        range: Some("pmem".to_owned()),
        dimms: Vec::new(),
    }
}

/// The fake has one disk, `d0`, on which nothing happens.
fn disk(command: DiskCommand) -> Result<DiskReply, Error> {
    let only = |device: String| {
        let error = || Error::new(ErrorCode::NoSuchDevice, format!("There is no disk {device:?}"), "name d0");
        (device == "d0").then(|| device.clone()).ok_or_else(error)
    };
    let info = DiskInfo {
        id: "d0".to_owned(),
        state: DeviceState::Present,
        size: GIB,
        readonly: false,
        queues: 2,
        file: None,
        in_flight: 0,
        faults: Vec::new(),
        held: Vec::new(),
    };
    Ok(match command {
        DiskCommand::List => DiskReply::List(DiskList { disks: vec![info] }),
        DiskCommand::Show { device } => only(device).map(|_| DiskReply::Disk(info))?,
        DiskCommand::Arm { device, fault } => {
            DiskReply::Armed(DiskArmed { device: only(device)?, number: 1, fault, seen: 0, taken: 0 })
        }
        DiskCommand::Disarm { device, fault } => {
            DiskReply::Disarmed(DiskDisarmed { device: only(device)?, faults: fault.into_iter().collect() })
        }
        DiskCommand::Release { device, release } => {
            let (device, requests) = (only(device)?, release.requests);
            DiskReply::Released(DiskReleased { device, requests, faults: Vec::new() })
        }
    })
}

impl State {
    fn find(&mut self, id: &str) -> Result<&mut (MemoryDevice, Vec<ByteRange>), Error> {
        let known: Vec<String> = self.devices.iter().map(|(device, _)| device.id.clone()).collect();
        let known: Vec<&str> = known.iter().map(String::as_str).collect();
        let error = Error::no_such_device(id, &known);
        self.devices.iter_mut().find(|(device, _)| device.id == id).ok_or(error)
    }

    fn begin(&mut self, kind: &str, device: &str, mode: Option<RemoveMode>) -> Operation {
        let operation = Operation {
            operation: self.operations.len() as u64 + 1,
            kind: kind.to_owned(),
            device: device.to_owned(),
            state: OperationState::Running,
            mode,
            channel: Some(Channel::Container),
            error: None,
        };
        self.operations.push(operation.clone());
        operation
    }
}

impl Executor for FakeMachine {
    fn execute(&self, command: Command) -> Result<Reply, Error> {
        let mut state = self.lock();
        Ok(match command {
            Command::MachineInfo => Reply::Machine(MachineInfo {
                state: MachineState::Running,
                version: "0.1.0".to_owned(),
                pid: 1,
                kernel: "vmlinuz".to_owned(),
                kernel_version: Some("6.12.95".to_owned()),
                vcpus: 2,
                memory: GIB,
                memory_poisoned: 0,
                host: "kvm".to_owned(),
                agent: true,
                free_slots: 4,
                free_ports: 2,
                free_bridges: 1,
                monitor: Usage::now(),
                uptime_ns: self.bus.elapsed_ns(),
            }),
            Command::ListMemory => {
                Reply::MemoryList(state.devices.iter().map(|(device, _)| device.clone()).collect())
            }
            Command::ShowMemory { device } => Reply::Memory(state.find(&device)?.0.clone()),
            Command::PoisonAdd { device, what } => {
                Reply::PoisonAdded(self.poison(state.find(&device)?, what)?)
            }
            Command::PoisonPlace { place: PoisonPlace::Addresses(ranges) } => {
                let added = self.poison(state.find("p0")?, PoisonPattern::Ranges(ranges))?;
                Reply::PoisonPlaced(PoisonPlaced { placed: vec![added] })
            }
            Command::PoisonPlace { place: PoisonPlace::Process(_) } => {
                return Err(Error::new(ErrorCode::GuestRefused, "There is no process 7", "name another one"));
            }
            Command::PoisonList { device, from, limit } => {
                let (found, poison) = state.find(&device)?;
                let mut ranges: Vec<_> =
                    poison.iter().filter(|range| range.offset.0 >= from).copied().collect();
                let next = ranges.get(limit).map(|range| range.offset);
                ranges.truncate(limit);
                Reply::PoisonList(PoisonState {
                    device,
                    ranges,
                    next,
                    granularity: GRANULARITY,
                    bytes: found.poisoned,
                    guard: GUARD,
                })
            }
            Command::PoisonPolicy { device, change } => {
                state.find(&device)?;
                Reply::PoisonPolicy(change.apply(PoisonPolicy::default()))
            }
            Command::PoisonClear { device, .. } => {
                let (found, poison) = state.find(&device)?;
                let cleared = std::mem::take(poison);
                found.poisoned = 0;
                self.bus.publish(Event::poison_cleared(&device, &cleared, ClearedBy::Request));
                Reply::PoisonCleared(PoisonCleared {
                    device,
                    cleared,
                    granularity: GRANULARITY,
                    note: PoisonCleared::GUEST_KEEPS_ITS_LIST.to_owned(),
                })
            }
            Command::Notify { device, kind } => {
                state.find(&device)?;
                self.bus.publish(Event::NotifySent { device, kind });
                Reply::Done
            }
            Command::RaiseMce { vcpu, .. } => Reply::MceQueued(MceQueued { vcpu }),
            Command::Remove { device, mode, .. } => {
                state.find(&device)?.0.state = DeviceState::Departed;
                let operation = state.begin("remove", &device, Some(mode));
                drop(state);
                // An orderly removal is refused by this guest.
                let error = (mode == RemoveMode::Eject).then(|| {
                    Error::new(ErrorCode::NotSupported, "The guest does not let go", "try --surprise")
                });
                if device == "p0" {
                    self.finish_later(operation.operation, error);
                }
                Reply::Operation(operation)
            }
            Command::Insert { pmem } => {
                let size = match &pmem.source {
                    PmemSource::Memory(size) | PmemSource::File { size: Some(size), .. } => size.bytes(),
                    PmemSource::File { size: None, .. } => GIB,
                };
                if state.find(&pmem.id).is_ok() {
                    let message = format!("There is a device {:?} already", pmem.id);
                    return Err(Error::new(ErrorCode::IdInUse, message, "give another id="));
                }
                state.devices.push((device(&pmem.id, 0x2_0000_0000, size), Vec::new()));
                Reply::Operation(state.begin("insert", &pmem.id, None))
            }
            Command::InsertDisk { disk } => Reply::Operation(state.begin("insert", &disk.id, None)),
            Command::ShowOperation { operation } => {
                match state.operations.get((operation as usize).wrapping_sub(1)) {
                    Some(found) => Reply::Operation(found.clone()),
                    None => {
                        let message = format!("There is no operation {operation}");
                        return Err(Error::new(
                            ErrorCode::NoSuchOperation,
                            message,
                            "give one that was begun",
                        ));
                    }
                }
            }
            Command::Stale { device, answer } => {
                let accesses = state.find(&device)?.0.stale_accesses;
                Reply::Stale(StaleState { device, answer: answer.unwrap_or_default(), accesses })
            }
            Command::Firmware { device, change } => {
                state.find(&device)?;
                let faults = match change {
                    FirmwareChange::Plan(fault) => {
                        vec![fault.plan().map(|_| FirmwareFaultState { fault, met: 0 })?]
                    }
                    FirmwareChange::Show | FirmwareChange::Forget => Vec::new(),
                };
                Reply::Firmware(FirmwareState { device, faults })
            }
            Command::Census { device } => {
                let found = &state.find(&device)?.0;
                let nothing = || CensusHalf { entries: 0, bytes: 0, mappings: Vec::new(), more: 0 };
                Reply::Census(Box::new(Census {
                    device,
                    gpa: found.gpa,
                    size: found.size,
                    departed: false,
                    address_spaces: 1,
                    scanned_pages: 0,
                    tables: 0,
                    microseconds: 1,
                    complete: true,
                    user: nothing(),
                    kernel: nothing(),
                    unseen: Census::UNSEEN.to_owned(),
                }))
            }
            Command::Cper { request } => {
                Reply::Cper(CperAccepted { record: 1, source: request.source().name().to_owned(), ahead: 0 })
            }
            Command::Disk(command) => Reply::Disk(disk(command)?),
            Command::Flush { device, .. } => {
                state.find(&device)?;
                Reply::Flush(FlushState { device, in_flight: 0, faults: Vec::new(), held: Vec::new() })
            }
            Command::Pause | Command::Resume => Reply::Done,
            Command::PowerCut(_) => Reply::PowerLoss(PowerLoss { devices: Vec::new() }),
            Command::Quit => {
                state.quit = true;
                Reply::Done
            }
        })
    }

    fn events(&self) -> &EventBus {
        &self.bus
    }
}
