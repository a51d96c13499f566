//! The CPUID of the guest: what KVM supports, with the machine's own topology, clocks and machine checks.
//!
//! Sources: Intel SDM volume 2, CPUID; AMD APM volume 3, appendix E; Linux Documentation/virt/kvm/api.rst
//! (KVM_GET_SUPPORTED_CPUID) and Documentation/virt/kvm/x86/cpuid.rst.

mod paravirtual;
mod topology;
mod vendor;

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use super::mca::{Flavour, McaConfig};
pub use vendor::Vendor;

/// What the machine asks of its processors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuidConfig {
    /// Number of vCPUs: cores of one package, one thread each. The APIC id of a vCPU is its index.
    pub vcpus: u32,
    /// The vendor that the guest sees; `None` keeps the host's.
    pub vendor: Option<Vendor>,
    /// Show the hypervisor bit and KVM's leaves. Linux commits no CXL region when it is shown.
    pub hypervisor: bool,
    /// Show fast string instructions. Without them Linux copies from persistent memory in a way that cannot recover
    /// from poison (arch/x86/lib/copy_mc.c, copy_mc_to_kernel).
    pub erms: bool,
    /// The machine-check architecture that the monitor implements.
    pub mca: McaConfig,
    /// Frequency of the guest's time-stamp counter in kHz (KVM_GET_TSC_KHZ), for the leaves that tell it.
    pub tsc_khz: Option<u32>,
    /// The local APIC timer has the deadline mode (KVM_CAP_TSC_DEADLINE_TIMER: KVM does not list it in CPUID).
    pub tsc_deadline: bool,
    /// Show that the counter runs at one rate in all states; `None` says what the host says.
    pub invariant_tsc: Option<bool>,
}

/// Leaf 1 EBX, ECX and EDX.
const FEATURE_VMX: u32 = 1 << 5;
const FEATURE_X2APIC: u32 = 1 << 21;
const FEATURE_TSC_DEADLINE: u32 = 1 << 24;
const FEATURE_HYPERVISOR: u32 = 1 << 31;
const FEATURE_MCE: u32 = 1 << 7;
const FEATURE_APIC: u32 = 1 << 9;
const FEATURE_MCA: u32 = 1 << 14;
/// Leaf 7.
const FEATURE_ERMS: u32 = 1 << 9;
const FEATURE_FSRM: u32 = 1 << 4;
const FEATURE_SHADOW_STACK: u32 = 1 << 7;
const FEATURE_AMX: u32 = 1 << 22 | 1 << 24 | 1 << 25;
const FEATURE_FAST_STRINGS_SUBLEAF_1: u32 = 1 << 10 | 1 << 11 | 1 << 12;
const FEATURE_LAM: u32 = 1 << 26;
/// Leaf 0x80000001 ECX: secure virtual machine.
const FEATURE_SVM: u32 = 1 << 2;
/// State components of AMX (XCR0) and of shadow stacks (IA32_XSS).
const XSTATE_AMX: u32 = 1 << 17 | 1 << 18;
const XSTATE_SHADOW_STACK: u32 = 1 << 11 | 1 << 12;
/// Leaf 0x80000007 EBX: recovery after overflow, containment of uncorrected errors, scalable MCA.
const OVERFLOW_RECOVERY: u32 = 1 << 0;
const SUCCOR: u32 = 1 << 1;
const SMCA: u32 = 1 << 3;
/// Leaf 0x80000007 EDX.
const INVARIANT_TSC: u32 = 1 << 8;

/// The CPUID of one vCPU, from the list that KVM_GET_SUPPORTED_CPUID gave.
///
/// Left out of what the host offers: virtualisation inside the guest, and what [`super::operands`] cannot follow
/// (shadow stacks, AMX, linear-address masking).
pub fn guest_cpuid(supported: &[kvm_cpuid_entry2], config: &CpuidConfig, vcpu: u32) -> Vec<kvm_cpuid_entry2> {
    let mut table = Table { entries: supported.to_vec() };
    let host = Vendor::of(supported);
    let guest = config.vendor.unwrap_or(host);
    if guest != host {
        vendor::disguise(&mut table, guest);
    }
    features(&mut table, config);
    machine_checks(&mut table, config, guest);
    topology::describe(&mut table, config.vcpus, vcpu, guest);
    clocks(&mut table, config, guest);
    paravirtual::describe(&mut table, config);
    table.finish()
}

/// Physical address bits in a list (leaf 0x80000008 EAX bits 7:0); 36 where the leaf is missing, as the SDM says.
pub fn physical_bits(entries: &[kvm_cpuid_entry2]) -> u8 {
    match entries.iter().find(|entry| entry.function == 0x8000_0008) {
        Some(entry) if entry.eax & 0xff != 0 => entry.eax as u8,
        _ => 36,
    }
}

fn features(table: &mut Table, config: &CpuidConfig) {
    if let Some(leaf) = table.get(1, 0) {
        leaf.ecx &= !(FEATURE_VMX | FEATURE_HYPERVISOR | FEATURE_TSC_DEADLINE);
        leaf.ecx |= FEATURE_X2APIC;
        if config.hypervisor {
            leaf.ecx |= FEATURE_HYPERVISOR;
        }
        if config.tsc_deadline {
            leaf.ecx |= FEATURE_TSC_DEADLINE;
        }
        leaf.edx |= FEATURE_APIC;
    }
    if let Some(leaf) = table.get(7, 0) {
        if config.erms {
            leaf.ebx |= FEATURE_ERMS;
        } else {
            leaf.ebx &= !FEATURE_ERMS;
            leaf.edx &= !FEATURE_FSRM;
        }
        leaf.ecx &= !FEATURE_SHADOW_STACK;
        leaf.edx &= !FEATURE_AMX;
    }
    if let Some(leaf) = table.get(7, 1) {
        leaf.eax &= !FEATURE_LAM;
        if !config.erms {
            leaf.eax &= !FEATURE_FAST_STRINGS_SUBLEAF_1;
        }
    }
    if let Some(leaf) = table.get(0x8000_0001, 0) {
        leaf.ecx &= !FEATURE_SVM;
    }
    if let Some(leaf) = table.get(0xd, 0) {
        leaf.eax &= !XSTATE_AMX;
    }
    if let Some(leaf) = table.get(0xd, 1) {
        leaf.ecx &= !XSTATE_SHADOW_STACK;
    }
    table.remove(|entry| match entry.function {
        0xd => matches!(entry.index, 11 | 12 | 17 | 18),
        // AMX tiles; SVM; encrypted memory.
        0x1d | 0x1e | 0x8000_000a | 0x8000_001f => true,
        _ => false,
    });
}

fn machine_checks(table: &mut Table, config: &CpuidConfig, guest: Vendor) {
    // Intel reserves these bits of the extended leaf.
    let leaves: &[u32] = if guest == Vendor::Amd { &[1, 0x8000_0001] } else { &[1] };
    for &function in leaves {
        if let Some(leaf) = table.get(function, 0) {
            leaf.edx |= FEATURE_MCE | FEATURE_MCA;
        }
    }
    let shown = match (config.mca.flavour, config.mca.recovery) {
        (Flavour::Smca, true) => OVERFLOW_RECOVERY | SUCCOR | SMCA,
        (Flavour::Smca, false) => SMCA,
        (Flavour::AmdLegacy, true) => OVERFLOW_RECOVERY | SUCCOR,
        (Flavour::AmdLegacy, false) | (Flavour::Intel, _) => 0,
    };
    let leaf = table.get_or_add(0x8000_0007, 0);
    leaf.ebx = leaf.ebx & !(OVERFLOW_RECOVERY | SUCCOR | SMCA) | shown;
}

/// Leaves 0x15 and 0x16 tell Intel guests the frequency of the counter; Linux reads them for that vendor only
/// (arch/x86/kernel/tsc.c, native_calibrate_tsc). An AMD guest without kvmclock calibrates against a timer.
fn clocks(table: &mut Table, config: &CpuidConfig, guest: Vendor) {
    if let Some(invariant) = config.invariant_tsc {
        let leaf = table.get_or_add(0x8000_0007, 0);
        leaf.edx = leaf.edx & !INVARIANT_TSC | if invariant { INVARIANT_TSC } else { 0 };
    }
    table.remove(|entry| matches!(entry.function, 0x15 | 0x16));
    let Some(khz) = config.tsc_khz.filter(|&khz| khz != 0 && guest == Vendor::Intel) else { return };
    let megahertz = khz / 1000;
    let (denominator, numerator, crystal) = crystal(khz, config.tsc_deadline);
    let leaf = table.get_or_add(0x15, 0);
    (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (denominator, numerator, crystal, 0);
    let leaf = table.get_or_add(0x16, 0);
    (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (megahertz, megahertz, 100, 0);
}

/// Denominator, numerator and crystal frequency in Hz.
///
/// Linux takes the crystal for the local APIC timer's clock too, which in KVM runs at 1 GHz, unless that timer has
/// the deadline mode. Its product of kHz and numerator has 32 bits.
fn crystal(khz: u32, tsc_deadline: bool) -> (u32, u32, u32) {
    const APIC_BUS_KHZ: u32 = 1_000_000;
    if tsc_deadline {
        match khz.checked_mul(1000) {
            Some(hertz) => (1, 1, hertz),
            None => (1, 2, khz / 2 * 1000),
        }
    } else {
        let numerator = ((u64::from(khz) + 500) / 1000).min(u64::from(u32::MAX / APIC_BUS_KHZ)) as u32;
        (1000, numerator.max(1), APIC_BUS_KHZ * 1000)
    }
}

/// A list of leaves being changed.
struct Table {
    entries: Vec<kvm_cpuid_entry2>,
}

impl Table {
    fn get(&mut self, function: u32, index: u32) -> Option<&mut kvm_cpuid_entry2> {
        self.entries.iter_mut().find(|entry| entry.function == function && entry.index == index)
    }

    fn get_or_add(&mut self, function: u32, index: u32) -> &mut kvm_cpuid_entry2 {
        let found = self.entries.iter().position(|entry| entry.function == function && entry.index == index);
        let position = found.unwrap_or_else(|| {
            let flags = if has_index(function) { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 };
            self.entries.push(kvm_cpuid_entry2 { function, index, flags, ..Default::default() });
            self.entries.len() - 1
        });
        &mut self.entries[position]
    }

    fn remove(&mut self, mut unwanted: impl FnMut(&kvm_cpuid_entry2) -> bool) {
        self.entries.retain(|entry| !unwanted(entry));
    }

    /// Raises the highest leaf of each range to what the list holds, and sorts it.
    fn finish(mut self) -> Vec<kvm_cpuid_entry2> {
        for base in [0, 0x4000_0000, 0x8000_0000u32] {
            let range = base..base + 0x1000_0000;
            let highest =
                self.entries.iter().map(|entry| entry.function).filter(|leaf| range.contains(leaf)).max();
            if let (Some(highest), Some(leaf)) = (highest, self.get(base, 0)) {
                leaf.eax = leaf.eax.max(highest);
            }
        }
        self.entries.sort_by_key(|entry| (entry.function, entry.index));
        self.entries
    }
}

/// Whether the leaf has sub-leaves chosen by ECX.
fn has_index(function: u32) -> bool {
    matches!(function, 4 | 7 | 0xb | 0xd | 0x1f | 0x8000_001d | 0x8000_0026)
}

#[cfg(test)]
#[path = "cpuid_test.rs"]
mod tests;
