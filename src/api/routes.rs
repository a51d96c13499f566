//! The one table of what can be asked.
//!
//! A route says how a request is written and what it is answered with; its handler turns the request into an
//! [`Action`] and looks at nothing else. The OpenAPI document is made from the same rows.

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::http::percent_decode;
use crate::command::{
    Command, Error, ErrorCode, MachineInfo, MemoryDevice, NotifyKind, Operation, PoisonAdded, PoisonCleared,
    PoisonState, Record, RemoveMode, Reply,
};
use crate::config::{Channel, Pmem, PmemKeys, nearest, validate_insert};
use crate::units::{ByteRange, TimeSpan};

/// What is to be done for a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Ask the machine.
    Execute(Command),
    /// Ask for an operation, again when it has ended, for at most this long.
    Wait {
        /// The operation.
        operation: u64,
        /// How long.
        patience: TimeSpan,
    },
    /// Stream events.
    Stream {
        /// Number of the last event that the client knows.
        since: u64,
        /// Whether the stream goes on when there are no more.
        follow: bool,
    },
    /// Answer with the OpenAPI document.
    Document,
}

/// A parameter of a query.
#[derive(Debug, Clone, Copy)]
pub struct Parameter {
    /// Its name.
    pub name: &'static str,
    /// What it means.
    pub summary: &'static str,
    /// Whether it has to be given.
    pub required: bool,
    /// Whether it can be given more than once.
    pub repeated: bool,
    /// What it looks like.
    pub schema: fn(&mut SchemaGenerator) -> Schema,
}

/// What a route is answered with.
#[derive(Debug, Clone, Copy)]
pub enum ReplyKind {
    /// A JSON object of this shape, with `seq` in it.
    Object(fn(&mut SchemaGenerator) -> Schema),
    /// JSON objects of this shape, one a line.
    Lines(fn(&mut SchemaGenerator) -> Schema),
    /// The OpenAPI document.
    Document,
}

/// One thing that can be asked.
#[derive(Debug, Clone, Copy)]
pub struct Route {
    /// `GET`, `POST` or `DELETE`.
    pub method: &'static str,
    /// The path; a part in braces stands for anything.
    pub path: &'static str,
    /// Its name in generated clients.
    pub name: &'static str,
    /// What it does.
    pub summary: &'static str,
    /// The parameters of its query.
    pub query: &'static [Parameter],
    /// The shape of its body, if it takes one.
    pub request: Option<fn(&mut SchemaGenerator) -> Schema>,
    /// The status of a good reply.
    pub status: u16,
    /// What it is answered with.
    pub reply: ReplyKind,
    /// The errors of its own, besides [`COMMON_ERRORS`].
    pub errors: &'static [ErrorCode],
    handler: fn(&Input<'_>) -> Result<Action, Error>,
}

/// Errors that any request can be answered with.
pub const COMMON_ERRORS: &[ErrorCode] = &[
    ErrorCode::BadHttp,
    ErrorCode::BadParameter,
    ErrorCode::LengthRequired,
    ErrorCode::BodyTooLarge,
    ErrorCode::HeadTooLarge,
    ErrorCode::RequestTimeout,
    ErrorCode::TooManyConnections,
    ErrorCode::MachineGone,
    ErrorCode::Internal,
];

fn of<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    generator.subschema_for::<T>()
}

/// The memory devices of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct MemoryList {
    /// The devices, departed ones too.
    pub memory: Vec<MemoryDevice>,
}

/// An answer without content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Done {}

/// A request to poison bytes of a device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PoisonRequest {
    /// What to poison; all of it or nothing. At least one range.
    pub ranges: Vec<ByteRange>,
}

/// A request to send the guest a notification.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NotifyRequest {
    /// What it says.
    pub kind: NotifyKind,
}

/// What can be asked, in the order of the documentation.
pub const ROUTES: &[Route] = &[
    Route {
        method: "GET",
        path: "/v1/machine",
        name: "machine_info",
        summary: "About the machine",
        query: &[],
        request: None,
        status: 200,
        reply: ReplyKind::Object(of::<MachineInfo>),
        errors: &[],
        handler: |_| Ok(Action::Execute(Command::MachineInfo)),
    },
    Route {
        method: "GET",
        path: "/v1/memory",
        name: "memory_list",
        summary: "All memory devices",
        query: &[],
        request: None,
        status: 200,
        reply: ReplyKind::Object(of::<MemoryList>),
        errors: &[],
        handler: |_| Ok(Action::Execute(Command::ListMemory)),
    },
    Route {
        method: "POST",
        path: "/v1/memory",
        name: "memory_insert",
        summary: "Put a memory device into a free slot",
        query: &[],
        request: Some(of::<Pmem>),
        status: 202,
        reply: ReplyKind::Object(of::<Operation>),
        errors: &[
            ErrorCode::BadJson,
            ErrorCode::InvalidConfig,
            ErrorCode::NotImplemented,
            ErrorCode::IdInUse,
            ErrorCode::NoFreeSlot,
            ErrorCode::AddressInUse,
            ErrorCode::NoSuchDevice,
            ErrorCode::WrongState,
            ErrorCode::WrongDeviceState,
            ErrorCode::FileInUse,
            ErrorCode::HostLimit,
        ],
        handler: |input| {
            let pmem = Pmem::try_from(input.body::<PmemKeys>()?)?;
            validate_insert(&pmem, &[])?;
            Ok(Action::Execute(Command::Insert { pmem }))
        },
    },
    Route {
        method: "GET",
        path: "/v1/memory/{id}",
        name: "memory_show",
        summary: "One memory device",
        query: &[],
        request: None,
        status: 200,
        reply: ReplyKind::Object(of::<MemoryDevice>),
        errors: &[ErrorCode::NoSuchDevice],
        handler: |input| Ok(Action::Execute(Command::ShowMemory { device: input.id() })),
    },
    Route {
        method: "DELETE",
        path: "/v1/memory/{id}",
        name: "memory_remove",
        summary: "Take a memory device away",
        query: &[
            Parameter {
                name: "mode",
                summary: "Whether the memory goes first (surprise) or the guest is asked (eject)",
                required: true,
                repeated: false,
                schema: of::<RemoveMode>,
            },
            Parameter {
                name: "via",
                summary: "The channel. Default: the device's own",
                required: false,
                repeated: false,
                schema: of::<Channel>,
            },
        ],
        request: None,
        status: 202,
        reply: ReplyKind::Object(of::<Operation>),
        errors: &[
            ErrorCode::NoSuchDevice,
            ErrorCode::WrongState,
            ErrorCode::WrongDeviceState,
            ErrorCode::NotSupported,
            ErrorCode::NotImplemented,
        ],
        handler: |input| {
            let mode = input.required("mode")?;
            Ok(Action::Execute(Command::Remove { device: input.id(), mode, via: input.optional("via")? }))
        },
    },
    Route {
        method: "GET",
        path: "/v1/memory/{id}/poison",
        name: "poison_list",
        summary: "The poison of a device",
        query: &[],
        request: None,
        status: 200,
        reply: ReplyKind::Object(of::<PoisonState>),
        errors: &[ErrorCode::NoSuchDevice],
        handler: |input| Ok(Action::Execute(Command::PoisonList { device: input.id() })),
    },
    Route {
        method: "POST",
        path: "/v1/memory/{id}/poison",
        name: "poison_add",
        summary: "Make bytes of a device bad: the next load of them is a machine check",
        query: &[],
        request: Some(of::<PoisonRequest>),
        status: 200,
        reply: ReplyKind::Object(of::<PoisonAdded>),
        errors: &[
            ErrorCode::BadJson,
            ErrorCode::NoSuchDevice,
            ErrorCode::OutsideDevice,
            ErrorCode::WrongState,
            ErrorCode::WrongDeviceState,
            ErrorCode::HostLimit,
        ],
        handler: |input| {
            let ranges = input.body::<PoisonRequest>()?.ranges;
            if ranges.is_empty() {
                return Err(Error::new(
                    ErrorCode::BadParameter,
                    "The list \"ranges\" is empty",
                    "name at least one range, such as {\"offset\": \"0x200040\", \"length\": 64}",
                ));
            }
            Ok(Action::Execute(Command::PoisonAdd { device: input.id(), ranges }))
        },
    },
    Route {
        method: "DELETE",
        path: "/v1/memory/{id}/poison",
        name: "poison_clear",
        summary: "Replace bad media by good; the guest's own list stays until it writes",
        query: &[Parameter {
            name: "range",
            summary: "What to clear, such as 0x200040+64; a plus stands for itself. Default: the whole device",
            required: false,
            repeated: true,
            schema: of::<String>,
        }],
        request: None,
        status: 200,
        reply: ReplyKind::Object(of::<PoisonCleared>),
        errors: &[
            ErrorCode::NoSuchDevice,
            ErrorCode::OutsideDevice,
            ErrorCode::WrongState,
            ErrorCode::WrongDeviceState,
        ],
        handler: |input| {
            let ranges = input.ranges("range")?;
            let ranges = (!ranges.is_empty()).then_some(ranges);
            Ok(Action::Execute(Command::PoisonClear { device: input.id(), ranges }))
        },
    },
    Route {
        method: "POST",
        path: "/v1/memory/{id}/notify",
        name: "notify",
        summary: "Send the guest a notification of a device, whether or not there is a reason for it",
        query: &[],
        request: Some(of::<NotifyRequest>),
        status: 200,
        reply: ReplyKind::Object(of::<Done>),
        errors: &[
            ErrorCode::BadJson,
            ErrorCode::NoSuchDevice,
            ErrorCode::WrongState,
            ErrorCode::WrongDeviceState,
        ],
        handler: |input| {
            let kind = input.body::<NotifyRequest>()?.kind;
            Ok(Action::Execute(Command::Notify { device: input.id(), kind }))
        },
    },
    Route {
        method: "GET",
        path: "/v1/operations/{operation}",
        name: "operation_show",
        summary: "How something stands that was answered with an operation",
        query: &[Parameter {
            name: "wait",
            summary: "How long to wait for its end, such as 10s. Default: not at all",
            required: false,
            repeated: false,
            schema: of::<TimeSpan>,
        }],
        request: None,
        status: 200,
        reply: ReplyKind::Object(of::<Operation>),
        errors: &[ErrorCode::NoSuchOperation],
        handler: |input| {
            let number = input.segment();
            let operation = number.parse().map_err(|_| {
                Error::new(
                    ErrorCode::NoSuchOperation,
                    format!("There is no operation {number:?}"),
                    "give the number that the request was answered with",
                )
            })?;
            Ok(match input.text("wait") {
                None => Action::Execute(Command::ShowOperation { operation }),
                Some(text) => Action::Wait {
                    operation,
                    patience: text.parse().map_err(|error| wrong_value("wait", error))?,
                },
            })
        },
    },
    Route {
        method: "GET",
        path: "/v1/events",
        name: "events",
        summary: "What has happened, one event a line",
        query: &[
            Parameter {
                name: "since",
                summary: "Number of the last event that is known already. Default: 0, from the first one",
                required: false,
                repeated: false,
                schema: of::<u64>,
            },
            Parameter {
                name: "follow",
                summary: "1 or true to go on with what happens from now on. Default: end with the last event",
                required: false,
                repeated: false,
                schema: of::<bool>,
            },
        ],
        request: None,
        status: 200,
        reply: ReplyKind::Lines(of::<Record>),
        errors: &[],
        handler: |input| {
            let since = match input.text("since") {
                None => 0,
                Some(text) => text.parse().map_err(|_| {
                    wrong_value("since", format_args!("{text:?} is no number: give that of an event, or 0"))
                })?,
            };
            let follow = match input.text("follow") {
                None | Some("0" | "false") => false,
                Some("1" | "true" | "") => true,
                Some(text) => {
                    return Err(wrong_value("follow", format_args!("{text:?} is no switch: give 1 or 0")));
                }
            };
            Ok(Action::Stream { since, follow })
        },
    },
    Route {
        method: "POST",
        path: "/v1/pause",
        name: "pause",
        summary: "Stop all vCPUs; guest time stands still",
        query: &[],
        request: None,
        status: 200,
        reply: ReplyKind::Object(of::<Done>),
        errors: &[ErrorCode::WrongState],
        handler: |_| Ok(Action::Execute(Command::Pause)),
    },
    Route {
        method: "POST",
        path: "/v1/resume",
        name: "resume",
        summary: "Let the vCPUs run on",
        query: &[],
        request: None,
        status: 200,
        reply: ReplyKind::Object(of::<Done>),
        errors: &[ErrorCode::WrongState],
        handler: |_| Ok(Action::Execute(Command::Resume)),
    },
    Route {
        method: "POST",
        path: "/v1/quit",
        name: "quit",
        summary: "End the machine as it is, without a word to the guest",
        query: &[],
        request: None,
        status: 200,
        reply: ReplyKind::Object(of::<Done>),
        errors: &[],
        handler: |_| Ok(Action::Execute(Command::Quit)),
    },
    Route {
        method: "GET",
        path: "/v1/openapi.json",
        name: "openapi",
        summary: "This document",
        query: &[],
        request: None,
        status: 200,
        reply: ReplyKind::Document,
        errors: &[],
        handler: |_| Ok(Action::Document),
    },
];

/// Why a request has no route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The error.
    pub error: Error,
    /// The methods that the path has, if only the method was wrong.
    pub allow: Option<String>,
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Self { error, allow: None }
    }
}

/// Finds the route of a request and what is to be done. Pure: the same request always means the same.
///
/// # Errors
/// There is no such route, or the request is not what the route takes.
pub fn resolve(
    method: &str,
    path: &str,
    query: &str,
    body: &[u8],
) -> Result<(&'static Route, Action), Refusal> {
    let matching: Vec<(&Route, &str)> =
        ROUTES.iter().filter_map(|route| Some((route, route.matches(path)?))).collect();
    let Some((route, segment)) = matching.iter().find(|(route, _)| route.method == method) else {
        if matching.is_empty() {
            return Err(Refusal::from(Error::new(
                ErrorCode::NoSuchRoute,
                format!("There is nothing under {path:?}"),
                "see /v1/openapi.json for what can be asked",
            )));
        }
        let methods: Vec<&str> = matching.iter().map(|(route, _)| route.method).collect();
        let methods = methods.join(", ");
        return Err(Refusal {
            error: Error::new(
                ErrorCode::MethodNotAllowed,
                format!("{path} cannot be asked with {method}"),
                format!("use {methods}"),
            ),
            allow: Some(methods),
        });
    };
    let input = Input { segment: percent_decode(segment)?, query: route.parse_query(query)?, body };
    if route.request.is_none() && !body.is_empty() {
        return Err(Refusal::from(Error::new(
            ErrorCode::BadParameter,
            format!("{method} {path} takes no body"),
            "send it without one",
        )));
    }
    Ok((route, (route.handler)(&input)?))
}

impl Route {
    /// The part of `path` that stands for the part in braces (empty if there is none); `None` if it does not match.
    fn matches<'a>(&self, path: &'a str) -> Option<&'a str> {
        let mut found = "";
        let mut parts = path.split('/');
        for pattern in self.path.split('/') {
            let part = parts.next()?;
            if pattern.starts_with('{') {
                if part.is_empty() {
                    return None;
                }
                found = part;
            } else if pattern != part {
                return None;
            }
        }
        parts.next().is_none().then_some(found)
    }

    fn parse_query(&self, query: &str) -> Result<Vec<(&'static str, String)>, Error> {
        let mut pairs: Vec<(&'static str, String)> = Vec::new();
        for part in query.split('&').filter(|part| !part.is_empty()) {
            let (key, value) = part.split_once('=').unwrap_or((part, ""));
            let key = percent_decode(key)?;
            let Some(parameter) = self.query.iter().find(|parameter| parameter.name == key) else {
                let known: Vec<&str> = self.query.iter().map(|parameter| parameter.name).collect();
                let remedy = match nearest(&key, &known) {
                    Some(near) => format!("did you mean {near:?}? Known: {}", known.join(", ")),
                    None if known.is_empty() => "leave it out: there are no parameters here".to_owned(),
                    None => format!("known: {}", known.join(", ")),
                };
                let message = format!("There is no parameter {key:?} of {} {}", self.method, self.path);
                return Err(Error::new(ErrorCode::BadParameter, message, remedy));
            };
            if !parameter.repeated && pairs.iter().any(|(known, _)| *known == parameter.name) {
                let message = format!("Parameter {key} is given twice");
                return Err(Error::new(ErrorCode::BadParameter, message, "give it once"));
            }
            pairs.push((parameter.name, percent_decode(value)?));
        }
        Ok(pairs)
    }
}

/// The parts of a request that a handler looks at.
struct Input<'a> {
    segment: String,
    query: Vec<(&'static str, String)>,
    body: &'a [u8],
}

impl Input<'_> {
    fn id(&self) -> String {
        self.segment.clone()
    }

    fn segment(&self) -> &str {
        &self.segment
    }

    fn text(&self, name: &str) -> Option<&str> {
        self.query.iter().find(|(known, _)| *known == name).map(|(_, value)| value.as_str())
    }

    /// A parameter that is one of the words of `T`.
    fn optional<T: clap::ValueEnum>(&self, name: &str) -> Result<Option<T>, Error> {
        let Some(text) = self.text(name) else { return Ok(None) };
        match T::from_str(text, false) {
            Ok(value) => Ok(Some(value)),
            Err(_) => Err(wrong_value(name, format_args!("{text:?} is not known: give {}", words::<T>()))),
        }
    }

    fn required<T: clap::ValueEnum>(&self, name: &str) -> Result<T, Error> {
        self.optional(name)?.ok_or_else(|| {
            Error::new(
                ErrorCode::BadParameter,
                format!("Parameter {name} is missing"),
                format!("give {name}={}", words::<T>()),
            )
        })
    }

    fn ranges(&self, name: &str) -> Result<Vec<ByteRange>, Error> {
        let texts = self.query.iter().filter(|(known, _)| *known == name);
        texts.map(|(_, text)| text.parse().map_err(|error| wrong_value(name, error))).collect()
    }

    fn body<T: DeserializeOwned>(&self) -> Result<T, Error> {
        if self.body.is_empty() {
            let message = "The request has no body";
            return Err(Error::new(ErrorCode::BadJson, message, "send a JSON object; see /v1/openapi.json"));
        }
        serde_json::from_slice(self.body).map_err(|error| {
            let (problem, remedy) = match error.classify() {
                serde_json::error::Category::Data => {
                    ("does not fit this route", "see /v1/openapi.json for its shape")
                }
                _ => ("is no JSON", "send one JSON object"),
            };
            Error::new(ErrorCode::BadJson, format!("The body {problem}: {error}"), remedy)
        })
    }
}

fn words<T: clap::ValueEnum>() -> String {
    let names = T::value_variants().iter().filter_map(clap::ValueEnum::to_possible_value);
    names.map(|value| value.get_name().to_owned()).collect::<Vec<_>>().join(" or ")
}

/// The error for a parameter whose parser says `problem: remedy`.
fn wrong_value(name: &str, error: impl std::fmt::Display) -> Error {
    let text = error.to_string();
    let (problem, remedy) = text.split_once(": ").unwrap_or((&text, "see /v1/openapi.json"));
    Error::new(ErrorCode::BadParameter, format!("Parameter {name}: {problem}"), remedy)
}

/// The JSON of a reply, with the number of the event that came before it.
///
/// # Errors
/// The reply cannot be written as JSON, which is a mistake of this program.
pub fn reply_json(reply: Reply, seq: u64) -> Result<serde_json::Value, Error> {
    let value = match reply {
        Reply::Done => serde_json::to_value(Done {}),
        Reply::Machine(info) => serde_json::to_value(info),
        Reply::MemoryList(memory) => serde_json::to_value(MemoryList { memory }),
        Reply::Memory(device) => serde_json::to_value(device),
        Reply::PoisonAdded(added) => serde_json::to_value(added),
        Reply::PoisonList(list) => serde_json::to_value(list),
        Reply::PoisonCleared(cleared) => serde_json::to_value(cleared),
        Reply::Operation(operation) => serde_json::to_value(operation),
    };
    let internal = |message: String| Error::new(ErrorCode::Internal, message, "report this as a bug");
    match value.map_err(|error| internal(format!("A reply cannot be written: {error}")))? {
        serde_json::Value::Object(mut object) => {
            object.insert("seq".to_owned(), seq.into());
            Ok(object.into())
        }
        other => Err(internal(format!("A reply is no object: {other}"))),
    }
}

#[cfg(test)]
#[path = "routes_test.rs"]
mod tests;
