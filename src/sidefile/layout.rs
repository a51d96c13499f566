//! The bytes of a side file.
//!
//! ```text
//! head        magic, version, size of the device, length of the content, length of the file, SHA-256 of the head
//!             before it and the content
//! content     number of DIMMs, labels and record of each, poison
//! journal     entries, each: length of the change, a check of the length, a check of the change, the change; zeros
//!             behind the last one. A check is the first bytes of the SHA-256 of the head's digest, the entry's place
//!             and what is checked
//! ```
//!
//! All numbers are little-endian. The file has its full length from the start, so that one that was cut short is
//! known. An entry that is not whole can only be the last, and was never acknowledged: it counts for nothing, and what
//! follows it is zero. Anything else in the journal is damage.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use sha2::{Digest, Sha256};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Change, Content, Damage};

const MAGIC: [u8; 12] = *b"aconite-pmem";
/// The version that is written.
pub(super) const VERSION: u32 = 2;
/// The version before, which is read: content and changes are those of one DIMM, and do not name it.
pub(super) const ONE_DIMM: u32 = 1;
/// Smallest journal in bytes. A larger content has one of its own length, so that the cost of writing it anew stays in
/// proportion to that of the changes between.
const JOURNAL_MIN: u64 = 256 << 10;
/// Longest file that is read: far more than a device can have.
pub(super) const MAX_LENGTH: u64 = 1 << 30;

#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Head {
    magic: [u8; 12],
    version: U32,
    device_size: U64,
    content_length: U64,
    file_length: U64,
    digest: [u8; 32],
}
const HEAD: u64 = size_of::<Head>() as u64;
const DIGEST: usize = size_of::<Head>() - 32;
const _: () = assert!(HEAD == 72);

/// Head of an entry of the journal.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct EntryHead {
    /// Bytes of the change, which follow.
    length: U32,
    length_check: [u8; 4],
    change_check: [u8; 8],
}
const ENTRY_HEAD: u64 = size_of::<EntryHead>() as u64;
const _: () = assert!(ENTRY_HEAD == 16);

impl EntryHead {
    fn new(change: &[u8], digest: &[u8; 32], place: u64) -> Self {
        let length = U32::new(change.len() as u32);
        let length_check = check(length.as_bytes(), digest, place);
        Self { length, length_check, change_check: check(change, digest, place) }
    }

    /// The head at the start of `rest`, if it is whole.
    fn read(rest: &[u8], digest: &[u8; 32], place: u64) -> Option<Self> {
        let (head, _) = Self::read_from_prefix(rest).ok()?;
        (check(head.length.as_bytes(), digest, place) == head.length_check).then_some(head)
    }
}

/// The journal of a file, up to where the next entry goes.
#[derive(Debug)]
pub(super) struct Journal {
    digest: [u8; 32],
    /// Offset in the file of the next entry.
    next: u64,
    file_length: u64,
}

/// A file with `content` and an empty journal: its bytes before the journal, and the journal.
pub(super) fn seal(content: &Content, device_size: u64) -> (Vec<u8>, Journal) {
    let content = content.encode();
    let next = HEAD + content.len() as u64;
    let file_length = next + JOURNAL_MIN.max(content.len() as u64);
    let mut head = Head {
        magic: MAGIC,
        version: VERSION.into(),
        device_size: device_size.into(),
        content_length: (content.len() as u64).into(),
        file_length: file_length.into(),
        digest: [0; 32],
    };
    head.digest = head.sum(&content);
    let journal = Journal { digest: head.digest, next, file_length };
    ([head.as_bytes(), &content].concat(), journal)
}

impl Head {
    /// The head of a file of `length` bytes, of which `bytes` are all or the first.
    pub(super) fn read(bytes: &[u8], length: u64) -> Result<Self, Damage> {
        let Ok((head, _)) = Self::read_from_prefix(bytes) else {
            // What is there of the magic tells a file that was cut short from another.
            let known = bytes.len().min(MAGIC.len());
            let ours = known > 0 && bytes[..known] == MAGIC[..known];
            return Err(if ours { Damage::Length { found: length, expected: HEAD } } else { Damage::Magic });
        };
        if head.magic != MAGIC {
            return Err(Damage::Magic);
        }
        if !(ONE_DIMM..=VERSION).contains(&head.version.get()) {
            return Err(Damage::Version { found: head.version.get(), newest: VERSION });
        }
        if head.file_length.get() != length {
            return Err(Damage::Length { found: length, expected: head.file_length.get() });
        }
        Ok(head)
    }

    /// Size of the device in bytes.
    pub(super) fn device_size(&self) -> u64 {
        self.device_size.get()
    }

    /// The content with all changes of the journal, from all bytes of the file; and the journal, unless its last entry
    /// is not whole or the file has an older version: nothing can follow that.
    pub(super) fn load(&self, bytes: &[u8]) -> Result<(Content, Option<Journal>), Damage> {
        let (tail, version) = (&bytes[size_of::<Self>()..], self.version.get());
        let content = usize::try_from(self.content_length.get())
            .ok()
            .and_then(|length| tail.get(..length))
            .filter(|content| self.sum(content) == self.digest)
            .ok_or(Damage::Checksum)?;
        let mut next = HEAD + content.len() as u64;
        let mut content =
            Content::decode(content, version).ok_or(Damage::Content("its content cannot be read"))?;
        loop {
            let rest = bytes.get(next as usize..).unwrap_or_default();
            let head = EntryHead::read(rest, &self.digest, next);
            let end = ENTRY_HEAD as usize + head.as_ref().map_or(0, |head| head.length.get() as usize);
            let change = rest.get(ENTRY_HEAD as usize..end).zip(head);
            match change.filter(|(change, head)| check(change, &self.digest, next) == head.change_check) {
                Some((change, _)) => {
                    next += end as u64;
                    Change::decode(change, version)
                        .ok_or(Damage::Content("a change in its journal cannot be read"))?
                        .apply(&mut content);
                }
                None if zeros(rest) => {
                    let journal = Journal { digest: self.digest, next, file_length: self.file_length.get() };
                    return Ok((content, (version == VERSION).then_some(journal)));
                }
                None if zeros(rest.get(end..).unwrap_or_default()) => return Ok((content, None)),
                None => return Err(Damage::Checksum),
            }
        }
    }

    fn sum(&self, content: &[u8]) -> [u8; 32] {
        let mut hash = Sha256::new();
        hash.update(&self.as_bytes()[..DIGEST]);
        hash.update(content);
        hash.finalize().into()
    }
}

fn zeros(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0)
}

fn check<const N: usize>(bytes: &[u8], digest: &[u8; 32], place: u64) -> [u8; N] {
    let mut hash = Sha256::new();
    hash.update(digest);
    hash.update(place.to_le_bytes());
    hash.update(bytes);
    let sum: [u8; 32] = hash.finalize().into();
    std::array::from_fn(|byte| sum[byte])
}

impl Journal {
    /// Length of the file, which the journal fills to its end.
    pub(super) fn file_length(&self) -> u64 {
        self.file_length
    }

    /// Appends a change, which is on the disk when this returns true. False if there is no room for it.
    ///
    /// After an error the end of the journal is in doubt, and there is no room for anything any more.
    pub(super) fn append(&mut self, file: &File, change: &Change) -> io::Result<bool> {
        let change = change.encode();
        let end = self.next + ENTRY_HEAD + change.len() as u64;
        if end > self.file_length {
            return Ok(false);
        }
        let head = EntryHead::new(&change, &self.digest, self.next);
        let written = file
            .write_all_at(&[head.as_bytes(), &change].concat(), self.next)
            .and_then(|()| file.sync_data());
        self.next = if written.is_ok() { end } else { self.file_length };
        written.map(|()| true)
    }
}
