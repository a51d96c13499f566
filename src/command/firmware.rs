//! Firmware that misbehaves on command: which calls, and what becomes of their answers.

use aconite_devices::nvdimm::{CallFault, Callee, Deed, PlannedFault};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Error, ErrorCode};
use crate::units::TimeSpan;

/// Longest time for which an answer can be delayed.
const LONGEST_DELAY: u64 = 3600;
/// Most bytes of an answer.
const LONGEST_ANSWER: u32 = 4088;

/// What of a device's firmware is called.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize, JsonSchema, clap::ValueEnum,
)]
#[serde(rename_all = "snake_case")]
pub enum FirmwareTarget {
    /// _DSM of the NVDIMM root device: scrubs, clearing and injection of errors (ACPI 6.5, 9.20.7)
    #[default]
    Root,
    /// _DSM of the root device by Intel's UUID: activation of firmware
    Activation,
    /// _DSM of a DIMM
    Dimm,
    /// _FIT of the root device
    Fit,
    /// _LSI of a DIMM
    Lsi,
    /// _LSR of a DIMM
    Lsr,
    /// _LSW of a DIMM
    Lsw,
}

impl From<FirmwareTarget> for Callee {
    fn from(target: FirmwareTarget) -> Self {
        match target {
            FirmwareTarget::Root => Self::Root,
            FirmwareTarget::Activation => Self::Activation,
            FirmwareTarget::Dimm => Self::Dimm,
            FirmwareTarget::Fit => Self::Fit,
            FirmwareTarget::Lsi => Self::LabelInformation,
            FirmwareTarget::Lsr => Self::LabelRead,
            FirmwareTarget::Lsw => Self::LabelWrite,
        }
    }
}

impl From<Callee> for FirmwareTarget {
    fn from(callee: Callee) -> Self {
        match callee {
            Callee::Root => Self::Root,
            Callee::Activation => Self::Activation,
            Callee::Dimm => Self::Dimm,
            Callee::Fit => Self::Fit,
            Callee::LabelInformation => Self::Lsi,
            Callee::LabelRead => Self::Lsr,
            Callee::LabelWrite => Self::Lsw,
        }
    }
}

/// A fault of firmware: exactly one of `status`, `delay`, `length` and `bytes` is given.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema, clap::Args)]
#[serde(deny_unknown_fields)]
pub struct FirmwareFault {
    /// What is called
    #[arg(long, value_enum, default_value_t)]
    #[serde(default)]
    pub target: FirmwareTarget,
    /// The function of a _DSM; without one 0
    #[arg(long, value_name = "N", default_value_t)]
    #[serde(default)]
    pub function: u32,
    /// The first call that it meets, counted from now: 1 is the next
    #[arg(long, value_name = "K", default_value_t = 1)]
    #[serde(default = "one")]
    pub call: u64,
    /// How many calls it meets; 0 is all from then on
    #[arg(long, value_name = "N", default_value_t = 1)]
    #[serde(default = "one")]
    pub count: u64,
    /// The function is not carried out and answers this status: a number, such as 0x10000
    #[arg(long, group = "deed", value_name = "STATUS", value_parser = number)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<u32>,
    /// The answer comes late, by an hour at most; the processor that called stands still meanwhile
    #[arg(long, group = "deed", value_name = "TIME")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delay: Option<TimeSpan>,
    /// The answer is cut, or filled up with zeros, to this many bytes
    #[arg(long, group = "deed", value_name = "BYTES")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub length: Option<u32>,
    /// These bytes, in hexadecimal, take the place of those from --offset on
    #[arg(long, group = "deed", value_name = "HEX")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<String>,
    /// Where --bytes go in the answer
    #[arg(long, value_name = "N", default_value_t)]
    #[serde(default)]
    pub offset: u32,
}

fn one() -> u64 {
    1
}

fn number(text: &str) -> Result<u32, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16),
        None => text.parse(),
    };
    parsed.map_err(|error| format!("{error}; give a number such as 3 or 0x10000"))
}

impl FirmwareFault {
    /// The fault as the model plans it.
    ///
    /// # Errors
    /// [`ErrorCode::InvalidConfig`] names what is wrong with it.
    pub fn plan(&self) -> Result<CallFault, Error> {
        let wrong = |message: String, remedy: &str| Error::new(ErrorCode::InvalidConfig, message, remedy);
        let deed = match (self.status, self.delay, self.length, &self.bytes) {
            (Some(status), None, None, None) => Deed::Status(status),
            (None, Some(delay), None, None) if delay.0.as_secs() <= LONGEST_DELAY => Deed::Delay(delay.0),
            (None, Some(delay), None, None) => {
                return Err(wrong(format!("A delay of {delay} is too long"), "give an hour (1h) at most"));
            }
            (None, None, Some(length), None) if length <= LONGEST_ANSWER => Deed::Length(length),
            (None, None, Some(length), None) => {
                return Err(wrong(
                    format!("An answer has no {length} bytes"),
                    "give a length of 4088 at most",
                ));
            }
            (None, None, None, Some(text)) => {
                let bytes = hexadecimal(text).ok_or_else(|| {
                    wrong(
                        format!("The bytes {text:?} are none"),
                        "give pairs of hexadecimal digits, such as 0100",
                    )
                })?;
                Deed::Bytes { offset: self.offset, bytes }
            }
            _ => {
                return Err(wrong(
                    "The fault does not say what becomes of the answer, or says it twice".to_owned(),
                    "give exactly one of status, delay, length and bytes",
                ));
            }
        };
        if self.call == 0 {
            return Err(wrong("There is no call number 0".to_owned(), "give call=1 for the next"));
        }
        let count = (self.count > 0).then_some(self.count);
        Ok(CallFault { callee: self.target.into(), function: self.function, call: self.call, count, deed })
    }
}

fn hexadecimal(text: &str) -> Option<Vec<u8>> {
    let digits: Vec<u8> = text.chars().map(|c| c.to_digit(16).map(|d| d as u8)).collect::<Option<_>>()?;
    let (pairs, rest) = digits.as_chunks::<2>();
    (rest.is_empty() && !pairs.is_empty()).then(|| pairs.iter().map(|[high, low]| high << 4 | low).collect())
}

/// A fault, and how often it has met a call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct FirmwareFaultState {
    /// The fault.
    #[serde(flatten)]
    pub fault: FirmwareFault,
    /// Calls that it has met.
    pub met: u64,
}

impl From<PlannedFault> for FirmwareFaultState {
    fn from(planned: PlannedFault) -> Self {
        let CallFault { callee, function, call, count, deed } = planned.fault;
        let mut fault = FirmwareFault {
            target: callee.into(),
            function,
            call,
            count: count.unwrap_or(0),
            ..FirmwareFault::default()
        };
        match deed {
            Deed::Status(status) => fault.status = Some(status),
            Deed::Delay(time) => fault.delay = Some(TimeSpan(time)),
            Deed::Length(length) => fault.length = Some(length),
            Deed::Bytes { offset, bytes } => {
                fault.offset = offset;
                fault.bytes = Some(bytes.iter().map(|byte| format!("{byte:02x}")).collect());
            }
        }
        Self { fault, met: planned.met }
    }
}

/// The faults of a device's firmware.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct FirmwareState {
    /// The device. Devices on one bus have one firmware.
    pub device: String,
    /// Its faults, those that are over too.
    pub faults: Vec<FirmwareFaultState>,
}

/// What is to be done to a device's firmware.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FirmwareChange {
    /// Nothing.
    Show,
    /// It is to fail.
    Plan(FirmwareFault),
    /// It is to behave.
    Forget,
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn faults_come_back_as_they_were_planned() {
        let base = || FirmwareFault { function: 3, call: 2, count: 1, ..FirmwareFault::default() };
        for fault in [
            FirmwareFault { status: Some(0x1_0000), count: 0, ..base() },
            FirmwareFault { delay: Some(TimeSpan(Duration::from_millis(1500))), ..base() },
            FirmwareFault { length: Some(7), target: FirmwareTarget::Dimm, ..base() },
            FirmwareFault { bytes: Some("00ff".into()), offset: 4, target: FirmwareTarget::Lsr, ..base() },
        ] {
            let text = serde_json::to_string(&fault).unwrap();
            assert_eq!(serde_json::from_str::<FirmwareFault>(&text).unwrap(), fault);
            let planned = fault.plan().unwrap();
            assert_eq!((planned.function, planned.call), (3, 2));
        }
    }

    #[test]
    fn mistakes_are_refused_by_name() {
        let refused = |fault: FirmwareFault| fault.plan().unwrap_err().to_string();
        let base = || FirmwareFault { call: 1, count: 1, ..FirmwareFault::default() };
        assert_eq!(
            refused(base()),
            "The fault does not say what becomes of the answer, or says it twice; give exactly one of status, delay, length and bytes"
        );
        assert!(
            refused(FirmwareFault { status: Some(1), length: Some(2), ..base() }).contains("exactly one")
        );
        assert!(refused(FirmwareFault { length: Some(4089), ..base() }).contains("no 4089 bytes"));
        assert!(
            refused(FirmwareFault { delay: Some(TimeSpan(Duration::from_secs(3601))), ..base() })
                .contains("3601s")
        );
        for bytes in ["", "0", "0g", "+1"] {
            assert!(
                refused(FirmwareFault { bytes: Some(bytes.into()), ..base() }).contains("are none"),
                "{bytes}"
            );
        }
        assert!(refused(FirmwareFault { status: Some(1), call: 0, ..base() }).contains("number 0"));
    }
}
