//! How frames are written and read: the bytes behind [`crate::protocol`].

use std::fmt;

use crate::protocol::{
    Exec, ExitStatus, Frame, HEADER, Hello, MAX_DATA, MAX_FRAME, Message, Power, Role, SESSION, Share,
    Stream, VERSION, WindowSize,
};

/// First bytes of a `Hello`, by which a side finds its way back into the stream.
const MAGIC: &[u8; 8] = b"\xacONITE\r\n";

/// Bytes that are not this protocol, or a message that it cannot carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProtocolError {
    /// The length field is out of bounds.
    Length(u32),
    /// No message has this kind.
    Kind(u8),
    /// The message of this kind is cut short, too long, or holds a value that it must not.
    Malformed(u8),
    /// The message does not fit in a frame: this many bytes.
    TooLarge(usize),
}

impl fmt::Display for ProtocolError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Length(length) => {
                write!(f, "Frame length {length} is not between 5 and {}", MAX_FRAME - 4)
            }
            Self::Kind(kind) => write!(f, "Message kind {kind} is not one of protocol version {VERSION}"),
            Self::Malformed(kind) => write!(f, "Message of kind {kind} is malformed"),
            Self::TooLarge(size) => write!(
                f,
                "Message takes {size} bytes and a frame at most {MAX_FRAME}: shorten the command line or environment"
            ),
        }
    }
}

impl std::error::Error for ProtocolError {}

const HELLO: u8 = 1;
const EXEC: u8 = 2;
const CONNECT: u8 = 3;
const MOUNT: u8 = 4;
const UNMOUNT: u8 = 5;
const POWER: u8 = 6;
const OPENED: u8 = 16;
const FAILED: u8 = 17;
const DATA: u8 = 18;
const EOF: u8 = 19;
const CREDIT: u8 = 20;
const SIGNAL: u8 = 21;
const RESIZE: u8 = 22;
const CLOSE: u8 = 23;
const EXIT: u8 = 24;

impl Frame {
    /// Puts the frame at the end of `out`; nothing is put there on an error.
    pub fn encode(&self, out: &mut Vec<u8>) -> Result<(), ProtocolError> {
        let start = out.len();
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&self.channel.to_le_bytes());
        out.push(0);
        let kind = self.message.encode(out);
        let size = out.len() - start;
        if size > MAX_FRAME {
            out.truncate(start);
            return Err(ProtocolError::TooLarge(size));
        }
        out[start..start + 4].copy_from_slice(&((size - 4) as u32).to_le_bytes());
        out[start + HEADER - 1] = kind;
        Ok(())
    }
}

impl Message {
    fn encode(&self, out: &mut Vec<u8>) -> u8 {
        match self {
            Message::Hello(hello) => {
                out.extend_from_slice(MAGIC);
                put_u32(out, hello.version);
                out.extend_from_slice(&hello.nonce.to_le_bytes());
                out.push(match hello.role {
                    Role::Host => 0,
                    Role::Guest => 1,
                    Role::NestedHost => 2,
                    Role::Process => 3,
                });
                out.push(hello.kvm.into());
                put_bytes(out, hello.release.as_bytes());
                put_bytes(out, hello.kernel.as_bytes());
                put_u32(out, hello.notes.len() as u32);
                hello.notes.iter().for_each(|note| put_bytes(out, note.as_bytes()));
                HELLO
            }
            Message::Exec(exec) => {
                put_list(out, &exec.argv);
                put_list(out, &exec.env);
                put_bytes(out, &exec.cwd);
                out.push(exec.terminal.is_some().into());
                put_window(out, exec.terminal.unwrap_or(WindowSize { rows: 0, columns: 0 }));
                EXEC
            }
            Message::Connect(path) => {
                put_bytes(out, path);
                CONNECT
            }
            Message::Mount(share) => {
                put_bytes(out, share.tag.as_bytes());
                put_bytes(out, &share.path);
                put_bytes(out, share.options.as_bytes());
                MOUNT
            }
            Message::Unmount(path) => {
                put_bytes(out, path);
                UNMOUNT
            }
            Message::Power(power) => {
                out.push(match power {
                    Power::Off => 0,
                    Power::Reboot => 1,
                });
                POWER
            }
            Message::Opened(pid) => {
                put_u32(out, *pid);
                OPENED
            }
            Message::Failed { errno, text } => {
                put_u32(out, *errno as u32);
                put_bytes(out, text.as_bytes());
                FAILED
            }
            Message::Data(stream, bytes) => {
                out.push(stream.code());
                out.extend_from_slice(bytes);
                DATA
            }
            Message::Eof(stream) => {
                out.push(stream.code());
                EOF
            }
            Message::Credit(stream, bytes) => {
                out.push(stream.code());
                put_u32(out, *bytes);
                CREDIT
            }
            Message::Signal(signal) => {
                put_u32(out, *signal as u32);
                SIGNAL
            }
            Message::Resize(size) => {
                put_window(out, *size);
                RESIZE
            }
            Message::Close => CLOSE,
            Message::Exit(status) => {
                let (signalled, value) = match status {
                    ExitStatus::Code(code) => (0, *code),
                    ExitStatus::Signal(signal) => (1, *signal),
                };
                out.push(signalled);
                put_u32(out, value as u32);
                EXIT
            }
        }
    }

    fn decode(kind: u8, bytes: &[u8]) -> Result<Message, ProtocolError> {
        if !matches!(kind, HELLO..=POWER | OPENED..=EXIT) {
            return Err(ProtocolError::Kind(kind));
        }
        let mut fields = Fields { bytes };
        fields.message(kind).filter(|_| fields.bytes.is_empty()).ok_or(ProtocolError::Malformed(kind))
    }
}

impl Stream {
    fn code(self) -> u8 {
        match self {
            Stream::Stdin => 0,
            Stream::Stdout => 1,
            Stream::Stderr => 2,
        }
    }
}

fn put_u32(out: &mut Vec<u8>, value: u32) {
    out.extend_from_slice(&value.to_le_bytes());
}

fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put_u32(out, bytes.len() as u32);
    out.extend_from_slice(bytes);
}

fn put_list(out: &mut Vec<u8>, items: &[Vec<u8>]) {
    put_u32(out, items.len() as u32);
    items.iter().for_each(|item| put_bytes(out, item));
}

fn put_window(out: &mut Vec<u8>, size: WindowSize) {
    out.extend_from_slice(&size.rows.to_le_bytes());
    out.extend_from_slice(&size.columns.to_le_bytes());
}

/// Takes the fields of a message off the front of its bytes; `None` when they are not there.
struct Fields<'a> {
    bytes: &'a [u8],
}

impl<'a> Fields<'a> {
    fn message(&mut self, kind: u8) -> Option<Message> {
        Some(match kind {
            HELLO => Message::Hello(self.hello()?),
            EXEC => {
                let argv = self.list()?;
                let env = self.list()?;
                let cwd = self.string()?.to_vec();
                let on_terminal = self.flag()?;
                let size = self.window()?;
                Message::Exec(Exec { argv, env, cwd, terminal: on_terminal.then_some(size) })
            }
            CONNECT => Message::Connect(self.string()?.to_vec()),
            MOUNT => Message::Mount(Share {
                tag: self.text()?,
                path: self.string()?.to_vec(),
                options: self.text()?,
            }),
            UNMOUNT => Message::Unmount(self.string()?.to_vec()),
            POWER => Message::Power(match self.u8()? {
                0 => Power::Off,
                1 => Power::Reboot,
                _ => return None,
            }),
            OPENED => Message::Opened(self.u32()?),
            FAILED => Message::Failed { errno: self.u32()? as i32, text: self.text()? },
            DATA => {
                let stream = self.stream()?;
                let bytes = std::mem::take(&mut self.bytes);
                if bytes.is_empty() || bytes.len() > MAX_DATA {
                    return None;
                }
                Message::Data(stream, bytes.to_vec())
            }
            EOF => Message::Eof(self.stream()?),
            CREDIT => Message::Credit(self.stream()?, self.u32()?),
            SIGNAL => Message::Signal(self.u32()? as i32),
            RESIZE => Message::Resize(self.window()?),
            CLOSE => Message::Close,
            EXIT => {
                let signalled = self.flag()?;
                let value = self.u32()? as i32;
                Message::Exit(if signalled { ExitStatus::Signal(value) } else { ExitStatus::Code(value) })
            }
            _ => return None,
        })
    }

    fn hello(&mut self) -> Option<Hello> {
        if self.take(MAGIC.len())? != MAGIC {
            return None;
        }
        let version = self.u32()?;
        let nonce = u64::from_le_bytes(self.take(8)?.try_into().ok()?);
        if version != VERSION {
            // What follows is that version's business; whoever reads it needs to know no more.
            self.bytes = &[];
            let (release, kernel) = (String::new(), String::new());
            return Some(Hello {
                version,
                nonce,
                role: Role::Process,
                kvm: false,
                release,
                kernel,
                notes: Vec::new(),
            });
        }
        let role = match self.u8()? {
            0 => Role::Host,
            1 => Role::Guest,
            2 => Role::NestedHost,
            3 => Role::Process,
            _ => return None,
        };
        let kvm = self.flag()?;
        let release = self.text()?;
        let kernel = self.text()?;
        let notes = (0..self.u32()?).map(|_| self.text()).collect::<Option<_>>()?;
        Some(Hello { version, nonce, role, kvm, release, kernel, notes })
    }

    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.bytes.split_at_checked(count)?;
        self.bytes = tail;
        Some(head)
    }

    fn u8(&mut self) -> Option<u8> {
        Some(self.take(1)?[0])
    }

    fn u16(&mut self) -> Option<u16> {
        Some(u16::from_le_bytes(self.take(2)?.try_into().ok()?))
    }

    fn u32(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(self.take(4)?.try_into().ok()?))
    }

    fn flag(&mut self) -> Option<bool> {
        match self.u8()? {
            0 => Some(false),
            1 => Some(true),
            _ => None,
        }
    }

    fn string(&mut self) -> Option<&'a [u8]> {
        let length = self.u32()?;
        self.take(usize::try_from(length).ok()?)
    }

    fn text(&mut self) -> Option<String> {
        String::from_utf8(self.string()?.to_vec()).ok()
    }

    fn list(&mut self) -> Option<Vec<Vec<u8>>> {
        // No capacity from the count: each item takes bytes, so the frame bounds the list.
        (0..self.u32()?).map(|_| self.string().map(<[u8]>::to_vec)).collect()
    }

    fn stream(&mut self) -> Option<Stream> {
        match self.u8()? {
            0 => Some(Stream::Stdin),
            1 => Some(Stream::Stdout),
            2 => Some(Stream::Stderr),
            _ => None,
        }
    }

    fn window(&mut self) -> Option<WindowSize> {
        Some(WindowSize { rows: self.u16()?, columns: self.u16()? })
    }
}

/// Makes frames of the bytes that arrive, in whatever pieces.
///
/// Holds at most the bytes pushed since [`Decoder::next`] last returned `None`, and one unfinished frame.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    start: usize,
    seeking: bool,
}

impl Decoder {
    /// A decoder at the start of a stream that begins with a frame.
    pub fn new() -> Decoder {
        Decoder::default()
    }

    /// Takes in bytes from the stream.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.drain(..self.start);
        self.start = 0;
        self.buffer.extend_from_slice(bytes);
    }

    /// Drops everything up to the next `Hello`: what to do after an error, and where the
    /// stream may hold the rest of a session before.
    pub fn resynchronize(&mut self) {
        self.seeking = true;
    }

    /// The next whole frame, if there is one.
    ///
    /// # Errors
    /// The bytes at hand are no frame; they stay so until [`Decoder::resynchronize`] is called.
    #[expect(clippy::should_implement_trait, reason = "an iterator would end at `None`, this does not")]
    pub fn next(&mut self) -> Result<Option<Frame>, ProtocolError> {
        while self.seeking {
            if !self.seek() {
                return Ok(None);
            }
            match self.parse() {
                Ok(Some(frame)) => {
                    self.seeking = false;
                    return Ok(Some(frame));
                }
                Ok(None) => return Ok(None),
                Err(_) => self.start += 1,
            }
        }
        self.parse()
    }

    /// Moves on to what looks like a `Hello`; false when there is none in the bytes at hand.
    fn seek(&mut self) -> bool {
        let bytes = &self.buffer[self.start..];
        let found = (HEADER..bytes.len()).find(|&at| {
            let tail = &bytes[at..];
            tail[..tail.len().min(MAGIC.len())] == MAGIC[..tail.len().min(MAGIC.len())]
                && bytes[at - 1] == HELLO
                && bytes[at - 5..at - 1] == SESSION.to_le_bytes()
        });
        self.start += match found {
            Some(at) => at - HEADER,
            None => bytes.len().saturating_sub(HEADER),
        };
        found.is_some()
    }

    fn parse(&mut self) -> Result<Option<Frame>, ProtocolError> {
        let mut fields = Fields { bytes: &self.buffer[self.start..] };
        let Some(length) = fields.u32() else { return Ok(None) };
        if !(HEADER - 4..=MAX_FRAME - 4).contains(&(length as usize)) {
            return Err(ProtocolError::Length(length));
        }
        let Some(bytes) = fields.take(length as usize) else { return Ok(None) };
        let mut fields = Fields { bytes };
        let (Some(channel), Some(kind)) = (fields.u32(), fields.u8()) else { return Ok(None) };
        let message = Message::decode(kind, fields.bytes)?;
        self.start += 4 + length as usize;
        Ok(Some(Frame { channel, message }))
    }
}

#[cfg(test)]
#[path = "wire_test.rs"]
mod tests;
