//! The host: which KVM is here, where guest material lives, and the software KVM host for machines without one.
//!
//! Everything that depends on the machine Aconite runs on is in this module; nothing else in the program asks.

pub mod attach;
pub mod doctor;
pub mod manifest;
pub mod material;
pub mod nested;
pub mod probe;
pub mod resources;
pub mod sys;
pub mod usage;

use crate::config::HostChoice;
use nested::{INSIDE_COMMAND, KEEPER_COMMAND, NestedError};
use probe::Kvm;
use std::ffi::OsString;

/// Where a machine is to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Where {
    /// On the KVM of the system that this process runs on.
    Kvm,
    /// In the software KVM host: this process becomes its front end ([`nested::front::run`]).
    Nested {
        /// Why, in a sentence; `None` if it was asked for.
        why: Option<String>,
    },
}

/// The KVM that was asked for is not to be had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{kvm}. Remedy: {remedy}")]
pub struct NoKvm {
    kvm: Kvm,
    remedy: &'static str,
}

/// Decides where a machine is to run.
///
/// # Errors
/// KVM was asked for and cannot be used.
pub fn choose(choice: HostChoice) -> Result<Where, NoKvm> {
    decide(choice, is_inside(), probe::kvm)
}

fn decide(choice: HostChoice, inside: bool, kvm: impl FnOnce() -> Kvm) -> Result<Where, NoKvm> {
    // The same command line runs again inside, whatever it says of the host.
    let choice = if inside { HostChoice::Kvm } else { choice };
    if choice == HostChoice::Nested {
        return Ok(Where::Nested { why: None });
    }
    let kvm = kvm();
    match (kvm.remedy(), choice) {
        (None, _) => Ok(Where::Kvm),
        (Some(_), HostChoice::Auto) => Ok(Where::Nested { why: Some(kvm.to_string()) }),
        (Some(remedy), _) => Err(NoKvm { kvm, remedy }),
    }
}

/// Whether this process runs inside the software KVM host.
pub fn is_inside() -> bool {
    std::env::var_os(nested::front::INSIDE_VARIABLE).is_some()
}

/// Serves the hidden commands, which come before any parsing of the command line: `__keeper`, and
/// `__inside COMMAND...`, which runs a command of the host inside the software KVM host. Returns the exit status, or
/// `None` for any other command line.
///
/// # Errors
/// The software KVM host cannot be started or is lost.
pub fn hidden_command() -> Option<Result<u8, NestedError>> {
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    let first = arguments.first()?;
    if first == KEEPER_COMMAND {
        Some(nested::keep().map(|()| 0))
    } else if first == INSIDE_COMMAND {
        Some(nested::front::inside(&arguments))
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auto_goes_where_machines_can_run() {
        let usable = || Kvm::Usable { extension: "svm" };
        assert_eq!(decide(HostChoice::Auto, false, usable), Ok(Where::Kvm));
        assert_eq!(decide(HostChoice::Nested, false, usable), Ok(Where::Nested { why: None }));
        let auto = decide(HostChoice::Auto, false, || Kvm::Software).unwrap();
        assert!(matches!(auto, Where::Nested { why: Some(why) } if why.contains("svm")));
        let error = decide(HostChoice::Kvm, false, || Kvm::NotPermitted).unwrap_err();
        assert!(error.to_string().contains("Remedy: add this user"), "{error}");
    }

    #[test]
    fn inside_it_is_always_kvm() {
        assert_eq!(decide(HostChoice::Nested, true, || Kvm::Usable { extension: "svm" }), Ok(Where::Kvm));
        assert!(
            decide(HostChoice::Auto, true, || Kvm::Software).is_err(),
            "never a host in a host in a host"
        );
    }
}
