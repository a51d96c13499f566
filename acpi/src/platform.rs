//! Registers of the platform as AML and the device models both see them.
//!
//! None of this is a standard: it is the private hardware of this machine, reachable only through the methods
//! of its DSDT and through the addresses in its FADT. Registers are little-endian.

use crate::layout::{MAX_DIMMS, MAX_HOST_BRIDGES, MAX_UNITS};

/// Offset of the 32-bit event register. A read takes the oldest firmware event off the queue, in the encoding
/// of [`FirmwareEvent`]; 0 means that none is left. The generic event device's `_EVT` reads until 0.
pub const EVENT: u64 = 0x00;
/// Offset of the 8-bit SLEEP_CONTROL_REG of hardware-reduced ACPI (ACPI 6.5, 4.8.3.7).
pub const SLEEP_CONTROL: u64 = 0x10;
/// Offset of the 8-bit SLEEP_STATUS_REG of hardware-reduced ACPI (ACPI 6.5, 4.8.3.7).
pub const SLEEP_STATUS: u64 = 0x14;
/// Offset of the 8-bit reset register (ACPI 6.5, 4.8.3.6).
pub const RESET: u64 = 0x18;
/// Offset of the 8-bit pvpanic register (Linux `include/uapi/misc/pvpanic.h`): a read tells the events that
/// are supported, a write reports events.
///
/// It has a page of its own: Linux maps the registers of ACPI write-back (`acpi_os_ioremap`), and then refuses to
/// map the same page uncached for a driver (`is_new_memtype_allowed` in arch/x86/include/asm/pgtable.h).
pub const PVPANIC: u64 = 0x1000;

/// Value that the guest writes to [`RESET`] (FADT RESET_VALUE).
pub const RESET_VALUE: u8 = 1;
/// SLP_EN in SLEEP_CONTROL: go to the sleep state now.
pub const SLEEP_ENABLE: u8 = 1 << 5;
/// Position of the three bits of SLP_TYP in SLEEP_CONTROL.
pub const SLEEP_TYPE_SHIFT: u8 = 2;
/// SLP_TYP of soft off, equal to the first element of `\_S5`.
pub const SLEEP_TYPE_S5: u8 = 5;
/// pvpanic: the guest kernel panicked.
pub const PVPANIC_PANICKED: u8 = 1 << 0;
/// pvpanic: the guest kernel panicked and will run its crash kernel.
pub const PVPANIC_CRASH_LOADED: u8 = 1 << 1;

/// Whether a byte written to [`SLEEP_CONTROL`] asks for soft off.
pub const fn sleep_is_power_off(value: u8) -> bool {
    value & SLEEP_ENABLE != 0 && (value >> SLEEP_TYPE_SHIFT) & 7 == SLEEP_TYPE_S5
}

/// Registers of what comes and goes with notifications of the firmware, 32 bits each: NFIT units, from
/// [`crate::layout::unit_base`], and host bridges, from [`crate::layout::host_bridge_base`].
pub mod hotplug {
    /// Read: the `_STA` of the device, and of what is in a unit's container: [`STATUS_PRESENT`] or 0.
    pub const STATUS: u64 = 0x00;
    /// Write: the guest has let go of the device (`_EJ0`); the value is of no interest.
    pub const EJECT: u64 = 0x04;
    /// Write, of a unit: a [`Call`](super::Call), with the DIMM that it is to. The reply is in the mailbox when the write
    /// returns.
    pub const DOORBELL: u64 = 0x08;
    /// Read, of a host bridge: which of the windows in [`HostBridges::windows`](crate::HostBridges::windows) it has now.
    pub const WINDOW: u64 = 0x08;
    /// Write: what the OS has come to with a notification of the device (`_OST`), as an [`OsStatus`].
    pub const OS_STATUS: u64 = 0x0C;
    /// Bytes of the registers.
    pub const SIZE: u64 = 0x10;
    /// Present, enabled, shown, functioning (ACPI 6.5, 6.3.7).
    pub const STATUS_PRESENT: u32 = 0x0F;

    /// What `_OST` was called with (ACPI 6.5, 6.3.5), as it is written to [`OS_STATUS`]: event in bits 15:0, status in
    /// bits 31:16.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct OsStatus {
        /// The notification's code, or [`Self::EJECT_BY_OS`].
        pub event: u16,
        /// What came of it.
        pub status: u16,
    }

    impl OsStatus {
        /// The event of an ejection that the OS has begun by itself.
        pub const EJECT_BY_OS: u16 = 0x103;
        /// It is done.
        pub const SUCCESS: u16 = 0;
        /// An ejection is in progress.
        pub const EJECTING: u16 = 0x84;

        /// Takes a written value apart.
        pub const fn decode(value: u32) -> Self {
            Self { event: value as u16, status: (value >> 16) as u16 }
        }

        /// The status in words (ACPI 6.5, tables 6.6 to 6.8).
        pub const fn words(self) -> &'static str {
            match self.status {
                Self::SUCCESS => "success",
                2 => "the notification is not known",
                0x80 => "ejection is not supported",
                0x81 => "the device is in use by an application",
                0x82 => "the device is busy",
                0x83 => "something that the device depends on is busy",
                Self::EJECTING => "the ejection is in progress",
                _ => "failure",
            }
        }
    }
}

/// Inside of a unit's mailbox in guest RAM, from [`crate::layout::mailbox_base`]. One call at a time, under a
/// mutex of the DSDT: AML fills the request half, writes [`hotplug::DOORBELL`] and finds the reply half filled.
pub mod mailbox {
    /// u32: the [`Call`](super::Call), as in the doorbell.
    pub const CALL: u64 = 0x00;
    /// 16 bytes: the UUID of a `_DSM`, in the mixed byte order of ToUUID.
    pub const UUID: u64 = 0x04;
    /// Bytes in [`UUID`].
    pub const UUID_SIZE: u64 = 16;
    /// u32: revision of a `_DSM`.
    pub const REVISION: u64 = 0x14;
    /// u32: function index of a `_DSM`.
    pub const FUNCTION: u64 = 0x18;
    /// u32: number of bytes in [`INPUT`].
    pub const INPUT_LENGTH: u64 = 0x1C;
    /// The input of the call. AML cuts longer input to [`INPUT_MAX`]; what follows the input is stale.
    pub const INPUT: u64 = 0x20;
    /// Room for input.
    pub const INPUT_MAX: u64 = RESULT - INPUT;
    /// u32: [`RESULT_OK`] or [`RESULT_UNSUPPORTED`].
    pub const RESULT: u64 = 0x1000;
    /// u32: number of bytes in [`OUTPUT`].
    pub const OUTPUT_LENGTH: u64 = 0x1004;
    /// The output of the call.
    pub const OUTPUT: u64 = 0x1008;
    /// Room for output.
    pub const OUTPUT_MAX: u64 = crate::layout::MAILBOX_SIZE - OUTPUT;

    /// The call was answered.
    pub const RESULT_OK: u32 = 0;
    /// There is no such call; AML returns what ACPI says about an unknown `_DSM`.
    pub const RESULT_UNSUPPORTED: u32 = 1;
}

/// Status that `_LSI`, `_LSR` and `_LSW` return first (ACPI 6.5, 6.5.10).
pub mod label_status {
    /// The call did what it says.
    pub const SUCCESS: u32 = 0;
    /// The call failed.
    pub const FAILURE: u32 = 1;
    /// Offset or length are not in the area, or more than one transfer carries.
    pub const INVALID_INPUT: u32 = 2;
    /// The label area is locked.
    pub const LOCKED: u32 = 3;
}

/// What a mailbox call asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Call {
    /// `_DSM` on the NVDIMM root device (ACPI0012).
    RootDsm = 1,
    /// `_DSM` on the DIMM.
    DimmDsm = 2,
    /// `_FIT` on the NVDIMM root device: NFIT sub-tables without the table's header.
    Fit = 3,
    /// `_LSI` on the DIMM (ACPI 6.5, 6.5.10.1). Output: u32 status, u32 size of the label area, u32 most bytes of
    /// one transfer.
    LabelInformation = 4,
    /// `_LSR` on the DIMM (ACPI 6.5, 6.5.10.2). Input: u64 offset, u64 length. Output: u32 status, the bytes.
    LabelRead = 5,
    /// `_LSW` on the DIMM (ACPI 6.5, 6.5.10.3). Input: u64 offset, u64 length, the bytes. Output: u32 status.
    LabelWrite = 6,
}

impl Call {
    /// The call that a word of mailbox and doorbell stands for, and the number of the DIMM that it is to; none if the
    /// guest made the word up.
    pub const fn decode(word: u32) -> Option<(Self, u32)> {
        let (code, dimm) = (word & 0xFF, word >> 8);
        let call = match code {
            1 => Self::RootDsm,
            2 => Self::DimmDsm,
            3 => Self::Fit,
            4 => Self::LabelInformation,
            5 => Self::LabelRead,
            6 => Self::LabelWrite,
            _ => return None,
        };
        if dimm < MAX_DIMMS && (dimm == 0 || !call.is_to_root()) { Some((call, dimm)) } else { None }
    }

    const fn is_to_root(self) -> bool {
        matches!(self, Self::RootDsm | Self::Fit)
    }

    /// The call to the root device, or to the unit's DIMM 0, as written to mailbox and doorbell.
    pub const fn code(self) -> u32 {
        self as u32
    }

    /// The call to a DIMM as written to mailbox and doorbell: code in bits 7:0, the DIMM's number in bits 31:8.
    pub const fn to_dimm(self, dimm: u32) -> u32 {
        self as u32 | dimm << 8
    }
}

/// NFIT device handle of a DIMM of a unit, which is also its `_ADR` (ACPI 6.5, 5.2.25.2 and 9.20.3).
///
/// DIMM number (bits 3:0) and channel (7:4) count the unit's DIMMs from 1, so that no handle is 0; the unit's low four
/// bits are the memory controller (11:8), the others the socket (15:12); node 0.
pub const fn device_handle(unit: u32, dimm: u32) -> u32 {
    (unit << 8) | (dimm + 1)
}

/// ACPI device that a firmware event is addressed to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EventTarget {
    /// Module container (ACPI0004) of a unit.
    Container(u32),
    /// NVDIMM root device (ACPI0012) of a unit.
    Root(u32),
    /// A DIMM of a unit.
    Dimm {
        /// The unit.
        unit: u32,
        /// Its number in the unit, below [`MAX_DIMMS`].
        dimm: u32,
    },
    /// The error device (PNP0C33).
    ErrorDevice,
    /// A PCI Express host bridge that comes and goes (PNP0A08), by its number.
    HostBridge(u32),
}

/// Targets that a unit can have: container, root and DIMMs.
const UNIT_TARGETS: u32 = 2 + MAX_DIMMS;
/// Index of [`EventTarget::ErrorDevice`], behind those of all units that a machine can have.
const ERROR_DEVICE: u32 = UNIT_TARGETS * MAX_UNITS;
/// Index of the first host bridge, behind the error device.
const HOST_BRIDGES: u32 = ERROR_DEVICE + 1;

impl EventTarget {
    /// Position in the list of all targets: those of each unit, the error device, the host bridges.
    pub const fn index(self) -> u32 {
        match self {
            Self::Container(unit) => UNIT_TARGETS * unit,
            Self::Root(unit) => UNIT_TARGETS * unit + 1,
            Self::Dimm { unit, dimm } => UNIT_TARGETS * unit + 2 + dimm,
            Self::ErrorDevice => ERROR_DEVICE,
            Self::HostBridge(bridge) => HOST_BRIDGES + bridge,
        }
    }

    /// The target at a position; none behind the last.
    pub const fn from_index(index: u32) -> Option<Self> {
        if index == ERROR_DEVICE {
            return Some(Self::ErrorDevice);
        }
        if let Some(bridge) = index.checked_sub(HOST_BRIDGES) {
            return if bridge < MAX_HOST_BRIDGES { Some(Self::HostBridge(bridge)) } else { None };
        }
        let unit = index / UNIT_TARGETS;
        Some(match index % UNIT_TARGETS {
            0 => Self::Container(unit),
            1 => Self::Root(unit),
            place => Self::Dimm { unit, dimm: place - 2 },
        })
    }
}

/// Notify codes that the firmware of this machine sends.
pub mod notify {
    /// Bus check: the namespace below the device has changed (ACPI 6.5, 5.6.6).
    pub const BUS_CHECK: u8 = 0x00;
    /// Device check: the device came or went.
    pub const DEVICE_CHECK: u8 = 0x01;
    /// Eject request: the OS is asked to let go of the device.
    pub const EJECT_REQUEST: u8 = 0x03;
    /// NVDIMM root device: `_FIT` has changed (ACPI 6.5, 9.20.1).
    pub const NFIT_UPDATE: u8 = 0x80;
    /// NVDIMM root device: an uncorrectable memory error was found.
    pub const UNCORRECTABLE_ERROR: u8 = 0x81;
    /// NVDIMM root device: an address range scrub has stopped (ACPI 6.5, 5.6.6).
    pub const ARS_STOPPED: u8 = 0x82;
    /// NVDIMM: the health of the DIMM has changed (`NFIT_NOTIFY_DIMM_HEALTH` in Linux).
    pub const DIMM_HEALTH: u8 = 0x81;
    /// Error device: an error source has a record (ACPI 6.5, 18.3.2.9).
    pub const HARDWARE_ERROR: u8 = 0x80;
}

/// One `Notify` that the generic event device is to perform.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FirmwareEvent {
    /// The device that is notified.
    pub target: EventTarget,
    /// The notification value.
    pub code: u8,
}

impl FirmwareEvent {
    /// The event as read from [`EVENT`]: bits 7:0 the code, bits 31:8 the target's index + 1. Never 0.
    pub const fn encode(self) -> u32 {
        (self.target.index() + 1) << 8 | self.code as u32
    }

    /// The event that a value of [`EVENT`] stands for; none for 0 and for targets that do not exist.
    pub const fn decode(value: u32) -> Option<Self> {
        let Some(index) = (value >> 8).checked_sub(1) else { return None };
        match EventTarget::from_index(index) {
            Some(target) => Some(Self { target, code: value as u8 }),
            None => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_survive_encoding() {
        for unit in 0..MAX_UNITS {
            let dimms = (0..MAX_DIMMS).map(|dimm| EventTarget::Dimm { unit, dimm });
            for target in dimms.chain([EventTarget::Container(unit), EventTarget::Root(unit)]) {
                for code in [0, 1, 3, 0x80, 0x81, 0xFF] {
                    let event = FirmwareEvent { target, code };
                    assert_ne!(event.encode(), 0);
                    assert_eq!(FirmwareEvent::decode(event.encode()), Some(event));
                }
            }
        }
    }

    #[test]
    fn the_error_device_has_an_index_of_its_own() {
        let event = FirmwareEvent { target: EventTarget::ErrorDevice, code: notify::HARDWARE_ERROR };
        assert_eq!(event.encode(), 0x0008_8180);
        assert_eq!(FirmwareEvent::decode(event.encode()), Some(event));
    }

    #[test]
    fn host_bridges_follow_the_error_device() {
        for bridge in 0..MAX_HOST_BRIDGES {
            let event =
                FirmwareEvent { target: EventTarget::HostBridge(bridge), code: notify::EJECT_REQUEST };
            assert_eq!(event.encode(), 0x0008_8203 + (bridge << 8));
            assert_eq!(FirmwareEvent::decode(event.encode()), Some(event));
        }
    }

    #[test]
    fn event_bits_are_where_the_aml_looks() {
        let event = FirmwareEvent { target: EventTarget::Root(2), code: notify::UNCORRECTABLE_ERROR };
        assert_eq!(event.encode(), 0x0000_4681);
    }

    #[test]
    fn no_event_and_unknown_targets_decode_to_none() {
        assert_eq!(FirmwareEvent::decode(0), None);
        assert_eq!(FirmwareEvent::decode(0x81), None);
        assert_eq!(FirmwareEvent::decode((HOST_BRIDGES + MAX_HOST_BRIDGES + 1) << 8), None);
        assert_eq!(FirmwareEvent::decode(u32::MAX), None);
    }

    #[test]
    fn only_an_enabled_s5_powers_off() {
        assert!(sleep_is_power_off(0x34));
        assert!(!sleep_is_power_off(0x14));
        assert!(!sleep_is_power_off(0x20));
        assert!(!sleep_is_power_off(0x3C));
    }

    #[test]
    fn mailbox_halves_fit() {
        assert_eq!(mailbox::INPUT_MAX, 0xFE0);
        assert_eq!(mailbox::OUTPUT_MAX, 0xFF8);
        assert_eq!(mailbox::UUID + mailbox::UUID_SIZE, mailbox::REVISION);
    }

    #[test]
    fn device_handles_are_distinct_and_not_zero() {
        let handles: std::collections::BTreeSet<u32> = (0..MAX_UNITS)
            .flat_map(|unit| (0..MAX_DIMMS).map(move |dimm| device_handle(unit, dimm)))
            .collect();
        assert_eq!(handles.len(), (MAX_UNITS * MAX_DIMMS) as usize);
        assert_eq!(device_handle(0, 0), 0x0001);
        assert_eq!(device_handle(0x12, 0), 0x1201);
        assert_eq!(device_handle(1, 15), 0x0110);
        assert!(handles.iter().all(|&handle| handle != 0 && handle <= 0xFFFF));
    }

    #[test]
    fn calls_survive_decoding() {
        for code in 1..=6 {
            let (call, dimm) = Call::decode(code).expect("a call");
            assert_eq!((call.code(), dimm), (code, 0));
        }
        assert_eq!(Call::decode(Call::LabelRead.to_dimm(31)), Some((Call::LabelRead, 31)));
        for word in
            [0, 7, Call::DimmDsm.to_dimm(32), Call::RootDsm.to_dimm(1), Call::Fit.to_dimm(1), u32::MAX]
        {
            assert_eq!(Call::decode(word), None, "{word:#x}");
        }
    }
}
