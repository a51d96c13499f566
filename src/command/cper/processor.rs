//! Errors of processors.

use aconite_acpi::cper::{ProcessorError, Section, SmcaBank, X86ProcessorError};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::number;
use crate::command::{Error, ErrorCode};
use crate::units::Address;

/// What a processor met. What is not given is not said.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::Args)]
#[serde(deny_unknown_fields, default)]
pub struct ProcessorFields {
    /// Local APIC ID
    #[arg(long, value_name = "NUMBER", value_parser = number::<u64>)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub apic_id: Option<u64>,
    /// Type of the error: 1 cache, 2 TLB, 4 bus, 8 micro-architectural
    #[arg(long, value_name = "NUMBER", value_parser = number::<u8>)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error_type: Option<u8>,
    /// Operation: 1 data read, 2 data write, 3 instruction execution
    #[arg(long, value_name = "NUMBER", value_parser = number::<u8>)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub operation: Option<u8>,
    /// Level of the structure
    #[arg(long, value_name = "NUMBER", value_parser = number::<u8>)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub level: Option<u8>,
    /// Address that was accessed
    #[arg(long, value_name = "GPA")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<Address>,
    /// Instruction pointer
    #[arg(long, value_name = "ADDRESS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ip: Option<Address>,
}

impl ProcessorFields {
    pub(super) fn section(&self) -> Section {
        ProcessorError {
            error_type: self.error_type,
            operation: self.operation,
            level: self.level,
            apic_id: self.apic_id,
            target: self.address.map(|address| address.0),
            ip: self.ip.map(|ip| ip.0),
            ..ProcessorError::default()
        }
        .section()
    }
}

/// What an x86 processor met, and the registers of the SMCA bank that logged it. Linux on AMD logs the bank as a
/// machine check.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::Args)]
#[serde(deny_unknown_fields, default)]
pub struct X86Fields {
    /// Local APIC ID
    #[arg(long, value_name = "NUMBER", value_parser = number::<u64>)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub apic_id: Option<u64>,
    /// Number of the bank
    #[arg(long, value_name = "NUMBER", value_parser = number::<u8>, requires = "status")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bank: Option<u8>,
    /// MCA_STATUS
    #[arg(long, value_name = "NUMBER", requires = "bank")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<Address>,
    /// MCA_ADDR, which is also told as the address that was accessed
    #[arg(long, value_name = "GPA")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<Address>,
    /// MCA_MISC0
    #[arg(long, value_name = "NUMBER", requires = "bank")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub misc: Option<Address>,
    /// MCA_CONFIG
    #[arg(long, value_name = "NUMBER", requires = "bank")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub config: Option<Address>,
    /// MCA_IPID
    #[arg(long, value_name = "NUMBER", requires = "bank")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ipid: Option<Address>,
    /// MCA_SYND
    #[arg(long, value_name = "NUMBER", requires = "bank")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub synd: Option<Address>,
    /// Instruction pointer
    #[arg(long, value_name = "ADDRESS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ip: Option<Address>,
}

impl X86Fields {
    pub(super) fn section(&self) -> Result<Section, Error> {
        let number = |register: Option<Address>| register.unwrap_or_default().0;
        let registers = [self.status, self.misc, self.config, self.ipid, self.synd];
        let bank = match self.bank {
            Some(bank) => Some(SmcaBank {
                bank,
                status: number(self.status),
                address: number(self.address),
                misc: number(self.misc),
                config: number(self.config),
                ipid: number(self.ipid),
                synd: number(self.synd),
            }),
            None if registers.iter().any(Option::is_some) => {
                return Err(Error::new(
                    ErrorCode::BadParameter,
                    "Registers of a bank are given without its number",
                    "add the field bank",
                ));
            }
            None => None,
        };
        Ok(X86ProcessorError {
            apic_id: self.apic_id,
            cpuid: None,
            target: self.address.map(|address| address.0),
            ip: self.ip.map(|ip| ip.0),
            bank,
        }
        .section())
    }
}
