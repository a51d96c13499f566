//! Errors and events of CXL.

use aconite_acpi::cper::{
    CxlAgent, CxlComponent, CxlDram, CxlEvent, CxlEventHeader, CxlGeneralMedia, CxlHealth, CxlMedia,
    CxlMemoryModule, CxlPciDevice, CxlProtocolError, Section,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::pcie::register;
use super::{Bdf, bounded, number};
use crate::command::{Error, ErrorCode};
use crate::units::Address;

/// Who reports an error of the protocol.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema, clap::ValueEnum,
)]
#[serde(rename_all = "snake_case")]
pub enum CxlAgentKind {
    /// A restricted CXL device.
    RestrictedDevice,
    /// The downstream port of a restricted CXL host.
    RestrictedHostPort,
    /// A CXL device.
    #[default]
    Device,
    /// A logical device.
    LogicalDevice,
    /// The manager of a fabric.
    FabricManager,
    /// A root port.
    RootPort,
    /// A downstream switch port.
    DownstreamPort,
    /// An upstream switch port.
    UpstreamPort,
}

impl From<CxlAgentKind> for CxlAgent {
    fn from(kind: CxlAgentKind) -> Self {
        match kind {
            CxlAgentKind::RestrictedDevice => Self::RestrictedDevice,
            CxlAgentKind::RestrictedHostPort => Self::RestrictedHostPort,
            CxlAgentKind::Device => Self::Device,
            CxlAgentKind::LogicalDevice => Self::LogicalDevice,
            CxlAgentKind::FabricManager => Self::FabricManager,
            CxlAgentKind::RootPort => Self::RootPort,
            CxlAgentKind::DownstreamPort => Self::DownstreamPort,
            CxlAgentKind::UpstreamPort => Self::UpstreamPort,
        }
    }
}

/// A function of a CXL component, by its place.
fn function(place: Bdf) -> CxlPciDevice {
    CxlPciDevice {
        segment: place.segment,
        bus: place.bus,
        device: place.device,
        function: place.function,
        ..CxlPciDevice::default()
    }
}

/// An error of the CXL protocol. What is not given is not said.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::Args)]
#[serde(deny_unknown_fields, default)]
pub struct CxlProtocolFields {
    /// Who reports it
    #[arg(long, value_enum, default_value = "device")]
    pub agent: CxlAgentKind,
    /// Its function, such as 0000:35:00.0
    #[arg(long, value_name = "BDF")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<Bdf>,
    /// Address of its register block, for the port of a restricted host
    #[arg(long, value_name = "GPA")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rcrb: Option<Address>,
    /// Its serial number
    #[arg(long, value_name = "NUMBER")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial: Option<Address>,
    /// RAS capability: uncorrectable error status
    #[arg(long, value_name = "NUMBER")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uncorrectable: Option<Address>,
    /// RAS capability: correctable error status
    #[arg(long, value_name = "NUMBER")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub correctable: Option<Address>,
}

impl CxlProtocolFields {
    pub(super) fn section(&self) -> Result<Section, Error> {
        if self.rcrb.is_some() != (self.agent == CxlAgentKind::RestrictedHostPort) {
            return Err(Error::new(
                ErrorCode::BadParameter,
                "rcrb is the address of the agent restricted_host_port and of no other",
                "give both or neither; other agents are known by their device",
            ));
        }
        let uncorrectable = register("uncorrectable", self.uncorrectable, u32::MAX)?;
        let correctable = register("correctable", self.correctable, u32::MAX)?;
        let ras = uncorrectable.or(correctable).map(|_| {
            let mut ras = [0; CxlProtocolError::RAS_SIZE];
            ras[..4].copy_from_slice(&uncorrectable.unwrap_or_default().to_le_bytes());
            ras[12..16].copy_from_slice(&correctable.unwrap_or_default().to_le_bytes());
            ras
        });
        Ok(CxlProtocolError {
            agent: self.agent.into(),
            device: self.device.map(function),
            rcrb: self.rcrb.map(|address| address.0),
            serial: self.serial.map(|serial| serial.0),
            ras,
        }
        .section())
    }
}

/// Which event.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema, clap::ValueEnum,
)]
#[serde(rename_all = "snake_case")]
pub enum CxlEventKind {
    /// General media.
    #[default]
    GeneralMedia,
    /// DRAM.
    Dram,
    /// Memory module.
    MemoryModule,
}

impl CxlEventKind {
    const fn name(self) -> &'static str {
        match self {
            Self::GeneralMedia => "general_media",
            Self::Dram => "dram",
            Self::MemoryModule => "memory_module",
        }
    }
}

/// An event of a CXL memory device. What is not given is not said.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::Args)]
#[serde(deny_unknown_fields, default)]
pub struct CxlEventFields {
    /// Which event
    #[arg(long, value_enum, default_value = "general-media")]
    pub event: CxlEventKind,
    /// The function whose driver gets it, such as 0000:35:00.0
    #[arg(long, value_name = "BDF")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<Bdf>,
    /// Serial number of the device
    #[arg(long, value_name = "NUMBER")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial: Option<Address>,
    /// Number of the record [default: 1]
    #[arg(long, value_name = "NUMBER", value_parser = number::<u16>)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub handle: Option<u16>,
    /// Event record flags, 24 bits: 0 informational, 1 warning, 2 failure, 3 fatal, 4 permanent, and so on
    #[arg(long, value_name = "NUMBER", value_parser = number::<u32>, default_value_t = 0)]
    pub record_flags: u32,
    /// Media: device physical address; its low six bits are flags
    #[arg(long, value_name = "DPA")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dpa: Option<Address>,
    /// Media: descriptor (1 uncorrectable, 2 threshold, 4 poison list overflow)
    #[arg(long, value_name = "NUMBER", value_parser = number::<u8>)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub descriptor: Option<u8>,
    /// Type of the event, or what has changed in a memory module
    #[arg(long, value_name = "NUMBER", value_parser = number::<u8>)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub event_type: Option<u8>,
    /// Media: transaction (1 read, 2 write, 3 scan media, 4 poison injection, 5 scrub, 6 management)
    #[arg(long, value_name = "NUMBER", value_parser = number::<u8>)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub transaction: Option<u8>,
    /// Media: channel
    #[arg(long, value_name = "NUMBER", value_parser = number::<u8>)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub channel: Option<u8>,
    /// Media: rank
    #[arg(long, value_name = "NUMBER", value_parser = number::<u8>)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rank: Option<u8>,
    /// DRAM: bank group
    #[arg(long, value_name = "NUMBER", value_parser = number::<u8>)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bank_group: Option<u8>,
    /// DRAM: bank
    #[arg(long, value_name = "NUMBER", value_parser = number::<u8>)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bank: Option<u8>,
    /// DRAM: row, 24 bits
    #[arg(long, value_name = "NUMBER", value_parser = number::<u32>)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub row: Option<u32>,
    /// DRAM: column
    #[arg(long, value_name = "NUMBER", value_parser = number::<u16>)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub column: Option<u16>,
    /// Memory module: health status
    #[arg(long, value_name = "NUMBER", value_parser = number::<u8>)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub health: Option<u8>,
    /// Memory module: media status
    #[arg(long, value_name = "NUMBER", value_parser = number::<u8>)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub media: Option<u8>,
    /// Memory module: life used, in percent
    #[arg(long, value_name = "PERCENT", value_parser = number::<u8>)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub life_used: Option<u8>,
    /// Memory module: temperature in degrees Celsius
    #[arg(long, value_name = "DEGREES", allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature: Option<i16>,
    /// Memory module: dirty shutdowns
    #[arg(long, value_name = "NUMBER", value_parser = number::<u32>)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dirty_shutdowns: Option<u32>,
}

impl CxlEventFields {
    pub(super) fn section(&self) -> Result<Section, Error> {
        self.refuse_what_the_event_has_not()?;
        let flags = bounded("record_flags", Some(self.record_flags), 0xff_ffff)?.unwrap_or_default();
        Ok(CxlComponent {
            device: self.device.map(function),
            serial: self.serial.map(|serial| serial.0),
            header: CxlEventHeader { flags, handle: self.handle.unwrap_or(1), ..CxlEventHeader::default() },
            event: self.record()?,
        }
        .section())
    }

    fn record(&self) -> Result<CxlEvent, Error> {
        let media = CxlMedia {
            address: self.dpa.unwrap_or_default().0,
            descriptor: self.descriptor.unwrap_or_default(),
            kind: self.event_type.unwrap_or_default(),
            transaction: self.transaction.unwrap_or_default(),
            channel: self.channel,
            rank: self.rank,
        };
        Ok(match self.event {
            CxlEventKind::GeneralMedia => {
                CxlEvent::GeneralMedia(CxlGeneralMedia { media, ..CxlGeneralMedia::default() })
            }
            CxlEventKind::Dram => CxlEvent::Dram(CxlDram {
                media,
                bank_group: self.bank_group,
                bank: self.bank,
                row: bounded("row", self.row, 0xff_ffff)?,
                column: self.column,
                ..CxlDram::default()
            }),
            CxlEventKind::MemoryModule => CxlEvent::MemoryModule(CxlMemoryModule {
                kind: self.event_type.unwrap_or_default(),
                health: CxlHealth {
                    status: self.health.unwrap_or_default(),
                    media: self.media.unwrap_or_default(),
                    life_used: self.life_used.unwrap_or_default(),
                    temperature: self.temperature.unwrap_or_default(),
                    dirty_shutdowns: self.dirty_shutdowns.unwrap_or_default(),
                    ..CxlHealth::default()
                },
            }),
        })
    }

    /// A field that is given and has no place in the event would be lost without a word.
    fn refuse_what_the_event_has_not(&self) -> Result<(), Error> {
        use CxlEventKind::{Dram, GeneralMedia, MemoryModule};
        let media: &[CxlEventKind] = &[GeneralMedia, Dram];
        let fields = [
            ("dpa", self.dpa.is_some(), media),
            ("descriptor", self.descriptor.is_some(), media),
            ("transaction", self.transaction.is_some(), media),
            ("channel", self.channel.is_some(), media),
            ("rank", self.rank.is_some(), media),
            ("bank_group", self.bank_group.is_some(), &[Dram]),
            ("bank", self.bank.is_some(), &[Dram]),
            ("row", self.row.is_some(), &[Dram]),
            ("column", self.column.is_some(), &[Dram]),
            ("health", self.health.is_some(), &[MemoryModule]),
            ("media", self.media.is_some(), &[MemoryModule]),
            ("life_used", self.life_used.is_some(), &[MemoryModule]),
            ("temperature", self.temperature.is_some(), &[MemoryModule]),
            ("dirty_shutdowns", self.dirty_shutdowns.is_some(), &[MemoryModule]),
        ];
        match fields.iter().find(|(_, given, events)| *given && !events.contains(&self.event)) {
            None => Ok(()),
            Some((field, ..)) => Err(Error::new(
                ErrorCode::BadParameter,
                format!("{field} has no place in a {} event", self.event.name()),
                "leave it out, or choose another event",
            )),
        }
    }
}
