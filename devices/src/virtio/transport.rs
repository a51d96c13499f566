//! The virtio-pci transport (virtio 1.2, section 4.1): one BAR with all register blocks, one page each, and
//! MSI-X.

use std::sync::Arc;

use thiserror::Error;

use super::common::{self, Common, Outcome};
use super::doorbell::Doorbells;
use super::queue::{QueueError, Queues, VirtQueue};
use super::{QueueHandler, VirtioDevice};
use crate::bus::{DeviceId, Effect, Effects};
use crate::dma::Dma;
use crate::irq::MsiSink;
use crate::pci::{
    BarKind, ConfigError, ConfigSpace, Decode, Identity, MSIX_ENTRY_SIZE, Msix, PciFunction, PortType,
    add_express_capability,
};

/// Vendor id of virtio devices.
const VENDOR: u16 = 0x1af4;
/// Device ids start here (section 4.1.2).
const DEVICE_BASE: u16 = 0x1040;
const SUBSYSTEM: u16 = 0x1100;

const BAR: u8 = 0;
const BAR_SIZE: u64 = 0x8000;
const PAGE: u64 = 0x1000;
const COMMON_PAGE: u64 = 0;
const ISR_PAGE: u64 = 1;
const DEVICE_PAGE: u64 = 2;
const TABLE_PAGE: u64 = 3;
const PENDING_PAGE: u64 = 4;
const NOTIFY_PAGE: u64 = 5;

/// Distance in bytes between the notification addresses of two queues: each has one of its own, so that an
/// ioeventfd can be attached to it ([`Doorbells`]).
pub const NOTIFY_MULTIPLIER: u32 = 4;
/// As many as have a notification address in the page, and one vector each beside the configuration's.
const MAX_QUEUES: usize = (PAGE / MSIX_ENTRY_SIZE) as usize - 1;

const CAP_VENDOR: u8 = 0x09;
const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;
const CFG_PCI: u8 = 5;

const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// Why a virtio function cannot be built. Always an error of the device model.
#[derive(Debug, Error)]
pub enum TransportError {
    /// Its configuration space does not fit.
    #[error("Virtio function of type {kind} does not fit: see the cause")]
    Config {
        /// Virtio device id.
        kind: u16,
        /// What did not fit.
        #[source]
        source: ConfigError,
    },
    /// A queue's size is not a power of two up to 32768.
    #[error("Queue {queue} of a virtio device of type {kind} cannot have {size} entries: use a power of two")]
    QueueSize {
        /// Virtio device id.
        kind: u16,
        /// Index of the queue.
        queue: usize,
        /// The size asked for.
        size: u16,
    },
    /// More queues than have a notification address and a vector.
    #[error("Virtio device of type {kind} cannot have {queues} queues: use at most {MAX_QUEUES}")]
    Queues {
        /// Virtio device id.
        kind: u16,
        /// The number asked for.
        queues: usize,
    },
}

/// What a virtio function is connected to.
pub struct Wiring {
    /// The name under which its effects appear.
    pub id: DeviceId,
    /// Guest memory.
    pub dma: Dma,
    /// Where its interrupts go.
    pub msi: Arc<dyn MsiSink>,
    /// The PCI Express endpoint it says it is; none for a plain function on the root bus.
    pub express: Option<PortType>,
}

/// A virtio device as a PCI function.
pub struct VirtioPci<D> {
    device: D,
    id: DeviceId,
    dma: Dma,
    config: ConfigSpace,
    /// Configuration space as after power on.
    fresh: ConfigSpace,
    msix: Msix,
    common: Common,
    isr: u8,
    config_access: u16,
    reported: bool,
    doorbells: Option<Box<dyn Doorbells>>,
    /// Where the first of them hangs.
    hung: Option<u64>,
}

impl<D: VirtioDevice> VirtioPci<D> {
    /// The function of `device`, connected by `wiring`.
    ///
    /// # Errors
    /// [`TransportError`].
    pub fn new(device: D, wiring: Wiring) -> Result<Self, TransportError> {
        let kind = device.device_type();
        let sizes = device.queue_sizes();
        if sizes.len() > MAX_QUEUES {
            return Err(TransportError::Queues { kind, queues: sizes.len() });
        }
        let mut queues = Vec::with_capacity(sizes.len());
        for (queue, &size) in sizes.iter().enumerate() {
            queues.push(VirtQueue::new(size).map_err(|_| TransportError::QueueSize { kind, queue, size })?);
        }
        let parts =
            Self::parts(&device, &wiring).map_err(|source| TransportError::Config { kind, source })?;
        let (config, msix, config_access) = parts;
        let common = Common::new(queues, device.features(), msix.vectors());
        Ok(Self {
            device,
            id: wiring.id,
            dma: wiring.dma,
            fresh: config.clone(),
            config,
            msix,
            common,
            isr: 0,
            config_access,
            reported: false,
            doorbells: None,
            hung: None,
        })
    }

    fn parts(device: &D, wiring: &Wiring) -> Result<(ConfigSpace, Msix, u16), ConfigError> {
        let queues = device.queue_sizes().len();
        let mut config = ConfigSpace::new(Identity {
            vendor: VENDOR,
            device: DEVICE_BASE + device.device_type(),
            revision: 1,
            class: device.class(),
            subsystem_vendor: VENDOR,
            subsystem: SUBSYSTEM,
        });
        config.add_bar(BAR, BAR_SIZE, BarKind::Prefetchable64)?;
        let notify = NOTIFY_MULTIPLIER * queues as u32;
        config.add_capability(CAP_VENDOR, &capability::<14>(CFG_COMMON, COMMON_PAGE, common::LENGTH), &[])?;
        config.add_capability(CAP_VENDOR, &capability::<14>(CFG_ISR, ISR_PAGE, 1), &[])?;
        config.add_capability(CAP_VENDOR, &capability::<14>(CFG_DEVICE, DEVICE_PAGE, PAGE as u32), &[])?;
        let mut body = capability::<18>(CFG_NOTIFY, NOTIFY_PAGE, notify);
        body[14..].copy_from_slice(&NOTIFY_MULTIPLIER.to_le_bytes());
        config.add_capability(CAP_VENDOR, &body, &[])?;
        // The window into the BAR through configuration space (section 4.1.4.9): bar, offset, length and data.
        let mut writable = [0xff; 18];
        (writable[0], writable[1], writable[3], writable[4], writable[5]) = (0, 0, 0, 0, 0);
        let access = config.add_capability(CAP_VENDOR, &capability::<18>(CFG_PCI, 0, 0), &writable)?;
        let table = (TABLE_PAGE * PAGE) as u32;
        let pending = (PENDING_PAGE * PAGE) as u32;
        let msix = Msix::new(&mut config, queues as u16 + 1, BAR, table, pending, wiring.msi.clone())?;
        if let Some(port) = wiring.express {
            add_express_capability(&mut config, port)?;
        }
        Ok((config, msix, access))
    }

    /// The device behind the function.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// The device behind the function. Call [`VirtioPci::service`] after changing its host side.
    pub fn device_mut(&mut self) -> &mut D {
        &mut self.device
    }

    /// The device's host side changed: moves what can be moved.
    pub fn service(&mut self, effects: &mut Effects) {
        self.work(effects, |device, queues| device.host_ready(queues));
    }

    /// The device's configuration changed: tells the driver.
    pub fn config_changed(&mut self) {
        self.common.config_changed();
        if self.common.running() {
            self.interrupt_config();
        }
    }

    /// The guest-physical address at which the driver notifies `queue`, for an ioeventfd of two bytes; none if
    /// there is no such queue or the function does not decode memory now.
    pub fn notify_address(&self, queue: u16) -> Option<u64> {
        let exists = usize::from(queue) < self.common.queues.len();
        let bar = *self.config.decode().bars.first().filter(|_| exists)?;
        bar.base.checked_add(NOTIFY_PAGE * PAGE + u64::from(queue) * u64::from(NOTIFY_MULTIPLIER))
    }

    /// From now on `doorbells` hear the driver's notifications, wherever and for as long as it can notify; none: the
    /// function itself does.
    pub fn set_doorbells(&mut self, doorbells: Option<Box<dyn Doorbells>>) {
        self.doorbells = doorbells;
        self.hung = None;
        self.hang_doorbells();
    }

    /// Hangs the doorbells where a notification would be heard now: while the device runs, and the function decodes
    /// memory. Whether the bridges above forward it is not asked: a queue is then looked into that nobody could notify,
    /// which a device may do at any time.
    fn hang_doorbells(&mut self) {
        if self.doorbells.is_none() {
            return;
        }
        let first = if self.common.running() { self.notify_address(0) } else { None };
        if first == self.hung {
            return;
        }
        let queues = 0..self.common.queues.len() as u16;
        let addresses: Vec<u64> = match first {
            Some(_) => queues.filter_map(|queue| self.notify_address(queue)).collect(),
            None => Vec::new(),
        };
        self.hung = first;
        if let Some(doorbells) = &mut self.doorbells {
            doorbells.hang(&addresses);
        }
    }

    /// Lets the device work on its queues and sends the interrupts that this leads to.
    fn work(
        &mut self,
        effects: &mut Effects,
        job: impl FnOnce(&mut D, &mut Queues<'_>) -> Result<(), QueueError>,
    ) {
        if !self.common.running() || !self.config.bus_master() {
            return;
        }
        let view = self.dma.view();
        let mut queues = Queues::new(&mut self.common.queues, view.clone());
        let result = job(&mut self.device, &mut queues);
        for queue in queues.take_again() {
            effects.push(Effect::QueueNotify { device: self.id, queue });
        }
        let mut broken = result.err();
        for (index, queue) in self.common.queues.iter_mut().enumerate() {
            match queue.take_interrupt(&view) {
                Ok(true) => {
                    self.isr |= ISR_QUEUE;
                    self.msix.signal(queue.vector);
                }
                Ok(false) => {}
                Err(source) => {
                    broken.get_or_insert(QueueError::Ring { queue: index as u16, source });
                }
            }
        }
        if let Some(error) = broken {
            // A guest can do this in a loop: only the first time is news.
            if std::mem::replace(&mut self.reported, true) {
                tracing::debug!(device = self.id.0, %error, "virtio device needs a reset again");
            } else {
                tracing::warn!(device = self.id.0, %error, "virtio device needs a reset");
            }
            self.needs_reset();
        }
    }

    fn needs_reset(&mut self) {
        if self.common.needs_reset() {
            self.interrupt_config();
        }
        self.hang_doorbells();
    }

    fn interrupt_config(&mut self) {
        self.isr |= ISR_CONFIG;
        if self.config.bus_master() {
            self.msix.signal(self.common.config_vector);
        }
    }

    fn write_common(&mut self, offset: u64, data: &[u8], effects: &mut Effects) {
        let dma = &self.dma;
        match self.common.write(offset, data, || dma.view()) {
            Outcome::Done => {}
            Outcome::Reset => self.reset_device(),
            Outcome::Activate => {
                self.device.activate(self.common.features);
                self.notify_all(effects);
            }
            Outcome::Broken => self.needs_reset(),
        }
        self.hang_doorbells();
    }

    /// Back to the state before any driver.
    fn reset_device(&mut self) {
        self.common.reset();
        self.device.reset();
        self.isr = 0;
    }

    /// Looks into every queue: a driver may have filled them before the device could run, without notifying
    /// again.
    fn notify_all(&self, effects: &mut Effects) {
        for (index, queue) in self.common.queues.iter().enumerate() {
            if queue.enabled() {
                effects.push(Effect::QueueNotify { device: self.id, queue: index as u16 });
            }
        }
    }

    fn notify(&self, offset: u64, effects: &mut Effects) {
        let stride = u64::from(NOTIFY_MULTIPLIER);
        let Ok(queue) = u16::try_from(offset / stride) else { return };
        if offset.is_multiple_of(stride)
            && usize::from(queue) < self.common.queues.len()
            && self.common.running()
        {
            effects.push(Effect::QueueNotify { device: self.id, queue });
        }
    }

    /// The access that the window in configuration space stands for now: offset and length in the BAR.
    fn window(&self) -> Option<(u64, usize)> {
        let at = usize::from(self.config_access);
        let mut bar = [0];
        self.config.read(self.config_access + 4, &mut bar);
        let offset = u64::from(self.config.u32(at + 8));
        let length = self.config.u32(at + 12);
        let fits = bar[0] == BAR && offset + u64::from(length) <= BAR_SIZE;
        (fits && matches!(length, 1 | 2 | 4) && offset.is_multiple_of(u64::from(length)))
            .then_some((offset, length as usize))
    }

    /// Whether a configuration access touches the window's data.
    fn touches_window(&self, offset: u16, length: usize) -> bool {
        let data = usize::from(self.config_access) + 16;
        usize::from(offset) < data + 4 && data < usize::from(offset) + length
    }
}

/// Body of a virtio capability (section 4.1.4, struct virtio_pci_cap) after id and link.
fn capability<const LENGTH: usize>(kind: u8, page: u64, length: u32) -> [u8; LENGTH] {
    let mut body = [0; LENGTH];
    body[0] = LENGTH as u8 + 2;
    body[1] = kind;
    body[2] = BAR;
    body[6..10].copy_from_slice(&((page * PAGE) as u32).to_le_bytes());
    body[10..14].copy_from_slice(&length.to_le_bytes());
    body
}

impl<D: VirtioDevice> PciFunction for VirtioPci<D> {
    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        if self.touches_window(offset, data.len())
            && let Some((at, length)) = self.window()
        {
            let mut value = [0; 4];
            self.bar_read(BAR, at, &mut value[..length]);
            self.config.set(usize::from(self.config_access) + 16, &value);
        }
        self.config.read(offset, data);
    }

    fn config_write(&mut self, offset: u16, data: &[u8], effects: &mut Effects) {
        let mastered = self.config.bus_master();
        self.config.write(offset, data);
        if self.touches_window(offset, data.len())
            && let Some((at, length)) = self.window()
        {
            let value = self.config.u32(usize::from(self.config_access) + 16).to_le_bytes();
            self.bar_write(BAR, at, &value[..length], effects);
        }
        self.msix.config_written(&self.config);
        self.hang_doorbells();
        if !mastered && self.config.bus_master() && self.common.running() {
            self.notify_all(effects);
        }
    }

    fn decode(&self) -> Decode {
        self.config.decode()
    }

    fn bar_read(&mut self, _bar: u8, offset: u64, data: &mut [u8]) {
        let at = offset % PAGE;
        match offset / PAGE {
            COMMON_PAGE => self.common.read(at, data),
            ISR_PAGE => {
                data.fill(0);
                if let (0, Some(byte)) = (at, data.first_mut()) {
                    *byte = std::mem::take(&mut self.isr);
                }
            }
            DEVICE_PAGE => self.device.read_config(at, data),
            TABLE_PAGE => self.msix.read_table(at, data),
            PENDING_PAGE => self.msix.read_pending(at, data),
            _ => data.fill(0),
        }
    }

    fn bar_write(&mut self, _bar: u8, offset: u64, data: &[u8], effects: &mut Effects) {
        let at = offset % PAGE;
        match offset / PAGE {
            COMMON_PAGE => self.write_common(at, data, effects),
            DEVICE_PAGE => self.device.write_config(at, data),
            TABLE_PAGE => self.msix.write_table(at, data),
            NOTIFY_PAGE => self.notify(at, effects),
            _ => {}
        }
    }

    fn reset(&mut self) {
        self.reset_device();
        self.config = self.fresh.clone();
        self.msix.reset();
        self.hang_doorbells();
    }
}

impl<D: VirtioDevice> QueueHandler for VirtioPci<D> {
    fn process_queue(&mut self, queue: u16, effects: &mut Effects) {
        self.work(effects, |device, queues| device.process_queue(queue, queues));
    }
}

#[cfg(test)]
#[path = "transport_test.rs"]
mod tests;
