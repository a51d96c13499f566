//! The one error of the configuration: it names the thing, its value, what is wrong, and what would be right.

use std::fmt;

use crate::command::{Error, ErrorCode};

/// A description of a machine that cannot be built, found before anything is started.
///
/// The four parts are separate so that no error can be made without one of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    /// What kind of mistake it is: the stable code that the API answers with.
    pub code: ErrorCode,
    /// The option, key or file that is wrong, such as `--pmem p0: size`.
    pub thing: String,
    /// Its value as it was given.
    pub value: String,
    /// Why that cannot be.
    pub problem: String,
    /// What would be right.
    pub remedy: String,
}

impl ConfigError {
    /// A value that makes no sense.
    pub fn invalid(
        thing: impl fmt::Display,
        value: impl fmt::Display,
        problem: impl fmt::Display,
        remedy: impl fmt::Display,
    ) -> Self {
        Self {
            code: ErrorCode::InvalidConfig,
            thing: thing.to_string(),
            value: value.to_string(),
            problem: problem.to_string(),
            remedy: remedy.to_string(),
        }
    }

    /// A key that does not exist, with the nearest one that does.
    pub fn unknown_key(thing: impl fmt::Display, key: &str, known: &[&str]) -> Self {
        let list = known.join(", ");
        let remedy = match nearest(key, known) {
            Some(near) => format!("did you mean {near:?}? Known: {list}"),
            None => format!("known: {list}"),
        };
        Self::invalid(thing, format_args!("{key:?}"), "there is no such key", remedy)
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Wrong {}", self.thing)?;
        if !self.value.is_empty() {
            write!(f, " {}", self.value)?;
        }
        write!(f, ": {}; {}", self.problem, self.remedy)
    }
}

impl std::error::Error for ConfigError {}

impl From<ConfigError> for Error {
    fn from(error: ConfigError) -> Self {
        let separator = if error.value.is_empty() { "" } else { " " };
        Self::new(
            error.code,
            format!("Wrong {}{separator}{}: {}", error.thing, error.value, error.problem),
            error.remedy,
        )
    }
}

/// Something odd that is accepted, with what it will lead to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Warning {
    /// The option or file.
    pub thing: String,
    /// What will happen, and how to avoid it.
    pub message: String,
}

impl Warning {
    /// Warnings with the same message become one, which names all that it is about.
    pub fn merged(warnings: Vec<Self>) -> Vec<Self> {
        let mut merged: Vec<Self> = Vec::new();
        for warning in warnings {
            match merged.iter_mut().find(|other| other.message == warning.message) {
                None => merged.push(warning),
                Some(other) => {
                    let option = other.thing.split_inclusive(' ').next().unwrap_or_default();
                    let thing = warning.thing.strip_prefix(option).unwrap_or(&warning.thing);
                    other.thing = format!("{}, {thing}", other.thing);
                }
            }
        }
        merged
    }
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.thing, self.message)
    }
}

/// The known word that is closest to `word`, if any is close enough to be a slip of the fingers.
pub fn nearest<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    // Words of a command line are short; anything longer is not a slip, and not worth the quadratic work.
    if word.len() > 64 {
        return None;
    }
    let limit = (word.chars().count() / 2).clamp(1, 3);
    known
        .iter()
        .map(|candidate| (distance(word, candidate), *candidate))
        .filter(|(distance, _)| *distance <= limit)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// Levenshtein distance in characters.
fn distance(left: &str, right: &str) -> usize {
    let right: Vec<char> = right.chars().collect();
    let mut row: Vec<usize> = (0..=right.len()).collect();
    for (i, l) in left.chars().enumerate() {
        let mut diagonal = i;
        row[0] = i + 1;
        for (j, r) in right.iter().enumerate() {
            let substituted = diagonal + usize::from(l != *r);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[right.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_warnings_become_one() {
        let warning = |thing: &str, message: &str| Warning { thing: thing.into(), message: message.into() };
        let merged = Warning::merged(vec![
            warning("--pmem p0", "too small"),
            warning("--pmem p0", "odd"),
            warning("--pmem p1", "too small"),
            warning("--disk d0", "too small"),
        ]);
        let texts: Vec<_> = merged.iter().map(Warning::to_string).collect();
        assert_eq!(texts, ["--pmem p0, p1, --disk d0: too small", "--pmem p0: odd"]);
    }

    #[test]
    fn nearest_words() {
        let known = ["file", "size", "id", "via", "channel", "readonly"];
        assert_eq!(nearest("sise", &known), Some("size"));
        assert_eq!(nearest("read-only", &known), Some("readonly"));
        assert_eq!(nearest("chanel", &known), Some("channel"));
        assert_eq!(nearest("banana", &known), None);
        assert_eq!(nearest("", &["ab"]), None);
        assert_eq!(distance("kitten", "sitting"), 3);
    }

    #[test]
    fn the_four_parts_are_all_in_the_text() {
        let error = ConfigError::invalid("--cpus", 0, "a machine needs a vCPU", "give 1 to 64");
        assert_eq!(error.to_string(), "Wrong --cpus 0: a machine needs a vCPU; give 1 to 64");
    }
}
