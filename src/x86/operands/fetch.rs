//! The bytes at RIP.

use super::super::state::{CodeWidth, CpuState};
use super::super::walk::{Intent, PhysRead};
use super::{InstructionBytes, Reason};

/// What lies at RIP.
pub(super) struct Fetched {
    /// Linear address of the first byte.
    pub address: u64,
    /// Up to 15 bytes, the longest that an instruction can be.
    pub bytes: InstructionBytes,
    /// Why there are fewer than 15.
    pub end: Option<Reason>,
}

/// Reads as much of the instruction as is mapped.
pub(super) fn fetch(state: &CpuState, memory: &impl PhysRead) -> Fetched {
    let paging = state.paging();
    let wide = state.code_width() == CodeWidth::Bits64;
    let address =
        if wide { state.regs.rip } else { state.sregs.cs.base.wrapping_add(state.regs.rip) & 0xffff_ffff };
    let intent =
        Intent { write: false, fetch: true, user: state.privilege() == 3, smap_exempt: false, pkru: None };
    let mut bytes = [0; 15];
    let (mut done, mut end) = (0, None);
    while done < bytes.len() {
        let linear = address.wrapping_add(done as u64);
        let linear = if wide { linear } else { linear & 0xffff_ffff };
        let found = match paging.walk(memory, linear).result {
            Ok(found) => found,
            Err(why) => {
                end = Some(Reason::FetchNotTranslated { linear, why });
                break;
            }
        };
        if !found.permits(&paging, intent) {
            end = Some(Reason::FetchForbidden { linear });
            break;
        }
        let take = (bytes.len() - done).min(4096 - (linear & 4095) as usize);
        let read = memory.read_bytes(found.gpa, &mut bytes[done..done + take]);
        done += read;
        if read < take {
            end = Some(Reason::NoCode { gpa: found.gpa.wrapping_add(read as u64) });
            break;
        }
    }
    Fetched { address, bytes: InstructionBytes::new(&bytes[..done]), end }
}
