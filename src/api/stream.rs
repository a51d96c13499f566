//! Events as JSON lines, sent as they happen.

use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::http::Request;
use super::server::{LOOK, Shared};
use crate::command::{Next, Record};

/// Events that are ready go out together, up to about this many bytes.
const BATCH: usize = 64 << 10;

/// Notices that the client has closed its connection, while nothing is read from it.
pub struct Hangup {
    epoll: Option<Epoll>,
}

impl Hangup {
    /// Watches `stream`. If the system refuses, nothing is ever noticed, and only writing will tell.
    pub fn watch(stream: &UnixStream) -> Self {
        let fd = stream.as_raw_fd();
        let watch = || -> io::Result<Epoll> {
            let epoll = Epoll::new()?;
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::HANG_UP, 0))?;
            Ok(epoll)
        };
        Self { epoll: watch().ok() }
    }

    /// Whether the client is gone.
    pub fn happened(&self) -> bool {
        let mut ready = [EpollEvent::default()];
        self.epoll.as_ref().is_some_and(|epoll| epoll.wait(0, &mut ready).is_ok_and(|count| count > 0))
    }
}

/// Sends the events after number `since`; with `follow` until the client or the machine goes. Returns whether the
/// connection can carry another request.
pub fn send(
    shared: &Shared,
    stream: &UnixStream,
    request: &Request,
    seq: u64,
    since: u64,
    follow: bool,
) -> bool {
    let chunks = request.chunks;
    let keep_alive = chunks && request.keep_alive;
    let sent = stream
        .set_write_timeout(Some(shared.limits.stream))
        .and_then(|()| send_all(shared, stream, chunks, keep_alive, seq, since, follow));
    sent.and_then(|()| stream.set_write_timeout(Some(shared.limits.reply))).is_ok() && keep_alive
}

fn send_all(
    shared: &Shared,
    mut stream: &UnixStream,
    chunks: bool,
    keep_alive: bool,
    seq: u64,
    since: u64,
    follow: bool,
) -> io::Result<()> {
    let encoding = if chunks { "Transfer-Encoding: chunked\r\n" } else { "" };
    let connection = if keep_alive { "" } else { "Connection: close\r\n" };
    stream.write_all(
        format!(
            "HTTP/1.1 200 OK\r\nContent-Type: application/jsonl\r\nAconite-Sequence: {seq}\r\n{encoding}{connection}\r\n"
        )
        .as_bytes(),
    )?;
    let hangup = Hangup::watch(stream);
    let mut events = shared.executor.events().subscribe(since);
    let mut batch = Vec::new();
    loop {
        // What is there goes out at once; only then is there time to wait.
        let patience = if batch.is_empty() && follow && !shared.stopping() { LOOK } else { Duration::ZERO };
        match events.next(patience) {
            Next::Record(record) => {
                append(&mut batch, &record, chunks)?;
                if batch.len() < BATCH {
                    continue;
                }
            }
            Next::Nothing if batch.is_empty() => {
                if !follow || shared.stopping() {
                    break;
                }
                if hangup.happened() {
                    return Err(io::ErrorKind::ConnectionReset.into());
                }
            }
            Next::Nothing => {}
            Next::Closed if batch.is_empty() => break,
            Next::Closed => {}
        }
        stream.write_all(&batch)?;
        batch.clear();
    }
    if chunks { stream.write_all(b"0\r\n\r\n") } else { Ok(()) }
}

/// Appends the record as a line, in a chunk of its own.
fn append(batch: &mut Vec<u8>, record: &Record, chunks: bool) -> io::Result<()> {
    let line = serde_json::to_string(record)?;
    if chunks { write!(batch, "{:x}\r\n{line}\n\r\n", line.len() + 1) } else { writeln!(batch, "{line}") }
}
