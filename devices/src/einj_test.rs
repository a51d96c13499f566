use std::sync::Arc;

use aconite_acpi::layout::{EINJ_BASE, EINJ_SIZE};
use proptest::prelude::*;

use super::*;
use crate::dma::testing::{Lines, dma};

fn einj() -> (Einj, Dma, Arc<Lines>) {
    let (dma, poison) = dma(&[(EINJ_BASE, EINJ_SIZE as usize)]);
    (Einj::new(dma.clone()), dma, poison)
}

fn read(einj: &mut Einj, register: u64) -> u64 {
    let mut data = [0xEE; 8];
    einj.read(register, &mut data);
    u64::from_le_bytes(data)
}

fn write(einj: &mut Einj, register: u64, value: u32) -> Vec<Effect> {
    let mut effects = Effects::new();
    einj.write(register, &value.to_le_bytes(), &mut effects);
    effects.into_iter().collect()
}

fn parameters(error_type: u32, flags: u32) -> Parameters {
    Parameters {
        error_type: error_type.into(),
        flags: flags.into(),
        apic_id: 3.into(),
        address: 0x1234_5678.into(),
        mask: (!0xFFFu64).into(),
        ..Parameters::default()
    }
}

/// Begins, and executes with `parameters`.
fn execute(einj: &mut Einj, dma: &Dma, parameters: Parameters) -> Vec<Effect> {
    assert_eq!(write(einj, OPERATION, BEGIN), []);
    dma.write(PARAMETERS, parameters.as_bytes()).unwrap();
    write(einj, OPERATION, EXECUTE)
}

#[test]
fn an_error_is_injected_and_triggered_once() {
    let (mut einj, dma, _) = einj();
    assert_eq!(read(&mut einj, AVAILABLE), 0x38);
    for number in 1..4 {
        let effects = execute(&mut einj, &dma, parameters(types::MEMORY_UNCORRECTABLE, flags::ADDRESS));
        let injection =
            Injection { number, severity: Severity::NonFatal, address: 0x1234_5678, apic_id: None };
        assert_eq!(effects, [Effect::InjectError(injection)]);
        assert_eq!(read(&mut einj, BUSY), 1);
        assert_eq!(write(&mut einj, OPERATION, EXECUTE), [], "one at a time");
        assert_eq!(write(&mut einj, TRIGGER, number), [], "it is not injected yet");
        einj.finish(number + 1, Err(Refusal::Failure));
        assert_eq!(read(&mut einj, BUSY), 1, "that was another one");
        einj.finish(number, Ok(()));
        assert_eq!((read(&mut einj, BUSY), read(&mut einj, STATUS)), (0, 0));

        let mut table = [0; aconite_acpi::einj::TRIGGER_TABLE_SIZE];
        dma.read(read(&mut einj, TRIGGER_TABLE), &mut table).unwrap();
        assert_eq!(table, trigger_table(number));
        assert_eq!(write(&mut einj, TRIGGER, number + 1), []);
        assert_eq!(write(&mut einj, TRIGGER, number), [Effect::TriggerError(injection)]);
        assert_eq!(write(&mut einj, TRIGGER, number), []);
    }
}

#[test]
fn every_type_is_offered_and_needs_an_address() {
    for (error_type, severity) in ALL {
        let (mut einj, dma, _) = einj();
        let effects = execute(&mut einj, &dma, parameters(error_type, flags::ADDRESS | flags::APIC_ID));
        let injection = Injection { number: 1, severity, address: 0x1234_5678, apic_id: Some(3) };
        assert_eq!(effects, [Effect::InjectError(injection)]);
        einj.finish(1, Ok(()));
        assert_eq!(execute(&mut einj, &dma, parameters(error_type, flags::APIC_ID)), []);
        assert_eq!(read(&mut einj, STATUS), u64::from(status::INVALID_ACCESS));
    }
}

#[test]
fn what_cannot_be_is_refused() {
    let (mut einj, dma, poison) = einj();
    for error_type in [0, 1, 1 << 6, types::MEMORY_FATAL | types::MEMORY_CORRECTABLE, 1 << 30, 1 << 31] {
        assert_eq!(execute(&mut einj, &dma, parameters(error_type, 0xF)), []);
        assert_eq!(read(&mut einj, STATUS), u64::from(status::INVALID_ACCESS), "{error_type:#x}");
    }
    // An old OS, which knows no parameters.
    write(&mut einj, OPERATION, BEGIN);
    write(&mut einj, ERROR_TYPE, types::MEMORY_UNCORRECTABLE);
    assert_eq!(write(&mut einj, OPERATION, EXECUTE), []);
    assert_eq!(read(&mut einj, STATUS), u64::from(status::INVALID_ACCESS));
    // What it said is forgotten when the next operation begins.
    let effects = execute(&mut einj, &dma, parameters(types::MEMORY_FATAL, flags::ADDRESS));
    assert_eq!(effects.len(), 1);
    einj.finish(1, Err(Refusal::InvalidAccess));
    assert_eq!(read(&mut einj, STATUS), u64::from(status::INVALID_ACCESS));
    assert_eq!(write(&mut einj, TRIGGER, 1), []);
    poison.0.lock().unwrap().push(PARAMETERS);
    assert_eq!(write(&mut einj, OPERATION, EXECUTE), []);
    assert_eq!(read(&mut einj, STATUS), u64::from(status::FAILURE));
    *poison.0.lock().unwrap() = vec![TRIGGER_TABLE_BASE];
    assert_eq!(write(&mut einj, OPERATION, EXECUTE), []);
    assert_eq!(read(&mut einj, STATUS), u64::from(status::FAILURE));
    poison.0.lock().unwrap().clear();
    assert_eq!(write(&mut einj, OPERATION, EXECUTE).len(), 1);
}

#[test]
fn nothing_is_triggered_after_the_end() {
    let (mut einj, dma, _) = einj();
    execute(&mut einj, &dma, parameters(types::MEMORY_FATAL, flags::ADDRESS));
    write(&mut einj, OPERATION, END);
    assert_eq!(read(&mut einj, BUSY), 1, "it cannot be called back");
    einj.finish(1, Ok(()));
    write(&mut einj, OPERATION, END);
    assert_eq!(write(&mut einj, TRIGGER, 1), []);
}

/// What an OS or the machine can do.
#[derive(Clone, Debug)]
enum Step {
    Write(u64, Vec<u8>),
    Read(u64, usize),
    Parameters(u32, u32),
    Finish(u32, Option<Refusal>),
}

fn step() -> impl Strategy<Value = Step> {
    let register = prop_oneof![
        3 => (0u64..9).prop_map(|number| number * 8),
        1 => 0..Einj::SIZE - 8,
    ];
    let value = prop_oneof![3 => (0u32..8).prop_map(|value| value.to_le_bytes().to_vec()),
        1 => prop::collection::vec(any::<u8>(), 1..=8)];
    let refusal = prop_oneof![Just(None), Just(Some(Refusal::Failure)), Just(Some(Refusal::InvalidAccess))];
    prop_oneof![
        6 => (register.clone(), value).prop_map(|(at, data)| Step::Write(at, data)),
        1 => (register, 1usize..=8).prop_map(|(at, length)| Step::Read(at, length)),
        2 => ((0u32..9).prop_map(|bit| 1 << bit), 0u32..4).prop_map(|(kind, flags)| Step::Parameters(kind, flags)),
        3 => (0u32..6, refusal).prop_map(|(number, refusal)| Step::Finish(number, refusal)),
    ]
}

proptest! {
    /// The model: at most one injection runs, each is triggered at most once and only after it was injected, and
    /// the interface is busy exactly while one runs.
    #[test]
    fn any_conversation_keeps_the_rules(steps in prop::collection::vec(step(), 0..80)) {
        let (mut einj, dma, _) = einj();
        let (mut running, mut injected): (Option<u32>, Option<u32>) = (None, None);
        let mut last = 0;
        for step in steps {
            match step {
                Step::Write(at, data) => {
                    let mut effects = Effects::new();
                    einj.write(at, &data, &mut effects);
                    for effect in effects {
                        match effect {
                            Effect::InjectError(injection) => {
                                prop_assert_eq!(running.replace(injection.number), None);
                                prop_assert_eq!(injection.number, last + 1);
                                last = injection.number;
                            }
                            Effect::TriggerError(injection) => {
                                prop_assert_eq!(injected.take(), Some(injection.number));
                            }
                            other => prop_assert!(false, "{:?}", other),
                        }
                    }
                }
                Step::Read(at, length) => {
                    let mut data = vec![0xEE; length];
                    einj.read(at, &mut data);
                    let again = read(&mut einj, at & !7).to_le_bytes();
                    prop_assert_eq!(data[0], again[(at & 7) as usize]);
                }
                Step::Parameters(kind, flags) => {
                    dma.write(PARAMETERS, parameters(kind, flags).as_bytes()).unwrap();
                }
                Step::Finish(number, refusal) => {
                    einj.finish(number, refusal.map_or(Ok(()), Err));
                    if running == Some(number) {
                        running = None;
                        injected = refusal.is_none().then_some(number);
                    }
                }
            }
            prop_assert_eq!(read(&mut einj, BUSY), u64::from(running.is_some()));
            prop_assert!(read(&mut einj, STATUS) <= 2);
        }
    }
}
