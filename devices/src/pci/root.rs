//! The tree of functions, and who answers where at present.
//!
//! The root keeps each function's last [`Decode`] beside it, so that finding the function behind an address locks
//! no function but that one. Lock order: the tree's lock is never held while a function is locked.

use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::{BarRange, Decode, DevFn, PciBus, PciError, SharedFunction};
use crate::bus::{DeviceId, lock};

/// A function that answers a configuration cycle.
pub(super) struct Found {
    pub(super) id: DeviceId,
    pub(super) function: SharedFunction,
}

/// A function that answers a memory cycle.
pub(super) struct Routed {
    pub(super) function: SharedFunction,
    pub(super) bar: u8,
    pub(super) offset: u64,
}

struct Node {
    id: DeviceId,
    bus: PciBus,
    devfn: DevFn,
    function: SharedFunction,
    decode: Decode,
}

struct Route {
    range: BarRange,
    function: SharedFunction,
}

#[derive(Default)]
struct Tree {
    nodes: Vec<Node>,
    /// Reachable BARs, ascending by address.
    routes: Vec<Route>,
}

/// The root complex: one segment, with root bus 0 and what is behind its bridges, and further root buses. A root bus
/// answers for its number as long as a function is on it, whatever bridges of bus 0 forward. Clones share the tree.
#[derive(Clone, Default)]
pub struct PciRoot {
    tree: Arc<RwLock<Tree>>,
}

impl PciRoot {
    /// Root buses without functions.
    pub fn new() -> Self {
        Self::default()
    }

    /// Inserts `function` as `devfn` on `bus`.
    ///
    /// # Errors
    /// [`PciError::SlotTaken`], [`PciError::Duplicate`] and [`PciError::NoPort`].
    pub fn insert(
        &self,
        bus: PciBus,
        devfn: DevFn,
        id: DeviceId,
        function: SharedFunction,
    ) -> Result<(), PciError> {
        let decode = lock(&*function).decode();
        let mut tree = self.write();
        if tree.nodes.iter().any(|node| node.id == id) {
            return Err(PciError::Duplicate { id });
        }
        if let PciBus::Behind(port) = bus
            && !tree.nodes.iter().any(|node| node.id == port)
        {
            return Err(PciError::NoPort { port });
        }
        if let Some(taken) = tree.nodes.iter().find(|node| node.bus == bus && node.devfn == devfn) {
            return Err(PciError::SlotTaken { devfn, by: taken.id });
        }
        tree.nodes.push(Node { id, bus, devfn, function, decode });
        tree.rebuild();
        Ok(())
    }

    /// Takes the function `id` out, with everything behind it. From then on its configuration space and its memory
    /// read as ones. Returns what was removed, the function itself first.
    pub fn remove(&self, id: DeviceId) -> Vec<(DeviceId, SharedFunction)> {
        let mut tree = self.write();
        let mut removed: Vec<(DeviceId, SharedFunction)> = Vec::new();
        let mut wanted = vec![id];
        while let Some(id) = wanted.pop() {
            if let Some(at) = tree.nodes.iter().position(|node| node.id == id) {
                let node = tree.nodes.remove(at);
                removed.push((node.id, node.function));
            }
            wanted
                .extend(tree.nodes.iter().filter(|node| node.bus == PciBus::Behind(id)).map(|node| node.id));
        }
        tree.rebuild();
        removed
    }

    /// Asks the function `id` again where it answers, and resets everything behind it if it says so. The root does so
    /// itself after configuration writes; whoever else changes a function (presses a port's button, pulls its card)
    /// asks for it.
    pub fn refresh(&self, id: DeviceId) {
        let Some(function) = self.function(id) else { return };
        let (decode, reset) = {
            let mut function = lock(&*function);
            (function.decode(), function.take_reset_behind())
        };
        self.update(id, decode);
        if reset {
            for (id, function) in self.behind(id) {
                let decode = {
                    let mut function = lock(&*function);
                    function.reset();
                    // A bridge's own reset says no more than the one that led to it.
                    function.take_reset_behind();
                    function.decode()
                };
                self.update(id, decode);
            }
        }
    }

    /// Everything behind the bridge `id`, the nearest first.
    fn behind(&self, id: DeviceId) -> Vec<(DeviceId, SharedFunction)> {
        let tree = self.read();
        let mut found: Vec<(DeviceId, SharedFunction)> = Vec::new();
        let mut bridges = vec![id];
        while let Some(bridge) = bridges.pop() {
            let below = tree.nodes.iter().filter(|node| node.bus == PciBus::Behind(bridge));
            for node in below {
                found.push((node.id, node.function.clone()));
                bridges.push(node.id);
            }
        }
        found
    }

    /// The functions of the hierarchy: id, bus, slot.
    pub fn functions(&self) -> Vec<(DeviceId, PciBus, DevFn)> {
        self.read().nodes.iter().map(|node| (node.id, node.bus, node.devfn)).collect()
    }

    /// The ranges of memory that are decoded and reachable now, ascending.
    pub fn decoded(&self) -> Vec<BarRange> {
        self.read().routes.iter().map(|route| route.range).collect()
    }

    pub(super) fn function(&self, id: DeviceId) -> Option<SharedFunction> {
        self.read().nodes.iter().find(|node| node.id == id).map(|node| node.function.clone())
    }

    pub(super) fn find(&self, bus: u8, devfn: DevFn) -> Option<Found> {
        let tree = self.read();
        let is_root = tree.nodes.iter().any(|node| node.bus == PciBus::Root(bus));
        let mut current = if is_root { bus } else { 0 };
        let mut on = PciBus::Root(current);
        while current != bus {
            let (id, bridge) = tree
                .nodes
                .iter()
                .filter(|node| node.bus == on)
                .filter_map(|node| node.decode.bridge.as_ref().map(|bridge| (node.id, bridge)))
                .find(|(_, bridge)| {
                    bridge.secondary > current && bridge.secondary <= bus && bus <= bridge.subordinate
                })?;
            on = PciBus::Behind(id);
            current = bridge.secondary;
        }
        let node = tree.nodes.iter().find(|node| node.bus == on && node.devfn == devfn)?;
        Some(Found { id: node.id, function: node.function.clone() })
    }

    pub(super) fn route(&self, address: u64, length: usize) -> Option<Routed> {
        let tree = self.read();
        let index = tree.routes.partition_point(|route| route.range.base <= address).checked_sub(1)?;
        let route = tree.routes.get(index)?;
        let offset = address - route.range.base;
        let room = route.range.size.checked_sub(offset)?;
        (length as u64 <= room).then(|| Routed {
            function: route.function.clone(),
            bar: route.range.bar,
            offset,
        })
    }

    fn update(&self, id: DeviceId, decode: Decode) {
        let mut tree = self.write();
        if let Some(node) = tree.nodes.iter_mut().find(|node| node.id == id)
            && node.decode != decode
        {
            node.decode = decode;
            tree.rebuild();
        }
    }

    fn read(&self) -> RwLockReadGuard<'_, Tree> {
        self.tree.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Tree> {
        self.tree.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Tree {
    /// Collects the BARs that a memory cycle from the CPU reaches. Of BARs that overlap, by a guest's mistake, the
    /// one that starts highest answers where it lies.
    fn rebuild(&mut self) {
        let mut routes = Vec::new();
        for node in &self.nodes {
            for range in &node.decode.bars {
                if range
                    .base
                    .checked_add(range.size - 1)
                    .is_some_and(|last| self.forwarded(node, range.base, last))
                {
                    routes.push(Route { range: *range, function: node.function.clone() });
                }
            }
        }
        routes.sort_by_key(|route| route.range.base);
        self.routes = routes;
    }

    /// Whether every bridge above `node` forwards all of `[first, last]`.
    fn forwarded(&self, node: &Node, first: u64, last: u64) -> bool {
        let mut bus = node.bus;
        while let PciBus::Behind(id) = bus {
            let Some(port) = self.nodes.iter().find(|node| node.id == id) else { return false };
            let passes = |&(from, to): &(u64, u64)| from <= first && last <= to;
            if !port.decode.bridge.as_ref().is_some_and(|bridge| bridge.windows.iter().any(passes)) {
                return false;
            }
            bus = port.bus;
        }
        true
    }
}
