//! Devices whose requests are performed where nobody waits: neither a vCPU nor the main loop.

use std::time::Duration;

use super::{VirtioDevice, VirtioPci};
use crate::bus::Effects;

/// Whoever performs requests.
pub trait Backend<J>: Send {
    /// Performs `job` soon, on some thread, and hands what comes of it to [`VirtioPci::finish`]. Never waits.
    fn start(&mut self, job: J);

    /// Calls [`VirtioPci::tick`] once the device's clock has come to `at`. A later call takes the place of an earlier.
    fn call_at(&mut self, at: Duration);
}

/// A device with such a backend.
pub trait Worked: VirtioDevice {
    /// What is to be performed for a request.
    type Job: Send + 'static;
    /// What came of it.
    type Done;

    /// A job has been performed.
    fn finished(&mut self, done: Self::Done);

    /// The device's clock has come to the time that [`Backend::call_at`] was given.
    fn clock_struck(&mut self);
}

impl<D: Worked> VirtioPci<D> {
    /// A job has been performed.
    pub fn finish(&mut self, done: D::Done, effects: &mut Effects) {
        self.device_mut().finished(done);
        self.service(effects);
    }

    /// The device's clock has come to the time that [`Backend::call_at`] was given.
    pub fn tick(&mut self, effects: &mut Effects) {
        self.device_mut().clock_struck();
        self.service(effects);
    }
}
