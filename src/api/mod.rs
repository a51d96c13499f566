//! The API: HTTP/1.1 and JSON on a Unix socket.
//!
//! One table ([`routes::ROUTES`]) says what can be asked: it drives the server and the OpenAPI document, so that
//! neither can say something that the other does not. A request becomes a [`Command`], which an [`Executor`] carries
//! out; the server knows nothing else of the machine.
//!
//! - Every reply carries `seq` (and the header `Aconite-Sequence`): the number of the last event before the command
//!   began. `GET /v1/events?since=SEQ` therefore shows everything that the command led to.
//! - Every error is `{"seq": N, "error": {"code", "message", "remedy"}}` with a stable code ([`ErrorCode`]).
//! - What takes time answers 202 with an operation; `GET /v1/operations/{n}?wait=10s` waits for its end.
//! - Nothing that a client sends or leaves unsent can hold up the machine: sizes, times and the number of connections
//!   are bounded ([`Limits`]), each connection has its own thread, and events are dropped for a reader that does not
//!   keep up (it is told how many).
//!
//! [`Command`]: crate::command::Command
//! [`ErrorCode`]: crate::command::ErrorCode

mod client;
mod http;
mod openapi;
mod request;
pub mod routes;
mod server;
mod socket;
mod stream;

use std::time::Duration;

pub use self::client::{Answer, Client, ClientError, Events};
pub use self::http::percent_encode;
pub use self::openapi::{document, text as openapi_text};
pub use self::server::Server;
pub use self::socket::{Socket, SocketError};
use crate::command::{Command, Error, EventBus, Reply};

/// Whatever can carry out commands: the machine, through a channel to its main loop.
pub trait Executor: Send + Sync {
    /// Carries out one command and waits for its reply. Called from several threads at once.
    ///
    /// # Errors
    /// The command was refused, and nothing was changed.
    fn execute(&self, command: Command) -> Result<Reply, Error>;

    /// The machine's events.
    fn events(&self) -> &EventBus;
}

/// What a client may ask of the server's patience and memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Connections at one time; more are told so and closed.
    pub connections: usize,
    /// Bytes of a request's head.
    pub head: usize,
    /// Bytes of a request's body.
    pub body: usize,
    /// How long a connection may do nothing between requests.
    pub idle: Duration,
    /// How long a request may take to arrive from its first byte on.
    pub request: Duration,
    /// How long a reply may wait for the client to read it.
    pub reply: Duration,
    /// How long a stream of events may wait for the client to read on.
    pub stream: Duration,
    /// The longest wait for an operation.
    pub wait: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 64,
            head: 16 << 10,
            // 100 000 ranges of poison are some four millions.
            body: 8 << 20,
            idle: Duration::from_secs(120),
            request: Duration::from_secs(20),
            reply: Duration::from_secs(30),
            stream: Duration::from_secs(600),
            wait: Duration::from_secs(3600),
        }
    }
}

#[cfg(test)]
pub(crate) mod fake;

#[cfg(test)]
#[path = "server_test.rs"]
mod tests;
