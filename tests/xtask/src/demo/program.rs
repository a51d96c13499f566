//! The built program, called as a user calls it; each call is shown.

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The program, and the socket of the machine that is asked.
pub struct Program {
    root: PathBuf,
    path: PathBuf,
    socket: PathBuf,
}

impl Program {
    /// Builds the program in release mode; cargo shows its progress. Commands are run in `root`, the top of the tree.
    pub fn build(root: &Path, socket: &Path) -> Result<Self> {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let output = Command::new(cargo)
            .args(["build", "--release", "--package", "aconite", "--bin", "aconite"])
            .arg("--message-format=json-render-diagnostics")
            .current_dir(root)
            .stderr(Stdio::inherit())
            .output()
            .context("Cannot start cargo")?;
        ensure!(output.status.success(), "aconite could not be built: see the messages of cargo above");
        let path = String::from_utf8_lossy(&output.stdout)
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok())
            .filter(|message| message["target"]["name"] == "aconite")
            .find_map(|message| message["executable"].as_str().map(PathBuf::from))
            .context("cargo has built aconite and does not say where it is")?;
        Ok(Program { root: root.into(), path, socket: socket.into() })
    }

    /// A call of the program, which it shows.
    pub fn command(&self, arguments: &[&OsStr]) -> Command {
        let shown = self.path.strip_prefix(&self.root).unwrap_or(&self.path);
        let words: Vec<_> = arguments.iter().map(|word| quoted(&word.to_string_lossy())).collect();
        println!("$ {} {}", shown.display(), words.join(" "));
        let mut command = Command::new(&self.path);
        command.args(arguments).current_dir(&self.root);
        command
    }

    /// Asks the machine; the lines of the answer.
    fn ask(&self, request: &[&str]) -> Result<Vec<Value>> {
        let mut arguments: Vec<&OsStr> = vec!["ctl".as_ref(), "-s".as_ref(), self.socket.as_ref()];
        arguments.push("--json".as_ref());
        arguments.extend(request.iter().map(OsStr::new));
        let output =
            self.command(&arguments).stdin(Stdio::null()).output().context("Cannot start aconite")?;
        if !output.status.success() {
            let text = [output.stdout, output.stderr].concat();
            bail!("aconite ctl {}: {}", request.join(" "), String::from_utf8_lossy(&text).trim());
        }
        let text = String::from_utf8(output.stdout).context("aconite ctl does not answer in UTF-8")?;
        text.lines()
            .map(|line| serde_json::from_str(line).with_context(|| format!("{line:?} is not JSON")))
            .collect()
    }

    /// Asks the machine for one thing.
    pub fn ctl(&self, request: &[&str]) -> Result<Value> {
        let answer = self.ask(request)?;
        Ok(answer.into_iter().next().unwrap_or_default())
    }

    /// The events after number `since`.
    pub fn events(&self, since: u64) -> Result<Vec<Value>> {
        self.ask(&["events", "--since", &since.to_string()])
    }
}

/// A number that is written as such or as text in hexadecimal.
pub fn number(value: &Value) -> Option<u64> {
    match value {
        Value::String(text) => u64::from_str_radix(text.strip_prefix("0x")?, 16).ok(),
        other => other.as_u64(),
    }
}

/// A word as it would be written for a shell.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=,:+@".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn numbers_in_both_forms() {
        assert_eq!(number(&json!("0x100000000")), Some(1 << 32));
        assert_eq!(number(&json!(64)), Some(64));
        assert_eq!(number(&json!("64")), None);
        assert_eq!(number(&json!(null)), None);
    }

    #[test]
    fn words_are_quoted_where_a_shell_needs_it() {
        assert_eq!(quoted("file=a/b.img,size=1G"), "file=a/b.img,size=1G");
        assert_eq!(quoted("it's here"), "'it'\\''s here'");
        assert_eq!(quoted(""), "''");
    }
}
