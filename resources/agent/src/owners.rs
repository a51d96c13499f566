//! Which processes have certain pages: `aconite-agent owners VA:GPA...` prints an [`Owner`] a line for each process
//! that has the memory at guest-physical address GPA at its virtual address VA. With `VA` alone, a process is named that
//! has mapped a file or a device there: that a kernel can be asked of a page whose memory has departed, too.

use std::cell::OnceCell;
use std::fmt;
use std::fs;
use std::str::FromStr;

use crate::pagemap;

/// The name of the command.
pub const COMMAND: &str = "owners";

/// A process that has a page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Which of the pages that were asked for, counted from 0.
    pub page: usize,
    /// The process.
    pub pid: u32,
    /// Its name.
    pub name: String,
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.page, self.pid, self.name)
    }
}

impl FromStr for Owner {
    type Err = String;

    fn from_str(line: &str) -> Result<Self, String> {
        let wrong = || format!("{line:?} names no owner");
        let mut words = line.splitn(3, ' ');
        let mut next = || words.next().ok_or_else(wrong);
        let page = next()?.parse().map_err(|_| wrong())?;
        let pid = next()?.parse().map_err(|_| wrong())?;
        Ok(Self { page, pid, name: next()?.to_owned() })
    }
}

/// A page by its virtual address and, where it may be looked at, its guest-physical one.
pub type Page = (u64, Option<u64>);

/// Reads `VA:GPA` or `VA`.
///
/// # Errors
/// It is neither, in words.
pub fn page(text: &str) -> Result<Page, String> {
    match text.split_once(':') {
        Some((va, gpa)) => Ok((pagemap::number(va)?, Some(pagemap::number(gpa)?))),
        None => Ok((pagemap::number(text)?, None)),
    }
}

/// Whether these lines of `/proc/PID/maps` have a file or a device at `va`.
fn file_at(maps: &str, va: u64) -> bool {
    maps.lines().any(|line| {
        let mut words = line.split_whitespace();
        let range = words.next().and_then(|range| {
            let (start, end) = range.split_once('-')?;
            Some(u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?)
        });
        // After permissions, offset and device comes the inode, 0 if there is none.
        range.is_some_and(|range| range.contains(&va)) && words.nth(3).is_some_and(|inode| inode != "0")
    })
}

/// The processes that have `pages`.
pub fn owners(pages: &[Page]) -> Vec<Owner> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let mut found = Vec::new();
    for pid in pids {
        // A process that ends meanwhile has nothing any more, and one without the page is not its owner.
        let maps = OnceCell::new();
        let has = |va, gpa| match gpa {
            Some(gpa) => pagemap::look_up(pid, va, 1).is_ok_and(|pieces| pieces[0].gpa == gpa),
            None => file_at(
                maps.get_or_init(|| fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default()),
                va,
            ),
        };
        let its = pages.iter().enumerate().filter(|(_, (va, gpa))| has(*va, *gpa));
        let its: Vec<usize> = its.map(|(page, _)| page).collect();
        if !its.is_empty() {
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            found.extend(its.iter().map(|&page| Owner { page, pid, name: name.trim().to_owned() }));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owners_are_written_and_read() {
        let owner = Owner { page: 3, pid: 77, name: "a b".into() };
        assert_eq!(owner.to_string(), "3 77 a b");
        assert_eq!(owner.to_string().parse(), Ok(owner));
        assert!("3 77".parse::<Owner>().is_err());
        assert_eq!(page("0x1000:4096"), Ok((4096, Some(4096))));
        assert_eq!(page("4096"), Ok((4096, None)));
        assert!(page("4096:").is_err() && page("x").is_err());
    }

    #[test]
    fn files_are_found_by_their_addresses() {
        let maps = "7fe737e92000-7fe738092000 rw-s 00000000 103:00 12    /mnt/data\n\
                    7fe738092000-7fe7380b3000 rw-p 00000000 00:00 0 \n\
                    7ffd042ef000-7ffd04310000 rw-p 00000000 00:00 0    [stack]\n";
        assert!(file_at(maps, 0x7fe7_37e9_2000) && file_at(maps, 0x7fe7_3809_1fff));
        assert!(!file_at(maps, 0x7fe7_3809_2000) && !file_at(maps, 0x7ffd_0430_0000) && !file_at(maps, 0));
    }

    #[test]
    fn this_process_has_its_own_pages() {
        let byte = Box::new(7u8);
        let va = &raw const *byte as u64;
        // Frames are hidden from those who are not root; then nobody is found.
        let Ok(pieces) = pagemap::look_up(std::process::id(), va, 1) else { return };
        let found = owners(&[(0, Some(1)), (va, Some(pieces[0].gpa))]);
        assert!(found.iter().any(|owner| owner.page == 1 && owner.pid == std::process::id()), "{found:?}");
        assert!(found.iter().all(|owner| owner.page == 1));
    }
}
