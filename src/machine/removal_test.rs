//! Tests of the removal's state machine.

use proptest::prelude::*;

use super::*;

fn begin(mode: RemoveMode) -> (Removal, Vec<Action>) {
    Removal::begin("p0", 7, mode, Channel::Container, Duration::from_secs(3), Instant::now())
}

fn steps(actions: &[Action]) -> Vec<RemovalStep> {
    let step = |action: &Action| match action {
        Action::Step(step, _) => Some(*step),
        _ => None,
    };
    actions.iter().filter_map(step).collect()
}

#[test]
fn an_orderly_removal_takes_the_memory_when_the_guest_has_let_go() {
    let (mut removal, begun) = begin(RemoveMode::Eject);
    assert_eq!(steps(&begun), [RemovalStep::Requested, RemovalStep::Notified]);
    assert!(!begun.contains(&Action::Take));
    assert_eq!(steps(&removal.on(Happening::Working)), [RemovalStep::Quiescing]);
    assert_eq!(removal.on(Happening::Working), [], "it is told once");
    assert_eq!(
        removal.on(Happening::LetGo("_EJ0".into())),
        [
            Action::Step(RemovalStep::Ejected, Some("_EJ0".into())),
            Action::Take,
            Action::State(DeviceState::Departed),
            Action::Step(RemovalStep::Departed, None),
            Action::End(None),
        ]
    );
}

#[test]
fn what_was_ejected_is_gone_and_departs_when_the_guest_says_so() {
    let ejected = || {
        let mut removal = begin(RemoveMode::Eject).0;
        let actions = removal.on(Happening::Ejected("power off".into()));
        assert_eq!(actions, [Action::Step(RemovalStep::Ejected, Some("power off".into())), Action::Take]);
        assert_eq!(removal.on(Happening::Ejected("again".into())), []);
        removal
    };
    assert_eq!(steps(&ejected().on(Happening::LetGo("dark".into()))), [RemovalStep::Departed]);
    let late = ejected().on(Happening::Overdue);
    assert_eq!(steps(&late), [RemovalStep::TimedOut, RemovalStep::Departed]);
    let Some(Action::End(Some(error))) = late.last() else { panic!("{late:?}") };
    assert!(error.message.ends_with("it is gone all the same"), "{error}");
    assert_eq!(begin(RemoveMode::Surprise).0.on(Happening::Ejected("power off".into())), []);
}

#[test]
fn what_the_guest_does_not_give_stays_and_what_was_taken_is_gone() {
    for (happening, step, code) in [
        (Happening::Refused("it is busy".into()), RemovalStep::Refused, ErrorCode::GuestRefused),
        (Happening::Overdue, RemovalStep::TimedOut, ErrorCode::GuestTimedOut),
    ] {
        let end = begin(RemoveMode::Eject).0.on(happening.clone());
        assert_eq!(steps(&end), [step]);
        assert_eq!(end[1], Action::State(DeviceState::Present));
        assert!(matches!(&end[2], Action::End(Some(error)) if error.code == code), "{end:?}");

        let end = begin(RemoveMode::Surprise).0.on(happening);
        assert_eq!(steps(&end), [step, RemovalStep::Departed]);
        assert_eq!(end[1], Action::State(DeviceState::Departed));
        let Some(Action::End(Some(error))) = end.last() else { panic!("{end:?}") };
        assert_eq!(error.code, code);
        assert!(error.message.ends_with("it is gone all the same"), "{error}");
    }
}

#[test]
fn times_beyond_any_clock_are_no_mistake() {
    let now = Instant::now();
    let (removal, _) = Removal::begin("p0", 1, RemoveMode::Eject, Channel::Container, Duration::MAX, now);
    assert!(removal.deadline > now);
}

/// One slot as the machine keeps it, and what its user could find out.
#[derive(Debug)]
struct Slot {
    state: DeviceState,
    reachable: bool,
    removal: Option<Removal>,
    /// Operations begun, and how each has ended.
    ended: Vec<Option<bool>>,
    steps: Vec<RemovalStep>,
}

impl Slot {
    fn carry_out(&mut self, operation: Option<u64>, actions: Vec<Action>) {
        for (index, action) in actions.iter().enumerate() {
            match action {
                Action::Step(step, _) => self.steps.push(*step),
                Action::TellGuest => {}
                Action::Take => {
                    assert!(self.reachable, "memory is taken once");
                    self.reachable = false;
                }
                Action::State(state) => {
                    assert_ne!(
                        (*state, self.reachable),
                        (DeviceState::Departed, true),
                        "free while reachable"
                    );
                    assert_ne!(
                        (*state, self.reachable),
                        (DeviceState::Present, false),
                        "present without memory"
                    );
                    self.state = *state;
                }
                Action::End(error) => {
                    assert_eq!(index + 1, actions.len(), "nothing comes after the end");
                    let Some(operation) = operation else { continue };
                    let ended = self.ended[operation as usize].replace(error.is_none());
                    assert_eq!(ended, None, "an operation ends once");
                }
            }
        }
    }

    fn remove(&mut self, mode: RemoveMode) {
        let overtakes =
            mode == RemoveMode::Surprise && self.removal.as_ref().is_some_and(|removal| !removal.gone());
        match self.state {
            DeviceState::Present => {}
            DeviceState::Leaving if overtakes => self.hear(Happening::Overtaken),
            _ => return,
        }
        self.ended.push(None);
        let operation = self.ended.len() as u64;
        let (removal, actions) =
            Removal::begin("p0", operation, mode, Channel::Container, Duration::from_secs(1), Instant::now());
        self.carry_out(operation.checked_sub(1), actions);
        self.removal = Some(removal);
    }

    fn hear(&mut self, happening: Happening) {
        let Some(mut removal) = self.removal.take() else {
            if matches!(happening, Happening::Ejected(_)) && self.state == DeviceState::Present {
                let (removal, actions) =
                    Removal::unasked("p0", Channel::Container, "by itself".into(), Instant::now());
                self.carry_out(None, actions);
                self.removal = Some(removal);
            }
            return;
        };
        let actions = removal.on(happening);
        let ends = matches!(actions.last(), Some(Action::End(_)));
        self.carry_out(removal.operation.checked_sub(1), actions);
        self.removal = (!ends).then_some(removal);
    }

    fn insert(&mut self) {
        if self.state == DeviceState::Departed {
            assert!(!self.reachable && self.removal.is_none());
            self.steps.push(RemovalStep::Replaced);
            (self.state, self.reachable) = (DeviceState::Present, true);
        }
    }
}

#[derive(Clone, Debug)]
enum Move {
    Remove(RemoveMode),
    Insert,
    Hear(Happening),
}

fn moves() -> impl Strategy<Value = Move> {
    prop_oneof![
        2 => Just(Move::Remove(RemoveMode::Surprise)),
        3 => Just(Move::Remove(RemoveMode::Eject)),
        3 => Just(Move::Insert),
        2 => Just(Move::Hear(Happening::Working)),
        2 => Just(Move::Hear(Happening::Refused("busy".into()))),
        2 => Just(Move::Hear(Happening::Ejected("power off".into()))),
        3 => Just(Move::Hear(Happening::LetGo("_EJ0".into()))),
        1 => Just(Move::Hear(Happening::Overdue)),
    ]
}

proptest! {
    /// Whatever the guest and the API do in whatever order: memory is reachable exactly while a device is there, what
    /// has departed is told exactly once, and every operation ends at most once, all but the last one before the next.
    #[test]
    fn no_order_of_events_leaves_a_slot_half_free(moves in prop::collection::vec(moves(), 0..200)) {
        let mut slot = Slot {
            state: DeviceState::Present,
            reachable: true,
            removal: None,
            ended: Vec::new(),
            steps: Vec::new(),
        };
        for next in moves {
            let departures = |slot: &Slot| slot.steps.iter().filter(|step| **step == RemovalStep::Departed).count();
            let (before, state) = (departures(&slot), slot.state);
            match next {
                Move::Remove(mode) => slot.remove(mode),
                Move::Insert => slot.insert(),
                Move::Hear(happening) => slot.hear(happening),
            }
            let left = usize::from(state != DeviceState::Departed && slot.state == DeviceState::Departed);
            prop_assert_eq!(departures(&slot) - before, left, "the step and the state are one");
            prop_assert_eq!(slot.removal.is_some(), slot.state == DeviceState::Leaving);
            let open = slot.ended.iter().filter(|ended| ended.is_none()).count();
            let asked = slot.removal.as_ref().is_some_and(|removal| removal.asked_over().is_some());
            prop_assert_eq!(open, usize::from(asked), "no operation is forgotten");
            if slot.state == DeviceState::Present {
                prop_assert!(slot.reachable);
            }
        }
    }
}
