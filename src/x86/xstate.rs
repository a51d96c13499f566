//! Vector and mask registers, and where XSAVE puts each state component.
//!
//! Offsets differ between processors (AVX-512 masks lie at 1088 on Intel and at 832 on AMD), so they come from CPUID
//! leaf 0xD. Layout: Intel SDM volume 1, chapter 13 (13.4 "XSAVE area", 13.5 "XSAVE-managed state").

use kvm_bindings::{kvm_cpuid_entry2, kvm_xsave};

/// Bytes of the legacy region: the FXSAVE image.
pub const LEGACY_SIZE: u32 = 512;
/// Bytes of the legacy region and the XSAVE header together.
pub const EXTENDED_OFFSET: u32 = 576;
/// Number of state components that a 64-bit mask can name, without bit 63.
const COMPONENTS: usize = 63;

/// Where one state component lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Component {
    /// Bytes.
    pub size: u32,
    /// Offset in the standard format; zero for supervisor components, which have none.
    pub offset: u32,
    /// In the compacted format the component starts on a 64-byte boundary.
    pub aligned: bool,
}

/// The state components of the guest's processor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct XsaveLayout {
    components: [Option<Component>; COMPONENTS],
}

impl XsaveLayout {
    /// Reads the sub-leaves of CPUID leaf 0xD.
    pub fn from_cpuid(entries: &[kvm_cpuid_entry2]) -> Self {
        let mut components = [None; COMPONENTS];
        let described =
            |entry: &&kvm_cpuid_entry2| entry.function == 0xd && entry.index >= 2 && entry.eax != 0;
        for entry in entries.iter().filter(described) {
            if let Some(slot) = components.get_mut(entry.index as usize) {
                let offset = if entry.ecx & 1 == 0 { entry.ebx } else { 0 };
                *slot = Some(Component { size: entry.eax, offset, aligned: entry.ecx & 2 != 0 });
            }
        }
        Self { components }
    }

    /// Component `index`, from 2 (AVX) on; 0 and 1 (x87 and SSE) live in the legacy region.
    pub fn component(&self, index: usize) -> Option<Component> {
        self.components.get(index).copied().flatten()
    }

    /// The components in `mask` from index 2 on, as (index, offset, size), in the standard format.
    pub fn standard(&self, mask: u64) -> impl Iterator<Item = (usize, u32, u32)> + '_ {
        (2..COMPONENTS).filter_map(move |index| {
            let component = self.component(index).filter(|_| mask & (1 << index) != 0)?;
            (component.offset != 0).then_some((index, component.offset, component.size))
        })
    }

    /// The components in `mask` from index 2 on, as (index, offset, size), in the compacted format of `mask`
    /// (SDM volume 1, 13.4.3).
    pub fn compacted(&self, mask: u64) -> impl Iterator<Item = (usize, u32, u32)> + '_ {
        let mut next = EXTENDED_OFFSET;
        (2..COMPONENTS).filter_map(move |index| {
            let component = self.component(index).filter(|_| mask & (1 << index) != 0)?;
            if component.aligned {
                next = next.next_multiple_of(64);
            }
            let offset = next;
            next = next.saturating_add(component.size);
            Some((index, offset, component.size))
        })
    }
}

/// The registers that [`kvm_bindings::kvm_regs`] lacks and memory operands need.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExtendedState {
    /// Extended control register 0: the components that user code may save.
    pub xcr0: u64,
    /// IA32_XSS: the components that only XSAVES saves.
    pub xss: u64,
    /// Where the components lie.
    pub layout: XsaveLayout,
    /// ZMM0 to ZMM31; XMM and YMM are their low parts.
    pub vectors: [[u8; 64]; 32],
    /// Mask registers k0 to k7.
    pub masks: [u64; 8],
    /// Protection keys of user pages; all zero permits everything.
    pub pkru: u32,
}

impl ExtendedState {
    /// Unpacks what KVM_GET_XSAVE gave: the first 4096 bytes of the area, which hold everything up to protection keys.
    pub fn from_kvm(xsave: &kvm_xsave, layout: XsaveLayout, xcr0: u64, xss: u64) -> Self {
        let area: Vec<u8> = xsave.region.iter().flat_map(|word| word.to_le_bytes()).collect();
        Self::from_xsave(&area, layout, xcr0, xss)
    }

    /// Unpacks an area in the standard format.
    ///
    /// A component whose XSTATE_BV bit is clear, or which the area is too short to hold, has its initial value: zero.
    pub fn from_xsave(area: &[u8], layout: XsaveLayout, xcr0: u64, xss: u64) -> Self {
        let mut state = Self { xcr0, xss, layout, vectors: [[0; 64]; 32], masks: [0; 8], pkru: 0 };
        let present = bytes::<8>(area, LEGACY_SIZE as usize).map_or(0, u64::from_le_bytes);
        let at = |index: usize| {
            let component = state.layout.component(index).filter(|_| present & (1 << index) != 0)?;
            Some(component.offset as usize)
        };
        let (ymm, masks, zmm, high, pkru) = (at(2), at(5), at(6), at(7), at(9));
        for (index, vector) in state.vectors.iter_mut().enumerate() {
            if index < 16 {
                if present & 2 != 0 {
                    copy(&mut vector[..16], area, 160 + 16 * index);
                }
                if let Some(offset) = ymm {
                    copy(&mut vector[16..32], area, offset + 16 * index);
                }
                if let Some(offset) = zmm {
                    copy(&mut vector[32..], area, offset + 32 * index);
                }
            } else if let Some(offset) = high {
                copy(vector, area, offset + 64 * (index - 16));
            }
        }
        if let Some(offset) = masks {
            for (index, mask) in state.masks.iter_mut().enumerate() {
                *mask = bytes::<8>(area, offset + 8 * index).map_or(0, u64::from_le_bytes);
            }
        }
        if let Some(offset) = pkru {
            state.pkru = bytes::<4>(area, offset).map_or(0, u32::from_le_bytes);
        }
        state
    }

    /// Element `index` of vector register `number`, sign-extended; elements are `size` (1, 2, 4 or 8) bytes.
    pub fn element(&self, number: usize, index: usize, size: usize) -> Option<i64> {
        let start = index.checked_mul(size)?;
        let raw = self.vectors.get(number)?.get(start..start.checked_add(size)?)?;
        Some(match size {
            1 => i64::from(raw[0] as i8),
            2 => i64::from(i16::from_le_bytes(raw.try_into().ok()?)),
            4 => i64::from(i32::from_le_bytes(raw.try_into().ok()?)),
            8 => i64::from_le_bytes(raw.try_into().ok()?),
            _ => return None,
        })
    }
}

fn bytes<const N: usize>(area: &[u8], at: usize) -> Option<[u8; N]> {
    area.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn copy(target: &mut [u8], area: &[u8], at: usize) {
    if let Some(source) = at.checked_add(target.len()).and_then(|end| area.get(at..end)) {
        target.copy_from_slice(source);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(index: u32, size: u32, offset: u32, flags: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function: 0xd, index, eax: size, ebx: offset, ecx: flags, ..Default::default() }
    }

    fn layout() -> XsaveLayout {
        XsaveLayout::from_cpuid(&[
            leaf(0, 7, 0, 0),
            leaf(2, 256, 576, 0),
            leaf(5, 64, 832, 0),
            leaf(6, 512, 896, 0),
            leaf(7, 1024, 1408, 0),
            leaf(9, 8, 2432, 0),
            leaf(11, 16, 0, 1),
            leaf(17, 64, 2496, 2),
        ])
    }

    #[test]
    fn components_come_from_cpuid() {
        let standard: Vec<_> = layout().standard(u64::MAX).collect();
        assert_eq!(standard.len(), 6);
        assert_eq!(standard[1], (5, 832, 64));
        assert_eq!(layout().component(11), Some(Component { size: 16, offset: 0, aligned: false }));
    }

    #[test]
    fn compaction_follows_the_mask_and_aligns() {
        let all: Vec<_> = layout().compacted(1 << 2 | 1 << 9 | 1 << 11 | 1 << 17).collect();
        assert_eq!(all, [(2, 576, 256), (9, 832, 8), (11, 840, 16), (17, 896, 64)]);
    }

    #[test]
    fn registers_are_unpacked_and_absent_ones_are_zero() {
        let mut area = vec![0u8; 4096];
        area[512..520].copy_from_slice(&0x2a6u64.to_le_bytes());
        area[160 + 16..160 + 32].fill(0x11);
        area[576 + 16..576 + 32].fill(0x22);
        area[832 + 8..832 + 16].fill(0x33);
        area[1408..1408 + 64].fill(0x44);
        area[896..1408].fill(0x55);
        area[2432..2436].copy_from_slice(&0x55555554u32.to_le_bytes());
        let state = ExtendedState::from_xsave(&area, layout(), 0x2e7, 0);
        assert_eq!(state.vectors[1][..16], [0x11; 16]);
        assert_eq!(state.vectors[1][16..32], [0x22; 16]);
        assert_eq!(state.vectors[1][32..], [0; 32], "bit 6 of XSTATE_BV is clear");
        assert_eq!(state.vectors[16], [0x44; 64]);
        assert_eq!(state.masks[1], 0x3333_3333_3333_3333);
        assert_eq!(state.pkru, 0x5555_5554);
        assert_eq!(state.element(1, 1, 4), Some(0x1111_1111));
        assert_eq!(state.element(1, 8, 8), None);
        assert_eq!(state.element(1, usize::MAX, 8), None);
    }

    #[test]
    fn the_words_of_kvm_are_bytes_in_order() {
        let mut xsave = kvm_xsave::default();
        xsave.region[128] = 2;
        xsave.region[40] = 0x0403_0201;
        let state = ExtendedState::from_kvm(&xsave, layout(), 3, 0);
        assert_eq!(state.vectors[0][..4], [1, 2, 3, 4]);
    }

    #[test]
    fn a_short_area_is_not_read_beyond_its_end() {
        for length in [0, 100, 519, 600] {
            let state = ExtendedState::from_xsave(&vec![0xff; length], layout(), 7, 0);
            assert_eq!(state.vectors[31], [0; 64]);
        }
    }
}
