//! One package whose cores are the vCPUs, one thread each; the last-level cache is shared by all of them.
//!
//! Linux reads leaves 4, 0xB and 0x1F on Intel (arch/x86/kernel/cpu/topology_ext.c), and 0x80000008, 0xB and
//! 0x8000001E on AMD (topology_amd.c); all must agree with the APIC ids in the MADT.

use super::{Table, Vendor};

/// Leaf 1 EDX: the package may hold several logical processors.
const FEATURE_HTT: u32 = 1 << 28;
/// Leaf 0x80000001 ECX: several cores, and the topology leaves from 0x8000001D on.
const FEATURE_CMP_LEGACY: u32 = 1 << 1;
const FEATURE_TOPOLOGY: u32 = 1 << 22;
/// Level types of leaves 0xB and 0x1F.
const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// Writes the topology for one vCPU.
pub(super) fn describe(table: &mut Table, vcpus: u32, vcpu: u32, vendor: Vendor) {
    let vcpus = vcpus.max(1);
    let id_bits = vcpus.next_power_of_two().trailing_zeros();
    if let Some(leaf) = table.get(1, 0) {
        let logical = if vcpus > 1 { (1u32 << id_bits).min(255) } else { 1 };
        leaf.ebx = leaf.ebx & 0xffff | logical << 16 | (vcpu & 0xff) << 24;
        leaf.edx = leaf.edx & !FEATURE_HTT | if vcpus > 1 { FEATURE_HTT } else { 0 };
    }
    levels(table, 0xb, vcpus, id_bits, vcpu);
    table.remove(|entry| matches!(entry.function, 0x1f | 0x8000_0026));
    match vendor {
        Vendor::Intel => {
            levels(table, 0x1f, vcpus, id_bits, vcpu);
            caches(table, 4, vcpus, Some((1u32 << id_bits) - 1));
        }
        Vendor::Amd => {
            caches(table, 0x8000_001d, vcpus, None);
            amd(table, vcpus, id_bits, vcpu);
        }
    }
}

/// Leaves 0xB and 0x1F: a thread level of one, a core level of all.
fn levels(table: &mut Table, function: u32, vcpus: u32, id_bits: u32, vcpu: u32) {
    table.remove(|entry| entry.function == function);
    let levels = [(0, 1, LEVEL_THREAD), (id_bits, vcpus, LEVEL_CORE), (0, 0, 0)];
    for (index, (shift, processors, level)) in (0..).zip(levels) {
        let leaf = table.get_or_add(function, index);
        (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (shift, processors, index | level << 8, vcpu);
    }
}

/// Leaves 4 and 0x8000001D: who shares each cache, and on Intel how many core ids a package has.
fn caches(table: &mut Table, function: u32, vcpus: u32, core_ids: Option<u32>) {
    for leaf in table.entries.iter_mut().filter(|entry| entry.function == function && entry.eax & 0x1f != 0) {
        let level = leaf.eax >> 5 & 7;
        let sharing = if level >= 3 { (vcpus - 1).min(0xfff) } else { 0 };
        leaf.eax = leaf.eax & 0x3fff | sharing << 14 | core_ids.unwrap_or(0).min(63) << 26;
    }
}

fn amd(table: &mut Table, vcpus: u32, id_bits: u32, vcpu: u32) {
    if let Some(leaf) = table.get(0x8000_0001, 0) {
        leaf.ecx &= !FEATURE_CMP_LEGACY;
        if vcpus > 1 {
            leaf.ecx |= FEATURE_CMP_LEGACY;
        }
        leaf.ecx |= FEATURE_TOPOLOGY;
    }
    if let Some(leaf) = table.get(0x8000_0008, 0) {
        leaf.ecx = leaf.ecx & !0xf0ff | (vcpus - 1).min(255) | id_bits << 12;
    }
    let leaf = table.get_or_add(0x8000_001e, 0);
    // Extended APIC id; core id with one thread a core; node 0 of one.
    (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (vcpu, vcpu & 0xff, 0, 0);
}
