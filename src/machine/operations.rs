//! Operations: what was asked for and takes its time.

use std::collections::VecDeque;

use crate::command::{Error, ErrorCode, Operation, OperationState};

/// Operations that can be asked for: the last so many, and those that still go on.
const KEPT: usize = 4096;

/// The operations of a machine, by their numbers from 1 on.
#[derive(Debug, Default)]
pub struct Operations {
    list: VecDeque<Operation>,
    last: u64,
}

impl Operations {
    /// Gives an operation its number, and lets it run.
    pub fn begin(&mut self, mut operation: Operation) -> Operation {
        self.last += 1;
        operation.operation = self.last;
        operation.state = OperationState::Running;
        if self.list.len() >= KEPT
            && let Some(oldest) = self.list.iter().position(|o| o.state != OperationState::Running)
        {
            self.list.remove(oldest);
        }
        self.list.push_back(operation.clone());
        operation
    }

    /// Ends an operation, with an error or without.
    pub fn finish(&mut self, number: u64, error: Option<Error>) {
        if let Some(operation) = self.list.iter_mut().find(|o| o.operation == number) {
            operation.state = if error.is_some() { OperationState::Failed } else { OperationState::Done };
            operation.error = error;
        }
    }

    /// How an operation stands.
    pub fn get(&self, number: u64) -> Result<Operation, Error> {
        let found = self.list.iter().find(|o| o.operation == number);
        found.cloned().ok_or_else(|| {
            let problem = if (1..=self.last).contains(&number) { "is long over" } else { "does not exist" };
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

    fn operation() -> Operation {
        Operation {
            operation: 0,
            kind: "remove".to_owned(),
            device: "p0".to_owned(),
            state: OperationState::Running,
            mode: None,
            channel: None,
            error: None,
        }
    }

    #[test]
    fn old_operations_are_forgotten_and_running_ones_never() {
        let mut operations = Operations::default();
        let running = operations.begin(operation()).operation;
        for _ in 0..2 * KEPT {
            let number = operations.begin(operation()).operation;
            operations.finish(number, None);
        }
        assert_eq!(operations.list.len(), KEPT);
        assert_eq!(operations.get(running).unwrap().state, OperationState::Running);
        assert_eq!(operations.get(operations.last).unwrap().state, OperationState::Done);
        assert_eq!(operations.get(2).unwrap_err().message, "Operation 2 is long over");
        assert_eq!(operations.get(0).unwrap_err().message, "Operation 0 does not exist");
    }
}
