//! The errors that end a boot, told to the next one: the boot error region that BERT names.
//!
//! As firmware does it: what a machine check has logged stays in its bank over a reset, unless the OS has seen to it
//! and cleared the bank, and the next boot finds it as a record in the region; so does a fatal record that firmware
//! itself has sent. With `--state` the next boot is the next machine of that directory. Records are on the disk once
//! the guest has ended, and fatal ones of firmware's before the guest hears of them, so that they outlive a monitor
//! that is killed. They are shown once: when the vCPUs of the next machine run, the directory has none.
//!
//! A guest that powers itself off loses what its banks hold, as all hardware does.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use aconite_acpi::cper::{
    Entry, MemoryError, STATUS_BLOCK_SIZE, Severity, SmcaBank, X86ProcessorError, status_block,
};
use aconite_acpi::layout::{BERT_BASE, BERT_SIZE};
use aconite_devices::dma::{Dma, DmaError};
use thiserror::Error;

use crate::command::timestamp;
use crate::state::{Format, State, StateError};
use crate::x86::mca::{Flavour, Logged, McaState, status};

/// The document: status blocks, one behind the other.
const NAME: &str = "boot-errors.cper";
const FORMAT: Format = Format { kind: "boot-errors", version: 1 };

/// Multi-bit ECC (UEFI 2.10, table N.31).
const MULTI_BIT_ECC: u8 = 3;

/// Why the records of the previous boot cannot be shown.
#[derive(Debug, Error)]
pub enum BootErrorsError {
    /// They cannot be read.
    #[error(transparent)]
    State(#[from] StateError),
    /// They cannot be written into the guest's memory.
    #[error("Cannot write the errors of the previous boot into guest memory")]
    Memory(#[from] DmaError),
}

/// What the previous boot has left for this one, and this one for the next.
#[derive(Debug)]
pub struct BootErrors {
    state: Option<Arc<State>>,
    /// Status blocks for the next boot.
    next: Mutex<Vec<u8>>,
    /// Records in the region.
    shown: usize,
}

impl BootErrors {
    /// Puts what the previous boot has left into the boot error region.
    ///
    /// # Errors
    /// A document that cannot be read or is damaged: the machine is not to start as if there had been nothing.
    pub fn show(state: Option<Arc<State>>, dma: &Dma) -> Result<Self, BootErrorsError> {
        let blocks = match &state {
            Some(state) => state.read(NAME, FORMAT)?.unwrap_or_default(),
            None => Vec::new(),
        };
        let shown = split(&blocks);
        let bytes: usize = shown.iter().map(|block| block.len()).sum();
        dma.write(BERT_BASE, &blocks[..bytes])?;
        Ok(Self { state, next: Mutex::default(), shown: shown.len() })
    }

    /// Number of records that this boot is shown.
    pub fn shown(&self) -> usize {
        self.shown
    }

    /// The guest runs: what it was shown is not shown again.
    pub fn forget(&self) {
        if let Some(state) = &self.state {
            report(state.remove(NAME));
        }
    }

    /// Keeps a status block for the next boot; false if the region has no room for it.
    pub fn keep(&self, block: &[u8]) -> bool {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        if (next.len() + block.len()) as u64 > BERT_SIZE {
            return false;
        }
        next.extend_from_slice(block);
        if let Some(state) = &self.state {
            report(state.write(NAME, FORMAT, &next));
        }
        true
    }

    /// Keeps the uncorrected errors that are left in the banks of the vCPUs. Each is told once, though on Intel all
    /// processors may have logged it.
    pub fn keep_machine_checks(&self, vcpus: &[(u32, McaState)], now: SystemTime) {
        let mut told = Vec::new();
        for (vcpu, mca) in vcpus {
            for logged in mca.logged() {
                let Some(block) = machine_check(*vcpu, &logged, mca.config().flavour, now) else { continue };
                if !told.contains(&(logged.bank, logged.address)) && self.keep(&block) {
                    told.push((logged.bank, logged.address));
                }
            }
        }
    }
}

fn report(result: Result<(), StateError>) {
    if let Err(error) = result {
        tracing::error!(error = super::chain(&error), "errors for the next boot are not kept");
    }
}

/// The status blocks of a document, up to what is none or has no room in the region.
fn split(mut blocks: &[u8]) -> Vec<&[u8]> {
    /// Offset of the length of what follows the head of a block (ACPI 6.5, table 18.13).
    const DATA_LENGTH: usize = 12;
    let mut found = Vec::new();
    let mut room = BERT_SIZE as usize;
    while let Some(length) = blocks.get(DATA_LENGTH..DATA_LENGTH + 4) {
        let length = u32::from_le_bytes([length[0], length[1], length[2], length[3]]) as usize;
        let length = length.saturating_add(STATUS_BLOCK_SIZE);
        let Some((block, rest)) = blocks.split_at_checked(length) else { break };
        if length > room {
            break;
        }
        room -= length;
        found.push(block);
        blocks = rest;
    }
    found
}

/// A status block about an uncorrected error in a bank: the memory it was in, and the registers where an OS
/// understands them. None for what was corrected, and for bystanders' banks, which know no address.
fn machine_check(vcpu: u32, logged: &Logged, flavour: Flavour, now: SystemTime) -> Option<Vec<u8>> {
    let severity = match logged.status {
        bits if bits & status::ADDRV == 0 => return None,
        bits if bits & status::UC != 0 => Severity::Fatal,
        bits if flavour != Flavour::Intel && bits & status::DEFERRED != 0 => Severity::Recoverable,
        _ => return None,
    };
    /// Position of the least significant valid bit of the address, in MCi_MISC.
    const GRANULARITY: u64 = 0x3f;
    let mask = (logged.status & status::MISCV != 0).then(|| u64::MAX << (logged.misc & GRANULARITY));
    let memory = MemoryError {
        address: Some(logged.address),
        mask,
        error_type: Some(MULTI_BIT_ECC),
        ..MemoryError::default()
    };
    let processor = X86ProcessorError {
        apic_id: Some(vcpu.into()),
        target: Some(logged.address),
        bank: (flavour == Flavour::Smca).then_some(SmcaBank {
            bank: logged.bank,
            status: logged.status,
            address: logged.address,
            misc: logged.misc,
            config: logged.config,
            ipid: logged.ipid,
            synd: logged.synd,
        }),
        ..X86ProcessorError::default()
    };
    let entries = [memory.section(), processor.section()]
        .map(|section| Entry { timestamp: Some(timestamp(now)), ..Entry::new(severity, section) });
    Some(status_block(severity, &entries))
}

#[cfg(test)]
#[path = "boot_errors_test.rs"]
mod tests;
