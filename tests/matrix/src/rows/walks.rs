//! Page tables in the guarded page: each level, for operands and for code, with accessed and dirty bits set and clear.

use super::Planned;
use crate::case::{Case, Class, Code, Expect, assemble, registers};
use crate::feature::{Feature, Features};
use crate::image::{Mode, PageSize};
use crate::layout::*;
use crate::machine::Guest;
use anyhow::Result;
use iced_x86::code_asm::*;

/// What is done to the operand.
const ACCESSES: &[(&str, Code)] = &[
    ("load", |a| a.mov(rax, qword_ptr(rsi))),
    ("store", |a| a.mov(qword_ptr(rsi), rax)),
    ("read-modify-write", |a| a.lock().add(qword_ptr(rsi), rax)),
    ("vector load", |a| a.movdqu(xmm3, xmmword_ptr(rsi))),
    ("x87 store", |a| a.fstp(tbyte_ptr(rsi))),
    ("string", |a| a.movsb()),
];

/// An entry on the way to an operand or to the code.
struct Entry {
    name: &'static str,
    gpa: u64,
    mode: Mode,
    /// The entry maps a page: it has a dirty bit.
    leaf: bool,
}

fn operand_entries() -> Vec<Entry> {
    let entry = |name, gpa, mode, leaf| Entry { name, gpa, mode, leaf };
    let [pointers, directory, pages] = DATA_TABLES;
    let (large, huge) =
        (Mode { page: PageSize::Large, ..Mode::USER }, Mode { page: PageSize::Huge, ..Mode::USER });
    vec![
        entry("PML5E", PML5, Mode { five_levels: true, ..Mode::USER }, false),
        entry("PML4E", PML4 + 8 * 16, Mode::USER, false),
        entry("PDPTE", pointers + 8 * 16, Mode::USER, false),
        entry("PDE", directory + 8 * (DATA >> 21), Mode::USER, false),
        entry("PTE", pages + 8 * (DATA >> 12 & 511), Mode::USER, true),
        entry("PTE, CPL 0", pages + 8 * (DATA >> 12 & 511), Mode::KERNEL, true),
        entry(
            "PTE, user page under SMAP",
            pages + 8 * (DATA >> 12 & 511),
            Mode { smap: true, ..Mode::KERNEL },
            true,
        ),
        entry("PTE, PCID", pages + 8 * (DATA >> 12 & 511), Mode { pcid: true, ..Mode::USER }, true),
        entry("PDE of a 2 MiB page", directory + 8 * (DATA >> 21), large, true),
        entry("PDPTE of a 1 GiB page", pointers + 8 * 16, huge, true),
    ]
}

fn code_entries() -> Vec<Entry> {
    let entry = |name, gpa, mode, leaf| Entry { name, gpa, mode, leaf };
    let [pointers, directory, pages] = CODE_TABLES;
    vec![
        entry("PML4E", PML4 + 8 * 8, Mode::USER, false),
        entry("PDPTE", pointers, Mode::USER, false),
        entry("PDE", directory, Mode::KERNEL, false),
        entry("PTE", pages + CODE / 512, Mode::USER, true),
    ]
}

impl Entry {
    fn needs(&self) -> &'static [Feature] {
        match self.mode {
            Mode { five_levels: true, .. } => &[Feature::FiveLevels],
            Mode { page: PageSize::Huge, .. } => &[Feature::HugePages],
            Mode { smap: true, .. } => &[Feature::Smap],
            Mode { pcid: true, .. } => &[Feature::Pcid],
            _ => &[],
        }
    }

    /// A line of the same table that no address leads to.
    fn elsewhere(&self) -> u64 {
        (self.gpa & !0xfff) + 0xfc0
    }

    /// The entry with its accessed bit clear, and its dirty bit.
    fn unmarked(&self, guest: &mut Guest, machine_entry: u64) {
        const MARKED: u64 = 0x60;
        guest.word(self.gpa, machine_entry & !MARKED);
    }

    /// What stands in the entry of every guest: the next table, or the page.
    fn value(&self) -> u64 {
        let [pointers, directory, pages] = if self.gpa == PML4 + 8 * 8 { CODE_TABLES } else { DATA_TABLES };
        let user = if self.mode.user || self.mode.smap { 4 } else { 0 };
        match self.name {
            "PML5E" => PML4 | 7,
            "PML4E" => pointers | 7,
            "PDPTE" => directory | 7,
            "PDE" => pages | 7,
            "PDE of a 2 MiB page" => (DATA & !0x1f_ffff) | 0x83 | user,
            "PDPTE of a 1 GiB page" => 0x83 | user,
            _ => DATA | 3 | user,
        }
    }
}

/// All of them.
pub fn rows(features: &Features) -> Result<Vec<Planned>> {
    let mut rows = Vec::new();
    let run = |case| Planned::Run(Box::new(case));
    for entry in operand_entries() {
        if let Some(why) = features.missing(entry.needs()) {
            rows.push(Planned::NotRun { form: format!("walk of a {}", entry.name), class: Class::Walk, why });
            continue;
        }
        for (access, code) in ACCESSES {
            for marked in [true, false] {
                let mut guest = Guest::new(entry.mode, registers(entry.mode));
                if !marked {
                    entry.unmarked(&mut guest, entry.value());
                }
                let bits = match (marked, entry.leaf) {
                    (true, _) => "",
                    (false, true) => ", accessed and dirty bit clear",
                    (false, false) => ", accessed bit clear",
                };
                let case = Case::new(
                    &format!("walk of a {}", entry.name),
                    Class::Walk,
                    &format!("{access}{bits}"),
                    guest,
                    assemble(code, CODE_VA)?,
                );
                // With five levels everything goes through one line of the top table: the handler of machine checks
                // cannot be reached.
                let case_hit = case.clone();
                rows.push(run(if entry.mode.five_levels {
                    case_hit.hit(entry.gpa, Expect::Shutdown)
                } else {
                    case_hit.consumed(entry.gpa)
                }));
                rows.push(run(case.miss(entry.elsewhere())));
            }
        }
    }
    for entry in code_entries() {
        let guest = Guest::new(entry.mode, registers(entry.mode));
        let code = assemble(|a| a.add(rax, rbx), CODE_VA)?;
        let case = Case::new(&format!("walk of a {}", entry.name), Class::Walk, "fetch", guest, code);
        rows.push(run(case.clone().consumed(entry.gpa)));
        rows.push(run(case.miss(entry.elsewhere())));
    }
    Ok(rows)
}
