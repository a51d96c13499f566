//! Instruction forms with one operand.

mod integer;
mod stack;
mod system;
mod vector;
mod x87;

use crate::case::{Before, Class, Code, Quirk};
use crate::feature::Feature;
use kvm_bindings::kvm_regs;

/// An instruction form. Its operand is at RSI unless it sets the registers otherwise.
pub struct Form {
    /// The form: widths and registers of one form share the name.
    pub name: &'static str,
    /// Which one of these.
    pub note: &'static str,
    /// What it does with the operand.
    pub class: Class,
    /// Whether touching poison is a machine check, if the class does not say so.
    pub consumes: Option<bool>,
    /// The state that a machine check finds.
    pub state: Before,
    /// What may come of it on some processors.
    pub quirk: Option<Quirk>,
    /// The processor may do without touching the page.
    pub quiet: bool,
    /// Only at CPL 0.
    pub privileged: bool,
    /// Bytes of the operand.
    pub size: u64,
    /// Alignment that it must have.
    pub align: u64,
    /// What the processor must have.
    pub needs: &'static [Feature],
    /// Instructions before the one under test.
    pub before: Code,
    /// The instruction under test.
    pub code: Code,
    /// Registers that it wants otherwise; given the operand's linear address.
    pub regs: fn(&mut kvm_regs, u64),
    /// What the operand holds.
    pub operand: &'static [u8],
    /// What the clean page at RDI holds.
    pub scratch: &'static [u8],
}

/// A load of eight bytes.
const LOAD: Form = Form {
    name: "",
    note: "",
    class: Class::Load,
    consumes: None,
    state: Before::Instruction,
    quirk: None,
    quiet: false,
    privileged: false,
    size: 8,
    align: 1,
    needs: &[],
    before: |_| Ok(()),
    code: |_| Ok(()),
    regs: |_, _| {},
    operand: &[],
    scratch: &[],
};
/// A store of eight bytes.
const STORE: Form = Form { class: Class::Store, ..LOAD };
/// A read-modify-write of eight bytes.
const MODIFY: Form = Form { class: Class::ReadModifyWrite, ..LOAD };

/// All forms.
pub fn all() -> Vec<Form> {
    [integer::forms(), stack::forms(), vector::forms(), x87::forms(), system::forms()]
        .into_iter()
        .flatten()
        .collect()
}
