//! The workload `map`: a process that maps memory and does what its driver asks, line by line.
//! The lines are described in [`aconite_agent::workload`].

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use aconite_agent::workload::{OUTPUT, Reply, Request, Signal, Source, WORD, pattern, pattern_bytes};

use crate::sys;
use crate::workload_mapping::Mapping;
use crate::workload_probe as probe;
use crate::workload_ring::Ring;

/// Output of one command beyond which it is dropped.
const MOST_OUTPUT: u64 = 256 * 1024;
/// The most that is read or written at a time.
const MOST_BYTES: u64 = 1 << 30;

/// Serves requests from standard input until its end.
pub fn run() -> io::Result<()> {
    probe::catch_signals()?;
    let mut workload = Workload { mapping: None, ring: None };
    for line in io::stdin().lock().lines() {
        let line = line?;
        if line.trim().is_empty() {
            continue;
        }
        let mut output = Vec::new();
        let reply = match Request::parse(&line) {
            Ok(request) => workload.serve(request, &mut output),
            Err(why) => Reply::Wrong(why),
        };
        let mut out = io::stdout().lock();
        for line in String::from_utf8_lossy(&output).lines() {
            writeln!(out, "{OUTPUT}{line}")?;
        }
        writeln!(out, "{reply}")?;
        out.flush()?;
    }
    Ok(())
}

struct Workload {
    mapping: Option<Mapping>,
    ring: Option<Ring>,
}

impl Workload {
    fn serve(&mut self, request: Request, output: &mut Vec<u8>) -> Reply {
        let result = match request {
            Request::Create(path, length) => create(&path, length),
            Request::Map(source) => self.map(&source),
            Request::Unmap => match self.mapping.take() {
                Some(mapping) => mapping.undo().map(|()| Reply::Done),
                None => return no_mapping(),
            },
            Request::Locate(path, offset) => {
                File::open(path).and_then(|file| sys::locate(&file, offset)).map(Reply::At)
            }
            Request::Pin(offset, length) => {
                let Some(mapping) = &self.mapping else { return no_mapping() };
                self.ring = None;
                match mapping.part(offset, length) {
                    Some(address) => Ring::new(address, length).map(|ring| {
                        self.ring = Some(ring);
                        Reply::Done
                    }),
                    None => return Reply::Wrong(format!("The mapping has nothing like it at {offset:#x}")),
                }
            }
            Request::Unpin => {
                self.ring = None;
                Ok(Reply::Done)
            }
            Request::Deliver(path, at) => match &self.ring {
                Some(ring) => ring.read(&path, at).map(|result| Reply::Called(result.into(), None)),
                None => return Reply::Wrong("Nothing is pinned: ask for pin first".into()),
            },
            Request::Process => return Reply::Process(std::process::id()),
            Request::Early(on) => sys::set_early_kill(on).map(|()| Reply::Done),
            Request::Notice => return probe::notice().map_or(Reply::Done, Reply::Signal),
            Request::Read(path, offset, length) => read(&path, offset, length),
            Request::Write(path, offset, length) => write(&path, offset, length),
            Request::Run(seconds, command) => execute(&command, Duration::from_secs(seconds), output),
            access => match &self.mapping {
                Some(mapping) => touch(mapping, access),
                None => return no_mapping(),
            },
        };
        result.unwrap_or_else(|error| match error.raw_os_error() {
            Some(number) => Reply::Errno(number),
            None => Reply::Wrong(error.to_string()),
        })
    }

    fn map(&mut self, source: &Source) -> io::Result<Reply> {
        if let Some(old) = self.mapping.take() {
            old.undo()?;
        }
        let mapping = Mapping::new(source)?;
        let address = mapping.address();
        self.mapping = Some(mapping);
        Ok(Reply::At(address))
    }
}

/// Serves what needs a mapping.
fn touch(mapping: &Mapping, request: Request) -> io::Result<Reply> {
    let loaded = |result: Result<(u64, u64), Signal>| match result {
        Ok((word, rip)) => Reply::Loaded { word, rip },
        Err(signal) => Reply::Signal(signal),
    };
    let done = |result: Result<(), Signal>| result.map_or_else(Reply::Signal, |()| Reply::Done);
    let called = |(result, signal)| Reply::Called(result, signal);
    let (offset, reply) = match request {
        Request::Physical(offset) => (offset, mapping.physical(offset).transpose()?.map(Reply::At)),
        Request::Fill(offset, length) => (offset, mapping.fill(offset, length).map(done)),
        Request::Load(offset) => (offset, mapping.load(offset).map(loaded)),
        Request::Store(offset, word) => (offset, mapping.store(offset, word).map(done)),
        Request::Add(offset, word) => (offset, mapping.add(offset, word).map(loaded)),
        Request::Copy(offset, length) => {
            let compared = |bytes: Vec<u8>| compared(&bytes, offset, length);
            (offset, mapping.copy(offset, length).map(|copy| copy.map_or_else(Reply::Signal, compared)))
        }
        Request::Line(_) if !sys::has_movdir64b() => {
            return Ok(Reply::Wrong("The processor has no MOVDIR64B".into()));
        }
        Request::Line(offset) => (offset, mapping.line(offset).map(done)),
        Request::Execute(offset) => (offset, mapping.execute(offset).transpose()?.map(done)),
        Request::Send(offset, length) => (offset, mapping.send(offset, length).transpose()?.map(called)),
        Request::Receive(offset, length) => {
            (offset, mapping.receive(offset, length).transpose()?.map(called))
        }
        Request::Fetch(path, at, offset, length) => {
            (offset, mapping.direct(&path, at, offset, length, false).transpose()?.map(called))
        }
        Request::Put(path, at, offset, length) => {
            (offset, mapping.direct(&path, at, offset, length, true).transpose()?.map(called))
        }
        Request::Futex(offset) => (offset, mapping.futex(offset).map(called)),
        Request::Scan(offset, length) => (offset, scan(mapping, offset, length)),
        other => return Ok(Reply::Wrong(format!("{other} touches no mapping"))),
    };
    Ok(reply.unwrap_or_else(|| Reply::Wrong(format!("The mapping has nothing like it at {offset:#x}"))))
}

fn scan(mapping: &Mapping, offset: u64, length: u64) -> Option<Reply> {
    let (mut good, mut bad) = (0, 0);
    for at in (offset..offset.saturating_add(length)).step_by(WORD as usize) {
        match mapping.load(at)? {
            Ok((word, _)) if word == pattern(at) => good += 1,
            Ok(_) => bad += 1,
            Err(signal) => return Some(Reply::Signal(signal)),
        }
    }
    Some(Reply::Compared { good, bad })
}

fn no_mapping() -> Reply {
    Reply::Wrong("Nothing is mapped: ask for map first".into())
}

fn create(path: &Path, length: u64) -> io::Result<Reply> {
    let file = File::create(path)?;
    file.write_all_at(&pattern_bytes(0, size(length)?), 0)?;
    file.sync_all()?;
    Ok(Reply::Done)
}

fn read(path: &Path, offset: u64, length: u64) -> io::Result<Reply> {
    let mut bytes = vec![0; size(length)?];
    let count = File::open(path)?.read_at(&mut bytes, offset)?;
    Ok(compared(&bytes[..count], offset, length))
}

/// What `bytes`, read from `offset` of what has `length` bytes more, are made of.
fn compared(bytes: &[u8], offset: u64, length: u64) -> Reply {
    let expected = pattern_bytes(offset, bytes.len());
    let same = |(a, b): (&[u8], &[u8])| a == b;
    let words = bytes.chunks(WORD as usize).zip(expected.chunks(WORD as usize));
    let good = words.filter(|pair| same(*pair)).count() as u64;
    // What could not be read is not good.
    Reply::Compared { good, bad: length.div_ceil(WORD) - good }
}

fn write(path: &Path, offset: u64, length: u64) -> io::Result<Reply> {
    let file = OpenOptions::new().write(true).open(path)?;
    let count = file.write_at(&pattern_bytes(offset, size(length)?), offset)?;
    if count as u64 != length {
        return Ok(Reply::Wrong(format!("Only {count:#x} bytes were written")));
    }
    file.sync_all()?;
    Ok(Reply::Done)
}

fn size(length: u64) -> io::Result<usize> {
    match usize::try_from(length) {
        Ok(size) if length <= MOST_BYTES => Ok(size),
        _ => Err(io::Error::other(format!("{length:#x} bytes are more than {MOST_BYTES:#x}"))),
    }
}

fn execute(command: &str, limit: Duration, output: &mut Vec<u8>) -> io::Result<Reply> {
    let (mut source, sink) = io::pipe()?;
    let start = Instant::now();
    let mut child = Command::new("sh")
        .args(["-c", command])
        .stdin(Stdio::null())
        .stdout(sink.try_clone()?)
        .stderr(sink)
        .spawn()?;
    let (done, read) = mpsc::channel();
    // Left behind, with the pipe, when a process that cannot be killed keeps the other end open.
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = source.by_ref().take(MOST_OUTPUT).read_to_end(&mut bytes);
        let _ = done.send(bytes);
        let _ = io::copy(&mut source, &mut io::sink());
    });
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if start.elapsed() > limit {
            let _ = child.kill();
            return Ok(Reply::Timeout);
        }
        thread::sleep(Duration::from_millis(5));
    };
    // A process in the background may keep the output open; the command itself is done.
    *output = read.recv_timeout(Duration::from_secs(1)).unwrap_or_default();
    Ok(Reply::Exit(status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn serve(workload: &mut Workload, line: &str) -> (Reply, String) {
        let mut output = Vec::new();
        let reply = workload.serve(Request::parse(line).unwrap(), &mut output);
        (reply, String::from_utf8(output).unwrap())
    }

    #[test]
    fn a_file_is_made_mapped_read_and_written() {
        let path = std::env::temp_dir().join(format!("aconite-workload-{}", std::process::id()));
        let file = path.display();
        let mut workload = Workload { mapping: None, ring: None };
        let mut ask = |line: String| serve(&mut workload, &line).0;
        assert!(matches!(ask("load 0".into()), Reply::Wrong(_)));
        assert_eq!(ask(format!("create {file} 0x2000")), Reply::Done);
        assert!(matches!(ask(format!("map {file}")), Reply::At(_)));
        assert_eq!(ask("scan 0 0x2000".into()), Reply::Compared { good: 1024, bad: 0 });
        assert!(matches!(ask("load 0x18".into()), Reply::Loaded { word, .. } if word == pattern(0x18)));
        assert_eq!(ask("store 0x1000 5".into()), Reply::Done);
        assert_eq!(ask(format!("read {file} 0x1000 0x1000")), Reply::Compared { good: 511, bad: 1 });
        assert_eq!(ask(format!("write {file} 0x1000 0x1000")), Reply::Done);
        assert_eq!(ask("scan 0 0x2000".into()), Reply::Compared { good: 1024, bad: 0 });
        assert_eq!(ask(format!("read {file} 0x1f00 0x200")), Reply::Compared { good: 32, bad: 32 });
        assert_eq!(ask("read /no/such/file 0 8".into()), Reply::Errno(libc::ENOENT));
        assert!(matches!(ask("load 0x2000".into()), Reply::Wrong(_)));
        assert_eq!(ask("unmap".into()), Reply::Done);
        assert!(matches!(ask("unmap".into()), Reply::Wrong(_)));
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn what_is_pinned_outlives_its_mapping() {
        let path = std::env::temp_dir().join(format!("aconite-pinned-{}", std::process::id()));
        std::fs::write(&path, pattern_bytes(0, 8192)).unwrap();
        let mut workload = Workload { mapping: None, ring: None };
        let mut ask = |line: &str| serve(&mut workload, line).0;
        assert!(matches!(ask("deliver /dev/null 0"), Reply::Wrong(_)));
        assert!(matches!(ask("anonymous 0x2000"), Reply::At(_)));
        match ask("pin 0 0x2000") {
            // A system may forbid rings.
            Reply::Errno(libc::EPERM | libc::ENOSYS) => return,
            reply => assert_eq!(reply, Reply::Done),
        }
        assert_eq!(ask("store 8 1"), Reply::Done);
        assert!(matches!(ask("pin 0x1000 0x2000"), Reply::Wrong(_)));
        assert_eq!(ask("pin 0 0x2000"), Reply::Done);
        let deliver = format!("deliver {} 0", path.display());
        if ask(&deliver) == Reply::Called(0x2000, None) {
            assert_eq!(ask("scan 0 0x2000"), Reply::Compared { good: 1024, bad: 0 });
        }
        assert_eq!(ask("unmap"), Reply::Done);
        assert!(matches!(ask(&deliver), Reply::Called(0x2000, None) | Reply::Errno(libc::EINVAL)));
        assert_eq!(ask("unpin"), Reply::Done);
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn commands_are_run_and_ended() {
        let mut workload = Workload { mapping: None, ring: None };
        let mut ask = |line: &str| serve(&mut workload, line);
        assert_eq!(ask("run 10 echo\\040a;echo\\040b>&2"), (Reply::Exit(0), "a\nb\n".into()));
        assert_eq!(ask("run 10 exit\\0403").0, Reply::Exit(3));
        assert_eq!(ask("run 10 kill\\040-9\\040$$").0, Reply::Exit(137));
        assert_eq!(ask("run 0 sleep\\04020").0, Reply::Timeout);
    }
}
