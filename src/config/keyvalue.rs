//! `key=value,key=value` lists of the command line.
//!
//! A comma inside a value is written twice (`file=/tmp/a,,b`), as QEMU's users know it.

use std::fmt::Display;
use std::str::FromStr;

use super::error::ConfigError;

/// The parsed list; keys are taken out one by one, and what is left at the end is unknown.
#[derive(Debug)]
pub struct KeyValues {
    option: String,
    pairs: Vec<(String, String)>,
}

impl KeyValues {
    /// Splits `text`, the value of `option`.
    ///
    /// # Errors
    /// Names the part that has no `=`, an empty key, or a key given twice.
    pub fn parse(option: &str, text: &str) -> Result<Self, ConfigError> {
        let mut pairs: Vec<(String, String)> = Vec::new();
        for part in split(text) {
            let Some((key, value)) = part.split_once('=') else {
                return Err(ConfigError::invalid(
                    option,
                    format_args!("{text:?}"),
                    format_args!("{part:?} has no value"),
                    "write key=value,key=value (a comma inside a value is written twice)",
                ));
            };
            let key = key.trim();
            if key.is_empty() {
                return Err(ConfigError::invalid(
                    option,
                    format_args!("{text:?}"),
                    format_args!("{part:?} has no key"),
                    "write key=value",
                ));
            }
            if pairs.iter().any(|(known, _)| known == key) {
                return Err(ConfigError::invalid(
                    option,
                    format_args!("{text:?}"),
                    format_args!("{key} is given twice"),
                    "give each key once",
                ));
            }
            pairs.push((key.to_owned(), value.to_owned()));
        }
        Ok(Self { option: option.to_owned(), pairs })
    }

    /// Takes the value of `key` out as text.
    pub fn take_text(&mut self, key: &str) -> Option<String> {
        let index = self.pairs.iter().position(|(known, _)| known == key)?;
        Some(self.pairs.swap_remove(index).1)
    }

    /// Takes the value of `key` out and parses it.
    ///
    /// # Errors
    /// The parser's own words, with the option and the key; they name the value and what would be right.
    pub fn take<T>(&mut self, key: &str) -> Result<Option<T>, ConfigError>
    where
        T: FromStr,
        T::Err: Display,
    {
        let Some(text) = self.take_text(key) else { return Ok(None) };
        match text.parse() {
            Ok(value) => Ok(Some(value)),
            Err(error) => Err(from_parser(&self.option, key, &text, error)),
        }
    }

    /// Takes the value of a switch out: `on` or `off`.
    ///
    /// # Errors
    /// Any other word.
    pub fn take_switch(&mut self, key: &str) -> Result<Option<bool>, ConfigError> {
        match self.take_text(key).as_deref() {
            None => Ok(None),
            Some("on" | "true" | "yes") => Ok(Some(true)),
            Some("off" | "false" | "no") => Ok(Some(false)),
            Some(other) => Err(ConfigError::invalid(
                &self.option,
                format_args!("{key}={other}"),
                "this is a switch",
                format_args!("give {key}=on or {key}=off"),
            )),
        }
    }

    /// Ends the parsing: any key still here is not one of `known`.
    ///
    /// # Errors
    /// Names the first unknown key, the nearest known one, and all that are known.
    pub fn finish(mut self, known: &[&str]) -> Result<(), ConfigError> {
        match self.pairs.drain(..).next() {
            Some((key, _)) => Err(ConfigError::unknown_key(&self.option, &key, known)),
            None => Ok(()),
        }
    }
}

/// A parser's error in the form of the configuration: its text is `problem: remedy`.
pub fn from_parser(option: &str, key: &str, text: &str, error: impl Display) -> ConfigError {
    let message = error.to_string();
    let (problem, remedy) = message.split_once(": ").unwrap_or((message.as_str(), "see --help"));
    ConfigError::invalid(option, format_args!("{key}={text}"), problem, remedy)
}

/// Splits at single commas and turns double commas into one.
fn split(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        let last = parts.len() - 1;
        if c != ',' {
            parts[last].push(c);
        } else if chars.next_if_eq(&',').is_some() {
            parts[last].push(',');
        } else {
            parts.push(String::new());
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::units::Size;

    #[test]
    fn takes_and_finishes() {
        let mut list = KeyValues::parse("--pmem", "file=/a,,b,size=1G,readonly=on").unwrap();
        assert_eq!(list.take_text("file").as_deref(), Some("/a,b"));
        assert_eq!(list.take::<Size>("size"), Ok(Some(Size(1 << 30))));
        assert_eq!(list.take_switch("readonly"), Ok(Some(true)));
        assert_eq!(list.finish(&["file"]), Ok(()));
    }

    #[test]
    fn every_mistake_has_its_words() {
        let text = |result: Result<KeyValues, ConfigError>| result.map(|_| ()).unwrap_err().to_string();
        assert_eq!(
            text(KeyValues::parse("--pmem", "1G")),
            "Wrong --pmem \"1G\": \"1G\" has no value; write key=value,key=value (a comma inside a value is written twice)"
        );
        assert_eq!(
            text(KeyValues::parse("--pmem", "=1G")),
            "Wrong --pmem \"=1G\": \"=1G\" has no key; write key=value"
        );
        assert_eq!(
            text(KeyValues::parse("--pmem", "id=a,id=b")),
            "Wrong --pmem \"id=a,id=b\": id is given twice; give each key once"
        );
        let mut list = KeyValues::parse("--pmem", "size=1Q,readonly=maybe,sice=1G").unwrap();
        assert_eq!(
            list.take::<Size>("size").unwrap_err().to_string(),
            "Wrong --pmem size=1Q: \"1Q\" is not a size; write a whole number with K, M, G or T (powers of 1024), such as 512M or 1GiB"
        );
        assert_eq!(
            list.take_switch("readonly").unwrap_err().to_string(),
            "Wrong --pmem readonly=maybe: this is a switch; give readonly=on or readonly=off"
        );
        assert_eq!(
            list.finish(&["size", "id"]).unwrap_err().to_string(),
            "Wrong --pmem \"sice\": there is no such key; did you mean \"size\"? Known: size, id"
        );
    }

    proptest! {
        #[test]
        fn any_text_is_taken_or_refused(text in "\\PC{0,60}") {
            let _ = KeyValues::parse("--pmem", &text);
        }

        #[test]
        fn commas_survive(value in "[a-z,]{1,20}") {
            let text = format!("file={},id=x", value.replace(',', ",,"));
            let mut list = KeyValues::parse("--pmem", &text).unwrap();
            prop_assert_eq!(list.take_text("file"), Some(value));
        }
    }
}
