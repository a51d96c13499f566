//! How a run ended.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

use crate::command::MemoryDevice;
use crate::kvm::CpuReport;

/// Why a machine ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "cause", rename_all = "snake_case")]
pub enum Cause {
    /// The guest powered itself off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// The guest kernel panicked.
    Panic,
    /// A processor shut down.
    TripleFault {
        /// The vCPU.
        vcpu: u32,
    },
    /// A machine check came to a processor that could not take it.
    Shutdown {
        /// The vCPU.
        vcpu: u32,
        /// Why it could not.
        why: String,
    },
    /// A request took the power away.
    PowerCut,
    /// A request took the power away, and gives it back.
    PowerCycle,
    /// A request ended the machine.
    Quit,
    /// A signal ended the monitor.
    Signal {
        /// Its number.
        signal: i32,
    },
    /// The time given with `--timeout` is over.
    Timeout,
    /// The guest never got as far as its agent.
    NoAgent,
    /// The monitor failed.
    Failed(
        /// In what.
        String,
    ),
}

impl Cause {
    /// Whether the machine has lost its power without a word.
    pub fn is_power_cut(&self) -> bool {
        matches!(self, Self::PowerCut | Self::PowerCycle)
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PowerOff => f.write_str("power_off"),
            Self::Reset => f.write_str("reset"),
            Self::Panic => f.write_str("panic"),
            Self::TripleFault { vcpu } => write!(f, "triple_fault of vCPU {vcpu}"),
            Self::Shutdown { vcpu, why } => write!(f, "shutdown of vCPU {vcpu}: {why}"),
            Self::PowerCut => f.write_str("power_cut"),
            Self::PowerCycle => f.write_str("power_cycle"),
            Self::Quit => f.write_str("quit"),
            Self::Signal { signal } => write!(f, "signal {signal}"),
            Self::Timeout => f.write_str("timeout"),
            Self::NoAgent => f.write_str("no_agent"),
            Self::Failed(what) => write!(f, "failed: {what}"),
        }
    }
}

/// Exits to the monitor, by kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Exits {
    /// Port accesses.
    pub io: u64,
    /// Accesses to devices in memory.
    pub mmio: u64,
    /// MSR accesses.
    pub msr: u64,
    /// Accesses to guarded memory.
    pub fault: u64,
    /// Single steps.
    pub step: u64,
    /// Everything else.
    pub other: u64,
}

/// How a run ended, and what it counted.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// Why.
    #[serde(flatten)]
    pub cause: Cause,
    /// How long the guest ran.
    #[serde(serialize_with = "seconds")]
    pub ran: Duration,
    /// Memory devices at the end.
    pub memory: Vec<MemoryDevice>,
    /// Exits to the monitor.
    pub exits: Exits,
    /// Bytes on the serial line.
    pub console_bytes: u64,
    /// What each vCPU was doing at the end.
    pub vcpus: Vec<CpuReport>,
}

fn seconds<S: serde::Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(duration.as_secs_f64())
}
