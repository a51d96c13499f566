//! Intel's functions of the NVDIMM root device: the staged firmware of its DIMMs is activated while the machine runs
//! (`NVDIMM_BUS_FAMILY_INTEL`; drivers/acpi/nfit/intel.c).

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::dimm::{Activity, activate, activity};
use super::dsm::{Request, Uuid, only_status, uuid};
use super::unit::Unit;

/// UUID of the functions.
pub(super) const UUID: Uuid =
    uuid(0xc7d8_acd4, 0x2df8, 0x4b82, [0x9f, 0x65, 0xa3, 0x25, 0x33, 0x5a, 0xf1, 0x49]);
/// Bits of the functions that exist.
const MASK: u8 = 0b111;

/// Status: not supported.
const NOT_SUPPORTED: u32 = 1;
/// Status of function 2: nothing is armed (`ND_INTEL_BUS_FWA_STATUS_NOARM`).
const NOT_ARMED: u32 = 6 | 1 << 16;
/// Status of function 2: an activation is under way (`ND_INTEL_BUS_FWA_STATUS_BUSY`).
const BUSY: u32 = 6 | 2 << 16;

/// The OS may quiesce devices, and need not: Linux then activates at once (`NVDIMM_FWA_CAP_LIVE`). With bit 0 it would
/// go through a hibernation cycle.
const OS_QUIESCE: u8 = 1 << 1;
/// A reset activates, too.
const RESET: u8 = 1 << 2;

/// Time that an activation of a DIMM takes, in microseconds.
const ACTIVATION_TIME: u64 = 1_000_000;
/// Longest time for which devices can be quiesced, in microseconds.
const QUIESCE_MOST: u64 = 3_000_000;

/// Output of function 1 (`struct nd_intel_bus_fw_activate_businfo`).
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Information {
    status: U32,
    reserved: U16,
    state: u8,
    capability: u8,
    activation_time: U64,
    processor_quiesce: U64,
    device_quiesce: U64,
    quiesce_most: U64,
}
const _: () = assert!(size_of::<Information>() == 40);

/// Answers one call on the root device of a unit, which may have gone. `None`: this is no call of the device.
pub(super) fn call(unit: Option<&Unit>, request: &Request<'_>) -> Option<Vec<u8>> {
    if request.revision != 1 {
        return None;
    }
    let dimms = || unit.into_iter().flat_map(Unit::dimms);
    let activity = dimms().map(|dimm| activity(dimm)).max().unwrap_or(Activity::Idle);
    Some(match request.function {
        0 => vec![MASK],
        1 => {
            let time = if activity == Activity::Armed { ACTIVATION_TIME } else { 0 };
            let output = Information {
                status: 0.into(),
                reserved: 0.into(),
                state: activity as u8,
                capability: OS_QUIESCE | RESET,
                activation_time: time.into(),
                processor_quiesce: time.into(),
                device_quiesce: time.into(),
                quiesce_most: QUIESCE_MOST.into(),
            };
            output.as_bytes().to_vec()
        }
        2 => only_status(match activity {
            Activity::Busy => BUSY,
            Activity::Armed => dimms()
                .filter(|dimm| self::activity(dimm) == Activity::Armed)
                .try_for_each(|dimm| activate(dimm))
                .map_or_else(|failure| failure.0, |()| 0),
            Activity::Idle => NOT_ARMED,
        }),
        _ => only_status(NOT_SUPPORTED),
    })
}
