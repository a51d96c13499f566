//! From linear accesses to guest-physical ranges.

use super::operands::{Access, AccessKind, Operands, Unresolved, operands};
use super::state::{CodeWidth, CpuState};
use super::walk::{Intent, NotTranslated, PhysRead};
use thiserror::Error;

/// One access within one page, or one page-table entry that was read to find it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PhysicalAccess {
    /// What the access does; [`AccessKind::Walk`] for page-table entries.
    pub kind: AccessKind,
    /// Linear address: of the first byte, or for an entry the one being translated.
    pub linear: u64,
    /// Guest-physical address of the first byte.
    pub gpa: u64,
    /// Bytes.
    pub size: u32,
    /// For what the processor itself must still write: an entry lacks its accessed bit, or the leaf its dirty bit and
    /// the access writes. Whoever moves the data in the processor's place leaves such a page to the processor.
    pub marks_entry: bool,
}

/// Why an access faults in the guest before it reaches memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum FaultReason {
    /// There is no translation.
    #[error("The address is not translated")]
    NotTranslated(#[source] NotTranslated),
    /// The page does not permit the access.
    #[error("The page does not permit the access")]
    Forbidden,
}

/// The first access that faults in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestFault {
    /// Linear address of the first byte that faults.
    pub linear: u64,
    /// What the access would have done.
    pub kind: AccessKind,
    /// The reason.
    pub reason: FaultReason,
}

/// Guest-physical ranges in the order in which the processor reaches them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PhysicalAccesses {
    /// The ranges, with the page-table entries of each before it. They end where the guest faults.
    pub ranges: Vec<PhysicalAccess>,
    /// The fault that ends the list; `None` if everything is reached.
    pub fault: Option<GuestFault>,
}

/// Walks each page of each access.
///
/// An access that crosses into another page needs both translations before its first byte moves, so the entries of
/// both come first. Of a hint ([`AccessKind::Prefetch`]) only what is translated is listed.
pub fn physical_accesses(state: &CpuState, memory: &impl PhysRead, accesses: &[Access]) -> PhysicalAccesses {
    let paging = state.paging();
    let wide = state.code_width() == CodeWidth::Bits64;
    let mut result = PhysicalAccesses::default();
    for access in accesses {
        let user = state.privilege() == 3 && !access.implicit;
        let intent = Intent {
            write: access.kind.writes(),
            fetch: access.kind == AccessKind::Fetch,
            user,
            smap_exempt: !access.implicit && state.alignment_check(),
            pkru: state.extended.as_ref().map(|extended| extended.pkru),
        };
        let mut data = Vec::with_capacity(2);
        let mut done = 0u32;
        while done < access.size {
            let sum = access.address.wrapping_add(u64::from(done));
            // Outside 64-bit mode linear addresses wrap at 4 GiB.
            let linear = if wide || access.implicit { sum } else { sum & 0xffff_ffff };
            let size = (access.size - done).min(4096 - (linear & 4095) as u32);
            let walk = paging.walk(memory, linear);
            result.ranges.extend(walk.entries.iter().map(|entry| PhysicalAccess {
                kind: AccessKind::Walk,
                linear,
                gpa: entry.gpa,
                size: entry.size,
                marks_entry: false,
            }));
            let reason = match walk.result {
                Ok(found) if found.permits(&paging, intent) => {
                    data.push(PhysicalAccess {
                        kind: access.kind,
                        linear,
                        gpa: found.gpa,
                        size,
                        marks_entry: !found.accessed || (intent.write && !found.dirty),
                    });
                    done += size;
                    continue;
                }
                Ok(_) => FaultReason::Forbidden,
                Err(why) => FaultReason::NotTranslated(why),
            };
            if access.kind == AccessKind::Prefetch {
                break;
            }
            result.fault = Some(GuestFault { linear, kind: access.kind, reason });
            return result;
        }
        result.ranges.append(&mut data);
    }
    result
}

/// The instruction at RIP, from its bytes to the guest-physical ranges that it touches.
///
/// The ranges are those of the certain part of the list when the instruction cannot be listed.
pub fn touched(state: &CpuState, memory: &impl PhysRead) -> (Result<Operands, Unresolved>, PhysicalAccesses) {
    let operands = operands(state, memory);
    let accesses = match &operands {
        Ok(operands) => &operands.accesses,
        Err(unresolved) => &unresolved.accesses,
    };
    let ranges = physical_accesses(state, memory, accesses);
    (operands, ranges)
}

#[cfg(test)]
#[path = "physical_test.rs"]
mod tests;
