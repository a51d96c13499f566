//! Virtio console with named ports (virtio 1.2, section 5.3, VIRTIO_CONSOLE_F_MULTIPORT).
//!
//! Each port is a byte stream between the guest and the host, with a bounded ring in either direction. When the
//! host does not read, the device stops taking the guest's buffers and the guest's writer blocks; when the guest
//! does not read, [`VirtioPci::port_write`] accepts nothing more.
//!
//! No port is announced as a console (VIRTIO_CONSOLE_CONSOLE_PORT), so port 0 is as good as any other. Linux names
//! the character devices `/dev/vport<device>p<port>` and gives each port's name in
//! `/sys/class/virtio-ports/vport<device>p<port>/name`; the links in `/dev/virtio-ports` are made by udev.
//!
//! The handshake, as `drivers/char/virtio_console.c` has it: the guest sends DEVICE_READY; the device answers with
//! PORT_ADD for each port; the guest sends PORT_READY for it; the device answers PORT_NAME and PORT_OPEN; the guest
//! sends PORT_OPEN with 1 when a process opens the port and with 0 when it closes it.

use std::collections::VecDeque;

use super::queue::{Chain, QueueError, Queues};
use super::{VirtioDevice, VirtioPci};
use crate::bus::Effects;

/// Virtio device id (section 5.3.1).
const DEVICE_TYPE: u16 = 3;
const F_MULTIPORT: u64 = 1 << 1;

const CONTROL_RX: u16 = 2;
const CONTROL_TX: u16 = 3;
const QUEUE_SIZE: u16 = 32;

/// Most ports a console can have (Linux VIRTCONS_MAX_PORTS is far above).
pub const MAX_PORTS: usize = 31;
/// Bytes a port holds in each direction.
pub const RING_SIZE: usize = 64 * 1024;

/// Control messages waiting for the guest above which its own messages are left in the queue.
const CONTROL_BACKLOG: usize = 64;
/// Chains taken from a queue at a time, so that a guest cannot keep the main loop for itself.
const BATCH: usize = 256;
/// Length of struct virtio_console_control.
const CONTROL_LEN: usize = 8;

const EVENT_DEVICE_READY: u16 = 0;
const EVENT_PORT_ADD: u16 = 1;
const EVENT_PORT_READY: u16 = 3;
const EVENT_PORT_OPEN: u16 = 6;
const EVENT_PORT_NAME: u16 = 7;

/// One byte stream.
struct Port {
    name: String,
    to_guest: VecDeque<u8>,
    from_guest: VecDeque<u8>,
    guest_open: bool,
    guest_ready: bool,
    host_open: bool,
    /// A buffer of the guest that did not fit whole, and how much of it has been taken.
    partial: Option<(Chain, u64)>,
}

/// A console device with one or more named ports.
pub struct Console {
    ports: Vec<Port>,
    queue_sizes: Vec<u16>,
    control: VecDeque<Vec<u8>>,
}

impl Console {
    /// A console with a port for each of `names`, in order, all connected on the host's side. Names beyond
    /// [`MAX_PORTS`] are dropped.
    pub fn new<S: Into<String>>(names: impl IntoIterator<Item = S>) -> Self {
        let ports: Vec<Port> = names
            .into_iter()
            .take(MAX_PORTS)
            .map(|name| Port {
                name: name.into(),
                to_guest: VecDeque::new(),
                from_guest: VecDeque::new(),
                guest_open: false,
                guest_ready: false,
                host_open: true,
                partial: None,
            })
            .collect();
        let queue_sizes = vec![QUEUE_SIZE; 2 * (ports.len().max(1) + 1)];
        Self { ports, queue_sizes, control: VecDeque::new() }
    }

    /// Whether a process in the guest has `port` open.
    pub fn port_open(&self, port: usize) -> bool {
        self.ports.get(port).is_some_and(|port| port.guest_open)
    }

    /// Bytes that [`VirtioPci::port_read`] would return now.
    pub fn readable(&self, port: usize) -> usize {
        self.ports.get(port).map_or(0, |port| port.from_guest.len())
    }

    /// Bytes that [`VirtioPci::port_write`] would accept now. None while the guest has the port closed: they
    /// could reach nobody.
    pub fn writable(&self, port: usize) -> usize {
        self.ports.get(port).filter(|port| port.guest_open).map_or(0, |port| RING_SIZE - port.to_guest.len())
    }

    fn port_write(&mut self, port: usize, bytes: &[u8]) -> usize {
        let accepted = self.writable(port).min(bytes.len());
        if let Some(port) = self.ports.get_mut(port) {
            port.to_guest.extend(&bytes[..accepted]);
        }
        accepted
    }

    fn port_read(&mut self, port: usize, buffer: &mut [u8]) -> usize {
        let Some(port) = self.ports.get_mut(port) else { return 0 };
        let taken = port.from_guest.len().min(buffer.len());
        for (to, from) in buffer.iter_mut().zip(port.from_guest.drain(..taken)) {
            *to = from;
        }
        taken
    }

    fn set_host_open(&mut self, port: usize, open: bool) {
        let Some(state) = self.ports.get_mut(port) else { return };
        if std::mem::replace(&mut state.host_open, open) != open && state.guest_ready {
            self.send_control(port, EVENT_PORT_OPEN, open.into(), &[]);
        }
    }

    fn send_control(&mut self, port: usize, event: u16, value: u16, tail: &[u8]) {
        let mut message = Vec::with_capacity(CONTROL_LEN + tail.len());
        message.extend_from_slice(&(port as u32).to_le_bytes());
        message.extend_from_slice(&event.to_le_bytes());
        message.extend_from_slice(&value.to_le_bytes());
        message.extend_from_slice(tail);
        if event == EVENT_PORT_OPEN {
            // Only the last state counts, so a host that comes and goes does not pile up messages.
            self.control.retain(|waiting| waiting[..6] != message[..6]);
        }
        self.control.push_back(message);
    }

    fn receive_control(&mut self, message: [u8; CONTROL_LEN], queues: &mut Queues<'_>) {
        let [i0, i1, i2, i3, e0, e1, v0, v1] = message;
        let id = u32::from_le_bytes([i0, i1, i2, i3]) as usize;
        let value = u16::from_le_bytes([v0, v1]);
        match (u16::from_le_bytes([e0, e1]), value) {
            (EVENT_DEVICE_READY, 1) => {
                for port in 0..self.ports.len() {
                    self.send_control(port, EVENT_PORT_ADD, 1, &[]);
                }
            }
            (EVENT_PORT_READY, 1) => {
                let Some(port) = self.ports.get_mut(id) else { return };
                port.guest_ready = true;
                let (name, open) = (port.name.clone(), port.host_open);
                self.send_control(id, EVENT_PORT_NAME, 1, name.as_bytes());
                if open {
                    self.send_control(id, EVENT_PORT_OPEN, 1, &[]);
                }
            }
            (EVENT_PORT_OPEN, value) => {
                let Some(port) = self.ports.get_mut(id) else { return };
                port.guest_open = value != 0;
                if !port.guest_open {
                    // What the closed reader did not take is not for the next one.
                    port.to_guest.clear();
                }
                queues.again(rx_queue(id));
            }
            (event, value) => tracing::debug!(event, value, id, "console driver reports a failure"),
        }
    }

    /// Takes the guest's control messages, as long as the answers do not pile up.
    fn drain_control(&mut self, queues: &mut Queues<'_>) -> Result<(), QueueError> {
        for _ in 0..BATCH {
            if self.control.len() >= CONTROL_BACKLOG {
                return queues.pause(CONTROL_TX);
            }
            let Some(chain) = queues.pop(CONTROL_TX)? else {
                if queues.resume(CONTROL_TX)? {
                    continue;
                }
                return Ok(());
            };
            let mut message = [0; CONTROL_LEN];
            match chain.read(queues.view(), 0, &mut message) {
                Ok(CONTROL_LEN) => self.receive_control(message, queues),
                Ok(length) => tracing::debug!(length, "console control message is too short: dropped"),
                Err(error) => tracing::debug!(%error, "console control message cannot be read: dropped"),
            }
            queues.complete(CONTROL_TX, &chain, 0)?;
        }
        queues.again(CONTROL_TX);
        Ok(())
    }

    /// Hands waiting control messages to the guest.
    fn flush_control(&mut self, queues: &mut Queues<'_>) -> Result<(), QueueError> {
        let full = self.control.len() >= CONTROL_BACKLOG;
        while let Some(message) = self.control.front() {
            let Some(chain) = queues.pop(CONTROL_RX)? else {
                if queues.resume(CONTROL_RX)? {
                    continue;
                }
                break;
            };
            let written = if chain.writable_len() < message.len() as u64 {
                tracing::debug!(
                    room = chain.writable_len(),
                    "console control buffer is too small: message dropped"
                );
                0
            } else {
                chain.write(queues.view(), 0, message).unwrap_or_else(|error| {
                    tracing::debug!(%error, "console control buffer cannot be written: message dropped");
                    0
                })
            };
            self.control.pop_front();
            queues.complete(CONTROL_RX, &chain, written as u32)?;
        }
        if full && self.control.len() < CONTROL_BACKLOG {
            queues.again(CONTROL_TX);
        }
        Ok(())
    }

    /// Moves bytes of the host into the guest's buffers.
    fn fill(&mut self, index: usize, queues: &mut Queues<'_>) -> Result<(), QueueError> {
        let queue = rx_queue(index);
        let Some(port) = self.ports.get_mut(index).filter(|port| port.guest_open) else { return Ok(()) };
        for _ in 0..BATCH {
            if port.to_guest.is_empty() {
                return Ok(());
            }
            let Some(chain) = queues.pop(queue)? else {
                if queues.resume(queue)? {
                    continue;
                }
                return Ok(());
            };
            let (first, second) = port.to_guest.as_slices();
            let written = chain.write(queues.view(), 0, first).and_then(|done| {
                if done < first.len() {
                    Ok(done)
                } else {
                    Ok(done + chain.write(queues.view(), done as u64, second)?)
                }
            });
            let written = written.unwrap_or_else(|error| {
                tracing::debug!(port = index, %error, "console buffer cannot be written: returned empty");
                0
            });
            port.to_guest.drain(..written);
            queues.complete(queue, &chain, written as u32)?;
        }
        queues.again(queue);
        Ok(())
    }

    /// Moves the guest's bytes into the port's ring, as far as there is room.
    fn drain(&mut self, index: usize, queues: &mut Queues<'_>) -> Result<(), QueueError> {
        let queue = tx_queue(index);
        let Some(port) = self.ports.get_mut(index) else { return Ok(()) };
        for _ in 0..BATCH {
            let (chain, taken) = match port.partial.take() {
                Some(partial) => partial,
                None => match queues.pop(queue)? {
                    Some(chain) => (chain, 0),
                    None if queues.resume(queue)? => continue,
                    None => return Ok(()),
                },
            };
            let room = RING_SIZE - port.from_guest.len();
            let mut bytes = vec![0; room.min(usize::try_from(chain.readable_len() - taken).unwrap_or(room))];
            match chain.read(queues.view(), taken, &mut bytes) {
                Ok(length) => {
                    port.from_guest.extend(&bytes[..length]);
                    let taken = taken + length as u64;
                    if taken < chain.readable_len() {
                        port.partial = Some((chain, taken));
                        return queues.pause(queue);
                    }
                }
                Err(error) => tracing::debug!(port = index, %error, "console buffer cannot be read: dropped"),
            }
            queues.complete(queue, &chain, 0)?;
        }
        queues.again(queue);
        Ok(())
    }
}

/// Queue with the guest's empty buffers for `port` (section 5.3.2).
fn rx_queue(port: usize) -> u16 {
    if port == 0 { 0 } else { 2 * (port as u16 + 1) }
}

/// Queue with the guest's data of `port`.
fn tx_queue(port: usize) -> u16 {
    rx_queue(port) + 1
}

impl VirtioDevice for Console {
    fn device_type(&self) -> u16 {
        DEVICE_TYPE
    }

    fn class(&self) -> u32 {
        // Simple communication controller, other.
        0x07_8000
    }

    fn features(&self) -> u64 {
        F_MULTIPORT
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    /// struct virtio_console_config: columns, rows, max_nr_ports, emerg_wr. Only max_nr_ports means something.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 12];
        config[4..8].copy_from_slice(&(self.ports.len().max(1) as u32).to_le_bytes());
        for (index, byte) in data.iter_mut().enumerate() {
            let at = usize::try_from(offset).unwrap_or(usize::MAX).saturating_add(index);
            *byte = config.get(at).copied().unwrap_or(0);
        }
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, _features: u64) {}

    fn reset(&mut self) {
        self.control.clear();
        for port in &mut self.ports {
            port.guest_open = false;
            port.guest_ready = false;
            port.partial = None;
            port.to_guest.clear();
        }
    }

    fn process_queue(&mut self, index: u16, queues: &mut Queues<'_>) -> Result<(), QueueError> {
        match index {
            CONTROL_RX => self.flush_control(queues),
            CONTROL_TX => {
                self.drain_control(queues)?;
                self.flush_control(queues)
            }
            _ => {
                let port = usize::from(if index < CONTROL_RX { 0 } else { index / 2 - 1 });
                if index.is_multiple_of(2) { self.fill(port, queues) } else { self.drain(port, queues) }
            }
        }
    }

    fn host_ready(&mut self, queues: &mut Queues<'_>) -> Result<(), QueueError> {
        self.flush_control(queues)?;
        for port in 0..self.ports.len() {
            self.fill(port, queues)?;
            if self.ports[port].partial.is_some() && self.ports[port].from_guest.len() < RING_SIZE {
                self.drain(port, queues)?;
            }
        }
        Ok(())
    }
}

impl VirtioPci<Console> {
    /// Sends `bytes` to whoever has `port` open in the guest; returns how many were accepted. The rest is to be
    /// offered again when the guest has read: after the next [`QueueHandler::process_queue`] of this device.
    ///
    /// [`QueueHandler::process_queue`]: super::QueueHandler::process_queue
    pub fn port_write(&mut self, port: usize, bytes: &[u8], effects: &mut Effects) -> usize {
        let accepted = self.device_mut().port_write(port, bytes);
        if accepted > 0 {
            self.service(effects);
        }
        accepted
    }

    /// Takes what the guest has written to `port`; returns how much. Room made this way lets a blocked writer in
    /// the guest go on.
    pub fn port_read(&mut self, port: usize, buffer: &mut [u8], effects: &mut Effects) -> usize {
        let taken = self.device_mut().port_read(port, buffer);
        if taken > 0 {
            self.service(effects);
        }
        taken
    }

    /// Connects or disconnects the host's end of `port`. While it is disconnected the guest's reads end at once.
    pub fn set_host_open(&mut self, port: usize, open: bool, effects: &mut Effects) {
        self.device_mut().set_host_open(port, open);
        self.service(effects);
    }
}

#[cfg(test)]
#[path = "console_test.rs"]
mod tests;
