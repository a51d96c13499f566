//! `aconite doctor`: what this host can do, what is missing, and what helps.

use super::manifest::{DEFAULT_KERNEL, NESTED_KERNEL};
use super::material::{FETCH_REMEDY, Material, Qemu, SystemRoot, find_on_path, first_number};
use super::probe::{self, Kvm};
use super::resources::Resources;
use serde::Serialize;
use std::fmt;
use std::process::{Command, Stdio};

/// QEMU versions that were tried under the software KVM host.
const TRIED_QEMU: &[&str] = &["10.0"];

/// Guest kernels that were tried.
const TRIED_KERNELS: &[&str] = &["6.1", "6.12", "7.2"];

/// A program for guests: its name, the package it comes in, the option that prints its version, versions tried.
struct Tool {
    name: &'static str,
    package: &'static str,
    version_option: &'static str,
    tried: &'static [&'static str],
}

const TOOLS: [Tool; 6] = [
    Tool { name: "busybox", package: "busybox-static", version_option: "--help", tried: &["1.37"] },
    Tool { name: "ndctl", package: "ndctl", version_option: "--version", tried: &["81"] },
    Tool { name: "daxctl", package: "daxctl", version_option: "--version", tried: &["81"] },
    Tool { name: "cxl", package: "cxl", version_option: "--version", tried: &["81"] },
    Tool { name: "mke2fs", package: "e2fsprogs", version_option: "-V", tried: &["1.47"] },
    Tool { name: "mkfs.xfs", package: "xfsprogs", version_option: "-V", tried: &["6.13"] },
];

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Mark {
    /// All is well.
    Ok,
    /// It works, with a reservation that the text names.
    Note,
    /// It is not there, or does not work.
    Missing,
}

/// One line of the report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// How it ended.
    pub mark: Mark,
    /// What was looked at: `KVM`, `kernel 6.12`.
    pub subject: String,
    /// What was found.
    pub found: String,
    /// What helps.
    pub remedy: Option<String>,
}

/// All checks, and whether machines can run here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// The checks, in order.
    pub checks: Vec<Check>,
    /// Where machines would run: `kvm`, `nested`, or `None` if nowhere.
    pub host: Option<&'static str>,
}

/// Looks at this host.
pub fn examine() -> Report {
    let material = Material::find();
    let kvm = probe::kvm();
    let nested_needed = !kvm.usable();
    let qemu = Qemu::find(material.as_ref());
    let nested_kernel = material.as_ref().and_then(|m| m.kernel(NESTED_KERNEL));
    let host = if kvm.usable() {
        Some("kvm")
    } else {
        (qemu.is_some() && nested_kernel.is_some()).then_some("nested")
    };
    let mut checks =
        vec![kvm_check(&kvm), resources_check(nested_needed), qemu_check(qemu.as_ref(), nested_needed)];
    checks.push(kernel_check(NESTED_KERNEL, nested_kernel.map(|k| k.release), nested_needed));
    let guest = material.as_ref().and_then(|m| m.kernel(DEFAULT_KERNEL));
    checks.push(kernel_check(DEFAULT_KERNEL, guest.map(|k| k.release), true));
    for kernel in material.iter().flat_map(Material::kernels) {
        if kernel.name != DEFAULT_KERNEL && kernel.name != NESTED_KERNEL {
            checks.push(kernel_check(&kernel.name, Some(kernel.release), false));
        }
    }
    let tools = material.as_ref().and_then(Material::tools);
    checks.extend(TOOLS.iter().map(|tool| tool_check(tool, tools.as_ref())));
    Report { checks, host }
}

fn kvm_check(kvm: &Kvm) -> Check {
    Check {
        mark: if kvm.usable() { Mark::Ok } else { Mark::Missing },
        subject: "KVM".into(),
        found: kvm.to_string(),
        remedy: kvm.remedy().map(str::to_owned),
    }
}

fn resources_check(nested: bool) -> Check {
    let resources = Resources::of_this_host();
    let mut check = Check {
        mark: Mark::Ok,
        subject: "resources".into(),
        found: format!(
            "{} processors, {} MiB of memory available",
            resources.cpus,
            resources.available >> 20
        ),
        remedy: None,
    };
    if nested && let Err(error) = resources.nested_memory() {
        check.mark = Mark::Missing;
        check.found = error.to_string();
        check.remedy = Some("end other programs, or use a larger host".into());
    }
    check
}

fn qemu_check(qemu: Option<&Qemu>, needed: bool) -> Check {
    let subject = "QEMU".to_owned();
    match qemu {
        None => Check {
            mark: if needed { Mark::Missing } else { Mark::Note },
            subject,
            found: "not found; the software KVM host needs it".into(),
            remedy: Some(format!("{FETCH_REMEDY}, or install qemu-system-x86")),
        },
        Some(qemu) => {
            let place = qemu.program().map(|p| format!(" ({})", p.display())).unwrap_or_default();
            with_version(subject, &qemu.version, &place, TRIED_QEMU)
        }
    }
}

fn kernel_check(name: &str, release: Option<String>, needed: bool) -> Check {
    let subject = format!("kernel {name}");
    match release {
        Some(release) => {
            let version = first_number(&release).unwrap_or_default();
            let rest = release.strip_prefix(&version).unwrap_or_default().to_owned();
            with_version(subject, &version, &rest, TRIED_KERNELS)
        }
        None => Check {
            mark: if needed { Mark::Missing } else { Mark::Note },
            subject,
            found: if name == NESTED_KERNEL {
                "not fetched; the software KVM host runs on it".into()
            } else {
                "not fetched; guests need a kernel (or name one with -k PATH)".into()
            },
            remedy: Some(FETCH_REMEDY.into()),
        },
    }
}

fn tool_check(tool: &Tool, fetched: Option<&SystemRoot>) -> Check {
    let subject = tool.name.to_owned();
    if let Some(root) = fetched
        && root.program(tool.name).is_some()
        && let Some(version) = root.package_version(tool.package).and_then(first_number)
    {
        return with_version(subject, &version, "", tool.tried);
    }
    match find_on_path(tool.name) {
        None => Check {
            mark: Mark::Missing,
            subject,
            found: "not found; guests go without it".into(),
            remedy: Some(format!("{FETCH_REMEDY}, or install {}", tool.package)),
        },
        Some(path) => {
            let output = Command::new(&path).arg(tool.version_option).stdin(Stdio::null()).output();
            let text = output.map(|o| [o.stdout, o.stderr].concat()).unwrap_or_default();
            let version =
                first_number(&String::from_utf8_lossy(&text)).unwrap_or_else(|| "unknown version".into());
            with_version(subject, &version, &format!(" ({})", path.display()), tool.tried)
        }
    }
}

fn with_version(subject: String, version: &str, rest: &str, tried: &[&str]) -> Check {
    let known =
        tried.iter().any(|t| version == *t || version.strip_prefix(t).is_some_and(|r| r.starts_with('.')));
    let (mark, note) = match known {
        true => (Mark::Ok, String::new()),
        false => (Mark::Note, format!("; never tried, {} was", tried.join(", "))),
    };
    Check { mark, subject, found: format!("{version}{rest}{note}"), remedy: None }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for check in &self.checks {
            let mark = match check.mark {
                Mark::Ok => "ok",
                Mark::Note => "note",
                Mark::Missing => "missing",
            };
            writeln!(f, "{mark:<8} {:<18} {}", check.subject, check.found)?;
            if let Some(remedy) = &check.remedy {
                writeln!(f, "{:<27} remedy: {remedy}", "")?;
            }
        }
        match self.host {
            Some("kvm") => writeln!(f, "Machines run here on KVM."),
            Some(_) => writeln!(f, "Machines run here in the software KVM host (--host nested)."),
            None => writeln!(f, "No machine can run here."),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_never_tried_are_named() {
        assert_eq!(with_version("QEMU".into(), "10.0.13", "", TRIED_QEMU).mark, Mark::Ok);
        let check = with_version("QEMU".into(), "10.10.1", " (/usr/bin/q)", TRIED_QEMU);
        assert_eq!(check.mark, Mark::Note);
        assert_eq!(check.found, "10.10.1 (/usr/bin/q); never tried, 10.0 was");
        assert_eq!(with_version("ndctl".into(), "81", "", &["81"]).mark, Mark::Ok);
        assert_eq!(with_version("kernel".into(), "6.12", "", &["6.1"]).mark, Mark::Note);
    }

    #[test]
    fn what_is_missing_has_a_remedy() {
        for check in [kernel_check("6.12", None, true), qemu_check(None, true), kvm_check(&Kvm::Software)] {
            assert_eq!(check.mark, Mark::Missing);
            assert!(check.remedy.is_some(), "{}", check.subject);
        }
        assert_eq!(qemu_check(None, false).mark, Mark::Note, "a host with KVM needs no QEMU");
    }

    #[test]
    fn this_host_is_examined() {
        let report = examine();
        let text = report.to_string();
        assert!(report.checks.iter().any(|check| check.subject == "KVM"));
        assert!(
            text.lines().last().is_some_and(|line| line.contains("machine") || line.contains("Machines"))
        );
        if probe::kvm().usable() {
            assert_eq!(report.host, Some("kvm"));
        } else {
            assert_ne!(report.host, Some("kvm"));
        }
    }
}
