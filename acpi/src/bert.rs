//! BERT (ACPI 6.5, 18.3.1): where the OS finds the errors that ended the previous boot.

use crate::Table;
use crate::layout::{BERT_BASE, BERT_SIZE};

/// BERT that names the boot error region. The region is there on every boot, empty (its first status is 0) unless
/// firmware has something to tell.
pub(crate) fn bert() -> Table {
    let body = [&(BERT_SIZE as u32).to_le_bytes()[..], &BERT_BASE.to_le_bytes()].concat();
    Table::new(*b"BERT", 1, &body)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_where_the_spec_says() {
        let table = bert();
        assert_eq!(table.bytes().len(), 48);
        assert_eq!(table.bytes()[36..40], 0x2_0000u32.to_le_bytes());
        assert_eq!(table.bytes()[40..48], 0x22_0000u64.to_le_bytes());
    }
}
