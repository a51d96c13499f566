//! What all `_DSM` models share: the request, and the status codes.

use zerocopy::IntoBytes;
use zerocopy::little_endian::U32;

/// A UUID in the mixed byte order of ACPI's ToUUID (ACPI 6.5, 19.6.142).
pub(super) type Uuid = [u8; 16];

/// The UUID written `a-b-c-d` with the last two groups of its text form as bytes.
pub(super) const fn uuid(a: u32, b: u16, c: u16, d: [u8; 8]) -> Uuid {
    let (a, b, c) = (a.to_le_bytes(), b.to_le_bytes(), c.to_le_bytes());
    [a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], d[0], d[1], d[2], d[3], d[4], d[5], d[6], d[7]]
}

/// Arguments of one `_DSM` call, as the guest gave them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Request<'a> {
    /// Arg0.
    pub(super) uuid: Uuid,
    /// Arg1.
    pub(super) revision: u32,
    /// Arg2.
    pub(super) function: u32,
    /// The buffer in the package of Arg3, empty if there is none.
    pub(super) input: &'a [u8],
}

/// Low half of the status that each function of the root device returns first (ACPI 6.5, 9.20.7).
pub(super) mod status {
    /// Success.
    pub(crate) const SUCCESS: u32 = 0;
    /// The function is not supported.
    pub(crate) const NOT_SUPPORTED: u32 = 1;
    /// The input is invalid.
    pub(crate) const INVALID_INPUT: u32 = 2;
}

/// The answer that consists of a status alone.
pub(super) fn only_status(status: u32) -> Vec<u8> {
    U32::new(status).as_bytes().to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_has_the_bytes_of_touuid() {
        // ToUUID("aabbccdd-eeff-gghh-iijj-kkllmmnnoopp") is dd cc bb aa ff ee hh gg ii jj kk ll mm nn oo pp.
        let uuid = uuid(0x0011_2233, 0x4455, 0x6677, [0x88, 0x99, 0xAA, 0xBB, 0xCC, 0xDD, 0xEE, 0xFF]);
        let expected =
            [0x33, 0x22, 0x11, 0x00, 0x55, 0x44, 0x77, 0x66, 0x88, 0x99, 0xAA, 0xBB, 0xCC, 0xDD, 0xEE, 0xFF];
        assert_eq!(uuid, expected);
    }
}
