//! The agent's workload that maps memory, driven through the guest's shell.

use crate::machine::Machine;
use aconite_agent::workload::{MAP, OUTPUT, PROGRAM, Reply, Request};
use std::fmt::Write;

/// How often the guest looks for replies, ten times a second.
const LOOKS: u32 = 600;
/// Exit status of the script when the process has gone.
const GONE: i32 = 3;

/// A process in the guest that maps memory and touches it on request.
#[derive(Debug)]
pub struct Workload {
    number: u32,
    asked: usize,
}

impl Workload {
    /// Starts the workload with this number, 0 to 3; a guest can have one of each.
    #[track_caller]
    pub fn start(guest: &mut Machine, number: u32) -> Self {
        assert!(number < 4, "a shell has descriptors of one digit");
        let (requests, replies) = (format!("/tmp/requests{number}"), format!("/tmp/replies{number}"));
        guest.ok(&format!("rm -f {requests}; mkfifo {requests}; : > {replies}"));
        // The descriptor belongs to the shell that all later commands are started from.
        guest.type_in(
            format!(
                "{PROGRAM} workload {MAP} < {requests} > {replies} 2>&1 &\necho $! > /tmp/workload{number}\n\
                 exec {}> {requests}\n",
                Self::descriptor(number)
            )
            .as_bytes(),
        );
        Self { number, asked: 0 }
    }

    fn descriptor(number: u32) -> u32 {
        9 - number
    }

    /// Asks one thing and does not wait for the answer, which nobody will read.
    #[track_caller]
    pub fn tell(&mut self, guest: &mut Machine, request: &Request) {
        self.asked += 1;
        guest.type_in(format!("echo '{request}' >&{}\n", Self::descriptor(self.number)).as_bytes());
    }

    /// Asks one thing.
    ///
    /// # Panics
    /// There is no answer that can be read.
    #[track_caller]
    pub fn ask(&mut self, guest: &mut Machine, request: &Request) -> Reply {
        self.ask_all(guest, std::slice::from_ref(request)).remove(0)
    }

    /// Asks several things, one after the other.
    ///
    /// # Panics
    /// One has no answer that can be read.
    #[track_caller]
    pub fn ask_all(&mut self, guest: &mut Machine, requests: &[Request]) -> Vec<Reply> {
        let (number, descriptor) = (self.number, Self::descriptor(self.number));
        let first = self.asked + 1;
        self.asked += requests.len();
        let mut script = String::new();
        for request in requests {
            writeln!(script, "echo '{request}' >&{descriptor}").expect("a string");
        }
        write!(
            script,
            "looks=0\n\
             until test \"$(grep -vc '^{OUTPUT}' /tmp/replies{number})\" -ge {last}; do\n\
             test -d /proc/$(cat /tmp/workload{number}) || exit {GONE}\n\
             sleep 0.1; looks=$((looks + 1)); test $looks -lt {LOOKS} || exit 1\n\
             done\n\
             grep -v '^{OUTPUT}' /tmp/replies{number} | sed -n {first},{last}p",
            last = self.asked
        )
        .expect("a string");
        let reply = guest.sh(&script);
        assert_ne!(reply.status, GONE, "the workload ended at {requests:?}");
        assert_eq!(reply.status, 0, "{requests:?}: {}", reply.text);
        let parse = |line| Reply::parse(line).unwrap_or_else(|error| panic!("{requests:?}: {error}"));
        reply.text.lines().map(parse).collect()
    }
}
