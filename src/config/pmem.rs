//! One persistent memory device: `--pmem file=PATH|size=SIZE[,id=…]`, `[[pmem]]` of a machine file, and the body
//! of an insert request.

use std::path::PathBuf;
use std::str::FromStr;

use aconite_acpi::Lie;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::dimm::{Ars, Dimms, Family, Labels, StateFlags, flag_names};
use super::e820::E820Type;
use super::error::ConfigError;
use super::keyvalue::KeyValues;
use super::switch::Switch;
use super::topology::RangeKind;
use super::unflushed::Unflushed;
use crate::memory::FullLineStore;
use crate::units::{Address, Size, TimeSpan};

/// Where the bytes of a device live.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PmemSource {
    /// Anonymous shared memory that lives until the machine quits, of the given size.
    Memory(Size),
    /// A file of the host, mapped shared: the only copy.
    File {
        /// The file.
        path: PathBuf,
        /// Size of the device. Without it, the file's length counts. With it, a missing file is created sparse.
        size: Option<Size>,
    },
}

/// How the guest is told of the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Via {
    /// An NVDIMM described by an NFIT, under its own ACPI0012 root.
    #[default]
    Nfit,
    /// A virtio-pmem device behind a PCI Express port.
    Virtio,
    /// A range of the E820 map, by which firmware tells of memory at boot.
    E820,
}

impl Via {
    /// The word for it in options, the API and events.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Nfit => "nfit",
            Self::Virtio => "virtio",
            Self::E820 => "e820",
        }
    }
}

/// How the device can be removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Channel {
    /// Through the ACPI0004 container around it (`_STA` and Notify).
    Container,
    /// By the agent, which unbinds the driver in the guest.
    Agent,
    /// Through the PCI Express port that it is behind: button, power, link.
    Pcie,
    /// Through the host bridge that it is behind, by ACPI (`_STA` and Notify).
    Bridge,
    /// Not at all.
    None,
}

impl Channel {
    /// The word for it in options, the API and events.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Container => "container",
            Self::Agent => "agent",
            Self::Pcie => "pcie",
            Self::Bridge => "bridge",
            Self::None => "none",
        }
    }
}

/// A chosen place in the guest-physical address space.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Place {
    /// Guest-physical address of the first byte.
    Address(Address),
    /// The address of the device of this id, which must have departed.
    Device(String),
}

impl FromStr for Place {
    type Err = crate::units::UnitError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.starts_with(|c: char| c.is_ascii_digit()) {
            text.parse().map(Self::Address)
        } else {
            Ok(Self::Device(text.to_owned()))
        }
    }
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Device(id) => f.write_str(id),
        }
    }
}

/// A persistent memory device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "PmemKeys", into = "PmemKeys")]
pub struct Pmem {
    /// The name that the API and events use. Empty until [`Machine::complete`](super::Machine::complete) has
    /// given it one (`p0`, `p1`, …).
    pub id: String,
    /// Where its bytes live.
    pub source: PmemSource,
    /// How the guest is told of it. Default: `nfit`.
    pub via: Via,
    /// Its type in the E820 map. Default: 12.
    pub e820: E820Type,
    /// How it can be removed; `None` leaves the choice to the monitor, which knows the guest's kernel.
    pub channel: Option<Channel>,
    /// Proximity domain. Default: a domain of its own.
    pub node: Option<u32>,
    /// Whether the guest can only read it. Default: no.
    pub readonly: bool,
    /// What firmware says its range is. Default: persistent memory.
    pub range: RangeKind,
    /// What firmware says of its bus that is not so. Default: nothing.
    pub lie: Option<Lie>,
    /// Where it goes. Default: the next free place that is aligned so that Linux maps it with its largest pages.
    pub at: Option<Place>,
    /// The bus that it is on with other devices: they come and go together. Default: a bus of its own.
    pub bus: Option<String>,
    /// The DIMMs behind it. Default: one of its own.
    pub dimms: Dimms,
    /// Bytes of a line of its interleave set. Default: [`INTERLEAVE`].
    pub interleave: Option<Size>,
    /// The functions of its DIMMs. Default: Intel's.
    pub family: Family,
    /// Their label areas. Default: what the last run left there, at first zeros.
    pub labels: Labels,
    /// The state of its DIMMs. Default: healthy.
    pub flags: StateFlags,
    /// How its errors are found and cleared.
    pub ars: Ars,
    /// What becomes of a bad line that a processor writes whole. Default: it stays bad.
    pub full_line_store: FullLineStore,
    /// What becomes of what was not flushed when power goes. Default: it is kept.
    pub unflushed: Unflushed,
}

/// Bytes of a line of an interleave set unless chosen otherwise.
pub const INTERLEAVE: Size = Size(4096);

/// A number, or names joined by "+".
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
enum CountOrNames {
    Count(u32),
    Text(String),
}

/// The keys of a device as they are written, in a list of the command line as in TOML and JSON.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Pmem")]
pub struct PmemKeys {
    /// The name that the API and events use. Default: the first free of p0, p1, …
    #[serde(default, skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    /// A file of the host that holds the device's bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    file: Option<PathBuf>,
    /// Size of the device. Without a file its bytes live until the machine quits; a missing file is created.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    size: Option<Size>,
    /// How the guest is told of it: "nfit", the default, "virtio" (virtio-pmem behind a PCI Express port) or "e820" (the
    /// map of memory at boot).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    via: Option<String>,
    /// With via "e820", the type of its range: "12", the default (persistent memory as before ACPI 6), "7" (persistent
    /// memory) or "soft" (set aside for special purposes).
    #[serde(default, rename = "type", skip_serializing_if = "Option::is_none")]
    e820: Option<String>,
    /// How it can be removed: "container", "agent" or "none" with via "nfit", "pcie" or "none" with via "virtio".
    /// Default: what the guest's kernel can do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    channel: Option<String>,
    /// Proximity domain. Default: one of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    node: Option<u32>,
    /// Whether the guest can only read it. Default: no.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    readonly: Option<Switch>,
    /// What the NFIT says its range is: "pmem", the default, "volatile" memory, or a "vdisk", "vcd", "pdisk" or "pcd", a
    /// disk or CD in volatile or persistent memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    range: Option<String>,
    /// What the NFIT of its bus says that is not so, by the name of a contradiction. Default: nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    lie: Option<String>,
    /// A guest-physical address, or (when inserting) the id of a departed device whose address is used again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    at: Option<Place>,
    /// The NVDIMM bus that it is on. Devices that name the same bus are on it together, and come and go together.
    /// Default: a bus of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    bus: Option<String>,
    /// The DIMMs that it is interleaved over: their number, 1 to 16, or their names joined by "+", of which devices on
    /// the same bus can share some. Default: one of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    dimms: Option<CountOrNames>,
    /// Bytes that lie on one DIMM before the next one's turn: a power of two from 64 to 1M. Default: 4K.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    interleave: Option<Size>,
    /// The functions of the DIMMs: "intel", the default, "msft" (labels by ACPI's own methods) or "none".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    family: Option<String>,
    /// The label area: "init" writes an empty index where there is none, "none" leaves the area out, and anything else
    /// is a file whose bytes it begins with. Default: what the last run left there, at first zeros.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    labels: Option<String>,
    /// State of the DIMM that firmware reports: save_fail, restore_fail, flush_fail, not_armed, smart_event,
    /// smart_notify and map_fail, joined by "+". Default: none of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    flags: Option<String>,
    /// Time that an address range scrub of all of it takes, such as "5s". Default: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ars: Option<TimeSpan>,
    /// Most errors that the status of a scrub lists, 1 to 168; with more of them it overflows. Default: 168. On a
    /// bus with several devices the smallest number counts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ars_records: Option<usize>,
    /// Alignment and smallest length of "clear uncorrectable error", a power of two from 64 to 2 MiB. Default:
    /// 256. On a bus with several devices the largest counts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    clear_unit: Option<Size>,
    /// What becomes of a bad line that a processor writes whole: "keep", the default, or "clear", which makes it good.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    full_line_store: Option<String>,
    /// What becomes of bytes that the guest has written and not flushed (flush hints, virtio flush) when power goes:
    /// "keep", the default, or "drop".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    unflushed: Option<String>,
}

/// The keys of `--pmem`, in the order of the documentation.
const KEYS: [&str; 22] = [
    "file",
    "size",
    "id",
    "via",
    "type",
    "channel",
    "node",
    "readonly",
    "range",
    "at",
    "bus",
    "dimms",
    "interleave",
    "family",
    "labels",
    "flags",
    "ars",
    "ars_records",
    "clear_unit",
    "full_line_store",
    "unflushed",
    "lie",
];

impl Pmem {
    /// A device without a file, for callers that build machines themselves.
    pub fn memory(id: impl Into<String>, size: Size) -> Self {
        Self {
            id: id.into(),
            source: PmemSource::Memory(size),
            via: Via::Nfit,
            e820: E820Type::default(),
            channel: None,
            node: None,
            readonly: false,
            range: RangeKind::default(),
            lie: None,
            at: None,
            bus: None,
            dimms: Dimms::default(),
            interleave: None,
            family: Family::default(),
            labels: Labels::default(),
            flags: StateFlags::default(),
            ars: Ars::default(),
            full_line_store: FullLineStore::default(),
            unflushed: Unflushed::default(),
        }
    }

    /// Parses the value of `--pmem` (or of `ctl insert pmem`).
    ///
    /// # Errors
    /// Names the key, its value and what would be right.
    pub fn parse(option: &str, text: &str) -> Result<Self, ConfigError> {
        let mut list = KeyValues::parse(option, text)?;
        let keys = PmemKeys {
            id: list.take_text("id"),
            file: list.take_text("file").map(PathBuf::from),
            size: list.take("size")?,
            via: list.take_text("via"),
            e820: list.take_text("type"),
            channel: list.take_text("channel"),
            node: list.take("node").map_err(|error| ConfigError {
                problem: "a proximity domain is a number".to_owned(),
                remedy: "give node=1 or another small number".to_owned(),
                ..error
            })?,
            readonly: list.take_switch("readonly")?.map(Switch),
            range: list.take_text("range"),
            lie: list.take_text("lie"),
            at: list.take("at")?,
            bus: list.take_text("bus"),
            dimms: list.take_text("dimms").map(CountOrNames::Text),
            interleave: list.take("interleave")?,
            family: list.take_text("family"),
            labels: list.take_text("labels"),
            flags: list.take_text("flags"),
            ars: list.take("ars")?,
            ars_records: list.take("ars_records").map_err(|error| ConfigError {
                problem: "it is a number of records".to_owned(),
                remedy: "give ars_records=168 or fewer".to_owned(),
                ..error
            })?,
            clear_unit: list.take("clear_unit")?,
            full_line_store: list.take_text("full_line_store"),
            unflushed: list.take_text("unflushed"),
        };
        list.finish(&KEYS)?;
        Self::from_keys(option, keys)
    }

    /// Whether it is behind a host bridge of its own.
    pub fn behind_bridge(&self) -> bool {
        self.via == Via::Virtio && self.channel == Some(Channel::Bridge)
    }

    /// The same device with its files named from the root: the monitor may have another working directory than the
    /// one in which the request was typed.
    pub fn absolute(mut self) -> Self {
        let bytes = match &mut self.source {
            PmemSource::File { path, .. } => Some(path),
            PmemSource::Memory(_) => None,
        };
        let labels = match &mut self.labels {
            Labels::File(path) => Some(path),
            _ => None,
        };
        for path in bytes.into_iter().chain(labels) {
            if let Ok(whole) = std::path::absolute(&path) {
                *path = whole;
            }
        }
        self
    }

    fn from_keys(option: &str, keys: PmemKeys) -> Result<Self, ConfigError> {
        let id = keys.id.unwrap_or_default();
        let name = |key: &str| {
            if id.is_empty() { format!("{option} {key}") } else { format!("{option} {id}: {key}") }
        };
        let source = match (keys.file, keys.size) {
            (Some(path), size) => PmemSource::File { path, size },
            (None, Some(size)) => PmemSource::Memory(size),
            (None, None) => {
                return Err(ConfigError::invalid(
                    if id.is_empty() { option.to_owned() } else { format!("{option} {id}") },
                    "",
                    "it has neither a file nor a size",
                    "give file=PATH, size=SIZE or both",
                ));
            }
        };
        let via = match keys.via.as_deref() {
            None | Some("nfit") => Via::Nfit,
            Some("virtio") => Via::Virtio,
            Some("e820") => Via::E820,
            Some(other) => {
                return Err(ConfigError::invalid(
                    name("via"),
                    other,
                    "there is no such way",
                    "give via=nfit, via=virtio or via=e820",
                ));
            }
        };
        let e820 = match keys.e820.as_deref() {
            None => E820Type::default(),
            Some(text) => E820Type::from_name(text).ok_or_else(|| {
                ConfigError::invalid(
                    name("type"),
                    text,
                    "the E820 map has no such type of memory device",
                    "give type=7, type=12 or type=soft",
                )
            })?,
        };
        let channel = match keys.channel.as_deref() {
            None => None,
            Some("container") => Some(Channel::Container),
            Some("agent") => Some(Channel::Agent),
            Some("pcie") => Some(Channel::Pcie),
            Some("bridge") => Some(Channel::Bridge),
            Some("none") => Some(Channel::None),
            Some(other) => {
                return Err(ConfigError::invalid(
                    name("channel"),
                    other,
                    "there is no such channel",
                    "give channel=container, channel=agent, channel=pcie, channel=bridge or channel=none",
                ));
            }
        };
        let family = match keys.family.as_deref() {
            None => Family::default(),
            Some(text) => Family::from_name(text).ok_or_else(|| {
                ConfigError::invalid(
                    name("family"),
                    text,
                    "there is no such family",
                    "give family=intel, family=msft or family=none",
                )
            })?,
        };
        let labels = match keys.labels.as_deref() {
            None => Labels::Kept,
            Some("init") => Labels::Init,
            Some("none") => Labels::None,
            Some(file) => Labels::File(file.into()),
        };
        let flags = match keys.flags.as_deref() {
            None => StateFlags::default(),
            Some(text) => text.parse().map_err(|problem| {
                ConfigError::invalid(
                    name("flags"),
                    text,
                    problem,
                    format_args!("join words of {} by +", flag_names()),
                )
            })?,
        };
        let ars = Ars::from_keys(name, keys.ars, keys.ars_records, keys.clear_unit)?;
        let range = match keys.range.as_deref() {
            None => RangeKind::default(),
            Some(text) => RangeKind::from_name(text).ok_or_else(|| {
                ConfigError::invalid(
                    name("range"),
                    text,
                    "there is no such kind",
                    format_args!("give one of {}", RangeKind::names()),
                )
            })?,
        };
        let lie = match keys.lie.as_deref() {
            None => None,
            Some(text) => Some(Lie::from_name(text).ok_or_else(|| {
                ConfigError::invalid(
                    name("lie"),
                    text,
                    "there is no such lie",
                    format_args!("give one of {}", Lie::ALL.map(Lie::name).join(", ")),
                )
            })?),
        };
        let full_line_store = match keys.full_line_store.as_deref() {
            None => FullLineStore::default(),
            Some(text) => FullLineStore::from_name(text).ok_or_else(|| {
                ConfigError::invalid(
                    name("full_line_store"),
                    text,
                    "a bad line that is written whole stays bad or becomes good",
                    "give full_line_store=keep or full_line_store=clear",
                )
            })?,
        };
        let unflushed = match keys.unflushed.as_deref() {
            None => Unflushed::default(),
            Some(text) => Unflushed::from_name(text).ok_or_else(|| {
                ConfigError::invalid(
                    name("unflushed"),
                    text,
                    "what was not flushed is kept or dropped when power goes",
                    "give unflushed=keep or unflushed=drop",
                )
            })?,
        };
        let readonly = keys.readonly.is_some_and(|switch| switch.0);
        let dimms = match keys.dimms {
            None => Dimms::default(),
            Some(CountOrNames::Count(count)) => Dimms::Own(count),
            Some(CountOrNames::Text(text)) => match text.parse() {
                Ok(dimms) => dimms,
                Err(never) => match never {},
            },
        };
        Ok(Self {
            id,
            source,
            via,
            e820,
            channel,
            node: keys.node,
            readonly,
            range,
            lie,
            at: keys.at,
            bus: keys.bus,
            dimms,
            interleave: keys.interleave,
            family,
            labels,
            flags,
            ars,
            full_line_store,
            unflushed,
        })
    }
}

impl TryFrom<PmemKeys> for Pmem {
    type Error = ConfigError;

    fn try_from(keys: PmemKeys) -> Result<Self, ConfigError> {
        Self::from_keys("pmem", keys)
    }
}

impl From<Pmem> for PmemKeys {
    fn from(pmem: Pmem) -> Self {
        let (file, size) = match pmem.source {
            PmemSource::Memory(size) => (None, Some(size)),
            PmemSource::File { path, size } => (Some(path), size),
        };
        Self {
            id: (!pmem.id.is_empty()).then_some(pmem.id),
            file,
            size,
            via: (pmem.via != Via::default()).then(|| pmem.via.name().to_owned()),
            e820: (pmem.e820 != E820Type::default()).then(|| pmem.e820.name().to_owned()),
            channel: pmem.channel.map(|channel| channel.name().to_owned()),
            node: pmem.node,
            readonly: pmem.readonly.then_some(Switch(true)),
            range: (pmem.range != RangeKind::default()).then(|| pmem.range.name().to_owned()),
            lie: pmem.lie.map(|lie| lie.name().to_owned()),
            at: pmem.at,
            bus: pmem.bus,
            dimms: (pmem.dimms != Dimms::default()).then(|| match pmem.dimms {
                Dimms::Own(count) => CountOrNames::Count(count),
                named @ Dimms::Named(_) => CountOrNames::Text(named.to_string()),
            }),
            interleave: pmem.interleave,
            family: (pmem.family != Family::default()).then(|| pmem.family.name().to_owned()),
            labels: match pmem.labels {
                Labels::Kept => None,
                Labels::Init => Some("init".to_owned()),
                Labels::None => Some("none".to_owned()),
                Labels::File(path) => Some(path.display().to_string()),
            },
            flags: (pmem.flags != StateFlags::default()).then(|| pmem.flags.to_string()),
            ars: (pmem.ars.time != Ars::default().time).then_some(TimeSpan(pmem.ars.time)),
            ars_records: (pmem.ars.records != Ars::default().records).then_some(pmem.ars.records),
            clear_unit: (pmem.ars.clear_unit != Ars::default().clear_unit)
                .then_some(Size(pmem.ars.clear_unit.into())),
            full_line_store: (pmem.full_line_store != FullLineStore::default())
                .then(|| pmem.full_line_store.name().to_owned()),
            unflushed: (pmem.unflushed != Unflushed::default()).then(|| pmem.unflushed.name().to_owned()),
        }
    }
}

impl JsonSchema for Pmem {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        PmemKeys::schema_name()
    }

    fn json_schema(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
        PmemKeys::json_schema(generator)
    }
}
