//! Namespace index blocks of a label area (UEFI 2.10, 13.19.3 "Namespace Index Block").
//!
//! A label area holds two index blocks, of which the one with the newer sequence number counts, and behind them slots
//! for labels. Sizes and numbers of slots are those that Linux computes for labels of version 1.2
//! (`sizeof_namespace_index`, `nvdimm_num_label_slots` and `nd_label_write_index` in drivers/nvdimm/label.c); it takes
//! no others.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of a label of version 1.2.
const LABEL_SIZE: u64 = 256;
/// Index blocks are multiples of this many bytes.
const INDEX_ALIGN: u64 = 256;
/// Smallest area: two index blocks and two labels.
pub const MIN_SIZE: u64 = 2 * INDEX_ALIGN + 2 * LABEL_SIZE;

/// Head of an index block; a bitmap of free slots follows.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct IndexHead {
    signature: [u8; 16],
    flags: [u8; 3],
    /// 128 << this: bytes of a label.
    label_size: u8,
    sequence: U32,
    own_offset: U64,
    own_size: U64,
    other_offset: U64,
    label_offset: U64,
    slots: U32,
    major: U16,
    minor: U16,
    checksum: U64,
}
const HEAD_SIZE: u64 = size_of::<IndexHead>() as u64;
const _: () = assert!(HEAD_SIZE == 72);

const SIGNATURE: [u8; 16] = *b"NAMESPACE_INDEX\0";
/// Where the checksum is in the block.
const CHECKSUM: std::ops::Range<usize> = 64..72;

/// How an area of some size is divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Division {
    index_size: u64,
    slots: u64,
}

impl Division {
    fn of(area: u64) -> Self {
        let index_for = |slots: u64| (HEAD_SIZE + slots.div_ceil(8)).next_multiple_of(INDEX_ALIGN);
        let reserved = index_for(area / LABEL_SIZE);
        let slots = area.saturating_sub(2 * reserved) / LABEL_SIZE;
        Self { index_size: index_for(slots), slots }
    }
}

/// An area of `size` bytes with valid index blocks and no labels; zeros if it is smaller than [`MIN_SIZE`].
pub fn empty_area(size: usize) -> Vec<u8> {
    let mut area = vec![0; size];
    if (size as u64) < MIN_SIZE {
        return area;
    }
    let Division { index_size, slots } = Division::of(size as u64);
    for block in 0..2u64 {
        let head = IndexHead {
            signature: SIGNATURE,
            flags: [0; 3],
            label_size: 1,
            // The sequence goes 1, 2, 3, 1: the first block is the newer one.
            sequence: (3 - block as u32).into(),
            own_offset: (block * index_size).into(),
            own_size: index_size.into(),
            other_offset: ((1 - block) * index_size).into(),
            label_offset: (2 * index_size).into(),
            slots: (slots as u32).into(),
            major: 1.into(),
            minor: 2.into(),
            checksum: 0.into(),
        };
        let start = (block * index_size) as usize;
        let bytes = &mut area[start..start + index_size as usize];
        bytes[..HEAD_SIZE as usize].copy_from_slice(head.as_bytes());
        for slot in 0..slots as usize {
            bytes[HEAD_SIZE as usize + slot / 8] |= 1 << (slot % 8);
        }
        let sum = fletcher64(bytes);
        bytes[CHECKSUM].copy_from_slice(&sum.to_le_bytes());
    }
    area
}

/// Whether an area has an index block that Linux takes (`__nd_label_validate` in drivers/nvdimm/label.c).
pub fn has_index(area: &[u8]) -> bool {
    if (area.len() as u64) < MIN_SIZE {
        return false;
    }
    let Division { index_size, slots } = Division::of(area.len() as u64);
    (0..2).any(|block| {
        let start = (block * index_size) as usize;
        let Some(bytes) = area.get(start..start + index_size as usize) else { return false };
        let Ok((head, _)) = IndexHead::read_from_prefix(bytes) else { return false };
        let mut summed = bytes.to_vec();
        summed[CHECKSUM].fill(0);
        head.signature == SIGNATURE
            && fletcher64(&summed) == head.checksum.get()
            && head.sequence.get() & 3 != 0
            && head.own_offset.get() == block * index_size
            && head.other_offset.get() == (1 - block) * index_size
            && head.own_size.get() == index_size
            && u64::from(head.slots.get()) <= slots
    })
}

/// Fletcher's checksum over 32-bit little-endian words (UEFI 2.10, 13.19.3; `nd_fletcher64` in drivers/nvdimm/core.c).
fn fletcher64(bytes: &[u8]) -> u64 {
    let (mut low, mut high) = (0u32, 0u64);
    for word in bytes.as_chunks::<4>().0 {
        low = low.wrapping_add(u32::from_le_bytes(*word));
        high = high.wrapping_add(low.into());
    }
    high << 32 | u64::from(low)
}

#[cfg(test)]
mod tests {
    use super::super::super::testing::bytes;
    use super::*;

    #[test]
    fn every_byte_of_an_empty_index_is_as_linux_writes_it() {
        let area = empty_area(128 << 10);
        assert_eq!(area[..16], *b"NAMESPACE_INDEX\0");
        // Flags and label size, sequence 3, own offset and size, the other block, labels, 510 slots, version 1.2.
        let fields = bytes(
            "000000 01 03000000 0000000000000000 0001000000000000 0001000000000000 0002000000000000
             FE010000 0100 0200",
        );
        assert_eq!(area[16..64], fields);
        // 510 free slots.
        assert_eq!(area[72..135], [0xFF; 63]);
        assert_eq!(area[135], 0x3F);
        assert_eq!(area[136..256], [0; 120]);
        let second = bytes(
            "000000 01 02000000 0001000000000000 0001000000000000 0000000000000000 0002000000000000
             FE010000 0100 0200",
        );
        assert_eq!(area[256 + 16..256 + 64], second);
        assert!(area[512..].iter().all(|byte| *byte == 0));
        assert_eq!(area.len(), 128 << 10);
    }

    #[test]
    fn the_checksum_is_fletcher_s() {
        // 1, then 1 + 2: low 3, high 1 + 3.
        assert_eq!(fletcher64(&[1, 0, 0, 0, 2, 0, 0, 0]), 4 << 32 | 3);
        // Sums wrap at 32 bits.
        assert_eq!(fletcher64(&[0xFF; 8]), 0xFFFF_FFFD << 32 | 0xFFFF_FFFE);
    }

    #[test]
    fn an_index_is_told_from_none() {
        for size in [1024, 4096, 16 << 10, 128 << 10, 1 << 20] {
            let area = empty_area(size);
            assert!(has_index(&area), "{size}");
            let mut torn = area.clone();
            torn[0x20] ^= 1;
            assert!(has_index(&torn), "the second block still counts");
            let second = Division::of(size as u64).index_size as usize;
            torn[second + 0x20] ^= 1;
            assert!(!has_index(&torn));
            assert!(!has_index(&vec![0; size]));
        }
        assert!(!has_index(&empty_area(1023)));
        assert!(!has_index(&[]));
    }
}
