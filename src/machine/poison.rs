//! Poison of memory devices and of RAM, on request: added, listed, and replaced by good media.

use std::ops::Range;
use std::sync::Arc;

use super::chain;
use super::memory::MemoryDevices;
use crate::command::{
    ClearedBy, Error, ErrorCode, Event, PoisonAdded, PoisonCleared, PoisonGuard, PoisonPattern, PoisonPlaced,
    PoisonPolicy, PoisonState, PolicyChange,
};
use crate::kvm::Held;
use crate::layout;
use crate::memory::{
    AddressSpace, GuardError, GuardMethod, LINE_SIZE, RangeSet, Region, RegionKind, round_out,
};
use crate::units::{Address, ByteRange};

/// The id of all RAM, whose offsets are guest-physical addresses. No device can have it.
pub const RAM: &str = "ram";
/// Maps that are left for everything but guards.
const SPARE_MAPS: usize = 1000;
/// Maps that a run of guarded pages adds: itself, and what lies behind it.
const MAPS_PER_RUN: usize = 2;

/// What an id names: the memory of a device, or all of RAM.
struct Target {
    id: String,
    /// In order of address.
    regions: Vec<Arc<Region>>,
}

/// A part of a region, by offset in it.
struct Piece<'a> {
    region: &'a Arc<Region>,
    range: Range<u64>,
}

impl Piece<'_> {
    /// The same offset as requests and events name it.
    fn named(&self, range: Range<u64>) -> ByteRange {
        let base = self.region.named_offset(self.region.gpa());
        byte_range(base + range.start..base + range.end)
    }
}

impl Target {
    /// All of it.
    fn whole(&self) -> Vec<ByteRange> {
        let whole = |region| Piece { region, range: 0..0 }.named(0..region.len());
        self.regions.iter().map(whole).collect()
    }

    /// The parts of regions that `ranges` name.
    fn pieces(&self, ranges: &[ByteRange], space: &AddressSpace) -> Result<Vec<Piece<'_>>, Error> {
        let mut pieces = Vec::with_capacity(ranges.len());
        for range in ranges {
            let end = range.end().filter(|_| range.length > 0).ok_or_else(|| self.outside(range, space))?;
            let mut at = range.offset.0;
            for region in &self.regions {
                let base = region.named_offset(region.gpa());
                if (base..base + region.len()).contains(&at) {
                    let stop = end.min(base + region.len());
                    pieces.push(Piece { region, range: at - base..stop - base });
                    at = stop;
                }
            }
            if at < end {
                return Err(self.outside(range, space));
            }
        }
        Ok(pieces)
    }

    fn outside(&self, range: &ByteRange, space: &AddressSpace) -> Error {
        if self.id == RAM {
            return not_ram(range, space);
        }
        let len: u64 = self.regions.iter().map(|region| region.len()).sum();
        Error::new(
            ErrorCode::OutsideDevice,
            format!("The range {range} is not in {}, which has {len:#x} bytes", self.id),
            "name bytes from 0 to its size, at least one",
        )
    }

    fn guard(&self) -> PoisonGuard {
        let states = self.regions.iter().map(|region| region.guard_state());
        states.fold(
            PoisonGuard { method: GuardMethod::Protection, guarded_pages: 0, clean_guarded_pages: 0 },
            |sum, state| PoisonGuard {
                method: if state.method == GuardMethod::Protection { sum.method } else { state.method },
                guarded_pages: sum.guarded_pages + state.pages,
                clean_guarded_pages: sum.clean_guarded_pages + state.clean_pages,
            },
        )
    }

    /// The answer to a request for `ranges` that has been carried out.
    fn added(&self, ranges: &[ByteRange], pieces: &[Piece<'_>]) -> PoisonAdded {
        let bytes = |range: ByteRange| range.offset.0..range.offset.0 + range.length;
        let armed: RangeSet = pieces
            .iter()
            .map(|piece| bytes(piece.named(round_out(piece.range.clone(), LINE_SIZE))))
            .collect();
        let whole = |number: u64| number.is_multiple_of(LINE_SIZE);
        let requested = || ranges.iter().map(|range| bytes(*range)).collect::<RangeSet>();
        let exact = ranges.iter().all(|range| whole(range.offset.0) && whole(range.length));
        PoisonAdded {
            device: self.id.clone(),
            rounded: !exact && armed != requested(),
            armed: armed.iter().map(byte_range).collect(),
            granularity: LINE_SIZE,
            guard: self.guard(),
        }
    }
}

/// Parts of one region, by offset in it.
struct Share {
    region: Arc<Region>,
    ranges: Vec<Range<u64>>,
}

/// Gathers the parts of each region.
fn by_region(pieces: &[Piece<'_>]) -> Vec<Share> {
    let mut shares: Vec<Share> = Vec::new();
    for piece in pieces {
        match shares.iter_mut().find(|share| share.region.gpa() == piece.region.gpa()) {
            Some(share) => share.ranges.push(piece.range.clone()),
            None => shares.push(Share { region: piece.region.clone(), ranges: vec![piece.range.clone()] }),
        }
    }
    shares
}

impl MemoryDevices {
    /// Poisons what is asked for of a device or of RAM, all or none.
    pub fn poison(&self, _held: &Held, id: &str, what: PoisonPattern) -> Result<PoisonAdded, Error> {
        let target = self.target(id, true)?;
        let ranges = what.ranges(id, &target.whole())?;
        let pieces = target.pieces(&ranges, &self.space)?;
        self.arm(&by_region(&pieces))?;
        let added = target.added(&ranges, &pieces);
        self.events.publish(Event::poison_added(id, &added.armed));
        Ok(added)
    }

    /// Poisons guest-physical `addresses`, whatever they belong to, all or none.
    pub fn poison_addresses(&self, _held: &Held, addresses: &[ByteRange]) -> Result<PoisonPlaced, Error> {
        let mut wanted: Vec<(Target, Vec<ByteRange>)> = Vec::new();
        for range in PoisonPattern::Ranges(addresses.to_vec()).ranges("the guest", &[])? {
            let region = self.space.find(range.offset.0).ok_or_else(|| not_memory(&range))?;
            let end = range.end().filter(|end| range.length > 0 && *end <= region.range().end);
            end.ok_or_else(|| not_memory(&range))?;
            let named = ByteRange::new(region.named_offset(range.offset.0), range.length);
            let id = region.name();
            match wanted.iter_mut().find(|(target, _)| target.id == id) {
                Some((_, ranges)) => ranges.push(named),
                None => wanted.push((self.target(id, true)?, vec![named])),
            }
        }
        let mut pieces = Vec::new();
        for (target, ranges) in &wanted {
            pieces.push(target.pieces(ranges, &self.space)?);
        }
        self.arm(&pieces.iter().flat_map(|pieces| by_region(pieces)).collect::<Vec<_>>())?;
        let placed = wanted.iter().zip(&pieces).map(|((target, ranges), pieces)| {
            let added = target.added(ranges, pieces);
            self.events.publish(Event::poison_added(&target.id, &added.armed));
            added
        });
        Ok(PoisonPlaced { placed: placed.collect() })
    }

    fn arm(&self, shares: &[Share]) -> Result<(), Error> {
        let mut done: Vec<(&Share, Vec<Range<u64>>)> = Vec::new();
        for share in shares {
            let limit = guard_room(&self.space, &share.region);
            match share.region.poison(&share.ranges, limit) {
                Ok(fresh) => done.push((share, fresh)),
                Err(error) => {
                    for (share, fresh) in done {
                        if let Err(error) = share.region.clean(&fresh) {
                            let device = share.region.name();
                            tracing::error!(%error, device, "poison could not be taken back");
                        }
                    }
                    return Err(guard_error(error));
                }
            }
        }
        Ok(())
    }

    /// The poison of a device or of RAM from the offset `from` on, at most `limit` ranges.
    pub fn poison_list(&self, id: &str, from: u64, limit: usize) -> Result<PoisonState, Error> {
        let target = self.target(id, false)?;
        let mut ranges = Vec::new();
        let mut next = None;
        for region in &target.regions {
            let base = region.named_offset(region.gpa());
            let first = from.saturating_sub(base).min(region.len());
            // One more than there is room for says where to go on.
            let room = limit - ranges.len();
            let mut bad = region.poisoned(first..region.len(), room + 1);
            next = bad.get(room).map(|range| Address(base + range.start));
            bad.truncate(room);
            let all = Piece { region, range: 0..0 };
            ranges.extend(bad.into_iter().map(|range| all.named(range)));
            if next.is_some() {
                break;
            }
        }
        Ok(PoisonState {
            device: id.to_owned(),
            ranges,
            next,
            granularity: LINE_SIZE,
            bytes: target.regions.iter().map(|region| region.poisoned_lines() * LINE_SIZE).sum(),
            guard: target.guard(),
        })
    }

    /// What poison of a device or of RAM does to processors, after `change`.
    pub fn poison_policy(&self, id: &str, change: PolicyChange) -> Result<PoisonPolicy, Error> {
        let target = self.target(id, false)?;
        let now = target.regions.first().map(|region| region.policy()).unwrap_or_default();
        let policy = change.apply(now);
        target.regions.iter().for_each(|region| region.set_policy(policy));
        Ok(policy)
    }

    /// Bytes of RAM that are poisoned.
    pub fn poisoned_ram(&self) -> u64 {
        let regions = self.space.regions().into_iter().filter(|region| region.kind() == RegionKind::Ram);
        regions.map(|region| region.poisoned_lines() * LINE_SIZE).sum()
    }

    /// Replaces the media under `ranges` (all of the device or of RAM if none) by good one.
    pub fn poison_clear(
        &self,
        _held: &Held,
        id: &str,
        ranges: Option<&[ByteRange]>,
    ) -> Result<PoisonCleared, Error> {
        let target = self.target(id, true)?;
        let whole = target.whole();
        let ranges = ranges.unwrap_or(&whole);
        let mut cleared = Vec::new();
        for share in by_region(&target.pieces(ranges, &self.space)?) {
            let lines: Vec<_> =
                share.ranges.iter().map(|range| round_out(range.clone(), LINE_SIZE)).collect();
            let bad = share.region.clean(&lines).map_err(guard_error)?;
            let whole = Piece { region: &share.region, range: 0..0 };
            cleared.extend(bad.into_iter().map(|range| whole.named(range)));
        }
        if !cleared.is_empty() {
            self.events.publish(Event::poison_cleared(id, &cleared, ClearedBy::Request));
        }
        Ok(PoisonCleared {
            device: id.to_owned(),
            cleared,
            granularity: LINE_SIZE,
            note: PoisonCleared::GUEST_KEEPS_ITS_LIST.to_owned(),
        })
    }

    fn target(&self, id: &str, present: bool) -> Result<Target, Error> {
        let regions = if id == RAM {
            self.space.regions().into_iter().filter(|region| region.kind() == RegionKind::Ram).collect()
        } else {
            let device = if present { self.present(id)? } else { self.find(id)? };
            vec![device.region.clone()]
        };
        Ok(Target { id: id.to_owned(), regions })
    }
}

/// The refusal of an address without memory.
fn not_memory(range: &ByteRange) -> Error {
    let what = layout::platform_part(range.offset.0).unwrap_or("nothing, or not enough,");
    Error::new(
        ErrorCode::OutsideDevice,
        format!("The guest-physical range {range} is no memory of one device: {what} is there"),
        "name addresses of RAM or of a memory device, at least one byte",
    )
}

/// The refusal of a range that is not, or not wholly, RAM: it names what is there.
fn not_ram(range: &ByteRange, space: &AddressSpace) -> Error {
    let refuse = |message: String, remedy: String| Error::new(ErrorCode::OutsideDevice, message, remedy);
    let Some(end) = range.end().filter(|_| range.length > 0) else {
        return refuse(format!("The range {range} has no bytes"), "name at least one byte of RAM".to_owned());
    };
    let regions = space.regions();
    // The first byte that is not RAM, and where RAM or anything else goes on after it.
    let mut at = range.offset.0;
    for region in regions.iter().filter(|region| region.kind() == RegionKind::Ram) {
        if region.range().contains(&at) {
            at = region.range().end;
        }
    }
    let ram: Vec<_> = regions
        .iter()
        .filter(|region| region.kind() == RegionKind::Ram)
        .map(|region| format!("{:#x} to {:#x}", region.range().start, region.range().end))
        .collect();
    if let Some(device) = regions.iter().find(|region| region.range().contains(&at)) {
        let offset = at - device.gpa();
        let len = end.min(device.range().end) - at;
        return refuse(
            format!("{at:#x} is not RAM but byte {offset:#x} of {}", device.name()),
            format!("ask for {} of {}", ByteRange::new(offset, len), device.name()),
        );
    }
    let what = layout::platform_part(at).unwrap_or("nothing");
    refuse(
        format!("{at:#x} is not RAM: {what} is there"),
        format!("name guest-physical addresses of RAM, which is at {}", ram.join(" and ")),
    )
}

/// Runs of guarded pages that `region` may cost: those that this host allows and other regions leave.
pub fn guard_room(space: &AddressSpace, region: &Region) -> usize {
    let others = space.regions().into_iter().filter(|other| other.gpa() != region.gpa());
    guard_limit().saturating_sub(others.map(|other| other.guard_state().runs).sum())
}

/// A range as requests and events name it.
pub fn byte_range(range: Range<u64>) -> ByteRange {
    ByteRange::new(range.start, range.end - range.start)
}

fn guard_error(error: GuardError) -> Error {
    let (code, remedy) = match &error {
        GuardError::OutOfRange { .. } => (ErrorCode::OutsideDevice, "name bytes of the device".to_owned()),
        GuardError::Departed { .. } => {
            (ErrorCode::WrongDeviceState, "name a device that is present".to_owned())
        }
        GuardError::Locked { .. } => {
            (ErrorCode::WrongDeviceState, "let the guest unlock the DIMM, or name another device".to_owned())
        }
        GuardError::TooScattered { wanted, .. } => (
            ErrorCode::HostLimit,
            format!(
                "poison fewer lines, or lines closer to each other, or set vm.max_map_count of the host to {} or more",
                wanted * MAPS_PER_RUN + SPARE_MAPS
            ),
        ),
        GuardError::Keep { .. } => {
            (ErrorCode::HostLimit, "make room where the poison is kept, or start without --state".to_owned())
        }
        GuardError::Map(_) => {
            (ErrorCode::HostLimit, "poison fewer or adjacent lines, or raise vm.max_map_count".to_owned())
        }
    };
    Error::new(code, chain(&error), remedy)
}

/// Separate runs of guarded pages that this host allows.
fn guard_limit() -> usize {
    let maps = std::fs::read_to_string("/proc/sys/vm/max_map_count")
        .ok()
        .and_then(|text| text.trim().parse::<usize>().ok())
        .unwrap_or(65_530);
    maps.saturating_sub(SPARE_MAPS) / MAPS_PER_RUN
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Backing;

    const GIB: u64 = 1 << 30;

    fn region(name: &str, kind: RegionKind, gpa: u64, len: u64) -> Arc<Region> {
        let file = tempfile::tempfile().unwrap();
        file.set_len(len).unwrap();
        Arc::new(Region::new(name, kind, gpa, len, Backing { file, offset: 0, writable: true }).unwrap())
    }

    fn machine() -> (AddressSpace, Target) {
        let space = AddressSpace::default();
        let ram = vec![
            region("ram", RegionKind::Ram, 0, 1 << 20),
            region("ram", RegionKind::Ram, 1 << 20, 1 << 20),
            region("ram", RegionKind::Ram, 4 * GIB, 1 << 20),
        ];
        for region in &ram {
            space.insert(region.clone()).unwrap();
        }
        space.insert(region("p0", RegionKind::Pmem, 5 * GIB, 1 << 20)).unwrap();
        (space, Target { id: RAM.to_owned(), regions: ram })
    }

    #[test]
    fn the_guard_limit_leaves_maps_for_the_rest() {
        assert!(guard_limit() > 1000);
    }

    #[test]
    fn a_range_of_ram_is_one_of_guest_physical_addresses_and_may_span_regions() {
        let (space, ram) = machine();
        let ranges = [ByteRange::new(0xf_ff80, 0x100), ByteRange::new(4 * GIB + 0x40, 1)];
        let pieces = ram.pieces(&ranges, &space).unwrap();
        let named: Vec<_> = pieces
            .iter()
            .map(|piece| (piece.region.gpa(), piece.range.clone(), piece.named(piece.range.clone())))
            .collect();
        assert_eq!(
            named,
            vec![
                (0, 0xf_ff80..0x10_0000, ByteRange::new(0xf_ff80, 0x80)),
                (1 << 20, 0..0x80, ByteRange::new(0x10_0000, 0x80)),
                (4 * GIB, 0x40..0x41, ByteRange::new(4 * GIB + 0x40, 1)),
            ]
        );
    }

    #[test]
    fn what_is_not_ram_is_refused_by_the_name_of_what_is_there() {
        let (space, ram) = machine();
        let refused = |offset, length| {
            let error =
                ram.pieces(&[ByteRange::new(0, 64), ByteRange::new(offset, length)], &space).err().unwrap();
            assert_eq!(error.code, ErrorCode::OutsideDevice);
            error.to_string()
        };
        assert_eq!(
            refused(5 * GIB + 0x1240, 64),
            "0x140001240 is not RAM but byte 0x1240 of p0; ask for 0x1240+64 of p0"
        );
        let ram_is = "name guest-physical addresses of RAM, which is at 0x0 to 0x100000 and 0x100000 to 0x200000 and 0x100000000 to 0x100100000";
        assert_eq!(
            refused(0x1f_ffc0, 128),
            format!("0x200000 is not RAM: nothing is there; {ram_is}"),
            "the part beyond the end is named"
        );
        assert_eq!(
            refused(0xC000_0000, 64),
            format!("0xc0000000 is not RAM: PCI Express configuration space (ECAM) is there; {ram_is}")
        );
        assert_eq!(refused(64, 0), "The range 0x40+0 has no bytes; name at least one byte of RAM");
        assert_eq!(
            refused(u64::MAX, 2),
            "The range 0xffffffffffffffff+2 has no bytes; name at least one byte of RAM"
        );
    }
}
