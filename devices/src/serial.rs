//! The serial console: a 16550A at its PC ports, on [`vm_superio::Serial`].
//!
//! # What a console byte costs
//! Linux writes its log with two port accesses a byte: it reads LSR until the transmitter is empty, then writes
//! THR (`drivers/tty/serial/8250/8250_port.c` `serial8250_console_putchar`). Nothing that a 16550 may answer
//! changes that before user space has opened the line: the FIFO path (`serial8250_console_fifo_write`, one LSR
//! read for each 16 bytes) wants TTY_PORT_INITIALIZED. Once the line is open the kernel uses it by itself, because
//! this device identifies as a 16550A. What can be saved before that is the exit for the THR write, by a
//! coalesced port write in KVM (KVM_CAP_COALESCED_PIO on [`THR`]): the queue is then drained at the LSR read.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io::{self, Write};
use std::sync::Arc;

use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial as Uart};

use crate::bus::{BusDevice, Effects};
use crate::irq::IrqLine;

/// Offset of the transmitter holding register: a byte written here goes out.
pub const THR: u64 = 0;

/// Offset of the receiver buffer register.
const RBR: u8 = 0;
/// Offset of the interrupt identification register.
const IIR: u8 = 2;
/// Offset of the modem control register.
const MCR: u8 = 4;
/// Number of registers.
const REGISTERS: u64 = 8;
/// IIR identification bits of "received data available" and "transmitter empty", as vm-superio sets them.
const IIR_RECEIVED: u8 = 1 << 2;
const IIR_TRANSMITTER_EMPTY: u8 = 1 << 1;
/// Input that waits for the guest to read it; more is refused.
const INPUT_LIMIT: usize = 64 << 10;

/// The interrupt line as vm-superio wants it.
struct Line(Arc<dyn IrqLine>);

impl Trigger for Line {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.trigger();
        Ok(())
    }
}

/// The output as vm-superio wants it, without the flush that it adds to every byte.
struct Output(Box<dyn Write + Send>);

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A serial line.
///
/// Wide accesses are split into bytes; offsets behind the registers read as zero.
pub struct Serial {
    uart: Uart<Line, NoEvents, Output>,
    input: VecDeque<u8>,
    lost: u64,
}

impl Serial {
    /// Number of ports.
    pub const SIZE: u64 = REGISTERS;

    /// A line that raises `line` and sends what the guest writes to `output`, byte by byte and without flushes:
    /// `output` decides itself when to pass bytes on. An output that fails loses the byte, which is counted.
    pub fn new(line: Arc<dyn IrqLine>, output: Box<dyn Write + Send>) -> Self {
        Self { uart: Uart::new(Line(line), Output(output)), input: VecDeque::new(), lost: 0 }
    }

    /// Gives the guest `bytes` to read, and tells how many of them were taken: all, unless 64 KiB are waiting.
    pub fn enqueue(&mut self, bytes: &[u8]) -> usize {
        let taken = bytes.len().min(INPUT_LIMIT - self.input.len());
        self.input.extend(&bytes[..taken]);
        self.refill();
        taken
    }

    /// Number of bytes that the output refused.
    pub fn lost(&self) -> u64 {
        self.lost
    }

    /// Moves waiting input into the receive FIFO as far as it has room; the FIFO raises the interrupt.
    fn refill(&mut self) {
        let room = self.uart.fifo_capacity().min(self.input.len());
        let (front, back) = self.input.as_slices();
        let chunk: Vec<u8> = front.iter().chain(back).take(room).copied().collect();
        // Refused as a whole in loop-back mode; it then stays for later.
        if let Ok(taken) = self.uart.enqueue_raw_bytes(&chunk) {
            self.input.drain(..taken);
        }
    }

    fn read_register(&mut self, offset: u8) -> u8 {
        let value = self.uart.read(offset);
        match offset {
            RBR if !self.input.is_empty() => self.refill(),
            // vm-superio reports both causes at once, which a 16550 calls "line status". The higher goes first.
            IIR if value & IIR_RECEIVED != 0 => return value & !IIR_TRANSMITTER_EMPTY,
            _ => {}
        }
        value
    }

    fn write_register(&mut self, offset: u8, value: u8) {
        if let Err(error) = self.uart.write(offset, value) {
            if self.lost == 0 {
                tracing::warn!(%error, "Serial output cannot be written; console bytes are being lost");
            }
            self.lost += 1;
        }
        // Loop-back mode may have ended.
        if offset == MCR && !self.input.is_empty() {
            self.refill();
        }
    }
}

impl BusDevice for Serial {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = if at < REGISTERS { self.read_register(at as u8) } else { 0 };
        }
    }

    fn write(&mut self, offset: u64, data: &[u8], _effects: &mut Effects) {
        for (at, &value) in (offset..).zip(data) {
            if at < REGISTERS {
                self.write_register(at as u8, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use proptest::prelude::*;

    use super::*;
    use crate::platform::testing::Edges;

    const IER: u64 = 1;
    const LCR: u64 = 3;
    const LSR: u64 = 5;

    /// Output that a test looks at; refuses everything while `broken`.
    #[derive(Clone, Default)]
    struct Tape(Arc<Mutex<(Vec<u8>, bool)>>);

    impl Write for Tape {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let mut tape = self.0.lock().unwrap();
            if tape.1 {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            tape.0.extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            panic!("a flush for every byte");
        }
    }

    fn serial() -> (Serial, Tape, Arc<Edges>) {
        let (tape, line) = (Tape::default(), Arc::new(Edges::default()));
        (Serial::new(line.clone(), Box::new(tape.clone())), tape, line)
    }

    fn get(serial: &mut Serial, offset: u64) -> u8 {
        let mut data = [0];
        serial.read(offset, &mut data);
        data[0]
    }

    fn put(serial: &mut Serial, offset: u64, value: u8) {
        serial.write(offset, &[value], &mut Effects::new());
    }

    #[test]
    fn bytes_go_out_without_flushes() {
        let (mut serial, tape, _) = serial();
        for byte in *b"hello\r\n" {
            assert_eq!(get(&mut serial, LSR) & 0x60, 0x60, "always ready");
            put(&mut serial, THR, byte);
        }
        assert_eq!(tape.0.lock().unwrap().0, b"hello\r\n");
    }

    #[test]
    fn linux_finds_a_16550a() {
        let (mut serial, _, _) = serial();
        // autoconfig_16550a in drivers/tty/serial/8250/8250_port.c.
        put(&mut serial, LCR, 0);
        put(&mut serial, 2, 1);
        assert_eq!(get(&mut serial, 2) >> 6, 3, "FIFOs enabled");
        put(&mut serial, LCR, 0xBF);
        assert_ne!(get(&mut serial, 2), 0, "no enhanced feature register");
        // The scratch and loop-back tests of autoconfig.
        put(&mut serial, LCR, 0);
        put(&mut serial, 7, 0xA5);
        assert_eq!(get(&mut serial, 7), 0xA5);
        put(&mut serial, MCR.into(), 0x1A);
        assert_eq!(get(&mut serial, 6) & 0xF0, 0x90);
    }

    #[test]
    fn the_transmitter_interrupt_comes_once_until_acknowledged() {
        let (mut serial, _, line) = serial();
        put(&mut serial, IER, 2);
        assert_eq!(line.count(), 1);
        for byte in *b"0123456789abcdef" {
            put(&mut serial, THR, byte);
        }
        assert_eq!(line.count(), 1);
        assert_eq!(get(&mut serial, 2), 0xC2);
        assert_eq!(get(&mut serial, 2), 0xC1, "read once");
        put(&mut serial, THR, b'x');
        assert_eq!(line.count(), 2);
    }

    #[test]
    fn input_longer_than_the_fifo_arrives_whole() {
        let (mut serial, _, line) = serial();
        let text: Vec<u8> = (0..1000u32).map(|n| n as u8).collect();
        assert_eq!(serial.enqueue(&text), 1000);
        assert_eq!(line.count(), 0, "the guest has not enabled the interrupt");
        put(&mut serial, IER, 1);
        assert_eq!(line.count(), 1);
        let mut read = Vec::new();
        while get(&mut serial, LSR) & 1 != 0 {
            read.push(get(&mut serial, 0));
        }
        assert_eq!(read, text);
    }

    #[test]
    fn input_is_bounded() {
        let (mut serial, _, _) = serial();
        assert_eq!(serial.enqueue(&vec![1; INPUT_LIMIT]), INPUT_LIMIT);
        // What moved on to the FIFO made room.
        assert_eq!(serial.enqueue(&vec![2; INPUT_LIMIT]), 64);
        assert_eq!(serial.enqueue(b"x"), 0);
    }

    #[test]
    fn input_waits_while_the_line_loops_back() {
        let (mut serial, _, _) = serial();
        put(&mut serial, MCR.into(), 0x10);
        assert_eq!(serial.enqueue(b"ab"), 2);
        put(&mut serial, THR, b'L');
        assert_eq!(get(&mut serial, 0), b'L');
        put(&mut serial, MCR.into(), 0);
        assert_eq!(get(&mut serial, LSR) & 1, 1);
        assert_eq!([get(&mut serial, 0), get(&mut serial, 0)], *b"ab");
    }

    #[test]
    fn only_one_cause_is_identified_at_a_time() {
        let (mut serial, _, _) = serial();
        put(&mut serial, IER, 3);
        serial.enqueue(b"a");
        assert_eq!(get(&mut serial, 2), 0xC4);
    }

    #[test]
    fn a_broken_output_is_counted_and_goes_on() {
        let (mut serial, tape, _) = serial();
        tape.0.lock().unwrap().1 = true;
        put(&mut serial, THR, b'a');
        put(&mut serial, THR, b'b');
        assert_eq!(serial.lost(), 2);
        tape.0.lock().unwrap().1 = false;
        put(&mut serial, THR, b'c');
        assert_eq!(tape.0.lock().unwrap().0, b"c");
    }

    proptest! {
        #[test]
        fn any_access_is_defined(
            accesses in prop::collection::vec(
                (0u64..12, prop::collection::vec(any::<u8>(), 1..=8), 0u8..3), 0..128),
        ) {
            let (mut serial, _, _) = serial();
            for (offset, mut data, kind) in accesses {
                match kind {
                    0 => serial.read(offset, &mut data),
                    1 => serial.write(offset, &data, &mut Effects::new()),
                    _ => { serial.enqueue(&data); }
                }
                prop_assert!(serial.input.len() <= INPUT_LIMIT);
            }
        }
    }
}
