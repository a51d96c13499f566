//! A census of page tables, natively: it needs memory that looks like a guest's, and no guest.
//!
//! 1 GiB of RAM, all of it written to, with the tables of a kernel and 200 processes at random places in it; each process
//! maps 16 pages of a device of 1 GiB. Beside it, the same memory read once from end to end.

use aconite::memory::{AddressSpace, Backing, GuestTables, Region, RegionKind, backing};
use aconite::x86::census::{TableMemory, WORDS, census};
use aconite::x86::walk::Paging;
use anyhow::{Context, Result, ensure};
use serde::Serialize;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vm_memory::VolatileMemory;

const RAM: u64 = 1 << 30;
const DEVICE: u64 = 1 << 32;
const PAGE: u64 = 4096;
const PROCESSES: u64 = 200;
/// Tables of the last level that each process has, half full.
const LEAVES: u64 = 24;
/// Pages of the device that each process maps.
const MAPPED: u64 = 16;
/// Tables of the last level of the kernel's own area, full.
const KERNEL_LEAVES: u64 = 512;
const ROUNDS: usize = 9;
/// What is wanted (resources/benchmarks.md).
const TARGET: Duration = Duration::from_millis(50);

/// What was measured.
#[derive(Debug, Serialize)]
pub struct Figures {
    /// Nanoseconds of the first census, whose memory this program had not mapped yet.
    first_ns: u64,
    /// The median of those after it.
    census_ns: u64,
    /// The median of a plain read of the same memory.
    read_ns: u64,
    /// Tables that a census reads.
    tables: u64,
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let milliseconds = |ns: u64| ns as f64 / 1e6;
        let (first, census, read) =
            (milliseconds(self.first_ns), milliseconds(self.census_ns), milliseconds(self.read_ns));
        writeln!(
            f,
            "census: 1 GiB of RAM, {PROCESSES} processes, {} tables, on this host itself",
            self.tables
        )?;
        writeln!(
            f,
            "    {census:.1} ms (first time {first:.1} ms), {:.2} of a plain read ({read:.1} ms); wanted: below {} ms",
            census / read,
            TARGET.as_millis()
        )
    }
}

/// Memory with tables in it.
struct Guest {
    ram: Arc<Region>,
    state: u64,
    taken: std::collections::HashSet<u64>,
}

impl Guest {
    /// A page that is used by nobody yet.
    fn page(&mut self) -> u64 {
        loop {
            self.state = self.state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let page = (self.state >> 20) % (RAM / PAGE) * PAGE;
            if self.taken.insert(page) {
                return page;
            }
        }
    }

    fn set(&self, table: u64, index: u64, entry: u64) -> Result<()> {
        self.ram.alias().get_ref((table + 8 * index) as usize)?.store(entry);
        Ok(())
    }

    fn table(&mut self) -> Result<u64> {
        let table = self.page();
        (0..WORDS as u64).try_for_each(|index| self.set(table, index, 0))?;
        Ok(table)
    }

    fn below(&mut self, table: u64, index: u64) -> Result<u64> {
        let next = self.table()?;
        self.set(table, index, next | 0x67)?;
        Ok(next)
    }

    /// The kernel's top table: text, a direct map by pages of 2 MiB of RAM and device, and an area of single pages.
    fn kernel(&mut self) -> Result<u64> {
        let top = self.table()?;
        let direct = self.below(top, 273)?;
        for gib in [0, DEVICE >> 30] {
            let directory = self.below(direct, gib)?;
            for index in 0..WORDS as u64 {
                self.set(directory, index, ((gib << 30) + (index << 21)) | 0xe3)?;
            }
        }
        let area = self.below(top, 402)?;
        let directory = self.below(area, 0)?;
        for leaf in 0..KERNEL_LEAVES {
            let table = self.below(directory, leaf)?;
            for index in 0..WORDS as u64 {
                self.set(table, index, ((leaf * 512 + index) % (RAM / PAGE) * PAGE) | 0x63)?;
            }
        }
        let text = self.below(top, 511)?;
        let directory = self.below(text, 510)?;
        self.set(directory, 0, 0x20_0000 | 0xe3)?;
        Ok(top)
    }

    fn process(&mut self, kernel: u64, number: u64) -> Result<()> {
        let top = self.table()?;
        for index in [273, 402, 511] {
            let entry: u64 = self.ram.alias().get_ref::<u64>((kernel + 8 * index) as usize)?.load();
            self.set(top, index, entry)?;
        }
        for half in 0..2 {
            let upper = self.below(top, 85 + 42 * half)?;
            let directory = self.below(upper, 1)?;
            for leaf in 0..LEAVES / 2 {
                let table = self.below(directory, leaf)?;
                for index in (0..WORDS as u64).step_by(2) {
                    self.set(table, index, ((index * 977 + number) % (RAM / PAGE) * PAGE) | 0x67)?;
                }
                if leaf + half == 0 {
                    for page in 0..MAPPED {
                        self.set(table, 2 * page + 1, (DEVICE + (number * MAPPED + page) * PAGE) | 0x67)?;
                    }
                }
            }
        }
        Ok(())
    }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// Measures.
pub fn measure() -> Result<Figures> {
    let file = backing::anonymous(c"census", RAM).context("Cannot have 1 GiB of memory")?;
    let region = || -> Result<Arc<Region>> {
        let backing = Backing { file: file.try_clone()?, offset: 0, writable: true };
        Ok(Arc::new(Region::new("ram", RegionKind::Ram, 0, RAM, backing)?))
    };
    let mut guest = Guest { ram: region()?, state: 1, taken: Default::default() };
    // A map of its own, that nothing was read through before.
    let space = AddressSpace::default();
    space.insert(region()?)?;
    for page in (0..RAM).step_by(PAGE as usize) {
        guest.set(page, 77, page | 1)?;
    }
    let kernel = guest.kernel()?;
    (0..PROCESSES).try_for_each(|number| guest.process(kernel, number))?;
    // Long mode with four levels (SDM volume 3, 5.1.1).
    let paging = Paging { cr0: 1 << 31 | 1, cr3: kernel, cr4: 1 << 5, efer: 1 << 10, physical_bits: 40 };

    let take = || -> Result<(u64, u64)> {
        let start = Instant::now();
        let found = census(&GuestTables::new(&space), &[paging], DEVICE..DEVICE + (1 << 30));
        let took = nanoseconds(start.elapsed());
        ensure!(found.complete && found.roots == PROCESSES + 1, "{} address spaces were found", found.roots);
        ensure!(found.user.entries == PROCESSES * MAPPED, "{} mappings were found", found.user.entries);
        ensure!(found.kernel.bytes == 1 << 30, "{} bytes of the kernel's were found", found.kernel.bytes);
        Ok((took, found.tables))
    };
    let (first_ns, tables) = take()?;
    let (mut censuses, mut reads) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        censuses.push(take()?.0);
        let memory = GuestTables::new(&space);
        let mut table = [0; WORDS];
        let start = Instant::now();
        let mut sum = 0u64;
        for page in (0..RAM).step_by(PAGE as usize) {
            memory.table(page, &mut table);
            sum = sum.wrapping_add(table[7]);
        }
        std::hint::black_box(sum);
        reads.push(nanoseconds(start.elapsed()));
    }
    censuses.sort_unstable();
    reads.sort_unstable();
    Ok(Figures { first_ns, census_ns: censuses[ROUNDS / 2], read_ns: reads[ROUNDS / 2], tables })
}
