//! PCI Express in a machine: the root bus, its ports with one slot each, and the cards in them.
//!
//! A card is whatever goes behind a port: a function, and who works on its queues. It comes and goes as in a rack.
//! A card that comes is put in, and the slot's button is pressed; one that is to go is asked for by the button, and is
//! taken out when the guest has switched the power off; and any card can be pulled. A slot that the guest has not
//! released since takes no other.
//!
//! Ports are firmware's business no further than that they exist: Linux gives them bus numbers and windows, and keeps
//! room in the windows for cards to come.

use std::sync::{Arc, Mutex};

use aconite_devices::bus::{DeviceId, lock};
use aconite_devices::irq::MsiSink;
use aconite_devices::pci::{ConfigError, DevFn, PciError, PciRoot, RootPort, SharedFunction, SlotKind};
use aconite_devices::virtio::{QueueHandler, VirtioDevice, VirtioPci};
use thiserror::Error;

use crate::command::{Error, ErrorCode, RemoveMode};
use crate::config::MAX_PORTS;

/// The first port is this device on the root bus, behind the host bridge and the console.
const FIRST_DEVICE: u8 = 2;
/// Ids of ports and of cards; those of cards go up and never come again, so that what is left of a card that has gone
/// is not taken for the next one's.
const PORT_IDS: u32 = 0x100;
const CARD_IDS: u32 = 0x1000;

/// Why a port or a card could not be had. Always an error of the machine, except [`PcieError::NoPort`].
#[derive(Debug, Error)]
pub enum PcieError {
    /// The hierarchy.
    #[error(transparent)]
    Pci(#[from] PciError),
    /// A port's configuration space.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Every port has a card, or is being let go of.
    #[error("No PCI Express port is free for {id}: declare more (--slots pcie=N), or remove a device")]
    NoPort {
        /// The device.
        id: String,
    },
}

/// What a card is to the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CardKind {
    /// A memory device.
    Memory,
    /// A disk.
    Disk,
}

/// What goes into a slot.
#[derive(Clone)]
pub struct Card {
    /// What it is.
    pub kind: CardKind,
    /// The device's id, as the API has it.
    pub id: String,
    /// Its name in effects, from [`Pcie::name_card`].
    pub device: DeviceId,
    /// Its function.
    pub function: SharedFunction,
    /// Who works on its queues.
    pub queues: Arc<Mutex<dyn QueueHandler>>,
}

impl Card {
    /// A virtio device that was wired with the name `device`.
    pub fn virtio<D: VirtioDevice + 'static>(
        kind: CardKind,
        id: &str,
        device: DeviceId,
        function: Arc<Mutex<VirtioPci<D>>>,
    ) -> Self {
        Self { kind, id: id.to_owned(), device, function: function.clone(), queues: function }
    }
}

impl std::fmt::Debug for Card {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Card").field("id", &self.id).field("device", &self.device).finish_non_exhaustive()
    }
}

struct Port {
    device: DeviceId,
    function: Arc<Mutex<RootPort>>,
    card: Option<Card>,
    /// What was in it before.
    former: Option<(CardKind, String)>,
    /// The guest has not let go of what was pulled out of it.
    leaving: bool,
}

/// The ports of a machine, in the order of their slots.
pub struct Pcie {
    root: PciRoot,
    kind: SlotKind,
    ports: Vec<Port>,
    cards: u32,
}

impl std::fmt::Debug for Pcie {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let cards: Vec<_> = self.ports.iter().map(|port| port.card.as_ref().map(|card| &card.id)).collect();
        f.debug_struct("Pcie").field("kind", &self.kind).field("cards", &cards).finish_non_exhaustive()
    }
}

impl Pcie {
    /// `ports` ports on the root bus, at most
    /// [`MAX_PORTS`]; slot `n`, counted from 1, is device `n + 1`.
    ///
    /// # Errors
    /// A device is there already.
    pub fn new(root: PciRoot, ports: u32, kind: SlotKind, msi: &Arc<dyn MsiSink>) -> Result<Self, PcieError> {
        let mut made = Vec::new();
        for index in 0..ports.min(MAX_PORTS) as u8 {
            let device = DeviceId(PORT_IDS + u32::from(index));
            let function = Arc::new(Mutex::new(RootPort::new(device, kind, index + 1, msi.clone())?));
            root.insert(None, DevFn::new(FIRST_DEVICE + index, 0), device, function.clone())?;
            made.push(Port { device, function, card: None, former: None, leaving: false });
        }
        Ok(Self { root, kind, ports: made, cards: 0 })
    }

    /// A name for a card that is to be made.
    pub fn name_card(&mut self) -> DeviceId {
        self.cards += 1;
        DeviceId(CARD_IDS + self.cards)
    }

    /// Slots that take a card now.
    pub fn free_slots(&self) -> usize {
        self.ports.iter().filter(|port| port.free()).count()
    }

    /// Whether a card can be put in.
    ///
    /// # Errors
    /// All ports are in use.
    pub fn check_free_slot(&self) -> Result<(), Error> {
        match self.free_slots() {
            0 => Err(Error::new(
                ErrorCode::NoFreeSlot,
                "No PCI Express port is free",
                "declare ports when the machine starts (--slots pcie=N), or remove a device",
            )),
            _ => Ok(()),
        }
    }

    /// Puts a card into the first free slot before the guest starts: firmware has given it power.
    ///
    /// # Errors
    /// [`PcieError::NoPort`].
    pub fn install(&mut self, card: Card) -> Result<(), PcieError> {
        let port = self.take_port(card, None)?;
        lock(&port.function).occupy_at_start();
        let device = port.device;
        self.root.refresh(device);
        Ok(())
    }

    /// The place of the slot that has the card of `id`, or had it last.
    pub fn place_of(&self, kind: CardKind, id: &str) -> Option<usize> {
        let had = |port: &Port| {
            port.has(id) || port.former.as_ref().is_some_and(|former| *former == (kind, id.to_owned()))
        };
        self.ports.iter().position(had)
    }

    /// Whether the slot in a place takes a card now.
    pub fn free(&self, place: usize) -> bool {
        self.ports.get(place).is_some_and(Port::free)
    }

    /// Puts a card into the slot in `place`, or the first free one, and presses the slot's button, if it has one.
    ///
    /// # Errors
    /// [`PcieError::NoPort`].
    pub fn insert(&mut self, card: Card, place: Option<usize>) -> Result<(), PcieError> {
        let port = self.take_port(card, place)?;
        {
            let mut function = lock(&port.function);
            function.set_occupied(true);
            function.press_button();
        }
        let device = port.device;
        self.root.refresh(device);
        Ok(())
    }

    /// Whether the card of `id` can go in this mode.
    ///
    /// # Errors
    /// Its slot has no button by which the guest could be asked.
    pub fn check_button(&self, id: &str, mode: RemoveMode) -> Result<(), Error> {
        match (mode, self.kind) {
            (RemoveMode::Eject, SlotKind::Plain) => Err(Error::new(
                ErrorCode::NotSupported,
                format!("The slot of {id} has no button by which the guest could be asked"),
                "pull it (surprise), or start the machine with --slots button=on",
            )),
            _ => Ok(()),
        }
    }

    /// Presses the button of the slot with the card of `id`: the guest is asked to let go of it.
    pub fn press_button(&mut self, id: &str) {
        if let Some(port) = self.ports.iter().find(|port| port.has(id)) {
            lock(&port.function).press_button();
        }
    }

    /// Pulls the card of `id`, whatever the guest does with it: its link is down from here on, and with it its
    /// configuration space and its registers. The slot takes another card after [`Self::let_go`].
    pub fn pull(&mut self, id: &str) {
        let Some(port) = self.ports.iter_mut().find(|port| port.has(id)) else { return };
        let Some(card) = port.card.take() else { return };
        port.former = Some((card.kind, card.id.clone()));
        port.leaving = true;
        lock(&port.function).set_occupied(false);
        let device = port.device;
        self.root.refresh(device);
        self.root.remove(card.device);
    }

    /// The guest has let go of the card that was pulled out of the slot of `port`.
    pub fn let_go(&mut self, port: DeviceId) {
        if let Some(port) = self.ports.iter_mut().find(|found| found.device == port) {
            port.leaving = false;
        }
    }

    /// The device that a change of the slot of `port` is about: the one in it, or the one that was pulled last.
    pub fn about(&self, port: DeviceId) -> Option<(CardKind, String)> {
        let port = self.ports.iter().find(|found| found.device == port)?;
        let left = port.former.clone().filter(|_| port.leaving);
        left.or_else(|| port.card.as_ref().map(|card| (card.kind, card.id.clone())))
    }

    /// Whether the card of `id` has power and a link.
    pub fn answers(&self, id: &str) -> bool {
        self.ports.iter().any(|port| port.has(id) && lock(&port.function).link())
    }

    /// Who works on the queues of the card that is called `device` in effects.
    pub fn queues(&self, device: DeviceId) -> Option<Arc<Mutex<dyn QueueHandler>>> {
        let mut cards = self.ports.iter().filter_map(|port| port.card.as_ref());
        cards.find(|card| card.device == device).map(|card| card.queues.clone())
    }

    fn take_port(&mut self, card: Card, place: Option<usize>) -> Result<&mut Port, PcieError> {
        let mut ports = self.ports.iter_mut().enumerate();
        let free = ports.find(|(at, port)| port.free() && place.is_none_or(|place| place == *at));
        let Some((_, port)) = free else {
            return Err(PcieError::NoPort { id: card.id });
        };
        self.root.insert(Some(port.device), DevFn::new(0, 0), card.device, card.function.clone())?;
        port.card = Some(card);
        Ok(port)
    }
}

impl Port {
    fn free(&self) -> bool {
        self.card.is_none() && !self.leaving
    }

    fn has(&self, id: &str) -> bool {
        self.card.as_ref().is_some_and(|card| card.id == id)
    }
}
