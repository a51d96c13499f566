//! Errors of memory.

use aconite_acpi::cper::{MemoryError, MemoryError2, Section};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{bounded, number};
use crate::command::Error;
use crate::units::Address;

/// Where in memory the error is, and what it is. What is not given is not said.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::Args)]
#[serde(deny_unknown_fields, default)]
pub struct MemoryFields {
    /// Guest-physical address
    #[arg(long, value_name = "GPA")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<Address>,
    /// Which bits of the address count
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mask: Option<Address>,
    /// Type of the error: 2 single-bit ECC, 3 multi-bit ECC, 14 scrub corrected, 15 scrub uncorrected, and so on
    #[arg(long, value_name = "NUMBER", value_parser = number::<u8>)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error_type: Option<u8>,
    /// Error status word
    #[arg(long, value_name = "NUMBER")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error_status: Option<Address>,
    /// Node
    #[arg(long, value_name = "NUMBER", value_parser = number::<u16>)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<u16>,
    /// Card
    #[arg(long, value_name = "NUMBER", value_parser = number::<u16>)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub card: Option<u16>,
    /// Module
    #[arg(long, value_name = "NUMBER", value_parser = number::<u16>)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub module: Option<u16>,
    /// Bank
    #[arg(long, value_name = "NUMBER", value_parser = number::<u16>)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bank: Option<u16>,
    /// Device
    #[arg(long, value_name = "NUMBER", value_parser = number::<u32>)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<u32>,
    /// Row
    #[arg(long, value_name = "NUMBER", value_parser = number::<u32>)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub row: Option<u32>,
    /// Column
    #[arg(long, value_name = "NUMBER", value_parser = number::<u32>)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub column: Option<u32>,
    /// Rank
    #[arg(long, value_name = "NUMBER", value_parser = number::<u32>)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rank: Option<u32>,
    /// Bit
    #[arg(long, value_name = "NUMBER", value_parser = number::<u32>)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bit_position: Option<u32>,
    /// Use the wider section "memory 2", which Linux does not act on
    #[arg(long)]
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub wide: bool,
}

impl MemoryFields {
    pub(super) fn section(&self) -> Result<Section, Error> {
        let number = |address: Option<Address>| address.map(|address| address.0);
        if self.wide {
            return Ok(MemoryError2 {
                error_status: number(self.error_status),
                address: number(self.address),
                mask: number(self.mask),
                node: self.node,
                card: self.card,
                module: self.module,
                bank: self.bank,
                device: self.device,
                row: self.row,
                column: self.column,
                rank: self.rank,
                bit_position: self.bit_position,
                error_type: self.error_type,
                ..MemoryError2::default()
            }
            .section());
        }
        let short = u32::from(u16::MAX);
        Ok(MemoryError {
            error_status: number(self.error_status),
            address: number(self.address),
            mask: number(self.mask),
            node: self.node,
            card: self.card,
            module: self.module,
            bank: self.bank,
            device: bounded("device", self.device, short)?,
            row: bounded("row", self.row, MemoryError::MAX_ROW)?,
            column: bounded("column", self.column, short)?,
            rank: bounded("rank", self.rank, short)?,
            bit_position: bounded("bit_position", self.bit_position, short)?,
            error_type: self.error_type,
            ..MemoryError::default()
        }
        .section())
    }
}
