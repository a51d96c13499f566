//! Functions 19 to 28: passphrases, locks and erasure.
//!
//! A DIMM with a passphrase is locked whenever it gets power. Three wrong passphrases in a row exhaust the attempts
//! until the next power cycle. Erasure and overwriting leave zeros: real DIMMs throw away the key that their data is
//! encrypted with, which leaves data that nobody can tell from noise.

use std::time::Duration;

use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::super::super::dsm::only_status;
use super::super::record::{PASSPHRASE, Passphrase, Record};
use super::super::{Dimm, Erase, Failure};
use super::{function, status};

/// Wrong passphrases that are answered before attempts are exhausted.
const ATTEMPTS: u8 = 3;
/// How long overwriting takes.
const OVERWRITE: Duration = Duration::from_secs(3);

/// Extended status of function 26: still overwriting.
const IN_PROGRESS: u32 = 0x1_0000 | status::EXTENDED;
/// Extended status of function 26: nothing is being overwritten.
const SEQUENCE_ERROR: u32 = 0x2_0000 | status::EXTENDED;

/// Bits of the state in function 19.
mod state {
    pub(super) const ENABLED: u8 = 0x02;
    pub(super) const LOCKED: u8 = 0x04;
    pub(super) const FROZEN: u8 = 0x08;
    pub(super) const EXHAUSTED: u8 = 0x10;
    pub(super) const OVERWRITING: u8 = 0x40;
    /// Extended state: there is a master passphrase.
    pub(super) const MASTER: u8 = 0x01;
    /// Extended state: attempts with the master passphrase are exhausted.
    pub(super) const MASTER_EXHAUSTED: u8 = 0x02;
}

/// Security of a DIMM as long as it has power.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in super::super) struct Session {
    /// Labels and data are out of reach until the passphrase is given.
    pub(in super::super) locked: bool,
    frozen: bool,
    wrong: u8,
    wrong_master: u8,
    /// When overwriting will be over, by the DIMM's clock.
    overwriting: Option<Duration>,
}

impl Session {
    /// Security of a DIMM that has just got power.
    pub(in super::super) fn new(record: &Record) -> Self {
        Self { locked: record.secured != 0, ..Self::default() }
    }

    /// Whether the user's passphrase can be used and changed.
    fn check_open(&self) -> Result<(), Failure> {
        match self.frozen || self.wrong >= ATTEMPTS || self.overwriting.is_some() {
            true => Err(status::INVALID_STATE.into()),
            false => Ok(()),
        }
    }

    fn check_unlocked(&self) -> Result<(), Failure> {
        self.check_open()?;
        if self.locked { Err(status::INVALID_STATE.into()) } else { Ok(()) }
    }

    /// Compares the user's passphrase, if there is one.
    fn check_passphrase(&mut self, record: &Record, given: &Passphrase) -> Result<(), Failure> {
        if record.secured != 0 && record.passphrase != *given {
            self.wrong += 1;
            return Err(status::INVALID_PASSPHRASE.into());
        }
        self.wrong = 0;
        Ok(())
    }

    fn check_master(&mut self, record: &Record, given: &Passphrase) -> Result<(), Failure> {
        if self.wrong_master >= ATTEMPTS || self.frozen || self.overwriting.is_some() {
            return Err(status::INVALID_STATE.into());
        }
        if record.master != *given {
            self.wrong_master += 1;
            return Err(status::INVALID_PASSPHRASE.into());
        }
        self.wrong_master = 0;
        Ok(())
    }
}

/// Output of function 19 (`struct nd_intel_get_security_state`).
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct StateOutput {
    status: U32,
    extended: u8,
    reserved0: [u8; 3],
    state: u8,
    reserved1: [u8; 3],
}
const _: () = assert!(size_of::<StateOutput>() == 12);

/// Function 19: the state.
pub(super) fn state(dimm: &Dimm) -> Vec<u8> {
    let (record, session) = dimm.security();
    let bit = |on: bool, bit: u8| if on { bit } else { 0 };
    let enabled = record.secured != 0;
    let output = StateOutput {
        status: status::SUCCESS.into(),
        extended: state::MASTER | bit(session.wrong_master >= ATTEMPTS, state::MASTER_EXHAUSTED),
        reserved0: [0; 3],
        state: bit(enabled, state::ENABLED)
            | bit(session.locked, state::LOCKED)
            | bit(session.frozen, state::FROZEN)
            | bit(session.wrong >= ATTEMPTS, state::EXHAUSTED)
            | bit(session.overwriting.is_some(), state::OVERWRITING),
        reserved1: [0; 3],
    };
    output.as_bytes().to_vec()
}

/// Functions 20 to 28 but 26: everything that changes the state.
pub(super) fn change(dimm: &Dimm, wipe: Erase<'_>, number: u32, input: &[u8]) -> Vec<u8> {
    let now = dimm.now();
    let changed = passphrases(number, input).and_then(|(first, second)| {
        // A wrong passphrase counts although the call fails.
        dimm.change(|record, session| Ok(carry_out(number, &first, &second, record, session, wipe, now)))?
    });
    only_status(changed.map_or_else(|Failure(status)| status, |()| status::SUCCESS))
}

/// The passphrases in the input of a function: none, one, or two.
fn passphrases(number: u32, input: &[u8]) -> Result<(Passphrase, Passphrase), Failure> {
    let count = match number {
        function::FREEZE => 0,
        function::SET_PASSPHRASE | function::SET_MASTER => 2,
        _ => 1,
    };
    let (given, _) = input.as_chunks::<PASSPHRASE>();
    if given.len() < count {
        return Err(status::INVALID_PARAMETER.into());
    }
    let nth = |n: usize| given.get(n).copied().unwrap_or([0; PASSPHRASE]);
    Ok((nth(0), nth(1)))
}

fn carry_out(
    number: u32,
    first: &Passphrase,
    second: &Passphrase,
    record: &mut Record,
    session: &mut Session,
    wipe: Erase<'_>,
    now: Duration,
) -> Result<(), Failure> {
    let enabled = record.secured != 0;
    match number {
        function::SET_PASSPHRASE => {
            session.check_unlocked()?;
            session.check_passphrase(record, first)?;
            record.passphrase = *second;
            record.secured = 1;
        }
        function::DISABLE_PASSPHRASE => {
            session.check_unlocked()?;
            check(enabled)?;
            session.check_passphrase(record, first)?;
            forget(record, session);
        }
        function::UNLOCK => {
            session.check_open()?;
            check(session.locked)?;
            session.check_passphrase(record, first)?;
            session.locked = false;
        }
        function::FREEZE => {
            check(enabled)?;
            session.frozen = true;
        }
        function::SECURE_ERASE => {
            session.check_open()?;
            session.check_passphrase(record, first)?;
            erase(wipe)?;
            forget(record, session);
        }
        function::OVERWRITE => {
            session.check_open()?;
            session.check_passphrase(record, first)?;
            erase(wipe)?;
            session.overwriting = Some(now + OVERWRITE);
        }
        function::SET_MASTER => {
            session.check_master(record, first)?;
            record.master = *second;
        }
        _ => {
            session.check_master(record, first)?;
            erase(wipe)?;
            forget(record, session);
        }
    }
    Ok(())
}

fn check(state: bool) -> Result<(), Failure> {
    if state { Ok(()) } else { Err(status::INVALID_STATE.into()) }
}

/// The DIMM is as if it had never had a passphrase.
fn forget(record: &mut Record, session: &mut Session) {
    record.secured = 0;
    record.passphrase = [0; PASSPHRASE];
    session.locked = false;
}

fn erase(wipe: Erase<'_>) -> Result<(), Failure> {
    if wipe() { Ok(()) } else { Err(status::HARDWARE_ERROR.into()) }
}

/// Function 26: whether overwriting is over. The labels go with the data, and so does the passphrase.
pub(super) fn query_overwrite(dimm: &Dimm) -> Vec<u8> {
    let now = dimm.now();
    let over = match dimm.security().1.overwriting {
        None => Err(SEQUENCE_ERROR.into()),
        Some(end) if now < end => Err(IN_PROGRESS.into()),
        Some(_) => dimm.clear_labels().and_then(|()| {
            dimm.change(|record, session| {
                session.overwriting = None;
                forget(record, session);
                Ok(())
            })
        }),
    };
    only_status(over.map_or_else(|Failure(status)| status, |()| status::SUCCESS))
}
