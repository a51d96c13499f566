//! The way from a request to what it means: finding the route, its parameters and its body.

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::http::percent_decode;
use super::routes::{Action, Done, MemoryList, ROUTES, Route};
use crate::command::{DiskReply, Error, ErrorCode, Reply};
use crate::config::nearest;
use crate::units::{ByteRange, TimeSpan};

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
pub(super) struct Input<'a> {
    segment: String,
    query: Vec<(&'static str, String)>,
    body: &'a [u8],
}

impl Input<'_> {
    pub fn id(&self) -> String {
        self.segment.clone()
    }

    pub fn segment(&self) -> &str {
        &self.segment
    }

    pub fn text(&self, name: &str) -> Option<&str> {
        self.query.iter().find(|(known, _)| *known == name).map(|(_, value)| value.as_str())
    }

    /// A parameter that is one of the words of `T`.
    pub fn optional<T: clap::ValueEnum>(&self, name: &str) -> Result<Option<T>, Error> {
        let Some(text) = self.text(name) else { return Ok(None) };
        match T::from_str(text, false) {
            Ok(value) => Ok(Some(value)),
            Err(_) => Err(wrong_value(name, format_args!("{text:?} is not known: give {}", words::<T>()))),
        }
    }

    /// A parameter that is a time.
    pub fn span(&self, name: &str) -> Result<Option<TimeSpan>, Error> {
        let span = |text: &str| text.parse().map_err(|error| wrong_value(name, error));
        self.text(name).map(span).transpose()
    }

    pub fn required<T: clap::ValueEnum>(&self, name: &str) -> Result<T, Error> {
        self.optional(name)?.ok_or_else(|| {
            Error::new(
                ErrorCode::BadParameter,
                format!("Parameter {name} is missing"),
                format!("give {name}={}", words::<T>()),
            )
        })
    }

    pub fn ranges(&self, name: &str) -> Result<Vec<ByteRange>, Error> {
        let texts = self.query.iter().filter(|(known, _)| *known == name);
        texts.map(|(_, text)| text.parse().map_err(|error| wrong_value(name, error))).collect()
    }

    pub fn body<T: DeserializeOwned>(&self) -> Result<T, Error> {
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
pub(super) fn wrong_value(name: &str, error: impl std::fmt::Display) -> Error {
    let text = error.to_string();
    let (problem, remedy) = text.split_once(": ").unwrap_or((&text, "see /v1/openapi.json"));
    Error::new(ErrorCode::BadParameter, format!("Parameter {name}: {problem}"), remedy)
}

/// A reply with the number of the event that came before it.
#[derive(Serialize)]
struct Numbered<T> {
    #[serde(flatten)]
    reply: T,
    seq: u64,
}

/// The JSON text of a reply, with the number of the event that came before it. It is written in one go: lists of poison
/// are long.
///
/// # Errors
/// The reply cannot be written as JSON, which is a mistake of this program.
pub fn reply_text(reply: &Reply, seq: u64) -> Result<Vec<u8>, Error> {
    fn text<T: Serialize>(reply: T, seq: u64) -> serde_json::Result<Vec<u8>> {
        serde_json::to_vec(&Numbered { reply, seq })
    }
    let text = match reply {
        Reply::Done => text(Done {}, seq),
        Reply::Machine(info) => text(info, seq),
        Reply::MemoryList(memory) => text(MemoryList { memory: memory.clone() }, seq),
        Reply::Memory(device) => text(device, seq),
        Reply::PoisonAdded(added) => text(added, seq),
        Reply::PoisonPlaced(placed) => text(placed, seq),
        Reply::PoisonPolicy(policy) => text(policy, seq),
        Reply::PoisonList(list) => text(list, seq),
        Reply::PoisonCleared(cleared) => text(cleared, seq),
        Reply::MceQueued(queued) => text(queued, seq),
        Reply::Cper(accepted) => text(accepted, seq),
        Reply::Census(census) => text(census, seq),
        Reply::Stale(stale) => text(stale, seq),
        Reply::Flush(state) => text(state, seq),
        Reply::Disk(DiskReply::List(disks)) => text(disks, seq),
        Reply::Disk(DiskReply::Disk(disk)) => text(disk, seq),
        Reply::Disk(DiskReply::Armed(armed)) => text(armed, seq),
        Reply::Disk(DiskReply::Disarmed(disarmed)) => text(disarmed, seq),
        Reply::Disk(DiskReply::Released(released)) => text(released, seq),
        Reply::Firmware(firmware) => text(firmware, seq),
        Reply::PowerLoss(loss) => text(loss, seq),
        Reply::Operation(operation) => text(operation, seq),
    };
    text.map_err(|error| {
        let message = format!("A reply cannot be written: {error}");
        Error::new(ErrorCode::Internal, message, "report this as a bug")
    })
}

#[cfg(test)]
#[path = "request_test.rs"]
mod tests;
