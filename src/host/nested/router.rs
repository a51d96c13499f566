//! Who said what: the channels of many clients on the one connection to the agent.
//!
//! A client of the keeper speaks the agent's protocol, as if it were alone. The keeper gives each of its channels a
//! number of its own on the way to the agent. Flow control runs end to end: credit passes through, so what is stored
//! here for a slow side is bounded by the windows of its channels.
//!
//! When a client goes, its commands get SIGTERM and [`GRACE`] to end (a monitor stops its machine and syncs its
//! files), then the end of their channel, which kills them. This module is only the book-keeping; it does no I/O.

use aconite_agent::protocol::{Frame, Message};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// How long a command may take to end after its client has gone.
pub const GRACE: Duration = Duration::from_secs(20);

/// A client of the keeper, by number.
pub type ClientId = u64;

/// Where a frame is to go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Route {
    /// To the agent.
    Agent(Frame),
    /// To this client.
    Client(ClientId, Frame),
}

/// One channel on the connection to the agent.
#[derive(Debug)]
struct Channel {
    /// Client and the client's own number; `None` once the client has gone.
    owner: Option<(ClientId, u32)>,
    command: bool,
    /// When a channel without an owner is ended by force.
    deadline: Option<Instant>,
}

/// The channels of all clients.
#[derive(Debug, Default)]
pub struct Router {
    channels: BTreeMap<u32, Channel>,
    numbers: BTreeMap<(ClientId, u32), u32>,
    last: u32,
}

impl Router {
    /// A frame, other than `Hello`, from a client.
    pub fn from_client(&mut self, client: ClientId, frame: Frame) -> Option<Route> {
        let own = frame.channel;
        let opens = matches!(
            frame.message,
            Message::Exec(_)
                | Message::Connect(_)
                | Message::Mount(_)
                | Message::Unmount(_)
                | Message::Power(_)
        );
        let number = match (self.numbers.get(&(client, own)), opens) {
            (Some(number), false) => *number,
            // A number in use for a second request, or a message for a channel that has ended meanwhile.
            (Some(_), true) => return None,
            (None, false) => return None,
            (None, true) => {
                let refused = match &frame.message {
                    Message::Power(_) => Some("The software KVM host is shared and ends when it is idle"),
                    _ if own == aconite_agent::protocol::SESSION => Some("Channel 0 is the session"),
                    _ => None,
                };
                if let Some(text) = refused {
                    let message = Message::Failed { errno: libc::EPERM, text: text.to_owned() };
                    return Some(Route::Client(client, Frame { channel: own, message }));
                }
                self.open(client, own, matches!(frame.message, Message::Exec(_)))
            }
        };
        Some(Route::Agent(Frame { channel: number, message: frame.message }))
    }

    fn open(&mut self, client: ClientId, own: u32, command: bool) -> u32 {
        // Numbers go round; one that is still in use is passed over.
        loop {
            self.last = self.last.wrapping_add(1).max(1);
            if !self.channels.contains_key(&self.last) {
                break;
            }
        }
        self.channels.insert(self.last, Channel { owner: Some((client, own)), command, deadline: None });
        self.numbers.insert((client, own), self.last);
        self.last
    }

    /// A frame, other than `Hello`, from the agent.
    pub fn from_agent(&mut self, frame: Frame) -> Option<Route> {
        let number = frame.channel;
        let owner = self.channels.get(&number)?.owner;
        if matches!(frame.message, Message::Exit(_) | Message::Failed { .. }) {
            self.channels.remove(&number);
            if let Some(owner) = owner {
                self.numbers.remove(&owner);
            }
        }
        match (owner, frame.message) {
            (Some((client, own)), message) => Some(Route::Client(client, Frame { channel: own, message })),
            // Nobody reads any more: let the command write on, or it could not end.
            (None, Message::Data(stream, bytes)) => {
                let credit = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
                Some(Route::Agent(Frame { channel: number, message: Message::Credit(stream, credit) }))
            }
            (None, _) => None,
        }
    }

    /// A client has gone.
    pub fn client_gone(&mut self, client: ClientId, now: Instant) -> Vec<Route> {
        let mut routes = Vec::new();
        for (number, channel) in &mut self.channels {
            if channel.owner.is_some_and(|(owner, _)| owner == client) {
                channel.owner = None;
                channel.deadline = channel.command.then(|| now + GRACE);
                let message = if channel.command { Message::Signal(libc::SIGTERM) } else { Message::Close };
                routes.push(Route::Agent(Frame { channel: *number, message }));
            }
        }
        self.numbers.retain(|(owner, _), _| *owner != client);
        routes
    }

    /// Ends by force what has had its time.
    pub fn expire(&mut self, now: Instant) -> Vec<Route> {
        let mut routes = Vec::new();
        for (number, channel) in &mut self.channels {
            if channel.deadline.is_some_and(|deadline| now >= deadline) {
                channel.deadline = None;
                routes.push(Route::Agent(Frame { channel: *number, message: Message::Close }));
            }
        }
        routes
    }

    /// The agent has gone: how every open channel of a client ends.
    pub fn agent_gone(&mut self, text: &str) -> Vec<Route> {
        self.numbers.clear();
        std::mem::take(&mut self.channels)
            .into_values()
            .filter_map(|channel| channel.owner)
            .map(|(client, own)| {
                let message = Message::Failed { errno: libc::EIO, text: text.to_owned() };
                Route::Client(client, Frame { channel: own, message })
            })
            .collect()
    }

    /// Whether nothing runs and nothing is connected.
    pub fn is_empty(&self) -> bool {
        self.channels.is_empty()
    }

    /// When [`Router::expire`] has something to do next.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.channels.values().filter_map(|channel| channel.deadline).min()
    }
}

#[cfg(test)]
#[path = "router_test.rs"]
mod tests;
