//! The part of HTTP/1.1 (RFC 9112) that the API needs: requests with a known length, replies with a length or in
//! chunks. Everything else is refused by name.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde_json::json;

use super::Limits;
use crate::command::{Error, ErrorCode};

/// Headers of a request; more are refused.
const MAX_HEADERS: usize = 64;
/// Bytes that are read at once.
const CHUNK: usize = 16 << 10;

/// A request, as far as the API looks at it.
#[derive(Debug, PartialEq, Eq)]
pub struct Request {
    /// `GET`, `POST`, …
    pub method: String,
    /// The path, still encoded.
    pub path: String,
    /// What comes after the `?`, still encoded.
    pub query: String,
    /// The body; empty if there is none.
    pub body: Vec<u8>,
    /// Whether the connection can carry another request.
    pub keep_alive: bool,
    /// Whether the client understands chunks (HTTP/1.1).
    pub chunks: bool,
}

/// Why there is no request.
#[derive(Debug)]
pub enum ReadError {
    /// The connection is over; there is nobody to answer.
    Closed,
    /// The request is refused and the connection ends, since its further bytes mean nothing.
    Refused(Error),
}

/// Reads one request after the other from a connection. What was read too far is kept for the next one.
#[derive(Debug)]
pub struct RequestReader<'a> {
    stream: &'a UnixStream,
    limits: Limits,
    buffer: Vec<u8>,
    /// The read timeout that the socket has, to save a system call where it stays the same.
    timeout: Option<Duration>,
}

/// What the head says about the rest.
struct Head {
    request: Request,
    length: usize,
    content_length: usize,
    expects_continue: bool,
}

impl<'a> RequestReader<'a> {
    /// A reader of `stream`.
    pub fn new(stream: &'a UnixStream, limits: Limits) -> Self {
        Self { stream, limits, buffer: Vec::new(), timeout: None }
    }

    /// The next request.
    ///
    /// # Errors
    /// The connection is over, or the request is refused.
    pub fn read(&mut self) -> Result<Request, ReadError> {
        if self.buffer.is_empty() {
            match self.fill(self.limits.idle) {
                Ok(0) | Err(_) => return Err(ReadError::Closed),
                Ok(_) => {}
            }
        }
        let deadline = Instant::now() + self.limits.request;
        let mut head = loop {
            if let Some(head) = parse_head(&self.buffer, &self.limits).map_err(ReadError::Refused)? {
                break head;
            }
            if self.buffer.len() > self.limits.head {
                return Err(ReadError::Refused(head_too_large(self.limits.head)));
            }
            self.fill_before(deadline)?;
        };
        if head.expects_continue && self.buffer.len() < head.length + head.content_length {
            let mut stream = self.stream;
            stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").map_err(|_| ReadError::Closed)?;
        }
        while self.buffer.len() < head.length + head.content_length {
            self.fill_before(deadline)?;
        }
        let rest = self.buffer.split_off(head.length + head.content_length);
        head.request.body = self.buffer.split_off(head.length);
        self.buffer = rest;
        Ok(head.request)
    }

    fn fill_before(&mut self, deadline: Instant) -> Result<(), ReadError> {
        match self.fill(deadline.saturating_duration_since(Instant::now())) {
            Ok(0) => Err(ReadError::Closed),
            Ok(_) => Ok(()),
            Err(error) if is_timeout(&error) => Err(ReadError::Refused(Error::new(
                ErrorCode::RequestTimeout,
                format!("The request did not arrive within {:?}", self.limits.request),
                "send it at once",
            ))),
            Err(_) => Err(ReadError::Closed),
        }
    }

    fn fill(&mut self, timeout: Duration) -> io::Result<usize> {
        // A timeout of zero would mean none at all.
        let timeout = Some(timeout.max(Duration::from_millis(1)));
        if self.timeout != timeout {
            self.stream.set_read_timeout(timeout)?;
            self.timeout = timeout;
        }
        let mut chunk = [0; CHUNK];
        loop {
            let mut stream = self.stream;
            match stream.read(&mut chunk) {
                Ok(count) => {
                    self.buffer.extend_from_slice(&chunk[..count]);
                    return Ok(count);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// Whether an error of a read or write is its timeout.
pub fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

fn head_too_large(limit: usize) -> Error {
    Error::new(
        ErrorCode::HeadTooLarge,
        format!("The head of the request has more than {limit} bytes or {MAX_HEADERS} headers"),
        "send fewer and shorter headers",
    )
}

fn bad(message: impl Into<String>, remedy: &str) -> Error {
    Error::new(ErrorCode::BadHttp, message, remedy)
}

/// Parses the head at the start of `bytes`. `None` if it is not complete yet.
fn parse_head(bytes: &[u8], limits: &Limits) -> Result<Option<Head>, Error> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut parsed = httparse::Request::new(&mut headers);
    let length = match parsed.parse(bytes) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(httparse::Error::TooManyHeaders) => return Err(head_too_large(limits.head)),
        Err(error) => return Err(bad(format!("The request is no HTTP/1.1: {error}"), "send HTTP/1.1")),
    };
    if length > limits.head {
        return Err(head_too_large(limits.head));
    }
    let chunks = parsed.version == Some(1);
    let mut keep_alive = chunks;
    let mut content_length = None;
    let mut expects_continue = false;
    for header in parsed.headers.iter() {
        let value = std::str::from_utf8(header.value)
            .map_err(|_| bad(format!("The header {} is no text", header.name), "send it in ASCII"))?
            .trim();
        let name = header.name.to_ascii_lowercase();
        match name.as_str() {
            "content-length" => {
                if value.is_empty() || !value.bytes().all(|byte| byte.is_ascii_digit()) {
                    return Err(bad(
                        format!("The content length {value:?} is no number"),
                        "send the number of bytes of the body",
                    ));
                }
                // All digits: what does not fit is simply too large.
                let number = value.parse().unwrap_or(usize::MAX);
                if content_length.is_some_and(|known| known != number) {
                    return Err(bad("The request has two different content lengths", "send one"));
                }
                content_length = Some(number);
            }
            "transfer-encoding" => {
                return Err(Error::new(
                    ErrorCode::LengthRequired,
                    format!("The body comes with transfer encoding {value:?}"),
                    "send it whole, with a content length",
                ));
            }
            "connection" => {
                for word in value.split(',').map(str::trim) {
                    if word.eq_ignore_ascii_case("close") {
                        keep_alive = false;
                    } else if word.eq_ignore_ascii_case("keep-alive") && !chunks {
                        keep_alive = true;
                    }
                }
            }
            "expect" => {
                if !value.eq_ignore_ascii_case("100-continue") {
                    return Err(bad(
                        format!("The expectation {value:?} is not known"),
                        "leave the header Expect out",
                    ));
                }
                expects_continue = true;
            }
            _ => {}
        }
    }
    let content_length = content_length.unwrap_or(0);
    if content_length > limits.body {
        return Err(Error::new(
            ErrorCode::BodyTooLarge,
            format!("The body has {content_length} bytes, and the server reads at most {}", limits.body),
            "send less in one request",
        ));
    }
    let target = parsed.path.unwrap_or_default();
    let target = target.split('#').next().unwrap_or_default();
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    if !path.starts_with('/') {
        return Err(bad(format!("The target {target:?} is no path"), "send a path such as /v1/machine"));
    }
    let request = Request {
        method: parsed.method.unwrap_or_default().to_owned(),
        path: path.to_owned(),
        query: query.to_owned(),
        body: Vec::new(),
        keep_alive,
        chunks,
    };
    Ok(Some(Head { request, length, content_length, expects_continue }))
}

/// Decodes `%41` in a part of a path or a query. A `+` is a plus, not a space: ranges are written with it.
///
/// # Errors
/// A `%` without two hexadecimal digits, or bytes that are no UTF-8.
pub fn percent_decode(text: &str) -> Result<String, Error> {
    let wrong =
        || bad(format!("{text:?} is not properly encoded"), "write % and two hexadecimal digits, in UTF-8");
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let mut digit = || rest.next().and_then(|byte| char::from(byte).to_digit(16));
        let (Some(high), Some(low)) = (digit(), digit()) else { return Err(wrong()) };
        bytes.push((high * 16 + low) as u8);
    }
    String::from_utf8(bytes).map_err(|_| wrong())
}

/// Encodes a value for a path or a query.
pub fn percent_encode(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~+".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}

/// The words of a status (RFC 9110, 15).
fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        202 => "Accepted",
        400 => "Bad Request",
        404 => "Not Found",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        409 => "Conflict",
        411 => "Length Required",
        413 => "Content Too Large",
        431 => "Request Header Fields Too Large",
        501 => "Not Implemented",
        503 => "Service Unavailable",
        507 => "Insufficient Storage",
        _ => "Internal Server Error",
    }
}

/// A whole reply.
#[derive(Debug)]
pub struct Response {
    /// The status code.
    pub status: u16,
    /// The JSON text.
    pub body: Vec<u8>,
    /// The number of the last event before the command began.
    pub seq: u64,
    /// The methods that the path has, after a wrong one.
    pub allow: Option<String>,
}

impl Response {
    /// The reply for an error.
    pub fn error(seq: u64, error: &Error) -> Self {
        let mut body = json!({"seq": seq, "error": error}).to_string().into_bytes();
        body.push(b'\n');
        Self { status: error.code.http_status(), body, seq, allow: None }
    }

    /// The reply to a request whose method is `method`: `HEAD` is answered without a body (RFC 9110, 9.3.2).
    pub fn for_method(self, method: &str) -> Self {
        if method == "HEAD" { Self { body: Vec::new(), ..self } } else { self }
    }

    /// Writes the reply; `close` tells the client that no other will follow.
    ///
    /// # Errors
    /// The client does not read it in time, or is gone.
    pub fn write(&self, mut stream: &UnixStream, close: bool) -> io::Result<()> {
        let mut bytes = format!(
            "HTTP/1.1 {} {}\r\nContent-Type: application/json\r\nContent-Length: {}\r\nAconite-Sequence: {}\r\n",
            self.status,
            reason(self.status),
            self.body.len(),
            self.seq
        )
        .into_bytes();
        if let Some(methods) = &self.allow {
            bytes.extend_from_slice(format!("Allow: {methods}\r\n").as_bytes());
        }
        if close {
            bytes.extend_from_slice(b"Connection: close\r\n");
        }
        bytes.extend_from_slice(b"\r\n");
        bytes.extend_from_slice(&self.body);
        stream.write_all(&bytes)
    }
}

#[cfg(test)]
#[path = "http_test.rs"]
mod tests;
