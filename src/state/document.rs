//! The shape of a state file: a line that says what it is, and then its content.
//!
//! ```text
//! aconite-state KIND VERSION LENGTH SHA256
//! LENGTH bytes
//! ```
//!
//! The digest is that of kind, version and content, in hexadecimal digits.

use std::fmt::Write;

use sha2::{Digest, Sha256};
use thiserror::Error;

use super::MAX_DOCUMENT;

const MAGIC: &str = "aconite-state";
/// More bytes than the first line of a document has.
pub(super) const MAX_HEADER: u64 = 256;

/// What a document holds, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    /// What: one word.
    pub kind: &'static str,
    /// How: changes with the meaning of the bytes.
    pub version: u32,
}

/// What is wrong with a document.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum Damage {
    /// The first line is not that of a document.
    #[error("it does not begin like a state file")]
    Header,
    /// It is something else.
    #[error("it holds {found:?} and not {expected:?}")]
    Kind {
        /// What it holds.
        found: String,
        /// What was looked for.
        expected: &'static str,
    },
    /// It was written by a program that means something else by its bytes.
    #[error("it has version {found}, and this program reads version {expected}")]
    Version {
        /// Its version.
        found: u32,
        /// The one that is read.
        expected: u32,
    },
    /// It is shorter or longer than it says.
    #[error("it should have {expected} bytes of content and has {found}")]
    Length {
        /// What it has.
        found: u64,
        /// What its first line says.
        expected: u64,
    },
    /// Its bytes are not those that were written.
    #[error("its checksum is wrong")]
    Checksum,
    /// Its bytes are those that were written, and make no sense under this name.
    #[error("its content does not belong under this name")]
    Content,
}

/// The content is larger than [`MAX_DOCUMENT`].
#[derive(Debug, PartialEq, Eq)]
pub(super) struct TooLarge;

fn digest(content: &[u8], format: Format) -> String {
    let mut hash = Sha256::new();
    hash.update(format!("{} {}\n", format.kind, format.version));
    hash.update(content);
    hash.finalize().iter().fold(String::new(), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// The bytes of a file with this content.
pub(super) fn seal(content: &[u8], format: Format) -> Result<Vec<u8>, TooLarge> {
    if content.len() as u64 > MAX_DOCUMENT {
        return Err(TooLarge);
    }
    let line =
        format!("{MAGIC} {} {} {} {}\n", format.kind, format.version, content.len(), digest(content, format));
    Ok([line.as_bytes(), content].concat())
}

/// The content of a file with these bytes.
pub(super) fn open(mut bytes: Vec<u8>, format: Format) -> Result<Vec<u8>, Damage> {
    let most = bytes.len().min(MAX_HEADER as usize);
    let end = bytes[..most].iter().position(|byte| *byte == b'\n').ok_or(Damage::Header)?;
    let line = std::str::from_utf8(&bytes[..end]).map_err(|_| Damage::Header)?;
    let words: Vec<&str> = line.split(' ').collect();
    let [MAGIC, kind, version, length, sum] = words[..] else { return Err(Damage::Header) };
    let (Ok(version), Ok(length)) = (version.parse::<u32>(), length.parse::<u64>()) else {
        return Err(Damage::Header);
    };
    if kind != format.kind {
        return Err(Damage::Kind { found: kind.to_owned(), expected: format.kind });
    }
    if version != format.version {
        return Err(Damage::Version { found: version, expected: format.version });
    }
    let found = (bytes.len() - end - 1) as u64;
    if found != length {
        return Err(Damage::Length { found, expected: length });
    }
    if digest(&bytes[end + 1..], format) != sum {
        return Err(Damage::Checksum);
    }
    bytes.drain(..=end);
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const FORMAT: Format = Format { kind: "test", version: 3 };

    #[test]
    fn the_first_line_is_readable() {
        let bytes = seal(b"abc", FORMAT).unwrap();
        let text = String::from_utf8(bytes).unwrap();
        assert!(text.starts_with("aconite-state test 3 3 ") && text.ends_with("\nabc"), "{text}");
    }

    #[test]
    fn what_is_wrong_is_named() {
        let bytes = seal(b"content", FORMAT).unwrap();
        let other = Format { kind: "other", version: 3 };
        assert_eq!(open(bytes.clone(), other), Err(Damage::Kind { found: "test".into(), expected: "other" }));
        let newer = Format { version: 4, ..FORMAT };
        assert_eq!(open(bytes.clone(), newer), Err(Damage::Version { found: 3, expected: 4 }));
        let short = bytes[..bytes.len() - 2].to_vec();
        assert_eq!(open(short, FORMAT), Err(Damage::Length { found: 5, expected: 7 }));
        assert_eq!(open(Vec::new(), FORMAT), Err(Damage::Header));
        assert_eq!(open(b"some other file\n".to_vec(), FORMAT), Err(Damage::Header));
    }

    proptest! {
        #[test]
        fn content_comes_back(content in prop::collection::vec(any::<u8>(), 0..300)) {
            prop_assert_eq!(open(seal(&content, FORMAT).unwrap(), FORMAT), Ok(content));
        }

        #[test]
        fn a_changed_or_shortened_file_is_never_accepted(
            content in prop::collection::vec(any::<u8>(), 0..100),
            at in any::<prop::sample::Index>(),
            change in 1u8..,
            cut in any::<bool>(),
        ) {
            let mut bytes = seal(&content, FORMAT).unwrap();
            let at = at.index(bytes.len());
            if cut { bytes.truncate(at) } else { bytes[at] ^= change }
            prop_assert!(open(bytes, FORMAT).is_err());
        }

        #[test]
        fn any_bytes_are_answered(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            prop_assert!(open(bytes, FORMAT).is_err());
        }
    }
}
