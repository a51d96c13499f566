//! Who still maps a memory device.

use std::ops::Range;
use std::time::Instant;

use super::memory::MemoryDevices;
use crate::command::{CENSUS_LISTED, Census, CensusHalf, CensusMapping, Error, ErrorCode};
use crate::kvm::{Held, KvmError, VcpuView};
use crate::memory::GuestTables;
use crate::x86::census::{self, Half};
use crate::x86::walk::Paging;

impl MemoryDevices {
    /// Walks all page tables for mappings of a device, present or departed.
    pub fn census(&self, held: &Held, vcpus: &[VcpuView], id: &str) -> Result<Census, Error> {
        let region = &self.find(id)?.region;
        self.census_of(held, vcpus, id, region.range(), region.departed())
            .map_err(|error| Error::new(ErrorCode::Internal, super::chain(&error), "report this as a bug"))
    }

    /// Walks all page tables for mappings of `range`, which is that of the device `id`, or was until it departed.
    pub(super) fn census_of(
        &self,
        held: &Held,
        vcpus: &[VcpuView],
        id: &str,
        range: Range<u64>,
        departed: bool,
    ) -> Result<Census, KvmError> {
        let start = Instant::now();
        let paging: Vec<Paging> = vcpus.iter().map(|vcpu| vcpu.paging(held)).collect::<Result<_, _>>()?;
        let found = census::census(&GuestTables::new(&self.space), &paging, range.clone());
        let microseconds = u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX);
        let mut census = Census {
            device: id.to_owned(),
            gpa: range.start.into(),
            size: range.end - range.start,
            departed,
            address_spaces: found.roots,
            scanned_pages: found.pages,
            tables: found.tables,
            microseconds,
            complete: found.complete,
            user: half(&found.user, range.start),
            kernel: half(&found.kernel, range.start),
            unseen: Census::UNSEEN.to_owned(),
        };
        census.shorten(CENSUS_LISTED);
        Ok(census)
    }
}

fn half(half: &Half, base: u64) -> CensusHalf {
    let mappings = half.mappings.iter().map(|mapping| CensusMapping {
        cr3: mapping.root.into(),
        va: mapping.va.into(),
        offset: (mapping.gpa - base).into(),
        bytes: mapping.bytes,
        page_size: mapping.page_size,
        writable: mapping.writable,
        processes: Vec::new(),
    });
    CensusHalf { entries: half.entries, bytes: half.bytes, mappings: mappings.collect(), more: half.more }
}
