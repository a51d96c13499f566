//! Errors as people read them.

use std::error::Error;

/// An error and what led to it, one a line: `error: …`, then `  because: …`. Every error of this program says what
/// would be right in its own line.
pub fn error_chain(error: &dyn Error) -> String {
    let mut text = format!("error: {error}\n");
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(&format!("  because: {error}\n"));
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::path::Path;

    use super::*;
    use crate::api::Client;

    #[test]
    fn causes_stand_under_their_error() {
        let error = Client::new(Path::new("/nowhere/vm.sock")).call("GET", "/", None).unwrap_err();
        assert_eq!(
            error_chain(&error),
            "error: No machine answers on /nowhere/vm.sock: start one with --api-socket /nowhere/vm.sock\n  \
             because: No such file or directory (os error 2)\n"
        );
        assert_eq!(error_chain(&io::Error::other("alone")), "error: alone\n");
    }
}
