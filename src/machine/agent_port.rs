//! Carries bytes between the agent's console port in the guest and a socket of the monitor.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use aconite_devices::bus::{Effects, lock};
use aconite_devices::virtio::VirtioPci;
use aconite_devices::virtio::console::Console;

/// The port's number in the console.
const PORT: usize = 0;
/// Bytes moved at a time.
const CHUNK: usize = 32 << 10;

/// The monitor's end of the agent's port.
#[derive(Debug)]
pub struct AgentPort {
    stream: UnixStream,
    /// Bytes from the guest that the socket has not taken yet.
    outgoing: Vec<u8>,
    /// Bytes for the guest that the port has not taken yet.
    incoming: Vec<u8>,
    open: bool,
}

impl AgentPort {
    /// A port on `stream`, which is made non-blocking.
    pub fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self { stream, outgoing: Vec::new(), incoming: Vec::new(), open: true })
    }

    /// The socket, for polling.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Whether there is room to read from the socket.
    pub fn wants_input(&self) -> bool {
        self.open && self.incoming.is_empty()
    }

    /// Whether there are bytes that the socket must take.
    pub fn wants_output(&self) -> bool {
        self.open && !self.outgoing.is_empty()
    }

    /// Moves what can be moved in both directions.
    pub fn pump(&mut self, console: &Arc<Mutex<VirtioPci<Console>>>, effects: &mut Effects) {
        let mut console = lock(console);
        let mut buffer = [0; CHUNK];
        while self.open {
            if self.outgoing.is_empty() {
                let taken = console.port_read(PORT, &mut buffer, effects);
                self.outgoing.extend_from_slice(&buffer[..taken]);
            }
            if self.outgoing.is_empty() {
                break;
            }
            match self.stream.write(&self.outgoing) {
                Ok(written) => drop(self.outgoing.drain(..written)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => self.open = false,
            }
        }
        while self.open {
            if self.incoming.is_empty() {
                match self.stream.read(&mut buffer) {
                    Ok(0) => self.open = false,
                    Ok(read) => self.incoming.extend_from_slice(&buffer[..read]),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(_) => self.open = false,
                }
            }
            let accepted = console.port_write(PORT, &self.incoming, effects);
            self.incoming.drain(..accepted);
            if !self.incoming.is_empty() {
                break;
            }
        }
    }
}
