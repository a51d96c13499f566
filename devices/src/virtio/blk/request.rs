//! Requests as the driver writes them (virtio 1.2, section 5.2.6): a header of 16 bytes, data, and a status byte.
//!
//! The parts may be cut into buffers in any way (section 2.7.4), so a request is taken apart by bytes: the header is
//! the first 16 that the device may read, the status is the last one that it may write.

use std::ops::Range;

use crate::dma::{DmaError, DmaView};
use crate::virtio::queue::{Chain, Segment};

/// Bytes of a sector, whatever the block size (section 5.2.4).
pub const SECTOR: u64 = 512;

/// Most data segments that a driver may use, and their greatest length: what the configuration says.
pub(super) const SEG_MAX: u32 = 126;
/// See [`SEG_MAX`].
pub(super) const SIZE_MAX: u32 = 1 << 20;
/// Most ranges of one discard or write-zeroes request.
pub(super) const MAX_RANGES: u32 = 16;
/// Most sectors of one such range.
pub(super) const MAX_RANGE_SECTORS: u32 = 1 << 22;
/// Most bytes of data of a read or write: more than a driver that keeps to the limits can ask for.
const MAX_DATA: u64 = SEG_MAX as u64 * SIZE_MAX as u64;

const HEADER: usize = 16;
/// struct virtio_blk_discard_write_zeroes.
const RANGE: usize = 16;
const FLAG_UNMAP: u32 = 1;
/// Length of the answer to a request for the disk's name.
pub(super) const ID_LENGTH: usize = 20;

const TYPE_IN: u32 = 0;
const TYPE_OUT: u32 = 1;
const TYPE_FLUSH: u32 = 4;
const TYPE_GET_ID: u32 = 8;
const TYPE_DISCARD: u32 = 11;
const TYPE_WRITE_ZEROES: u32 = 13;

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operation {
    /// Sectors go to guest memory (VIRTIO_BLK_T_IN).
    Read,
    /// Guest memory goes to sectors (VIRTIO_BLK_T_OUT).
    Write,
    /// What was written before is made to last (VIRTIO_BLK_T_FLUSH).
    Flush,
    /// The disk says its name (VIRTIO_BLK_T_GET_ID).
    GetId,
    /// Sectors are of no use any more (VIRTIO_BLK_T_DISCARD).
    Discard,
    /// Sectors become zeros (VIRTIO_BLK_T_WRITE_ZEROES).
    WriteZeroes,
}

/// How a request ends (section 5.2.6, the status byte).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Status {
    /// VIRTIO_BLK_S_OK.
    Ok = 0,
    /// VIRTIO_BLK_S_IOERR.
    IoError = 1,
    /// VIRTIO_BLK_S_UNSUPP.
    Unsupported = 2,
}

/// What the disk is, as far as requests are checked against it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Limits {
    /// Sectors.
    pub(super) sectors: u64,
    /// Nothing may be changed.
    pub(super) readonly: bool,
}

/// A request that can be carried out: inside the disk, and of the right shape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    pub(super) operation: Operation,
    /// First sector; of the first range for those that have several.
    pub(super) sector: u64,
    /// Bytes of the disk that it is about.
    pub(super) bytes: u64,
    /// Bytes of the disk, of a discard or of zeros; and whether each may lose its storage.
    pub(super) ranges: Vec<(Range<u64>, bool)>,
    pub(super) chain: Chain,
}

/// What a chain comes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Parsed {
    /// A request.
    Good(Request),
    /// Nothing that this disk does; the chain has room for a status.
    Refused(Chain, Status),
    /// There is no room for a status.
    NoStatus(Chain),
}

impl Request {
    /// Takes `chain` apart. Header and ranges are read once, here: what the driver changes later has no effect.
    pub(super) fn parse(chain: Chain, view: &DmaView, limits: &Limits) -> Parsed {
        if chain.writable_len() == 0 {
            return Parsed::NoStatus(chain);
        }
        match Self::checked(&chain, view, limits) {
            Ok((operation, sector, bytes, ranges)) => {
                Parsed::Good(Self { operation, sector, bytes, ranges, chain })
            }
            Err(status) => Parsed::Refused(chain, status),
        }
    }

    fn checked(chain: &Chain, view: &DmaView, limits: &Limits) -> Result<Parts, Status> {
        let mut header = [0; HEADER];
        if chain.read(view, 0, &mut header).ok() != Some(HEADER) {
            return Err(Status::IoError);
        }
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        let out = chain.readable_len() - HEADER as u64;
        let data_in = chain.writable_len() - 1;
        let none = Vec::new();
        match u32::from_le_bytes([t0, t1, t2, t3]) {
            TYPE_IN if out == 0 => {
                limits.check_data(sector, data_in)?;
                Ok((Operation::Read, sector, data_in, none))
            }
            TYPE_OUT if data_in == 0 => {
                limits.check_data(sector, out)?;
                limits.check_change()?;
                Ok((Operation::Write, sector, out, none))
            }
            TYPE_FLUSH if data_in == 0 => Ok((Operation::Flush, 0, 0, none)),
            TYPE_GET_ID if out == 0 && data_in >= ID_LENGTH as u64 => {
                Ok((Operation::GetId, 0, ID_LENGTH as u64, none))
            }
            kind @ (TYPE_DISCARD | TYPE_WRITE_ZEROES) if data_in == 0 => {
                limits.check_change()?;
                let zero = kind == TYPE_WRITE_ZEROES;
                let ranges = limits.read_ranges(chain, view, out, zero)?;
                let bytes = ranges.iter().map(|(range, _)| range.end - range.start).sum();
                let sector = ranges.first().map_or(0, |(range, _)| range.start / SECTOR);
                let operation = if zero { Operation::WriteZeroes } else { Operation::Discard };
                Ok((operation, sector, bytes, ranges))
            }
            TYPE_IN | TYPE_OUT | TYPE_FLUSH | TYPE_GET_ID | TYPE_DISCARD | TYPE_WRITE_ZEROES => {
                Err(Status::IoError)
            }
            _ => Err(Status::Unsupported),
        }
    }

    /// What the request does.
    pub fn operation(&self) -> Operation {
        self.operation
    }

    /// The first sector that it is about; 0 where it is about none.
    pub fn sector(&self) -> u64 {
        self.sector
    }

    /// Bytes of the disk that it is about: of data, where there is some.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The sectors that it touches; empty for a flush or the name.
    pub fn sectors(&self) -> Vec<Range<u64>> {
        match self.operation {
            Operation::Read | Operation::Write => vec![self.sector..self.sector + self.bytes / SECTOR],
            Operation::Discard | Operation::WriteZeroes => {
                self.ranges.iter().map(|(range, _)| range.start / SECTOR..range.end / SECTOR).collect()
            }
            Operation::Flush | Operation::GetId => Vec::new(),
        }
    }

    /// The guest memory that data comes from or goes to; none where there is no data.
    pub fn memory(&self) -> Vec<Segment> {
        match self.operation {
            Operation::Read | Operation::GetId => self.chain.writable_parts(0, self.bytes),
            Operation::Write => self.chain.readable_parts(HEADER as u64, self.bytes),
            _ => Vec::new(),
        }
    }

    /// Reads data of the driver, `offset` bytes in.
    pub(super) fn fetch(&self, view: &DmaView, offset: u64, data: &mut [u8]) -> Result<(), DmaError> {
        self.chain.read(view, HEADER as u64 + offset, data).map(|_| ())
    }

    /// Writes data for the driver, `offset` bytes in.
    pub(super) fn deliver(&self, view: &DmaView, offset: u64, data: &[u8]) -> Result<(), DmaError> {
        self.chain.write(view, offset, data).map(|_| ())
    }
}

/// Writes the status into the last byte that the device may write; returns the length that the driver is told: all
/// of what may be written, as the status stands at its end, or nothing if that byte cannot be reached.
pub(super) fn finish(chain: &Chain, view: &DmaView, status: Status) -> u32 {
    let length = chain.writable_len();
    let Some(last) = length.checked_sub(1) else { return 0 };
    match chain.write(view, last, &[status as u8]) {
        Ok(1) => u32::try_from(length).unwrap_or(u32::MAX),
        _ => 0,
    }
}

/// Operation, first sector, bytes, ranges.
type Parts = (Operation, u64, u64, Vec<(Range<u64>, bool)>);

impl Limits {
    fn check_change(&self) -> Result<(), Status> {
        if self.readonly { Err(Status::IoError) } else { Ok(()) }
    }

    fn check_data(&self, sector: u64, bytes: u64) -> Result<(), Status> {
        if bytes.is_multiple_of(SECTOR) && bytes <= MAX_DATA && self.holds(sector, bytes / SECTOR) {
            Ok(())
        } else {
            Err(Status::IoError)
        }
    }

    fn holds(&self, sector: u64, count: u64) -> bool {
        sector.checked_add(count).is_some_and(|end| end <= self.sectors)
    }

    fn read_ranges(
        &self,
        chain: &Chain,
        view: &DmaView,
        length: u64,
        zero: bool,
    ) -> Result<Vec<(Range<u64>, bool)>, Status> {
        let count = length / RANGE as u64;
        if !length.is_multiple_of(RANGE as u64) || !(1..=u64::from(MAX_RANGES)).contains(&count) {
            return Err(Status::IoError);
        }
        let mut bytes = vec![0; length as usize];
        chain.read(view, HEADER as u64, &mut bytes).map_err(|_| Status::IoError)?;
        let range = |bytes: &[u8; RANGE]| {
            let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = *bytes;
            let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
            let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
            let flags = u32::from_le_bytes(flags);
            // Unmap means something for zeros only, and nothing else is known (section 5.2.6.2).
            if flags & !FLAG_UNMAP != 0 || flags != 0 && !zero {
                return Err(Status::Unsupported);
            }
            if sectors > MAX_RANGE_SECTORS || !self.holds(sector, sectors.into()) {
                return Err(Status::IoError);
            }
            let start = sector * SECTOR;
            Ok((start..start + u64::from(sectors) * SECTOR, flags & FLAG_UNMAP != 0))
        };
        bytes.as_chunks::<RANGE>().0.iter().map(range).collect()
    }
}
