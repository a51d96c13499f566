//! The PCI Express capability (PCI Express Base Specification 6.0, section 7.5.3).
//!
//! A function behind a root port needs it to be taken for an endpoint with 4096 bytes of configuration space. A
//! function on the root bus works without, and Linux then reads some 20 registers less at boot.

use super::config::{ConfigError, ConfigSpace};

/// Capability id.
const ID: u8 = 0x10;
/// Capability version 2, the current layout.
const VERSION: u16 = 2;
/// Length after id and link: through Slot Status 2.
const BODY: usize = 0x3c - 2;

/// Where in the hierarchy an endpoint says it sits (section 7.5.3.2, Device/Port Type).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortType {
    /// Behind a root port or switch.
    Endpoint,
    /// On the root bus, without a link.
    RootComplexIntegrated,
}

/// Adds the capability for an endpoint of type `port` to `space`.
///
/// # Errors
/// [`ConfigError::CapabilitySpace`].
pub fn add_express_capability(space: &mut ConfigSpace, port: PortType) -> Result<u16, ConfigError> {
    let mut body = [0u8; BODY];
    let mut writable = [0u8; BODY];
    let mut put =
        |offset: usize, value: u32| body[offset - 2..offset + 2].copy_from_slice(&value.to_le_bytes());
    // Device Capabilities: role-based error reporting (bit 15), payload 128 bytes.
    put(0x04, 1 << 15);
    if port == PortType::Endpoint {
        // Link Capabilities and Status: 2.5 GT/s, one lane. Without a width Linux reports a broken link.
        put(0x0c, 0x11);
        put(0x10, 0x11 << 16);
    }
    let kind: u16 = match port {
        PortType::Endpoint => 0,
        PortType::RootComplexIntegrated => 9,
    };
    body[..2].copy_from_slice(&(VERSION | kind << 4).to_le_bytes());
    // Device Control: error reporting enables, relaxed ordering, payload and read request sizes.
    writable[0x08 - 2..0x0a - 2].copy_from_slice(&0x78ffu16.to_le_bytes());
    space.add_capability(ID, &body, &writable)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::Identity;

    #[test]
    fn the_port_type_is_in_the_flags() {
        for (port, flags) in [(PortType::Endpoint, 0x0002), (PortType::RootComplexIntegrated, 0x0092)] {
            let mut space = ConfigSpace::new(Identity {
                vendor: 1,
                device: 2,
                revision: 0,
                class: 0,
                subsystem_vendor: 0,
                subsystem: 0,
            });
            let at = usize::from(add_express_capability(&mut space, port).unwrap());
            assert_eq!(space.u16(at + 2), flags);
            assert_eq!(space.u32(at + 4), 0x8000);
            space.write(at as u16 + 8, &[0xff; 4]);
            assert_eq!(space.u32(at + 8), 0x78ff);
        }
    }
}
