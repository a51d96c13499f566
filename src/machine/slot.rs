//! What the guest does to the slots of PCI Express ports, and what that means for the device in one.
//!
//! Linux (`drivers/pci/hotplug/pciehp_ctrl.c`) answers the button by blinking for five seconds, in which pressing it
//! again takes the request back; then it takes the drivers away and switches the power off, with which the card is out of
//! reach, and a second later it makes the power indicator dark. A card that was pulled it notices by the link or by
//! presence, and does all the same. Until then it looks at no other card in that slot, whatever became of the removal:
//! the slot is free when the guest has released it.

use aconite_devices::bus::{DeviceId, lock};
use aconite_devices::pci::{Indicator, SlotChange};

use super::build::Built;
use super::departing::Departing;
use super::pcie::CardKind;
use super::removal::{Happening, Removal};
use super::tell::Ways;
use crate::command::RemoveMode;
use crate::config::Channel;
use crate::kvm::Held;

const POWERED_OFF: &str = "the guest has switched the slot's power off";
const RELEASED: &str = "the slot's power indicator is dark";

impl Built {
    /// The guest has changed something of the slot of `port`.
    pub fn slot_changed(&mut self, _held: &Held, ways: &Ways, port: DeviceId, change: SlotChange) {
        let (kind, id, answers) = {
            let pcie = lock(&self.pcie);
            let Some((kind, id)) = pcie.about(port) else { return };
            let answers = pcie.answers(&id);
            (kind, id, answers)
        };
        match kind {
            CardKind::Disk if self.disks.has(&id) => changed(&mut self.disks, ways, &id, change, answers),
            CardKind::Disk => {}
            CardKind::Memory => {
                if let Some(unit) = self.memory.unit_of_card(&id) {
                    changed(&mut self.memory, ways, &unit, change, answers);
                }
            }
        }
        if matches!(change, SlotChange::Released | SlotChange::PresenceSeen) {
            lock(&self.pcie).let_go(port);
        }
    }
}

/// What a change of its slot means for a card that has not departed; `answers` says whether the card has power and a
/// link by now.
fn changed<D: Departing>(devices: &mut D, ways: &Ways, key: &D::Key, change: SlotChange, answers: bool) {
    match devices.removals().get(key).filter(|removal| removal.channel == Channel::Pcie) {
        Some(removal) => {
            if let Some(happening) = happening(removal, change, answers) {
                devices.hear(ways, key, happening);
            }
        }
        None if change == SlotChange::PowerOff && !answers => {
            devices.begin_unasked(ways, key, Channel::Pcie, POWERED_OFF.to_owned());
        }
        None => {}
    }
}

/// What `change` says of a removal.
fn happening(removal: &Removal, change: SlotChange, answers: bool) -> Option<Happening> {
    let orderly = removal.mode == RemoveMode::Eject;
    match change {
        // It may have switched the power on again by now, and then it has not let go.
        SlotChange::PowerOff => (!answers).then(|| Happening::Ejected(POWERED_OFF.to_owned())),
        SlotChange::Released => removal.gone().then(|| Happening::LetGo(RELEASED.to_owned())),
        SlotChange::PresenceSeen if !orderly => {
            Some(Happening::LetGo("the guest has seen that the slot is empty".to_owned()))
        }
        SlotChange::PowerIndicator(Indicator::Blink) if orderly => Some(Happening::Working),
        SlotChange::PowerIndicator(Indicator::On) if removal.working() && !removal.gone() => Some(
            Happening::Refused("the power indicator is lit again: the request was taken back".to_owned()),
        ),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    fn removal(mode: RemoveMode) -> Removal {
        Removal::begin("p0", 1, mode, Channel::Pcie, Duration::from_secs(1), Instant::now()).0
    }

    #[test]
    fn power_goes_off_and_then_the_indicator() {
        let (off, released) = (SlotChange::PowerOff, SlotChange::Released);
        let let_go = Some(Happening::LetGo(RELEASED.to_owned()));
        let mut asked = removal(RemoveMode::Eject);
        assert_eq!(happening(&asked, off, true), None);
        assert_eq!(happening(&asked, SlotChange::PowerOn, true), None);
        assert_eq!(happening(&asked, released, true), None, "it has power again");
        let ejected = happening(&asked, off, false).unwrap();
        assert_eq!(ejected, Happening::Ejected(POWERED_OFF.to_owned()));
        asked.on(ejected);
        assert_eq!(happening(&asked, SlotChange::PowerIndicator(Indicator::On), false), None);
        assert_eq!(happening(&asked, released, false), let_go);
        assert_eq!(happening(&removal(RemoveMode::Surprise), released, false), let_go);
    }

    #[test]
    fn a_request_is_taken_back_only_after_it_was_taken_up() {
        let on = SlotChange::PowerIndicator(Indicator::On);
        let blink = SlotChange::PowerIndicator(Indicator::Blink);
        let mut asked = removal(RemoveMode::Eject);
        assert_eq!(happening(&asked, on, true), None);
        assert_eq!(happening(&asked, blink, true), Some(Happening::Working));
        asked.on(Happening::Working);
        assert!(matches!(happening(&asked, on, true), Some(Happening::Refused(_))));
        assert_eq!(happening(&removal(RemoveMode::Surprise), blink, false), None);
    }

    #[test]
    fn a_pulled_card_without_power_controller_is_over_when_its_absence_is_seen() {
        let heard = happening(&removal(RemoveMode::Surprise), SlotChange::PresenceSeen, false);
        assert!(matches!(heard, Some(Happening::LetGo(_))));
        assert_eq!(happening(&removal(RemoveMode::Eject), SlotChange::PresenceSeen, true), None);
    }
}
