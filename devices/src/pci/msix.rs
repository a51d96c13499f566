//! MSI-X: the table of messages, the pending bits, and the capability that switches them
//! (PCI Express Base Specification 6.0, sections 6.1.4 and 7.7.2).

use std::sync::Arc;

use super::config::{ConfigError, ConfigSpace};
use crate::irq::MsiSink;

/// Bytes of one table entry.
pub const MSIX_ENTRY_SIZE: u64 = 16;
/// The vector number that means "no interrupt" (virtio 1.2, section 4.1.4.3, VIRTIO_MSI_NO_VECTOR).
pub const NO_VECTOR: u16 = 0xffff;

const ID: u8 = 0x11;
const CONTROL_ENABLE: u16 = 1 << 15;
const CONTROL_MASK_ALL: u16 = 1 << 14;
/// Vector control, bit 0: this vector is masked.
const ENTRY_MASKED: u8 = 1;
const ENTRY_CONTROL: usize = 12;
/// Bits a guest may write in an entry: the address is a multiple of 4, only the mask bit of the control exists.
const ENTRY_WRITABLE: [u8; 16] =
    [0xfc, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, ENTRY_MASKED, 0, 0, 0];
/// An entry after power on: no address, masked.
const FRESH_ENTRY: [u8; MSIX_ENTRY_SIZE as usize] = {
    let mut entry = [0; MSIX_ENTRY_SIZE as usize];
    entry[ENTRY_CONTROL] = ENTRY_MASKED;
    entry
};

/// The MSI-X state of one function.
pub struct Msix {
    table: Vec<[u8; MSIX_ENTRY_SIZE as usize]>,
    pending: Vec<bool>,
    capability: u16,
    enabled: bool,
    all_masked: bool,
    sink: Arc<dyn MsiSink>,
}

impl Msix {
    /// `vectors` (1 to 2048) masked vectors. The capability goes into `space`; the table is at `table` and the
    /// pending bits at `pending`, both offsets into `bar`.
    ///
    /// # Errors
    /// [`ConfigError::CapabilitySpace`].
    pub fn new(
        space: &mut ConfigSpace,
        vectors: u16,
        bar: u8,
        table: u32,
        pending: u32,
        sink: Arc<dyn MsiSink>,
    ) -> Result<Self, ConfigError> {
        let vectors = vectors.clamp(1, 2048);
        let mut body = [0; 10];
        body[..2].copy_from_slice(&(vectors - 1).to_le_bytes());
        body[2..6].copy_from_slice(&(table | u32::from(bar)).to_le_bytes());
        body[6..].copy_from_slice(&(pending | u32::from(bar)).to_le_bytes());
        let writable = (CONTROL_ENABLE | CONTROL_MASK_ALL).to_le_bytes();
        let capability = space.add_capability(ID, &body, &writable)?;
        Ok(Self {
            table: vec![FRESH_ENTRY; usize::from(vectors)],
            pending: vec![false; usize::from(vectors)],
            capability,
            enabled: false,
            all_masked: false,
            sink,
        })
    }

    /// Number of vectors.
    pub fn vectors(&self) -> u16 {
        self.table.len() as u16
    }

    /// Everything as after power on: off, every vector masked, nothing pending.
    pub fn reset(&mut self) {
        self.table.fill(FRESH_ENTRY);
        self.pending.fill(false);
        self.enabled = false;
        self.all_masked = false;
    }

    /// Takes over the control register after a write to configuration space; messages that this unmasks go out.
    pub fn config_written(&mut self, space: &ConfigSpace) {
        let control = space.u16(usize::from(self.capability) + 2);
        self.enabled = control & CONTROL_ENABLE != 0;
        self.all_masked = control & CONTROL_MASK_ALL != 0;
        for vector in 0..self.table.len() {
            self.deliver_pending(vector);
        }
    }

    /// Raises `vector`: sends its message, or remembers it while it is masked. Nothing happens while MSI-X is
    /// off, and for a vector that does not exist.
    pub fn signal(&mut self, vector: u16) {
        let vector = usize::from(vector);
        if !self.enabled || vector >= self.table.len() {
            return;
        }
        self.pending[vector] = true;
        self.deliver_pending(vector);
    }

    /// Reads the table. Bytes past its end read as zero.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = self.locate(offset, index).map_or(0, |(vector, at)| self.table[vector][at]);
        }
    }

    /// Writes the table; messages that this unmasks go out. Bytes past its end are dropped.
    pub fn write_table(&mut self, offset: u64, data: &[u8]) {
        let mut touched = None;
        for (index, value) in data.iter().enumerate() {
            if let Some((vector, at)) = self.locate(offset, index) {
                self.table[vector][at] = value & ENTRY_WRITABLE[at];
                if touched.is_some_and(|last| last != vector) {
                    self.deliver_pending(vector - 1);
                }
                touched = Some(vector);
            }
        }
        if let Some(vector) = touched {
            self.deliver_pending(vector);
        }
    }

    /// Reads the pending bit array; bits of vectors that do not exist read as zero.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            let first = offset.saturating_add(index as u64).saturating_mul(8);
            *byte = (0..8).fold(0, |bits, bit| {
                let vector = usize::try_from(first.saturating_add(bit)).unwrap_or(usize::MAX);
                bits | u8::from(self.pending.get(vector).copied().unwrap_or(false)) << bit
            });
        }
    }

    fn locate(&self, offset: u64, index: usize) -> Option<(usize, usize)> {
        let at = offset.checked_add(index as u64)?;
        let vector = usize::try_from(at / MSIX_ENTRY_SIZE).ok()?;
        (vector < self.table.len()).then_some((vector, (at % MSIX_ENTRY_SIZE) as usize))
    }

    fn deliver_pending(&mut self, vector: usize) {
        let entry = &self.table[vector];
        let masked = self.all_masked || entry[ENTRY_CONTROL] & ENTRY_MASKED != 0;
        if self.pending[vector] && self.enabled && !masked {
            self.pending[vector] = false;
            let [a0, a1, a2, a3, a4, a5, a6, a7, d0, d1, d2, d3, ..] = *entry;
            let address = u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]);
            self.sink.signal(address, u32::from_le_bytes([d0, d1, d2, d3]));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::irq::testing::RecordingSink;
    use crate::pci::Identity;

    const CONTROL: u16 = 0x42;

    fn msix(vectors: u16) -> (ConfigSpace, Msix, RecordingSink) {
        let identity =
            Identity { vendor: 1, device: 2, revision: 0, class: 0, subsystem_vendor: 0, subsystem: 0 };
        let mut space = ConfigSpace::new(identity);
        let sink = RecordingSink::default();
        let msix = Msix::new(&mut space, vectors, 0, 0x3000, 0x4000, Arc::new(sink.clone())).unwrap();
        (space, msix, sink)
    }

    fn control(space: &mut ConfigSpace, msix: &mut Msix, value: u16) {
        space.write(CONTROL, &value.to_le_bytes());
        msix.config_written(space);
    }

    fn program(msix: &mut Msix, vector: u64, address: u64, data: u32, mask: u32) {
        msix.write_table(vector * 16, &address.to_le_bytes());
        msix.write_table(vector * 16 + 8, &data.to_le_bytes());
        msix.write_table(vector * 16 + 12, &mask.to_le_bytes());
    }

    #[test]
    fn the_capability_says_where_the_table_is() {
        let (space, ..) = msix(5);
        assert_eq!(space.u16(0x40), 0x0011);
        assert_eq!(space.u16(usize::from(CONTROL)), 4);
        assert_eq!(space.u32(0x44), 0x3000);
        assert_eq!(space.u32(0x48), 0x4000);
    }

    #[test]
    fn an_unmasked_vector_goes_out() {
        let (mut space, mut msix, sink) = msix(2);
        program(&mut msix, 1, 0xfee0_1000, 0x41, 0);
        msix.signal(1);
        assert_eq!(sink.take(), [], "off");
        control(&mut space, &mut msix, 0x8000);
        msix.signal(1);
        msix.signal(2);
        msix.signal(NO_VECTOR);
        assert_eq!(sink.take(), [(0xfee0_1000, 0x41)]);
    }

    #[test]
    fn a_masked_vector_pends_and_goes_out_once() {
        let (mut space, mut msix, sink) = msix(70);
        control(&mut space, &mut msix, 0x8000);
        program(&mut msix, 65, 0xfee0_0000, 7, 1);
        msix.signal(65);
        msix.signal(65);
        let mut bits = [0; 8];
        msix.read_pending(8, &mut bits);
        assert_eq!(bits, [2, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(sink.take(), []);
        msix.write_table(65 * 16 + 12, &[0]);
        assert_eq!(sink.take(), [(0xfee0_0000, 7)]);
        msix.read_pending(8, &mut bits);
        assert_eq!(bits, [0; 8]);
    }

    #[test]
    fn the_function_mask_holds_all_vectors() {
        let (mut space, mut msix, sink) = msix(2);
        program(&mut msix, 0, 0xfee0_0000, 1, 0);
        program(&mut msix, 1, 0xfee0_0000, 2, 0);
        control(&mut space, &mut msix, 0xc000);
        msix.signal(0);
        msix.signal(1);
        assert_eq!(sink.take(), []);
        control(&mut space, &mut msix, 0x8000);
        assert_eq!(sink.take(), [(0xfee0_0000, 1), (0xfee0_0000, 2)]);
    }

    #[test]
    fn one_write_may_unmask_two_vectors() {
        let (mut space, mut msix, sink) = msix(2);
        control(&mut space, &mut msix, 0x8000);
        program(&mut msix, 0, 0xfee0_0000, 1, 1);
        msix.signal(0);
        msix.write_table(12, &[0; 8]);
        assert_eq!(sink.take(), [(0xfee0_0000, 1)]);
    }

    proptest! {
        #[test]
        fn any_access_is_answered(
            vectors in 0u16..80,
            accesses in prop::collection::vec(
                (prop_oneof![0u64..0x800, any::<u64>()], prop::collection::vec(any::<u8>(), 0..=16), 0u8..4, any::<u16>()),
                0..100,
            ),
        ) {
            let (mut space, mut msix, sink) = msix(vectors);
            for (offset, mut data, kind, value) in accesses {
                match kind {
                    0 => msix.write_table(offset, &data),
                    1 => msix.read_table(offset, &mut data),
                    2 => msix.read_pending(offset, &mut data),
                    _ => control(&mut space, &mut msix, value),
                }
                msix.signal(value % 100);
            }
            for (address, _) in sink.take() {
                prop_assert_eq!(address & 3, 0);
            }
        }
    }
}
