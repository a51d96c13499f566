//! Where the program and the material are: what `cargo xtask test` hands over.

use std::env;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::PathBuf;
use std::process::Command;

/// Environment variable with the path of the program.
pub const PROGRAM: &str = "ACONITE_BIN";
/// Environment variable with the path of the program of the bare guests.
pub const MATRIX: &str = "ACONITE_MATRIX";
/// Environment variable with the directory of kernels and guest programs.
pub const MATERIAL: &str = "ACONITE_MATERIAL";
/// Environment variable with the kernel of the tests that are not about a certain one.
pub const KERNEL: &str = "ACONITE_KERNEL";

fn required(variable: &str) -> PathBuf {
    match env::var_os(variable) {
        Some(path) => PathBuf::from(path),
        None => panic!("{variable} is not set. Remedy: start the tests with cargo xtask test, which sets it"),
    }
}

/// The program.
///
/// # Panics
/// It is not named, or not there.
pub fn aconite_path() -> PathBuf {
    let path = required(PROGRAM);
    assert!(path.is_file(), "{PROGRAM} names {}, which is no file. Remedy: cargo xtask test", path.display());
    path
}

/// A command that starts the program.
///
/// # Panics
/// The program is not there.
pub fn aconite() -> Command {
    Command::new(aconite_path())
}

/// A command that starts the program of the bare guests.
///
/// # Panics
/// It is not named.
pub fn matrix() -> Command {
    Command::new(required(MATRIX))
}

/// The directory of kernels and guest programs.
///
/// # Panics
/// It is not named, or not there.
pub fn material() -> PathBuf {
    let path = required(MATERIAL);
    assert!(
        path.is_dir(),
        "{MATERIAL} names {}, which is no directory. Remedy: cargo xtask fetch",
        path.display()
    );
    path
}

/// The kernel of tests that are not about a certain one.
pub fn default_kernel() -> String {
    env::var(KERNEL).unwrap_or_else(|_| "6.12".to_owned())
}

/// The image of the kernel with this name in the material.
///
/// # Panics
/// It is not there.
pub fn kernel_image(name: &str) -> PathBuf {
    let path = material().join("kernels").join(name).join("vmlinuz");
    assert!(path.is_file(), "There is no kernel {}. Remedy: cargo xtask fetch", path.display());
    path
}

/// A program of the material, started with the libraries and the loader that came with it.
///
/// # Panics
/// It is not there.
pub fn fetched_program(name: &str) -> Command {
    let tools = material().join("tools/usr");
    let program = tools.join("bin").join(name);
    assert!(program.is_file(), "There is no program {}. Remedy: cargo xtask fetch", program.display());
    let mut command = Command::new(tools.join("lib64/ld-linux-x86-64.so.2"));
    command.arg("--library-path").arg(tools.join("lib/x86_64-linux-gnu")).arg(program);
    command
}

/// Adds a line to a file of `target/errors`, where `cargo xtask test` shows and reads it.
///
/// # Panics
/// It cannot be written.
pub(crate) fn note(file: &str, line: &str) {
    let path = aconite_path().ancestors().nth(2).map(|target| target.join("errors").join(file));
    let path = path.expect("the program is in a target directory");
    let written = fs::create_dir_all(path.parent().expect("a directory")).and_then(|()| {
        let mut file = OpenOptions::new().create(true).append(true).open(&path)?;
        writeln!(file, "{line}")
    });
    written.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}
