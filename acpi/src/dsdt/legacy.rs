//! Devices at fixed ports and addresses: serial line, RTC, panic register, and addresses that are taken.

use acpi_tables::aml::{Device, EISAName, IO, Interrupt, Memory32Fixed, Name, ResourceTemplate};

use super::Body;
use crate::layout::{
    APEI_REGISTERS_SIZE, ECAM_BASE, ECAM_SIZE, EINJ_REGISTERS, FLUSH_BASE, FLUSH_SIZE, GHES_REGISTERS,
    HOST_BRIDGE_BASE, MAX_HOST_BRIDGES, MAX_UNITS, PLATFORM_BASE, RTC_PORT, SERIAL_GSI, SERIAL_PORT,
    UNIT_BASE, UNIT_SIZE,
};
use crate::platform::{PVPANIC, hotplug};

/// Appends all of them.
pub(super) fn append(body: &mut Body) {
    motherboard(body);
    serial(body);
    rtc(body);
    pvpanic(body);
}

/// Edge-triggered, active-high, exclusive interrupt of a consumer.
pub(super) fn edge_interrupt(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

/// Pages of registers for error handling, one behind the other.
const APEI_REGISTERS: u64 = GHES_REGISTERS + APEI_REGISTERS_SIZE - EINJ_REGISTERS;

/// Registers of host bridges that come and go.
const HOST_BRIDGES: u64 = hotplug::SIZE * MAX_HOST_BRIDGES as u64;

/// PNP0C02: addresses that belong to no other device. Linux uses ECAM only where firmware reserves it like
/// this (arch/x86/pci/mmconfig-shared.c, `pci_mmcfg_check_reserved`). The panic register is left out: its own
/// device claims it.
fn motherboard(body: &mut Body) {
    body.push(&Device::new(
        "MBRD".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
            &Name::new("_UID".into(), &0u8),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &Memory32Fixed::new(true, ECAM_BASE as u32, ECAM_SIZE as u32),
                    &Memory32Fixed::new(true, PLATFORM_BASE as u32, PVPANIC as u32),
                    &Memory32Fixed::new(true, UNIT_BASE as u32, UNIT_SIZE as u32 * MAX_UNITS),
                    &Memory32Fixed::new(true, HOST_BRIDGE_BASE as u32, HOST_BRIDGES as u32),
                    &Memory32Fixed::new(true, EINJ_REGISTERS as u32, APEI_REGISTERS as u32),
                    &Memory32Fixed::new(true, FLUSH_BASE as u32, FLUSH_SIZE as u32 * MAX_UNITS),
                ]),
            ),
        ],
    ));
}

/// 16550A, COM1.
fn serial(body: &mut Body) {
    body.push(&Device::new(
        "COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &0u8),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &IO::new(SERIAL_PORT, SERIAL_PORT, 1, 8),
                    &edge_interrupt(SERIAL_GSI),
                ]),
            ),
        ],
    ));
}

/// MC146818 real-time clock.
fn rtc(body: &mut Body) {
    body.push(&Device::new(
        "RTC0".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0B00")),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&IO::new(RTC_PORT, RTC_PORT, 1, 2)])),
        ],
    ));
}

/// QEMU0001, one byte of memory (Linux drivers/misc/pvpanic/pvpanic-mmio.c).
fn pvpanic(body: &mut Body) {
    body.push(&Device::new(
        "PEVT".into(),
        vec![
            &Name::new("_HID".into(), &"QEMU0001"),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&Memory32Fixed::new(true, (PLATFORM_BASE + PVPANIC) as u32, 1)]),
            ),
        ],
    ));
}
