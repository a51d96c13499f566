//! Operations: what was asked for and takes its time.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use aconite_devices::bus::lock;

use crate::command::{Error, ErrorCode, Event, EventBus, Operation, OperationState};

/// Operations that can be asked for: the last so many, and those that still go on.
const KEPT: usize = 4096;

/// The operations of a machine, by their numbers from 1 on. A copy is another way to the same ones.
#[derive(Clone, Debug, Default)]
pub struct Operations(Arc<Mutex<Kept>>);

#[derive(Debug, Default)]
struct Kept {
    list: VecDeque<Operation>,
    last: u64,
}

impl Operations {
    /// Gives an operation its number, and lets it run.
    pub fn begin(&self, mut operation: Operation) -> Operation {
        let mut kept = lock(&self.0);
        kept.last += 1;
        operation.operation = kept.last;
        operation.state = OperationState::Running;
        if kept.list.len() >= KEPT
            && let Some(oldest) = kept.list.iter().position(|o| o.state != OperationState::Running)
        {
            kept.list.remove(oldest);
        }
        kept.list.push_back(operation.clone());
        operation
    }

    /// Ends an operation, with an error or without, before anybody knows its number.
    pub fn finish(&self, number: u64, error: Option<Error>) {
        if let Some(operation) = lock(&self.0).list.iter_mut().find(|o| o.operation == number) {
            operation.state = if error.is_some() { OperationState::Failed } else { OperationState::Done };
            operation.error = error;
        }
    }

    /// Ends an operation, and tells of it.
    pub fn end(&self, events: &EventBus, number: u64, error: Option<Error>) {
        self.finish(number, error.clone());
        events.publish(Event::OperationFinished { operation: number, error });
    }

    /// How an operation stands.
    pub fn get(&self, number: u64) -> Result<Operation, Error> {
        let kept = lock(&self.0);
        kept.list.iter().find(|o| o.operation == number).cloned().ok_or_else(|| {
            let problem = if (1..=kept.last).contains(&number) { "is long over" } else { "does not exist" };
            Error::new(
                ErrorCode::NoSuchOperation,
                format!("Operation {number} {problem}"),
                "use the number with which a request was answered lately",
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Channel;

    fn operation() -> Operation {
        Operation::new("remove", "p0", Channel::Container)
    }

    #[test]
    fn old_operations_are_forgotten_and_running_ones_never() {
        let operations = Operations::default();
        let running = operations.begin(operation()).operation;
        for _ in 0..2 * KEPT {
            let number = operations.begin(operation()).operation;
            operations.finish(number, None);
        }
        let last = lock(&operations.0).last;
        assert_eq!(lock(&operations.0).list.len(), KEPT);
        assert_eq!(operations.get(running).unwrap().state, OperationState::Running);
        assert_eq!(operations.get(last).unwrap().state, OperationState::Done);
        assert_eq!(operations.get(2).unwrap_err().message, "Operation 2 is long over");
        assert_eq!(operations.get(0).unwrap_err().message, "Operation 0 does not exist");
    }
}
