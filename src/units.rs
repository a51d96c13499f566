//! Sizes, addresses and byte ranges as people write them and as JSON and TOML carry them.
//!
//! A size is written `512M`, `1GiB` or as a plain number of bytes; an address `0x200040` or in decimal; a range
//! `0x200040+64` (start and length) or a single address. All parsers here take any string and never panic.
//! Numbers that may need all 64 bits (registers, virtual addresses) travel as hexadecimal strings, because a JSON
//! number loses bits above 2^53 in many readers.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{self, Deserializer, Visitor};
use serde::{Deserialize, Serialize, Serializer};

/// 1024 bytes.
pub const KIB: u64 = 1 << 10;
/// 1024 KiB.
pub const MIB: u64 = 1 << 20;
/// 1024 MiB.
pub const GIB: u64 = 1 << 30;
/// 1024 GiB.
pub const TIB: u64 = 1 << 40;

/// Why a text is not a size, an address, a range or a time.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnitError {
    /// The text is no size.
    #[error(
        "{text:?} is not a size: write a whole number with K, M, G or T (powers of 1024), such as 512M or 1GiB"
    )]
    Size {
        /// What was given.
        text: String,
    },
    /// The text is no number.
    #[error(
        "{text:?} is not a number: write it in decimal or as 0x and hexadecimal digits, such as 0x200040"
    )]
    Number {
        /// What was given.
        text: String,
    },
    /// The number needs more than 64 bits.
    #[error("{text:?} does not fit in 64 bits: write a smaller number")]
    TooLarge {
        /// What was given.
        text: String,
    },
    /// The range has no bytes.
    #[error("{text:?} is an empty range: write a length of at least 1, such as 0x200040+64")]
    EmptyRange {
        /// What was given.
        text: String,
    },
    /// The text is no time span.
    #[error("{text:?} is not a time: write seconds or a number with ms, s, m or h, such as 90s or 5m")]
    Time {
        /// What was given.
        text: String,
    },
}

/// Parses a whole number, decimal or `0x` hexadecimal, with `_` allowed between digits.
pub fn parse_number(text: &str) -> Result<u64, UnitError> {
    let trimmed = text.trim();
    let (digits, radix) = match trimmed.strip_prefix("0x").or_else(|| trimmed.strip_prefix("0X")) {
        Some(hex) => (hex, 16),
        None => (trimmed, 10),
    };
    let digits: Cow<str> =
        if digits.contains('_') { digits.replace('_', "").into() } else { Cow::Borrowed(digits) };
    if digits.is_empty() || !digits.chars().all(|c| c.is_digit(radix)) {
        return Err(UnitError::Number { text: text.to_owned() });
    }
    u64::from_str_radix(&digits, radix).map_err(|_| UnitError::TooLarge { text: text.to_owned() })
}

/// An amount of memory in bytes, read from `1G`, `512MiB`, `4096` or a bare integer, and written back in the
/// largest unit that loses nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Size(
    /// Bytes.
    pub u64,
);

impl Size {
    /// The size in bytes.
    pub const fn bytes(self) -> u64 {
        self.0
    }
}

impl FromStr for Size {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        let trimmed = text.trim();
        if trimmed.starts_with("0x") || trimmed.starts_with("0X") {
            return parse_number(text).map(Self);
        }
        let digits_end = trimmed.find(|c: char| !c.is_ascii_digit() && c != '_').unwrap_or(trimmed.len());
        let (digits, suffix) = trimmed.split_at(digits_end);
        let unit = match suffix.trim_start().to_ascii_lowercase().as_str() {
            "" | "b" => 1,
            "k" | "kib" => KIB,
            "m" | "mib" => MIB,
            "g" | "gib" => GIB,
            "t" | "tib" => TIB,
            _ => return Err(UnitError::Size { text: text.to_owned() }),
        };
        let number = parse_number(digits).map_err(|error| match error {
            UnitError::TooLarge { .. } => UnitError::TooLarge { text: text.to_owned() },
            _ => UnitError::Size { text: text.to_owned() },
        })?;
        number.checked_mul(unit).map(Self).ok_or_else(|| UnitError::TooLarge { text: text.to_owned() })
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (unit, letter) in [(TIB, "T"), (GIB, "G"), (MIB, "M"), (KIB, "K")] {
            if self.0 >= unit && self.0.is_multiple_of(unit) {
                return write!(f, "{}{letter}", self.0 / unit);
            }
        }
        write!(f, "{}", self.0)
    }
}

impl Serialize for Size {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(TextOrNumber("a size such as \"512M\"", |text: &str| text.parse(), Size))
    }
}

impl JsonSchema for Size {
    fn schema_name() -> Cow<'static, str> {
        "Size".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "An amount of memory: a number of bytes, or a text such as \"512M\" (powers of 1024).",
            "oneOf": [{"type": "string", "examples": ["1G"]}, {"type": "integer", "minimum": 0}]
        })
    }
}

/// A 64-bit number that is an address, an offset or a register: written as `0x…`, read from that, from decimal
/// text, or from a JSON integer.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Address(
    /// The number itself.
    pub u64,
);

impl FromStr for Address {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        parse_number(text).map(Self)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl From<u64> for Address {
    fn from(number: u64) -> Self {
        Self(number)
    }
}

impl Serialize for Address {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Address {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(TextOrNumber(
            "an address such as \"0x200040\"",
            |text: &str| text.parse(),
            Address,
        ))
    }
}

impl JsonSchema for Address {
    fn schema_name() -> Cow<'static, str> {
        "Address".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "An address, an offset or a register. Replies carry \"0x…\"; requests may also carry an integer.",
            "oneOf": [{"type": "string", "examples": ["0x200040"]}, {"type": "integer", "minimum": 0}]
        })
    }
}

/// Reads a value from text through a parser or from a non-negative integer.
struct TextOrNumber<P, N>(&'static str, P, N);

impl<T, P, N> Visitor<'_> for TextOrNumber<P, N>
where
    P: Fn(&str) -> Result<T, UnitError>,
    N: Fn(u64) -> T,
{
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} or a number of at least 0", self.0)
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
        (self.1)(text).map_err(E::custom)
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<T, E> {
        Ok((self.2)(number))
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<T, E> {
        match u64::try_from(number) {
            Ok(number) => Ok((self.2)(number)),
            Err(_) => Err(E::invalid_value(de::Unexpected::Signed(number), &self)),
        }
    }
}

/// Bytes of a device: `offset` from its start and `length`, at least one byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ByteRange {
    /// First byte.
    pub offset: Address,
    /// Number of bytes.
    pub length: u64,
}

impl ByteRange {
    /// A range from its first byte and its length.
    pub const fn new(offset: u64, length: u64) -> Self {
        Self { offset: Address(offset), length }
    }

    /// The byte after the last one; `None` if that needs more than 64 bits.
    pub const fn end(&self) -> Option<u64> {
        self.offset.0.checked_add(self.length)
    }

    /// Whether the two ranges share a byte.
    pub fn overlaps(&self, other: &Self) -> bool {
        let end = |range: &Self| u128::from(range.offset.0) + u128::from(range.length);
        u128::from(self.offset.0) < end(other) && u128::from(other.offset.0) < end(self)
    }
}

impl FromStr for ByteRange {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        let (offset, length) = match text.split_once('+') {
            Some((offset, length)) => (parse_number(offset)?, length.parse::<Size>()?.0),
            None => (parse_number(text)?, 1),
        };
        if length == 0 {
            return Err(UnitError::EmptyRange { text: text.to_owned() });
        }
        if offset.checked_add(length).is_none() {
            return Err(UnitError::TooLarge { text: text.to_owned() });
        }
        Ok(Self::new(offset, length))
    }
}

impl fmt::Display for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{}", self.offset, self.length)
    }
}

/// A span of time, written `90s`, `500ms`, `5m`, `1h` or as a bare number of seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct TimeSpan(
    /// The span.
    pub Duration,
);

impl FromStr for TimeSpan {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        let bad = || UnitError::Time { text: text.to_owned() };
        let trimmed = text.trim();
        let digits_end = trimmed.find(|c: char| !c.is_ascii_digit()).unwrap_or(trimmed.len());
        let (digits, unit) = trimmed.split_at(digits_end);
        let number: u64 = digits.parse().map_err(|_| bad())?;
        let milliseconds = match unit.trim_start() {
            "ms" => 1,
            "" | "s" => 1000,
            "m" | "min" => 60 * 1000,
            "h" => 3600 * 1000,
            _ => return Err(bad()),
        };
        number.checked_mul(milliseconds).map(|ms| Self(Duration::from_millis(ms))).ok_or_else(bad)
    }
}

impl fmt::Display for TimeSpan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let milliseconds = self.0.as_millis();
        if milliseconds.is_multiple_of(1000) {
            write!(f, "{}s", milliseconds / 1000)
        } else {
            write!(f, "{milliseconds}ms")
        }
    }
}

impl Serialize for TimeSpan {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for TimeSpan {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(TextOrNumber(
            "a time such as \"90s\"",
            |text: &str| text.parse(),
            |seconds| Self(Duration::from_secs(seconds)),
        ))
    }
}

impl JsonSchema for TimeSpan {
    fn schema_name() -> Cow<'static, str> {
        "TimeSpan".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "A span of time: a number of seconds, or a text such as \"90s\", \"500ms\" or \"5m\".",
            "oneOf": [{"type": "string", "examples": ["90s"]}, {"type": "integer", "minimum": 0}]
        })
    }
}

#[cfg(test)]
#[path = "units_test.rs"]
mod tests;
