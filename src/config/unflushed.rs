//! What becomes of what a guest has written and not flushed when power goes.

use super::Pmem;
use super::error::ConfigError;

/// What becomes of unflushed bytes of a device when power goes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Unflushed {
    /// They are kept: whatever is written is durable.
    #[default]
    Keep,
    /// They are dropped. The guest works on a copy in memory.
    Drop,
}

impl Unflushed {
    /// The word for it in options and the API.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Keep => "keep",
            Self::Drop => "drop",
        }
    }

    /// What has this name.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Keep, Self::Drop].into_iter().find(|what| what.name() == name)
    }
}

/// Refuses devices of which nothing can be dropped, or nothing be kept.
pub(super) fn validate_unflushed(option: &str, pmem: &Pmem) -> Result<(), ConfigError> {
    if pmem.unflushed == Unflushed::Keep {
        return Ok(());
    }
    let refuse = |problem: &str, remedy: &str| {
        Err(ConfigError::invalid(
            format_args!("{option}: unflushed"),
            pmem.unflushed.name(),
            problem,
            format_args!("leave it out, or {remedy}"),
        ))
    };
    if pmem.readonly {
        return refuse("nothing is written to a device that is only read", "leave readonly=on out");
    }
    if pmem.range.0.is_volatile() {
        return refuse("a volatile range loses everything", "give range=pmem");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_nothing_to_drop_is_refused() {
        for (text, problem) in [
            (
                "size=1G,readonly=on,unflushed=drop",
                "unflushed drop: nothing is written to a device that is only read; leave it out, or leave readonly=on out",
            ),
            ("size=1G,range=volatile,unflushed=drop", "unflushed drop: a volatile range loses everything"),
        ] {
            let pmem = Pmem::parse("--pmem", text).unwrap();
            let error = validate_unflushed("--pmem p0", &pmem).unwrap_err().to_string();
            assert!(error.contains(problem), "{error}");
        }
        validate_unflushed("--pmem", &Pmem::parse("--pmem", "size=1G,unflushed=drop").unwrap()).unwrap();
    }
}
