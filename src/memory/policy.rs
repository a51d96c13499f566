//! What poison of a device does to the processors that touch it.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What happens when a processor consumes poison.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Consume {
    /// A machine check at the instruction.
    #[default]
    MachineCheck,
    /// Nothing but an event: the instruction gets the bytes that are there.
    Log,
}

/// How exactly a machine check names the place.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum ReportedAddress {
    /// The line of 64 bytes.
    #[default]
    Line,
    /// The page of 4 KiB, as some memory controllers do (least significant valid bit 12).
    Page,
}

/// What becomes of a poisoned line that a processor writes whole, without reading it first.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum FullLineStore {
    /// It stays poisoned: the medium itself is bad.
    #[default]
    Keep,
    /// It is good again, as with MOVDIR64B on memory whose data was bad and not its cells.
    Clear,
}

impl FullLineStore {
    /// The word for it in options, the API and events.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Keep => "keep",
            Self::Clear => "clear",
        }
    }

    /// What has this name.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Keep, Self::Clear].into_iter().find(|what| what.name() == name)
    }
}

/// What poison of a device does.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PoisonPolicy {
    /// When it is consumed.
    pub consume: Consume,
    /// How exactly that is reported.
    pub address: ReportedAddress,
    /// When it is written over.
    pub full_line_store: FullLineStore,
}

/// A change of a policy; what is missing stays as it is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::Args)]
#[serde(deny_unknown_fields)]
pub struct PolicyChange {
    /// What happens when poison is consumed.
    #[arg(long, value_enum)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub consume: Option<Consume>,
    /// How exactly that is reported.
    #[arg(long, value_enum)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<ReportedAddress>,
    /// What happens when a line is written whole.
    #[arg(long, value_enum)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub full_line_store: Option<FullLineStore>,
}

impl PolicyChange {
    /// The policy after the change.
    pub fn apply(self, policy: PoisonPolicy) -> PoisonPolicy {
        PoisonPolicy {
            consume: self.consume.unwrap_or(policy.consume),
            address: self.address.unwrap_or(policy.address),
            full_line_store: self.full_line_store.unwrap_or(policy.full_line_store),
        }
    }
}

/// What a processor gets that touches memory of a device that has departed, or whose DIMM is locked. Every touch is told
/// besides.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum StaleAnswer {
    /// Loads find ones and stores go nowhere, as on a bus on which nobody answers.
    #[default]
    Ones,
    /// Loads and fetches end in a machine check, as on a link that is down. Stores go nowhere: they are posted.
    MachineCheck,
    /// As `ones`, and the machine is paused behind the instruction, so that it can be looked at.
    Pause,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_leaves_the_rest() {
        let policy = PoisonPolicy { full_line_store: FullLineStore::Clear, ..PoisonPolicy::default() };
        let change: PolicyChange = serde_json::from_str(r#"{"consume": "log"}"#).unwrap();
        let changed = change.apply(policy);
        assert_eq!(changed, PoisonPolicy { consume: Consume::Log, ..policy });
        assert!(serde_json::from_str::<PolicyChange>(r#"{"consum": "log"}"#).is_err());
    }
}
