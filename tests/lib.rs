//! What the end-to-end tests share.
//!
//! They run with `cargo xtask test`, which gets kernels and programs for guests first and builds the program.

use std::path::PathBuf;
use std::process::Command;

/// The program: `$ACONITE_BIN`, else the one that cargo has built beside this test.
///
/// # Panics
/// It is not there.
pub fn aconite_path() -> PathBuf {
    let path = match std::env::var_os("ACONITE_BIN") {
        Some(path) => PathBuf::from(path),
        None => {
            let test = std::env::current_exe().expect("the path of this test");
            // target/debug/deps/TEST
            test.ancestors().nth(2).expect("a directory of cargo's").join("aconite")
        }
    };
    assert!(
        path.is_file(),
        "There is no program {}. Remedy: cargo xtask test, or cargo build",
        path.display()
    );
    path
}

/// A command that starts the program.
///
/// # Panics
/// The program is not there.
pub fn aconite() -> Command {
    Command::new(aconite_path())
}
