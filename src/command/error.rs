//! Errors of commands and requests: a stable code for programs, a message and a remedy for people.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The kind of an error. The words are stable: programs may depend on them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// The request is no HTTP that this server understands.
    BadHttp,
    /// The body is no JSON, or not of the shape that the route takes.
    BadJson,
    /// A parameter of the path or the query is missing, unknown or wrong.
    BadParameter,
    /// There is nothing under this path.
    NoSuchRoute,
    /// The path exists, but not with this method.
    MethodNotAllowed,
    /// The body's length was not given.
    LengthRequired,
    /// The body is longer than the server reads.
    BodyTooLarge,
    /// The head of the request is longer than the server reads.
    HeadTooLarge,
    /// The client took too long to send its request.
    RequestTimeout,
    /// Too many connections are open.
    TooManyConnections,
    /// No device has this id.
    NoSuchDevice,
    /// No vCPU has this number.
    NoSuchVcpu,
    /// No operation has this number.
    NoSuchOperation,
    /// The description of a device or machine is wrong.
    InvalidConfig,
    /// The id is taken.
    IdInUse,
    /// A range leaves the device.
    OutsideDevice,
    /// No slot is free, or none is large enough.
    NoFreeSlot,
    /// The chosen address cannot be used.
    AddressInUse,
    /// The machine is not in a state for this.
    WrongState,
    /// The device is not in a state for this.
    WrongDeviceState,
    /// The guest's kernel or the device has no way to do this.
    NotSupported,
    /// The guest does not do its part, or cannot.
    GuestRefused,
    /// The guest has not done in time what it was asked for.
    GuestTimedOut,
    /// The guest has not taken what it was given before.
    QueueFull,
    /// A file is locked by another process.
    FileInUse,
    /// A limit of the host is reached.
    HostLimit,
    /// The machine has ended and answers no more.
    MachineGone,
    /// The monitor failed; its message says in what.
    Internal,
}

impl ErrorCode {
    /// All codes, in the order of the documentation.
    pub const ALL: [Self; 28] = [
        Self::BadHttp,
        Self::BadJson,
        Self::BadParameter,
        Self::NoSuchRoute,
        Self::MethodNotAllowed,
        Self::LengthRequired,
        Self::BodyTooLarge,
        Self::HeadTooLarge,
        Self::RequestTimeout,
        Self::TooManyConnections,
        Self::NoSuchDevice,
        Self::NoSuchVcpu,
        Self::NoSuchOperation,
        Self::InvalidConfig,
        Self::IdInUse,
        Self::OutsideDevice,
        Self::NoFreeSlot,
        Self::AddressInUse,
        Self::WrongState,
        Self::WrongDeviceState,
        Self::NotSupported,
        Self::GuestRefused,
        Self::GuestTimedOut,
        Self::QueueFull,
        Self::FileInUse,
        Self::HostLimit,
        Self::MachineGone,
        Self::Internal,
    ];

    /// The status of an HTTP reply with this error (RFC 9110, 15).
    pub const fn http_status(self) -> u16 {
        match self {
            Self::BadHttp
            | Self::BadJson
            | Self::BadParameter
            | Self::InvalidConfig
            | Self::OutsideDevice => 400,
            Self::NoSuchRoute | Self::NoSuchDevice | Self::NoSuchVcpu | Self::NoSuchOperation => 404,
            Self::MethodNotAllowed => 405,
            Self::RequestTimeout => 408,
            Self::IdInUse
            | Self::NoFreeSlot
            | Self::AddressInUse
            | Self::WrongState
            | Self::WrongDeviceState
            | Self::NotSupported
            | Self::GuestRefused
            | Self::QueueFull
            | Self::FileInUse => 409,
            Self::LengthRequired => 411,
            Self::BodyTooLarge => 413,
            Self::HeadTooLarge => 431,
            Self::Internal => 500,
            Self::TooManyConnections | Self::MachineGone => 503,
            Self::GuestTimedOut => 504,
            Self::HostLimit => 507,
        }
    }
}

/// A refusal: nothing was changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Error {
    /// What kind of error it is.
    pub code: ErrorCode,
    /// The thing, its value, and what is wrong with it.
    pub message: String,
    /// What would be right.
    pub remedy: String,
}

impl Error {
    /// An error with its three parts.
    pub fn new(code: ErrorCode, message: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { code, message: message.into(), remedy: remedy.into() }
    }

    /// No device has the id `device`; `known` are those that there are.
    pub fn no_such_device(device: &str, known: &[&str]) -> Self {
        let remedy = if known.is_empty() {
            "the machine has no memory devices: give it one with --pmem, or insert one".to_owned()
        } else {
            format!("name one of: {}", known.join(", "))
        };
        Self::new(ErrorCode::NoSuchDevice, format!("There is no device {device:?}"), remedy)
    }

    /// The machine has ended while the command waited for it.
    pub fn machine_gone() -> Self {
        Self::new(ErrorCode::MachineGone, "The machine has ended", "start another one")
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        if !self.remedy.is_empty() {
            write!(f, "; {}", self.remedy)?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {}
