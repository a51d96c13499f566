//! Host bridges that come and go by ACPI: the registers behind their `_STA`, `_EJ0` and `_OST`.

use std::sync::{Arc, Mutex};

use aconite_acpi::layout::MAX_HOST_BRIDGES;
use aconite_acpi::platform::EventTarget;
use aconite_acpi::platform::hotplug::{self, EJECT, OS_STATUS, OsStatus, STATUS, STATUS_PRESENT, WINDOW};

use crate::bus::{BusDevice, Effect, Effects, first_word, lock};

#[derive(Clone, Copy, Debug, Default)]
struct Bridge {
    present: bool,
    /// The window that it was given last.
    window: u32,
}

/// Which bridges are there, and with which window. Clones share it.
#[derive(Clone, Debug)]
pub struct HotplugBridgesState(Arc<Mutex<Inner>>);

#[derive(Debug)]
struct Inner {
    bridges: [Bridge; MAX_HOST_BRIDGES as usize],
    windows: u32,
    next: u32,
}

impl HotplugBridgesState {
    /// No bridge is there. Those that come get one of `windows` windows in turn, the first one after the last.
    pub fn new(windows: u32) -> Self {
        Self(Arc::new(Mutex::new(Inner { bridges: Default::default(), windows: windows.max(1), next: 0 })))
    }

    /// `bridge`, below [`MAX_HOST_BRIDGES`], comes.
    pub fn come(&self, bridge: u32) {
        let mut inner = lock(&self.0);
        let window = inner.next;
        inner.next = (window + 1) % inner.windows;
        if let Some(bridge) = inner.bridges.get_mut(bridge as usize) {
            *bridge = Bridge { present: true, window };
        }
    }

    /// `bridge` goes; whether it was there.
    pub fn go(&self, bridge: u32) -> bool {
        let mut inner = lock(&self.0);
        inner.bridges.get_mut(bridge as usize).is_some_and(|bridge| std::mem::take(&mut bridge.present))
    }

    /// Whether `bridge` is there.
    pub fn present(&self, bridge: u32) -> bool {
        self.get(bridge).present
    }

    fn get(&self, bridge: u32) -> Bridge {
        lock(&self.0).bridges.get(bridge as usize).copied().unwrap_or_default()
    }
}

/// The registers of all bridges, [`hotplug::SIZE`] bytes each.
///
/// A write acts on each register whose first byte it covers; bytes that belong to no register read as zero.
#[derive(Debug)]
pub struct HotplugBridges {
    state: HotplugBridgesState,
}

impl HotplugBridges {
    /// Length of the block in bytes.
    pub const SIZE: u64 = hotplug::SIZE * MAX_HOST_BRIDGES as u64;

    /// The registers of the bridges of `state`.
    pub fn new(state: HotplugBridgesState) -> Self {
        Self { state }
    }
}

impl BusDevice for HotplugBridges {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            let (bridge, register) = ((at / hotplug::SIZE) as u32, at % hotplug::SIZE);
            let bridge = self.state.get(bridge);
            let (value, first) = match register {
                STATUS..EJECT if bridge.present => (STATUS_PRESENT, STATUS),
                WINDOW..OS_STATUS => (bridge.window, WINDOW),
                _ => (0, register),
            };
            *byte = value.to_le_bytes()[(register - first) as usize];
        }
    }

    fn write(&mut self, offset: u64, data: &[u8], effects: &mut Effects) {
        for (index, at) in (offset..).take(data.len()).enumerate() {
            let (bridge, register) = ((at / hotplug::SIZE) as u32, at % hotplug::SIZE);
            if bridge >= MAX_HOST_BRIDGES {
                return;
            }
            let target = EventTarget::HostBridge(bridge);
            match register {
                // `_STA` must be 0 when `_EJ0` returns (Linux `acpi_scan_hot_remove`), whoever takes what is behind it
                // away when.
                EJECT if self.state.go(bridge) => effects.push(Effect::Ejected(target)),
                // Of an absent one, too: it is what the OS says after it has let go.
                OS_STATUS => {
                    let status = OsStatus::decode(first_word(&data[index..]));
                    effects.push(Effect::OsStatus { target, status });
                }
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rig() -> (HotplugBridgesState, HotplugBridges) {
        let state = HotplugBridgesState::new(3);
        (state.clone(), HotplugBridges::new(state))
    }

    fn register(bridges: &mut HotplugBridges, bridge: u64, register: u64) -> u32 {
        let mut data = [0; 4];
        bridges.read(bridge * hotplug::SIZE + register, &mut data);
        u32::from_le_bytes(data)
    }

    fn status(bridges: &mut HotplugBridges, bridge: u64) -> u32 {
        register(bridges, bridge, STATUS)
    }

    fn write(bridges: &mut HotplugBridges, offset: u64, data: &[u8]) -> Vec<Effect> {
        let mut effects = Effects::new();
        bridges.write(offset, data, &mut effects);
        effects.as_slice().to_vec()
    }

    #[test]
    fn a_bridge_is_seen_and_ejected_once() {
        let (state, mut bridges) = rig();
        state.come(2);
        assert_eq!([status(&mut bridges, 1), status(&mut bridges, 2)], [0, STATUS_PRESENT]);
        let eject = 2 * hotplug::SIZE + EJECT;
        let ejected = Effect::Ejected(EventTarget::HostBridge(2));
        assert_eq!(write(&mut bridges, eject, &[1, 0, 0, 0]), [ejected]);
        assert_eq!(status(&mut bridges, 2), 0, "when _EJ0 returns");
        assert_eq!(write(&mut bridges, eject, &[1, 0, 0, 0]), []);
        let said = |event, status| Effect::OsStatus {
            target: EventTarget::HostBridge(2),
            status: OsStatus { event, status },
        };
        let os_status = 2 * hotplug::SIZE + OS_STATUS;
        assert_eq!(write(&mut bridges, os_status, &[3, 0, 0x84, 0]), [said(3, OsStatus::EJECTING)]);
        assert_eq!(write(&mut bridges, os_status, &[3]), [said(3, OsStatus::SUCCESS)]);
    }

    #[test]
    fn whoever_comes_has_the_next_window() {
        let (state, mut bridges) = rig();
        let mut given = Vec::new();
        for bridge in [2, 5, 2, 2] {
            state.come(bridge);
            given.push(register(&mut bridges, bridge.into(), WINDOW));
            state.go(bridge);
            assert_eq!(
                Some(&register(&mut bridges, bridge.into(), WINDOW)),
                given.last(),
                "until the next one"
            );
        }
        assert_eq!(given, [0, 1, 2, 0]);
        state.come(MAX_HOST_BRIDGES);
        assert!(!state.go(MAX_HOST_BRIDGES) && !state.present(u32::MAX));
    }

    proptest! {
        #[test]
        fn no_access_is_without_an_answer(
            there in any::<u32>(),
            accesses in prop::collection::vec(
                (any::<bool>(), 0..HotplugBridges::SIZE, prop::collection::vec(any::<u8>(), 1..9)),
                1..40,
            ),
        ) {
            let (state, mut bridges) = rig();
            for bridge in (0..MAX_HOST_BRIDGES).filter(|bridge| there & 1 << bridge != 0) {
                state.come(bridge);
            }
            let mut left = there & ((1 << MAX_HOST_BRIDGES) - 1);
            for (is_write, offset, mut data) in accesses {
                if !is_write {
                    bridges.read(offset, &mut data);
                    continue;
                }
                for effect in write(&mut bridges, offset, &data) {
                    match effect {
                        Effect::Ejected(EventTarget::HostBridge(bridge)) => {
                            prop_assert!(left & 1 << bridge != 0, "it was there");
                            left &= !(1 << bridge);
                        }
                        Effect::OsStatus { target: EventTarget::HostBridge(bridge), .. } => {
                            prop_assert!(bridge < MAX_HOST_BRIDGES);
                        }
                        other => prop_assert!(false, "{other:?}"),
                    }
                }
            }
            for bridge in 0..MAX_HOST_BRIDGES {
                prop_assert_eq!(state.present(bridge), left & 1 << bridge != 0);
            }
        }
    }
}
