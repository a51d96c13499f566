//! Requests between their submission and their completion.
//!
//! ```text
//!   submitted ─┬───────────────────────────── performed ─┬─ finished
//!              ├─ held ─ released ─ in line ─ performed ─┤
//!              └─ performed ─ held ─ released ─ in line ─┘
//! ```
//!
//! Requests that have met no fault are performed as the backend likes. Those that are released stand in line and are
//! performed one at a time, so that the order in which they were released is the order in which they end.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;

use super::faults::{Action, Faults, Order, Transfer};
use super::job::{Done, Extent, Gate, Job};
use super::request::{ID_LENGTH, Request, Status};
use super::{End, Notice, What, Witness};
use crate::clock::Clock;
use crate::dma::{Dma, DmaView};
use crate::virtio::work::Backend;

/// How a request that was held goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Release {
    /// As if nothing had been.
    Complete,
    /// It ends with this status; what was not transferred yet is not.
    Fail(Status),
    /// Only its first bytes are transferred.
    Tear {
        /// So many.
        bytes: u64,
        /// The status with which it ends.
        status: Status,
    },
}

/// Why a request cannot be released.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ReleaseError {
    /// It is not held.
    #[error("Request {0} is not held")]
    NotHeld(u64),
    /// It cannot be torn: its data has been transferred.
    #[error("Request {0} cannot be torn any more: its data was transferred when it was submitted")]
    Transferred(u64),
}

/// A request that is held.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// Its number.
    pub number: u64,
    /// The request.
    pub request: Arc<Request>,
    /// The fault that it met.
    pub fault: u64,
    /// When its data moves, or has moved.
    pub transfer: Transfer,
    /// For how long it has been held.
    pub waited: Duration,
    /// How long from now it will go on by itself, if it will.
    pub left: Option<Duration>,
}

/// A request that has come to its end.
pub(super) struct Step {
    pub(super) queue: u16,
    pub(super) request: Arc<Request>,
    /// The memory that it means.
    pub(super) view: DmaView,
    pub(super) status: Status,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// It is held, and not begun.
    Held,
    /// The backend has it. `hold` says that it is held then.
    Working { hold: bool },
    /// It was performed, and is held.
    Ready(Status),
    /// It stands in line to be performed, or to end with this status.
    Lined(Option<Status>),
    /// It ends when the driver can be told.
    Finished(Status),
}

#[derive(Debug)]
struct Flight {
    queue: u16,
    request: Arc<Request>,
    generation: u64,
    write_through: bool,
    id: [u8; ID_LENGTH],
    extent: Extent,
    stage: Stage,
    /// The fault that it met.
    fault: Option<u64>,
    /// When it was held.
    since: Duration,
    /// When it goes on by itself.
    due: Option<Duration>,
    /// It ends with this status, whatever comes of it.
    verdict: Option<Status>,
}

impl Flight {
    fn held(&self) -> bool {
        matches!(self.stage, Stage::Held | Stage::Ready(_) | Stage::Working { hold: true })
    }
}

/// Requests that wait to be put into another order.
#[derive(Debug)]
struct Group {
    fault: u64,
    members: Vec<u64>,
    order: Order,
    due: Duration,
}

/// All requests of a disk that the driver waits for.
pub(super) struct Flights {
    pub(super) faults: Faults,
    flights: BTreeMap<u64, Flight>,
    /// Number of the last request.
    last: u64,
    groups: Vec<Group>,
    line: VecDeque<u64>,
    /// The one out of the line that is being performed.
    turn: Option<u64>,
    finished: VecDeque<u64>,
    dma: Dma,
    gate: Gate,
    backend: Box<dyn Backend<Job>>,
    witness: Arc<dyn Witness>,
    clock: Clock,
}

impl Flights {
    pub(super) fn new(
        dma: Dma,
        backend: Box<dyn Backend<Job>>,
        witness: Arc<dyn Witness>,
        clock: Clock,
    ) -> Self {
        Self {
            faults: Faults::default(),
            flights: BTreeMap::new(),
            last: 0,
            groups: Vec::new(),
            line: VecDeque::new(),
            turn: None,
            finished: VecDeque::new(),
            dma,
            gate: Gate::default(),
            backend,
            witness,
            clock,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.flights.len()
    }

    /// Takes a request over.
    pub(super) fn submit(
        &mut self,
        queue: u16,
        request: Request,
        generation: u64,
        write_through: bool,
        id: [u8; ID_LENGTH],
    ) {
        self.last += 1;
        let number = self.last;
        let persistent = |gpa, len| self.witness.persistent(gpa, len);
        let met = self.faults.meet(|pattern| pattern.matches(&request, persistent));
        let now = (self.clock)();
        let mut flight = Flight {
            queue,
            request: Arc::new(request),
            generation,
            write_through,
            id,
            extent: Extent::Whole,
            stage: Stage::Working { hold: false },
            fault: met.map(|(fault, _)| fault),
            since: now,
            due: None,
            verdict: None,
        };
        let waits = |transfer| match transfer {
            Transfer::Release => Stage::Held,
            Transfer::Submission => Stage::Working { hold: true },
        };
        match met.map(|(_, action)| action) {
            None => {}
            Some(Action::Hold(transfer)) => flight.stage = waits(transfer),
            Some(Action::Delay(time, transfer)) => {
                flight.stage = waits(transfer);
                flight.due = Some(now.saturating_add(time));
            }
            Some(Action::Fail(status)) => flight.stage = Stage::Finished(status),
            Some(Action::Tear { bytes, status }) => flight.extent = Extent::Torn { bytes, status },
            Some(Action::Reorder { .. }) => flight.stage = Stage::Held,
        }
        let (stage, held) = (flight.stage, flight.held());
        self.flights.insert(number, flight);
        if held {
            let after = if stage == Stage::Held { Transfer::Release } else { Transfer::Submission };
            self.tell(number, What::Held(after));
        }
        match stage {
            Stage::Working { .. } => self.start(number),
            Stage::Finished(_) => self.finished.push_back(number),
            _ => {}
        }
        if let Some((fault, Action::Reorder { window, order, patience })) = met {
            self.gather(fault, number, window, order, now.saturating_add(patience));
        }
        if met.is_some() {
            self.call_back();
        }
    }

    /// Puts a request to those that wait for others; if there are enough now, they go on.
    fn gather(&mut self, fault: u64, number: u64, window: usize, order: Order, due: Duration) {
        let index = self.groups.iter().position(|group| group.fault == fault).unwrap_or_else(|| {
            self.groups.push(Group { fault, members: Vec::new(), order, due });
            self.groups.len() - 1
        });
        self.groups[index].members.push(number);
        if self.groups[index].members.len() >= window {
            self.scatter(index);
        }
    }

    /// Lets a group go on.
    fn scatter(&mut self, index: usize) {
        let mut group = self.groups.swap_remove(index);
        group.order.arrange(&mut group.members);
        for number in group.members {
            self.line_up(number, Release::Complete);
        }
        self.advance();
    }

    /// The backend has performed a job.
    pub(super) fn finish(&mut self, done: Done) {
        // After a reset, nobody waits for it.
        let Some(flight) = self.flights.get_mut(&done.number) else { return };
        match flight.stage {
            Stage::Working { hold: true } => flight.stage = Stage::Ready(done.status),
            Stage::Working { hold: false } => {
                flight.stage = Stage::Finished(flight.verdict.unwrap_or(done.status));
                self.finished.push_back(done.number);
            }
            _ => return,
        }
        if self.turn == Some(done.number) {
            self.turn = None;
        }
        self.advance();
    }

    /// Lets those go on whose time has come.
    pub(super) fn tick(&mut self) {
        let now = (self.clock)();
        while let Some(index) = self.groups.iter().position(|group| group.due <= now) {
            self.scatter(index);
        }
        let mut due: Vec<_> = self
            .flights
            .iter()
            .filter(|(_, flight)| flight.held())
            .filter_map(|(number, flight)| flight.due.filter(|due| *due <= now).map(|due| (due, *number)))
            .collect();
        due.sort_unstable();
        for (_, number) in due {
            self.line_up(number, Release::Complete);
        }
        self.advance();
        self.call_back();
    }

    /// Lets requests go on, in this order.
    pub(super) fn release(&mut self, numbers: &[u64], how: Release) -> Result<(), ReleaseError> {
        for number in numbers {
            let stage = self.flights.get(number).filter(|flight| flight.held()).map(|flight| flight.stage);
            match (stage, how) {
                (None, _) => return Err(ReleaseError::NotHeld(*number)),
                (Some(Stage::Held), _) | (_, Release::Complete | Release::Fail(_)) => {}
                (_, Release::Tear { .. }) => return Err(ReleaseError::Transferred(*number)),
            }
        }
        for number in numbers {
            self.line_up(*number, how);
        }
        self.advance();
        Ok(())
    }

    /// What is held no longer stands in line.
    fn line_up(&mut self, number: u64, how: Release) {
        let after = self.flights.get(&number).map(|flight| (self.clock)().saturating_sub(flight.since));
        let Some(flight) = self.flights.get_mut(&number).filter(|flight| flight.held()) else { return };
        if let Release::Tear { bytes, status } = how {
            flight.extent = Extent::Torn { bytes, status };
        }
        let failed = match how {
            Release::Fail(status) => Some(status),
            _ => None,
        };
        match flight.stage {
            Stage::Ready(status) => flight.stage = Stage::Lined(Some(failed.unwrap_or(status))),
            Stage::Working { .. } => {
                flight.stage = Stage::Working { hold: false };
                flight.verdict = failed;
            }
            _ => flight.stage = Stage::Lined(failed),
        }
        if matches!(flight.stage, Stage::Lined(_)) {
            self.line.push_back(number);
        }
        for group in &mut self.groups {
            group.members.retain(|member| *member != number);
        }
        self.groups.retain(|group| !group.members.is_empty());
        self.tell(number, What::Released { how, after: after.unwrap_or_default() });
    }

    /// Performs what is first in line, one at a time.
    fn advance(&mut self) {
        while self.turn.is_none()
            && let Some(number) = self.line.pop_front()
        {
            let Some(flight) = self.flights.get_mut(&number) else { continue };
            if let Stage::Lined(Some(status)) = flight.stage {
                flight.stage = Stage::Finished(status);
                self.finished.push_back(number);
            } else {
                flight.stage = Stage::Working { hold: false };
                self.turn = Some(number);
                self.start(number);
            }
        }
    }

    fn start(&mut self, number: u64) {
        let Some(flight) = self.flights.get(&number) else { return };
        self.backend.start(Job {
            number,
            request: flight.request.clone(),
            dma: self.dma.clone(),
            generation: flight.generation,
            gate: self.gate.clone(),
            life: self.gate.life(),
            extent: flight.extent,
            write_through: flight.write_through,
            id: flight.id,
        });
    }

    /// The next request that the driver can have back.
    pub(super) fn next_finished(&mut self) -> Option<Step> {
        let number = self.finished.pop_front()?;
        let Some(Stage::Finished(status)) = self.flights.get(&number).map(|flight| flight.stage) else {
            return None;
        };
        self.tell(number, What::Completed(status));
        let Flight { queue, request, generation, .. } = self.flights.remove(&number)?;
        Some(Step { queue, request, view: self.dma.view_of(generation), status })
    }

    /// Nothing of what the driver has asked for moves any more. Of a reset, those hear whose requests were held; a disk
    /// that has gone tells of each request that it has left behind.
    pub(super) fn forget(&mut self, end: End) {
        self.gate.close();
        let now = (self.clock)();
        for (number, flight) in &self.flights {
            if end == End::Departed || (flight.held() && flight.fault.is_some()) {
                let (request, fault) = (&*flight.request, flight.fault.unwrap_or(0));
                let what = What::Dropped { end, after: now.saturating_sub(flight.since) };
                self.witness.tell(&Notice { number: *number, request, fault, what });
            }
        }
        self.flights.clear();
        self.groups.clear();
        self.line.clear();
        self.turn = None;
        self.finished.clear();
    }

    pub(super) fn held(&self) -> Vec<Held> {
        let now = (self.clock)();
        let group_due = |number: &u64| {
            self.groups.iter().find(|group| group.members.contains(number)).map(|group| group.due)
        };
        self.flights
            .iter()
            .filter(|(_, flight)| flight.held())
            .map(|(number, flight)| Held {
                number: *number,
                request: flight.request.clone(),
                fault: flight.fault.unwrap_or(0),
                transfer: match flight.stage {
                    Stage::Held => Transfer::Release,
                    _ => Transfer::Submission,
                },
                waited: now.saturating_sub(flight.since),
                left: flight.due.or_else(|| group_due(number)).map(|due| due.saturating_sub(now)),
            })
            .collect()
    }

    fn call_back(&mut self) {
        let delays = self.flights.values().filter(|flight| flight.held()).filter_map(|flight| flight.due);
        if let Some(at) = delays.chain(self.groups.iter().map(|group| group.due)).min() {
            self.backend.call_at(at);
        }
    }

    /// Tells of a request that has met a fault.
    fn tell(&self, number: u64, what: What) {
        if let Some(flight) = self.flights.get(&number)
            && let Some(fault) = flight.fault
        {
            self.witness.tell(&Notice { number, request: &flight.request, fault, what });
        }
    }
}
