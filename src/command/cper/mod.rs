//! Error records by request: what a user says of an error, and the status block that firmware makes of it.

mod cxl;
mod memory;
mod pcie;
mod processor;
mod raw;

use std::fmt;
use std::str::FromStr;
use std::time::{SystemTime, UNIX_EPOCH};

use aconite_acpi::cper::{Entry, FruText, Section, SectionFlags, Severity, Timestamp, status_block};
use aconite_acpi::ghes::Source;
use aconite_acpi::{Guid, NotAGuid};
use aconite_devices::calendar::Calendar;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

pub use self::cxl::{CxlEventFields, CxlProtocolFields};
pub use self::memory::MemoryFields;
pub use self::pcie::{Bdf, PcieFields};
pub use self::processor::{ProcessorFields, X86Fields};
pub use self::raw::{FirmwareFields, RawFields};
use super::{Error, ErrorCode};
use crate::units::parse_number;

/// How bad an error is.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema, clap::ValueEnum,
)]
#[serde(rename_all = "snake_case")]
pub enum CperSeverity {
    /// Nothing is wrong.
    Informational,
    /// Corrected.
    #[default]
    Corrected,
    /// Uncorrected, and the system can go on.
    Recoverable,
    /// Uncorrected, and the system cannot go on.
    Fatal,
}

impl From<CperSeverity> for Severity {
    fn from(severity: CperSeverity) -> Self {
        match severity {
            CperSeverity::Informational => Self::Informational,
            CperSeverity::Corrected => Self::Corrected,
            CperSeverity::Recoverable => Self::Recoverable,
            CperSeverity::Fatal => Self::Fatal,
        }
    }
}

/// How the guest is told of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum CperNotify {
    /// By an interrupt of the platform: Notify 0x80 on the error device (PNP0C33).
    Interrupt,
    /// By NMI, on the first vCPU.
    Nmi,
    /// Not at all: it looks once a second.
    Poll,
}

/// Flags of a section (UEFI 2.10, N.2.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum CperFlag {
    /// The section that the error is attributed to.
    Primary,
    /// The error was not contained.
    ContainmentWarning,
    /// The component was reset.
    Reset,
    /// There were more corrected errors than there should be: Linux takes the page out of use.
    ThresholdExceeded,
    /// The component cannot be asked for more.
    NotAccessible,
    /// Nothing has consumed the error.
    Latent,
    /// The error came from elsewhere.
    Propagated,
    /// Other errors were lost.
    Overflow,
}

impl From<CperFlag> for SectionFlags {
    fn from(flag: CperFlag) -> Self {
        match flag {
            CperFlag::Primary => Self::PRIMARY,
            CperFlag::ContainmentWarning => Self::CONTAINMENT_WARNING,
            CperFlag::Reset => Self::RESET,
            CperFlag::ThresholdExceeded => Self::THRESHOLD_EXCEEDED,
            CperFlag::NotAccessible => Self::NOT_ACCESSIBLE,
            CperFlag::Latent => Self::LATENT,
            CperFlag::Propagated => Self::PROPAGATED,
            CperFlag::Overflow => Self::OVERFLOW,
        }
    }
}

/// A GUID, as text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuidText(pub Guid);

impl FromStr for GuidText {
    type Err = NotAGuid;

    fn from_str(text: &str) -> Result<Self, NotAGuid> {
        text.parse().map(Self)
    }
}

impl fmt::Display for GuidText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

text_in_json!(GuidText, "GuidText", "A GUID.", "a5bc1114-6f64-4ede-b863-3e83ed7c83b1");

/// A request to tell the guest of an error, as firmware does. The error itself is not made: nothing is poisoned.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CperRequest {
    /// What is said of any error.
    #[serde(default)]
    pub common: CperCommon,
    /// The error.
    pub section: CperSection,
}

/// What is said of any error.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::Args)]
#[serde(deny_unknown_fields, default)]
pub struct CperCommon {
    /// How bad the error is
    #[arg(long, value_enum, global = true, default_value = "corrected")]
    pub severity: CperSeverity,
    /// How the guest is told [default: nmi for fatal errors, interrupt for others]
    #[arg(long, value_enum, global = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub notify: Option<CperNotify>,
    /// Flags of the section
    #[arg(long = "flag", value_enum, global = true, value_name = "FLAG")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub flags: Vec<CperFlag>,
    /// Name of the field-replaceable unit, at most 20 characters
    #[arg(long, global = true, value_name = "TEXT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fru_text: Option<String>,
    /// GUID of the field-replaceable unit
    #[arg(long, global = true, value_name = "GUID")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fru_id: Option<GuidText>,
}

/// An error, by the kind of section that describes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::Subcommand)]
#[serde(rename_all = "snake_case")]
pub enum CperSection {
    /// An error of memory
    Memory(MemoryFields),
    /// An error of a PCI Express component
    Pcie(PcieFields),
    /// An error of a processor, of any kind
    Processor(ProcessorFields),
    /// An error of an x86 processor, with the registers of a machine-check bank
    X86(X86Fields),
    /// A reference to a record that firmware keeps
    Firmware(FirmwareFields),
    /// An error of the CXL protocol
    CxlProtocol(CxlProtocolFields),
    /// An event of a CXL memory device
    CxlEvent(CxlEventFields),
    /// Any section, as bytes
    Raw(RawFields),
}

impl CperSection {
    fn section(&self) -> Result<Section, Error> {
        match self {
            Self::Memory(fields) => fields.section(),
            Self::Pcie(fields) => fields.section(),
            Self::Processor(fields) => Ok(fields.section()),
            Self::X86(fields) => fields.section(),
            Self::Firmware(fields) => Ok(fields.section()),
            Self::CxlProtocol(fields) => fields.section(),
            Self::CxlEvent(fields) => fields.section(),
            Self::Raw(fields) => Ok(fields.section()),
        }
    }

    /// Name of the kind, as requests and events have it.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Memory(_) => "memory",
            Self::Pcie(_) => "pcie",
            Self::Processor(_) => "processor",
            Self::X86(_) => "x86",
            Self::Firmware(_) => "firmware",
            Self::CxlProtocol(_) => "cxl_protocol",
            Self::CxlEvent(_) => "cxl_event",
            Self::Raw(_) => "raw",
        }
    }
}

impl CperRequest {
    /// The source that carries the record.
    pub fn source(&self) -> Source {
        let severity = Severity::from(self.common.severity);
        let notify = match severity {
            Severity::Fatal => CperNotify::Nmi,
            _ => CperNotify::Interrupt,
        };
        match self.common.notify.unwrap_or(notify) {
            CperNotify::Nmi => Source::Nmi,
            CperNotify::Poll => Source::Polled,
            CperNotify::Interrupt if severity.uncorrected() => Source::Uncorrected,
            CperNotify::Interrupt => Source::Corrected,
        }
    }

    /// The status block, with `now` as the time of the error.
    ///
    /// # Errors
    /// [`ErrorCode::BadParameter`] names the field whose value has no place in the section.
    pub fn status_block(&self, now: SystemTime) -> Result<Vec<u8>, Error> {
        let common = &self.common;
        let severity = Severity::from(common.severity);
        let fru_text = common.fru_text.as_deref().map(fru_text).transpose()?;
        let flags = common.flags.iter().fold(SectionFlags::empty(), |all, &flag| all.union(flag.into()));
        let entry = Entry {
            flags,
            fru_id: common.fru_id.map(|guid| guid.0),
            fru_text,
            timestamp: Some(timestamp(now)),
            ..Entry::new(severity, self.section.section()?)
        };
        Ok(status_block(severity, &[entry]))
    }
}

fn fru_text(text: &str) -> Result<FruText, Error> {
    FruText::new(text).ok_or_else(|| {
        Error::new(
            ErrorCode::BadParameter,
            format!("fru_text {text:?} is longer than {} characters or not printable ASCII", FruText::LENGTH),
            "shorten it, such as \"DIMM_A1\"",
        )
    })
}

/// The time of an error, as records carry it.
pub fn timestamp(now: SystemTime) -> Timestamp {
    let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    let date = Calendar::from_epoch(since.as_secs() as i64);
    // All are in range: a month is at most 12, and the clock is far from the year 10000.
    Timestamp {
        year: date.year as u16,
        month: date.month as u8,
        day: date.day as u8,
        hour: date.hour as u8,
        minute: date.minute as u8,
        second: date.second as u8,
    }
}

/// A number of a command line, decimal or hexadecimal.
fn number<T: TryFrom<u64>>(text: &str) -> Result<T, String> {
    let number = parse_number(text).map_err(|error| error.to_string())?;
    T::try_from(number).map_err(|_| format!("{text} does not fit into {} bits", 8 * size_of::<T>()))
}

/// The value of a field whose place in the section has fewer bits than its type.
fn bounded<T: TryFrom<u64>>(
    field: &str,
    value: Option<impl Into<u64>>,
    max: u32,
) -> Result<Option<T>, Error> {
    let Some(value) = value.map(Into::into) else { return Ok(None) };
    match T::try_from(value) {
        Ok(fitting) if value <= u64::from(max) => Ok(Some(fitting)),
        _ => Err(Error::new(
            ErrorCode::BadParameter,
            format!("{field} {value:#x} does not fit into the section"),
            format!("give at most {max:#x}"),
        )),
    }
}

/// A record was taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CperAccepted {
    /// Number of the record: events carry it.
    pub record: u64,
    /// The error source: `corrected`, `uncorrected`, `nmi` or `polled`.
    pub source: String,
    /// Records of this source that come before it: the guest must acknowledge them first.
    pub ahead: usize,
}

/// Makes a type with `FromStr` and `Display` travel as text in JSON.
macro_rules! text_in_json {
    ($type:ty, $name:literal, $description:literal, $example:literal) => {
        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
            }
        }

        impl JsonSchema for $type {
            fn schema_name() -> std::borrow::Cow<'static, str> {
                $name.into()
            }

            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!({"description": $description, "type": "string", "examples": [$example]})
            }
        }
    };
}
use text_in_json;

#[cfg(test)]
#[path = "cper_test.rs"]
mod tests;
