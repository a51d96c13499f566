//! All that can be asked of a machine, and all that it tells.
//!
//! A [`Command`] is a request with its preconditions; it ends in a [`Reply`] or an [`Error`] with a stable code. An
//! [`Event`] is something that happened, in the order in which it happened, on the [`EventBus`]. The API server
//! (`api`) is one user of this module; anything else that drives a machine uses the same words.
//!
//! Commands are executed one after the other on the machine's main loop thread, and none of them blocks there: what
//! takes time (a removal) answers with an [`Operation`] and goes on in events.

mod bus;
mod census;
mod cper;
mod disk;
mod error;
mod event;
mod firmware;
mod flush;
mod injection;
mod mce;
mod poison;
mod power;
mod reply;

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use self::bus::{EventBus, HISTORY, Next, Subscription};
pub use self::census::{
    Census, CensusHalf, CensusMapping, CensusProcess, LISTED as CENSUS_LISTED,
    LISTED_IN_EVENT as CENSUS_LISTED_IN_EVENT,
};
pub use self::cper::{
    CperAccepted, CperCommon, CperNotify, CperRequest, CperSection, CperSeverity, timestamp,
};
pub use self::disk::{
    DiskAction, DiskArmed, DiskCommand, DiskDisarmed, DiskFault, DiskHeldRequest, DiskInfo, DiskList,
    DiskOperation, DiskOrder, DiskOutcome, DiskPattern, DiskRelease, DiskReleased, DiskReply, DiskRequest,
    DiskStatus, DiskTransfer, SectorRange,
};
pub use self::error::{Error, ErrorCode};
pub use self::event::{Access, ClearedBy, Direction, Event, MceOrigin, Record, RemovalStep, TrapDecision};
pub use self::firmware::{FirmwareChange, FirmwareFault, FirmwareFaultState, FirmwareState, FirmwareTarget};
pub use self::flush::{
    FlushAction, FlushArmed, FlushChange, FlushFault, FlushHeldRequest, FlushOutcome, FlushRelease,
    FlushState,
};
pub use self::injection::{InjectionSeverity, InjectionStep};
pub use self::mce::{MceClass, MceMode, MceQueued, MceReach, MceRegisters, MceRequest};
pub use self::poison::{EveryStride, PoisonAlign, PoisonPattern, PoisonPlace, ProcessMemory, RandomLines};
pub use self::power::{DeviceLoss, PowerCut, PowerLoss};
pub use self::reply::{
    DeviceState, MachineInfo, MachineState, MemoryDevice, MemoryDimm, MemoryKind, Operation, OperationState,
    PoisonAdded, PoisonCleared, PoisonGuard, PoisonPlaced, PoisonState, Reply, StaleChange, StaleState,
};
use crate::config::{Channel, Disk, Pmem};
pub use crate::memory::{Consume, FullLineStore, PoisonPolicy, PolicyChange, ReportedAddress, StaleAnswer};
use crate::units::{ByteRange, TimeSpan};

/// A request to a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// What the machine is and does. Answers [`Reply::Machine`].
    MachineInfo,
    /// All memory devices, departed ones too. Answers [`Reply::MemoryList`].
    ListMemory,
    /// One memory device. Answers [`Reply::Memory`].
    ShowMemory {
        /// Its id.
        device: String,
    },
    /// Makes bytes of a device bad: the next load of them is a machine check. Answers [`Reply::PoisonAdded`].
    PoisonAdd {
        /// The device's id.
        device: String,
        /// What to poison; all of it or nothing.
        what: PoisonPattern,
    },
    /// Makes memory bad by its address; all of it or nothing. Answers [`Reply::PoisonPlaced`].
    PoisonPlace {
        /// What to poison. The memory of a process is looked up on the way to the machine.
        place: PoisonPlace,
    },
    /// The poison of a device. Answers [`Reply::PoisonList`].
    PoisonList {
        /// The device's id.
        device: String,
        /// The first offset of interest.
        from: u64,
        /// Most ranges to list.
        limit: usize,
    },
    /// What poison of a device does to processors, changed before as asked. Answers [`Reply::PoisonPolicy`].
    PoisonPolicy {
        /// The device's id.
        device: String,
        /// What to change.
        change: PolicyChange,
    },
    /// Replaces bad media by good: poison goes, without a word to the guest. Answers [`Reply::PoisonCleared`].
    PoisonClear {
        /// The device's id.
        device: String,
        /// What to clear; `None` is the whole device.
        ranges: Option<Vec<ByteRange>>,
    },
    /// Sends the guest a notification, whether or not there is a reason for it. Answers [`Reply::Done`].
    Notify {
        /// The device's id.
        device: String,
        /// What the notification says.
        kind: NotifyKind,
    },
    /// Raises a machine check, or logs an error. Answers [`Reply::MceQueued`].
    RaiseMce {
        /// The vCPU.
        vcpu: u32,
        /// The error.
        request: MceRequest,
    },
    /// Takes a device away. Answers [`Reply::Operation`].
    Remove {
        /// The device's id.
        device: String,
        /// Whether the guest is asked.
        mode: RemoveMode,
        /// By which channel; `None` is the device's own.
        via: Option<Channel>,
        /// How long the guest may take; `None` leaves it to the machine.
        timeout: Option<TimeSpan>,
    },
    /// Puts a device into a free slot. Answers [`Reply::Operation`].
    Insert {
        /// The device. Its `at` names an address or a departed device.
        pmem: Box<Pmem>,
    },
    /// Puts a disk into a free slot. Answers [`Reply::Operation`].
    InsertDisk {
        /// The disk. Its `at` names a departed one.
        disk: Box<Disk>,
    },
    /// What touching a memory device does once it has departed, changed before if it is asked to. Answers
    /// [`Reply::Stale`].
    Stale {
        /// The device's id.
        device: String,
        /// The new answer.
        answer: Option<StaleAnswer>,
    },
    /// The faults of a device's firmware, changed before if it is asked to. Answers [`Reply::Firmware`].
    Firmware {
        /// The device's id.
        device: String,
        /// The change.
        change: FirmwareChange,
    },
    /// Who maps a memory device, present or departed. Answers [`Reply::Census`].
    Census {
        /// The device's id.
        device: String,
    },
    /// Tells the guest of an error, as firmware does. Answers [`Reply::Cper`].
    Cper {
        /// The error.
        request: Box<CperRequest>,
    },
    /// Something about disks. Answers [`Reply::Disk`].
    Disk(DiskCommand),
    /// The flushes of a virtio-pmem device, changed before if it is asked to. Answers [`Reply::Flush`].
    Flush {
        /// The device's id.
        device: String,
        /// The change.
        change: FlushChange,
    },
    /// How an operation stands. Answers [`Reply::Operation`].
    ShowOperation {
        /// The number that the operation was answered with.
        operation: u64,
    },
    /// Stops all vCPUs; the guest's clocks run on. Answers [`Reply::Done`].
    Pause,
    /// Lets the vCPUs run on. Answers [`Reply::Done`].
    Resume,
    /// Takes the power away, without a word to the guest; the machine ends, or boots again. Answers
    /// [`Reply::PowerLoss`].
    PowerCut(PowerCut),
    /// Ends the machine as it is, without a word to the guest. Answers [`Reply::Done`].
    Quit,
}

/// What a notification says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum NotifyKind {
    /// An uncorrectable memory error was found: Notify 0x81 on the NVDIMM root device (ACPI 6.5, 5.6.6, table 5.186).
    Uncorrectable,
    /// The health of the DIMM changed: Notify 0x81 on the DIMM.
    Health,
    /// The NFIT changed: Notify 0x80 on the NVDIMM root device.
    Update,
    /// An address range scrub has stopped: Notify 0x82 on the NVDIMM root device.
    ArsStopped,
}

impl NotifyKind {
    /// The code that goes into the AML `Notify`.
    pub const fn code(self) -> u8 {
        match self {
            Self::Uncorrectable | Self::Health => 0x81,
            Self::Update => 0x80,
            Self::ArsStopped => 0x82,
        }
    }
}

/// How a device is taken away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum RemoveMode {
    /// The device goes first and the guest learns of it afterwards.
    Surprise,
    /// The guest is asked to let go of it.
    Eject,
}

impl fmt::Display for RemoveMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Surprise => "surprise",
            Self::Eject => "eject",
        })
    }
}

impl Command {
    /// What the command is called in errors and logs.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::MachineInfo => "info",
            Self::ListMemory => "memory list",
            Self::ShowMemory { .. } => "memory show",
            Self::PoisonAdd { .. } | Self::PoisonPlace { .. } => "poison add",
            Self::PoisonList { .. } => "poison list",
            Self::PoisonPolicy { .. } => "poison policy",
            Self::PoisonClear { .. } => "poison clear",
            Self::Notify { .. } => "notify",
            Self::RaiseMce { .. } => "mce",
            Self::Remove { .. } => "remove",
            Self::Insert { .. } | Self::InsertDisk { .. } => "insert",
            Self::Census { .. } => "census",
            Self::Stale { .. } => "stale",
            Self::Firmware { .. } => "firmware",
            Self::Cper { .. } => "cper",
            Self::Disk(command) => command.name(),
            Self::Flush { .. } => "flush",
            Self::ShowOperation { .. } => "operation",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::PowerCut(_) => "power cut",
            Self::Quit => "quit",
        }
    }

    /// Refuses the command in a state of the machine in which it makes no sense. To be asked before anything else.
    ///
    /// Questions are answered in every state; what changes the guest needs a guest; what needs the guest's answer
    /// (an orderly removal, a notification) needs one that runs.
    ///
    /// # Errors
    /// [`ErrorCode::WrongState`].
    pub fn allowed_in(&self, state: MachineState) -> Result<(), Error> {
        use MachineState::{Paused, Running, Starting, Stopped};
        let (allowed, remedy): (&[MachineState], &str) = match self {
            Self::MachineInfo
            | Self::ListMemory
            | Self::ShowMemory { .. }
            | Self::PoisonList { .. }
            | Self::PoisonPolicy { .. }
            | Self::Stale { .. }
            | Self::ShowOperation { .. }
            | Self::Disk(_)
            | Self::Flush { .. }
            | Self::Quit => (&[Starting, Running, Paused, Stopped], ""),
            Self::PoisonAdd { .. } | Self::PoisonPlace { .. } | Self::PoisonClear { .. } => {
                (&[Starting, Running, Paused], "start another machine")
            }
            Self::Notify { .. }
            | Self::RaiseMce { .. }
            | Self::Remove { .. }
            | Self::Insert { .. }
            | Self::InsertDisk { .. }
            | Self::Census { .. }
            | Self::Firmware { .. }
            | Self::PowerCut(_)
            | Self::Cper { .. } => {
                (&[Running, Paused], "do it while the machine runs, after the event machine_started")
            }
            Self::Pause => (&[Running], "pause a machine that runs"),
            Self::Resume => (&[Paused], "resume a machine that is paused"),
        };
        if allowed.contains(&state) {
            return Ok(());
        }
        Err(Error::new(
            ErrorCode::WrongState,
            format!("A machine that is {} cannot do {:?}", state.name(), self.name()),
            remedy,
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn questions_are_always_answered() {
        for state in
            [MachineState::Starting, MachineState::Running, MachineState::Paused, MachineState::Stopped]
        {
            assert_eq!(Command::MachineInfo.allowed_in(state), Ok(()));
            assert_eq!(Command::Quit.allowed_in(state), Ok(()));
        }
    }

    #[test]
    fn what_needs_a_guest_is_refused_without_one() {
        let remove =
            Command::Remove { device: "p0".into(), mode: RemoveMode::Surprise, via: None, timeout: None };
        let error = remove.allowed_in(MachineState::Stopped).unwrap_err();
        assert_eq!(error.code, ErrorCode::WrongState);
        assert_eq!(
            error.to_string(),
            "A machine that is stopped cannot do \"remove\"; do it while the machine runs, after the event machine_started"
        );
        assert!(Command::Resume.allowed_in(MachineState::Running).is_err());
        assert!(Command::Pause.allowed_in(MachineState::Paused).is_err());
    }
}
