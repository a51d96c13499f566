//! What goes with the way in which the guest is told of a device.

use super::error::ConfigError;
use super::{Ars, Channel, Dimms, Family, Labels, Pmem, RangeKind, StateFlags, Via};

/// Refuses what does not go with the way in which the guest is told of a device.
pub(super) fn validate_way(option: &str, pmem: &Pmem) -> Result<(), ConfigError> {
    let refuse = |key: &str, problem: &str, remedy: &str| {
        Err(ConfigError::invalid(format_args!("{option}: {key}"), "", problem, remedy))
    };
    match (pmem.via, pmem.channel) {
        (Via::Nfit, Some(Channel::Pcie)) => refuse(
            "channel=pcie",
            "an NVDIMM is behind no PCI Express port",
            "give channel=container, channel=agent or via=virtio",
        ),
        (Via::Virtio, Some(Channel::Container | Channel::Agent)) => refuse(
            "channel",
            "a virtio-pmem device goes through its PCI Express port",
            "give channel=pcie, or leave it out",
        ),
        (Via::Virtio, _) if pmem.readonly => refuse(
            "readonly",
            "no driver of virtio-pmem knows of memory that it cannot write",
            "leave it out, or give via=nfit",
        ),
        (Via::Virtio, _) => {
            let of_dimms = [
                ("range", pmem.range != RangeKind::default()),
                ("bus", pmem.bus.is_some()),
                ("dimms", pmem.dimms != Dimms::default()),
                ("family", pmem.family != Family::default()),
                ("labels", pmem.labels != Labels::default()),
                ("flags", pmem.flags != StateFlags::default()),
                ("ars", pmem.ars != Ars::default()),
            ];
            match of_dimms.into_iter().find(|(_, given)| *given) {
                Some((key, _)) => refuse(
                    key,
                    "a virtio-pmem device is on no DIMM, and has no firmware",
                    "leave it out, or give via=nfit",
                ),
                None => Ok(()),
            }
        }
        (Via::Nfit, _) => Ok(()),
    }
}
