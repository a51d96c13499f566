//! A root port with one slot and native hot-plug (PCI Express Base Specification 6.0, sections 6.7 and 7.5.3).
//!
//! The port is a register machine. The guest's hot-plug driver (`drivers/pci/hotplug/pciehp_hpc.c`) writes Slot Control;
//! whoever handles the slot presses the button, puts a card in or pulls it out; and every change is an event in Slot
//! Status, with a message if the guest wants one. The link is up while there is a card with power behind a port that
//! has not switched it off. With the link down, nothing behind the port answers: configuration space and memory read
//! as ones at once, before the guest can learn of it.
//!
//! Slots come in two kinds. One with a button, indicators and a power controller is for orderly removal: the button is
//! pressed, the guest lets go, takes the power away, and makes the power indicator dark, which says that a card may be
//! put in or taken out (section 6.7.1.1.2). Linux waits for a second in between, and does not notice a card that comes
//! then. A slot without all that is always powered, and its card can only be pulled.

use std::sync::Arc;

use super::config::{BRIDGE_CONTROL, ConfigError, ConfigSpace, Identity, SECONDARY_BUS_RESET};
use super::msi::Msi;
use super::{Decode, PciFunction};
use crate::bus::{DeviceId, Effect, Effects};
use crate::irq::MsiSink;

/// Red Hat's id for a generic PCI Express root port.
const IDENTITY: Identity = Identity {
    vendor: 0x1b36,
    device: 0x000c,
    revision: 0,
    class: 0x06_0400,
    subsystem_vendor: 0,
    subsystem: 0,
};

const EXPRESS_ID: u8 = 0x10;
/// Length of the capability after id and link: through Slot Status 2.
const EXPRESS_BODY: usize = 0x3c - 2;
/// Capability version 2, root port, with a slot.
const EXPRESS_FLAGS: u16 = 2 | 4 << 4 | 1 << 8;
/// Device Capabilities: role-based error reporting.
const ROLE_BASED_ERRORS: u32 = 1 << 15;
/// Link Capabilities: 2.5 GT/s, one lane, data link layer active reporting; bits 31:24 are the port's number.
const LINK_CAPABILITIES: u32 = 0x11 | 1 << 20;
/// Link Capabilities 2: 2.5 GT/s.
const LINK_SPEEDS: u32 = 1 << 1;

const LINK_CONTROL: usize = 0x10;
const LINK_STATUS: usize = 0x12;
const SLOT_CAPABILITIES: usize = 0x14;
const SLOT_CONTROL: usize = 0x18;
const SLOT_STATUS: usize = 0x1a;
const LINK_CAPABILITIES_2: usize = 0x2c;

const LINK_DISABLE: u16 = 1 << 4;
const LINK_UP: u16 = 0x11 | LINK_ACTIVE;
const LINK_DOWN: u16 = 0x01;
const LINK_ACTIVE: u16 = 1 << 13;

const CAP_BUTTON: u32 = 1 << 0;
const CAP_POWER: u32 = 1 << 1;
const CAP_ATTENTION_INDICATOR: u32 = 1 << 3;
const CAP_POWER_INDICATOR: u32 = 1 << 4;
const CAP_SURPRISE: u32 = 1 << 5;
const CAP_HOT_PLUG: u32 = 1 << 6;
const CAP_NO_COMMAND_COMPLETED: u32 = 1 << 18;
const CAP_SLOT_NUMBER_SHIFT: u32 = 19;

const EVENT_BUTTON: u16 = 1 << 0;
const EVENT_POWER_FAULT: u16 = 1 << 1;
const EVENT_PRESENCE: u16 = 1 << 3;
const EVENT_COMMAND: u16 = 1 << 4;
const EVENT_LINK: u16 = 1 << 8;
const EVENTS: u16 = EVENT_BUTTON | EVENT_POWER_FAULT | EVENT_PRESENCE | EVENT_COMMAND | EVENT_LINK;
const STATUS_PRESENT: u16 = 1 << 6;

const ENABLE_INTERRUPT: u16 = 1 << 5;
const ENABLE_LINK: u16 = 1 << 12;
const ATTENTION_SHIFT: u16 = 6;
const POWER_SHIFT: u16 = 8;
const POWER_OFF: u16 = 1 << 10;

/// What an indicator shows (Slot Control, bits 7:6 and 9:8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Indicator {
    /// It shines.
    On,
    /// It blinks: the guest is at work on the slot.
    Blink,
    /// It is dark.
    Off,
}

impl Indicator {
    /// From two bits of Slot Control; 0 is reserved.
    const fn from_bits(bits: u16) -> Option<Self> {
        match bits & 3 {
            1 => Some(Self::On),
            2 => Some(Self::Blink),
            3 => Some(Self::Off),
            _ => None,
        }
    }

    const fn bits(self) -> u16 {
        match self {
            Self::On => 1,
            Self::Blink => 2,
            Self::Off => 3,
        }
    }
}

/// What the guest has done to a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotChange {
    /// It has switched the slot's power on.
    PowerOn,
    /// It has switched the slot's power off: it has let go of what is in it.
    PowerOff,
    /// It has made the power indicator dark after that: it is ready for another card.
    Released,
    /// It has changed the power indicator.
    PowerIndicator(Indicator),
    /// It has changed the attention indicator.
    AttentionIndicator(Indicator),
    /// It has seen that a card has come or gone: it has cleared the event of that. Told of slots without a power
    /// controller, of which nothing else is heard.
    PresenceSeen,
}

/// What a slot has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotKind {
    /// Attention button, both indicators, power controller, command completed events.
    Button,
    /// None of them: a card is powered while it is there, and goes without a word.
    Plain,
}

/// A root port with one slot.
pub struct RootPort {
    id: DeviceId,
    config: ConfigSpace,
    /// The registers as after power on.
    fresh: ConfigSpace,
    express: usize,
    msi: Msi,
    kind: SlotKind,
    occupied: bool,
    link: bool,
    /// The guest has switched the power off, and the power indicator is not dark yet.
    releasing: bool,
    /// The condition for a message held at the last look.
    asserted: bool,
    /// What is behind the port has been reset since the last question.
    reset_behind: bool,
}

impl RootPort {
    /// A port with an empty slot of `kind` and physical number `slot` (1 to 255; Linux names it so in
    /// `/sys/bus/pci/slots`). Its effects carry `id`.
    ///
    /// # Errors
    /// [`ConfigError`] if the capabilities do not fit.
    pub fn new(id: DeviceId, kind: SlotKind, slot: u8, sink: Arc<dyn MsiSink>) -> Result<Self, ConfigError> {
        let mut config = ConfigSpace::bridge(IDENTITY);
        let mut capabilities = CAP_HOT_PLUG | CAP_SURPRISE | u32::from(slot) << CAP_SLOT_NUMBER_SHIFT;
        let mut slot_writable = EVENT_PRESENCE | ENABLE_INTERRUPT | ENABLE_LINK;
        let mut control = 0;
        match kind {
            SlotKind::Button => {
                capabilities |= CAP_BUTTON | CAP_POWER | CAP_ATTENTION_INDICATOR | CAP_POWER_INDICATOR;
                slot_writable |= EVENT_BUTTON
                    | EVENT_POWER_FAULT
                    | EVENT_COMMAND
                    | 3 << ATTENTION_SHIFT
                    | 3 << POWER_SHIFT
                    | POWER_OFF;
                control = Indicator::Off.bits() << ATTENTION_SHIFT
                    | Indicator::Off.bits() << POWER_SHIFT
                    | POWER_OFF;
            }
            SlotKind::Plain => capabilities |= CAP_NO_COMMAND_COMPLETED,
        }
        let mut body = [0; EXPRESS_BODY];
        let mut put = |at: usize, value: &[u8]| body[at - 2..at - 2 + value.len()].copy_from_slice(value);
        put(0x02, &EXPRESS_FLAGS.to_le_bytes());
        put(0x04, &ROLE_BASED_ERRORS.to_le_bytes());
        put(0x0c, &(LINK_CAPABILITIES | u32::from(slot) << 24).to_le_bytes());
        put(LINK_STATUS, &LINK_DOWN.to_le_bytes());
        put(SLOT_CAPABILITIES, &capabilities.to_le_bytes());
        put(SLOT_CONTROL, &control.to_le_bytes());
        put(LINK_CAPABILITIES_2, &LINK_SPEEDS.to_le_bytes());
        let mut writable = [0; EXPRESS_BODY];
        let mut allow = |at: usize, mask: u16| writable[at - 2..at].copy_from_slice(&mask.to_le_bytes());
        // Device Control: error reporting and sizes. Link Control: ASPM, disable, clocks. Root Control: system errors, PME.
        allow(0x08, 0x78ef);
        allow(LINK_CONTROL, 0x00c3 | LINK_DISABLE);
        allow(SLOT_CONTROL, slot_writable);
        allow(0x1c, 0x000f);
        let express = usize::from(config.add_capability(EXPRESS_ID, &body, &writable)?);
        config.clears(express + SLOT_STATUS, &EVENTS.to_le_bytes());
        let msi = Msi::new(&mut config, sink)?;
        Ok(Self {
            id,
            fresh: config.clone(),
            config,
            express,
            msi,
            kind,
            occupied: false,
            link: false,
            releasing: false,
            asserted: false,
            reset_behind: false,
        })
    }

    /// What the slot has.
    pub fn kind(&self) -> SlotKind {
        self.kind
    }

    /// Whether there is a card in the slot.
    pub fn occupied(&self) -> bool {
        self.occupied
    }

    /// Whether what is in the slot answers.
    pub fn link(&self) -> bool {
        self.link
    }

    /// The power indicator; none if the slot has none.
    pub fn power_indicator(&self) -> Option<Indicator> {
        Indicator::from_bits(self.control() >> POWER_SHIFT)
    }

    /// There is a card from the start, as firmware leaves it: powered, its indicator on, and no event of it.
    pub fn occupy_at_start(&mut self) {
        self.occupied = true;
        if self.kind == SlotKind::Button {
            let control = self.control() & !(POWER_OFF | 3 << POWER_SHIFT);
            self.set(SLOT_CONTROL, control | Indicator::On.bits() << POWER_SHIFT);
        }
        self.follow_link();
        self.set(SLOT_STATUS, STATUS_PRESENT);
    }

    /// Presses the attention button; nothing happens if there is none.
    pub fn press_button(&mut self) {
        if self.kind == SlotKind::Button {
            self.raise(EVENT_BUTTON);
            self.look();
        }
    }

    /// Puts a card in or pulls it out. The link follows first, so that a card that is pulled answers nothing from here
    /// on; then presence changes, and one message tells of both.
    pub fn set_occupied(&mut self, occupied: bool) {
        if std::mem::replace(&mut self.occupied, occupied) == occupied {
            return;
        }
        self.follow_link();
        let status = self.status() & !STATUS_PRESENT | if occupied { STATUS_PRESENT } else { 0 };
        self.set(SLOT_STATUS, status);
        self.raise(EVENT_PRESENCE);
        self.look();
    }

    fn powered(&self) -> bool {
        self.kind == SlotKind::Plain || self.control() & POWER_OFF == 0
    }

    fn follow_link(&mut self) {
        let disabled = self.config.u16(self.express + LINK_CONTROL) & LINK_DISABLE != 0;
        let link = self.occupied && self.powered() && !disabled;
        if std::mem::replace(&mut self.link, link) != link {
            self.set(LINK_STATUS, if link { LINK_UP } else { LINK_DOWN });
            self.raise(EVENT_LINK);
            self.reset_behind |= !link;
        }
    }

    /// The guest has written Slot Control, which was `before`.
    fn command(&mut self, before: u16, effects: &mut Effects) {
        let mut control = self.control();
        for shift in [ATTENTION_SHIFT, POWER_SHIFT] {
            // The reserved value leaves an indicator as it is.
            if control >> shift & 3 == 0 {
                control |= before & 3 << shift;
            }
        }
        self.set(SLOT_CONTROL, control);
        let mut tell = |change| effects.push(Effect::Slot { port: self.id, change });
        let changed = |shift: u16| {
            Indicator::from_bits(control >> shift).filter(|_| (control ^ before) >> shift & 3 != 0)
        };
        if let Some(indicator) = changed(ATTENTION_SHIFT) {
            tell(SlotChange::AttentionIndicator(indicator));
        }
        if let Some(indicator) = changed(POWER_SHIFT) {
            tell(SlotChange::PowerIndicator(indicator));
        }
        if (control ^ before) & POWER_OFF != 0 {
            self.releasing = control & POWER_OFF != 0;
            tell(if self.releasing { SlotChange::PowerOff } else { SlotChange::PowerOn });
        }
        if self.releasing && Indicator::from_bits(control >> POWER_SHIFT) == Some(Indicator::Off) {
            self.releasing = false;
            tell(SlotChange::Released);
        }
        self.follow_link();
        if self.kind == SlotKind::Button {
            self.raise(EVENT_COMMAND);
        }
    }

    /// Sends a message when an enabled event comes up with none before it (section 6.7.3.4); the guest clears all it
    /// has seen before it expects another.
    fn look(&mut self) {
        let control = self.control();
        // The enable of each event has the event's place, but for the link's.
        let link = if control & ENABLE_LINK != 0 { EVENT_LINK } else { 0 };
        let wanted = control & (EVENTS & !EVENT_LINK) | link;
        let condition = control & ENABLE_INTERRUPT != 0 && self.status() & wanted != 0;
        let ready = self.msi.ready(&self.config);
        self.msi.set_pending(&mut self.config, condition && !ready);
        let asserted = condition && ready;
        if asserted && !self.asserted {
            self.msi.send(&self.config);
        }
        self.asserted = asserted;
    }

    fn control(&self) -> u16 {
        self.config.u16(self.express + SLOT_CONTROL)
    }

    fn status(&self) -> u16 {
        self.config.u16(self.express + SLOT_STATUS)
    }

    fn raise(&mut self, event: u16) {
        self.set(SLOT_STATUS, self.status() | event);
    }

    fn set(&mut self, register: usize, value: u16) {
        self.config.set(self.express + register, &value.to_le_bytes());
    }

    fn touches(&self, register: usize, offset: u16, length: usize) -> bool {
        let (first, at) = (self.express + register, usize::from(offset));
        at < first + 2 && first < at + length
    }
}

impl PciFunction for RootPort {
    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        self.config.read(offset, data);
    }

    fn config_write(&mut self, offset: u16, data: &[u8], effects: &mut Effects) {
        let control = self.control();
        let held = self.config.u16(BRIDGE_CONTROL) & SECONDARY_BUS_RESET != 0;
        let events = self.status();
        self.config.write(offset, data);
        if self.kind == SlotKind::Plain && events & !self.status() & EVENT_PRESENCE != 0 {
            effects.push(Effect::Slot { port: self.id, change: SlotChange::PresenceSeen });
        }
        if self.touches(SLOT_CONTROL, offset, data.len()) {
            self.command(control, effects);
        }
        if self.touches(LINK_CONTROL, offset, data.len()) {
            self.follow_link();
        }
        self.reset_behind |= !held && self.config.u16(BRIDGE_CONTROL) & SECONDARY_BUS_RESET != 0;
        self.look();
    }

    fn decode(&self) -> Decode {
        Decode { bars: Vec::new(), bridge: self.link.then(|| self.config.forwarded()) }
    }

    fn bar_read(&mut self, _bar: u8, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn bar_write(&mut self, _bar: u8, _offset: u64, _data: &[u8], _effects: &mut Effects) {}

    /// The registers start anew; a card stays in its slot, with power and a link as at the start.
    fn reset(&mut self) {
        self.config = self.fresh.clone();
        self.link = false;
        self.releasing = false;
        self.asserted = false;
        if std::mem::take(&mut self.occupied) {
            self.occupy_at_start();
        }
        self.reset_behind = true;
    }

    fn take_reset_behind(&mut self) -> bool {
        std::mem::take(&mut self.reset_behind)
    }
}

#[cfg(test)]
#[path = "root_port_test.rs"]
mod tests;
