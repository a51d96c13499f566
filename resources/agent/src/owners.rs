//! Which processes have certain pages: `aconite-agent owners VA:GPA...` prints an [`Owner`] a line for each process
//! that has the memory at guest-physical address GPA at its virtual address VA.

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

/// Reads `VA:GPA`.
///
/// # Errors
/// It is none, in words.
pub fn page(text: &str) -> Result<(u64, u64), String> {
    let (va, gpa) = text.split_once(':').ok_or_else(|| format!("{text:?} is no VA:GPA"))?;
    Ok((pagemap::number(va)?, pagemap::number(gpa)?))
}

/// The processes that have `pages`, virtual and guest-physical address of each.
pub fn owners(pages: &[(u64, u64)]) -> Vec<Owner> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let mut found = Vec::new();
    for pid in pids {
        // A process that ends meanwhile has nothing any more, and one without the page is not its owner.
        let has = |va, gpa| pagemap::look_up(pid, va, 1).is_ok_and(|pieces| pieces[0].gpa == gpa);
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
        assert_eq!(page("0x1000:4096"), Ok((4096, 4096)));
        assert!(page("4096").is_err());
    }

    #[test]
    fn this_process_has_its_own_pages() {
        let byte = Box::new(7u8);
        let va = &raw const *byte as u64;
        // Frames are hidden from those who are not root; then nobody is found.
        let Ok(pieces) = pagemap::look_up(std::process::id(), va, 1) else { return };
        let found = owners(&[(0, 1), (va, pieces[0].gpa)]);
        assert!(found.iter().any(|owner| owner.page == 1 && owner.pid == std::process::id()), "{found:?}");
        assert!(found.iter().all(|owner| owner.page == 1));
    }
}
