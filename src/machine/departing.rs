//! What goes, goes in the same way: the part of a removal in which memory devices and disks do not differ.
//!
//! [`Removal`] says what follows from what is heard, and here it is carried out. What goes at once is named by a
//! [`Departing::Key`]: a unit, with all its memory devices, or a disk. How the guest is told, and what it takes to put
//! a thing out of everybody's reach, each kind of device knows by itself.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::operations::Operations;
use super::removal::{Action, Happening, PATIENCE, Removal};
use super::tell::Ways;
use crate::command::{DeviceState, Error, Event, EventBus, Operation, RemoveMode};
use crate::config::Channel;

/// A request to take a device away.
#[derive(Clone, Copy, Debug)]
pub struct Farewell {
    /// Whether the guest is asked.
    pub mode: RemoveMode,
    /// By which channel; `None` is the device's own.
    pub via: Option<Channel>,
    /// How long the guest may take; `None` is [`PATIENCE`].
    pub patience: Option<Duration>,
}

/// Devices of a kind, which go and are heard of.
pub trait Departing {
    /// What goes at once.
    type Key: Ord + Clone;

    /// Removals that are under way.
    fn removals(&mut self) -> &mut BTreeMap<Self::Key, Removal>;

    /// Where operations are kept.
    fn operations(&self) -> &Operations;

    /// The event stream.
    fn events(&self) -> &EventBus;

    /// Ids of the devices that go with `key`, those that have departed not among them.
    fn members(&self, key: &Self::Key) -> Vec<String>;

    /// Puts what `key` names out of everybody's reach; nothing happens if it is. No vCPU runs: nobody sees in which
    /// order.
    ///
    /// # Errors
    /// The host does not allow it; everything is as before.
    fn take(&mut self, key: &Self::Key) -> Result<(), Error>;

    /// Tells the guest, over the removal's channel.
    fn tell(&self, ways: &Ways, key: &Self::Key, removal: &Removal);

    /// Notes where devices stand; `by` is the channel of their removal, if one was asked for.
    fn note(&mut self, members: &[String], state: DeviceState, by: Option<Channel>);

    /// Begins to take away what `key` names, at the request for `id`, over `channel`.
    ///
    /// # Errors
    /// The host does not allow it; nothing has begun.
    fn begin(
        &mut self,
        ways: &Ways,
        key: &Self::Key,
        id: &str,
        channel: Channel,
        farewell: Farewell,
    ) -> Result<Operation, Error> {
        if farewell.mode == RemoveMode::Surprise {
            self.take(key)?;
        }
        if self.removals().contains_key(key) {
            self.hear(ways, key, Happening::Overtaken);
        }
        let mode = Some(farewell.mode);
        let operation = self.operations().begin(Operation { mode, ..Operation::new("remove", id, channel) });
        let patience = farewell.patience.unwrap_or(PATIENCE);
        let (removal, actions) =
            Removal::begin(id, operation.operation, farewell.mode, channel, patience, Instant::now());
        self.follow(ways, key, &removal, actions);
        self.operations().get(operation.operation)
    }

    /// The guest has let go of what `key` names over `channel`, and nobody has asked it to; how that is known.
    fn begin_unasked(&mut self, ways: &Ways, key: &Self::Key, channel: Channel, how: String) {
        let Some(first) = self.members(key).into_iter().next() else { return };
        let (removal, actions) = Removal::unasked(&first, channel, how, Instant::now());
        self.follow(ways, key, &removal, actions);
    }

    /// Whether a removal by surprise overtakes one of `key` that is under way.
    fn overtakes(&mut self, key: &Self::Key, mode: RemoveMode) -> bool {
        mode == RemoveMode::Surprise && self.removals().get(key).is_some_and(|removal| !removal.gone())
    }

    /// Something is heard of the removal of what `key` names.
    fn hear(&mut self, ways: &Ways, key: &Self::Key, happening: Happening) {
        let Some(mut removal) = self.removals().remove(key) else { return };
        let actions = removal.on(happening);
        self.follow(ways, key, &removal, actions);
    }

    /// Goes on with a removal, which is under way until its last action.
    fn follow(&mut self, ways: &Ways, key: &Self::Key, removal: &Removal, actions: Vec<Action>) {
        if !matches!(actions.last(), Some(Action::End(_))) {
            self.removals().insert(key.clone(), removal.clone());
        }
        self.carry_out(ways, key, removal, actions);
    }

    /// Something is heard of the removal that an operation is about, if it still goes on.
    fn hear_of(&mut self, ways: &Ways, operation: u64, happening: Happening) {
        let its = |(_, removal): &(&Self::Key, &Removal)| removal.operation == operation;
        let key = self.removals().iter().find(its).map(|(key, _)| key.clone());
        if let Some(key) = key {
            self.hear(ways, &key, happening);
        }
    }

    /// When the next removal is overdue.
    fn next_deadline(&mut self) -> Option<Instant> {
        self.removals().values().map(|removal| removal.deadline).min()
    }

    /// Ends the removals that are overdue.
    fn overdue(&mut self, ways: &Ways) {
        let now = Instant::now();
        let late = |(_, removal): &(&Self::Key, &Removal)| removal.deadline <= now;
        let keys: Vec<_> = self.removals().iter().filter(late).map(|(key, _)| key.clone()).collect();
        for key in keys {
            self.hear(ways, &key, Happening::Overdue);
        }
    }

    /// Does what a step of a removal consists of.
    fn carry_out(&mut self, ways: &Ways, key: &Self::Key, removal: &Removal, actions: Vec<Action>) {
        let members = self.members(key);
        for action in actions {
            match action {
                Action::Step(step, detail) => {
                    for id in &members {
                        self.events().publish(Event::Removal {
                            device: id.clone(),
                            operation: removal.operation,
                            step,
                            mode: removal.mode,
                            channel: removal.channel,
                            detail: detail.clone(),
                        });
                    }
                }
                Action::Take => {
                    if let Err(error) = self.take(key) {
                        tracing::error!(%error, ?members, "what the guest has given back stays within reach");
                        self.removals().remove(key);
                        self.note(&members, DeviceState::Present, None);
                        self.end(removal, Some(error));
                        return;
                    }
                }
                Action::TellGuest => self.tell(ways, key, removal),
                Action::State(state) => self.note(&members, state, removal.asked_over()),
                Action::End(error) => self.end(removal, error),
            }
        }
    }

    /// Ends the operation of a removal.
    fn end(&self, removal: &Removal, error: Option<Error>) {
        if removal.asked_over().is_some() {
            self.operations().end(self.events(), removal.operation, error);
        }
    }
}

#[cfg(test)]
#[path = "departing_test.rs"]
mod tests;
