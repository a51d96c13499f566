//! How the guest is told of a device that goes or comes, and who hears what it makes of it.

use std::ops::Range;
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;

use aconite_acpi::platform::{EventTarget, FirmwareEvent, notify};
use aconite_devices::bus::lock;
use aconite_devices::platform::Platform;

use super::GuestAgent;
use super::cpu::{Mailbox, Message};
use super::pcie::{CardKind, Pcie};
use super::removal::{Happening, Removal};
use crate::command::{Error, ErrorCode, RemoveMode};
use crate::config::Channel;

/// A unit as the agent knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestUnit {
    /// Its root device in the ACPI namespace.
    pub path: String,
    /// Its guest-physical addresses.
    pub ranges: Vec<Range<u64>>,
}

impl GuestUnit {
    /// Unit number `unit`.
    pub fn new(unit: usize, ranges: Vec<Range<u64>>) -> Self {
        Self { path: aconite_acpi::target_path(EventTarget::Root(unit as u32)), ranges }
    }
}

/// Something that was heard of a guest's part in an operation, by another thread.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Heard {
    /// Of a removal.
    Removal {
        /// The operation.
        operation: u64,
        /// What.
        happening: Happening,
    },
    /// Of an insertion: it is over.
    Inserted {
        /// The operation.
        operation: u64,
        /// Why the guest does not use the device.
        error: Option<Error>,
    },
}

/// The ways to the guest.
pub struct Ways {
    /// Firmware events.
    pub platform: Arc<Mutex<Platform>>,
    /// PCI Express ports.
    pub pcie: Arc<Mutex<Pcie>>,
    /// The agent, once it is there.
    pub agent: Arc<OnceLock<Arc<dyn GuestAgent>>>,
    /// The main loop.
    pub mailbox: Mailbox,
}

impl Ways {
    /// Whether the guest can be told over `channel`.
    pub fn check(&self, channel: Channel) -> Result<(), Error> {
        if channel == Channel::Agent && self.agent.get().is_none() {
            return Err(Error::new(
                ErrorCode::WrongState,
                "The agent in the guest does not answer (yet)",
                "wait for the event agent_ready, or start the machine with its agent",
            ));
        }
        Ok(())
    }

    /// Tells the guest that a device goes.
    pub fn tell_removal(&self, removal: &Removal, unit: usize, ranges: Vec<Range<u64>>) {
        let Removal { operation, mode, .. } = *removal;
        match removal.channel {
            Channel::Container => self.notify(EventTarget::Container(unit as u32), code_of(mode)),
            Channel::Bridge => self.notify_bridge(&removal.device, code_of(mode)),
            Channel::Agent => self.ask(operation, move |agent| {
                let asked = agent.let_go(&GuestUnit::new(unit, ranges), mode);
                let happening = match asked {
                    Ok(()) => Happening::LetGo("the agent has unbound the driver".to_owned()),
                    Err(error) => Happening::Refused(error.message),
                };
                Heard::Removal { operation, happening }
            }),
            Channel::Pcie => self.tell_card_removal(removal),
            Channel::None => {}
        }
    }

    /// Tells the guest that a card goes. Who pulls it has told the guest by it.
    pub fn tell_card_removal(&self, removal: &Removal) {
        if removal.mode == RemoveMode::Eject {
            lock(&self.pcie).press_button(&removal.device);
        }
    }

    /// Tells the guest that a card has come. One in a slot says so itself.
    pub fn tell_card_insertion(&self, device: &str) {
        self.notify_bridge(device, notify::BUS_CHECK);
    }

    /// Tells the guest that a unit has come. Whether that is over with it: otherwise something will be heard.
    pub fn tell_insertion(
        &self,
        operation: u64,
        channel: Channel,
        unit: usize,
        ranges: Vec<Range<u64>>,
    ) -> bool {
        if channel != Channel::Agent {
            self.notify(EventTarget::Container(unit as u32), notify::BUS_CHECK);
            return true;
        }
        self.ask(operation, move |agent| Heard::Inserted {
            operation,
            error: agent.take_up(&GuestUnit::new(unit, ranges)).err(),
        });
        false
    }

    /// Tells the guest that there is more on a bus.
    pub fn tell_joined(&self, unit: usize) {
        self.notify(EventTarget::Root(unit as u32), notify::NFIT_UPDATE);
    }

    /// Notifies the host bridge of a card, if it is behind one.
    fn notify_bridge(&self, device: &str, code: u8) {
        let bridge = lock(&self.pcie).bridge_of(CardKind::Memory, device);
        if let Some(bridge) = bridge {
            self.notify(EventTarget::HostBridge(bridge), code);
        }
    }

    fn notify(&self, target: EventTarget, code: u8) {
        lock(&self.platform).push(FirmwareEvent { target, code });
    }

    /// Asks the agent on a thread of its own: the guest may take its time, or for ever.
    fn ask(&self, operation: u64, question: impl FnOnce(&dyn GuestAgent) -> Heard + Send + 'static) {
        let Some(agent) = self.agent.get().cloned() else { return };
        let mailbox = self.mailbox.clone();
        let started = thread::Builder::new()
            .name(format!("operation{operation}"))
            .spawn(move || mailbox.send(Message::Heard(question(&*agent))));
        if let Err(error) = started {
            tracing::error!(%error, operation, "the agent is not asked; the operation will time out");
        }
    }
}

/// The notification by which firmware tells the guest of a removal.
pub(super) fn code_of(mode: RemoveMode) -> u8 {
    match mode {
        RemoveMode::Eject => notify::EJECT_REQUEST,
        RemoveMode::Surprise => notify::DEVICE_CHECK,
    }
}
