//! The vendor, and a guest that sees another one than the host's.

use kvm_bindings::kvm_cpuid_entry2;
use serde::{Deserialize, Serialize};

use super::Table;

/// Whose processor it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Vendor {
    /// AuthenticAMD, and HygonGenuine, which has the same machine checks.
    Amd,
    /// GenuineIntel, and all others.
    Intel,
}

/// EBX, EDX and ECX of leaf 0, in the order of the text.
const AUTHENTIC_AMD: [u32; 3] = [0x6874_7541, 0x6974_6e65, 0x444d_4163];
const HYGON_GENUINE: [u32; 3] = [0x6f67_7948, 0x6e65_476e, 0x656e_6975];
const GENUINE_INTEL: [u32; 3] = [0x756e_6547, 0x4965_6e69, 0x6c65_746e];

/// Ice Lake server. Not Skylake: Linux's skx_repmov quirk can swallow a local machine check
/// (arch/x86/kernel/cpu/mce/core.c, quirk_skylake_repmov).
const INTEL_SIGNATURE: u32 = 0x0006_06a6;
/// Zen, family 0x17 model 1: the first with scalable MCA.
const AMD_SIGNATURE: u32 = 0x0080_0f12;
/// Leaf 1 EDX bits that AMD repeats in leaf 0x80000001.
const REPEATED_BY_AMD: u32 = 0x0183_f3ff;
/// Leaf 0x80000001 of Intel: LAHF, LZCNT, PREFETCHW; SYSCALL, NX, 1 GiB pages, RDTSCP, long mode.
const INTEL_EXTENDED_ECX: u32 = 1 << 0 | 1 << 5 | 1 << 8;
const INTEL_EXTENDED_EDX: u32 = 1 << 11 | 1 << 20 | 1 << 26 | 1 << 27 | 1 << 29;

impl Vendor {
    /// The vendor in a list of leaves.
    pub fn of(entries: &[kvm_cpuid_entry2]) -> Self {
        let name =
            entries.iter().find(|entry| entry.function == 0).map(|leaf| [leaf.ebx, leaf.edx, leaf.ecx]);
        match name {
            Some(AUTHENTIC_AMD | HYGON_GENUINE) => Self::Amd,
            _ => Self::Intel,
        }
    }
}

/// Makes the list that of the other vendor: name, model, and the leaves that only one of them has.
pub(super) fn disguise(table: &mut Table, guest: Vendor) {
    let name = match guest {
        Vendor::Amd => AUTHENTIC_AMD,
        Vendor::Intel => GENUINE_INTEL,
    };
    for function in [0, 0x8000_0000] {
        if let Some(leaf) = table.get(function, 0) {
            [leaf.ebx, leaf.edx, leaf.ecx] =
                if function == 0 || guest == Vendor::Amd { name } else { [0; 3] };
        }
    }
    match guest {
        Vendor::Intel => intel(table),
        Vendor::Amd => amd(table),
    }
}

fn intel(table: &mut Table) {
    if let Some(leaf) = table.get(1, 0) {
        leaf.eax = INTEL_SIGNATURE;
    }
    if let Some(leaf) = table.get(0x8000_0001, 0) {
        leaf.eax = 0;
        leaf.ebx = 0;
        leaf.ecx &= INTEL_EXTENDED_ECX;
        leaf.edx &= INTEL_EXTENDED_EDX;
    }
    if let Some(leaf) = table.get(0x8000_0008, 0) {
        leaf.ecx = 0;
    }
    // AMD took the format of leaf 4 over for its own.
    copy_caches(table, 0x8000_001d, 4);
    table.remove(|entry| matches!(entry.function, 0x8000_0005 | 0x8000_0009..=0x8fff_ffff));
    if let Some(leaf) = table.get(0x8000_0000, 0) {
        leaf.eax = 0x8000_0008;
    }
}

fn amd(table: &mut Table) {
    let mut repeated = 0;
    if let Some(leaf) = table.get(1, 0) {
        leaf.eax = AMD_SIGNATURE;
        repeated = leaf.edx & REPEATED_BY_AMD;
    }
    if let Some(leaf) = table.get(0x8000_0001, 0) {
        leaf.eax = AMD_SIGNATURE;
        leaf.edx |= repeated;
    }
    copy_caches(table, 4, 0x8000_001d);
    table.remove(|entry| matches!(entry.function, 2 | 4 | 9 | 0xa | 0x12 | 0x14..=0x1f));
    if let Some(leaf) = table.get(0, 0) {
        leaf.eax = 0xd;
    }
}

/// Copies the cache leaves from one vendor's function to the other's.
fn copy_caches(table: &mut Table, from: u32, to: u32) {
    table.remove(|entry| entry.function == to);
    let copies: Vec<_> = table
        .entries
        .iter()
        .filter(|entry| entry.function == from)
        .map(|entry| kvm_cpuid_entry2 { function: to, ..*entry })
        .collect();
    table.entries.extend(copies);
}
