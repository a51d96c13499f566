//! Builds the guest agent as a static program, so that the monitor carries it.
//!
//! The agent is a package of the same workspace with other flags (C library linked in, small), so it
//! is built by a cargo of its own with a target directory of its own: the outer build's lock, wrappers
//! (clippy) and flags (coverage, sanitizers) stay out of it. `ACONITE_AGENT` tells the crate
//! where the program is.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, process};

const TARGET: &str = "x86_64-unknown-linux-gnu";

fn main() {
    let root = PathBuf::from(variable("CARGO_MANIFEST_DIR"));
    println!("cargo::rerun-if-changed=src/build.rs");
    for source in ["resources/agent/src", "resources/agent/Cargo.toml"] {
        println!("cargo::rerun-if-changed={}", root.join(source).display());
    }
    let target_dir = Path::new(&variable("OUT_DIR")).join("agent");
    let mut cargo = Command::new(variable("CARGO"));
    cargo.current_dir(&root).args(["build", "--release", "--locked", "--offline", "--quiet"]);
    cargo.args(["--package", "aconite-agent", "--bin", "aconite-agent", "--target", TARGET]);
    cargo.arg("--target-dir").arg(&target_dir);
    for setting in ["opt-level='s'", "lto='fat'", "codegen-units=1", "panic='abort'", "strip='symbols'"] {
        cargo.arg("--config").arg(format!("profile.release.{setting}"));
    }
    for (name, _) in env::vars_os() {
        if name.to_str().is_some_and(belongs_to_outer_build) {
            cargo.env_remove(name);
        }
    }
    cargo.env("CARGO_ENCODED_RUSTFLAGS", "-Ctarget-feature=+crt-static");
    let built = cargo.status().is_ok_and(|status| status.success());
    if !built {
        println!("cargo::error=The guest agent could not be built: see the messages above ({cargo:?})");
        process::exit(1);
    }
    let program = target_dir.join(TARGET).join("release/aconite-agent");
    println!("cargo::rustc-env=ACONITE_AGENT={}", program.display());
}

/// Settings of the build around this one that must not reach the agent's.
fn belongs_to_outer_build(name: &str) -> bool {
    let exact = [
        "RUSTFLAGS",
        "CARGO_ENCODED_RUSTFLAGS",
        "RUSTC_WRAPPER",
        "RUSTC_WORKSPACE_WRAPPER",
        "CLIPPY_ARGS",
        "CARGO_TARGET_DIR",
        "TARGET",
        "PROFILE",
    ];
    let prefixes =
        ["CARGO_BUILD_", "CARGO_PROFILE_", "CARGO_TARGET_", "CARGO_FEATURE_", "CARGO_CFG_", "CARGO_PKG_"];
    exact.contains(&name) || prefixes.iter().any(|prefix| name.starts_with(prefix))
}

fn variable(name: &str) -> String {
    env::var(name).unwrap_or_else(|error| {
        println!("cargo::error=Build scripts are run by cargo, which sets {name}: {error}");
        process::exit(1);
    })
}
