//! What a guest does with its firmware's error injection (EINJ), as events tell it.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How far an injection has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum InjectionStep {
    /// The error is in place.
    Injected,
    /// The error cannot be injected there.
    Refused,
    /// The guest made the error happen.
    Triggered,
}

/// How bad an injected error is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum InjectionSeverity {
    /// It is corrected, and only reported.
    Corrected,
    /// Data is lost, and the system can go on.
    NonFatal,
    /// The system cannot go on.
    Fatal,
}
