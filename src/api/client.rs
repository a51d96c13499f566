//! The client that `aconite ctl` uses: one connection for each request.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::command::{Error, Record};

/// A reply is at most this long; anything longer comes from no machine.
const MAX_REPLY: u64 = 64 << 20;
/// A line of a reply's head, and of the size of a chunk.
const MAX_LINE: u64 = 16 << 10;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody is there.
    #[error("No machine answers on {path}: start one with --api-socket {path}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The connection broke.
    #[error("The connection to {path} broke: see whether the machine still runs")]
    Broken {
        /// The socket.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// What answers is no machine of this version.
    #[error("The answer on {path} is not understood ({problem}): use a machine of the same version")]
    Strange {
        /// The socket.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The machine refused.
    #[error(transparent)]
    Refused(#[from] Error),
}

/// A good reply.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// The status, 200 or 202.
    pub status: u16,
    /// The JSON object, with `seq` in it.
    pub body: Value,
}

/// Asks a machine on its socket.
#[derive(Debug, Clone)]
pub struct Client {
    path: PathBuf,
}

impl Client {
    /// A client for the machine on `path`; nothing is connected yet.
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }

    /// Sends one request and reads its reply.
    ///
    /// # Errors
    /// There is no answer, or it is a refusal.
    pub fn call(&self, method: &str, target: &str, body: Option<&Value>) -> Result<Answer, ClientError> {
        let (head, mut stream) = self.send(method, target, body)?;
        let mut text = Vec::new();
        let read = match head.length {
            Some(length) => (&mut stream).take(length.min(MAX_REPLY)).read_to_end(&mut text),
            None => (&mut stream).take(MAX_REPLY).read_to_end(&mut text),
        };
        read.map_err(|error| self.broken(error))?;
        if head.length.is_some_and(|length| length != text.len() as u64) {
            return Err(self.broken(io::ErrorKind::UnexpectedEof.into()));
        }
        self.judge(head.status, &text)
    }

    /// The events after number `since`; with `follow` those to come, too.
    ///
    /// # Errors
    /// There is no answer, or it is a refusal.
    pub fn events(&self, since: u64, follow: bool) -> Result<Events, ClientError> {
        let target = format!("/v1/events?since={since}&follow={}", u8::from(follow));
        let (head, mut stream) = self.send("GET", &target, None)?;
        if head.status != 200 || !head.chunked {
            let mut text = Vec::new();
            (&mut stream)
                .take(head.length.unwrap_or(0).min(MAX_REPLY))
                .read_to_end(&mut text)
                .map_err(|error| self.broken(error))?;
            self.judge(head.status, &text)?;
            return Err(self.strange("events do not come in chunks"));
        }
        let lines = BufReader::new(Chunks { stream, left: 0, started: false, ended: false });
        Ok(Events { client: self.clone(), lines })
    }

    fn judge(&self, status: u16, text: &[u8]) -> Result<Answer, ClientError> {
        let body: Value = serde_json::from_slice(text).map_err(|error| self.strange(error))?;
        if status < 300 {
            return Ok(Answer { status, body });
        }
        match serde_json::from_value::<Error>(body["error"].clone()) {
            Ok(error) => Err(error.into()),
            Err(error) => Err(self.strange(format_args!("status {status}, {error}"))),
        }
    }

    fn send(
        &self,
        method: &str,
        target: &str,
        body: Option<&Value>,
    ) -> Result<(Head, BufReader<UnixStream>), ClientError> {
        let mut stream = UnixStream::connect(&self.path)
            .map_err(|source| ClientError::Connect { path: self.path.clone(), source })?;
        let body = body.map(Value::to_string).unwrap_or_default();
        let request = format!(
            "{method} {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        // A server that refuses the request may stop reading it: then its reply says why.
        let sent = stream.write_all(request.as_bytes());
        let mut stream = BufReader::new(stream);
        match self.read_head(&mut stream) {
            Ok(head) => Ok((head, stream)),
            Err(error) => Err(sent.err().map_or(error, |source| self.broken(source))),
        }
    }

    fn read_head(&self, stream: &mut BufReader<UnixStream>) -> Result<Head, ClientError> {
        let mut bytes = Vec::new();
        loop {
            let before = bytes.len();
            stream.take(MAX_LINE).read_until(b'\n', &mut bytes).map_err(|error| self.broken(error))?;
            let line = &bytes[before..];
            if line.is_empty() {
                return Err(self.broken(io::ErrorKind::UnexpectedEof.into()));
            }
            if line == b"\r\n" {
                break;
            }
            if bytes.len() as u64 > MAX_LINE {
                return Err(self.strange("its head is too long"));
            }
        }
        let mut headers = [httparse::EMPTY_HEADER; 32];
        let mut parsed = httparse::Response::new(&mut headers);
        match parsed.parse(&bytes) {
            Ok(httparse::Status::Complete(_)) => {}
            Ok(httparse::Status::Partial) => return Err(self.strange("its head is incomplete")),
            Err(error) => return Err(self.strange(error)),
        }
        let find = |name: &str| {
            let header = parsed.headers.iter().find(|header| header.name.eq_ignore_ascii_case(name))?;
            std::str::from_utf8(header.value).ok()
        };
        Ok(Head {
            status: parsed.code.unwrap_or(0),
            length: find("content-length").and_then(|length| length.parse().ok()),
            chunked: find("transfer-encoding").is_some_and(|coding| coding.eq_ignore_ascii_case("chunked")),
        })
    }

    fn broken(&self, source: io::Error) -> ClientError {
        ClientError::Broken { path: self.path.clone(), source }
    }

    /// The error for an answer that is not understood.
    pub(crate) fn strange(&self, problem: impl std::fmt::Display) -> ClientError {
        ClientError::Strange { path: self.path.clone(), problem: problem.to_string() }
    }
}

struct Head {
    status: u16,
    length: Option<u64>,
    chunked: bool,
}

/// A stream of events. Ends when the machine ends it.
#[derive(Debug)]
pub struct Events {
    client: Client,
    lines: BufReader<Chunks>,
}

impl Iterator for Events {
    type Item = Result<Record, ClientError>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut line = String::new();
        match (&mut self.lines).take(MAX_REPLY).read_line(&mut line) {
            Ok(0) => None,
            Ok(_) => Some(serde_json::from_str(&line).map_err(|error| self.client.strange(error))),
            Err(error) => Some(Err(self.client.broken(error))),
        }
    }
}

/// Takes the chunks of a body apart (RFC 9112, 7.1).
#[derive(Debug)]
struct Chunks {
    stream: BufReader<UnixStream>,
    /// Bytes of the present chunk that are still to come.
    left: u64,
    started: bool,
    ended: bool,
}

impl Read for Chunks {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() || self.ended {
            return Ok(0);
        }
        if self.left == 0 {
            if self.started {
                self.line()?;
            }
            self.started = true;
            let line = self.line()?;
            let size = line.split(';').next().unwrap_or_default().trim();
            self.left = u64::from_str_radix(size, 16).map_err(|_| {
                io::Error::new(io::ErrorKind::InvalidData, format!("{size:?} is no size of a chunk"))
            })?;
            if self.left == 0 {
                self.ended = true;
                return Ok(0);
            }
        }
        let wanted = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let count = self.stream.read(&mut buffer[..wanted])?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.left -= count as u64;
        Ok(count)
    }
}

impl Chunks {
    fn line(&mut self) -> io::Result<String> {
        let mut line = String::new();
        (&mut self.stream).take(MAX_LINE).read_line(&mut line)?;
        if line.ends_with('\n') { Ok(line) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }
}
