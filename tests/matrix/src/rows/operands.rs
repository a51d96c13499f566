//! Instructions with an operand in the guarded page: each of them within a line, across two lines and across two
//! pages, with the line of the operand poisoned and with another one.

use super::Planned;
use super::forms::{self, Form};
use crate::case::{Before, Case, Class, Expect, Line, assemble, registers};
use crate::feature::{Feature, Features};
use crate::image::{Mode, PageSize};
use crate::layout::*;
use crate::machine::Guest;
use anyhow::{Context, Result};

const LINE: u64 = 64;
const PAGE: u64 = 0x1000;

/// Where the operand is put.
struct Place {
    name: &'static str,
    /// Offset in the data region.
    offset: u64,
    /// Offset of the byte of the operand whose line is poisoned for a hit.
    hit: u64,
    mode: Mode,
}

impl Form {
    fn places(&self, features: &Features) -> Vec<Place> {
        let mut places = Vec::new();
        let mut add = |name, offset: u64, hit: u64, mode: Mode| {
            if !(self.privileged && mode.cpl == 3) {
                places.push(Place { name, offset, hit, mode });
            }
        };
        // Neither at the start of the page nor of anything larger.
        let inside = (PAGE + 4 * LINE + if self.size < LINE { 0x10 } else { 0 }).next_multiple_of(self.align);
        let last = inside + self.size - 1;
        let smap = Mode { smap: true, ..Mode::KERNEL };
        if self.size <= LINE {
            add("within a line, CPL 0", inside, inside, Mode::KERNEL);
            add("within a line, CPL 3", inside, inside, Mode::USER);
            if features.has(Feature::Smap) {
                add("within a line, user page under SMAP", inside, inside, smap);
            }
            // A page fault of a whole 2 MiB page is another one than that of the operand alone.
            if self.state != Before::PageFault {
                add(
                    "within a line, 2 MiB page",
                    inside,
                    inside,
                    Mode { page: PageSize::Large, ..Mode::USER },
                );
            }
        } else {
            add("first line, CPL 0", inside, inside, Mode::KERNEL);
            add("last line, CPL 3", inside, last, Mode::USER);
        }
        let half = (self.size / 2).next_multiple_of(self.align);
        if half < self.size {
            if self.size <= LINE {
                let across = PAGE + 8 * LINE - half;
                add("across lines, second, CPL 3", across, across + self.size - 1, Mode::USER);
            }
            let over = 2 * PAGE - half;
            add("across pages, first, CPL 0", over, over, Mode::KERNEL);
            add("across pages, second, CPL 3", over, over + self.size - 1, Mode::USER);
        }
        places
    }

    fn case(&self, place: &Place, line: Line) -> Result<Case> {
        let mut regs = registers(place.mode);
        regs.rsi = DATA_VA + place.offset;
        (self.regs)(&mut regs, DATA_VA + place.offset);
        let mut guest = Guest::new(place.mode, regs);
        guest.write(DATA + place.offset, self.operand);
        guest.write(DATA + 0x4000, self.scratch);
        let hit = place.hit & !(LINE - 1);
        let poison = match line {
            Line::Hit => hit,
            // The first line of the page, or its last one.
            Line::Miss if hit % PAGE < LINE * 8 => (hit & !(PAGE - 1)) + PAGE - LINE,
            Line::Miss => hit & !(PAGE - 1),
        };
        let consumes = self.consumes.unwrap_or(matches!(self.class, Class::Load | Class::ReadModifyWrite));
        let before = assemble(self.before, CODE_VA)?;
        let tested = assemble(self.code, CODE_VA + before.len() as u64).context(self.name)?;
        Ok(Case {
            form: self.name.to_owned(),
            class: self.class,
            variant: format!("{}{}{}", self.note, if self.note.is_empty() { "" } else { ", " }, place.name),
            line,
            before,
            tested,
            at: CODE_VA,
            guest,
            poison: vec![DATA + poison],
            quiet: self.quiet,
            quirk: self.quirk,
            sound: None,
            expect: if consumes && line == Line::Hit {
                Expect::MachineCheck { before: self.state.clone() }
            } else {
                Expect::Same
            },
        })
    }
}

/// All of them.
pub fn rows(features: &Features) -> Result<Vec<Planned>> {
    let mut rows = Vec::new();
    for form in forms::all() {
        if let Some(why) = features.missing(form.needs) {
            rows.push(Planned::NotRun { form: form.name.to_owned(), class: form.class, why });
            continue;
        }
        for place in form.places(features) {
            for line in [Line::Hit, Line::Miss] {
                rows.push(Planned::Run(Box::new(form.case(&place, line)?)));
            }
        }
    }
    Ok(rows)
}
