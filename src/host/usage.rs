//! What this program holds of its host, as /proc tells: for those who look for leaks.

use std::fs;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What the monitor holds of its host.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Usage {
    /// File descriptors.
    pub open_files: u64,
    /// Maps (lines of /proc/self/maps).
    pub maps: u64,
    /// Threads.
    pub threads: u64,
    /// Bytes of its own that are in memory, those of guests not counted (`RssAnon` in /proc/self/status).
    pub anonymous: u64,
}

impl Usage {
    /// What this process holds now; zero where /proc does not tell.
    pub fn now() -> Self {
        let entries = |dir| fs::read_dir(dir).map_or(0, |entries| entries.count() as u64);
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        Self {
            // The directory that is being read has a descriptor too.
            open_files: entries("/proc/self/fd").saturating_sub(1),
            maps: fs::read_to_string("/proc/self/maps").map_or(0, |maps| maps.lines().count() as u64),
            threads: entries("/proc/self/task"),
            anonymous: anonymous(&status),
        }
    }
}

fn anonymous(status: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let kilobytes = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kilobytes.unwrap_or(0) * 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_holds_something() {
        let usage = Usage::now();
        assert!(usage.open_files >= 3 && usage.maps > 3 && usage.threads >= 1, "{usage:?}");
        assert_eq!(anonymous("VmRSS:\t 7 kB\nRssAnon:\t     12 kB\n"), 12288);
        assert_eq!(anonymous(""), 0);
    }
}
