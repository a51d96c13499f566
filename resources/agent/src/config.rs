//! The text files in the initramfs that tell the agent what to do before it can be
//! asked, and the lines that it writes on the console.
//!
//! One entry a line, fields apart by single spaces, bytes that would be mistaken
//! (blank, tab, newline, backslash) written as `\ooo` in octal, as in fstab(5).

use crate::protocol::Share;

/// Modules to load, in order: the path of the uncompressed module, then its parameters.
/// Written by the packer, read by the agent in both roles. May be missing.
pub const MODULES_FILE: &str = "/etc/aconite/modules";
/// Shares to mount inside the new root of the nested host: tag, path, options ([`parse_shares`]).
/// Read in the role [`ROLE_HOST`] only. May be missing.
pub const SHARES_FILE: &str = "/etc/aconite/shares";
/// Word of the kernel command line that makes the agent serve as the first-level machine of the
/// nested host. (The same as running it with the argument `host`.)
pub const ROLE_HOST: &str = "aconite.role=host";
/// Mount tag of the 9p device that exports the root of the machine outside, for [`ROLE_HOST`].
pub const ROOT_TAG: &str = "root";
/// Options with which [`ROOT_TAG`] is mounted, read-only, under an overlay in memory.
pub const ROOT_OPTIONS: &str = "ro,trans=virtio,version=9p2000.L,msize=1048576,cache=loose";
/// Options for a share whose files change on both sides and can be mapped shared.
pub const SHARE_OPTIONS: &str = "trans=virtio,version=9p2000.L,msize=1048576,cache=mmap";

/// Start of every line that the agent writes on the console.
pub const CONSOLE_PREFIX: &str = "aconite-agent: ";
/// On the console when the port did not appear; the agent powers the machine off after it.
pub const CONSOLE_NO_PORT: &str = "aconite-agent: no virtio console port org.aconite.agent: powering off";
/// On the console, followed by the reason, when the agent cannot set the machine up; it powers it off after it.
pub const CONSOLE_FATAL: &str = "aconite-agent: fatal: ";

/// A line of a file of shares that is not one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadLine {
    /// Number of the line, from 1.
    pub number: usize,
    /// The line.
    pub line: String,
}

impl std::fmt::Display for BadLine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Line {} is not `TAG PATH OPTIONS`: {:?}", self.number, self.line)
    }
}

impl std::error::Error for BadLine {}

/// The text of [`SHARES_FILE`].
pub fn format_shares(shares: &[Share]) -> Vec<u8> {
    let mut out = Vec::new();
    for share in shares {
        escape(share.tag.as_bytes(), &mut out);
        out.push(b' ');
        escape(&share.path, &mut out);
        out.push(b' ');
        escape(share.options.as_bytes(), &mut out);
        out.push(b'\n');
    }
    out
}

/// Reads the text of [`SHARES_FILE`].
///
/// # Errors
/// A line that does not have three fields, or whose tag or options are not UTF-8.
pub fn parse_shares(text: &[u8]) -> Result<Vec<Share>, BadLine> {
    let lines = text.split(|byte| *byte == b'\n').enumerate().filter(|(_, line)| !line.is_empty());
    lines
        .map(|(index, line)| {
            parse_share(line).ok_or_else(|| BadLine {
                number: index + 1,
                line: String::from_utf8_lossy(line).into_owned(),
            })
        })
        .collect()
}

fn parse_share(line: &[u8]) -> Option<Share> {
    let mut fields = line.split(|byte| *byte == b' ').map(unescape);
    let share = Share {
        tag: String::from_utf8(fields.next()??).ok()?,
        path: fields.next()??,
        options: String::from_utf8(fields.next()??).ok()?,
    };
    fields.next().is_none().then_some(share)
}

/// Writes `bytes` as one field.
pub fn escape(bytes: &[u8], out: &mut Vec<u8>) {
    for &byte in bytes {
        match byte {
            b' ' | b'\t' | b'\n' | b'\\' => out.extend_from_slice(format!("\\{byte:03o}").as_bytes()),
            _ => out.push(byte),
        }
    }
}

/// Reads one field; `None` when a backslash is not followed by three octal digits of a byte.
pub fn unescape(field: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        rest = tail;
        if byte != b'\\' {
            out.push(byte);
            continue;
        }
        let (digits, tail) = rest.split_at_checked(3)?;
        rest = tail;
        out.push(u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok()?);
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_survive_the_file() {
        let shares = vec![
            Share { tag: "work".into(), path: b"/home/a b\\c\n\xff".to_vec(), options: SHARE_OPTIONS.into() },
            Share { tag: "t2".into(), path: b"/srv".to_vec(), options: "ro".into() },
        ];
        assert_eq!(parse_shares(&format_shares(&shares)), Ok(shares));
    }

    #[test]
    fn bad_lines_are_named() {
        let error = parse_shares(b"a /b ro\n\nonly two\n").unwrap_err();
        assert_eq!((error.number, error.line.as_str()), (3, "only two"));
        assert!(parse_shares(b"a /b\\9 ro\n").is_err());
        assert!(parse_shares(b"a /b ro more\n").is_err());
    }
}
