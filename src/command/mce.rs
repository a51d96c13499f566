//! Machine checks on request: by kind, or by registers.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::units::Address;

/// A machine check, or an error that is only logged. Either `class` and `address`, or `registers`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MceRequest {
    /// What kind of error it is; the registers follow from the guest's processor.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub class: Option<MceClass>,
    /// Guest-physical address of the error.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<Address>,
    /// How many low bits of the address are unknown: 6 for a line, 12 for a page of 4 KiB, 21 for one of 2 MiB.
    /// Default: 6.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub granularity: Option<u8>,
    /// Says that the processor's context is corrupt (PCC): nothing can be recovered.
    #[serde(default, skip_serializing_if = "is_false")]
    pub context_corrupt: bool,
    /// Says that another error was lost (OVER).
    #[serde(default, skip_serializing_if = "is_false")]
    pub overflow: bool,
    /// The error as registers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub registers: Option<MceRegisters>,
    /// Which vCPUs get the machine check. Default: as the guest's processor has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reach: Option<MceReach>,
    /// The error waits until the vCPU runs in this mode. Default: it comes at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<MceMode>,
}

fn is_false(value: &bool) -> bool {
    !value
}

/// A kind of error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum MceClass {
    /// Poison was loaded: software must recover before it goes on.
    Srar,
    /// Poison was fetched as an instruction: software must recover before it goes on.
    SrarFetch,
    /// Poison was found, and is signalled by a machine check; AMD defers such errors.
    Srao,
    /// Poison was found, and is only logged; AMD defers such errors.
    Ucna,
    /// Poison was found, and waits for a consumer; UCNA on Intel.
    Deferred,
    /// The error was corrected.
    Corrected,
    /// The processor's context is corrupt, and nothing can be recovered.
    Fatal,
}

/// The privilege that a vCPU runs with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum MceMode {
    /// A process's own (CPL 3).
    User,
    /// The kernel's.
    Kernel,
}

/// Which vCPUs get a machine check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum MceReach {
    /// The named one alone. Without local machine checks, no hardware does this.
    Local,
    /// All: the others learn that there is an error, but not of it. Intel only.
    Broadcast,
}

/// An error as registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MceRegisters {
    /// Bank number.
    pub bank: u8,
    /// `MCi_STATUS`; bit 63 (VAL) must be set.
    pub status: Address,
    /// `MCi_ADDR`. Default: 0.
    #[serde(default)]
    pub address: Address,
    /// `MCi_MISC`. Default: 0.
    #[serde(default)]
    pub misc: Address,
    /// `MCG_STATUS`, to which MCIP is added. Default: the error is only logged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mcg_status: Option<Address>,
}

/// A machine check was put into a vCPU's queue.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct MceQueued {
    /// The vCPU. An event says what became of it: `mce_delivered`, `mce_logged` or `mce_shutdown`.
    pub vcpu: u32,
}
