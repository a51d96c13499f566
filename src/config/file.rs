//! The machine file: the description in TOML.
//!
//! Relative paths in the file are relative to the file's own directory, so that a directory with a machine in it can
//! be moved and started from anywhere.

use std::fs;
use std::path::{Path, PathBuf};

use super::error::ConfigError;
use super::{Machine, PmemSource};

/// A machine file is at most this long; anything longer is some other file.
const MAX_LENGTH: u64 = 1 << 20;

impl Machine {
    /// Reads a machine file. What it does not say keeps its default.
    ///
    /// # Errors
    /// The file cannot be read, is no TOML, or says something that no machine has; with the line.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let shown = path.display();
        let length = match fs::metadata(path) {
            Ok(metadata) if metadata.is_dir() => {
                return Err(ConfigError::invalid(
                    "--config",
                    shown,
                    "it is a directory",
                    "name a machine file",
                ));
            }
            Ok(metadata) => metadata.len(),
            Err(error) => {
                return Err(ConfigError::invalid(
                    "--config",
                    shown,
                    error,
                    "name a machine file that can be read",
                ));
            }
        };
        if length > MAX_LENGTH {
            return Err(ConfigError::invalid(
                "--config",
                shown,
                format_args!("it has {length} bytes, and a machine file at most {MAX_LENGTH}"),
                "name a machine file in TOML",
            ));
        }
        let text = fs::read_to_string(path).map_err(|error| {
            ConfigError::invalid("--config", shown, error, "name a machine file that can be read")
        })?;
        let mut machine = Self::from_toml(&path.display().to_string(), &text)?;
        let base = path.parent().unwrap_or(Path::new(""));
        machine.rebase(base);
        Ok(machine)
    }

    /// Parses the text of a machine file; `name` is what errors call it.
    ///
    /// # Errors
    /// The text is no TOML, or says something that no machine has; with the line.
    pub fn from_toml(name: &str, text: &str) -> Result<Self, ConfigError> {
        toml::from_str(text).map_err(|error| {
            let line = error.span().map_or(1, |span| {
                1 + text.as_bytes().iter().take(span.start).filter(|byte| **byte == b'\n').count()
            });
            let thing = format!("machine file {name}, line {line}");
            let message = error.message();
            match unknown_field(message) {
                Some((field, known)) => ConfigError::unknown_key(thing, field, &known),
                None => {
                    let value = error.span().and_then(|span| text.get(span)).and_then(|v| v.lines().next());
                    let (problem, remedy) = message
                        .split_once(": ")
                        .or_else(|| message.split_once("; "))
                        .unwrap_or((message, "correct this line"));
                    ConfigError::invalid(thing, value.unwrap_or_default(), problem, remedy)
                }
            }
        })
    }

    /// Writes the description as a machine file that reads back to the same machine.
    ///
    /// # Errors
    /// A path that is no UTF-8, which TOML cannot carry.
    pub fn to_toml(&self) -> Result<String, ConfigError> {
        toml::to_string(self).map_err(|error| {
            ConfigError::invalid("machine", "", error, "use paths in UTF-8, which a TOML file can carry")
        })
    }

    fn rebase(&mut self, base: &Path) {
        let rebase = |path: &mut PathBuf| {
            if path.is_relative() && !path.as_os_str().is_empty() {
                *path = base.join(&path);
            }
        };
        rebase(&mut self.kernel);
        let paths =
            [&mut self.initrd, &mut self.api_socket, &mut self.modules, &mut self.run_dir, &mut self.state];
        for path in paths {
            path.iter_mut().for_each(rebase);
        }
        self.files.iter_mut().for_each(|file| rebase(&mut file.source));
        let pmem = self.pmem.iter_mut().map(|pmem| &mut pmem.source);
        for source in pmem.chain(self.disk.iter_mut().map(|disk| &mut disk.source)) {
            if let PmemSource::File { path, .. } = source {
                rebase(path);
            }
        }
        // A tool with a slash in it is a path; a bare name is looked for in PATH.
        for tool in self.tools.iter_mut().filter(|tool| tool.contains('/') && !tool.starts_with('/')) {
            *tool = base.join(&tool).display().to_string();
        }
    }
}

/// Takes serde's words "unknown field `x`, expected one of `a`, `b`" apart.
fn unknown_field(message: &str) -> Option<(&str, Vec<&str>)> {
    let rest = message.strip_prefix("unknown field `")?;
    let (field, rest) = rest.split_once('`')?;
    let known = rest.split('`').skip(1).step_by(2).collect();
    Some((field, known))
}
