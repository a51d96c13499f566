//! Bad lines of RAM in the state directory, as a module on the board stays bad when the machine is started again.
//!
//! The document is text, a line for each range of guest-physical addresses as requests name them. It is changed before
//! whoever poisons or cleans is answered. A machine with less RAM than the one before has no use for some of them; they
//! are kept for one that does.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use thiserror::Error;

use super::poison::{byte_range, guard_room};
use crate::memory::{AddressSpace, GuardError, PoisonKeeper, PoisonMap, RangeSet, RegionKind};
use crate::state::{Format, State, StateError};
use crate::units::ByteRange;

const NAME: &str = "ram.poison";
const FORMAT: Format = Format { kind: "ram-poison", version: 1 };

/// Why the bad lines of the last machine cannot be had.
#[derive(Debug, Error)]
pub enum BadRamError {
    /// They cannot be read.
    #[error(transparent)]
    State(#[from] StateError),
    /// They cannot be guarded.
    #[error(
        "RAM that the state directory says is bad cannot be guarded; give the host more maps, or remove {NAME} there"
    )]
    Guard(#[from] GuardError),
}

/// Makes the RAM of `space` as bad as `state` says, and keeps every change from now on. No vCPU runs yet, and all that
/// the guest starts from has been loaded: what lies in bad lines is lost.
///
/// # Errors
/// The document is damaged, or there is too much to guard on this host.
pub fn restore(state: &Arc<State>, space: &AddressSpace) -> Result<(), BadRamError> {
    let bad = match state.read(NAME, FORMAT)? {
        Some(text) => parse(&text).ok_or_else(|| state.foreign(NAME))?,
        None => RangeSet::default(),
    };
    let document = Arc::new(Document { state: state.clone(), bad: Mutex::new(bad.clone()) });
    for region in space.regions().into_iter().filter(|region| region.kind() == RegionKind::Ram) {
        let here: Vec<_> =
            bad.within(region.range()).map(|r| r.start - region.gpa()..r.end - region.gpa()).collect();
        region.poison(&here, guard_room(space, &region))?;
        region.keep_with(Arc::new(RegionOf { document: document.clone(), place: region.range() }));
    }
    Ok(())
}

/// The bad lines of all RAM, by guest-physical address.
#[derive(Debug)]
struct Document {
    state: Arc<State>,
    bad: Mutex<RangeSet>,
}

/// The part of one region.
#[derive(Debug)]
struct RegionOf {
    document: Arc<Document>,
    place: Range<u64>,
}

impl PoisonKeeper for RegionOf {
    fn keep(&self, poison: &PoisonMap) -> io::Result<()> {
        let mut bad = self.document.bad.lock().unwrap_or_else(PoisonError::into_inner);
        let mut next = bad.clone();
        next.remove(self.place.clone());
        next.extend(poison.iter().map(|r| self.place.start + r.start..self.place.start + r.end));
        self.document.state.write(NAME, FORMAT, &text(&next)).map_err(io::Error::other)?;
        *bad = next;
        Ok(())
    }
}

fn text(bad: &RangeSet) -> Vec<u8> {
    bad.iter().flat_map(|range| format!("{}\n", byte_range(range)).into_bytes()).collect()
}

fn parse(text: &[u8]) -> Option<RangeSet> {
    let text = std::str::from_utf8(text).ok()?;
    text.lines()
        .map(|line| {
            let range: ByteRange = line.parse().ok()?;
            Some(range.offset.0..range.end()?)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::memory::{Backing, LINE_SIZE, Region};
    use crate::state::{Damage, Locking};
    use crate::units::GIB;

    const SIZE: u64 = 1 << 20;

    fn ram(gpa: u64) -> Arc<Region> {
        let file = tempfile::tempfile().unwrap();
        file.set_len(SIZE).unwrap();
        let backing = Backing { file, offset: 0, writable: true };
        Arc::new(Region::new("ram", RegionKind::Ram, gpa, SIZE, backing).unwrap())
    }

    fn start(dir: &Path, places: &[u64]) -> Result<Vec<Arc<Region>>, BadRamError> {
        let state = Arc::new(State::open(dir, Locking::Elsewhere).unwrap());
        let space = AddressSpace::default();
        places.iter().for_each(|gpa| space.insert(ram(*gpa)).unwrap());
        restore(&state, &space)?;
        Ok(space.regions())
    }

    fn bad(region: &Region) -> Vec<Range<u64>> {
        region.poisoned(0..SIZE, 100)
    }

    #[test]
    fn bad_lines_outlive_the_machine_in_all_parts_of_ram() {
        let dir = tempfile::tempdir().unwrap();
        let places = [0, 4 * GIB];
        let first = start(dir.path(), &places).unwrap();
        first[0].poison(&[0x1240..0x1280], 10).unwrap();
        first[1].poison(&[0x40..0xc0, 0x8000..0x8001], 10).unwrap();
        first[1].clean(&[0x40..0x80]).unwrap();
        // Killed: nothing is written any more.
        let second = start(dir.path(), &places).unwrap();
        assert_eq!(bad(&second[0]), [0x1240..0x1280]);
        assert_eq!(bad(&second[1]), [0x80..0xc0, 0x8000..0x8000 + LINE_SIZE]);
        assert!(second[0].guards(0x1000) && second[1].guards(0x8000) && !second[1].guards(0x1000));
        let text = std::fs::read_to_string(dir.path().join(NAME)).unwrap();
        assert!(text.ends_with("\n0x1240+64\n0x100000080+64\n0x100008000+64\n"), "{text}");
        second.iter().for_each(|region| drop(region.clean(&[0..SIZE]).unwrap()));
        start(dir.path(), &places).unwrap().iter().for_each(|region| assert_eq!(bad(region), []));
    }

    #[test]
    fn lines_without_ram_wait_for_a_machine_that_has_it() {
        let dir = tempfile::tempdir().unwrap();
        start(dir.path(), &[0, 4 * GIB]).unwrap()[1].poison(&[0..1], 10).unwrap();
        start(dir.path(), &[0]).unwrap()[0].poison(&[64..65], 10).unwrap();
        let again = start(dir.path(), &[0, 4 * GIB]).unwrap();
        assert_eq!((bad(&again[0]), bad(&again[1])), (vec![64..128], vec![0..64]));
    }

    #[test]
    fn a_document_that_names_no_lines_is_refused_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        for content in ["0x", "0x40+0\n", "0xffffffffffffffff+64\n", "\u{7f}\n"] {
            let state = State::open(dir.path(), Locking::Elsewhere).unwrap();
            state.write(NAME, FORMAT, content.as_bytes()).unwrap();
            let error = start(dir.path(), &[0]).unwrap_err();
            let damaged =
                matches!(&error, BadRamError::State(StateError::Damaged { damage: Damage::Content, .. }));
            assert!(damaged, "{error}");
            assert_eq!(state.read(NAME, FORMAT).unwrap().unwrap(), content.as_bytes());
        }
    }
}
