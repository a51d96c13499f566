//! One non-blocking connection that carries frames.

use aconite_agent::protocol::{Decoder, Frame, ProtocolError};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;

const READ_SIZE: usize = 64 * 1024;

/// A connection, with the frames that wait to be sent on it.
#[derive(Debug)]
pub struct Line {
    stream: UnixStream,
    decoder: Decoder,
    unsent: Vec<u8>,
    sent: usize,
}

/// Why a connection is over.
#[derive(Debug, thiserror::Error)]
pub enum LineError {
    /// The other side has closed it.
    #[error("It was closed by the other side")]
    Closed,
    /// Reading or writing failed.
    #[error("It broke")]
    Io(#[from] io::Error),
    /// The other side sent no frames.
    #[error("The other side does not speak the protocol")]
    Protocol(#[from] ProtocolError),
}

impl Line {
    /// A connection over `stream`. With `mid_stream`, everything before a first `Hello` is passed over.
    pub fn new(stream: UnixStream, mid_stream: bool) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        let mut decoder = Decoder::new();
        if mid_stream {
            decoder.resynchronize();
        }
        Ok(Line { stream, decoder, unsent: Vec::new(), sent: 0 })
    }

    /// The socket.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Reads what is there, once; takes the frames that are whole.
    pub fn read(&mut self, frames: &mut Vec<Frame>) -> Result<(), LineError> {
        let mut buffer = [0; READ_SIZE];
        match self.stream.read(&mut buffer) {
            Ok(0) => return Err(LineError::Closed),
            Ok(count) => self.decoder.push(&buffer[..count]),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                return Ok(());
            }
            Err(error) => return Err(error.into()),
        }
        while let Some(frame) = self.decoder.next()? {
            frames.push(frame);
        }
        Ok(())
    }

    /// Queues a frame.
    ///
    /// # Errors
    /// It is too large for the protocol.
    pub fn queue(&mut self, frame: &Frame) -> Result<(), ProtocolError> {
        if self.sent > READ_SIZE {
            self.unsent.drain(..self.sent);
            self.sent = 0;
        }
        frame.encode(&mut self.unsent)
    }

    /// Sends what can be sent without waiting.
    pub fn write(&mut self) -> Result<(), LineError> {
        while self.sent < self.unsent.len() {
            match self.stream.write(&self.unsent[self.sent..]) {
                Ok(0) => return Err(LineError::Closed),
                Ok(count) => self.sent += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.unsent.clear();
        self.sent = 0;
        Ok(())
    }

    /// Bytes that wait to be sent.
    pub fn waiting(&self) -> usize {
        self.unsent.len() - self.sent
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use aconite_agent::protocol::{Message, Stream};

    #[test]
    fn frames_cross_in_pieces() {
        let (a, b) = UnixStream::pair().unwrap();
        let (mut a, mut b) = (Line::new(a, false).unwrap(), Line::new(b, false).unwrap());
        let frame = Frame { channel: 5, message: Message::Data(Stream::Stdin, vec![7; 32 * 1024]) };
        for _ in 0..100 {
            a.queue(&frame).unwrap();
        }
        let mut frames = Vec::new();
        while frames.len() < 100 {
            a.write().unwrap();
            b.read(&mut frames).unwrap();
        }
        assert_eq!(a.waiting(), 0);
        assert!(frames.iter().all(|f| *f == frame));
        drop(a);
        assert!(matches!(b.read(&mut frames), Err(LineError::Closed)));
    }

    #[test]
    fn noise_is_an_error() {
        let (mut a, b) = UnixStream::pair().unwrap();
        a.write_all(&[0xff; 64]).unwrap();
        let mut b = Line::new(b, false).unwrap();
        assert!(matches!(b.read(&mut Vec::new()), Err(LineError::Protocol(_))));
    }
}
