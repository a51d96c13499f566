//! GUIDs in the mixed byte order of UEFI and ACPI (UEFI 2.10, appendix A).

use std::fmt;
use std::str::FromStr;

/// A GUID as it lies in memory: the first three groups of its text are little-endian numbers, the others bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Guid([u8; 16]);

/// A text that is no GUID.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a GUID: write it as a5bc1114-6f64-4ede-b863-3e83ed7c83b1")]
pub struct NotAGuid(pub String);

/// Lengths of the groups of a GUID's text, in digits.
const GROUPS: [usize; 5] = [8, 4, 4, 4, 12];

impl Guid {
    /// The GUID whose text is `a-b-c-` and the bytes of `d`.
    pub const fn new(a: u32, b: u16, c: u16, d: [u8; 8]) -> Self {
        let (a, b, c) = (a.to_le_bytes(), b.to_le_bytes(), c.to_le_bytes());
        Self([a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], d[0], d[1], d[2], d[3], d[4], d[5], d[6], d[7]])
    }

    /// The GUID that lies in memory as these bytes.
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// The bytes as they lie in memory.
    pub const fn bytes(self) -> [u8; 16] {
        self.0
    }
}

impl fmt::Display for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let b = self.0;
        write!(
            f,
            "{:08x}-{:04x}-{:04x}-{:02x}{:02x}-",
            u32::from_le_bytes([b[0], b[1], b[2], b[3]]),
            u16::from_le_bytes([b[4], b[5]]),
            u16::from_le_bytes([b[6], b[7]]),
            b[8],
            b[9]
        )?;
        b[10..].iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl FromStr for Guid {
    type Err = NotAGuid;

    fn from_str(text: &str) -> Result<Self, NotAGuid> {
        let refused = || NotAGuid(text.to_owned());
        let groups: Vec<&str> = text.split('-').collect();
        let shaped = groups.iter().map(|group| group.len()).eq(GROUPS);
        if !shaped || !text.bytes().all(|byte| byte == b'-' || byte.is_ascii_hexdigit()) {
            return Err(refused());
        }
        let number = u128::from_str_radix(&groups.concat(), 16).map_err(|_| refused())?;
        let bytes = number.to_be_bytes();
        let mut mixed = bytes;
        mixed[..4].reverse();
        mixed[4..6].reverse();
        mixed[6..8].reverse();
        Ok(Self(mixed))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn text_and_bytes_of_one_guid() {
        let guid = Guid::new(0xA5BC_1114, 0x6F64, 0x4EDE, [0xB8, 0x63, 0x3E, 0x83, 0xED, 0x7C, 0x83, 0xB1]);
        assert_eq!(guid.to_string(), "a5bc1114-6f64-4ede-b863-3e83ed7c83b1");
        assert_eq!(guid.bytes(), *b"\x14\x11\xbc\xa5\x64\x6f\xde\x4e\xb8\x63\x3e\x83\xed\x7c\x83\xb1");
        assert_eq!("A5BC1114-6F64-4EDE-B863-3E83ED7C83B1".parse(), Ok(guid));
    }

    #[test]
    fn what_is_no_guid_is_refused() {
        for text in [
            "",
            "a5bc1114",
            "a5bc1114-6f64-4ede-b863-3e83ed7c83b",
            "a5bc1114-6f64-4ede-b8633-e83ed7c83b1",
            "g5bc1114-6f64-4ede-b863-3e83ed7c83b1",
            "+5bc1114-6f64-4ede-b863-3e83ed7c83b1",
            "a5bc1114-6f64-4ede-b863-3e83ed7c83bé",
        ] {
            assert_eq!(text.parse::<Guid>(), Err(NotAGuid(text.to_owned())));
        }
    }

    proptest! {
        #[test]
        fn text_names_the_bytes(bytes: [u8; 16]) {
            let guid = Guid::from_bytes(bytes);
            prop_assert_eq!(guid.to_string().parse(), Ok(guid));
            prop_assert_eq!(guid.bytes(), bytes);
        }
    }
}
