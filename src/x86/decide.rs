//! Poison against an access list: does this instruction consume a poisoned line?
//!
//! The rules are those that processors follow. A load, a fetch, a page walk and a read-modify-write consume poison.
//! A plain store does not: the line stays poisoned where the store left bytes alone, and is healed where it wrote
//! the whole line at once. Cache control and prefetch move no data into the processor.

use super::operands::AccessKind;
use super::physical::{PhysicalAccess, PhysicalAccesses};

/// Bytes of a line, the unit of poison.
pub const LINE: u64 = 64;

/// What an access list does to the poisoned lines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hit {
    /// No poisoned line is touched.
    None,
    /// Poisoned lines are written, none is read first: no machine check.
    StoreOnly {
        /// Poisoned lines that are written in part: they stay poisoned.
        partial: Vec<u64>,
        /// Poisoned lines that are written whole, without being read: the device may call them healed.
        whole: Vec<u64>,
    },
    /// A poisoned line is loaded as data.
    Load(Consumed),
    /// A poisoned line is fetched as instruction bytes.
    Fetch(Consumed),
    /// A poisoned line is read by the page walk.
    Walk(Consumed),
}

/// The first poisoned line that enters the processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Consumed {
    /// Guest-physical address of the line.
    pub line: u64,
    /// Linear address of the access, or for a page walk the address being translated.
    pub linear: u64,
    /// Guest-physical address of the first byte of the access in that line.
    pub gpa: u64,
    /// Bytes of the access in that line.
    pub bytes: u64,
}

/// Holds an access list against the poisoned lines.
///
/// `first_poisoned(gpa, length)` gives the guest-physical address of the first poisoned line that overlaps the range.
/// The list is taken in order, so what comes after a guest fault cannot hit.
pub fn intersects(accesses: &PhysicalAccesses, first_poisoned: impl Fn(u64, u64) -> Option<u64>) -> Hit {
    let (mut partial, mut whole) = (Vec::new(), Vec::new());
    for access in &accesses.ranges {
        let Some(line) = first_poisoned(access.gpa, u64::from(access.size)) else { continue };
        let line = line & !(LINE - 1);
        if access.kind.reads() {
            // The part of the access that lies in the line.
            let gpa = access.gpa.max(line);
            let linear = match access.kind {
                AccessKind::Walk => access.linear,
                _ => access.linear.wrapping_add(gpa - access.gpa),
            };
            let end = access.gpa.saturating_add(u64::from(access.size)).min(line.saturating_add(LINE));
            let consumed = Consumed { line, linear, gpa, bytes: end.saturating_sub(gpa) };
            return match access.kind {
                AccessKind::Walk => Hit::Walk(consumed),
                AccessKind::Fetch => Hit::Fetch(consumed),
                _ => Hit::Load(consumed),
            };
        }
        match access.kind {
            AccessKind::Store => each_poisoned(access, &first_poisoned, &mut partial),
            AccessKind::FullLineStore => each_poisoned(access, &first_poisoned, &mut whole),
            _ => {}
        }
    }
    if partial.is_empty() && whole.is_empty() { Hit::None } else { Hit::StoreOnly { partial, whole } }
}

/// Collects every poisoned line under an access.
fn each_poisoned(
    access: &PhysicalAccess,
    first_poisoned: &impl Fn(u64, u64) -> Option<u64>,
    lines: &mut Vec<u64>,
) {
    let end = access.gpa.saturating_add(u64::from(access.size));
    let mut from = access.gpa;
    while from < end {
        let Some(line) = first_poisoned(from, end - from) else { break };
        let line = line & !(LINE - 1);
        if lines.last() != Some(&line) {
            lines.push(line);
        }
        match line.checked_add(LINE) {
            Some(next) if next > from => from = next,
            _ => break,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn access(kind: AccessKind, gpa: u64, size: u32) -> PhysicalAccess {
        PhysicalAccess { kind, linear: gpa.wrapping_add(0x7000_0000), gpa, size, marks_entry: false }
    }

    fn hit(ranges: &[PhysicalAccess], poison: &[u64]) -> Hit {
        let list = PhysicalAccesses { ranges: ranges.to_vec(), fault: None };
        intersects(&list, |gpa, length| {
            poison.iter().copied().filter(|&line| line < gpa + length && line + LINE > gpa).min()
        })
    }

    #[test]
    fn reads_consume_and_name_the_part_in_the_line() {
        let consumed = |bytes| Consumed { line: 0x1040, linear: 0x7000_1040, gpa: 0x1040, bytes };
        assert_eq!(hit(&[access(AccessKind::Load, 0x103c, 8)], &[0x1040]), Hit::Load(consumed(4)));
        assert_eq!(hit(&[access(AccessKind::Load, 0x103c, 128)], &[0x1040]), Hit::Load(consumed(64)));
        assert_eq!(hit(&[access(AccessKind::ReadModifyWrite, 0x1040, 8)], &[0x1040]), Hit::Load(consumed(8)));
        assert_eq!(hit(&[access(AccessKind::Fetch, 0x103e, 15)], &[0x1040]), Hit::Fetch(consumed(13)));
        let entry = Consumed { line: 0x1040, linear: 0x7000_1048, gpa: 0x1048, bytes: 8 };
        assert_eq!(hit(&[access(AccessKind::Walk, 0x1048, 8)], &[0x1040]), Hit::Walk(entry));
    }

    #[test]
    fn neighbours_hints_and_probes_do_not() {
        assert_eq!(hit(&[access(AccessKind::Load, 0x1038, 8)], &[0x1040]), Hit::None);
        assert_eq!(hit(&[access(AccessKind::Load, 0x1080, 8)], &[0x1040]), Hit::None);
        for kind in [AccessKind::CacheControl, AccessKind::Prefetch, AccessKind::Probe] {
            assert_eq!(hit(&[access(kind, 0x1040, 1)], &[0x1040]), Hit::None);
        }
    }

    #[test]
    fn stores_are_told_apart() {
        assert_eq!(
            hit(&[access(AccessKind::Store, 0x1030, 0xa0)], &[0x1040, 0x10c0]),
            Hit::StoreOnly { partial: vec![0x1040, 0x10c0], whole: vec![] }
        );
        assert_eq!(
            hit(&[access(AccessKind::FullLineStore, 0x1040, 64)], &[0x1040]),
            Hit::StoreOnly { partial: vec![], whole: vec![0x1040] }
        );
    }

    #[test]
    fn the_first_read_in_order_wins() {
        let list = [
            access(AccessKind::Store, 0x2000, 8),
            access(AccessKind::Walk, 0x3000, 8),
            access(AccessKind::Load, 0x1040, 8),
        ];
        assert!(matches!(hit(&list, &[0x1040, 0x2000]), Hit::Load(_)));
        assert!(matches!(hit(&list, &[0x1040, 0x2000, 0x3000]), Hit::Walk(_)));
    }

    #[test]
    fn the_end_of_the_address_space_is_no_trap() {
        let top = access(AccessKind::Store, u64::MAX - 7, 8);
        let list = PhysicalAccesses { ranges: vec![top], fault: None };
        assert!(matches!(intersects(&list, |gpa, _| Some(gpa)), Hit::StoreOnly { .. }));
    }
}
