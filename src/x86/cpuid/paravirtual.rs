//! The leaves of the hypervisor: KVM's signature and clock, and nothing that writes guest memory behind the guard.

use super::{CpuidConfig, Table};

/// KVM_FEATURE_CLOCKSOURCE2 (the MSRs of kvmclock) and KVM_FEATURE_CLOCKSOURCE_STABLE_BIT.
///
/// Not offered: asynchronous page faults, steal time and PV EOI, which write into guest memory where poison must
/// trap; and those that use hypercalls, which KVM patches into read-only kernel text when the guest's vendor is not
/// the host's.
const OFFERED: u32 = 1 << 3 | 1 << 24;
/// KVM's local APIC timer counts nanoseconds.
const APIC_KHZ: u32 = 1_000_000;

/// Keeps the signature and the offered features, or takes everything away when the hypervisor is hidden.
pub(super) fn describe(table: &mut Table, config: &CpuidConfig) {
    const LEAVES: std::ops::Range<u32> = 0x4000_0000..0x5000_0000;
    if !config.hypervisor {
        table.remove(|entry| LEAVES.contains(&entry.function));
        return;
    }
    table.remove(|entry| LEAVES.contains(&entry.function) && entry.function > 0x4000_0001);
    let signature = table.get_or_add(0x4000_0000, 0);
    // "KVMKVMKVM\0\0\0"
    (signature.eax, signature.ebx, signature.ecx, signature.edx) =
        (0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d);
    let features = table.get_or_add(0x4000_0001, 0);
    features.eax &= OFFERED;
    (features.ebx, features.ecx, features.edx) = (0, 0, 0);
    // The frequencies, as VMware's leaf gives them; Linux reads it under other signatures only.
    if let Some(khz) = config.tsc_khz {
        let leaf = table.get_or_add(0x4000_0010, 0);
        (leaf.eax, leaf.ebx) = (khz, APIC_KHZ);
    }
}
