//! FADT (ACPI 6.5, 5.2.9) of a hardware-reduced platform.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::Table;
use crate::layout::{PLATFORM_BASE, PM_TIMER_PORT};
use crate::platform::{RESET, RESET_VALUE, SLEEP_CONTROL, SLEEP_STATUS};
use crate::table::GenericAddress;

/// FADT behind its header, ACPI 6.5, table 5.9.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Fadt {
    firmware_ctrl: U32,
    dsdt: U32,
    reserved0: u8,
    preferred_pm_profile: u8,
    sci_interrupt: U16,
    smi_command: U32,
    acpi_enable: u8,
    acpi_disable: u8,
    s4bios_request: u8,
    pstate_control: u8,
    pm1a_event: U32,
    pm1b_event: U32,
    pm1a_control: U32,
    pm1b_control: U32,
    pm2_control: U32,
    pm_timer: U32,
    gpe0: U32,
    gpe1: U32,
    pm1_event_length: u8,
    pm1_control_length: u8,
    pm2_control_length: u8,
    pm_timer_length: u8,
    gpe0_length: u8,
    gpe1_length: u8,
    gpe1_base: u8,
    cst_control: u8,
    c2_latency: U16,
    c3_latency: U16,
    flush_size: U16,
    flush_stride: U16,
    duty_offset: u8,
    duty_width: u8,
    day_alarm: u8,
    month_alarm: u8,
    century: u8,
    boot_architecture: U16,
    reserved1: u8,
    flags: U32,
    reset_register: GenericAddress,
    reset_value: u8,
    arm_boot_architecture: U16,
    minor_version: u8,
    x_firmware_ctrl: U64,
    x_dsdt: U64,
    x_pm1a_event: GenericAddress,
    x_pm1b_event: GenericAddress,
    x_pm1a_control: GenericAddress,
    x_pm1b_control: GenericAddress,
    x_pm2_control: GenericAddress,
    x_pm_timer: GenericAddress,
    x_gpe0: GenericAddress,
    x_gpe1: GenericAddress,
    sleep_control: GenericAddress,
    sleep_status: GenericAddress,
    hypervisor_vendor: [u8; 8],
}

const _: () = assert!(crate::HEADER_SIZE + size_of::<Fadt>() == 276);

/// Revision 6.5. The minor version's low nibble is the minor, its high nibble the erratum.
const REVISION: u8 = 6;
const MINOR: u8 = 5;

/// Preferred_PM_Profile: enterprise server.
const PROFILE_SERVER: u8 = 4;

// Fixed feature flags, table 5.10.
const WBINVD: u32 = 1 << 0;
const PROC_C1: u32 = 1 << 2;
const POWER_BUTTON_NOT_FIXED: u32 = 1 << 4;
const SLEEP_BUTTON_NOT_FIXED: u32 = 1 << 5;
const RTC_WAKE_NOT_FIXED: u32 = 1 << 6;
const TIMER_32_BIT: u32 = 1 << 8;
const RESET_SUPPORTED: u32 = 1 << 10;
const HEADLESS: u32 = 1 << 12;
const HARDWARE_REDUCED: u32 = 1 << 20;

// IA-PC boot architecture flags, table 5.11. Clear, and meant so: bit 0, no user-visible legacy devices; bit 1,
// no 8042; bit 3, MSI works; bit 5, there is a CMOS RTC.
const VGA_NOT_PRESENT: u16 = 1 << 2;

/// FADT that names the DSDT at `dsdt`.
///
/// The PM timer is outside what hardware-reduced ACPI promises, yet Linux takes X_PM_TMR_BLK from any FADT
/// (`acpi_parse_fadt` in arch/x86/kernel/acpi/boot.c) and calibrates the TSC by it if nothing better is there.
/// ACPICA does not widen the 32-bit fields on such platforms (`acpi_tb_convert_fadt`), so the X field counts.
pub(crate) fn fadt(dsdt: u64, pm_timer: bool) -> Table {
    let mut flags = WBINVD
        | PROC_C1
        | POWER_BUTTON_NOT_FIXED
        | SLEEP_BUTTON_NOT_FIXED
        | RTC_WAKE_NOT_FIXED
        | RESET_SUPPORTED
        | HEADLESS
        | HARDWARE_REDUCED;
    if pm_timer {
        flags |= TIMER_32_BIT;
    }
    let none = GenericAddress::NONE;
    let body = Fadt {
        firmware_ctrl: U32::ZERO,
        dsdt: U32::ZERO,
        reserved0: 0,
        preferred_pm_profile: PROFILE_SERVER,
        sci_interrupt: U16::ZERO,
        smi_command: U32::ZERO,
        acpi_enable: 0,
        acpi_disable: 0,
        s4bios_request: 0,
        pstate_control: 0,
        pm1a_event: U32::ZERO,
        pm1b_event: U32::ZERO,
        pm1a_control: U32::ZERO,
        pm1b_control: U32::ZERO,
        pm2_control: U32::ZERO,
        pm_timer: if pm_timer { U32::new(PM_TIMER_PORT.into()) } else { U32::ZERO },
        gpe0: U32::ZERO,
        gpe1: U32::ZERO,
        pm1_event_length: 0,
        pm1_control_length: 0,
        pm2_control_length: 0,
        pm_timer_length: if pm_timer { 4 } else { 0 },
        gpe0_length: 0,
        gpe1_length: 0,
        gpe1_base: 0,
        cst_control: 0,
        // Above 100 and 1000: no C2, no C3 (table 5.9).
        c2_latency: U16::new(101),
        c3_latency: U16::new(1001),
        flush_size: U16::ZERO,
        flush_stride: U16::ZERO,
        duty_offset: 0,
        duty_width: 0,
        day_alarm: 0,
        month_alarm: 0,
        century: 0,
        boot_architecture: U16::new(VGA_NOT_PRESENT),
        reserved1: 0,
        flags: U32::new(flags),
        reset_register: GenericAddress::memory8(PLATFORM_BASE + RESET),
        reset_value: RESET_VALUE,
        arm_boot_architecture: U16::ZERO,
        minor_version: MINOR,
        x_firmware_ctrl: U64::ZERO,
        x_dsdt: U64::new(dsdt),
        x_pm1a_event: none,
        x_pm1b_event: none,
        x_pm1a_control: none,
        x_pm1b_control: none,
        x_pm2_control: none,
        x_pm_timer: if pm_timer { GenericAddress::io32(PM_TIMER_PORT) } else { none },
        x_gpe0: none,
        x_gpe1: none,
        sleep_control: GenericAddress::memory8(PLATFORM_BASE + SLEEP_CONTROL),
        sleep_status: GenericAddress::memory8(PLATFORM_BASE + SLEEP_STATUS),
        hypervisor_vendor: [0; 8],
    };
    Table::new(*b"FACP", REVISION, body.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checksum;

    #[test]
    fn fields_are_where_the_spec_says() {
        let table = fadt(0x10_0040, false);
        let bytes = table.bytes();
        assert_eq!(bytes.len(), 276);
        assert_eq!(checksum(bytes), 0);
        assert_eq!((bytes[8], bytes[131]), (6, 5));
        assert_eq!(bytes[109..111], 0x0004u16.to_le_bytes());
        assert_eq!(bytes[112..116], 0x0010_1475u32.to_le_bytes());
        assert_eq!(bytes[116..120], [0, 8, 0, 1]);
        assert_eq!(bytes[120..128], 0xFE80_0018u64.to_le_bytes());
        assert_eq!(bytes[128], 1);
        assert_eq!(bytes[140..148], 0x10_0040u64.to_le_bytes());
        assert_eq!(bytes[208..220], [0; 12]);
        assert_eq!(bytes[248..256], 0xFE80_0010u64.to_le_bytes());
        assert_eq!(bytes[260..268], 0xFE80_0014u64.to_le_bytes());
    }

    #[test]
    fn pm_timer_has_port_length_and_width() {
        let table = fadt(0x10_0040, true);
        let bytes = table.bytes();
        assert_eq!(bytes[76..80], 0x608u32.to_le_bytes());
        assert_eq!(bytes[91], 4);
        assert_eq!(bytes[113] & 1, 1);
        assert_eq!(bytes[208..212], [1, 32, 0, 3]);
        assert_eq!(bytes[212..220], 0x608u64.to_le_bytes());
        assert_eq!(checksum(bytes), 0);
    }
}
