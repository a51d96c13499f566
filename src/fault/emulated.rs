//! Guest memory that KVM's own emulator could not reach.
//!
//! Some instructions are carried out by KVM (string input and output, moves between memory and a device). Where the
//! emulator meets a guarded page it takes it for a device, and asks the monitor for the bytes: KVM_EXIT_MMIO with an
//! address inside a region. A read comes while RIP is still at the instruction, a write after it has moved on.

use vm_memory::VolatileMemory;

use super::deliver::Delivered;
use super::step::Step;
use super::touch::{Touch, direction};
use super::trap::{Progress, TrapError, Traps};
use crate::command::{Access, Direction};
use crate::kvm::{RunError, Vcpu, VcpuExitKind};
use crate::memory::Region;
use crate::x86::decide::{Consumed, LINE};
use crate::x86::mca::{ErrorClass, MachineError, McaState};

/// Exits that an instruction which is being given up may still end in.
const MOST_EXITS: usize = 64;

impl Traps {
    /// Whether an exit for an address without memory names memory after all.
    pub fn holds(&self, gpa: u64) -> bool {
        self.space.find(gpa).is_some()
    }

    /// Serves KVM_EXIT_MMIO at `gpa` inside a region. Returns as [`Traps::serve`] does.
    pub fn serve_emulated(
        &self,
        vcpu: &mut Vcpu,
        mca: &mut McaState,
        progress: &mut Progress,
        gpa: u64,
        write: bool,
    ) -> Result<Option<VcpuExitKind>, TrapError> {
        let _held = self.baton.take().map_err(TrapError::Stopped)?;
        let Some(region) = self.space.find(gpa) else { return Ok(None) };
        let length = vcpu.mmio_data().len() as u64;
        let poison = (!write).then(|| self.consumable_poison(gpa, length)).flatten();
        if let Some(line) = poison {
            let line = line & !(LINE - 1);
            let signals = mca.signals(&MachineError::line(ErrorClass::Load, line));
            let touch = Touch::of(vcpu, &self.space, self.physical_bits, &self.xsave)?;
            if signals {
                give_up(vcpu, progress.take_step(), &touch)?;
            }
            let first = gpa.max(line);
            let consumed = Consumed {
                line,
                linear: linear_of(&touch, first).unwrap_or(first),
                gpa: first,
                bytes: (gpa + length).min(line + LINE) - first,
            };
            match self.machine_check(vcpu, mca, &touch, consumed, Direction::Read)? {
                Delivered::Shutdown(_) => return Ok(Some(VcpuExitKind::Shutdown)),
                _ if signals => return Ok(None),
                // The guest wants to hear nothing of it: the emulator gets what the memory holds.
                _ => {}
            }
        }
        if region.absent() {
            self.report_emulated(vcpu, &region, gpa, write)?;
        }
        let data = vcpu.mmio_data();
        let at = region.alias().get_slice((gpa - region.gpa()) as usize, data.len());
        match at {
            _ if region.absent() => data.fill(0xff),
            Ok(memory) if !write => {
                memory.copy_to(data);
            }
            Ok(memory) if region.writable() => {
                memory.copy_from(data);
                region.wrote(gpa - region.gpa(), data.len() as u64);
            }
            // A store into read-only memory goes nowhere, and so does what lies beyond the end.
            _ => {}
        }
        Ok(None)
    }

    fn report_emulated(
        &self,
        vcpu: &mut Vcpu,
        region: &Region,
        gpa: u64,
        write: bool,
    ) -> Result<(), TrapError> {
        let bytes = vcpu.mmio_data().len() as u64;
        let touch = Touch::of(vcpu, &self.space, self.physical_bits, &self.xsave)?;
        let done = if write { Direction::Write } else { Direction::Read };
        let mut access = touch.describe(vcpu.id(), gpa, linear_of(&touch, gpa), bytes, done);
        if write && linear_of(&touch, gpa).is_none() {
            // RIP is past the instruction that stored.
            access = Access { instruction: None, instruction_bytes: None, ..access };
        }
        self.note_stale(region, access);
        Ok(())
    }
}

/// The linear address by which the instruction reaches `gpa` as data.
fn linear_of(touch: &Touch, gpa: u64) -> Option<u64> {
    let data =
        |kind| matches!(direction(kind), Some(Direction::Read | Direction::Write | Direction::ReadWrite));
    let range = touch.accesses.ranges.iter().find(|range| {
        data(range.kind) && (range.gpa..range.gpa.saturating_add(range.size.into())).contains(&gpa)
    })?;
    Some(range.linear + (gpa - range.gpa))
}

/// Takes back an instruction that KVM's emulator is in the middle of: the vCPU stands at it as after the last complete
/// iteration. What the emulator still asks for goes nowhere.
fn give_up(vcpu: &mut Vcpu, step: Option<Box<Step>>, touch: &Touch) -> Result<(), TrapError> {
    let regs = vcpu.regs()?;
    if touch.running().is_some_and(|operands| operands.repeat.is_some()) {
        // The iteration at hand is the last one. It must run: what was asked for would else be taken for the answer
        // to the next read of the emulator (mmio_read_completed, read_prepare in arch/x86/kvm/x86.c).
        vcpu.set_regs(&kvm_bindings::kvm_regs { rcx: 1, ..regs })?;
    }
    let mut asked = vcpu.mmio_data();
    for _ in 0..MOST_EXITS {
        asked.fill(0);
        match vcpu.finish().map_err(TrapError::Run)? {
            VcpuExitKind::Mmio { .. } => asked = vcpu.mmio_data(),
            VcpuExitKind::Io { .. } => asked = vcpu.io_data(),
            _ => break,
        }
    }
    vcpu.set_regs(&regs)?;
    if let Some(step) = step {
        step.give_up(vcpu).map_err(RunError::from)?;
    }
    Ok(())
}
