//! The reset control register of a PC chipset, at port 0xCF9 (ICH/PCH data sheets, "RST_CNT").
//!
//! Linux on hardware-reduced ACPI without EFI resets by jumping to the firmware's reset vector in real mode
//! (`reboot_init`, `native_machine_emergency_restart` in arch/x86/kernel/reboot.c), and the code that the
//! monitor puts there writes this register. `reboot=pci` writes it directly.

use crate::bus::{BusDevice, Effect, Effects};

/// Port of the register.
pub const PORT: u16 = 0xCF9;
/// Resets the processor when it is set.
const RESET_CPU: u8 = 1 << 2;
/// Asks for a hard reset: kept and read back.
const SYSTEM_RESET: u8 = 1 << 1;
/// Asks for a power cycle: kept and read back.
const FULL_RESET: u8 = 1 << 3;

/// Real-mode code for the reset vector: asks for a hard reset and waits for it.
///
/// `mov dx, 0xcf9; mov al, 0x0e; out dx, al; hlt; jmp` back to the `hlt`.
pub const RESET_VECTOR_CODE: [u8; 9] = [0xba, 0xf9, 0x0c, 0xb0, 0x0e, 0xee, 0xf4, 0xeb, 0xfd];
/// Guest-physical address of the reset vector below 1 MiB (F000:FFF0).
pub const RESET_VECTOR: u64 = 0xF_FFF0;

/// The register.
#[derive(Debug, Default)]
pub struct ResetControl {
    value: u8,
}

impl BusDevice for ResetControl {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(self.value);
    }

    fn write(&mut self, _offset: u64, data: &[u8], effects: &mut Effects) {
        let [value] = data else { return };
        self.value = value & (SYSTEM_RESET | FULL_RESET);
        if value & RESET_CPU != 0 {
            effects.push(Effect::Reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_reset_bit_resets() {
        let mut register = ResetControl::default();
        let mut write = |value: u8| {
            let mut effects = Effects::new();
            register.write(0, &[value], &mut effects);
            effects.as_slice().to_vec()
        };
        assert_eq!(write(0x02), []);
        assert_eq!(write(0x06), [Effect::Reset]);
        assert_eq!(write(0x0e), [Effect::Reset]);
        let mut value = [0];
        register.read(0, &mut value);
        assert_eq!(value, [0x0a]);
    }
}
