//! As much of ELF as it takes to pack a program: its loader, the libraries it names, where it wants them
//! looked for; and sections by name, for kernel modules. (System V ABI, chapters 4 and 5.)

/// What a program or library asks of the dynamic loader.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Dynamic {
    /// The loader (PT_INTERP); `None` in libraries and static programs.
    pub interpreter: Option<String>,
    /// Libraries by name (DT_NEEDED).
    pub needed: Vec<String>,
    /// Directories to search before the usual ones (DT_RPATH, DT_RUNPATH), as written.
    pub search: Vec<String>,
    /// The directories hold for the libraries of its libraries too (DT_RPATH).
    pub search_is_inherited: bool,
    /// It cancels or ends threads, for which glibc loads `libgcc_s.so.1` at run time.
    pub ends_threads: bool,
}

/// What a file is.
#[derive(Debug, PartialEq, Eq)]
pub enum Kind {
    /// A program or library for x86-64.
    Elf(Dynamic),
    /// ELF for another machine, or cut short.
    ForeignElf,
    /// A script: its interpreter and that one's argument, if any.
    Script(String, Option<String>),
    /// Anything else.
    Other,
}

const PT_LOAD: u32 = 1;
const PT_DYNAMIC: u32 = 2;
const PT_INTERP: u32 = 3;
const DT_NULL: u64 = 0;
const DT_NEEDED: u64 = 1;
const DT_STRTAB: u64 = 5;
const DT_STRSZ: u64 = 10;
const DT_RPATH: u64 = 15;
const DT_RUNPATH: u64 = 29;
const X86_64: u16 = 62;

/// Looks at the beginning and the headers of a file.
pub fn inspect(bytes: &[u8]) -> Kind {
    if let Some(script) = bytes.strip_prefix(b"#!") {
        let line = script.split(|byte| *byte == b'\n').next().unwrap_or_default();
        let line = String::from_utf8_lossy(&line[..line.len().min(255)]).trim().to_owned();
        let (interpreter, argument) = match line.split_once(char::is_whitespace) {
            Some((interpreter, argument)) => (interpreter.to_owned(), Some(argument.trim().to_owned())),
            None => (line, None),
        };
        return if interpreter.is_empty() { Kind::Other } else { Kind::Script(interpreter, argument) };
    }
    if !bytes.starts_with(b"\x7fELF") {
        return Kind::Other;
    }
    File::new(bytes).and_then(|file| file.dynamic()).map_or(Kind::ForeignElf, Kind::Elf)
}

/// The bytes of a section of an x86-64 ELF file; `None` when it is not there or cut short.
pub fn section<'a>(bytes: &'a [u8], name: &str) -> Option<&'a [u8]> {
    let file = File::new(bytes)?;
    let table = file.u64(0x28)?;
    let (size, count, names) = (file.u16(0x3A)?, file.u16(0x3C)?, file.u16(0x3E)?);
    let header = |index: u16| table.checked_add(u64::from(index) * u64::from(size));
    let contents = |header: u64| file.slice(file.u64(header + 0x18)?, file.u64(header + 0x20)?);
    let names = contents(header(names)?)?;
    (0..count).find_map(|index| {
        let header = header(index)?;
        let this = text(names.get(file.u32(header)? as usize..)?)?;
        if this == name { contents(header) } else { None }
    })
}

/// A 64-bit little-endian ELF file for x86-64. Offsets that lead nowhere give `None`.
struct File<'a>(&'a [u8]);

impl<'a> File<'a> {
    fn new(bytes: &'a [u8]) -> Option<File<'a>> {
        let file = File(bytes);
        let identity = file.slice(0, 6)?;
        (identity == b"\x7fELF\x02\x01" && file.u16(0x12)? == X86_64).then_some(file)
    }

    fn dynamic(&self) -> Option<Dynamic> {
        let table = self.u64(0x20)?;
        let (size, count) = (self.u16(0x36)?, self.u16(0x38)?);
        let mut found = Dynamic::default();
        let (mut loads, mut entries) = (Vec::new(), &[][..]);
        for index in 0..count {
            let header = table.checked_add(u64::from(index) * u64::from(size))?;
            let (offset, address, length) =
                (self.u64(header + 0x08)?, self.u64(header + 0x10)?, self.u64(header + 0x20)?);
            match self.u32(header)? {
                PT_LOAD => loads.push((address, offset, length)),
                PT_DYNAMIC => entries = self.slice(offset, length)?,
                PT_INTERP => found.interpreter = Some(text(self.slice(offset, length)?)?.to_owned()),
                _ => {}
            }
        }
        let entry = |pair: &[u8]| -> Option<(u64, u64)> {
            Some((
                u64::from_le_bytes(pair.get(..8)?.try_into().ok()?),
                u64::from_le_bytes(pair.get(8..)?.try_into().ok()?),
            ))
        };
        let entries: Vec<(u64, u64)> =
            entries.chunks_exact(16).map_while(entry).take_while(|(tag, _)| *tag != DT_NULL).collect();
        let value = |wanted| entries.iter().find(|(tag, _)| *tag == wanted).map(|(_, value)| *value);
        let Some(address) = value(DT_STRTAB) else { return Some(found) };
        let (start, offset, _) = *loads
            .iter()
            .find(|(start, _, length)| (*start..start.saturating_add(*length)).contains(&address))?;
        let strings = self.slice(offset.checked_add(address - start)?, value(DT_STRSZ)?)?;
        let string = |at: u64| text(strings.get(usize::try_from(at).ok()?..)?);
        for (tag, value) in &entries {
            match *tag {
                DT_NEEDED => found.needed.push(string(*value)?.to_owned()),
                DT_RPATH | DT_RUNPATH => {
                    found.search.extend(string(*value)?.split(':').map(str::to_owned));
                    found.search_is_inherited = *tag == DT_RPATH;
                }
                _ => {}
            }
        }
        found.ends_threads =
            strings.split(|byte| *byte == 0).any(|name| name == b"pthread_cancel" || name == b"pthread_exit");
        Some(found)
    }

    fn slice(&self, offset: u64, length: u64) -> Option<&'a [u8]> {
        let start = usize::try_from(offset).ok()?;
        self.0.get(start..start.checked_add(usize::try_from(length).ok()?)?)
    }

    fn u16(&self, offset: u64) -> Option<u16> {
        Some(u16::from_le_bytes(self.slice(offset, 2)?.try_into().ok()?))
    }

    fn u32(&self, offset: u64) -> Option<u32> {
        Some(u32::from_le_bytes(self.slice(offset, 4)?.try_into().ok()?))
    }

    fn u64(&self, offset: u64) -> Option<u64> {
        Some(u64::from_le_bytes(self.slice(offset, 8)?.try_into().ok()?))
    }
}

/// A string that ends with a zero byte or with the bytes.
fn text(bytes: &[u8]) -> Option<&str> {
    std::str::from_utf8(bytes.split(|byte| *byte == 0).next()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_program_names_its_loader_and_libraries() {
        let Kind::Elf(shell) = inspect(&std::fs::read("/bin/sh").unwrap()) else {
            panic!("/bin/sh is not ELF")
        };
        assert!(shell.needed.iter().any(|name| name.starts_with("libc.so")), "{shell:?}");
        assert!(std::path::Path::new(&shell.interpreter.unwrap()).exists());
    }

    #[test]
    fn the_agent_needs_nothing() {
        let Kind::Elf(agent) = inspect(crate::guest::AGENT) else { panic!("the agent is not ELF") };
        assert_eq!((agent.interpreter, agent.needed.len()), (None, 0));
    }

    #[test]
    fn sections_are_found_by_name() {
        let shell = std::fs::read("/bin/sh").unwrap();
        let interpreter = section(&shell, ".interp").unwrap();
        assert!(interpreter.starts_with(b"/lib"));
        assert_eq!(section(&shell, ".no-such"), None);
    }

    #[test]
    fn scripts_name_their_interpreter() {
        assert_eq!(inspect(b"#!/bin/sh\necho"), Kind::Script("/bin/sh".into(), None));
        let expected = Kind::Script("/usr/bin/env".into(), Some("bash -e".into()));
        assert_eq!(inspect(b"#! /usr/bin/env bash -e\n"), expected);
        assert_eq!(inspect(b"#!\n"), Kind::Other);
        assert_eq!(inspect(b""), Kind::Other);
        assert_eq!(inspect(b"\x7fELF"), Kind::ForeignElf);
    }

    proptest! {
        #[test]
        fn damaged_files_do_no_harm(at in 0usize..4096, value: u64, length in 0usize..200_000) {
            let mut bytes = std::fs::read("/bin/sh").unwrap();
            bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
            bytes.truncate(length.max(8));
            let _ = inspect(&bytes);
            let _ = section(&bytes, ".interp");
        }
    }
}
