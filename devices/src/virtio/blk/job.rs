//! What a worker does for a request: moves its data between the disk's storage and guest memory.

use std::io;
use std::sync::{Arc, PoisonError, RwLock};

use super::request::{ID_LENGTH, Operation, Request, Status};
use crate::dma::Dma;

/// Bytes that are moved at a time.
const CHUNK: usize = 256 * 1024;

/// Where a disk's bytes are. Called by several workers at once; every range lies inside the disk.
pub trait Storage: Send + Sync {
    /// Reads all of `data` at `offset`.
    ///
    /// # Errors
    /// As the host has it. The request fails.
    fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()>;

    /// Writes all of `data` at `offset`.
    ///
    /// # Errors
    /// As [`Storage::read`].
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()>;

    /// Makes what was written last.
    ///
    /// # Errors
    /// As [`Storage::read`].
    fn flush(&self) -> io::Result<()>;

    /// Makes `length` bytes at `offset` zeros; they may lose their storage if `unmap`.
    ///
    /// # Errors
    /// As [`Storage::read`].
    fn zero(&self, offset: u64, length: u64, unmap: bool) -> io::Result<()>;

    /// Forgets `length` bytes at `offset`, if it can.
    ///
    /// # Errors
    /// As [`Storage::read`].
    fn discard(&self, offset: u64, length: u64) -> io::Result<()>;
}

/// What separates the requests of one life of the device from those of the next: a reset waits until the pieces that
/// are being moved have been moved, and no other piece of an old request is moved after it.
#[derive(Clone, Debug, Default)]
pub(super) struct Gate(Arc<RwLock<u64>>);

impl Gate {
    /// The life that is now.
    pub(super) fn life(&self) -> u64 {
        *self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins another life.
    pub(super) fn close(&self) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) += 1;
    }

    /// Moves a piece, unless `life` is over.
    fn pass<T>(&self, life: u64, piece: impl FnOnce() -> Result<T, Status>) -> Result<T, Status> {
        let now = self.0.read().unwrap_or_else(PoisonError::into_inner);
        if *now == life { piece() } else { Err(Status::IoError) }
    }
}

/// How much of a request is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// All of it.
    Whole,
    /// Only its first bytes; it ends with this status, whatever they came to.
    Torn {
        /// So many.
        bytes: u64,
        /// The status.
        status: Status,
    },
}

/// A request on its way to a worker.
#[derive(Clone, Debug)]
pub struct Job {
    pub(super) number: u64,
    pub(super) request: Arc<Request>,
    pub(super) dma: Dma,
    /// The memory that the request means is that of its submission.
    pub(super) generation: u64,
    pub(super) gate: Gate,
    pub(super) life: u64,
    pub(super) extent: Extent,
    /// The driver has not taken VIRTIO_BLK_F_FLUSH: each write lasts when it is done (section 5.2.6.2).
    pub(super) write_through: bool,
    pub(super) id: [u8; ID_LENGTH],
}

/// What came of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Done {
    pub(super) number: u64,
    pub(super) status: Status,
}

impl Job {
    /// Does the job. Takes as long as `storage` does; to be called where nobody waits. What is in `buffer`, and how long it
    /// is, means nothing: it is kept from job to job, so that not each of them has to be given memory.
    pub fn perform(&self, storage: &dyn Storage, buffer: &mut Vec<u8>) -> Done {
        let result = self.carry_out(storage, buffer);
        let status = match self.extent {
            Extent::Whole => result.err().unwrap_or(Status::Ok),
            Extent::Torn { status, .. } => status,
        };
        Done { number: self.number, status }
    }

    fn carry_out(&self, storage: &dyn Storage, buffer: &mut Vec<u8>) -> Result<(), Status> {
        let request = &*self.request;
        match request.operation {
            Operation::Read => self.pieces(buffer, |at, data| {
                self.stored(storage.read(self.start() + at, data))?;
                let view = self.dma.view_of(self.generation);
                request.deliver(&view, at, data).map_err(|_| Status::IoError)
            }),
            Operation::Write => {
                self.pieces(buffer, |at, data| {
                    let view = self.dma.view_of(self.generation);
                    request.fetch(&view, at, data).map_err(|_| Status::IoError)?;
                    self.stored(storage.write(self.start() + at, data))
                })?;
                self.settle(storage)
            }
            Operation::Flush if self.extent == Extent::Whole => self.stored(storage.flush()),
            Operation::Flush => Ok(()),
            Operation::GetId => self.gate.pass(self.life, || {
                let view = self.dma.view_of(self.generation);
                request.deliver(&view, 0, &self.id).map_err(|_| Status::IoError)
            }),
            Operation::Discard | Operation::WriteZeroes => {
                let mut left = self.length();
                for (range, unmap) in &request.ranges {
                    let length = (range.end - range.start).min(left);
                    left -= length;
                    if length == 0 {
                        continue;
                    }
                    self.gate.pass(self.life, || {
                        self.stored(match request.operation {
                            Operation::Discard => storage.discard(range.start, length),
                            _ => storage.zero(range.start, length, *unmap),
                        })
                    })?;
                }
                self.settle(storage)
            }
        }
    }

    /// Where on the disk it begins, in bytes.
    fn start(&self) -> u64 {
        self.request.sector * super::SECTOR
    }

    /// How many bytes are to be done.
    fn length(&self) -> u64 {
        match self.extent {
            Extent::Whole => self.request.bytes,
            Extent::Torn { bytes, .. } => bytes.min(self.request.bytes),
        }
    }

    /// Moves the data piece by piece.
    fn pieces(
        &self,
        buffer: &mut Vec<u8>,
        mut piece: impl FnMut(u64, &mut [u8]) -> Result<(), Status>,
    ) -> Result<(), Status> {
        let length = self.length();
        let largest = CHUNK.min(usize::try_from(length).unwrap_or(CHUNK));
        if buffer.len() < largest {
            buffer.resize(largest, 0);
        }
        let mut at = 0;
        while at < length {
            let now = largest.min(usize::try_from(length - at).unwrap_or(CHUNK));
            self.gate.pass(self.life, || piece(at, &mut buffer[..now]))?;
            at += now as u64;
        }
        Ok(())
    }

    fn settle(&self, storage: &dyn Storage) -> Result<(), Status> {
        if self.write_through { self.stored(storage.flush()) } else { Ok(()) }
    }

    fn stored(&self, result: io::Result<()>) -> Result<(), Status> {
        result.map_err(|error| {
            let request = &self.request;
            tracing::warn!(%error, operation = ?request.operation, sector = request.sector, "a disk's storage failed");
            Status::IoError
        })
    }
}
