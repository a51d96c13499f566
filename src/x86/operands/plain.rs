//! Instructions that do nothing but store.

use iced_x86::{InstructionInfoFactory, OpAccess, RflagsBits};

use super::Operands;

impl Operands {
    /// Whether the instruction's only effect is to write memory, once: no register and no flag changes but
    /// RIP. Where the store itself has no effect, the instruction is done by moving RIP past it.
    pub fn only_stores(&self) -> bool {
        if self.repeat.is_some() || self.instruction.rflags_modified() != RflagsBits::NONE {
            return false;
        }
        let mut factory = InstructionInfoFactory::new();
        let info = factory.info(&self.instruction);
        let writes_register = info
            .used_registers()
            .iter()
            .any(|used| !matches!(used.access(), OpAccess::Read | OpAccess::CondRead | OpAccess::None));
        !writes_register && matches!(info.used_memory(), [memory] if memory.access() == OpAccess::Write)
    }
}

#[cfg(test)]
mod tests {
    use super::super::operands;
    use crate::x86::state::CpuState;
    use crate::x86::walk::PhysRead;

    struct Code(Vec<u8>);

    impl PhysRead for Code {
        fn read_u64(&self, gpa: u64) -> Option<u64> {
            let at = usize::try_from(gpa).ok()?;
            let mut bytes = [0; 8];
            for (byte, value) in bytes.iter_mut().zip(self.0.iter().skip(at)) {
                *byte = *value;
            }
            Some(u64::from_le_bytes(bytes))
        }
    }

    fn only_stores(code: &[u8]) -> bool {
        // Flat 32-bit protected mode without paging: the code is at physical 0.
        let mut state = CpuState { physical_bits: 36, ..Default::default() };
        state.sregs.cr0 = 1;
        state.sregs.cs.db = 1;
        operands(&state, &Code(code.to_vec())).unwrap().only_stores()
    }

    #[test]
    fn stores_are_told_from_everything_else() {
        assert!(only_stores(&[0x89, 0x03]), "mov [ebx], eax");
        assert!(only_stores(&[0xc7, 0x03, 1, 0, 0, 0]), "mov dword [ebx], 1");
        assert!(only_stores(&[0x0f, 0xc3, 0x03]), "movnti [ebx], eax");
        assert!(only_stores(&[0x66, 0x0f, 0xe7, 0x03]), "movntdq [ebx], xmm0");
        assert!(only_stores(&[0x0f, 0x11, 0x03]), "movups [ebx], xmm0");
        assert!(!only_stores(&[0x8b, 0x03]), "mov eax, [ebx]");
        assert!(!only_stores(&[0x01, 0x03]), "add [ebx], eax");
        assert!(!only_stores(&[0x87, 0x03]), "xchg [ebx], eax");
        assert!(!only_stores(&[0x50]), "push eax");
        assert!(!only_stores(&[0xaa]), "stosb");
        assert!(!only_stores(&[0xf3, 0xaa]), "rep stosb");
        assert!(!only_stores(&[0x90]), "nop");
    }
}
