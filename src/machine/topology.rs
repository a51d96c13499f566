//! Which DIMMs are behind the devices of a unit, and where on them: what the firmware tables and the models of the DIMMs
//! are both made from.

use std::sync::Arc;

use aconite_acpi::platform::device_handle;
use aconite_acpi::{AddressRange, DimmFlags, NvdimmUnit, RangeType, Share, UnitDimm, UnitRange};
use aconite_devices::nvdimm::Dimm;
use sha2::{Digest, Sha256};

use super::memory::Window;
use crate::command::MemoryDimm;
use crate::config::{Dimms, INTERLEAVE, Pmem};

/// A device of a unit.
#[derive(Clone, Copy, Debug)]
pub struct Member<'a> {
    /// Its description.
    pub pmem: &'a Pmem,
    /// Its size in bytes.
    pub size: u64,
    /// Where it goes.
    pub window: &'a Window,
}

/// A unit: what firmware says of it, and who has its DIMMs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Topology {
    /// For the tables.
    pub firmware: NvdimmUnit,
    /// The member behind each of the ranges. What firmware could not map is behind none.
    pub members: Vec<usize>,
    /// The owner of each of the DIMMs.
    pub owners: Vec<Owner>,
}

/// The member that describes a DIMM and keeps its state: the first that names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Its place among the members.
    pub member: usize,
    /// The DIMM's number among those that the member keeps.
    pub number: u32,
    /// The DIMM's name, if it has one.
    name: Option<String>,
}

/// A DIMM that a device lies on.
#[derive(Clone, Debug)]
pub struct Seat {
    /// Its NFIT device handle.
    handle: u32,
    /// Its serial number, as the NFIT has it.
    serial: u32,
    /// Its name, if it has one.
    name: Option<String>,
    dimm: Arc<Dimm>,
}

impl Seat {
    /// Whether it waits for its passphrase.
    pub fn locked(&self) -> bool {
        self.dimm.locked()
    }

    /// What is told of it.
    pub fn describe(&self) -> MemoryDimm {
        MemoryDimm {
            handle: u64::from(self.handle).into(),
            // Linux shows the bytes in the order in which they stand (`serial_show` in drivers/acpi/nfit/core.c).
            serial: format!("{:08x}", self.serial.swap_bytes()),
            name: self.name.clone(),
            secured: self.dimm.secured(),
            locked: self.locked(),
        }
    }
}

impl Topology {
    /// The DIMMs of `dimms`, those of the unit, that a member lies on, or has without a range.
    pub fn seats(&self, member: usize, dimms: &[Arc<Dimm>]) -> Vec<Seat> {
        let range =
            self.members.iter().position(|of| *of == member).map(|range| &self.firmware.ranges[range]);
        let behind: Vec<usize> = match range {
            Some(range) => range.shares.iter().map(|share| share.dimm as usize).collect(),
            None => (0..self.owners.len()).filter(|dimm| self.owners[*dimm].member == member).collect(),
        };
        let seat = |number: usize| Seat {
            handle: device_handle(self.firmware.unit, number as u32),
            serial: self.firmware.dimms[number].serial,
            name: self.owners[number].name.clone(),
            dimm: dimms[number].clone(),
        };
        behind.into_iter().map(seat).collect()
    }

    /// The topology of unit `unit` with these devices.
    pub fn of(unit: u32, members: &[Member<'_>]) -> Self {
        let lie = members.iter().find_map(|member| member.pmem.lie);
        let firmware = NvdimmUnit { unit, ranges: Vec::new(), dimms: Vec::new(), lie };
        let mut topology = Self { firmware, members: Vec::new(), owners: Vec::new() };
        for (place, member) in members.iter().enumerate() {
            let dimms =
                if has_dimms(member.pmem) { topology.dimms_of(place, member.pmem) } else { Vec::new() };
            let shares = topology.share(member.size, &dimms);
            if !member.pmem.flags.0.contains(DimmFlags::MAP_FAILED) {
                topology.members.push(place);
                topology.firmware.ranges.push(range(member, shares));
            }
        }
        topology
    }

    /// Numbers of the DIMMs of a member; those that are new are added.
    fn dimms_of(&mut self, member: usize, pmem: &Pmem) -> Vec<u32> {
        let mut kept = 0..;
        let mut add = |topology: &mut Self, name: Option<&String>| {
            let number = kept.next().unwrap_or(u32::MAX);
            let flags = if pmem.readonly { pmem.flags.0.union(DimmFlags::NOT_ARMED) } else { pmem.flags.0 };
            let serial = serial(pmem, number, name);
            topology.firmware.dimms.push(UnitDimm { serial, flags, capacity: 0, flush_hint: true });
            topology.owners.push(Owner { member, number, name: name.cloned() });
            topology.owners.len() as u32 - 1
        };
        match &pmem.dimms {
            Dimms::Own(count) => (0..*count).map(|_| add(self, None)).collect(),
            Dimms::Named(names) => names
                .iter()
                .map(|name| {
                    let known = self.owners.iter().position(|owner| owner.name.as_ref() == Some(name));
                    known.map_or_else(|| add(self, Some(name)), |known| known as u32)
                })
                .collect(),
        }
    }

    /// Puts a device of `size` bytes behind what its DIMMs hold already.
    fn share(&mut self, size: u64, dimms: &[u32]) -> Vec<Share> {
        let share = size / dimms.len().max(1) as u64;
        dimms
            .iter()
            .map(|&dimm| {
                let of = &mut self.firmware.dimms[dimm as usize];
                let dimm_address = of.capacity;
                of.capacity += share;
                Share { dimm, dimm_address }
            })
            .collect()
    }
}

fn has_dimms(pmem: &Pmem) -> bool {
    pmem.range.0 == RangeType::Persistent
}

fn range(member: &Member<'_>, shares: Vec<Share>) -> UnitRange {
    let line = member.pmem.interleave.unwrap_or(INTERLEAVE);
    UnitRange {
        range: AddressRange { base: member.window.range.start, size: member.size },
        proximity: member.window.node,
        kind: member.pmem.range.0,
        // At most a mebibyte.
        line: line.bytes() as u32,
        shares,
    }
}

/// Serial number of a DIMM. It belongs to names, so that a DIMM keeps it in another slot: labels that were made for
/// another set of serial numbers are not valid.
fn serial(pmem: &Pmem, number: u32, name: Option<&String>) -> u32 {
    let mut hash = Sha256::new();
    hash.update(match (name, number) {
        (Some(name), _) => format!("{}/{name}", pmem.bus.as_ref().unwrap_or(&pmem.id)),
        (None, 0) => pmem.id.clone(),
        (None, number) => format!("{}/{number}", pmem.id),
    });
    let digest = hash.finalize();
    u32::from_le_bytes([digest[0], digest[1], digest[2], digest[3]])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Via;
    use crate::units::GIB;

    fn topology(devices: &[&str]) -> Topology {
        let devices: Vec<_> = devices.iter().map(|text| Pmem::parse("--pmem", text).unwrap()).collect();
        let windows: Vec<_> = (0..devices.len())
            .map(|n| Window {
                range: (n as u64 + 4) * GIB..(n as u64 + 5) * GIB,
                node: n as u32 + 1,
                unit: 3,
                via: Via::Nfit,
            })
            .collect();
        let members: Vec<_> = devices
            .iter()
            .zip(&windows)
            .map(|(pmem, window)| Member { pmem, size: 64 << 20, window })
            .collect();
        Topology::of(3, &members)
    }

    fn shares(topology: &Topology, range: usize) -> Vec<(u32, u64)> {
        topology.firmware.ranges[range].shares.iter().map(|s| (s.dimm, s.dimm_address)).collect()
    }

    #[test]
    fn a_device_alone_fills_its_dimm() {
        let one = topology(&["size=64M,id=p0,readonly=on"]);
        assert_eq!(shares(&one, 0), [(0, 0)]);
        let dimm = one.firmware.dimms[0];
        assert_eq!((dimm.capacity, dimm.flags), (64 << 20, DimmFlags::NOT_ARMED));
        assert_eq!(one.owners[0], Owner { member: 0, number: 0, name: None });
    }

    #[test]
    fn shared_dimms_are_filled_one_range_behind_the_other() {
        let bus = topology(&[
            "size=64M,id=p0,bus=b,dimms=a+b",
            "size=64M,id=p1,bus=b,dimms=a+b+c+d,interleave=256",
            "size=64M,id=p2,bus=b",
        ]);
        const MIB: u64 = 1 << 20;
        assert_eq!(shares(&bus, 0), [(0, 0), (1, 0)]);
        assert_eq!(shares(&bus, 1), [(0, 32 * MIB), (1, 32 * MIB), (2, 0), (3, 0)]);
        assert_eq!(shares(&bus, 2), [(4, 0)]);
        assert_eq!(bus.firmware.ranges.iter().map(|range| range.line).collect::<Vec<_>>(), [4096, 256, 4096]);
        let capacities: Vec<_> = bus.firmware.dimms.iter().map(|dimm| dimm.capacity / MIB).collect();
        assert_eq!(capacities, [48, 48, 16, 16, 64]);
        let owners: Vec<_> = bus.owners.iter().map(|owner| (owner.member, owner.number)).collect();
        assert_eq!(owners, [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]);
    }

    #[test]
    fn volatile_ranges_have_no_dimm_and_unmapped_dimms_no_range() {
        let bus = topology(&[
            "size=64M,id=p0,bus=b,flags=map_fail",
            "size=64M,id=p1,bus=b,range=volatile",
            "size=64M,id=p2,bus=b",
        ]);
        assert_eq!(bus.members, [1, 2]);
        let kinds: Vec<_> =
            bus.firmware.ranges.iter().map(|range| (range.kind, range.shares.len())).collect();
        assert_eq!(kinds, [(RangeType::Volatile, 0), (RangeType::Persistent, 1)]);
        let dimms: Vec<_> = bus.firmware.dimms.iter().map(|dimm| (dimm.flags, dimm.capacity)).collect();
        assert_eq!(dimms, [(DimmFlags::MAP_FAILED, 64 << 20), (DimmFlags::empty(), 64 << 20)]);
    }

    #[test]
    fn every_dimm_has_its_own_serial_number_and_keeps_it() {
        let all = topology(&["size=64M,id=p0,dimms=16", "size=64M,id=p1,dimms=a+b,bus=x"]);
        let serials = |topology: &Topology| -> Vec<u32> {
            topology.firmware.dimms.iter().map(|dimm| dimm.serial).collect()
        };
        let distinct: std::collections::BTreeSet<_> = serials(&all).into_iter().collect();
        assert_eq!(distinct.len(), 18);
        let other = topology(&["size=64M,id=p9,dimms=b,bus=x"]);
        assert_eq!(serials(&other)[0], serials(&all)[17]);
        // As before there were several: labels of devices that exist stay valid.
        assert_eq!(serials(&topology(&["size=64M,id=p0"]))[0], serials(&all)[0]);
    }
}
