//! One disk: `--disk file=PATH|size=SIZE[,id=…]`, `[[disk]]` of a machine file.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::error::ConfigError;
use super::keyvalue::KeyValues;
use super::pmem::PmemSource;
use super::switch::Switch;
use super::validate::{MAX_CPUS, validate_id};
use crate::units::Size;

/// Bytes of a sector: a disk is a multiple of them.
pub const SECTOR: u64 = 512;
/// Queues that a disk has if nothing is said: one for each vCPU, and at most so many.
const DEFAULT_QUEUES: u32 = 8;

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "DiskKeys", into = "DiskKeys")]
pub struct Disk {
    /// The name that the API and events use. Empty until [`Machine::complete`](super::Machine::complete) has
    /// given it one (`d0`, `d1`, …).
    pub id: String,
    /// Where its bytes live.
    pub source: PmemSource,
    /// Whether the guest can only read it. Default: no.
    pub readonly: bool,
    /// Number of request queues. Default: one for each vCPU, at most 8.
    pub queues: Option<u32>,
    /// A disk that has departed, into whose slot it goes. Default: the first free slot.
    pub at: Option<String>,
}

/// The keys of a disk as they are written, in a list of the command line as in TOML and JSON.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Disk")]
pub struct DiskKeys {
    /// The name that the API and events use. Default: the first free of d0, d1, …
    #[serde(default, skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    /// A file of the host that holds the disk's bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    file: Option<PathBuf>,
    /// Size of the disk. Without a file its bytes live until the machine quits; a missing file is created.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    size: Option<Size>,
    /// Whether the guest can only read it. Default: no.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    readonly: Option<Switch>,
    /// Number of request queues, 1 to 64. Default: one for each vCPU, at most 8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    queues: Option<u32>,
    /// A disk that has departed, into whose slot it goes; only for one that is inserted. Default: the first free slot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    at: Option<String>,
}

/// The keys of `--disk`, in the order of the documentation.
const KEYS: [&str; 6] = ["file", "size", "id", "readonly", "queues", "at"];

impl Disk {
    /// Parses the value of `--disk`.
    ///
    /// # Errors
    /// Names the key, its value and what would be right.
    pub fn parse(option: &str, text: &str) -> Result<Self, ConfigError> {
        let mut list = KeyValues::parse(option, text)?;
        let keys = DiskKeys {
            id: list.take_text("id"),
            file: list.take_text("file").map(PathBuf::from),
            size: list.take("size")?,
            readonly: list.take_switch("readonly")?.map(Switch),
            queues: list.take("queues").map_err(|error| ConfigError {
                problem: "a number of queues was expected".to_owned(),
                remedy: "give queues=1 to 64".to_owned(),
                ..error
            })?,
            at: list.take_text("at"),
        };
        list.finish(&KEYS)?;
        Self::from_keys(option, keys)
    }

    fn from_keys(option: &str, keys: DiskKeys) -> Result<Self, ConfigError> {
        let id = keys.id.unwrap_or_default();
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
        let readonly = keys.readonly.is_some_and(|switch| switch.0);
        Ok(Self { id, source, readonly, queues: keys.queues, at: keys.at })
    }

    /// The same disk with its file named from the root: the monitor may have another working directory than the one in
    /// which the request was typed.
    pub fn absolute(mut self) -> Self {
        if let PmemSource::File { path, .. } = &mut self.source
            && let Ok(whole) = std::path::absolute(&path)
        {
            *path = whole;
        }
        self
    }

    /// Checks a disk that is inserted into a running machine.
    ///
    /// # Errors
    /// As for a disk of the command line.
    pub fn validate_insert(&self) -> Result<(), ConfigError> {
        if !self.id.is_empty() {
            validate_id("disk", "id", "d0", &self.id)?;
        }
        self.validate()
    }

    /// Refuses what no host could build.
    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        let option = self.option();
        if let PmemSource::Memory(size) | PmemSource::File { size: Some(size), .. } = &self.source {
            check_size(&option, *size)?;
        }
        match self.queues {
            Some(queues) if !(1..=MAX_CPUS).contains(&queues) => Err(ConfigError::invalid(
                format_args!("{option}: queues"),
                queues,
                "a disk has at least one queue and at most 64",
                "give queues=1 to 64, or leave it out",
            )),
            _ => Ok(()),
        }
    }

    /// How errors call it.
    pub(super) fn option(&self) -> String {
        if self.id.is_empty() { "--disk".to_owned() } else { format!("--disk {}", self.id) }
    }

    /// Number of queues in a machine of so many vCPUs.
    pub fn queues(&self, cpus: u32) -> u32 {
        self.queues.unwrap_or(cpus.min(DEFAULT_QUEUES))
    }
}

/// Refuses a size that no disk has.
pub(super) fn check_size(option: &str, size: Size) -> Result<(), ConfigError> {
    let bytes = size.bytes();
    if bytes != 0 && bytes.is_multiple_of(SECTOR) {
        return Ok(());
    }
    let right = bytes.max(1).checked_next_multiple_of(SECTOR).unwrap_or(u64::MAX - (SECTOR - 1));
    Err(ConfigError::invalid(
        format_args!("{option}: size"),
        size,
        "a disk has whole sectors of 512 bytes, and one at least",
        format_args!("give {}", Size(right)),
    ))
}

impl TryFrom<DiskKeys> for Disk {
    type Error = ConfigError;

    fn try_from(keys: DiskKeys) -> Result<Self, ConfigError> {
        Self::from_keys("disk", keys)
    }
}

impl From<Disk> for DiskKeys {
    fn from(disk: Disk) -> Self {
        let (file, size) = match disk.source {
            PmemSource::Memory(size) => (None, Some(size)),
            PmemSource::File { path, size } => (Some(path), size),
        };
        Self {
            id: (!disk.id.is_empty()).then_some(disk.id),
            file,
            size,
            readonly: disk.readonly.then_some(Switch(true)),
            queues: disk.queues,
            at: disk.at,
        }
    }
}

impl JsonSchema for Disk {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        DiskKeys::schema_name()
    }

    fn json_schema(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
        DiskKeys::json_schema(generator)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wrong(text: &str) -> String {
        let disk = Disk::parse("--disk", text).and_then(|disk| disk.validate());
        disk.unwrap_err().to_string()
    }

    #[test]
    fn keys_are_taken_and_survive_the_machine_file() {
        let disk = Disk::parse("--disk", "file=/a.img,size=1G,id=d7,readonly=on,queues=3,at=d0").unwrap();
        assert_eq!((disk.id.as_str(), disk.readonly, disk.queues(8)), ("d7", true, 3));
        let text = toml::to_string(&disk).unwrap();
        assert_eq!(toml::from_str::<Disk>(&text).unwrap(), disk);
        assert_eq!(Disk::parse("--disk", "size=1M").unwrap().queues(64), 8);
    }

    #[test]
    fn mistakes_are_named() {
        assert_eq!(
            wrong("id=d0"),
            "Wrong --disk d0: it has neither a file nor a size; give file=PATH, size=SIZE or both"
        );
        assert_eq!(
            wrong("size=1000"),
            "Wrong --disk: size 1000: a disk has whole sectors of 512 bytes, and one at least; give 1K"
        );
        assert_eq!(
            wrong("size=1M,queues=0"),
            "Wrong --disk: queues 0: a disk has at least one queue and at most 64; give queues=1 to 64, or leave it out"
        );
        assert!(wrong("size=1M,queue=1").contains("did you mean \"queues\""));
    }
}
