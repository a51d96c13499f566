//! What of a device is durable, where that is less than what its guest has written.
//!
//! The guest works on a copy in memory; the device's own file has what was flushed, and nothing else. Which pages were
//! written since the last flush is known from KVM's log of dirty pages, and from the monitor itself for what it and its
//! devices write. A flush copies them, all of the device: a flush hint names a DIMM, and a DIMM's lines lie in every
//! page of an interleave set. What happens between two flushes is one of the outcomes that real memory may have, down
//! to the line: nothing of it becomes durable, or ([`Survivors::Some`]) some lines do.
//!
//! When the monitor itself is killed, the file has what was flushed, too.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use sha2::{Digest, Sha256};

use super::{LINE_SIZE, PAGE_SIZE, backing};

/// Bytes that are copied at once.
const CHUNK: u64 = 1 << 20;

/// Pages that the guest has written, as KVM tells them.
pub trait WriteLog: Send + Sync + std::fmt::Debug {
    /// The pages of the region that were written since the last call: a bit each, the lowest first.
    ///
    /// # Errors
    /// KVM does not tell.
    fn take(&self) -> io::Result<Vec<u64>>;
}

/// Which of the lines become durable that were written and not flushed when power goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Survivors {
    /// None.
    None,
    /// About half of them: which ones, and whether the first or the second is among them, is a matter of this number.
    Some {
        /// The same number lets the same lines survive.
        seed: u64,
    },
}

impl Survivors {
    fn includes(self, line: u64) -> bool {
        match self {
            Self::None => false,
            Self::Some { seed } => {
                Sha256::new().chain_update(seed.to_le_bytes()).chain_update(line.to_le_bytes()).finalize()[0]
                    & 1
                    == 1
            }
        }
    }
}

/// What a loss of power does to one device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Loss {
    /// Bytes of lines that were written, not flushed, and are lost. Lines whose bytes are the durable ones do not count.
    pub lost: u64,
    /// Bytes of those that were not flushed and are durable all the same.
    pub survived: u64,
}

/// The durable bytes of a device, and what is known of the others.
#[derive(Debug)]
pub struct Durable {
    file: File,
    working: File,
    len: u64,
    log: OnceLock<Arc<dyn WriteLog>>,
    /// Pages that the monitor has written, or that could not be made durable.
    dirty: Mutex<BTreeSet<u64>>,
    /// Whether there is power. Held for as long as a flush takes: the next one begins when all that this one has seen is
    /// durable.
    power: Mutex<bool>,
}

impl Durable {
    /// Makes the working copy of `file`, the first `len` bytes of which are what is durable.
    ///
    /// # Errors
    /// There is no memory for the copy, or the file cannot be read.
    pub fn new(file: File, len: u64) -> io::Result<Self> {
        let working = backing::anonymous(c"aconite-pmem-working", len).map_err(io::Error::other)?;
        let mut chunk = vec![0; CHUNK as usize];
        for data in backing::data(&file, 0, len) {
            for start in (data.start..data.end).step_by(CHUNK as usize) {
                let part = &mut chunk[..(data.end - start).min(CHUNK) as usize];
                file.read_exact_at(part, start)?;
                working.write_all_at(part, start)?;
            }
        }
        Ok(Self {
            file,
            working,
            len,
            log: OnceLock::new(),
            dirty: Mutex::default(),
            power: Mutex::new(true),
        })
    }

    /// The working copy.
    ///
    /// # Errors
    /// The host is out of descriptors.
    pub fn working(&self) -> io::Result<File> {
        self.working.try_clone()
    }

    /// Asks `log` from now on; the first one counts.
    pub(super) fn ask(&self, log: Arc<dyn WriteLog>) {
        let _ = self.log.set(log);
    }

    /// Takes note that the monitor has written `len` bytes at `offset`.
    pub(super) fn wrote(&self, offset: u64, len: u64) {
        let end = offset.saturating_add(len).min(self.len);
        self.dirty().extend((offset / PAGE_SIZE..end.div_ceil(PAGE_SIZE)).map(|page| page * PAGE_SIZE));
    }

    /// Makes durable what was written before the call, as long as there is power.
    ///
    /// # Errors
    /// The file cannot be written; what was to be flushed is not forgotten.
    pub(super) fn flush(&self) -> io::Result<()> {
        let power = self.power.lock().unwrap_or_else(PoisonError::into_inner);
        if !*power {
            return Ok(());
        }
        let pages = self.take()?;
        let mut bytes = [0; PAGE_SIZE as usize];
        let copied = pages.iter().try_for_each(|page| {
            self.working.read_exact_at(&mut bytes, *page)?;
            self.file.write_all_at(&bytes, *page)
        });
        let done = copied.and_then(|()| self.file.sync_data());
        if done.is_err() {
            self.dirty().extend(pages);
        }
        done
    }

    /// Lets the power go: what was not flushed is lost, but for `survivors`, and no flush does anything from now on.
    ///
    /// # Errors
    /// The file cannot be written.
    pub(super) fn cut(&self, survivors: Survivors) -> io::Result<Loss> {
        let mut power = self.power.lock().unwrap_or_else(PoisonError::into_inner);
        *power = false;
        let mut loss = Loss::default();
        let (mut new, mut old) = ([0; PAGE_SIZE as usize], [0; PAGE_SIZE as usize]);
        for page in self.take()? {
            self.working.read_exact_at(&mut new, page)?;
            self.file.read_exact_at(&mut old, page)?;
            let lines = new.chunks(LINE_SIZE as usize).zip(old.chunks(LINE_SIZE as usize));
            for (line, (new, old)) in (page..).step_by(LINE_SIZE as usize).zip(lines) {
                if new == old {
                    continue;
                }
                if survivors.includes(line) {
                    self.file.write_all_at(new, line)?;
                    loss.survived += LINE_SIZE;
                } else {
                    loss.lost += LINE_SIZE;
                }
            }
        }
        self.file.sync_data()?;
        Ok(loss)
    }

    /// The pages that were written since they were last taken, by whomever.
    fn take(&self) -> io::Result<BTreeSet<u64>> {
        let logged = self.log.get().map_or_else(|| Ok(Vec::new()), |log| log.take())?;
        let mut pages = std::mem::take(&mut *self.dirty());
        for (word, bits) in (0u64..).zip(logged) {
            let set = (0..u64::from(u64::BITS)).filter(|bit| bits >> bit & 1 == 1);
            pages.extend(set.map(|bit| (word * u64::from(u64::BITS) + bit) * PAGE_SIZE));
        }
        pages.retain(|page| *page < self.len);
        Ok(pages)
    }

    fn dirty(&self) -> std::sync::MutexGuard<'_, BTreeSet<u64>> {
        self.dirty.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEN: u64 = 256 * PAGE_SIZE;

    /// What KVM would tell.
    #[derive(Debug, Default)]
    struct Log(Mutex<Vec<u64>>);

    impl WriteLog for Log {
        fn take(&self) -> io::Result<Vec<u64>> {
            Ok(std::mem::take(&mut *self.0.lock().unwrap()))
        }
    }

    struct Bench {
        durable: Durable,
        log: Arc<Log>,
        file: File,
    }

    impl Bench {
        fn new() -> Self {
            let file = tempfile::tempfile().unwrap();
            file.set_len(LEN).unwrap();
            file.write_all_at(b"before", 5 * PAGE_SIZE).unwrap();
            let durable = Durable::new(file.try_clone().unwrap(), LEN).unwrap();
            let log = Arc::new(Log::default());
            durable.ask(log.clone());
            Self { durable, log, file }
        }

        /// The guest stores.
        fn store(&self, offset: u64, bytes: &[u8]) {
            self.durable.working.write_all_at(bytes, offset).unwrap();
            let mut log = self.log.0.lock().unwrap();
            log.resize(LEN.div_ceil(PAGE_SIZE * 64) as usize, 0);
            let page = offset / PAGE_SIZE;
            log[(page / 64) as usize] |= 1 << (page % 64);
        }

        fn durable(&self, offset: u64, len: usize) -> Vec<u8> {
            let mut bytes = vec![0; len];
            self.file.read_exact_at(&mut bytes, offset).unwrap();
            bytes
        }
    }

    #[test]
    fn what_was_there_is_in_the_copy_and_stores_are_durable_once_flushed() {
        let bench = Bench::new();
        let mut bytes = [0; 6];
        bench.durable.working.read_exact_at(&mut bytes, 5 * PAGE_SIZE).unwrap();
        assert_eq!(&bytes, b"before");
        bench.store(5 * PAGE_SIZE, b"behind");
        bench.store(200 * PAGE_SIZE + 8, b"far");
        assert_eq!(bench.durable(5 * PAGE_SIZE, 6), b"before");
        bench.durable.flush().unwrap();
        assert_eq!(bench.durable(5 * PAGE_SIZE, 6), b"behind");
        assert_eq!(bench.durable(200 * PAGE_SIZE + 8, 3), b"far");
    }

    #[test]
    fn a_cut_loses_what_was_not_flushed_and_says_how_much() {
        let bench = Bench::new();
        bench.store(0, b"flushed");
        bench.durable.flush().unwrap();
        bench.store(0, b"written");
        bench.store(64 * PAGE_SIZE, &[7; 130]);
        bench.store(5 * PAGE_SIZE, b"before");
        // What the monitor writes for a device or an instruction is in no log of KVM's.
        bench.durable.working.write_all_at(b"dma", 9 * PAGE_SIZE).unwrap();
        bench.durable.wrote(9 * PAGE_SIZE, 3);
        let loss = bench.durable.cut(Survivors::None).unwrap();
        assert_eq!(loss, Loss { lost: (1 + 3 + 1) * LINE_SIZE, survived: 0 });
        assert_eq!(bench.durable(0, 7), b"flushed");
        assert_eq!(bench.durable(64 * PAGE_SIZE, 130), [0; 130]);
        assert_eq!(bench.durable(9 * PAGE_SIZE, 3), [0; 3]);
        bench.store(0, b"too late");
        bench.durable.flush().unwrap();
        assert_eq!(bench.durable(0, 7), b"flushed");
    }

    #[test]
    fn survivors_are_whole_lines_and_a_seed_names_the_same_ones() {
        let survivors = |seed| {
            let bench = Bench::new();
            bench.store(0, &[9; PAGE_SIZE as usize]);
            let loss = bench.durable.cut(Survivors::Some { seed }).unwrap();
            assert_eq!(loss.lost + loss.survived, PAGE_SIZE);
            let lines: Vec<bool> =
                bench.durable(0, PAGE_SIZE as usize).chunks(64).map(|line| line == [9; 64]).collect();
            assert_eq!(lines.iter().filter(|there| **there).count() as u64, loss.survived / LINE_SIZE);
            assert!(bench.durable(0, PAGE_SIZE as usize).chunks(64).all(|l| l == [9; 64] || l == [0; 64]));
            lines
        };
        assert_eq!(survivors(1), survivors(1));
        assert_ne!(survivors(1), survivors(2));
        assert!(survivors(1).contains(&true) && survivors(1).contains(&false));
    }

    #[test]
    fn what_could_not_be_flushed_is_not_forgotten() {
        let bench = Bench::new();
        let read_only = File::open("/proc/self/exe").unwrap();
        let durable =
            Durable { file: read_only, ..Durable::new(bench.file.try_clone().unwrap(), LEN).unwrap() };
        durable.wrote(PAGE_SIZE, 1);
        assert!(durable.flush().is_err());
        assert_eq!(durable.take().unwrap(), BTreeSet::from([PAGE_SIZE]));
    }
}
