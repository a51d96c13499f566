//! Fixed guest-physical addresses and interrupt lines of a machine.
//!
//! Everything that does not depend on the amount of RAM or on the guest's address width has one address on
//! every machine, so that AML, boot code and device models agree without asking each other. What does depend
//! on them (RAM above 4 GiB, pmem slots, the 64-bit PCI window) is computed by the monitor and handed to
//! [`crate::Tables::build`] in a [`crate::Description`].
//!
//! All addresses and sizes are in bytes.

use crate::platform::hotplug;

/// GDT of the boot processor at the 64-bit entry point.
pub const BOOT_GDT: u64 = 0x6000;
/// Linux `boot_params` (the "zero page", Documentation/arch/x86/zero-page.rst).
pub const BOOT_PARAMS: u64 = 0x7000;
/// First of the page tables of the boot processor at the 64-bit entry point.
pub const BOOT_PAGE_TABLES: u64 = 0x9000;
/// Kernel command line, NUL-terminated.
pub const COMMAND_LINE: u64 = 0x2_0000;

/// RSDP. Inside 0xE0000..0x100000, where an OS without other advice searches (ACPI 6.5, 5.2.5.1).
pub const RSDP_BASE: u64 = 0xE_0000;
/// Size of the range reserved for the RSDP.
pub const RSDP_RESERVED: u64 = 0x1_0000;

/// ACPI tables other than the RSDP (e820 type 3, ACPI reclaimable).
pub const TABLES_BASE: u64 = 0x10_0000;
/// Room for the tables.
pub const TABLES_SIZE: u64 = MAILBOX_BASE - TABLES_BASE;
/// Mailboxes between AML and the NVDIMM models (guest RAM, e820 type 4, ACPI NVS), one per unit.
pub const MAILBOX_BASE: u64 = 0x18_0000;
/// Size of one mailbox; its inside is [`crate::platform::mailbox`].
pub const MAILBOX_SIZE: u64 = 0x2000;
/// NFIT units a machine can have. A unit is a container with its own NVDIMM root device and its DIMMs.
pub const MAX_UNITS: u32 = 64;
/// DIMMs that a unit can have.
pub const MAX_DIMMS: u32 = 32;
/// Memory that firmware shares with the guest's error handling (ACPI 6.5, chapter 18; guest RAM), behind the
/// mailboxes: up to [`EINJ_BASE`] e820 type 4, ACPI NVS, from there on type 2, reserved.
pub const APEI_BASE: u64 = MAILBOX_BASE + MAX_UNITS as u64 * MAILBOX_SIZE;
/// Size of the memory for error handling. What no constant names is kept free.
pub const APEI_SIZE: u64 = 0x10_0000;
/// Status blocks of the generic hardware error sources, with their addresses.
pub const GHES_BASE: u64 = APEI_BASE;
/// Size of the range for generic hardware error sources.
pub const GHES_SIZE: u64 = 0x2_0000;
/// Boot error region, which BERT names.
pub const BERT_BASE: u64 = GHES_BASE + GHES_SIZE;
/// Size of the boot error region.
pub const BERT_SIZE: u64 = 0x2_0000;
/// Trigger table and parameters of error injection, which EINJ names.
///
/// From here on the memory is reserved and not ACPI NVS: the drivers of EINJ and ERST claim theirs for themselves
/// (`request_mem_region` in drivers/acpi/apei), and Linux marks NVS busy (`do_mark_busy` in arch/x86/kernel/e820.c).
pub const EINJ_BASE: u64 = BERT_BASE + BERT_SIZE;
/// Size of the range for error injection.
pub const EINJ_SIZE: u64 = 0x1_0000;
/// Error log address range, through which records go to and from the store that ERST describes.
pub const ERST_BASE: u64 = APEI_BASE + 0x8_0000;
/// Size of the error log address range.
pub const ERST_SIZE: u64 = 0x4_0000;
/// First address behind tables, mailboxes and memory for error handling.
pub const ACPI_END: u64 = APEI_BASE + APEI_SIZE;

/// Lowest address at which a kernel is loaded.
pub const KERNEL_MIN: u64 = 0x100_0000;
/// RAM below 4 GiB ends here at the latest.
pub const LOW_RAM_END: u64 = 0xC000_0000;
/// RAM that does not fit below [`LOW_RAM_END`] continues here.
pub const HIGH_RAM_BASE: u64 = 0x1_0000_0000;

/// PCI Express enhanced configuration space, segment 0, buses 0 to 255.
pub const ECAM_BASE: u64 = 0xC000_0000;
/// Size of the enhanced configuration space: 256 buses of 1 MiB.
pub const ECAM_SIZE: u64 = 0x1000_0000;
/// 32-bit PCI memory window.
pub const PCI_MMIO32_BASE: u64 = 0xD000_0000;
/// Size of the 32-bit PCI memory window, which ends where [`PLATFORM_BASE`] begins.
pub const PCI_MMIO32_SIZE: u64 = PLATFORM_BASE - PCI_MMIO32_BASE;

/// Platform registers ([`crate::platform`]): a page for ACPI, with events, sleep and reset, and one for pvpanic.
pub const PLATFORM_BASE: u64 = 0xFE80_0000;
/// Size of the platform registers.
pub const PLATFORM_SIZE: u64 = 0x2000;
/// Registers of NFIT unit 0; unit u is [`UNIT_SIZE`] times u further.
pub const UNIT_BASE: u64 = 0xFE81_0000;
/// Distance between the registers of two units.
pub const UNIT_SIZE: u64 = 0x40;
/// Registers of host bridge 0; bridge b is [`hotplug::SIZE`] times b further.
pub const HOST_BRIDGE_BASE: u64 = 0xFE82_0000;
/// Host bridges that may come and go, besides the one that is always there.
pub const MAX_HOST_BRIDGES: u32 = 16;
/// Bytes of the memory window of such a bridge, which is for the registers of one function.
pub const HOST_BRIDGE_WINDOW: u64 = 0x10_0000;
/// Registers of error injection (EINJ), one page.
pub const EINJ_REGISTERS: u64 = 0xFE83_0000;
/// Registers of the error record store (ERST), one page.
pub const ERST_REGISTERS: u64 = 0xFE83_1000;
/// Acknowledgement registers of the generic hardware error sources (HEST), one page.
pub const GHES_REGISTERS: u64 = 0xFE83_2000;
/// Size of each of the three.
pub const APEI_REGISTERS_SIZE: u64 = 0x1000;
/// Flush hint page of unit 0; unit u is [`FLUSH_SIZE`] times u further.
pub const FLUSH_BASE: u64 = 0xFE90_0000;
/// One page per unit: Linux maps the whole page of a flush hint (nd_region `nvdimm_map_flush`).
pub const FLUSH_SIZE: u64 = 0x1000;
/// Distance between the flush hint addresses of two DIMMs of a unit.
pub const FLUSH_HINT_STEP: u64 = 64;
const _: () = assert!(FLUSH_HINT_STEP * MAX_DIMMS as u64 <= FLUSH_SIZE);
/// End of the range of platform registers, units and flush hints, exclusive.
pub const PLATFORM_END: u64 = 0xFEC0_0000;

/// I/O APIC registers.
pub const IOAPIC_BASE: u64 = 0xFEC0_0000;
/// Size of the I/O APIC's register page.
pub const IOAPIC_SIZE: u64 = 0x1000;
/// Local APIC registers (and, as an address, the MSI doorbell).
pub const LAPIC_BASE: u64 = 0xFEE0_0000;
/// Size of the local APIC's register page.
pub const LAPIC_SIZE: u64 = 0x1000;

/// I/O port of the 16550 serial line, 8 ports.
pub const SERIAL_PORT: u16 = 0x3F8;
/// I/O port of the RTC: index, and data at the next port.
pub const RTC_PORT: u16 = 0x70;
/// I/O port of the ACPI PM timer, 4 ports, on machines that have one.
pub const PM_TIMER_PORT: u16 = 0x608;
/// PCI configuration mechanism #1, address and data, 8 ports.
pub const PCI_CONFIG_PORT: u16 = 0xCF8;

/// Interrupt line of the serial port (edge, ISA).
pub const SERIAL_GSI: u32 = 4;
/// Interrupt line of the generic event device (edge, active high).
pub const GED_GSI: u32 = 9;

/// Mailbox of a unit. `unit` is below [`MAX_UNITS`].
pub const fn mailbox_base(unit: u32) -> u64 {
    MAILBOX_BASE + unit as u64 * MAILBOX_SIZE
}

/// Registers of a unit ([`hotplug`]). `unit` is below [`MAX_UNITS`].
pub const fn unit_base(unit: u32) -> u64 {
    UNIT_BASE + unit as u64 * UNIT_SIZE
}

/// Registers of a host bridge ([`hotplug`]). `bridge` is below [`MAX_HOST_BRIDGES`].
pub const fn host_bridge_base(bridge: u32) -> u64 {
    HOST_BRIDGE_BASE + bridge as u64 * hotplug::SIZE
}

/// The root bus of a host bridge that may come and go: the last ones. `bridge` is below [`MAX_HOST_BRIDGES`].
pub const fn host_bridge_bus(bridge: u32) -> u8 {
    u8::MAX - bridge as u8
}

/// Flush hint page of a unit. `unit` is below [`MAX_UNITS`].
pub const fn flush_base(unit: u32) -> u64 {
    FLUSH_BASE + unit as u64 * FLUSH_SIZE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_sorted_and_disjoint() {
        let ranges = [
            (RSDP_BASE, RSDP_RESERVED),
            (TABLES_BASE, TABLES_SIZE),
            (MAILBOX_BASE, MAILBOX_SIZE * u64::from(MAX_UNITS)),
            (GHES_BASE, GHES_SIZE),
            (BERT_BASE, BERT_SIZE),
            (EINJ_BASE, EINJ_SIZE),
            (ERST_BASE, ERST_SIZE),
            (KERNEL_MIN, LOW_RAM_END - KERNEL_MIN),
            (ECAM_BASE, ECAM_SIZE),
            (PCI_MMIO32_BASE, PCI_MMIO32_SIZE),
            (PLATFORM_BASE, PLATFORM_SIZE),
            (UNIT_BASE, UNIT_SIZE * u64::from(MAX_UNITS)),
            (HOST_BRIDGE_BASE, hotplug::SIZE * u64::from(MAX_HOST_BRIDGES)),
            (EINJ_REGISTERS, APEI_REGISTERS_SIZE),
            (ERST_REGISTERS, APEI_REGISTERS_SIZE),
            (GHES_REGISTERS, APEI_REGISTERS_SIZE),
            (FLUSH_BASE, FLUSH_SIZE * u64::from(MAX_UNITS)),
            (IOAPIC_BASE, IOAPIC_SIZE),
            (LAPIC_BASE, LAPIC_SIZE),
        ];
        for pair in ranges.windows(2) {
            assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{:#x?}", pair);
        }
        assert_eq!((APEI_BASE, ACPI_END), (0x20_0000, 0x30_0000));
        const { assert!(ERST_BASE + ERST_SIZE <= ACPI_END) };
        const { assert!(ACPI_END <= KERNEL_MIN && ECAM_BASE == LOW_RAM_END) };
        assert!(flush_base(MAX_UNITS) <= PLATFORM_END);
        assert_eq!(PCI_MMIO32_BASE + PCI_MMIO32_SIZE - 1, 0xFE7F_FFFF);
    }
}
