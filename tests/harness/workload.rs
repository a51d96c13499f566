//! The agent's workload that maps a file, driven through the guest's shell.

use crate::machine::Machine;
use aconite_agent::workload::{MAP, OUTPUT, PROGRAM, Reply, Request};

/// How often the guest looks for a reply, ten times a second.
const LOOKS: u32 = 600;

/// A process in the guest that maps a file and touches it on request.
#[derive(Debug)]
pub struct Workload {
    asked: u32,
}

impl Workload {
    /// Starts it; a guest can have one.
    #[track_caller]
    pub fn start(guest: &mut Machine) -> Self {
        // The descriptor belongs to the shell that all later commands are started from.
        guest.ok("mkfifo /tmp/requests");
        guest.type_in(format!("{PROGRAM} workload {MAP} < /tmp/requests > /tmp/replies 2>&1 &\n").as_bytes());
        guest.type_in(b"exec 9> /tmp/requests\n");
        Self { asked: 0 }
    }

    /// Asks one thing.
    ///
    /// # Panics
    /// There is no answer that can be read.
    #[track_caller]
    pub fn ask(&mut self, guest: &mut Machine, request: &Request) -> Reply {
        self.asked += 1;
        let script = format!(
            "echo '{request}' >&9\n\
             looks=0\n\
             until test \"$(grep -vc '^{OUTPUT}' /tmp/replies)\" -ge {number}; do\n\
             sleep 0.1; looks=$((looks + 1)); test $looks -lt {LOOKS} || exit 1\n\
             done\n\
             grep -v '^{OUTPUT}' /tmp/replies | sed -n {number}p",
            number = self.asked
        );
        let line = guest.ok(&script);
        Reply::parse(&line).unwrap_or_else(|error| panic!("{request}: {error}"))
    }
}
