//! Sections as bytes, and references to records of firmware.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::str::FromStr;

use aconite_acpi::cper::{ENTRY_SIZE, FirmwareError, STATUS_BLOCK_SIZE, Section};
use aconite_acpi::ghes::BLOCK_SIZE;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::{GuidText, number, text_in_json};

/// Most bytes of a section that fit into a status block.
const MAX_SECTION: u64 = BLOCK_SIZE - (STATUS_BLOCK_SIZE + ENTRY_SIZE) as u64;

/// Bytes, as hexadecimal digits.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HexBytes(pub Vec<u8>);

/// What is no content of a section.
#[derive(Debug, thiserror::Error)]
pub enum NoBytes {
    /// The text has an odd number of digits, or other characters.
    #[error("{0:?} is no row of bytes: write two hexadecimal digits for each")]
    Digits(String),
    /// There are too many.
    #[error("A section has at most {MAX_SECTION} bytes: shorten it")]
    TooLong,
    /// The file cannot be read.
    #[error("{0}")]
    File(#[from] std::io::Error),
}

impl HexBytes {
    /// The content of a file.
    pub fn from_file(path: &str) -> Result<Self, NoBytes> {
        let mut bytes = Vec::new();
        File::open(path)?.take(MAX_SECTION + 1).read_to_end(&mut bytes)?;
        Self(bytes).bounded()
    }

    fn bounded(self) -> Result<Self, NoBytes> {
        if self.0.len() as u64 > MAX_SECTION { Err(NoBytes::TooLong) } else { Ok(self) }
    }
}

impl FromStr for HexBytes {
    type Err = NoBytes;

    fn from_str(text: &str) -> Result<Self, NoBytes> {
        let refused = || NoBytes::Digits(text.chars().take(40).collect());
        let digits: Option<Vec<u8>> = text.chars().map(|c| c.to_digit(16).map(|digit| digit as u8)).collect();
        let digits = digits.filter(|digits| digits.len() % 2 == 0).ok_or_else(refused)?;
        Self(digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect()).bounded()
    }
}

impl fmt::Display for HexBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

text_in_json!(HexBytes, "HexBytes", "Bytes, two hexadecimal digits for each.", "00ff10");

/// A section as bytes. Nothing in it is checked: a wrong one shows what a guest makes of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::Args)]
#[serde(deny_unknown_fields)]
pub struct RawFields {
    /// Section type
    #[arg(long)]
    pub guid: GuidText,
    /// File with the section's bytes
    #[arg(long = "file", value_name = "PATH", value_parser = HexBytes::from_file)]
    pub data: HexBytes,
}

impl RawFields {
    pub(super) fn section(&self) -> Section {
        Section { guid: self.guid.0, body: self.data.0.clone() }
    }
}

/// A reference to a record that firmware keeps.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::Args)]
#[serde(deny_unknown_fields, default)]
pub struct FirmwareFields {
    /// Kind of record: 0 IPF SAL, 1 and 2 SoC firmware
    #[arg(long, value_name = "NUMBER", value_parser = number::<u8>, default_value_t = 0)]
    pub record_type: u8,
    /// Number of the record
    #[arg(long, value_name = "NUMBER", value_parser = number::<u64>, default_value_t = 0)]
    pub record: u64,
    /// GUID of the record, in the place of the number
    #[arg(long, value_name = "GUID")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub record_guid: Option<GuidText>,
}

impl FirmwareFields {
    pub(super) fn section(&self) -> Section {
        FirmwareError {
            record_type: self.record_type,
            record: self.record,
            record_guid: self.record_guid.map(|guid| guid.0),
        }
        .section()
    }
}
