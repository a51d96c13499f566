//! What goes with the way in which the guest is told of a device.

use super::error::ConfigError;
use super::{Ars, Channel, Dimms, E820Type, Family, Labels, Pmem, RangeKind, StateFlags, Unflushed, Via};

/// Refuses what does not go with the way in which the guest is told of a device.
pub(super) fn validate_way(option: &str, pmem: &Pmem) -> Result<(), ConfigError> {
    let refuse = |key: &str, problem: &str, remedy: &str| {
        Err(ConfigError::invalid(format_args!("{option}: {key}"), "", problem, remedy))
    };
    if pmem.via != Via::E820 && pmem.e820 != E820Type::default() {
        return refuse("type", "only the E820 map has types", "leave it out, or give via=e820");
    }
    match (pmem.via, pmem.channel) {
        (Via::Nfit, Some(channel @ (Channel::Pcie | Channel::Bridge))) => refuse(
            &format!("channel={}", channel.name()),
            "an NVDIMM is no PCI Express device",
            "give channel=container, channel=agent or via=virtio",
        ),
        (Via::Virtio, Some(Channel::Container | Channel::Agent)) => refuse(
            "channel",
            "a virtio-pmem device goes through its PCI Express port or its host bridge",
            "give channel=pcie or channel=bridge, or leave it out",
        ),
        (Via::Virtio, _) if pmem.readonly => refuse(
            "readonly",
            "no driver of virtio-pmem knows of memory that it cannot write",
            "leave it out, or give via=nfit",
        ),
        (Via::E820, Some(channel)) if channel != Channel::None => refuse(
            "channel",
            "what the E820 map describes is there for good",
            "leave it out, or give via=nfit or via=virtio",
        ),
        (Via::E820, _) if pmem.readonly => refuse(
            "readonly",
            "the E820 map says nothing of memory that cannot be written",
            "leave it out, or give via=nfit",
        ),
        (Via::E820, _) if pmem.unflushed == Unflushed::Drop => refuse(
            "unflushed",
            "no guest can flush memory that the E820 map describes",
            "leave it out, or give via=nfit or via=virtio",
        ),
        (Via::Virtio | Via::E820, _) => {
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
                    "only an NVDIMM is on a DIMM, and has firmware",
                    "leave it out, or give via=nfit",
                ),
                None => Ok(()),
            }
        }
        (Via::Nfit, _) => Ok(()),
    }
}
