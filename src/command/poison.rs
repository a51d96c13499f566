//! What is to be poisoned: named, at random, or in a pattern.

use std::collections::BTreeSet;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Error, ErrorCode};
use crate::memory::LINE_SIZE;
use crate::units::{Address, ByteRange};

/// Most ranges in one request.
pub const MOST_RANGES: usize = 1 << 20;

/// What is to be poisoned; all of it or nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum PoisonPattern {
    /// These bytes, and with them the whole lines that they are in. At least one range.
    Ranges(Vec<ByteRange>),
    /// Lines at random.
    Random(RandomLines),
    /// Lines at equal distances.
    Every(EveryStride),
}

/// Lines at random, none of them twice. The same request names the same lines, whatever is poisoned already.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RandomLines {
    /// How many lines.
    pub count: u64,
    /// What the choice depends on.
    #[serde(default)]
    pub seed: u64,
    /// Where. Default: all of the device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub within: Option<ByteRange>,
    /// What a line is the first of.
    #[serde(default)]
    pub align: PoisonAlign,
}

/// Bytes at equal distances.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EveryStride {
    /// From the first byte of one piece to that of the next.
    pub stride: u64,
    /// Bytes of a piece. Default: one line.
    #[serde(default = "line")]
    pub length: u64,
    /// Where; the first piece begins there. Default: all of the device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub within: Option<ByteRange>,
}

const fn line() -> u64 {
    LINE_SIZE
}

/// Where lines at random may be.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema, clap::ValueEnum,
)]
#[serde(rename_all = "snake_case")]
pub enum PoisonAlign {
    /// Anywhere.
    #[default]
    Line,
    /// At the beginning of a sector of 512 bytes, of which each has one at most.
    Sector,
    /// At the beginning of a page of 4096 bytes, of which each has one at most.
    Page,
}

impl PoisonAlign {
    const fn bytes(self) -> u64 {
        match self {
            Self::Line => LINE_SIZE,
            Self::Sector => 512,
            Self::Page => 4096,
        }
    }
}

impl PoisonPattern {
    /// The ranges that are meant, of a device that consists of `whole`. Named ranges are not looked at.
    ///
    /// # Errors
    /// There are none, too many, or no room for them.
    pub fn ranges(self, device: &str, whole: &[ByteRange]) -> Result<Vec<ByteRange>, Error> {
        let ranges = match self {
            Self::Ranges(ranges) => {
                if ranges.is_empty() {
                    return Err(wrong(
                        format!("No range of {device} is named"),
                        "name at least one, such as 0x200040+64",
                    ));
                }
                bounded(ranges.len() as u64)?;
                ranges
            }
            Self::Random(random) => random.ranges(device, whole)?,
            Self::Every(every) => every.ranges(device, whole)?,
        };
        Ok(ranges)
    }
}

impl RandomLines {
    fn ranges(self, device: &str, whole: &[ByteRange]) -> Result<Vec<ByteRange>, Error> {
        bounded(self.count)?;
        let align = self.align.bytes();
        // Places for a line: in each part, the first one and how many there are.
        let parts: Vec<(u64, u64)> = parts(device, whole, self.within)?
            .into_iter()
            .map(|(start, end)| {
                let first = start.next_multiple_of(align);
                let places = end.checked_sub(first + LINE_SIZE).map_or(0, |room| room / align + 1);
                (first, places)
            })
            .collect();
        let places: u64 = parts.iter().map(|(_, places)| places).sum();
        if self.count > places {
            return Err(wrong(
                format!("{} lines have no room in {device}, where there are {places} places", self.count),
                "ask for fewer, or for a larger part, or another alignment",
            ));
        }
        // Robert Floyd's sampling: one step a line, and every choice is as likely as any other.
        let mut random = SplitMix64(self.seed);
        let mut chosen = BTreeSet::new();
        for last in places - self.count..places {
            let place = random.below(last + 1);
            if !chosen.insert(place) {
                chosen.insert(last);
            }
        }
        let mut ranges = Vec::with_capacity(chosen.len());
        let mut before = 0;
        for (first, places) in parts {
            let here = chosen.range(before..before + places);
            ranges.extend(here.map(|place| ByteRange::new(first + (place - before) * align, LINE_SIZE)));
            before += places;
        }
        Ok(ranges)
    }
}

impl EveryStride {
    fn ranges(self, device: &str, whole: &[ByteRange]) -> Result<Vec<ByteRange>, Error> {
        if self.length == 0 || self.length > self.stride {
            return Err(wrong(
                format!("{} bytes every {} bytes make no pattern", self.length, self.stride),
                "give a length of at least 1 and a stride of at least that",
            ));
        }
        let mut ranges = Vec::new();
        for (start, end) in parts(device, whole, self.within)? {
            let count = (end - start).checked_sub(self.length).map_or(0, |room| room / self.stride + 1);
            bounded(ranges.len() as u64 + count)?;
            ranges.extend((0..count).map(|n| ByteRange::new(start + n * self.stride, self.length)));
        }
        Ok(ranges)
    }
}

/// The parts of a device that are meant, from the first byte to the end.
fn parts(device: &str, whole: &[ByteRange], within: Option<ByteRange>) -> Result<Vec<(u64, u64)>, Error> {
    let span = |range: &ByteRange| Some((range.offset.0, range.end()?));
    let Some(within) = within else { return Ok(whole.iter().filter_map(span).collect()) };
    let inside = |(start, end): (u64, u64)| {
        whole.iter().filter_map(span).any(|(first, last)| first <= start && end <= last)
    };
    match span(&within).filter(|part| part.0 < part.1 && inside(*part)) {
        Some(part) => Ok(vec![part]),
        None => {
            let places: Vec<_> = whole.iter().map(ToString::to_string).collect();
            Err(Error::new(
                ErrorCode::OutsideDevice,
                format!("The part {within} is not in {device}"),
                format!("name a part of {}", places.join(" or of ")),
            ))
        }
    }
}

fn bounded(count: u64) -> Result<(), Error> {
    if (1..=MOST_RANGES as u64).contains(&count) {
        return Ok(());
    }
    let remedy = format!("ask for 1 to {MOST_RANGES} in one request");
    Err(wrong(format!("{count} ranges cannot be poisoned at a time"), &remedy))
}

fn wrong(message: String, remedy: &str) -> Error {
    Error::new(ErrorCode::BadParameter, message, remedy)
}

/// The generator of Steele, Lea and Flood ("Fast splittable pseudorandom number generators", 2014): what a seed names
/// stays the same in every version.
struct SplitMix64(u64);

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// A number below `bound`.
    fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }
}

/// Poison by address: of guest-physical memory, or of a process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum PoisonPlace {
    /// Guest-physical addresses, whichever device or RAM they belong to. At least one range.
    Addresses(Vec<ByteRange>),
    /// The memory of a process of the guest, which its agent looks up.
    Process(ProcessMemory),
}

/// Memory of a process of the guest. It has to be in memory: the process has touched it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ProcessMemory {
    /// The process, by its number in the guest.
    pub pid: u32,
    /// Virtual address of the first byte.
    pub address: Address,
    /// Number of bytes. Default: one.
    #[serde(default = "one")]
    pub length: u64,
}

const fn one() -> u64 {
    1
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GIB: u64 = 1 << 30;

    fn lines(pattern: PoisonPattern) -> Vec<u64> {
        let ranges = pattern.ranges("p0", &[ByteRange::new(0, GIB)]).unwrap();
        assert!(ranges.iter().all(|range| range.length == LINE_SIZE));
        ranges.into_iter().map(|range| range.offset.0).collect()
    }

    #[test]
    fn a_seed_names_its_lines_for_ever() {
        let random = |seed| {
            lines(PoisonPattern::Random(RandomLines {
                count: 3,
                seed,
                within: None,
                align: PoisonAlign::Page,
            }))
        };
        assert_eq!(random(7), [0x113_0000, 0x18f2_e000, 0x39a6_1000]);
        assert_ne!(random(8), random(7));
        // Reference values of the generator's authors for seed 1234567.
        let mut generator = SplitMix64(1_234_567);
        assert_eq!(generator.next(), 6_457_827_717_110_365_317);
        assert_eq!(generator.next(), 3_203_168_211_198_807_973);
    }

    #[test]
    fn a_pattern_begins_where_it_is_told() {
        let every = |stride, length, within| PoisonPattern::Every(EveryStride { stride, length, within });
        assert_eq!(
            lines(every(4096, 64, Some(ByteRange::new(0x1040, 0x2040)))),
            [0x1040, 0x2040, 0x3040],
            "the last line fits to the byte"
        );
        assert_eq!(lines(every(GIB / 4, 64, None)).len(), 4);
        let ram = [ByteRange::new(0, 0x2000), ByteRange::new(4 * GIB, 0x1000)];
        let both = every(0x1000, 64, None).ranges("ram", &ram).unwrap();
        assert_eq!(both.iter().map(|r| r.offset.0).collect::<Vec<_>>(), [0, 0x1000, 4 * GIB]);
    }

    #[test]
    fn what_makes_no_sense_is_refused_by_name() {
        let refused = |pattern: PoisonPattern| {
            pattern.ranges("p0", &[ByteRange::new(0, 0x4000)]).unwrap_err().to_string()
        };
        assert_eq!(
            refused(PoisonPattern::Ranges(vec![])),
            "No range of p0 is named; name at least one, such as 0x200040+64"
        );
        let random = |count, within, align| {
            refused(PoisonPattern::Random(RandomLines { count, seed: 0, within, align }))
        };
        assert_eq!(
            random(5, None, PoisonAlign::Page),
            "5 lines have no room in p0, where there are 4 places; ask for fewer, or for a larger part, or another alignment"
        );
        assert!(random(0, None, PoisonAlign::Line).starts_with("0 ranges cannot be poisoned at a time"));
        assert_eq!(
            random(1, Some(ByteRange::new(0x3000, 0x1001)), PoisonAlign::Line),
            "The part 0x3000+4097 is not in p0; name a part of 0x0+16384"
        );
        let every =
            |stride, length| refused(PoisonPattern::Every(EveryStride { stride, length, within: None }));
        assert!(every(64, 65).starts_with("65 bytes every 64 bytes make no pattern"));
        assert!(every(0, 0).contains("make no pattern"));
        let tiny = PoisonPattern::Every(EveryStride { stride: 1, length: 1, within: None });
        assert!(tiny.ranges("p0", &[ByteRange::new(0, 1 << 40)]).unwrap_err().message.contains("at a time"));
    }

    proptest! {
        #[test]
        fn random_lines_are_as_many_as_asked_apart_and_in_place(
            seed in any::<u64>(),
            count in 1u64..60,
            start in 0u64..5000,
            length in 64u64..300_000,
            align in prop::sample::select(vec![PoisonAlign::Line, PoisonAlign::Sector, PoisonAlign::Page]),
        ) {
            let within = ByteRange::new(start, length);
            let random = RandomLines { count, seed, within: Some(within), align };
            let places = (start..start + length)
                .step_by(1)
                .filter(|at| at % align.bytes() == 0 && at + LINE_SIZE <= start + length)
                .count() as u64;
            match PoisonPattern::Random(random).ranges("p0", &[ByteRange::new(0, GIB)]) {
                Ok(ranges) => {
                    prop_assert_eq!(ranges.len() as u64, count);
                    prop_assert!(ranges.windows(2).all(|w| w[0].offset.0 < w[1].offset.0));
                    for range in &ranges {
                        prop_assert_eq!(range.offset.0 % align.bytes(), 0);
                        prop_assert!(range.offset.0 >= start && range.end().unwrap() <= start + length);
                    }
                }
                Err(error) => prop_assert!(places < count, "{error}"),
            }
        }
    }
}
