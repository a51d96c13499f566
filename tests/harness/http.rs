//! Requests that no well-behaved client sends.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// Most bytes of a reply that are read.
const MOST: u64 = 1 << 20;

/// A reply.
#[derive(Debug)]
pub struct Reply {
    /// The status.
    pub status: u16,
    /// Head and body.
    pub text: String,
}

impl Reply {
    /// The code of the error in the body.
    ///
    /// # Panics
    /// The body is no refusal.
    #[track_caller]
    pub fn code(&self) -> String {
        let body = self.text.split_once("\r\n\r\n").map_or("", |(_, body)| body);
        let body: serde_json::Value =
            serde_json::from_str(body).unwrap_or_else(|error| panic!("{error}: {}", self.text));
        body["error"]["code"].as_str().unwrap_or_else(|| panic!("no code: {body}")).to_owned()
    }
}

/// Sends `head` and then `zeroes` zero bytes, or as many as the server takes, and reads the reply.
///
/// # Panics
/// The server does not answer.
#[track_caller]
pub fn raw(socket: &Path, head: &[u8], zeroes: u64) -> Reply {
    let mut stream = UnixStream::connect(socket).expect("the API socket");
    stream.set_read_timeout(Some(Duration::from_secs(60))).expect("a time limit");
    stream.set_write_timeout(Some(Duration::from_secs(60))).expect("a time limit");
    stream.write_all(head).expect("the head of a request");
    let block = vec![0; 1 << 20];
    let mut left = zeroes;
    while left > 0 {
        let now = left.min(block.len() as u64) as usize;
        // A server that has refused the request closes its side.
        if stream.write_all(&block[..now]).is_err() {
            break;
        }
        left -= now as u64;
    }
    let mut bytes = Vec::new();
    // A reset after the reply is an end, too.
    let _ = stream.take(MOST).read_to_end(&mut bytes);
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let status = text.split(' ').nth(1).and_then(|word| word.parse().ok());
    Reply { status: status.unwrap_or_else(|| panic!("no HTTP reply: {text:?}")), text }
}

/// Sends one request with a body.
///
/// # Panics
/// The server does not answer.
#[track_caller]
pub fn request(socket: &Path, method: &str, target: &str, body: &str) -> Reply {
    let head = format!(
        "{method} {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    raw(socket, head.as_bytes(), 0)
}
