//! The removal of a device, as a state machine.
//!
//! A removal begins with a request and goes on with what is heard of the guest ([`Happening`]): over which channel the
//! guest is told and heard is not known here. Each answer is a list of [`Action`]s, which the machine carries out in
//! their order; so every way through a removal is seen in one place, and can be tested without a machine.
//!
//! ```text
//!   orderly    requested ─ notified ─┬─ (quiescing) ─┬─ ejected ─┬─ departed
//!                                    │               │           └─ timed out ─ departed
//!                                    │               ├─ refused        the device is present again
//!                                    └───────────────┴─ timed out      the device is present again
//!   surprise   requested ─ surprised ─ notified ─ (quiescing) ─┬─ departed
//!                                                              ├─ refused ─ departed
//!                                                              └─ timed out ─ departed
//! ```
//!
//! What went by surprise, or was ejected, is gone whatever the guest does about it: when it refuses or does not answer,
//! the operation fails, and the device has departed all the same. Id and address are free with the step `departed`, and
//! not before. A surprise overtakes an orderly removal of what is not gone yet. What the guest lets go of unasked begins
//! with `ejected`.

use std::time::{Duration, Instant};

use crate::command::{DeviceState, Error, ErrorCode, RemovalStep, RemoveMode};
use crate::config::Channel;

/// How long a guest may take unless the request says otherwise.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// What is heard of a removal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Happening {
    /// The guest works on it.
    Working,
    /// The guest does not let go; why.
    Refused(String),
    /// The guest has let go, and will say when it takes another device; how that is known.
    Ejected(String),
    /// The guest has let go, and takes another device; how that is known.
    LetGo(String),
    /// The deadline has passed.
    Overdue,
    /// The device was taken away by surprise meanwhile.
    Overtaken,
}

/// What the machine does next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Tell of a step.
    Step(RemovalStep, Option<String>),
    /// Put the device out of everybody's reach.
    Take,
    /// Tell the guest, over the removal's channel.
    TellGuest,
    /// The device is in this state now.
    State(DeviceState),
    /// The operation has ended, with an error or without.
    End(Option<Error>),
}

/// A removal that is under way.
#[derive(Clone, Debug)]
pub struct Removal {
    /// The device.
    pub device: String,
    /// The operation that the request was answered with; 0 if nobody has asked.
    pub operation: u64,
    /// Whether the guest was asked first.
    pub mode: RemoveMode,
    /// How the guest is told and heard.
    pub channel: Channel,
    /// When the guest has taken too long.
    pub deadline: Instant,
    patience: Duration,
    working: bool,
    gone: bool,
}

impl Removal {
    /// A removal, and how it begins.
    pub fn begin(
        device: &str,
        operation: u64,
        mode: RemoveMode,
        channel: Channel,
        patience: Duration,
        now: Instant,
    ) -> (Self, Vec<Action>) {
        // A time that no clock reaches is as good as one in a hundred years.
        const FOR_EVER: Duration = Duration::from_secs(100 * 365 * 24 * 3600);
        let deadline = now.checked_add(patience).unwrap_or_else(|| now + FOR_EVER);
        let device = device.to_owned();
        let gone = mode == RemoveMode::Surprise;
        let removal = Self { device, operation, mode, channel, deadline, patience, working: false, gone };
        let mut actions = vec![Action::Step(RemovalStep::Requested, None)];
        if gone {
            actions.extend([Action::Take, Action::Step(RemovalStep::Surprised, None)]);
        }
        actions.extend([
            Action::State(DeviceState::Leaving),
            Action::TellGuest,
            Action::Step(RemovalStep::Notified, None),
        ]);
        (removal, actions)
    }

    /// The removal of a device that the guest has let go of unasked, and how it begins.
    pub fn unasked(device: &str, channel: Channel, how: String, now: Instant) -> (Self, Vec<Action>) {
        let (mut removal, _) = Self::begin(device, 0, RemoveMode::Eject, channel, PATIENCE, now);
        let mut actions = vec![Action::State(DeviceState::Leaving)];
        actions.extend(removal.ejected(how));
        (removal, actions)
    }

    /// The channel over which somebody has asked for it.
    pub fn asked_over(&self) -> Option<Channel> {
        (self.operation != 0).then_some(self.channel)
    }

    /// Whether the guest works on it.
    pub fn working(&self) -> bool {
        self.working
    }

    /// Whether the device is out of reach already.
    pub fn gone(&self) -> bool {
        self.gone
    }

    /// What follows from a happening. The removal is over when the last action is [`Action::End`].
    pub fn on(&mut self, happening: Happening) -> Vec<Action> {
        match happening {
            Happening::Working if self.working => Vec::new(),
            Happening::Working => {
                self.working = true;
                vec![Action::Step(RemovalStep::Quiescing, None)]
            }
            Happening::Ejected(_) if self.gone => Vec::new(),
            Happening::Ejected(how) => self.ejected(how),
            Happening::LetGo(how) if self.gone => departed(Some(how), None),
            Happening::LetGo(how) => {
                let mut actions = self.ejected(how);
                actions.extend(departed(None, None));
                actions
            }
            Happening::Refused(why) => {
                let error = self.refused(&why);
                self.left(RemovalStep::Refused, Some(why), error)
            }
            Happening::Overdue => {
                let error = self.timed_out();
                self.left(RemovalStep::TimedOut, None, error)
            }
            Happening::Overtaken => vec![Action::End(Some(Error::new(
                ErrorCode::WrongDeviceState,
                format!("{} was removed by surprise before the guest had let go of it", self.device),
                "see the operation of that removal",
            )))],
        }
    }

    fn ejected(&mut self, how: String) -> Vec<Action> {
        self.gone = true;
        vec![Action::Step(RemovalStep::Ejected, Some(how)), Action::Take]
    }

    /// The guest has not done what it was told.
    fn left(&self, step: RemovalStep, detail: Option<String>, error: Error) -> Vec<Action> {
        let mut actions = vec![Action::Step(step, detail)];
        if self.gone {
            actions.extend(departed(None, Some(error)));
        } else {
            actions.extend([Action::State(DeviceState::Present), Action::End(Some(error))]);
        }
        actions
    }

    fn refused(&self, why: &str) -> Error {
        let (device, gone) = (&self.device, self.all_the_same());
        Error::new(
            ErrorCode::GuestRefused,
            format!("The guest does not let go of {device}: {why}{gone}"),
            if self.gone {
                "see the guest's kernel log"
            } else {
                "end what uses it in the guest and ask again, or remove it by surprise"
            },
        )
    }

    fn timed_out(&self) -> Error {
        let (device, gone, seconds) = (&self.device, self.all_the_same(), self.patience.as_secs_f64());
        Error::new(
            ErrorCode::GuestTimedOut,
            format!("The guest has not let go of {device} within {seconds} s{gone}"),
            "see the guest's kernel log for what it waits for, or give it more time (timeout)",
        )
    }

    fn all_the_same(&self) -> &'static str {
        if self.gone { "; it is gone all the same" } else { "" }
    }
}

fn departed(detail: Option<String>, error: Option<Error>) -> Vec<Action> {
    vec![
        Action::State(DeviceState::Departed),
        Action::Step(RemovalStep::Departed, detail),
        Action::End(error),
    ]
}

#[cfg(test)]
#[path = "removal_test.rs"]
mod tests;
