//! The programs of ACPICA.
//!
//! `ACONITE_IASL` and `ACONITE_ACPIEXEC` name the programs, should they be neither in `PATH` nor among the fetched
//! material.

use std::path::Path;
use std::process::Command;

/// A program of Debian's acpica-tools: the one that a variable names, or that `cargo xtask fetch` has unpacked
/// with the libraries and the loader it needs, or that is installed.
pub fn program(name: &str, variable: &str) -> Command {
    let command = || {
        if let Some(path) = std::env::var_os(variable) {
            return Command::new(path);
        }
        let tools =
            std::env::var_os("ACONITE_MATERIAL").map(|material| Path::new(&material).join("tools/usr"));
        if let Some(tools) = tools.filter(|tools| tools.join("bin").join(name).is_file()) {
            let mut command = Command::new(tools.join("lib64/ld-linux-x86-64.so.2"));
            command
                .arg("--library-path")
                .arg(tools.join("lib/x86_64-linux-gnu"))
                .arg(tools.join("bin").join(name));
            return command;
        }
        Command::new(name)
    };
    if let Err(error) = command().arg("-v").output() {
        panic!(
            "{name} cannot be started: {error}. Install the package acpica-tools, name the program in {variable}, \
             or run the tests by cargo xtask test, which fetches it"
        );
    }
    command()
}

/// Runs a program in a directory and gives back all it printed.
pub fn run(mut command: Command, directory: &Path, arguments: &[&str]) -> (bool, String) {
    let output = command.current_dir(directory).args(arguments).output().expect("the program runs");
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&text).into_owned())
}
