//! What the processor has, by CPUID.

use kvm_bindings::kvm_cpuid_entry2;

/// A feature that some instruction form needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Feature {
    Movbe,
    Cmpxchg16b,
    Popcnt,
    Sse42,
    Avx,
    Avx2,
    Avx512,
    Xsavec,
    Xsaveopt,
    Xsaves,
    Clflushopt,
    Clwb,
    Clzero,
    Movdir64b,
    Smap,
    FiveLevels,
    HugePages,
    Pcid,
    Adx,
    Bmi1,
    F16c,
}

/// Register of a leaf.
#[derive(Clone, Copy)]
enum Output {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

impl Feature {
    fn bit(self) -> (u32, u32, Output, u32) {
        use Output::*;
        match self {
            Self::Movbe => (1, 0, Ecx, 22),
            Self::Cmpxchg16b => (1, 0, Ecx, 13),
            Self::Popcnt => (1, 0, Ecx, 23),
            Self::Sse42 => (1, 0, Ecx, 20),
            Self::Avx => (1, 0, Ecx, 28),
            Self::F16c => (1, 0, Ecx, 29),
            Self::Pcid => (1, 0, Ecx, 17),
            Self::Bmi1 => (7, 0, Ebx, 3),
            Self::Avx2 => (7, 0, Ebx, 5),
            Self::Avx512 => (7, 0, Ebx, 16),
            Self::Adx => (7, 0, Ebx, 19),
            Self::Smap => (7, 0, Ebx, 20),
            Self::Clflushopt => (7, 0, Ebx, 23),
            Self::Clwb => (7, 0, Ebx, 24),
            Self::FiveLevels => (7, 0, Ecx, 16),
            Self::Movdir64b => (7, 0, Ecx, 28),
            Self::Xsaveopt => (0xd, 1, Eax, 0),
            Self::Xsavec => (0xd, 1, Eax, 1),
            Self::Xsaves => (0xd, 1, Eax, 3),
            Self::HugePages => (0x8000_0001, 0, Edx, 26),
            Self::Clzero => (0x8000_0008, 0, Ebx, 0),
        }
    }
}

/// The features of a processor.
pub struct Features<'a>(pub &'a [kvm_cpuid_entry2]);

impl Features<'_> {
    /// Whether it has this one.
    pub fn has(&self, feature: Feature) -> bool {
        let (function, index, output, bit) = feature.bit();
        let leaf = self.0.iter().find(|leaf| leaf.function == function && leaf.index == index);
        leaf.is_some_and(|leaf| {
            let value = match output {
                Output::Eax => leaf.eax,
                Output::Ebx => leaf.ebx,
                Output::Ecx => leaf.ecx,
                Output::Edx => leaf.edx,
            };
            value >> bit & 1 != 0
        })
    }

    /// The first of `needed` that is missing, in words.
    pub fn missing(&self, needed: &[Feature]) -> Option<String> {
        let missing = needed.iter().find(|feature| !self.has(**feature))?;
        let (function, ..) = missing.bit();
        Some(format!("this processor has no {missing:?} (CPUID leaf {function:#x})"))
    }
}
