//! Flushes of virtio-pmem devices: what can be done to them, and how they stand.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::units::TimeSpan;

/// What to do about the flushes of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FlushChange {
    /// Nothing.
    Show,
    /// Does something to flushes to come.
    Arm(FlushFault),
    /// Takes faults away, by number or all of them; what they hold stays held.
    Disarm(Option<u64>),
    /// Lets flushes go on that are held.
    Release(FlushRelease),
}

/// What a fault does to a flush.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum FlushAction {
    /// It waits until it is released, and is carried out then.
    Hold,
    /// It waits for a time.
    Delay {
        /// How long.
        time: TimeSpan,
    },
    /// It is answered with an error, and nothing is made durable for it.
    Fail,
}

/// A fault: what happens to which flushes. The first one that a flush meets has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FlushFault {
    /// What is done to them.
    pub action: FlushAction,
    /// So many are let through first.
    #[serde(default)]
    pub skip: u64,
    /// Then so many are taken, and no more. Default: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub count: Option<u64>,
}

/// Which of the held flushes go on, and how.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::Args)]
#[serde(default, deny_unknown_fields)]
pub struct FlushRelease {
    /// Their numbers, in the order in which they go on [default: all, and faults that hold are taken away]
    #[arg(value_name = "REQUEST")]
    pub requests: Vec<u64>,
    /// They are answered with an error, and nothing is made durable for them
    #[arg(long)]
    pub fail: bool,
    /// Leave the faults as they are: flushes to come are held
    #[arg(long)]
    pub keep: bool,
}

/// How the flushes of a device stand.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct FlushState {
    /// The device.
    pub device: String,
    /// Flushes that the guest waits for.
    pub in_flight: u64,
    /// What is done to flushes to come.
    pub faults: Vec<FlushArmed>,
    /// Flushes that are held.
    pub held: Vec<FlushHeldRequest>,
}

/// A fault of a device's flushes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct FlushArmed {
    /// Its number.
    pub number: u64,
    /// What it does to which flushes.
    pub fault: FlushFault,
    /// How many flushes it was about up to now.
    pub seen: u64,
    /// How many of them it has had.
    pub taken: u64,
}

/// A flush that is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct FlushHeldRequest {
    /// Its number, from 1 on for each device.
    pub request: u64,
    /// Number of the fault that it has met.
    pub fault: u64,
    /// Nanoseconds for which it has been held.
    pub held_ns: u64,
    /// Nanoseconds after which it goes on by itself, if it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub left_ns: Option<u64>,
}

/// How a flush goes on that the guest waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum FlushOutcome {
    /// It is carried out.
    Complete,
    /// With an error.
    Fail,
    /// Not at all: the guest has reset the device.
    Drop,
    /// Not at all: the device has departed. Told of each flush that the guest waits for, held or not.
    Depart,
}
