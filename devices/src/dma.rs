//! Guest memory as a device reaches it: inside the map, and free of poison, or an error.
//!
//! The map may be swapped while the machine runs (memory devices come and go), so a device holds a [`Dma`] and
//! takes a [`DmaView`], a snapshot, for each piece of work. What it means are the addresses as they were when the work
//! was begun: memory that has departed or come since is told from it by its generation. Every access of a view is checked against the map and
//! against the machine's poison. A view also implements [`GuestMemory`], so that crates written against that
//! trait (virtio-queue) go through the same checks.

use std::fmt;
use std::sync::Arc;

use thiserror::Error;
use vm_memory::guest_memory::GuestMemorySliceIterator;
use vm_memory::{
    ByteValued, Bytes, GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryAtomic, GuestMemoryBackend,
    GuestMemoryError, GuestMemoryLoadGuard, GuestMemoryMmap, GuestMemoryRegion, Permissions, bitmap::BS,
};

/// The protection bit of a host map that allows writing (`PROT_WRITE`, mmap(2)).
const PROT_WRITE: i32 = 2;

/// What is poisoned, as a device must see it.
pub trait PoisonView: Send + Sync {
    /// The guest-physical address of the first poisoned line that `[gpa, gpa + len)` touches.
    fn poisoned(&self, gpa: u64, len: u64) -> Option<u64>;

    /// Runs `transfer`, which checks and moves `[gpa, gpa + len)`, while nothing there becomes poisoned: who poisons
    /// waits for the transfers that have begun, and those that begin later see it.
    fn held(&self, gpa: u64, len: u64, transfer: &mut dyn FnMut()) {
        let _ = (gpa, len);
        transfer();
    }

    /// A number that changes when a transfer met memory of the host that is really bad, and moved zeros instead:
    /// what is poisoned is asked again then.
    fn losses(&self) -> u64 {
        0
    }

    /// A device's access met poison and failed.
    fn met(&self, access: &PoisonedAccess<'_>) {
        let _ = access;
    }

    /// The generation of the memory map: a number that grows whenever memory comes or goes, before that takes effect.
    fn generation(&self) -> u64 {
        0
    }

    /// Whether any of `[gpa, gpa + len)` belongs to memory that has departed, or that has come after `generation`:
    /// whoever named it then meant something else. Asked within [`Self::held`], it stays true until that ends.
    fn gone(&self, gpa: u64, len: u64, generation: u64) -> bool {
        let _ = (gpa, len, generation);
        false
    }

    /// A device's access met memory that is gone, and failed.
    fn late(&self, access: &LateAccess<'_>) {
        let _ = access;
    }
}

/// An access of a device to memory that is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LateAccess<'a> {
    /// The device, by the name that [`Dma::named`] gave.
    pub by: &'a str,
    /// Its first address.
    pub gpa: u64,
    /// Its length in bytes.
    pub len: u64,
    /// The generation in which the device was given the address.
    pub generation: u64,
    /// Whether the device wrote.
    pub write: bool,
}

/// An access of a device that met poison.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoisonedAccess<'a> {
    /// The device, by the name that [`Dma::named`] gave.
    pub by: &'a str,
    /// Its first address.
    pub gpa: u64,
    /// Its length in bytes.
    pub len: u64,
    /// The first poisoned line that it touches.
    pub line: u64,
    /// Whether the device wrote.
    pub write: bool,
}

/// A machine without poison.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoPoison;

impl PoisonView for NoPoison {
    fn poisoned(&self, _gpa: u64, _len: u64) -> Option<u64> {
        None
    }
}

/// Why a device could not reach guest memory. Nothing has been transferred.
#[derive(Debug, Error)]
pub enum DmaError {
    /// Part of the range is not memory.
    #[error("Device access to {gpa:#x}+{len:#x} is outside guest memory: the driver gave a wrong address")]
    OutOfRange {
        /// First address.
        gpa: u64,
        /// Length in bytes.
        len: u64,
    },
    /// The memory that the request named has departed, whether or not there is other memory at its address by now.
    #[error(
        "Device access to {gpa:#x}+{len:#x} came after its memory had departed: the driver must drop the request"
    )]
    Gone {
        /// First address.
        gpa: u64,
        /// Length in bytes.
        len: u64,
    },
    /// The range touches a poisoned line.
    #[error("Device access to {gpa:#x}+{len:#x} met poison at {line:#x}: clear it, or avoid the line")]
    Poisoned {
        /// First address.
        gpa: u64,
        /// Length in bytes.
        len: u64,
        /// The first poisoned line.
        line: u64,
    },
    /// The range is memory that nobody may write.
    #[error("Device write to {gpa:#x}+{len:#x} hits read-only memory: the driver must choose another buffer")]
    ReadOnly {
        /// First address.
        gpa: u64,
        /// Length in bytes.
        len: u64,
    },
    /// The map accepted the range and yet did not transfer it.
    #[error("Device access to {gpa:#x}+{len:#x} failed: see the cause")]
    Memory {
        /// First address.
        gpa: u64,
        /// Length in bytes.
        len: u64,
        /// What the map said.
        #[source]
        source: GuestMemoryError,
    },
}

/// A device's door to guest memory. Cheap to clone.
#[derive(Clone)]
pub struct Dma {
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
    poison: Arc<dyn PoisonView>,
    by: Arc<str>,
}

impl Dma {
    /// A door to `memory`, minding `poison`.
    pub fn new(memory: GuestMemoryAtomic<GuestMemoryMmap>, poison: Arc<dyn PoisonView>) -> Self {
        Self { memory, poison, by: Arc::from("platform") }
    }

    /// The same door for the device `name`, which is named with every access that meets poison.
    #[must_use]
    pub fn named(&self, name: &str) -> Self {
        Self { by: Arc::from(name), ..self.clone() }
    }

    /// The map as it is now. Take a new view for each piece of work: an old one does not see memory that comes.
    pub fn view(&self) -> DmaView {
        self.view_of(self.generation())
    }

    /// The generation of the memory map. A request that completes later keeps the one of its submission, and
    /// transfers through [`Self::view_of`] it.
    pub fn generation(&self) -> u64 {
        self.poison.generation()
    }

    /// The map as it is now, for a request that was submitted in `generation`: memory that has departed or come since
    /// is not what the request meant, so a transfer to it lands nowhere, fails and is reported.
    pub fn view_of(&self, generation: u64) -> DmaView {
        DmaView { memory: self.memory.memory(), generation, poison: self.poison.clone(), by: self.by.clone() }
    }

    /// Reads `[gpa, gpa + data.len())`. See [`DmaView::read`].
    ///
    /// # Errors
    /// As [`DmaView::read`].
    pub fn read(&self, gpa: u64, data: &mut [u8]) -> Result<(), DmaError> {
        self.view().read(gpa, data)
    }

    /// Writes `[gpa, gpa + data.len())`. See [`DmaView::write`].
    ///
    /// # Errors
    /// As [`DmaView::write`].
    pub fn write(&self, gpa: u64, data: &[u8]) -> Result<(), DmaError> {
        self.view().write(gpa, data)
    }
}

impl fmt::Debug for Dma {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dma").field("regions", &self.memory.memory().num_regions()).finish_non_exhaustive()
    }
}

/// One snapshot of the guest's memory map, with the poison that is current at each access.
#[derive(Clone)]
pub struct DmaView {
    memory: GuestMemoryLoadGuard<GuestMemoryMmap>,
    /// What memory was there when the work was begun.
    generation: u64,
    poison: Arc<dyn PoisonView>,
    by: Arc<str>,
}

impl DmaView {
    /// The generation whose memory it means.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Whether all of `[gpa, gpa + len)` is memory without poison. An empty range always is.
    ///
    /// # Errors
    /// [`DmaError::OutOfRange`], [`DmaError::Gone`] and [`DmaError::Poisoned`].
    pub fn check(&self, gpa: u64, len: u64) -> Result<(), DmaError> {
        if len == 0 {
            return Ok(());
        }
        let inside = gpa.checked_add(len - 1).is_some()
            && usize::try_from(len).is_ok_and(|length| {
                GuestMemoryBackend::check_range(&*self.memory, GuestAddress(gpa), length)
            });
        // As long as nothing comes or goes, what the map has is what the work meant.
        let changed = !inside || self.poison.generation() != self.generation;
        if changed && self.poison.gone(gpa, len, self.generation) {
            return Err(DmaError::Gone { gpa, len });
        }
        if !inside {
            return Err(DmaError::OutOfRange { gpa, len });
        }
        match self.poison.poisoned(gpa, len) {
            Some(line) => Err(DmaError::Poisoned { gpa, len, line }),
            None => Ok(()),
        }
    }

    /// As [`DmaView::check`], and all of the range may be written.
    ///
    /// # Errors
    /// As [`DmaView::check`], and [`DmaError::ReadOnly`].
    pub fn check_writable(&self, gpa: u64, len: u64) -> Result<(), DmaError> {
        self.check(gpa, len)?;
        let Some(length) = len.checked_sub(1) else { return Ok(()) };
        // A write through a read-only map would kill the monitor, so it is decided here.
        let read_only = self.memory.iter().any(|region| {
            let (first, last) = (region.start_addr().0, region.last_addr().0);
            region.prot() & PROT_WRITE == 0 && first <= gpa + length && gpa <= last
        });
        if read_only { Err(DmaError::ReadOnly { gpa, len }) } else { Ok(()) }
    }

    /// Reads `[gpa, gpa + data.len())`, all of it or nothing.
    ///
    /// # Errors
    /// [`DmaError`]; `data` is then unchanged, except after [`DmaError::Memory`] and where memory of the host is bad.
    pub fn read(&self, gpa: u64, data: &mut [u8]) -> Result<(), DmaError> {
        let len = data.len() as u64;
        self.transfer(gpa, len, Permissions::Read, |memory| memory.read_slice(data, GuestAddress(gpa)))
    }

    /// Writes `[gpa, gpa + data.len())`, all of it or nothing.
    ///
    /// # Errors
    /// [`DmaError`]; memory is then unchanged, except after [`DmaError::Memory`].
    pub fn write(&self, gpa: u64, data: &[u8]) -> Result<(), DmaError> {
        let len = data.len() as u64;
        self.transfer(gpa, len, Permissions::Write, |memory| memory.write_slice(data, GuestAddress(gpa)))
    }

    /// Checks and moves, with nothing becoming poisoned between.
    fn transfer(
        &self,
        gpa: u64,
        len: u64,
        access: Permissions,
        mut moved: impl FnMut(&GuestMemoryMmap) -> Result<(), GuestMemoryError>,
    ) -> Result<(), DmaError> {
        let mut result = Ok(());
        self.poison.held(gpa, len, &mut || {
            result = self.check_access(gpa, len, access).and_then(|()| {
                let losses = self.poison.losses();
                moved(&self.memory).map_err(|source| DmaError::Memory { gpa, len, source })?;
                if self.poison.losses() == losses { Ok(()) } else { self.check_access(gpa, len, access) }
            });
        });
        result.inspect_err(|error| self.report(error, access))
    }

    /// Tells the machine of an access that met poison, or memory that is gone.
    fn report(&self, error: &DmaError, access: Permissions) {
        let (by, write) = (&*self.by, access.has_write());
        match *error {
            DmaError::Poisoned { gpa, len, line } => {
                self.poison.met(&PoisonedAccess { by, gpa, len, line, write });
            }
            DmaError::Gone { gpa, len } => {
                self.poison.late(&LateAccess { by, gpa, len, generation: self.generation, write });
            }
            _ => {}
        }
    }

    fn check_access(&self, gpa: u64, len: u64, access: Permissions) -> Result<(), DmaError> {
        if access.has_write() { self.check_writable(gpa, len) } else { self.check(gpa, len) }
    }

    /// Reads one value at `gpa`.
    ///
    /// # Errors
    /// As [`DmaView::read`].
    pub fn read_obj<T: ByteValued + Default>(&self, gpa: u64) -> Result<T, DmaError> {
        let mut value = T::default();
        self.read(gpa, value.as_mut_slice())?;
        Ok(value)
    }

    /// Writes one value at `gpa`.
    ///
    /// # Errors
    /// As [`DmaView::write`].
    pub fn write_obj<T: ByteValued>(&self, gpa: u64, value: T) -> Result<(), DmaError> {
        self.write(gpa, value.as_slice())
    }
}

impl fmt::Debug for DmaView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DmaView").field("regions", &self.memory.num_regions()).finish_non_exhaustive()
    }
}

/// The checks of a view for code written against vm-memory: a range that [`DmaView::check`] refuses yields no
/// slice at all. Such code moves the few bytes of a queue's rings; poison that comes while it does counts as later.
impl GuestMemory for DmaView {
    type PhysicalMemory = GuestMemoryMmap;
    type Bitmap = ();

    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
        self.check_access(addr.0, count as u64, access).is_ok()
    }

    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, BS<'a, Self::Bitmap>>, GuestMemoryError> {
        self.check_access(addr.0, count as u64, access).map_err(|error| {
            self.report(&error, access);
            match error {
                DmaError::OutOfRange { .. } => GuestMemoryError::InvalidGuestAddress(addr),
                other => GuestMemoryError::IOError(std::io::Error::other(other)),
            }
        })?;
        Ok(GuestMemoryBackend::get_slices(&*self.memory, addr, count))
    }
}

#[cfg(test)]
pub(crate) mod testing {
    //! Guest memory for device tests.

    use std::sync::Mutex;

    use super::*;

    /// Poison that a test sets: 64-byte lines; what met it: device, first address, line, whether it wrote.
    #[derive(Default)]
    pub(crate) struct Lines(pub(crate) Mutex<Vec<u64>>, pub(crate) Mutex<Vec<(String, u64, u64, bool)>>);

    impl PoisonView for Lines {
        fn poisoned(&self, gpa: u64, len: u64) -> Option<u64> {
            let mut hits: Vec<u64> = self.0.lock().unwrap().clone();
            hits.retain(|line| *line < gpa + len && gpa < line + 64);
            hits.into_iter().min()
        }

        fn met(&self, access: &PoisonedAccess<'_>) {
            let met = (access.by.to_owned(), access.gpa, access.line, access.write);
            self.1.lock().unwrap().push(met);
        }
    }

    /// A door to fresh memory of the given ranges.
    pub(crate) fn dma(ranges: &[(u64, usize)]) -> (Dma, Arc<Lines>) {
        let ranges: Vec<_> = ranges.iter().map(|&(base, size)| (GuestAddress(base), size)).collect();
        let poison = Arc::new(Lines::default());
        let memory = GuestMemoryMmap::from_ranges(&ranges).unwrap();
        (Dma::new(GuestMemoryAtomic::new(memory), poison.clone()), poison)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::Ordering;

    use vm_memory::{GuestRegionMmap, MmapRegion};

    use super::testing::dma;
    use super::*;

    #[test]
    fn what_is_written_is_read_across_regions() {
        let (dma, _) = dma(&[(0, 0x1000), (0x1000, 0x1000)]);
        dma.write(0xffe, &[1, 2, 3, 4]).unwrap();
        let mut data = [0; 4];
        dma.read(0xffe, &mut data).unwrap();
        assert_eq!(data, [1, 2, 3, 4]);
        assert_eq!(dma.view().read_obj::<u16>(0xfff).unwrap(), 0x0302);
    }

    #[test]
    fn ranges_outside_memory_transfer_nothing() {
        let (dma, _) = dma(&[(0x1000, 0x1000), (0x3000, 0x1000)]);
        for gpa in [0, 0xfff, 0x1ffe, 0x2ffe, 0x3ffe, u64::MAX - 2, u64::MAX] {
            let mut data = [7; 4];
            assert!(matches!(dma.read(gpa, &mut data), Err(DmaError::OutOfRange { .. })), "{gpa:#x}");
            assert_eq!(data, [7; 4]);
            assert!(matches!(dma.write(gpa, &[1; 4]), Err(DmaError::OutOfRange { .. })));
        }
        assert_eq!(dma.view().read_obj::<u16>(0x1ffe).unwrap(), 0);
        dma.read(0, &mut []).unwrap();
        assert!(dma.view().check(0x1000, u64::MAX).is_err());
    }

    #[test]
    fn poison_stops_an_access_and_is_named() {
        let (dma, poison) = dma(&[(0, 0x2000)]);
        poison.0.lock().unwrap().push(0x1040);
        dma.read(0x1000, &mut [0; 0x40]).unwrap();
        let error = dma.read(0x1000, &mut [0; 0x41]).unwrap_err();
        assert!(matches!(error, DmaError::Poisoned { line: 0x1040, .. }), "{error}");
        assert!(matches!(dma.write(0x107f, &[1]), Err(DmaError::Poisoned { .. })));
        dma.write(0x1080, &[1]).unwrap();
    }

    #[test]
    fn who_meets_poison_is_named_each_time() {
        let (dma, poison) = dma(&[(0, 0x2000)]);
        poison.0.lock().unwrap().push(0x1040);
        let disk = dma.named("disk0");
        disk.read(0x1000, &mut [0; 0x41]).unwrap_err();
        disk.write(0x1078, &[1; 16]).unwrap_err();
        disk.view().load::<u16>(GuestAddress(0x1042), Ordering::Acquire).unwrap_err();
        disk.view().check(0x1040, 1).unwrap_err();
        disk.read(0x3000, &mut [0]).unwrap_err();
        let met = |gpa, write| ("disk0".to_owned(), gpa, 0x1040, write);
        assert_eq!(*poison.1.lock().unwrap(), [met(0x1000, false), met(0x1078, true), met(0x1042, false)]);
    }

    /// Memory of the host that goes bad under the first transfer.
    #[derive(Default)]
    struct Losing(std::sync::atomic::AtomicU64);

    impl PoisonView for Losing {
        fn poisoned(&self, gpa: u64, _len: u64) -> Option<u64> {
            (self.0.load(Ordering::Relaxed) > 1).then_some(gpa & !63)
        }

        fn losses(&self) -> u64 {
            self.0.fetch_add(1, Ordering::Relaxed)
        }
    }

    #[test]
    fn what_is_lost_under_a_transfer_makes_it_fail() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        let dma = Dma::new(GuestMemoryAtomic::new(memory), Arc::new(Losing::default()));
        let error = dma.read(0x48, &mut [0; 8]).unwrap_err();
        assert!(matches!(error, DmaError::Poisoned { line: 0x40, .. }), "{error}");
    }

    /// A machine whose memory from 0x1000 on came with generation 2, and from 0x2000 on departed with generation 3.
    #[derive(Default)]
    struct Changing(Mutex<Vec<(u64, bool)>>);

    impl PoisonView for Changing {
        fn poisoned(&self, _gpa: u64, _len: u64) -> Option<u64> {
            None
        }

        fn generation(&self) -> u64 {
            3
        }

        fn gone(&self, gpa: u64, len: u64, generation: u64) -> bool {
            let touches = |start: u64| gpa < start + 0x1000 && start < gpa + len;
            touches(0x2000) || (touches(0x1000) && generation < 2)
        }

        fn late(&self, access: &LateAccess<'_>) {
            assert_eq!(access.by, "disk0");
            self.0.lock().unwrap().push((access.gpa, access.write));
        }
    }

    #[test]
    fn what_is_submitted_in_one_generation_lands_in_no_other() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x2000)]).unwrap();
        let machine = Arc::new(Changing::default());
        let dma = Dma::new(GuestMemoryAtomic::new(memory), machine.clone()).named("disk0");
        assert_eq!(dma.generation(), 3);
        let old = dma.view_of(1);
        old.write(0xff8, &[1; 8]).unwrap();
        for gpa in [0xffc, 0x1000] {
            assert!(matches!(old.write(gpa, &[1; 8]), Err(DmaError::Gone { .. })), "{gpa:#x}");
        }
        assert!(matches!(dma.read(0x2000, &mut [0]), Err(DmaError::Gone { .. })));
        assert!(matches!(dma.read(0x3000, &mut [0]), Err(DmaError::OutOfRange { .. })));
        dma.write(0x1000, &[2; 8]).unwrap();
        assert_eq!(*machine.0.lock().unwrap(), [(0xffc, true), (0x1000, true), (0x2000, false)]);
        let mut data = [0; 0x10];
        dma.read(0xff8, &mut data).unwrap();
        assert_eq!(data, [1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2], "nothing old in what is new");
    }

    #[test]
    fn crates_on_vm_memory_meet_the_same_checks() {
        let (dma, poison) = dma(&[(0, 0x1000)]);
        poison.0.lock().unwrap().push(0x40);
        let view = dma.view();
        view.store(5u16, GuestAddress(0x10), Ordering::Release).unwrap();
        assert_eq!(view.load::<u16>(GuestAddress(0x10), Ordering::Acquire).unwrap(), 5);
        assert!(view.load::<u16>(GuestAddress(0x42), Ordering::Acquire).is_err());
        assert!(view.write_slice(&[0; 0x80], GuestAddress(0)).is_err());
        assert!(view.load::<u32>(GuestAddress(0xffe), Ordering::Acquire).is_err());
        assert!(!view.check_range(GuestAddress(0x30), 0x20, Permissions::Read));
    }

    #[test]
    fn read_only_memory_is_never_written() {
        const PROT_READ: i32 = 1;
        const ANONYMOUS_PRIVATE: i32 = 0x22;
        let map = MmapRegion::build(None, 0x1000, PROT_READ, ANONYMOUS_PRIVATE).unwrap();
        let region = |gpa, map| GuestRegionMmap::new(map, GuestAddress(gpa)).unwrap();
        let memory = GuestMemoryMmap::from_regions(vec![
            region(0, MmapRegion::new(0x1000).unwrap()),
            region(0x1000, map),
        ])
        .unwrap();
        let dma = Dma::new(GuestMemoryAtomic::new(memory), Arc::new(NoPoison));
        dma.read(0xffe, &mut [0; 4]).unwrap();
        for gpa in [0xffe, 0x1000, 0x1ffc] {
            assert!(matches!(dma.write(gpa, &[1; 4]), Err(DmaError::ReadOnly { .. })), "{gpa:#x}");
        }
        dma.write(0xffc, &[1; 4]).unwrap();
        dma.write(0x1000, &[]).unwrap();
        let view = dma.view();
        assert!(view.store(1u16, GuestAddress(0x1000), Ordering::Relaxed).is_err());
        assert!(view.load::<u16>(GuestAddress(0x1000), Ordering::Relaxed).is_ok());
    }

    #[test]
    fn a_new_view_sees_a_swapped_map() {
        let memory =
            GuestMemoryAtomic::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap());
        let dma = Dma::new(memory.clone(), Arc::new(NoPoison));
        let old = dma.view();
        memory
            .lock()
            .unwrap()
            .replace(GuestMemoryMmap::from_ranges(&[(GuestAddress(0x8000), 0x1000)]).unwrap());
        assert!(dma.read(0, &mut [0]).is_err());
        dma.read(0x8000, &mut [0]).unwrap();
        old.check(0, 1).unwrap();
    }
}
