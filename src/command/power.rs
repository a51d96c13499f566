//! Loss of power, and what is lost with it.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::memory::Survivors;

/// Power goes, without a word to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PowerCut {
    /// Which lines survive that were written and not flushed: about half, the same ones for the same number. Default:
    /// none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Whether power comes back: the machine then boots as it was started. Default: it does not.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub again: bool,
}

impl PowerCut {
    /// Which lines survive.
    pub fn survivors(self) -> Survivors {
        self.seed.map_or(Survivors::None, |seed| Survivors::Some { seed })
    }
}

/// What a loss of power did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PowerLoss {
    /// Devices of which only what is flushed is durable.
    pub devices: Vec<DeviceLoss>,
}

/// What a loss of power did to one device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DeviceLoss {
    /// The device's id.
    pub device: String,
    /// Bytes of the lines that had changed since the last flush, and are again what they were.
    pub lost: u64,
    /// Bytes of those that survive.
    pub survived: u64,
}
