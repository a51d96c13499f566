//! A level 1 of one process alone, without a keeper: what is measured in it shares it with nobody.

use super::keeper::{START_TIMEOUT, set_up};
use super::machine::{Clock, Machine, Parts};
use super::place::last_lines;
use super::{Nested, NestedError, pack};
use crate::guest::client::Client;
use std::fs::{self, File};
use std::path::Path;

/// A running level 1. It ends when this is dropped.
#[derive(Debug)]
pub struct Private {
    client: Client,
    _machine: Machine,
}

impl Private {
    /// Starts one and waits until it is ready. Its image, log and console are files in `dir`.
    ///
    /// # Errors
    /// A part is missing, or it did not start.
    pub fn start(clock: Clock, dir: &Path) -> Result<Self, NestedError> {
        let nested = Nested::find()?;
        let (image, console, log) = (dir.join("img"), dir.join("console"), dir.join("log"));
        pack(&nested, &image, Vec::new()).map_err(NestedError::Failed)?;
        let parts = Parts {
            qemu: &nested.qemu,
            kernel: &nested.kernel,
            image: &image,
            console: &console,
            log: File::create(&log).map_err(NestedError::Files)?,
            clock,
        };
        let (machine, stream) = Machine::start(parts).map_err(NestedError::Spawn)?;
        let ready = Client::connect(stream, START_TIMEOUT).map_err(NestedError::from).and_then(|client| {
            set_up(&client).map_err(NestedError::Failed)?;
            Ok(client)
        });
        let client = ready.map_err(|error| {
            let text = |path| last_lines(&String::from_utf8_lossy(&fs::read(path).unwrap_or_default()));
            NestedError::Failed(format!("{error}\n{}{}", text(&log), text(&console)))
        })?;
        Ok(Private { client, _machine: machine })
    }

    /// The connection to its agent.
    pub fn client(&self) -> &Client {
        &self.client
    }
}
