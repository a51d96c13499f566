use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proptest::prelude::*;

use super::super::super::testing::{bytes, dimm_config};
use super::super::{DimmConfig, Family, Keeper, NotKept, Record};
use super::*;

/// A DIMM that keeps its record, with a clock and power that a test has in hand.
struct Bench {
    dimm: Dimm,
    erased: Cell<usize>,
    seconds: Arc<AtomicU64>,
    kept: Arc<Kept>,
}

#[derive(Debug, Default)]
struct Kept(Mutex<Record>);

impl Keeper for Kept {
    fn labels(&self, _offset: u64, _bytes: &[u8]) -> Result<(), NotKept> {
        Ok(())
    }

    fn record(&self, record: &Record) -> Result<(), NotKept> {
        *self.0.lock().unwrap() = record.clone();
        Ok(())
    }
}

fn bench() -> Bench {
    let (seconds, kept) = (Arc::new(AtomicU64::new(100)), Arc::new(Kept::default()));
    let dimm = power_on(&seconds, &kept);
    Bench { dimm, erased: Cell::new(0), seconds, kept }
}

fn power_on(seconds: &Arc<AtomicU64>, kept: &Arc<Kept>) -> Dimm {
    let seconds = seconds.clone();
    let config = DimmConfig {
        record: kept.0.lock().unwrap().clone(),
        keeper: kept.clone(),
        clock: Arc::new(move || Duration::from_secs(seconds.load(Ordering::Relaxed))),
        ..dimm_config(Family::Intel, Some(vec![0; 1024]))
    };
    Dimm::new(config).unwrap()
}

impl Bench {
    fn answer(&self, function: u32, input: &[u8]) -> Answer {
        let request = Request { uuid: UUID, revision: 2, function, input };
        let erase = || {
            self.erased.set(self.erased.get() + 1);
            true
        };
        self.dimm.dsm(&erase, &request).unwrap()
    }

    fn ask(&self, function: u32, input: &[u8]) -> Vec<u8> {
        self.answer(function, input).output
    }

    fn status(&self, function: u32, input: &[u8]) -> u32 {
        u32::from_le_bytes(self.ask(function, input)[..4].try_into().unwrap())
    }

    /// State and extended state of security.
    fn security(&self) -> (u8, u8) {
        let output = self.ask(19, &[]);
        (output[8], output[4])
    }

    fn wait(&self, seconds: u64) {
        self.seconds.fetch_add(seconds, Ordering::Relaxed);
    }

    /// The power goes without a word, and comes back.
    fn cut(&mut self) {
        self.dimm = power_on(&self.seconds, &self.kept);
    }

    /// The power goes in order, and comes back.
    fn cycle(&mut self) {
        self.dimm.power_off().unwrap();
        self.cut();
    }
}

fn pass(letter: u8) -> [u8; 32] {
    [letter; 32]
}

fn two(old: u8, new: u8) -> Vec<u8> {
    [pass(old), pass(new)].concat()
}

#[test]
fn every_byte_of_the_health_is_as_linux_and_ndctl_read_it() {
    let bench = bench();
    let health = bench.ask(1, &[]);
    // 23 and 25 degrees, 75 percent spares, 5 percent used.
    let expected = bytes(
        "00000000 7F060000 00000000 00 4B 05 00 7001 9001 00000000 01 0000 0000000000000000 00 00000000",
    );
    assert_eq!(health[..40], expected);
    assert_eq!((health.len(), &health[40..]), (132, &[0; 92][..]));
    // Alarms for spares and media temperature are on, at 5 percent and 40 degrees.
    assert_eq!(bench.ask(2, &[]), bytes("00000000 0300 05 8002 E001 00"));
}

#[test]
fn injected_health_is_reported_and_taken_back() {
    let bench = bench();
    // Media temperature 45 degrees and spares of 4 percent.
    let answer = bench.answer(18, &bytes("0300000000000000 01 D002 01 04 00 00"));
    assert_eq!((answer.output, answer.alarm), (bytes("00000000"), true));
    let health = bench.ask(1, &[]);
    assert_eq!(health[13..18], bytes("04 05 03 D002"));
    // Fatal, and an unsafe shutdown.
    assert!(bench.answer(18, &bytes("0C00000000000000 00 0000 00 00 01 01")).alarm);
    let health = bench.ask(1, &[]);
    assert_eq!((health[12], health[35], &health[20..24]), (4, 1, &[1, 0, 0, 0][..]));
    let answer = bench.answer(18, &bytes("0F00000000000000 00 0000 00 00 00 00"));
    assert_eq!((answer.output, answer.alarm), (bytes("00000000"), false));
    let health = bench.ask(1, &[]);
    assert_eq!(health[12..18], bytes("00 4B 05 00 7001"));
    assert_eq!((health[35], &health[20..24]), (0, &[1, 0, 0, 0][..]), "the count stays");
    assert_eq!(bench.status(18, &bytes("1000000000000000 00 0000 00 00 00 00")), 3);
    assert_eq!(bench.status(18, &[0; 14]), 3);
}

#[test]
fn thresholds_decide_what_is_an_alarm() {
    let bench = bench();
    // Controller temperature on, at 25 degrees: it is 25.
    let answer = bench.answer(17, &bytes("0400 05 8002 9001"));
    assert_eq!((answer.output, answer.alarm), (bytes("00000000"), true));
    assert_eq!(bench.ask(2, &[]), bytes("00000000 0400 05 8002 9001 00"));
    assert_eq!(bench.ask(1, &[])[15], 4);
    assert!(!bench.answer(17, &bytes("0000 05 8002 9001")).alarm, "all alarms off");
    assert_eq!(bench.status(17, &[0; 6]), 3);
}

#[test]
fn an_unannounced_loss_of_power_while_latched_is_unsafe() {
    let mut bench = bench();
    bench.cut();
    assert_eq!(bench.ask(1, &[])[35], 0, "not latched");
    assert_eq!(bench.status(10, &[1]), 0);
    bench.cycle();
    assert_eq!(bench.ask(1, &[])[35], 0, "announced");
    assert_eq!(bench.status(10, &[1]), 0);
    bench.cut();
    let health = bench.ask(1, &[]);
    assert_eq!((health[35], &health[20..24]), (1, &[1, 0, 0, 0][..]));
    assert_eq!((bench.status(10, &[2]), bench.status(10, &[])), (3, 3));
}

#[test]
fn a_passphrase_locks_at_each_power_cycle() {
    let mut bench = bench();
    assert_eq!(bench.ask(19, &[]), bytes("00000000 01 000000 00 000000"));
    assert_eq!(bench.status(20, &two(0, b'a')), 0);
    assert_eq!(bench.security(), (2, 1));
    assert_eq!(bench.status(20, &two(b'x', b'b')), 11);
    assert_eq!(bench.status(20, &two(b'a', b'b')), 0);
    assert_eq!(bench.ask(4, &[])[..4], [0; 4]);
    bench.cycle();
    assert_eq!(bench.security(), (2 | 4, 1));
    // Labels are out of reach.
    assert_eq!(bench.ask(4, &[])[..4], [0, 0, 1, 0]);
    assert_eq!((bench.status(5, &[0; 8]), bench.status(6, &[0; 8])), (10, 10));
    assert_eq!(bench.status(21, &pass(b'b')), 10, "locked");
    assert_eq!(bench.status(20, &two(b'b', b'c')), 10, "locked");
    assert_eq!(bench.status(22, &pass(b'a')), 11);
    assert_eq!(bench.status(22, &pass(b'b')), 0);
    assert_eq!(bench.security(), (2, 1));
    assert_eq!(bench.status(22, &pass(b'b')), 10, "it is not locked");
    assert_eq!(bench.ask(5, &bytes("00000000 02000000")), bytes("00000000 0000"));
    assert_eq!(bench.status(21, &pass(b'b')), 0);
    assert_eq!(bench.security(), (0, 1));
    bench.cycle();
    assert_eq!(bench.security(), (0, 1));
}

#[test]
fn frozen_security_does_not_change_until_the_next_power_cycle() {
    let mut bench = bench();
    assert_eq!(bench.status(23, &[]), 10, "without a passphrase");
    bench.status(20, &two(0, b'a'));
    assert_eq!(bench.status(23, &[]), 0);
    assert_eq!(bench.security(), (2 | 8, 1));
    for (function, input) in [
        (20, two(b'a', b'b')),
        (21, pass(b'a').to_vec()),
        (24, pass(b'a').to_vec()),
        (25, pass(b'a').to_vec()),
        (28, pass(0).to_vec()),
    ] {
        assert_eq!(bench.status(function, &input), 10, "{function}");
    }
    assert_eq!(bench.erased.get(), 0);
    bench.cycle();
    assert_eq!(bench.security(), (2 | 4, 1));
    assert_eq!(bench.status(22, &pass(b'a')), 0);
}

#[test]
fn attempts_are_limited() {
    let mut bench = bench();
    bench.status(20, &two(0, b'a'));
    bench.cycle();
    for _ in 0..3 {
        assert_eq!(bench.status(22, &pass(b'x')), 11);
    }
    assert_eq!(bench.security(), (2 | 4 | 0x10, 1));
    assert_eq!(bench.status(22, &pass(b'a')), 10);
    for _ in 0..3 {
        assert_eq!(bench.status(28, &pass(b'x')), 11);
    }
    assert_eq!(bench.security(), (2 | 4 | 0x10, 3));
    assert_eq!(bench.status(28, &pass(0)), 10);
    bench.cycle();
    assert_eq!(bench.status(22, &pass(b'a')), 0);
}

#[test]
fn erasure_takes_data_and_passphrase() {
    let mut bench = bench();
    bench.status(20, &two(0, b'a'));
    assert_eq!((bench.status(24, &pass(b'x')), bench.erased.get()), (11, 0));
    assert_eq!((bench.status(24, &pass(b'a')), bench.erased.get()), (0, 1));
    assert_eq!(bench.security(), (0, 1));
    // By the master passphrase, also when locked.
    bench.status(20, &two(0, b'a'));
    assert_eq!(bench.status(27, &two(b'x', b'm')), 11);
    assert_eq!(bench.status(27, &two(0, b'm')), 0);
    bench.cycle();
    assert_eq!((bench.status(28, &pass(0)), bench.erased.get()), (11, 1));
    assert_eq!((bench.status(28, &pass(b'm')), bench.erased.get()), (0, 2));
    assert_eq!(bench.security(), (0, 1));
    bench.cycle();
    assert_eq!(bench.security(), (0, 1));
}

#[test]
fn overwriting_takes_time_and_everything() {
    let bench = bench();
    assert_eq!(bench.status(26, &[]), 0x20007, "nothing is overwritten");
    bench.status(6, &bytes("00000000 01000000 FF"));
    bench.status(20, &two(0, b'a'));
    assert_eq!(bench.status(25, &pass(b'x')), 11);
    assert_eq!(bench.status(25, &pass(b'a')), 0);
    assert_eq!(bench.security(), (2 | 0x40, 1));
    assert_eq!(bench.status(26, &[]), 0x10007);
    assert_eq!(bench.status(21, &pass(b'a')), 10, "busy");
    bench.wait(3);
    assert_eq!(bench.status(26, &[]), 0);
    assert_eq!((bench.security(), bench.erased.get()), ((0, 1), 1));
    assert_eq!(bench.dimm.labels().unwrap(), vec![0; 1024]);
    assert_eq!(bench.status(26, &[]), 0x20007);
}

#[test]
fn shorter_input_than_passphrases_is_invalid() {
    let bench = bench();
    for (function, most) in [(20, 63), (27, 63), (21, 31), (22, 31), (24, 31), (25, 31), (28, 31)] {
        for size in [0, most] {
            assert_eq!(bench.status(function, &vec![0; size]), 3, "{function} with {size} bytes");
        }
    }
    assert_eq!((bench.security(), bench.erased.get()), ((0, 1), 0));
}

fn send(context: u32, offset: u32, data: &[u8]) -> Vec<u8> {
    [&context.to_le_bytes()[..], &offset.to_le_bytes(), &(data.len() as u32).to_le_bytes(), data].concat()
}

fn finish(control: u8, context: u32) -> Vec<u8> {
    [&[control, 0, 0, 0][..], &context.to_le_bytes()].concat()
}

/// Sends an image whose version is `version`, and has it checked.
fn update(bench: &Bench, version: u64) -> Vec<u8> {
    let started = bench.ask(13, &[]);
    assert_eq!(started[..4], [0; 4]);
    let context = u32::from_le_bytes(started[4..8].try_into().unwrap());
    assert_eq!(bench.status(14, &send(context, 0, &version.to_le_bytes())), 0);
    assert_eq!(bench.status(14, &send(context, 8, &[0xAA; 100])), 0);
    assert_eq!(bench.status(16, &context.to_le_bytes()), 0x40007, "not finished");
    assert_eq!(bench.status(15, &finish(0, context)), 0);
    assert_eq!(bench.status(16, &context.to_le_bytes()), 0x20007, "being checked");
    bench.wait(1);
    bench.ask(16, &context.to_le_bytes())
}

#[test]
fn firmware_is_sent_checked_and_runs_after_a_power_cycle() {
    let mut bench = bench();
    let information = bytes(
        "00000000 00001000 000F0000 90D00300 C0C62D00 00 000000 05010000 0100000000000100 0000000000000000",
    );
    assert_eq!(bench.ask(12, &[]), information);
    assert_eq!(update(&bench, 0xBEEF), bytes("00000000 EFBE000000000000"));
    assert_eq!(bench.ask(12, &[])[28..44], bytes("0100000000000100 EFBE000000000000"));
    assert_eq!(bench.status(13, &[]), 0x10007, "one is staged");
    assert_eq!(bench.status(15, &finish(0, 1)), 0x20007);
    bench.cycle();
    assert_eq!(bench.ask(12, &[])[28..44], bytes("EFBE000000000000 0000000000000000"));
    assert_eq!(bench.status(13, &[]), 0);
}

#[test]
fn wrong_updates_are_refused() {
    let bench = bench();
    assert_eq!(bench.status(14, &send(0, 0, &[1])), 0x10007, "nothing has begun");
    assert_eq!(bench.status(15, &finish(0, 0)), 0x10007);
    bench.ask(13, &[]);
    assert_eq!(bench.status(13, &[]), 0x10007);
    assert_eq!(bench.status(14, &send(2, 0, &[1])), 0x10007);
    assert_eq!(bench.status(14, &send(1, 1 << 20, &[1])), 3, "beyond the storage");
    assert_eq!(bench.status(14, &send(1, 0, &[1; 8])[..19]), 3, "cut short");
    assert_eq!(bench.status(15, &finish(2, 1)), 3);
    assert_eq!(bench.status(15, &finish(1, 1)), 0x40007, "aborted");
    bench.ask(13, &[]);
    assert_eq!(bench.status(14, &send(2, 8, &[1; 8])), 0);
    assert_eq!(bench.status(15, &finish(0, 2)), 0x30007, "a gap");
    bench.ask(13, &[]);
    assert_eq!(bench.status(14, &send(3, 0, &[0; 64])), 0);
    assert_eq!(bench.status(15, &finish(0, 3)), 0x30007, "version 0");
    for function in [14, 15] {
        assert_eq!(bench.status(function, &[0; 7]), 3);
    }
    assert_eq!(bench.status(16, &[0; 3]), 3);
}

#[test]
fn armed_firmware_is_activated_while_the_machine_runs() {
    let bench = bench();
    assert_eq!(bench.ask(29, &[]), bytes("00000000 0000 00 00000000000000"));
    assert_eq!((bench.status(30, &[1]), bench.status(30, &[2])), (10, 3), "nothing is staged");
    assert_eq!(bench.ask(29, &[])[4..7], [1, 0, 0]);
    update(&bench, 7);
    assert_eq!(bench.status(30, &[1]), 0);
    assert_eq!(firmware::activity(&bench.dimm), firmware::Activity::Armed);
    assert_eq!(bench.status(30, &[0]), 0);
    assert_eq!(firmware::activity(&bench.dimm), firmware::Activity::Idle);
    assert_eq!(bench.status(30, &[1]), 0);
    firmware::activate(&bench.dimm).unwrap();
    assert_eq!(bench.ask(29, &[])[4..7], [2, 0, 2], "busy");
    bench.wait(1);
    assert_eq!(bench.ask(29, &[])[4..7], [2, 0, 0]);
    assert_eq!(bench.ask(12, &[])[28..44], bytes("0700000000000000 0000000000000000"));
    assert_eq!(bench.status(13, &[]), 0, "the next one can begin");
}

/// A model of security: passphrases are letters, 0 is none.
#[derive(Debug, Default)]
struct Model {
    user: Option<u8>,
    master: u8,
    locked: bool,
    frozen: bool,
    wrong: u8,
    wrong_master: u8,
    overwriting: bool,
}

impl Model {
    fn step(&mut self, function: u32, first: u8, second: u8) -> u32 {
        let open = !self.frozen && self.wrong < 3 && !self.overwriting;
        let master_open = !self.frozen && self.wrong_master < 3 && !self.overwriting;
        let needs_unlocked = matches!(function, 20 | 21);
        let allowed = match function {
            23 => self.user.is_some(),
            27 | 28 => master_open,
            22 => open && self.locked,
            21 => open && !self.locked && self.user.is_some(),
            _ => open && !(needs_unlocked && self.locked),
        };
        if !allowed {
            return 10;
        }
        match function {
            23 => {}
            27 | 28 if first != self.master => {
                self.wrong_master += 1;
                return 11;
            }
            27 | 28 => self.wrong_master = 0,
            _ if self.user.is_some_and(|user| user != first) => {
                self.wrong += 1;
                return 11;
            }
            _ => self.wrong = 0,
        }
        match function {
            20 => self.user = Some(second),
            22 => self.locked = false,
            23 => self.frozen = true,
            25 => self.overwriting = true,
            27 => self.master = second,
            _ => (self.user, self.locked) = (None, false),
        }
        0
    }

    fn state(&self) -> (u8, u8) {
        let bit = |on: bool, bit| if on { bit } else { 0 };
        let user = bit(self.user.is_some(), 2) | bit(self.locked, 4) | bit(self.frozen, 8);
        let rest = bit(self.wrong >= 3, 0x10) | bit(self.overwriting, 0x40);
        (user | rest, 1 | bit(self.wrong_master >= 3, 2))
    }
}

proptest! {
    /// Security is a small state machine, and survives power cycles.
    #[test]
    fn security_behaves_like_its_model(
        steps in prop::collection::vec(
            (prop_oneof![4 => 20u32..=28, 1 => Just(0u32)], 0u8..3, 0u8..3), 1..60),
    ) {
        let mut bench = bench();
        let mut model = Model::default();
        for (function, first, second) in steps {
            match function {
                0 => {
                    bench.cycle();
                    let Model { user, master, .. } = model;
                    model = Model { user, master, locked: user.is_some(), ..Model::default() };
                }
                26 => {
                    bench.wait(3);
                    let wanted = if model.overwriting { 0 } else { 0x20007 };
                    prop_assert_eq!(bench.status(26, &[]), wanted);
                    if model.overwriting {
                        (model.overwriting, model.user, model.locked) = (false, None, false);
                    }
                }
                _ => {
                    let wanted = model.step(function, first, second);
                    prop_assert_eq!(bench.status(function, &two(first, second)), wanted, "{}", function);
                }
            }
            prop_assert_eq!(bench.security(), model.state());
        }
    }

    /// Every function answers every input with a status of its own.
    #[test]
    fn any_input_has_a_defined_answer(
        calls in prop::collection::vec((0u32..40, prop::collection::vec(any::<u8>(), 0..80)), 1..40),
    ) {
        let bench = bench();
        for (function, input) in calls {
            let output = bench.ask(function, &input);
            prop_assert!(output.len() >= 4 && output.len() <= 0xFF8, "{}", function);
            let known = function == 0 || 0x7FFF_F477u32.checked_shr(function).unwrap_or(0) & 1 != 0;
            prop_assert_eq!(output[..4] == [1, 0, 0, 0], !known, "{}", function);
        }
    }
}
