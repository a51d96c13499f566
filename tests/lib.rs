//! What the end-to-end tests share: real guests, started by the program as a user starts it, and looked at from
//! inside (a shell) and outside (the API socket, the run directory).
//!
//! Nothing is built or fetched here. `cargo xtask test` does both, and names the program and the material in
//! `ACONITE_BIN` and `ACONITE_MATERIAL`; without them every test fails and says so. All waits are bounded, and a
//! test that fails shows what its guest printed last and what the monitor reported.

#[path = "harness/environment.rs"]
pub mod environment;
#[path = "harness/http.rs"]
pub mod http;
#[path = "harness/kernel_log.rs"]
pub mod kernel_log;
#[path = "harness/machine.rs"]
pub mod machine;
#[path = "harness/record.rs"]
pub mod record;
#[path = "harness/run.rs"]
pub mod run;
#[path = "harness/streams.rs"]
mod streams;
#[path = "harness/workload.rs"]
pub mod workload;

pub use environment::{aconite, aconite_path};
pub use machine::Machine;
pub use record::Ended;
pub use run::Run;

use std::thread;
use std::time::{Duration, Instant};

/// Asks `condition` until it has an answer.
///
/// # Panics
/// There is none within `limit`.
pub fn wait_for<T>(what: &str, limit: Duration, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(answer) = condition() {
            return answer;
        }
        assert!(Instant::now() < deadline, "{what} did not come within {limit:?}");
        thread::sleep(Duration::from_millis(100));
    }
}
