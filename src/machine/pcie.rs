//! PCI Express in a machine: ports with one slot each, host bridges that come and go, and the cards behind them.
//!
//! A card is whatever goes there: a function, and who works on its queues. To a port it comes and goes as in a rack: a
//! card that comes is put in, and the slot's button is pressed; one that is to go is asked for by the button, and is
//! taken out when the guest has switched the power off; and any card can be pulled. A host bridge comes and goes with
//! its card, which is alone on its root bus, and the guest learns of it by notifications of the firmware. A place that
//! the guest has not let go of since takes no other card.
//!
//! Ports are firmware's business no further than that they exist: Linux gives them bus numbers and windows, and keeps
//! room in the windows for cards to come. Host bridges have theirs from the DSDT.

use std::sync::{Arc, Mutex};

use aconite_acpi::layout::{MAX_HOST_BRIDGES, host_bridge_bus};
use aconite_devices::bus::{DeviceId, lock};
use aconite_devices::irq::MsiSink;
use aconite_devices::pci::{
    ConfigError, DevFn, HotplugBridgesState, PciBus, PciError, PciRoot, PortType, RootPort, SharedFunction,
    SlotKind,
};
use aconite_devices::virtio::{QueueHandler, VirtioDevice, VirtioPci};
use thiserror::Error;

use crate::command::{Error, ErrorCode, RemoveMode};
use crate::config::{Channel, MAX_PORTS, Pmem};

/// The first port is this device on the root bus, behind the host bridge and the console.
const FIRST_DEVICE: u8 = 2;
/// Ids of ports and of cards; those of cards go up and never come again, so that what is left of a card that has gone
/// is not taken for the next one's.
const PORT_IDS: u32 = 0x100;
const CARD_IDS: u32 = 0x1000;

/// Why a port or a card could not be had. Always an error of the machine, except [`PcieError::NoPlace`].
#[derive(Debug, Error)]
pub enum PcieError {
    /// The hierarchy.
    #[error(transparent)]
    Pci(#[from] PciError),
    /// A port's configuration space.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Every place of the kind has a card, or is being let go of.
    #[error("No {} is free for {id}: declare more (--slots {}=N), or remove a device", .at.name(), .at.key())]
    NoPlace {
        /// Where it was to go.
        at: At,
        /// The device.
        id: String,
    },
}

/// Where a card goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum At {
    /// Into the slot of a port.
    Port,
    /// Onto the root bus of a host bridge of its own.
    HostBridge,
}

impl At {
    /// Where the card of a virtio-pmem device goes.
    pub fn of(pmem: &Pmem) -> Self {
        if pmem.behind_bridge() { Self::HostBridge } else { Self::Port }
    }

    /// What it is called.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Port => "PCI Express port",
            Self::HostBridge => "host bridge",
        }
    }

    /// The key of `--slots` that declares free ones.
    const fn key(self) -> &'static str {
        match self {
            Self::Port => "pcie",
            Self::HostBridge => "bridge",
        }
    }

    /// How a card there goes.
    pub const fn channel(self) -> Channel {
        match self {
            Self::Port => Channel::Pcie,
            Self::HostBridge => Channel::Bridge,
        }
    }

    /// What a function there says of its place.
    pub const fn port_type(self) -> PortType {
        match self {
            Self::Port => PortType::Endpoint,
            Self::HostBridge => PortType::RootComplexIntegrated,
        }
    }
}

/// What a card is to the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CardKind {
    /// A memory device.
    Memory,
    /// A disk.
    Disk,
}

/// What goes behind a port or a host bridge.
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

/// What a card is behind.
enum Seat {
    /// A port.
    Port { device: DeviceId, function: Arc<Mutex<RootPort>> },
    /// The host bridge with this number.
    HostBridge(u32),
}

struct Seated {
    seat: Seat,
    card: Option<Card>,
    /// What was there before, and is nowhere else now.
    former: Option<(CardKind, String)>,
    /// The guest has not let go of what was pulled.
    leaving: bool,
}

/// The ports of a machine, in the order of their slots, and its host bridges that come and go.
pub struct Pcie {
    root: PciRoot,
    kind: SlotKind,
    bridges: HotplugBridgesState,
    places: Vec<Seated>,
    cards: u32,
}

impl std::fmt::Debug for Pcie {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let cards: Vec<_> =
            self.places.iter().map(|place| place.card.as_ref().map(|card| &card.id)).collect();
        f.debug_struct("Pcie").field("kind", &self.kind).field("cards", &cards).finish_non_exhaustive()
    }
}

impl Pcie {
    /// `ports` ports on root bus 0, at most [`MAX_PORTS`], slot `n`, counted from 1, being device `n + 1`; and
    /// `host_bridges` host bridges, with nothing behind them, whose registers are those of `bridges`.
    ///
    /// # Errors
    /// A device is there already.
    pub fn new(
        root: PciRoot,
        ports: u32,
        kind: SlotKind,
        host_bridges: u32,
        bridges: HotplugBridgesState,
        msi: &Arc<dyn MsiSink>,
    ) -> Result<Self, PcieError> {
        let empty = |seat| Seated { seat, card: None, former: None, leaving: false };
        let mut places = Vec::new();
        for index in 0..ports.min(MAX_PORTS) as u8 {
            let device = DeviceId(PORT_IDS + u32::from(index));
            let function = Arc::new(Mutex::new(RootPort::new(device, kind, index + 1, msi.clone())?));
            root.insert(PciBus::Root(0), DevFn::new(FIRST_DEVICE + index, 0), device, function.clone())?;
            places.push(empty(Seat::Port { device, function }));
        }
        places.extend((0..host_bridges.min(MAX_HOST_BRIDGES)).map(Seat::HostBridge).map(empty));
        Ok(Self { root, kind, bridges, places, cards: 0 })
    }

    /// A name for a card that is to be made.
    pub fn name_card(&mut self) -> DeviceId {
        self.cards += 1;
        DeviceId(CARD_IDS + self.cards)
    }

    /// Places that take a card now.
    pub fn free_places(&self, at: At) -> usize {
        self.places.iter().filter(|place| place.free() && place.seat.at() == at).count()
    }

    /// Whether a card can be put there.
    ///
    /// # Errors
    /// All places are in use.
    pub fn check_free(&self, at: At) -> Result<(), Error> {
        let (name, key) = (at.name(), at.key());
        match self.free_places(at) {
            0 => Err(Error::new(
                ErrorCode::NoFreeSlot,
                format!("No {name} is free"),
                format!("declare some when the machine starts (--slots {key}=N), or remove a device"),
            )),
            _ => Ok(()),
        }
    }

    /// Puts a card into the first free place before the guest starts: firmware has given it power.
    ///
    /// # Errors
    /// [`PcieError::NoPlace`].
    pub fn install(&mut self, card: Card, at: At) -> Result<(), PcieError> {
        match self.take_place(card, at, None)? {
            Seat::Port { device, function } => {
                lock(function).occupy_at_start();
                let device = *device;
                self.root.refresh(device);
            }
            &Seat::HostBridge(bridge) => {
                self.bridges.come(bridge);
            }
        }
        Ok(())
    }

    /// The place that has the card of `id`, or had it last.
    pub fn place_of(&self, kind: CardKind, id: &str) -> Option<usize> {
        let had = |place: &Seated| {
            place.has(id) || place.former.as_ref().is_some_and(|former| former.0 == kind && former.1 == id)
        };
        self.places.iter().position(had)
    }

    /// Whether a place takes a card now.
    pub fn free(&self, place: usize) -> bool {
        self.places.get(place).is_some_and(Seated::free)
    }

    /// Puts a card into the given place, or the first free one, and presses the slot's button, if it has one. Of a host
    /// bridge that has come the guest is to be notified.
    ///
    /// # Errors
    /// [`PcieError::NoPlace`].
    pub fn insert(&mut self, card: Card, at: At, place: Option<usize>) -> Result<(), PcieError> {
        match self.take_place(card, at, place)? {
            Seat::Port { device, function } => {
                {
                    let mut function = lock(function);
                    function.set_occupied(true);
                    function.press_button();
                }
                let device = *device;
                self.root.refresh(device);
            }
            &Seat::HostBridge(bridge) => {
                self.bridges.come(bridge);
            }
        }
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
        if let Some(Seat::Port { function, .. }) = self.seat_with(id) {
            lock(function).press_button();
        }
    }

    /// Pulls the card of `id`, whatever the guest does with it: its link is down from here on, or its host bridge is gone,
    /// and with it its configuration space and its registers. The place takes another card after [`Self::let_go`].
    pub fn pull(&mut self, id: &str) {
        let Some(place) = self.places.iter_mut().find(|place| place.has(id)) else { return };
        let Some(card) = place.card.take() else { return };
        place.former = Some((card.kind, card.id.clone()));
        place.leaving = true;
        match &place.seat {
            Seat::Port { device, function } => {
                lock(function).set_occupied(false);
                let device = *device;
                self.root.refresh(device);
            }
            &Seat::HostBridge(bridge) => {
                self.bridges.go(bridge);
            }
        }
        self.root.remove(card.device);
    }

    /// The guest has let go of the card that was pulled out of the slot of `port`.
    pub fn let_go(&mut self, port: DeviceId) {
        if let Some(place) = self.places.iter_mut().find(|place| place.seat.is_port(port)) {
            place.leaving = false;
        }
    }

    /// The guest has let go of the card that was behind `bridge`.
    pub fn let_go_of_bridge(&mut self, bridge: u32) {
        if let Some(place) = self.places.iter_mut().find(|place| place.seat.is_bridge(bridge)) {
            place.leaving = false;
        }
    }

    /// The device that a change of the slot of `port` is about: the one in it, or the one that was pulled last.
    pub fn about(&self, port: DeviceId) -> Option<(CardKind, String)> {
        let place = self.places.iter().find(|place| place.seat.is_port(port))?;
        let left = place.former.clone().filter(|_| place.leaving);
        left.or_else(|| place.card.as_ref().map(|card| (card.kind, card.id.clone())))
    }

    /// The device behind `bridge`, or the one that was there last.
    pub fn behind(&self, bridge: u32) -> Option<&str> {
        let place = self.places.iter().find(|place| place.seat.is_bridge(bridge))?;
        let card = place.card.as_ref().map(|card| &card.id);
        card.or(place.former.as_ref().map(|(_, id)| id)).map(String::as_str)
    }

    /// The host bridge that the card of `id` is behind, or was behind last.
    pub fn bridge_of(&self, kind: CardKind, id: &str) -> Option<u32> {
        match self.places[self.place_of(kind, id)?].seat {
            Seat::HostBridge(bridge) => Some(bridge),
            Seat::Port { .. } => None,
        }
    }

    /// Whether the card of `id` has power and a link.
    pub fn answers(&self, id: &str) -> bool {
        match self.seat_with(id) {
            Some(Seat::Port { function, .. }) => lock(function).link(),
            Some(&Seat::HostBridge(bridge)) => self.bridges.present(bridge),
            None => false,
        }
    }

    /// Who works on the queues of the card that is called `device` in effects.
    pub fn queues(&self, device: DeviceId) -> Option<Arc<Mutex<dyn QueueHandler>>> {
        let mut cards = self.places.iter().filter_map(|place| place.card.as_ref());
        cards.find(|card| card.device == device).map(|card| card.queues.clone())
    }

    fn seat_with(&self, id: &str) -> Option<&Seat> {
        self.places.iter().find(|place| place.has(id)).map(|place| &place.seat)
    }

    fn take_place(&mut self, card: Card, at: At, place: Option<usize>) -> Result<&Seat, PcieError> {
        let fits = |(index, seated): &(usize, &Seated)| {
            seated.free() && seated.seat.at() == at && place.is_none_or(|place| place == *index)
        };
        let Some((index, _)) = self.places.iter().enumerate().find(fits) else {
            return Err(PcieError::NoPlace { at, id: card.id });
        };
        let bus = match &self.places[index].seat {
            Seat::Port { device, .. } => PciBus::Behind(*device),
            &Seat::HostBridge(bridge) => PciBus::Root(host_bridge_bus(bridge)),
        };
        self.root.insert(bus, DevFn::new(0, 0), card.device, card.function.clone())?;
        // Wherever it was last, from now on it is here.
        let moved = (card.kind, card.id.clone());
        for other in self.places.iter_mut().filter(|other| other.former.as_ref() == Some(&moved)) {
            other.former = None;
        }
        let seated = &mut self.places[index];
        seated.former = None;
        seated.card = Some(card);
        Ok(&seated.seat)
    }
}

impl Seat {
    fn at(&self) -> At {
        match self {
            Self::Port { .. } => At::Port,
            Self::HostBridge(_) => At::HostBridge,
        }
    }

    fn is_port(&self, port: DeviceId) -> bool {
        matches!(self, Self::Port { device, .. } if *device == port)
    }

    fn is_bridge(&self, bridge: u32) -> bool {
        matches!(self, Self::HostBridge(number) if *number == bridge)
    }
}

impl Seated {
    fn free(&self) -> bool {
        self.card.is_none() && !self.leaving
    }

    fn has(&self, id: &str) -> bool {
        self.card.as_ref().is_some_and(|card| card.id == id)
    }
}

#[cfg(test)]
#[path = "pcie_test.rs"]
mod tests;
