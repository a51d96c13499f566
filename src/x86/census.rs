//! Who still maps a range of guest-physical memory: the page tables of all processes and of the kernel, walked.
//!
//! The roots are found in memory. Every process of a kernel that maps itself into each of them (Linux does) has the same
//! entries in the upper half of its top table; so any page that repeats those of a vCPU's own table is a top table too
//! (Linux `clone_pgd_range` in `pgd_ctor`, arch/x86/mm/pgtable.c). One line of each page is enough to rule nearly all
//! of them out. A top table of a process that has ended has an empty lower half, and adds nothing.
//!
//! A guest can write anything into its tables: point them at themselves, or share one a million times. What is below a
//! table without a mapping of the range is remembered, so nothing is looked into twice in vain; and what is looked into
//! is counted, and ends at [`MOST_TABLES`], which the result says.

use std::collections::HashSet;
use std::ops::Range;

use super::walk::{Mode, Paging};

/// Words in a table.
pub const WORDS: usize = 512;
/// The first entry of a top table that belongs to the kernel.
const KERNEL_HALF: usize = WORDS / 2;
/// Mappings, of whatever size, that are listed; runs that continue each other count once.
pub const MOST_MAPPINGS: usize = 4096;
/// Tables that are read at most.
pub const MOST_TABLES: u64 = 1 << 21;

const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const LARGE: u64 = 1 << 7;
/// Bits 51:12: the frame.
const FRAME: u64 = 0x000f_ffff_ffff_f000;

/// What entries for the same have in common: accessed and dirty bits differ from table to table.
const SAME: u64 = FRAME | PRESENT;

/// A table of the guest.
pub type Table = [u64; WORDS];

/// Guest memory as a census reads it.
pub trait TableMemory {
    /// Reads the 4 KiB at `gpa`, which is a multiple of that, as a table. False where there is no memory.
    fn table(&self, gpa: u64, table: &mut Table) -> bool;

    /// The pages that hold something, as ranges of guest-physical addresses.
    fn occupied(&self) -> Vec<Range<u64>>;

    /// Calls `found` for the address of each page in `range` whose words at `first` and `second` (indices of 64-bit
    /// words) are equal to `values` in the bits of `mask`.
    fn scan(
        &self,
        range: &Range<u64>,
        keys: [usize; 2],
        values: [u64; 2],
        mask: u64,
        found: &mut dyn FnMut(u64),
    ) {
        let mut table = [0; WORDS];
        let mut page = range.start;
        while page < range.end {
            if self.table(page, &mut table) && (0..2).all(|n| table[keys[n]] & mask == values[n]) {
                found(page);
            }
            page += 4096;
        }
    }
}

/// A run of pages that one address space maps into the range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// The top table through which it was found.
    pub root: u64,
    /// Virtual address of the first byte.
    pub va: u64,
    /// Its guest-physical address.
    pub gpa: u64,
    /// Number of bytes.
    pub bytes: u64,
    /// Bytes of each page.
    pub page_size: u64,
    /// Whether the entries of all levels permit writing.
    pub writable: bool,
}

/// What half of the address spaces maps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Half {
    /// Runs of pages, at most [`MOST_MAPPINGS`].
    pub mappings: Vec<Mapping>,
    /// Runs of pages beyond those.
    pub more: u64,
    /// Entries of page tables that map something of the range.
    pub entries: u64,
    /// Bytes of the range that they map, counted once for each entry.
    pub bytes: u64,
}

/// What a census has found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Findings {
    /// Top tables that were walked.
    pub roots: u64,
    /// Pages of memory that were looked at as possible top tables.
    pub pages: u64,
    /// Tables that were read.
    pub tables: u64,
    /// Whether everything was looked into.
    pub complete: bool,
    /// The half of processes.
    pub user: Half,
    /// The half of the kernel, which all address spaces share.
    pub kernel: Half,
}

/// Looks for mappings of `range` in all address spaces that `vcpus` or memory show.
pub fn census(memory: &impl TableMemory, vcpus: &[Paging], range: Range<u64>) -> Findings {
    census_within(memory, vcpus, range, MOST_TABLES)
}

fn census_within(memory: &impl TableMemory, vcpus: &[Paging], range: Range<u64>, most: u64) -> Findings {
    let mut search = Search {
        memory,
        range,
        levels: 0,
        most,
        clean: HashSet::new(),
        kernel: HashSet::new(),
        findings: Findings::default(),
    };
    search.findings.complete = true;
    let mut walked = HashSet::new();
    for paging in vcpus {
        search.levels = match paging.mode() {
            Mode::Level4 => 4,
            Mode::Level5 => 5,
            // A processor that has not begun, or a kernel that this does not know.
            Mode::Off => continue,
            Mode::Bits32 | Mode::Pae => {
                search.findings.complete = false;
                continue;
            }
        };
        let root = search.kernel_root(paging.cr3 & FRAME);
        if walked.insert(root) {
            search.root(root);
            for other in search.siblings(root) {
                if walked.insert(other) {
                    search.root(other);
                }
            }
        }
    }
    search.findings.roots = walked.len() as u64;
    search.findings
}

struct Search<'a, M> {
    memory: &'a M,
    range: Range<u64>,
    levels: u32,
    /// Tables that may be read.
    most: u64,
    /// Tables by address and level below which nothing of the range is mapped.
    clean: HashSet<(u64, u32)>,
    /// Kernel entries of top tables that have been walked, by index and frame.
    kernel: HashSet<(usize, u64)>,
    findings: Findings,
}

/// The way down to a table.
#[derive(Clone, Copy)]
struct Way {
    root: u64,
    va: u64,
    writable: bool,
    kernel: bool,
}

impl<M: TableMemory> Search<'_, M> {
    /// A kernel that hides itself from processes gives each two top tables side by side, of which the second has nearly
    /// nothing of the kernel (Linux `kernel_to_user_pgdp`): the first.
    ///
    /// All that the second has, the first has too, and what every entry into the kernel needs is the same in both (Linux
    /// `pti_clone_p4d`, arch/x86/mm/pti.c). A page that only happens to lie before a top table has nothing in common
    /// with it.
    fn kernel_root(&self, root: u64) -> u64 {
        let other = root & !0x1000;
        let (Some(own), Some(first)) = (self.kernel_half(root), self.kernel_half(other)) else { return root };
        let pairs = || own.iter().zip(&first).map(|(own, first)| (own & SAME, first & SAME));
        let shares = |(own, first): (u64, u64)| {
            own & first & PRESENT != 0
                && (own == first || self.levels == 5 && self.share_an_entry(own & FRAME, first & FRAME))
        };
        let larger = pairs().any(|(own, first)| own & PRESENT < first & PRESENT);
        let whole = pairs().all(|(own, first)| own & PRESENT <= first & PRESENT);
        if other != root && larger && whole && pairs().any(shares) { other } else { root }
    }

    fn kernel_half(&self, root: u64) -> Option<[u64; KERNEL_HALF]> {
        let mut table = [0; WORDS];
        let read = self.memory.table(root, &mut table);
        read.then(|| std::array::from_fn(|index| table[KERNEL_HALF + index]))
    }

    fn share_an_entry(&self, one: u64, other: u64) -> bool {
        let (mut first, mut second) = ([0; WORDS], [0; WORDS]);
        self.memory.table(one, &mut first)
            && self.memory.table(other, &mut second)
            && first.iter().zip(second).any(|(one, other)| one & PRESENT != 0 && (one ^ other) & SAME == 0)
    }

    /// All pages that are top tables of the kernel to which `root` belongs.
    fn siblings(&mut self, root: u64) -> Vec<u64> {
        let mut own = [0; WORDS];
        if !self.memory.table(root, &mut own) {
            return Vec::new();
        }
        let kernel: Vec<usize> = (KERNEL_HALF..WORDS).filter(|index| own[*index] & PRESENT != 0).collect();
        let (Some(&first), Some(&last)) = (kernel.first(), kernel.last()) else { return Vec::new() };
        let mut candidates = Vec::new();
        for range in self.memory.occupied() {
            self.findings.pages += (range.end - range.start) / 4096;
            let values = [own[first] & SAME, own[last] & SAME];
            self.memory.scan(&range, [first, last], values, SAME, &mut |page| candidates.push(page));
        }
        let mut table = [0; WORDS];
        candidates.retain(|page| {
            if !self.memory.table(*page, &mut table) {
                return false;
            }
            // Some entries are a process's own (its LDT), so not all need be the same.
            let same = kernel.iter().filter(|index| (table[**index] ^ own[**index]) & SAME == 0).count();
            2 * same > kernel.len()
        });
        candidates
    }

    fn root(&mut self, root: u64) {
        let mut table = [0; WORDS];
        if !self.read(root, &mut table) {
            return;
        }
        let shift = 12 + 9 * (self.levels - 1);
        for (index, &entry) in table.iter().enumerate().filter(|(_, entry)| **entry & PRESENT != 0) {
            let kernel = index >= KERNEL_HALF;
            if kernel && !self.kernel.insert((index, entry & FRAME)) {
                continue;
            }
            // Canonical: the highest bit that is used is repeated above.
            let above = if kernel { u64::MAX << (shift + 9) } else { 0 };
            let va = above | ((index as u64) << shift);
            let way = Way { root, va, writable: entry & WRITABLE != 0, kernel };
            self.below(entry & FRAME, self.levels - 1, way);
        }
    }

    /// Looks into the table of `level` at `gpa`. Whether anything of the range is mapped below it.
    fn below(&mut self, gpa: u64, level: u32, way: Way) -> bool {
        if self.clean.contains(&(gpa, level)) {
            return false;
        }
        let mut table = [0; WORDS];
        if !self.read(gpa, &mut table) {
            return false;
        }
        let shift = 12 + 9 * (level - 1);
        let size = 1u64 << shift;
        let mut found = false;
        for (index, &entry) in table.iter().enumerate() {
            if entry & PRESENT == 0 {
                continue;
            }
            let leaf = level == 1 || (entry & LARGE != 0 && level <= 3);
            let at = entry & FRAME & if leaf { !(size - 1) } else { !0 };
            let inner = Way {
                va: way.va | ((index as u64) << shift),
                writable: way.writable && entry & WRITABLE != 0,
                ..way
            };
            if !leaf {
                found |= self.below(at, level - 1, inner);
            } else if at < self.range.end && self.range.start < at.saturating_add(size) {
                found = true;
                self.note(inner, at, size);
            }
        }
        if !found && self.findings.complete {
            self.clean.insert((gpa, level));
        }
        found
    }

    fn read(&mut self, gpa: u64, table: &mut Table) -> bool {
        if self.findings.tables >= self.most {
            self.findings.complete = false;
            return false;
        }
        self.findings.tables += 1;
        self.memory.table(gpa, table)
    }

    /// Notes what a leaf entry maps of the range.
    fn note(&mut self, way: Way, at: u64, size: u64) {
        let start = at.max(self.range.start);
        let bytes = (at + size).min(self.range.end) - start;
        let half = if way.kernel { &mut self.findings.kernel } else { &mut self.findings.user };
        half.entries += 1;
        half.bytes += bytes;
        let va = way.va + (start - at);
        let Way { root, writable, .. } = way;
        let next = Mapping { root, va, gpa: start, bytes, page_size: size, writable };
        let continues = |last: &Mapping| {
            (last.root, last.writable, last.page_size) == (root, writable, size)
                && (last.va + last.bytes, last.gpa + last.bytes) == (va, start)
        };
        let room = half.mappings.len() < MOST_MAPPINGS;
        match half.mappings.last_mut() {
            Some(last) if continues(last) => last.bytes += bytes,
            _ if room => half.mappings.push(next),
            _ => half.more += 1,
        }
    }
}

#[cfg(test)]
#[path = "census_test.rs"]
mod tests;
