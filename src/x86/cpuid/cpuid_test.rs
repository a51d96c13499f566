//! Fabricated hosts.

use super::*;

fn entry(function: u32, index: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
    let [eax, ebx, ecx, edx] = registers;
    let flags = if has_index(function) { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 };
    kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, ..Default::default() }
}

/// An AMD host with 40 address bits, SVM, and every paravirtual feature.
fn amd() -> Vec<kvm_cpuid_entry2> {
    vec![
        entry(0, 0, [0xd, 0x6874_7541, 0x444d_4163, 0x6974_6e65]),
        entry(1, 0, [0x0080_0f12, 0x0710_0800, 1 << 5 | 1 << 24 | 1 << 31, 1 << 9]),
        entry(7, 0, [0, 0, 1 << 7, 1 << 4]),
        entry(0xb, 0, [1, 2, 0x100, 7]),
        entry(0xd, 0, [7 | 3 << 17, 0x340, 0x340, 0]),
        entry(0xd, 1, [1, 0, 3 << 11, 0]),
        entry(0xd, 2, [256, 576, 0, 0]),
        entry(0xd, 11, [16, 0, 1, 0]),
        entry(0xd, 17, [64, 2752, 2, 0]),
        entry(0x4000_0000, 0, [0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d]),
        entry(0x4000_0001, 0, [0x0100_7efb, 0, 0, 0]),
        entry(0x8000_0000, 0, [0x8000_0021, 0x6874_7541, 0x444d_4163, 0x6974_6e65]),
        entry(0x8000_0001, 0, [0x0080_0f12, 0, 1 << 2 | 1 << 5, 1 << 29 | 1 << 22]),
        entry(0x8000_0005, 0, [1, 2, 3, 4]),
        entry(0x8000_0008, 0, [0x3028, 1 << 12, 0x7007, 0]),
        entry(0x8000_000a, 0, [1, 8, 0, 0]),
        entry(0x8000_001d, 0, [0x4121, 0, 0, 0]),
        entry(0x8000_001d, 3, [0x1c163, 0, 0, 0]),
        entry(0x8000_001d, 4, [0, 0, 0, 0]),
        entry(0x8000_001e, 0, [7, 7, 7, 0]),
        entry(0x8000_001f, 0, [1, 1, 1, 1]),
        entry(0x8000_0021, 0, [0, 0, 0, 0]),
    ]
}

/// An Intel host with VMX.
fn intel() -> Vec<kvm_cpuid_entry2> {
    vec![
        entry(0, 0, [0x1f, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]),
        entry(1, 0, [0x606a6, 0x0740_0800, 1 << 5, 0x0783_fbff]),
        entry(4, 0, [0xfc00_4121, 0, 0, 0]),
        entry(4, 3, [0xfc0f_c163, 0, 0, 0]),
        entry(7, 0, [0, 1 << 9, 0, 1 << 4 | 1 << 24]),
        entry(7, 1, [1 << 26 | 1 << 12, 0, 0, 0]),
        entry(0xd, 0, [7, 0x340, 0x340, 0]),
        entry(0x15, 0, [2, 9, 7, 0]),
        entry(0x1f, 0, [1, 2, 0x100, 7]),
        entry(0x1f, 1, [5, 9, 0x201, 7]),
        entry(0x4000_0000, 0, [0x4000_0001, 0, 0, 0]),
        entry(0x4000_0001, 0, [u32::MAX, 0, 0, 1]),
        entry(0x8000_0000, 0, [0x8000_0008, 0, 0, 0]),
        entry(0x8000_0001, 0, [0, 0, 0x121, 0x2c10_0800]),
        entry(0x8000_0008, 0, [0x302e, 0, 0, 0]),
    ]
}

fn config(vcpus: u32) -> CpuidConfig {
    CpuidConfig {
        vcpus,
        vendor: None,
        hypervisor: true,
        erms: true,
        mca: McaConfig::for_vendor(Vendor::Amd),
        tsc_khz: Some(2_994_375),
        tsc_deadline: true,
        invariant_tsc: None,
    }
}

fn leaf(list: &[kvm_cpuid_entry2], function: u32, index: u32) -> [u32; 4] {
    let found = list.iter().find(|entry| entry.function == function && entry.index == index);
    found.map_or([0; 4], |entry| [entry.eax, entry.ebx, entry.ecx, entry.edx])
}

fn holds(list: &[kvm_cpuid_entry2], function: u32) -> bool {
    list.iter().any(|entry| entry.function == function)
}

#[test]
fn amd_topology() {
    let list = guest_cpuid(&amd(), &config(4), 3);
    assert_eq!(leaf(&list, 0, 0)[0], 0xd);
    let one = leaf(&list, 1, 0);
    assert_eq!(one[1], 3 << 24 | 4 << 16 | 0x0800);
    assert_eq!(one[2], FEATURE_X2APIC | FEATURE_TSC_DEADLINE | FEATURE_HYPERVISOR, "and no VMX");
    assert_eq!(one[3], 1 << 28 | FEATURE_APIC | FEATURE_MCE | FEATURE_MCA);
    assert_eq!(leaf(&list, 0xb, 0), [0, 1, 0x100, 3]);
    assert_eq!(leaf(&list, 0xb, 1), [2, 4, 0x201, 3]);
    assert_eq!(leaf(&list, 0xb, 2), [0, 0, 2, 3]);
    assert!(!holds(&list, 0x1f));
    assert_eq!(leaf(&list, 0x8000_0008, 0), [0x3028, 1 << 12, 0x2003, 0]);
    assert_eq!(leaf(&list, 0x8000_001e, 0), [3, 3, 0, 0]);
    assert_eq!(leaf(&list, 0x8000_001d, 0)[0], 0x121, "a first-level cache for each");
    assert_eq!(leaf(&list, 0x8000_001d, 3)[0], 3 << 14 | 0x163, "one last-level cache for all");
    assert_eq!(leaf(&list, 0x8000_001d, 4)[0], 0);
    assert_eq!(leaf(&list, 0x8000_0001, 0)[2], 1 << 1 | 1 << 5 | 1 << 22, "no SVM");
    assert_eq!(physical_bits(&list), 40);
}

#[test]
fn a_single_processor_has_no_siblings() {
    let list = guest_cpuid(&amd(), &config(1), 0);
    assert_eq!(leaf(&list, 1, 0)[1] >> 16, 1);
    assert_eq!(leaf(&list, 1, 0)[3] & 1 << 28, 0);
    assert_eq!(leaf(&list, 0xb, 1), [0, 1, 0x201, 0]);
    assert_eq!(leaf(&list, 0x8000_0008, 0)[2], 0);
    assert_eq!(leaf(&list, 0x8000_0001, 0)[2] & 2, 0);
}

#[test]
fn apic_ids_differ_and_fit_their_bits() {
    for vcpus in [1, 2, 3, 4, 5, 17, 64] {
        let bits = leaf(&guest_cpuid(&amd(), &config(vcpus), 0), 0xb, 1)[0];
        for vcpu in 0..vcpus {
            let list = guest_cpuid(&amd(), &config(vcpus), vcpu);
            let ids = [leaf(&list, 1, 0)[1] >> 24, leaf(&list, 0xb, 0)[3], leaf(&list, 0x8000_001e, 0)[0]];
            assert_eq!(ids, [vcpu; 3]);
            assert_eq!(vcpu >> bits, 0, "one package");
        }
    }
}

#[test]
fn intel_topology_and_clock() {
    let config = CpuidConfig { mca: McaConfig::for_vendor(Vendor::Intel), ..config(2) };
    let list = guest_cpuid(&intel(), &config, 1);
    assert_eq!(leaf(&list, 4, 0)[0], 1 << 26 | 0x121);
    assert_eq!(leaf(&list, 4, 3)[0], 1 << 26 | 1 << 14 | 0x163);
    assert_eq!(leaf(&list, 0x1f, 1), leaf(&list, 0xb, 1));
    assert_eq!(leaf(&list, 0x15, 0), [1, 1, 2_994_375_000, 0]);
    assert_eq!(leaf(&list, 0x16, 0), [2994, 2994, 100, 0]);
    assert_eq!(leaf(&list, 7, 1)[0], 1 << 12, "no address masking");
    assert_eq!(leaf(&list, 7, 0)[3], 1 << 4, "no AMX");
    assert_eq!(leaf(&list, 0x8000_0001, 0)[3] & (FEATURE_MCE | FEATURE_MCA), 0);
    assert_eq!(leaf(&list, 0x8000_0007, 0)[1], 0);
    assert!(!holds(&list, 0x8000_001e));
}

#[test]
fn the_frequency_survives_32_bit_arithmetic() {
    for khz in [1_000_000, 2_000_123, 2_994_375, 4_294_967, 4_294_968, 5_700_000] {
        for deadline in [false, true] {
            let (denominator, numerator, hertz) = crystal(khz, deadline);
            let product = (hertz / 1000).checked_mul(numerator);
            if deadline {
                let told = product.map(|product| product / denominator);
                assert!(told.is_some_and(|told| told.abs_diff(khz) <= 1), "{khz}: {told:?}");
            } else {
                assert!(product.is_some());
                assert_eq!(hertz, 1_000_000_000, "the timer's own clock");
            }
        }
    }
}

#[test]
fn machine_checks_are_shown_as_the_banks_are() {
    let shown = |flavour, recovery| {
        let mca = McaConfig { flavour, recovery, lmce: false, cmci: false };
        leaf(&guest_cpuid(&amd(), &CpuidConfig { mca, ..config(1) }, 0), 0x8000_0007, 0)[1]
    };
    assert_eq!(shown(Flavour::Smca, true), 0xb);
    assert_eq!(shown(Flavour::Smca, false), 8);
    assert_eq!(shown(Flavour::AmdLegacy, true), 3);
    assert_eq!(shown(Flavour::AmdLegacy, false), 0);
}

#[test]
fn the_hypervisor_can_be_hidden() {
    let hidden = guest_cpuid(&amd(), &CpuidConfig { hypervisor: false, ..config(1) }, 0);
    assert_eq!(leaf(&hidden, 1, 0)[2] & FEATURE_HYPERVISOR, 0);
    assert!(!hidden.iter().any(|entry| entry.function >> 28 == 4));
    let shown = guest_cpuid(&amd(), &config(1), 0);
    assert_eq!(leaf(&shown, 0x4000_0000, 0), [0x4000_0010, 0x4b4d_564b, 0x564b_4d56, 0x4d]);
    assert_eq!(leaf(&shown, 0x4000_0001, 0), [1 << 3 | 1 << 24, 0, 0, 0]);
    assert_eq!(leaf(&shown, 0x4000_0010, 0), [2_994_375, 1_000_000, 0, 0]);
}

#[test]
fn what_the_host_lacks_is_not_offered() {
    let mut host = amd();
    host.retain(|entry| entry.function != 0x4000_0001);
    assert_eq!(leaf(&guest_cpuid(&host, &config(1), 0), 0x4000_0001, 0)[0], 0);
}

#[test]
fn fast_strings_on_and_off() {
    let on = leaf(&guest_cpuid(&amd(), &config(1), 0), 7, 0);
    assert_eq!((on[1] & FEATURE_ERMS, on[3] & FEATURE_FSRM), (FEATURE_ERMS, FEATURE_FSRM));
    let off = guest_cpuid(&intel(), &CpuidConfig { erms: false, ..config(1) }, 0);
    assert_eq!((leaf(&off, 7, 0)[1], leaf(&off, 7, 0)[3], leaf(&off, 7, 1)[0]), (0, 0, 0));
}

#[test]
fn what_the_operand_model_cannot_follow_is_hidden() {
    let list = guest_cpuid(&amd(), &config(1), 0);
    assert_eq!(leaf(&list, 7, 0)[2], 0, "shadow stacks");
    assert_eq!(leaf(&list, 0xd, 0)[0], 7);
    assert_eq!(leaf(&list, 0xd, 1)[2], 0);
    assert_eq!(list.iter().filter(|entry| entry.function == 0xd).map(|entry| entry.index).max(), Some(2));
    assert!(!holds(&list, 0x8000_000a) && !holds(&list, 0x8000_001f));
}

#[test]
fn an_intel_guest_on_an_amd_host() {
    let config =
        CpuidConfig { vendor: Some(Vendor::Intel), mca: McaConfig::for_vendor(Vendor::Intel), ..config(2) };
    let list = guest_cpuid(&amd(), &config, 1);
    assert_eq!(Vendor::of(&list), Vendor::Intel);
    assert_eq!(leaf(&list, 1, 0)[0], 0x606a6);
    assert_eq!(leaf(&list, 0x8000_0000, 0), [0x8000_0008, 0, 0, 0]);
    assert_eq!(leaf(&list, 4, 3)[0], 1 << 26 | 1 << 14 | 0x163, "the caches, under Intel's leaf");
    assert!(list.iter().all(|entry| entry.function <= 0x8000_0008));
    assert_eq!(leaf(&list, 0x8000_0001, 0)[3], 1 << 29);
    assert_eq!(leaf(&list, 0, 0)[0], 0x1f);
    assert!(holds(&list, 0x15));
}

#[test]
fn an_amd_guest_on_an_intel_host() {
    let list = guest_cpuid(&intel(), &CpuidConfig { vendor: Some(Vendor::Amd), ..config(2) }, 1);
    assert_eq!(Vendor::of(&list), Vendor::Amd);
    assert_eq!(leaf(&list, 0x8000_0000, 0), [0x8000_001e, 0x6874_7541, 0x444d_4163, 0x6974_6e65]);
    assert!(!holds(&list, 4) && !holds(&list, 0x15) && !holds(&list, 0x1f));
    assert_eq!(leaf(&list, 0x8000_001d, 3)[0], 1 << 14 | 0x163);
    assert_eq!(leaf(&list, 0x8000_0001, 0)[3] & 0x3ff, 0x3ff & 0x0183_f3ff);
    assert_eq!(leaf(&list, 0x8000_0007, 0)[1], 0xb);
}

#[test]
fn the_invariant_counter_follows_the_host_unless_asked() {
    assert_eq!(leaf(&guest_cpuid(&amd(), &config(1), 0), 0x8000_0007, 0)[3], 0);
    let asked = CpuidConfig { invariant_tsc: Some(true), ..config(1) };
    assert_eq!(leaf(&guest_cpuid(&amd(), &asked, 0), 0x8000_0007, 0)[3], 1 << 8);
}

#[test]
fn an_empty_list_is_no_trap() {
    for vcpus in [0, 1, u32::MAX >> 1] {
        let list = guest_cpuid(&[], &config(vcpus), 0);
        assert_eq!(physical_bits(&list), 36);
    }
}

#[test]
fn no_leaf_is_there_twice() {
    for host in [amd(), intel()] {
        for vendor in [None, Some(Vendor::Amd), Some(Vendor::Intel)] {
            let list = guest_cpuid(&host, &CpuidConfig { vendor, ..config(2) }, 0);
            let keys: Vec<_> = list.iter().map(|entry| (entry.function, entry.index)).collect();
            assert!(keys.is_sorted_by(|a, b| a < b));
        }
    }
}
