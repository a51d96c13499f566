//! What one NVDIMM root device has: DIMMs, and the address ranges that they provide.

use super::{
    ControlRegion, DimmFlags, FitBuilder, Interleave, Lie, Persistence, RangeType, RegionMap, SpaRange,
};
use crate::AddressRange;
use crate::layout::{FLUSH_HINT_STEP, flush_base};
use crate::platform::device_handle;

/// The NVDIMMs below one root device. Linux makes a bus of it (`ndbus`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NvdimmUnit {
    /// Number of the unit; determines handles, indexes and flush hints.
    pub unit: u32,
    /// The address ranges.
    pub ranges: Vec<UnitRange>,
    /// The DIMMs, at most [`crate::layout::MAX_DIMMS`]. The place in this list is the DIMM's number in the unit.
    pub dimms: Vec<UnitDimm>,
    /// What `_FIT` says that is not so.
    pub lie: Option<Lie>,
}

/// A range of addresses and the DIMMs behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnitRange {
    /// The addresses. Linux wants multiples of its page size and makes the best use of multiples of 1 GiB.
    pub range: AddressRange,
    /// Proximity domain, which SRAT must know.
    pub proximity: u32,
    /// What the range is.
    pub kind: RangeType,
    /// Bytes of a line: line n of the range is on the DIMM of share n modulo the number of shares.
    pub line: u32,
    /// The DIMMs, each with an equal share; none if firmware does not say which they are.
    pub shares: Vec<Share>,
}

/// The share of a DIMM in a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// The DIMM's number in the unit.
    pub dimm: u32,
    /// Address on the DIMM of the share's first byte ("DPA").
    pub dimm_address: u64,
}

/// A DIMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnitDimm {
    /// Serial number, see [`ControlRegion::serial`].
    pub serial: u32,
    /// Its state.
    pub flags: DimmFlags,
    /// Bytes of all its shares, mapped or not.
    pub capacity: u64,
    /// Whether it has a flush hint address, `flush_hint`.
    pub flush_hint: bool,
}

/// Flush hint address of a DIMM. Those of a unit are in one page, which Linux maps once (`nvdimm_map_flush` in
/// drivers/nvdimm/region_devs.c).
pub(crate) const fn flush_hint(unit: u32, dimm: u32) -> u64 {
    flush_base(unit) + dimm as u64 * FLUSH_HINT_STEP
}

impl NvdimmUnit {
    /// What `_FIT` of the unit's root device returns: NFIT sub-tables without the table's header.
    pub fn fit(&self, persistence: Persistence) -> Vec<u8> {
        let fit = FitBuilder::new().unit(self).capabilities(persistence).finish();
        match self.lie {
            Some(lie) => lie.tell(fit),
            None => fit,
        }
    }

    /// Number of one of the unit's sub-tables among those of all units, above 0; `place` counts those of its kind.
    ///
    /// A unit has at most 255 of a kind: more do not fit into what `_FIT` can return.
    pub const fn index(&self, place: usize) -> u16 {
        ((self.unit << 8) as usize + place + 1) as u16
    }
}

impl FitBuilder {
    /// Adds all sub-tables of one unit.
    ///
    /// Linux makes no region of a volatile range whose DIMMs are named (`acpi_nfit_init_mapping` misses them in
    /// drivers/acpi/nfit/core.c, since `nfit_mem_init` looks only at persistent ranges): such a range has no shares.
    pub fn unit(mut self, unit: &NvdimmUnit) -> Self {
        for (place, range) in unit.ranges.iter().enumerate() {
            self = self.spa_range(&SpaRange {
                index: unit.index(place),
                proximity: range.proximity,
                kind: range.kind,
                range: range.range,
            });
        }
        for (number, dimm) in unit.dimms.iter().enumerate() {
            self = self.region_maps(unit, number as u32, dimm);
        }
        for (place, line) in unit.lines().into_iter().enumerate() {
            self = self.interleave(&Interleave { index: unit.index(place), line });
        }
        for (number, dimm) in unit.dimms.iter().enumerate() {
            self = self.control_region(&ControlRegion { index: unit.index(number), serial: dimm.serial });
        }
        for (number, _) in (0..).zip(&unit.dimms).filter(|(_, dimm)| dimm.flush_hint) {
            self = self.flush_hint(device_handle(unit.unit, number), flush_hint(unit.unit, number));
        }
        self
    }

    /// The shares of a DIMM in all ranges; what it has without any is not mapped.
    fn region_maps(mut self, unit: &NvdimmUnit, number: u32, dimm: &UnitDimm) -> Self {
        let index = unit.index(number as usize);
        let unmapped = RegionMap {
            handle: device_handle(unit.unit, number),
            physical_id: index,
            region_id: 0,
            range_index: 0,
            control_index: index,
            size: dimm.capacity,
            offset: 0,
            dimm_address: 0,
            interleave_index: 0,
            ways: 1,
            flags: dimm.flags,
        };
        let mut region_id = 0;
        for (place, range) in unit.ranges.iter().enumerate() {
            let ways = range.shares.len();
            for (position, share) in range.shares.iter().enumerate().filter(|(_, share)| share.dimm == number)
            {
                let line = unit.lines().iter().position(|&line| ways > 1 && line == range.line);
                self = self.region_map(&RegionMap {
                    region_id,
                    range_index: unit.index(place),
                    size: range.range.size / ways as u64,
                    offset: position as u64 * u64::from(range.line),
                    dimm_address: share.dimm_address,
                    interleave_index: line.map_or(0, |place| unit.index(place)),
                    ways: ways as u16,
                    ..unmapped
                });
                region_id += 1;
            }
        }
        if region_id == 0 { self.region_map(&unmapped) } else { self }
    }
}

impl NvdimmUnit {
    /// Bytes of a line in the interleave sets of the unit, each once.
    fn lines(&self) -> Vec<u32> {
        let mut lines = Vec::new();
        for range in self.ranges.iter().filter(|range| range.shares.len() > 1) {
            if !lines.contains(&range.line) {
                lines.push(range.line);
            }
        }
        lines
    }
}
