//! Errors of PCI Express components.

use std::fmt;
use std::str::FromStr;

use aconite_acpi::cper::{PcieDevice, PcieError, Section};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::{bounded, number, text_in_json};
use crate::command::{Error, ErrorCode};
use crate::units::Address;

/// Place of a PCI function, written as Linux writes it: `0000:00:1f.3`, the segment being optional.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Bdf {
    /// Segment.
    pub segment: u16,
    /// Bus.
    pub bus: u8,
    /// Device, 0 to 31.
    pub device: u8,
    /// Function, 0 to 7.
    pub function: u8,
}

/// A text that names no PCI function.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no PCI function: write segment, bus, device and function as in 0000:00:1f.3")]
pub struct NotABdf(String);

impl FromStr for Bdf {
    type Err = NotABdf;

    fn from_str(text: &str) -> Result<Self, NotABdf> {
        let parse = || {
            let (rest, function) = text.rsplit_once('.')?;
            let (rest, device) = rest.rsplit_once(':')?;
            let (segment, bus) = rest.rsplit_once(':').unwrap_or(("0", rest));
            let number = |digits: &str, max: u32| {
                let plain = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
                u32::from_str_radix(digits, 16).ok().filter(|&number| plain && number <= max)
            };
            Some(Self {
                segment: number(segment, 0xffff)? as u16,
                bus: number(bus, 0xff)? as u8,
                device: number(device, 31)? as u8,
                function: number(function, 7)? as u8,
            })
        };
        parse().ok_or_else(|| NotABdf(text.to_owned()))
    }
}

impl fmt::Display for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:02x}:{:02x}.{:x}", self.segment, self.bus, self.device, self.function)
    }
}

text_in_json!(Bdf, "Bdf", "Place of a PCI function.", "0000:00:1f.3");

/// Which component the error is of, and its AER registers. What is not given is not said.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::Args)]
#[serde(deny_unknown_fields, default)]
pub struct PcieFields {
    /// The function, such as 0000:00:1f.3
    #[arg(long, value_name = "BDF")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<Bdf>,
    /// Vendor of the function
    #[arg(long, value_name = "NUMBER", requires = "device")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vendor: Option<Address>,
    /// Device ID of the function
    #[arg(long, value_name = "NUMBER", requires = "device")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device_id: Option<Address>,
    /// Class of the function, 24 bits
    #[arg(long, value_name = "NUMBER", requires = "device")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub class: Option<Address>,
    /// Secondary bus of a bridge
    #[arg(long, value_name = "NUMBER", value_parser = number::<u8>, requires = "device")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secondary_bus: Option<u8>,
    /// Slot number, 13 bits
    #[arg(long, value_name = "NUMBER", value_parser = number::<u32>, requires = "device")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slot: Option<u32>,
    /// Port type: 0 endpoint, 4 root port, 5 upstream, 6 downstream switch port
    #[arg(long, value_name = "NUMBER", value_parser = number::<u32>)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port_type: Option<u32>,
    /// Serial number
    #[arg(long, value_name = "NUMBER")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial: Option<Address>,
    /// AER: uncorrectable error status
    #[arg(long, value_name = "NUMBER")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uncorrectable: Option<Address>,
    /// AER: uncorrectable error severity
    #[arg(long, value_name = "NUMBER")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uncorrectable_severity: Option<Address>,
    /// AER: correctable error status
    #[arg(long, value_name = "NUMBER")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub correctable: Option<Address>,
}

/// The value of a register field, refused by name if it has too many bits.
pub(super) fn register(field: &str, value: Option<Address>, max: u32) -> Result<Option<u32>, Error> {
    bounded(field, value.map(|value| value.0), max)
}

impl PcieFields {
    pub(super) fn section(&self) -> Result<Section, Error> {
        let numbers = [self.vendor, self.device_id, self.class];
        let of_a_device =
            numbers.iter().any(Option::is_some) || self.secondary_bus.is_some() || self.slot.is_some();
        if of_a_device && self.device.is_none() {
            return Err(Error::new(
                ErrorCode::BadParameter,
                "vendor, device_id, class, secondary_bus and slot are of a device, and no device is given",
                "add the field device, such as 0000:00:1f.3",
            ));
        }
        let vendor = register("vendor", self.vendor, 0xffff)?.unwrap_or_default();
        let device_id = register("device_id", self.device_id, 0xffff)?.unwrap_or_default();
        let class = register("class", self.class, 0xff_ffff)?.unwrap_or_default();
        let slot = bounded::<u16>("slot", self.slot, 0x1fff)?.unwrap_or_default();
        let device = self.device.map(|place| PcieDevice {
            vendor: vendor as u16,
            device_id: device_id as u16,
            class,
            segment: place.segment,
            bus: place.bus,
            device: place.device,
            function: place.function,
            secondary_bus: self.secondary_bus.unwrap_or_default(),
            slot,
        });
        Ok(PcieError {
            port_type: self.port_type,
            version: Some((4, 0)),
            device,
            serial: self.serial.map(|serial| serial.0),
            aer: self.aer()?,
            ..PcieError::default()
        }
        .section())
    }

    /// The AER capability with its registers, if any of them is given.
    fn aer(&self) -> Result<Option<[u8; 96]>, Error> {
        /// Extended capability header: AER, version 2.
        const HEADER: u32 = 0x0002_0001;
        let uncorrectable = register("uncorrectable", self.uncorrectable, u32::MAX)?;
        let severity = register("uncorrectable_severity", self.uncorrectable_severity, u32::MAX)?;
        let correctable = register("correctable", self.correctable, u32::MAX)?;
        if uncorrectable.or(severity).or(correctable).is_none() {
            return Ok(None);
        }
        let mut aer = [0; 96];
        // Header, uncorrectable status, mask and severity, correctable status (PCI Express 6.0, 7.8.4).
        for (index, register) in [(0, Some(HEADER)), (1, uncorrectable), (3, severity), (4, correctable)] {
            aer[4 * index..][..4].copy_from_slice(&register.unwrap_or_default().to_le_bytes());
        }
        Ok(Some(aer))
    }
}
