//! The workload `crowd`: one of many processes that use a mapped file at once, as [`aconite_agent::crowd`] describes it.

use std::io::{self, Write};
use std::path::Path;
use std::thread;
use std::time::Duration;

use aconite_agent::crowd::{Kind, Note};
use aconite_agent::workload::{Source, WORD, pattern};

use crate::workload_mapping::Mapping;
use crate::workload_probe as probe;

const PAGE: u64 = 4096;
/// Between two rounds, so that a guest with many such processes has time for other things.
const REST: Duration = Duration::from_millis(200);
/// The same, for those that are to race with the end of the pages.
const SHORT_REST: Duration = Duration::from_millis(5);

/// Uses the file until the process is killed.
pub fn run(file: &Path, number: u64, kind: Kind) -> io::Result<()> {
    probe::catch_signals()?;
    let mapping = match kind {
        Kind::Copy => Mapping::private(file)?,
        _ => Mapping::new(&Source::File(file.to_owned()))?,
    };
    let mut member = Member::new(mapping, number, kind)?;
    let mut out = io::stdout().lock();
    let mut said = Vec::new();
    loop {
        let mut notes = member.round()?;
        notes.extend(probe::notice().map(Note::from));
        notes.push(Note::AtWork);
        for note in notes {
            if !said.contains(&note) {
                writeln!(out, "{note}")?;
                said.push(note);
            }
        }
        if said.iter().any(|note| note.is_refusal()) {
            loop {
                thread::park();
            }
        }
        thread::sleep(if kind == Kind::Splice { SHORT_REST } else { REST });
    }
}

struct Member {
    mapping: Mapping,
    kind: Kind,
    /// Offset of its own page, and the word that it has stored there last.
    own: u64,
    last: u64,
}

impl Member {
    fn new(mapping: Mapping, number: u64, kind: Kind) -> io::Result<Self> {
        let pages = mapping.length() / PAGE;
        if pages == 0 {
            return Err(io::Error::other("the file is shorter than a page"));
        }
        let own = number % pages * PAGE;
        Ok(Self { mapping, kind, own, last: pattern(own) })
    }

    /// Does once what its kind does, and returns what it met.
    fn round(&mut self) -> io::Result<Vec<Note>> {
        Ok(match self.kind {
            Kind::Write => self.rewrite(),
            Kind::Read => self.read(None),
            Kind::Copy => [self.rewrite(), self.read(Some(self.own))].concat(),
            Kind::Splice => self.splice()?,
        })
    }

    /// Compares the word of its own, and stores another one.
    fn rewrite(&mut self) -> Vec<Note> {
        let mut notes = Vec::from_iter(self.compare(self.own, self.last));
        let next = self.last.wrapping_add(1);
        match self.mapping.store(self.own, next).expect("a word of the file") {
            Ok(()) => self.last = next,
            Err(signal) => notes.push(signal.into()),
        }
        notes
    }

    /// Compares a word that nobody stores to, in every page but one.
    fn read(&self, but: Option<u64>) -> Vec<Note> {
        let pages = (0..self.mapping.length()).step_by(PAGE as usize);
        let words = pages.filter(|page| Some(*page) != but).map(|page| page + WORD);
        words.filter_map(|word| self.compare(word, pattern(word))).collect()
    }

    fn compare(&self, at: u64, expected: u64) -> Option<Note> {
        match self.mapping.load(at).expect("a word of the file") {
            Ok((word, _)) if word == expected => None,
            Ok((u64::MAX, _)) => Some(Note::Ones),
            Ok((word, _)) => Some(Note::Found(word)),
            Err(signal) => Some(signal.into()),
        }
    }

    fn splice(&self) -> io::Result<Vec<Note>> {
        let too_long = || io::Error::other("the file is longer than a pipe");
        let (result, signal) = self.mapping.splice(0, self.mapping.length()).ok_or_else(too_long)??;
        let error = i32::try_from(-result).ok().filter(|errno| *errno > 0).map(Note::Errno);
        Ok(signal.map(Note::from).into_iter().chain(error).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use aconite_agent::workload::{SIGBUS, pattern_bytes};
    use std::fs::{self, File};

    #[test]
    fn processes_say_what_they_meet() {
        let _turn = probe::TURNS.lock().unwrap();
        probe::catch_signals().unwrap();
        let path = std::env::temp_dir().join(format!("aconite-crowd-{}", std::process::id()));
        fs::write(&path, pattern_bytes(0, 3 * PAGE as usize)).unwrap();
        let member = |kind, number| {
            let mapping = match kind {
                Kind::Copy => Mapping::private(&path),
                _ => Mapping::new(&Source::File(path.clone())),
            };
            Member::new(mapping.unwrap(), number, kind).unwrap()
        };
        let kinds = [Kind::Write, Kind::Read, Kind::Copy, Kind::Splice];
        let mut members: Vec<Member> = (3..).zip(kinds).map(|(number, kind)| member(kind, number)).collect();
        for member in members.iter_mut().chain(&mut [member(Kind::Write, 1)]) {
            assert_eq!(
                [member.round().unwrap(), member.round().unwrap()],
                [vec![], vec![]],
                "{:?}",
                member.kind
            );
        }
        assert_eq!(members[1].mapping.load(0).unwrap().unwrap().0, pattern(0) + 2, "the writer's page");

        let store = |at, word| members[1].mapping.store(at, word).unwrap().unwrap();
        store(0, u64::MAX);
        store(PAGE + WORD, 5);
        store(2 * PAGE + WORD, 6);
        let met: Vec<_> = members.iter_mut().map(|member| member.round().unwrap()).collect();
        // The copy is of page 2, whose word is its own.
        let expected = [vec![Note::Ones], vec![Note::Found(5), Note::Found(6)], vec![Note::Found(5)], vec![]];
        assert_eq!(met, expected);

        File::options().write(true).open(&path).unwrap().set_len(0).unwrap();
        let signal = Note::Signal(SIGBUS, libc::BUS_ADRERR);
        let met: Vec<_> = members.iter_mut().map(|member| member.round().unwrap()).collect();
        assert_eq!(met, [vec![signal; 2], vec![signal; 3], vec![signal; 4], vec![Note::Errno(libc::EFAULT)]]);
        fs::remove_file(path).unwrap();
    }
}
