//! SLIT (ACPI 6.5, 5.2.17): distances between proximity domains.

use crate::Table;

/// Distance of a domain to itself, by definition.
const LOCAL: u8 = 10;
/// Distance between two domains, Linux's REMOTE_DISTANCE.
const REMOTE: u8 = 20;

/// SLIT of `domains` proximity domains that are all equally far from each other.
pub(crate) fn slit(domains: u32) -> Table {
    let mut body = u64::from(domains).to_le_bytes().to_vec();
    for from in 0..domains {
        body.extend((0..domains).map(|to| if from == to { LOCAL } else { REMOTE }));
    }
    Table::new(*b"SLIT", 1, &body)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checksum;

    #[test]
    fn is_a_square_with_tens_on_the_diagonal() {
        let table = slit(3);
        let bytes = table.bytes();
        assert_eq!(checksum(bytes), 0);
        assert_eq!(bytes[36..44], 3u64.to_le_bytes());
        assert_eq!(bytes[44..], [10, 20, 20, 20, 10, 20, 20, 20, 10]);
    }
}
