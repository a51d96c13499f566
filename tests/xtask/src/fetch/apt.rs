//! apt with a private configuration: other releases than the host's own, no root, nothing installed.
//!
//! Addresses come from the host's own source list, so none is written down here. Signatures and checksums are
//! verified by apt as always: indexes against the distribution's keyring, packages against the indexes.

use anyhow::{Context, Result, bail, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

/// The keyring that the host's `debian-archive-keyring` package installs.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// A package file that apt would download.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Download {
    /// Package name.
    pub name: String,
    /// Package version.
    pub version: String,
    /// Size in bytes.
    pub size: u64,
    /// SHA-256 according to the signed index, in hexadecimal.
    pub sha256: String,
}

/// apt for one release.
pub struct Apt {
    conf: PathBuf,
    suite: String,
}

impl Apt {
    /// Prepares a private configuration for `suite` below `dir`. Nothing is downloaded yet.
    ///
    /// Errors: no apt here, no usable address in the host's configuration, or `dir` cannot be written.
    pub fn new(dir: &Path, suite: &str) -> Result<Self> {
        let site = archive_address()?;
        let dir = dir.join(suite);
        for sub in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(dir.join(sub))
                .with_context(|| format!("Cannot create {}", dir.join(sub).display()))?;
        }
        // An empty status file: every dependency is listed, whatever the host has installed.
        write(&dir.join("status"), "")?;
        let keyring =
            if Path::new(KEYRING).exists() { format!("Signed-By: {KEYRING}\n") } else { String::new() };
        write(
            &dir.join("list.sources"),
            &format!(
                "Types: deb\nURIs: {site}\nSuites: {suite}\nComponents: main\nTargets: Packages\n{keyring}"
            ),
        )?;
        let d = dir.display();
        let conf = dir.join("apt.conf");
        write(
            &conf,
            &format!(
                "#clear APT::Update::Post-Invoke;\n#clear APT::Update::Post-Invoke-Success;\n\
                 Dir::State \"{d}\";\nDir::State::lists \"{d}/lists\";\nDir::State::status \"{d}/status\";\n\
                 Dir::Cache \"{d}/cache\";\nDir::Etc::sourcelist \"{d}/list.sources\";\n\
                 Dir::Etc::sourceparts \"/dev/null\";\nDir::Etc::preferences \"/dev/null\";\n\
                 Dir::Etc::preferencesparts \"/dev/null\";\nAPT::Sandbox::User \"root\";\n\
                 APT::Architecture \"amd64\";\nAcquire::Languages \"none\";\nAcquire::PDiffs \"false\";\n\
                 Acquire::ForceHash \"sha256\";\nAcquire::Retries \"3\";\nDebug::NoLocking \"true\";\n"
            ),
        )?;
        Ok(Apt { conf, suite: suite.to_owned() })
    }

    fn command(&self) -> Command {
        let mut command = Command::new("apt-get");
        command.arg("-c").arg(&self.conf).env("LC_ALL", "C").stdin(Stdio::null());
        command
    }

    /// Downloads the release's index and verifies its signature.
    pub fn update(&self) -> Result<()> {
        let output = run(self.command().args(["-q", "update"]))?;
        let errors = String::from_utf8_lossy(&output.stderr);
        if errors.contains("NO_PUBKEY") {
            bail!(
                "The host's keyring lacks the key that signs Debian {}. Remedy: upgrade the package \
                 debian-archive-keyring",
                self.suite
            );
        }
        ensure!(
            output.status.success() && !errors.contains("Failed to fetch"),
            "apt-get update failed for Debian {}: {}. Remedy: check that `apt-get update` works on this host",
            self.suite,
            errors.trim()
        );
        Ok(())
    }

    /// What installing `packages` on an empty system would download, in apt's order.
    pub fn closure(&self, packages: &[&str]) -> Result<Vec<Download>> {
        let output = run(self
            .command()
            .args(["-q", "install", "-y", "--no-install-recommends", "--print-uris"])
            .args(packages))?;
        ensure!(
            output.status.success(),
            "apt-get cannot resolve {} in Debian {}: {}",
            packages.join(" "),
            self.suite,
            String::from_utf8_lossy(&output.stderr).trim()
        );
        let text = String::from_utf8_lossy(&output.stdout);
        let list: Vec<_> = text.lines().filter(|line| line.starts_with('\'')).collect();
        ensure!(
            !list.is_empty(),
            "apt-get lists no package for {} in Debian {}",
            packages.join(" "),
            self.suite
        );
        list.into_iter()
            .map(|line| {
                parse_uri_line(line)
                    .with_context(|| format!("apt-get printed what is not understood: {line}"))
            })
            .collect()
    }

    /// Starts downloading `list` into the directory `into`, which must exist. apt checks each checksum.
    pub fn download(&self, list: &[Download], into: &Path) -> Result<Child> {
        self.command()
            .args(["-q", "download"])
            .args(list.iter().map(|d| format!("{}={}", d.name, d.version)))
            .current_dir(into)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("Cannot start apt-get")
    }
}

/// Reads one line of `apt-get install --print-uris`: quoted address, file name, size, `SHA256:digest`.
fn parse_uri_line(line: &str) -> Option<Download> {
    let mut words = line.split_ascii_whitespace().skip(1);
    let file = words.next()?;
    let size = words.next()?.parse().ok()?;
    let sha256 = words.next()?.strip_prefix("SHA256:")?.to_owned();
    let mut parts = file.strip_suffix(".deb")?.split('_');
    let name = parts.next()?.to_owned();
    let version = parts.next()?.replace("%3a", ":");
    Some(Download { name, version, size, sha256 })
}

/// The address of the host's Debian archive.
fn archive_address() -> Result<String> {
    let output = run(Command::new("apt-get").env("LC_ALL", "C").args([
        "indextargets",
        "--no-release-info",
        "--format",
        "$(REPO_URI) $(RELEASE) $(COMPONENT)",
        "Identifier: Packages",
    ]))
    .context(
        "The packages of Debian are read with apt-get. Remedy: run this on Debian or one of its derivatives",
    )?;
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let codename =
        release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME=")).unwrap_or_default();
    choose_address(&String::from_utf8_lossy(&output.stdout), codename.trim_matches('"')).context(
        "The host's apt configuration names no Debian archive. Remedy: add one with `deb` lines for this release to \
         /etc/apt/sources.list.d",
    )
}

/// Chooses among lines of `address release component`: the host's own release first, and never the archive of
/// security updates, which holds no whole release.
fn choose_address(targets: &str, codename: &str) -> Option<String> {
    let lines = || {
        targets.lines().filter_map(|line| {
            let mut words = line.split(' ');
            Some((words.next()?, words.next()?, words.next()?))
        })
    };
    lines()
        .find(|(_, release, component)| *release == codename && *component == "main")
        .or_else(|| {
            lines().find(|(_, release, component)| !release.contains("security") && *component == "main")
        })
        .map(|(address, ..)| address.to_owned())
}

fn run(command: &mut Command) -> Result<Output> {
    command.output().with_context(|| format!("Cannot start {}", command.get_program().to_string_lossy()))
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("Cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uri_lines() {
        let line =
            "'http://a.invalid/p/n/ndctl_81-1_amd64.deb' zlib1g_1%3a1.3.1-1+b1_amd64.deb 88892 SHA256:00ff";
        assert_eq!(
            parse_uri_line(line),
            Some(Download {
                name: "zlib1g".into(),
                version: "1:1.3.1-1+b1".into(),
                size: 88892,
                sha256: "00ff".into()
            })
        );
        assert_eq!(parse_uri_line("'http://a.invalid/x.deb' x.deb 88892 MD5Sum:00"), None);
        assert_eq!(parse_uri_line("'"), None);
    }

    #[test]
    fn the_host_release_names_the_archive() {
        let targets = "http://s.invalid/sec bookworm-security main\nhttp://o.invalid/x nodistro main\n\
                       http://d.invalid/debian bookworm main\n";
        assert_eq!(choose_address(targets, "bookworm").as_deref(), Some("http://d.invalid/debian"));
        assert_eq!(choose_address(targets, "forky").as_deref(), Some("http://o.invalid/x"));
        assert_eq!(choose_address("", "bookworm"), None);
    }
}
