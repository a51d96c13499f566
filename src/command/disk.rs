//! Disks: what can be asked of them, and what becomes of their requests.

use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::DeviceState;
use crate::units::{Address, ByteRange, TimeSpan, UnitError};

/// A request about disks. All of them leave the vCPUs running.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DiskCommand {
    /// All disks. Answers [`DiskReply::List`].
    List,
    /// One disk. Answers [`DiskReply::Disk`].
    Show {
        /// Its id.
        device: String,
    },
    /// Does something to requests to come. Answers [`DiskReply::Armed`].
    Arm {
        /// The disk's id.
        device: String,
        /// What, and to which.
        fault: DiskFault,
    },
    /// Takes faults away; what they hold stays held. Answers [`DiskReply::Disarmed`].
    Disarm {
        /// The disk's id.
        device: String,
        /// The fault's number; `None` is all of them.
        fault: Option<u64>,
    },
    /// Lets requests go on that are held. Answers [`DiskReply::Released`].
    Release {
        /// The disk's id.
        device: String,
        /// Which, and how.
        release: DiskRelease,
    },
}

impl DiskCommand {
    /// What the command is called in errors and logs.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::List => "disk list",
            Self::Show { .. } => "disk show",
            Self::Arm { .. } => "disk fault",
            Self::Disarm { .. } => "disk disarm",
            Self::Release { .. } => "disk release",
        }
    }
}

/// The answer to a [`DiskCommand`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DiskReply {
    /// All disks.
    List(DiskList),
    /// One disk.
    Disk(DiskInfo),
    /// A fault was added.
    Armed(DiskArmed),
    /// Faults were taken away.
    Disarmed(DiskDisarmed),
    /// Requests go on.
    Released(DiskReleased),
}

/// What a request of a disk does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum DiskOperation {
    /// Sectors go to guest memory.
    Read,
    /// Guest memory goes to sectors.
    Write,
    /// What was written before is made to last.
    Flush,
    /// The disk says its name.
    GetId,
    /// Sectors are of no use any more.
    Discard,
    /// Sectors become zeros.
    WriteZeroes,
}

/// How a request of a disk ends, as virtio has it.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema, clap::ValueEnum,
)]
#[serde(rename_all = "snake_case")]
pub enum DiskStatus {
    /// Good.
    Ok,
    /// An input or output error.
    #[default]
    IoError,
    /// The disk cannot do that.
    Unsupported,
}

/// When the data of a request that is held moves.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema, clap::ValueEnum,
)]
#[serde(rename_all = "snake_case")]
pub enum DiskTransfer {
    /// When it is released: until then neither guest memory nor the disk changes.
    #[default]
    Release,
    /// At once; only that it is done is not told.
    Submission,
}

/// In which order requests go on.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema, clap::ValueEnum,
)]
#[serde(rename_all = "snake_case")]
pub enum DiskOrder {
    /// As they came, or as they are named.
    #[default]
    Submission,
    /// The last one first.
    Reverse,
    /// At random, as the seed has it.
    Random,
}

/// Sectors of 512 bytes, written `2048+8`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SectorRange {
    /// The first one.
    pub first: u64,
    /// How many; one at least.
    pub count: u64,
}

impl FromStr for SectorRange {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        // The same spelling, with sectors for bytes.
        let range: ByteRange = text.parse()?;
        Ok(Self { first: range.offset.0, count: range.length })
    }
}

/// Which requests a fault is about. What is not said is of no concern.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::Args)]
#[serde(default, deny_unknown_fields)]
pub struct DiskPattern {
    /// Only requests that do this
    #[arg(long, value_enum)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub operation: Option<DiskOperation>,
    /// Only requests whose data comes from or goes to persistent memory (DAX), at least in part
    #[arg(long)]
    pub dax: bool,
    /// Only requests that touch these sectors of 512 bytes
    #[arg(long, value_name = "FIRST[+COUNT]")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sectors: Option<SectorRange>,
    /// Only requests whose data comes from or goes to this guest-physical memory, at least in part
    #[arg(long, value_name = "ADDRESS[+LENGTH]")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<ByteRange>,
    /// Let so many of them through first
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub skip: u64,
    /// Then take so many, and no more [default: all]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub count: Option<u64>,
}

/// What a fault does to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum DiskAction {
    /// It waits until it is released.
    Hold {
        /// When its data moves.
        #[serde(default)]
        transfer: DiskTransfer,
    },
    /// It waits for a time.
    Delay {
        /// How long.
        time: TimeSpan,
        /// When its data moves.
        #[serde(default)]
        transfer: DiskTransfer,
    },
    /// It fails, and nothing is transferred.
    Fail {
        /// How it ends.
        #[serde(default)]
        status: DiskStatus,
    },
    /// Only its first bytes are transferred.
    Tear {
        /// So many.
        bytes: u64,
        /// How it ends.
        #[serde(default)]
        status: DiskStatus,
    },
    /// It waits until there are several, which then go on one after the other in another order.
    Reorder {
        /// How many.
        window: u32,
        /// In which order.
        order: DiskOrder,
        /// What a random order depends on.
        #[serde(default)]
        seed: u64,
        /// How long the first one waits for the last: then those that there are go on.
        patience: TimeSpan,
    },
}

/// A fault: what happens to which requests. The first one that a request meets has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DiskFault {
    /// What is done to them.
    pub action: DiskAction,
    /// Which requests.
    #[serde(default)]
    pub requests: DiskPattern,
}

/// Which of the held requests go on, and how.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::Args)]
#[serde(default, deny_unknown_fields)]
pub struct DiskRelease {
    /// Their numbers, in the order in which they go on [default: all, and faults that hold are taken away]
    #[arg(value_name = "REQUEST")]
    pub requests: Vec<u64>,
    /// They end with this status; what has not been transferred yet is not
    #[arg(long, value_enum, value_name = "STATUS", num_args = 0..=1, default_missing_value = "io-error")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fail: Option<DiskStatus>,
    /// Only so many of their first bytes are transferred, and they end with an error
    #[arg(long, value_name = "BYTES", conflicts_with = "fail")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tear: Option<u64>,
    /// In this order
    #[arg(long, value_enum, default_value = "submission")]
    pub order: DiskOrder,
    /// What a random order depends on
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Leave the faults as they are: requests to come are held
    #[arg(long)]
    pub keep: bool,
}

/// The disks of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DiskList {
    /// The disks.
    pub disks: Vec<DiskInfo>,
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DiskInfo {
    /// Its id; the guest finds it as its serial number.
    pub id: String,
    /// Where it stands. Of a disk that has departed nothing is left.
    pub state: DeviceState,
    /// Its size in bytes.
    pub size: u64,
    /// Whether the guest can only read it.
    pub readonly: bool,
    /// Number of its queues.
    pub queues: u32,
    /// Its file; missing if its bytes live until the machine quits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// Requests that the guest waits for.
    pub in_flight: u64,
    /// Its faults.
    pub faults: Vec<DiskArmed>,
    /// Requests that are held.
    pub held: Vec<DiskHeldRequest>,
}

/// A fault of a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DiskArmed {
    /// The disk.
    pub device: String,
    /// The fault's number.
    pub number: u64,
    /// What it does to which requests.
    pub fault: DiskFault,
    /// How many requests it was about up to now.
    pub seen: u64,
    /// How many of them it has had.
    pub taken: u64,
}

/// Faults that were taken away.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DiskDisarmed {
    /// The disk.
    pub device: String,
    /// Their numbers.
    pub faults: Vec<u64>,
}

/// Requests that go on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DiskReleased {
    /// The disk.
    pub device: String,
    /// Their numbers, in the order in which they go on.
    pub requests: Vec<u64>,
    /// Faults that were taken away with it.
    pub faults: Vec<u64>,
}

/// A request of a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DiskRequest {
    /// The disk.
    pub device: String,
    /// Number of the request, from 1 on for each disk.
    pub request: u64,
    /// Number of the fault that it has met; 0 if it has met none.
    pub fault: u64,
    /// What it does.
    pub operation: DiskOperation,
    /// The first sector; 0 where it is about none.
    pub sector: u64,
    /// Bytes of the disk that it is about.
    pub bytes: u64,
    /// Guest-physical address of the first byte of its data, where it has some.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpa: Option<Address>,
    /// The device that this memory is: `ram`, or a memory device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<String>,
    /// Offset in that device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offset: Option<Address>,
}

/// A request that is held.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DiskHeldRequest {
    /// The request.
    #[serde(flatten)]
    pub of: DiskRequest,
    /// When its data moves, or has moved.
    pub transfer: DiskTransfer,
    /// Nanoseconds for which it has been held.
    pub held_ns: u64,
    /// Nanoseconds after which it goes on by itself, if it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub left_ns: Option<u64>,
}

/// How a request goes on that was held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum DiskOutcome {
    /// As if nothing had been.
    Complete,
    /// With a status, and no transfer.
    Fail,
    /// With a part of its data.
    Tear,
    /// Not at all: the guest has reset the disk.
    Drop,
    /// Not at all: the disk has departed. Told of each request that the guest waits for, held or not; none of its data
    /// moves any more.
    Depart,
}
